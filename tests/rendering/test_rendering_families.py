"""Families of objectives, rendered: from Python, and from one line of text."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import featvis_func as fv
from featvis_func import objective as objectives
from featvis_func.rendering.spec import is_spec, parse_spec

pytestmark = pytest.mark.usefixtures("cached_tracing")
FEW: dict[str, Any] = {"steps": 3, "size": 32, "precision": "float32", "progress": False}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_the_identity_renders_the_channels_bit_for_bit() -> None:
    rows = fv.render("texturenet", fv.directions("block2.conv", torch.eye(48)), [40, 3], **FEW)
    channels = fv.render("texturenet", "block2.conv", [40, 3], **FEW)
    for name in ("images", "scores", "activations", "history"):
        assert torch.equal(getattr(rows, name), getattr(channels, name))
    assert rows.vectors is not None
    assert torch.equal(rows.vectors, torch.eye(48)[[40, 3]])


def test_a_member_does_not_depend_on_which_others_are_rendered() -> None:
    family = fv.directions("block2.conv", random(30, 48))
    together = fv.render("texturenet", family, range(4, 20), **FEW)
    alone = fv.render("texturenet", family, [17], **FEW)
    torch.testing.assert_close(alone.images[0], together.images[13], atol=2e-3, rtol=0)


@pytest.mark.slow
def test_no_member_is_compiled_anew() -> None:
    from torch._dynamo.utils import counters

    family = fv.sae("block1.conv", random(20, 24), random(20), activation="topk", k=3)
    fast: dict[str, Any] = {"image": "pixel", "transforms": "none", "optimizer": "sgd", "size": 32, "steps": 2}
    renderer = fv.make_renderer("texturenet", family, compile=True, batch_size=2, precision="float32", **fast)
    renderer([0, 1])
    graphs = counters["stats"]["unique_graphs"]
    renderer([17, 4, 11, 19, 3])
    assert counters["stats"]["unique_graphs"] == graphs


class TestFacets:
    @pytest.mark.slow
    def test_units_in_one_batch_have_the_images_they_have_alone(self) -> None:
        family = fv.facets(fv.channel("block2.conv"), 3, weight=0.5)
        together = fv.render("texturenet", family, [*range(6), *range(30, 36)], batch_size=6, **FEW)
        alone = fv.render("texturenet", family, range(30, 33), batch_size=3, **FEW)
        torch.testing.assert_close(alone.images, together.images[6:9], atol=2e-3, rtol=0)
        assert together.config["batch_size_used"] == 6

    def test_a_last_batch_that_is_not_full_and_fewer_filters_than_a_batch(self) -> None:
        family = fv.facets(fv.channel("head"), 2)
        renderer = fv.make_renderer("texturenet", family, range(10), batch_size=4, steps=2, size=32)
        whole, part = renderer(), renderer([6, 7])
        assert whole.filters == tuple(range(10))
        assert part.filters == (6, 7)
        torch.testing.assert_close(part.images, whole.images[6:8], atol=2e-3, rtol=0)
        assert len(renderer([8, 9, 0, 1]).images) == 4

    @pytest.mark.slow
    def test_facets_of_one_unit_differ_more_than_without_the_term(self) -> None:
        images = {
            weight: fv.render("texturenet", fv.facets(fv.channel("block3.conv"), 3, weight=weight), range(3), steps=12,
                              size=48, progress=False).images
            for weight in (0.0, 1.0)
        }  # fmt: skip

        def mean_style(batch: torch.Tensor) -> float:
            features = fv.make_features(fv.load_model("texturenet"), ["block3.conv"], precision="float32")
            values = features.apply(features.weights, (batch - 0.5) / 0.25)["block3.conv"]
            score = objectives.diversity("a").batch_score
            assert score is not None
            return float(score({"a": values}, torch.arange(3)).mean())

        assert mean_style(images[1.0]) < mean_style(images[0.0])

    @pytest.mark.parametrize(("filters", "options", "words"), [
        ([0, 1], {}, r"come in groups of 3, such as 0 to 2; got \[0, 1\]"),
        ([1, 2, 3], {}, "come in groups of 3, such as 0 to 2"),
        ([0, 2, 1], {}, "come in groups of 3"),
        (range(3), {"batch_size": 2}, "in groups of 3: they need at least that batch size"),
        (range(3), {"tolerance": 0.1}, "no tolerance"),
        ([95, 96, 97], {}, "come in groups|describes images 0 to 95"),
    ])  # fmt: skip
    def test_what_divides_a_group_is_refused(self, filters: Any, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            fv.render("texturenet", fv.facets(fv.channel("head"), 3), filters, **FEW, **options)


@pytest.mark.parametrize(("objective", "filters", "words"), [
    (fv.directions("head", torch.ones(2, 31)), None, "has 31 numbers, but layer 'head' has 32 channels"),
    (fv.directions("head", torch.ones(2, 32)), [2], "describes images 0 to 1, got 2"),
    (fv.neurons("block1.conv", 0, [(400, 0)]), None, r"no position \(400, 0\)"),
    (fv.logits("head", [32]), None, "no class 32"),
    (fv.directions("head", torch.ones(2, 32)) - fv.channel("head"), None, "different numbers of members"),
])  # fmt: skip
def test_what_does_not_fit_the_model_is_refused_before_the_first_step(objective: Any, filters: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fv.render("texturenet", objective, filters, **FEW)


def test_a_result_of_a_family_is_saved_and_read(tmp_path: Path) -> None:
    family = fv.directions("head", random(4, 32), names=["a", "b", "c", "d"])
    result = fv.render("texturenet", family, [1, 3], **FEW)
    assert result.config["names"] == {"1": "b", "3": "d"}
    assert result.config["layer"] == "directions:head"
    assert result.config["family"]["tensors"]["matrix"]["shape"] == [4, 32]
    result.save(tmp_path)
    read = fv.read_result(tmp_path)
    assert read.config == result.config
    assert read.vectors is not None
    assert torch.equal(read.vectors, family.family.rows["matrix"][[1, 3]])  # type: ignore[union-attr]


class TestSpec:
    MODEL = fv.load_model("texturenet")

    @pytest.fixture
    def dictionary(self, tmp_path: Path) -> str:
        path = tmp_path / "dictionary: two.safetensors"  # a colon and a space
        tensors = {"rows": random(5, 48), "other": random(3, 7)}
        safetensors.torch.save_file(tensors, path)
        return str(path)

    @pytest.mark.parametrize(("text", "expected", "numbers"), [
        ("channel:block2.conv", "channel('block2.conv')", None),
        ("channel:block2.conv:0-2,7", "channel('block2.conv')", [0, 1, 2, 7]),
        ("neuron:block2.conv:3@4,5", "neurons('block2.conv', (3,), ((4, 5),))", None),
        ("neuron:block2.conv:3-4,9@4,5;0,1", "neurons('block2.conv', (3, 4, 9), ((4, 5), (0, 1)))", None),
        ("logit:3", "logits('output', (3,))", None),
        ("logit:3,spirals", "logits('output', (3, 14))", None),
        ("neuron:head:all@0", "neurons('head', <32 channels>, ((0,),))", None),
        ("logit:head:3,5-6", "logits('head', (3, 5, 6))", None),
    ])  # fmt: skip
    def test_objectives_without_a_file(self, text: str, expected: str, numbers: list[int] | None) -> None:
        selection = parse_spec(text, self.MODEL)
        assert str(selection.objective) == expected
        assert selection.filters == numbers

    def test_rows_of_a_file(self, dictionary: str) -> None:
        selection = parse_spec(f"directions:block2.conv:{dictionary}[rows]@2,3:1-3", self.MODEL, similarity="cosine")
        assert selection.filters == [1, 2, 3]
        assert selection.objective.variants == 5
        expected = fv.directions("block2.conv", random(5, 48), similarity="cosine", position=(2, 3))
        values = {"block2.conv": random(48, 6, 6)}
        assert torch.equal(selection.objective(values, torch.tensor(4)), expected(values, torch.tensor(4)))
        assert selection.objective.family is not None
        assert selection.objective.family.command == (
            "--objective", f"directions:block2.conv:{dictionary}[rows]@2,3", "--similarity", "cosine"
        )  # fmt: skip

    def test_what_is_subtracted(self, dictionary: str) -> None:
        text = f"directions:block2.conv:{dictionary}[rows]"
        fixed = parse_spec(text, self.MODEL, minus="0.5*channel:block2.conv:7").objective
        paired = parse_spec(text, self.MODEL, minus=text).objective
        values = {"block2.conv": random(48, 6, 6)}
        own = parse_spec(text, self.MODEL).objective
        for i in range(5):
            number = torch.tensor(i)
            expected = own(values, number) - 0.5 * values["block2.conv"][7].mean()
            torch.testing.assert_close(fixed(values, number), expected)
            assert paired(values, number) == 0

    @pytest.mark.parametrize(("minus", "expected"), [
        ("logit:head:3", "channel('head') - member(logits('head', (3,)), 0)"),
        (" 0.5 * neuron:head:7@0", None),
        ("-2*channel:head:1", "channel('head') - -2 * member(channel('head'), 1)"),
    ])  # fmt: skip
    def test_one_member_is_subtracted_from_all(self, minus: str, expected: str | None) -> None:
        objective = parse_spec("channel:head:0-3", self.MODEL, minus=minus).objective
        assert objective.targeted == ("head",)
        assert expected is None or str(objective) == expected
        if minus.startswith("-"):
            assert objective.family is not None
            assert objective.family.command is not None
            assert objective.family.command[-1] == "--minus=-2*channel:head:1"  # not taken for a flag

    def test_facets_take_whole_units(self) -> None:
        selection = parse_spec("channel:head:2,5", self.MODEL, copies=3)
        assert selection.filters == [6, 7, 8, 15, 16, 17]
        assert selection.objective.group == 3

    @pytest.mark.parametrize(("text", "options", "words"), [
        ("directoins:head:x", {}, "no kind 'directoins'; did you mean 'directions'"),
        ("head", {}, "no kind 'head'; expected one of channel:..."),
        ("neuron:head:3", {}, "must be neuron:LAYER:CHANNELS@POSITION"),
        ("neuron:head:x@1", {}, "'x' must be numbers and ranges"),
        ("neuron:head:3@1,x", {}, "must be neuron:LAYER:CHANNELS@POSITION"),
        ("channel:head:3-1", {}, "'3-1'"),
        ("logit:cat", {}, "no category 'cat'"),
        ("directions:head", {}, "names no file"),
        ("directions:head:nosuch.safetensors", {}, "no dictionary 'nosuch.safetensors'"),
        ("channel:head", {"minus": "channel:head:1-3"}, "--minus takes one number"),
        ("channel:head", {"minus": "x*channel:head:1"}, "--minus: factor must be a number"),
        ("channel:head", {"copies": 1}, "facets: count must be at least 2"),
        ("directions:head:x.npy", {"similarity": "near"}, "unknown similarity 'near'"),
        ("channel:head", {"similarity": "cosine"}, "--similarity goes with directions"),
        ("channel", {}, "no kind 'channel'; expected channel:..."),
    ])  # fmt: skip
    def test_other_text_gets_one_clear_error(self, text: str, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            parse_spec(text, self.MODEL, **options)
        assert "\n" not in str(caught.value)

    def test_a_layer_keeps_its_name(self) -> None:
        class Named(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.channel = torch.nn.Conv2d(3, 4, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.channel(x)

        model = fv.load_model(Named(), size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
        assert not is_spec("channel:3", model)
        assert is_spec("neuron:channel:3@1,1", model)
        assert fv.render(model, "channel:3", steps=1, progress=False).filters == (3,)

    def test_render_takes_one_line_of_text(self) -> None:
        result = fv.render("texturenet", "neuron:block2.conv:3-4@2,2", steps=1, size=32, progress=False)
        assert result.config["names"] == {"0": "3 at 2,2", "1": "4 at 2,2"}
        with pytest.raises(ValueError, match="the filters are given twice"):
            fv.render("texturenet", "channel:head:3", [4], **FEW)
