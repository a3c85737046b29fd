"""Top examples of families of objectives: comparison with plain loops, regions, keys, and bounded memory."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import relu
from torch.utils._python_dispatch import TorchDispatchMode

import featvis_func as fv
from featvis_func import objective as ob
from featvis_func.dataset import families
from featvis_func.dataset.places import reading_of
from featvis_func.io.image_files import center_crop, read_image
from featvis_func.models import Model
from featvis_func.objective import Objective
from featvis_func.rendering.spec import Selection
from featvis_func.tree import tree_map
from tests.dataset.test_examples import write_images
from tests.toys import OneConv, load_toy

SIZE = (8, 12)


class TwoLayers(OneConv):
    """A convolution of 4 filters ``(6, 10)``, 61 tokens of width 5, and 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.head(self.tokens(torch.cat([x.mean(1, keepdim=True), x], 1)).mean(1))


@pytest.fixture(scope="module")
def net() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_toy(TwoLayers().eval(), size=SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photographs"))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(model: Model, folder: Path) -> list[dict[str, Tensor]]:
    """The activations of each photograph, in the order of the paths, by hooks, and the photograph itself."""
    found: list[dict[str, Tensor]] = []
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))

    def record(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: found[-1].update({name: output[0].clone()})

    handles = [child.register_forward_hook(record(name)) for name, child in model.module.named_children()]
    with torch.no_grad():
        for path in sorted(folder.rglob("*.png")):
            image = read_image(path, (model.size[0], model.size[1]))
            found.append({ob.IMAGE: image})
            model.module((image[None] - mean) / std)
    for handle in handles:
        handle.remove()
    return found


def own_family() -> Objective:
    def score(a: Any, row: Any) -> Tensor:
        return (a["conv"].mean((1, 2)) * row["w"]).sum().tanh() - a["head"].max() * row["b"]

    return ob.family("own", ["conv", "head"], {"w": numbers(6, 4), "b": numbers(6, seed=1)}, score)


MATRIX, TOKENS, BIAS = numbers(7, 4), numbers(9, 5), numbers(9, seed=1)
FAMILIES: dict[str, Objective] = {
    "dot": ob.directions("conv", MATRIX),
    "cosine": ob.directions("tokens", TOKENS, similarity="cosine"),
    "dot_cosine": ob.directions("conv", MATRIX, similarity="dot_cosine"),
    "at a token": ob.directions("tokens", TOKENS, position=0),
    "sae": ob.sae("tokens", TOKENS, BIAS, center=numbers(5)),
    "relu": ob.sae("conv", MATRIX, activation="relu"),
    "topk": ob.sae("tokens", TOKENS, BIAS, activation="topk", k=2),
    "jumprelu": ob.sae("tokens", TOKENS, BIAS, activation="jumprelu", threshold=0.2, position=3),
    "neurons": ob.neurons("conv", [2, 0], [(1, 3), (5, 9)]),
    "logits": ob.logits("head", [2, 0]),
    "channels": -ob.channel("conv"),
    "one": ob.direction("conv", MATRIX[0]),
    "difference": ob.directions("conv", MATRIX) - 0.5 * ob.channel("tokens", 2),
    "sum of families": ob.directions("tokens", TOKENS) + 2 * ob.sae("tokens", TOKENS, BIAS, activation="topk", k=3),
    "own": own_family(),
    "penalty": ob.directions("conv", MATRIX) - ob.total_variation(),
}


def plain_scores(objective: Objective, count: int, of_images: list[dict[str, Tensor]]) -> Tensor:
    """The scores by a loop over images and members, ``(count, images)``."""
    return torch.stack(
        [torch.stack([objective.score(values, torch.tensor(m)) for values in of_images]) for m in range(count)]
    )


@pytest.fixture(params=[2**25, 200], ids=["", "in small parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "MOST_NUMBERS", request.param)


@pytest.mark.usefixtures("parts")
def test_scores_equal_a_plain_loop(net: Model, folder: Path) -> None:
    of_images = activations(net, folder)
    result = fv.top_examples(net, FAMILIES, folder, count=5, batch_size=6)
    assert list(result.layers) == list(FAMILIES)
    files = [str(path) for path in sorted(folder.rglob("*.png"))]
    for label, objective in FAMILIES.items():
        found = result.layers[label]
        count = objective.variants or {"channels": 4, "one": 1}[label]
        expected = plain_scores(objective, count, of_images)
        best = expected.topk(5)
        torch.testing.assert_close(found.scores, best.values, rtol=1e-4, atol=1e-5)
        for member in range(count):
            # The photograph that stands at each rank has that score, and no other rank has it.
            pictures = [files.index(example.path) for example in result.of(label, member)]
            torch.testing.assert_close(expected[member, pictures], best.values[member], rtol=1e-4, atol=1e-5)
            assert len(set(pictures)) == 5


def test_scores_equal_formulas(net: Model, folder: Path) -> None:
    of_images = activations(net, folder)
    conv, tokens, head = (torch.stack([a[name] for a in of_images]) for name in ("conv", "tokens", "head"))
    pixels = conv.flatten(2).transpose(1, 2)
    features = tokens @ TOKENS.T + BIAS
    ranks = features.argsort(-1, descending=True).argsort(-1)
    unit = torch.nn.functional.normalize
    cosine = unit(pixels, dim=-1) @ unit(MATRIX, dim=-1).T
    expected = {
        "dot": (pixels @ MATRIX.T).mean(1),
        "cosine": (unit(tokens, dim=-1) @ unit(TOKENS, dim=-1).T).mean(1),
        "dot_cosine": ((pixels @ MATRIX.T) * cosine.clamp_min(0.1) ** 2).mean(1),
        "at a token": tokens[:, 0] @ TOKENS.T,
        "sae": ((tokens - numbers(5)) @ TOKENS.T + BIAS).mean(1),
        "relu": relu(pixels @ MATRIX.T).mean(1),
        "topk": torch.where(ranks < 2, relu(features), 0.0).mean(1),
        "jumprelu": torch.where(features > 0.2, features, 0.0)[:, 3],
        "neurons": torch.stack([conv[:, 2, 1, 3], conv[:, 2, 5, 9], conv[:, 0, 1, 3], conv[:, 0, 5, 9]], 1),
        "logits": head[:, [2, 0]],
        "channels": -conv.mean((2, 3)),
    }
    result = fv.top_examples(net, {label: FAMILIES[label] for label in expected}, folder, count=4, batch_size=7)
    for label, scores in expected.items():
        torch.testing.assert_close(result.layers[label].scores, scores.topk(4, 0).values.T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_identity_equals_the_mean_of_each_channel(net: Model, folder: Path, batch_size: int) -> None:
    result = fv.top_examples(
        net, [ob.directions("conv", torch.eye(4)), ob.channel("conv"), "conv"], folder, count=9, batch_size=batch_size
    )
    identity, means, maxima = result.layers.values()
    assert list(result.layers) == ["directions:conv", "channel('conv')", "conv"]
    torch.testing.assert_close(identity.scores, means.scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(identity.positions, means.positions)
    assert bool((maxima.scores[:, 0] > means.scores[:, 0]).all())
    # Where the image with the highest mean is also the one with the highest maximum, the maximum is the place.
    same = maxima.pictures[:, 0] == means.pictures[:, 0]
    assert torch.equal(maxima.positions[same, 0], means.positions[same, 0])


@pytest.mark.parametrize("batch_size", [1, 3, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("parts")
@pytest.mark.slow
def test_equal_scores_are_in_the_order_of_paths(net: Model, tmp_path: Path, batch_size: int) -> None:
    for name in ("d", "b", "c", "a"):
        write_images(tmp_path / name, 1)
    result = fv.top_examples(net, FAMILIES, tmp_path, count=3, batch_size=batch_size)
    for label, of_label in result.layers.items():
        for member in range(len(of_label.scores)):
            assert [Path(e.path).parts[-3] for e in result.of(label, member)] == ["a", "b", "c"]


def box_at(position: Sequence[int], path: str) -> tuple[float, ...]:
    """The receptive field of the 3 x 3 convolution, which has no padding, in pixels of the file."""
    import PIL.Image

    with PIL.Image.open(path) as image:
        crop = center_crop(torch.tensor([image.height, image.width]).float(), SIZE)
    row, column = position
    window = torch.tensor([column, row, column + 3, row + 3]).float() * crop.scale
    return tuple((window + torch.stack([crop.left, crop.top, crop.left, crop.top])).tolist())


@pytest.mark.usefixtures("parts")
@pytest.mark.slow
def test_regions_are_the_receptive_fields_of_the_places(net: Model, folder: Path) -> None:
    of_images = dict(zip(sorted(map(str, folder.rglob("*.png"))), activations(net, folder), strict=True))
    labels = ("dot", "dot_cosine", "relu", "difference", "channels", "penalty")
    encoder = ob.sae("conv", MATRIX, numbers(7), center=numbers(4, seed=2))
    chosen = {**{label: FAMILIES[label] for label in labels}, "sae": encoder, "away": -2 * encoder}
    result = fv.top_examples(net, {**chosen, "neurons": FAMILIES["neurons"]}, folder, count=4, batch_size=6)
    for label, objective in chosen.items():
        for member in range(len(result.layers[label].scores)):
            for example in result.of(label, member):
                shown = objective.activation_map(of_images[example.path], torch.tensor(member))
                shown = -shown if label in ("channels", "away") else shown
                assert float(shown[example.position]) >= float(shown.max()) - 1e-5
                assert example.box == pytest.approx(box_at(example.position, example.path), abs=1e-3)
    for member, position in enumerate([(1, 3), (5, 9)] * 2):
        for example in result.of("neurons", member):
            assert example.position == position
            assert example.box == pytest.approx(box_at(position, example.path), abs=1e-3)


def test_regions_without_positions_are_the_whole_image(net: Model, folder: Path) -> None:
    chosen = {label: FAMILIES[label] for label in ("logits", "cosine", "at a token", "own")}
    result = fv.top_examples(net, chosen, folder, count=2)
    for label, axes in zip(chosen, (0, 1, 1, 0), strict=True):
        for example in result.of(label, 1):
            assert len(example.position) == axes
            left, top, right, bottom = example.box
            assert (right - left) / (bottom - top) == pytest.approx(1.5)
    assert {e.position for e in result.of("at a token", 2)} == {(0,)}


def test_a_map_of_other_positions_has_no_region(net: Model, folder: Path) -> None:
    pooled = ob.family(
        "pooled", "conv", {"w": MATRIX},
        lambda a, row: (a["conv"].mean((1, 2)) * row["w"]).sum(),
        lambda a, row: torch.einsum("chw,c->h", a["conv"], row["w"]),
    )  # fmt: skip
    (example,) = fv.top_examples(net, pooled, folder, count=1).of("pooled", 2)
    assert len(example.position) == 1
    left, top, right, bottom = example.box
    assert (right - left) / (bottom - top) == pytest.approx(1.5)


def test_positions_that_a_score_reads() -> None:
    def places(objective: Objective) -> tuple[int, list[int] | None]:
        reading = reading_of(objective.expression_or_name, "conv", (4, 5))
        return reading.sign, None if reading.places is None else reading.places.tolist()

    assert places(ob.neuron("conv")) == (1, [12])
    assert places(ob.neuron("conv", 3, position=(1, 1)) - ob.channel("conv")) == (1, [6])
    assert places(ob.facets(ob.neurons("conv", [1, 2], [(0, 0), (1, 0)]), 2)) == (1, [0, 0, 5, 5])
    assert places(-1 * ob.member(ob.neurons("conv", [1, 2], [(0, 0), (1, 0)]), 3)) == (-1, [5])
    assert places(ob.l2() - ob.direction_neuron("conv", [1.0, 0], position=(0, 2))) == (-1, [2])
    assert places(-(ob.l2() - 2 * ob.directions("conv", MATRIX))) == (1, None)
    assert places(own_family()) == (1, None)


def test_facets_share_the_examples_of_their_member(net: Model, folder: Path) -> None:
    plain, faceted = FAMILIES["dot"], ob.facets(FAMILIES["dot"], 3)
    scaled, channels = 2.0 * faceted, ob.facets(ob.channel("conv"), 2)
    result = fv.top_examples(net, {"a": plain, "b": faceted, "c": scaled, "d": channels}, folder, count=3)
    assert [len(layer.scores) for layer in result.layers.values()] == [7, 7, 7, 4]
    torch.testing.assert_close(result.layers["a"].scores, result.layers["b"].scores)
    torch.testing.assert_close(result.layers["a"].scores * 2, result.layers["c"].scores)
    for image in range(21):
        assert result.of("b", image) == result.of("b", image // 3 * 3)
        assert [e.path for e in result.of("b", image)] == [e.path for e in result.of("a", image // 3)]
    with pytest.raises(ValueError, match="layer 'b' has filters 0 to 20, got 21"):
        result.of("b", 21)
    assert result.of("d", 7) == result.of("d", 6)


@pytest.mark.parametrize("label", ["dot", pytest.param("own", marks=pytest.mark.slow), "facets"])
def test_some_members_are_searched_alone(net: Model, folder: Path, tmp_path: Path, label: str) -> None:
    objective = {**FAMILIES, "facets": ob.facets(FAMILIES["dot"], 2)}[label]
    chosen = [10, 11, 4, 5] if label == "facets" else [5, 2]
    everything = fv.top_examples(net, {"a": objective}, folder, count=3)
    result = fv.top_examples(net, Selection(objective, chosen, "a"), folder, count=3)
    result = fv.Examples.load(result.save(tmp_path / "saved"))
    assert len(result.layers["a"].scores) == 2
    for number in chosen:
        for one, other in zip(result.of("a", number), everything.of("a", number), strict=True):
            assert one._replace(score=0) == other._replace(score=0)
            assert one.score == pytest.approx(other.score, rel=1e-5)
    with pytest.raises(ValueError, match="'a' was searched for members 2,5, got 3"):
        result.of("a", 6 if label == "facets" else 3)


@pytest.mark.slow
def test_key_changes_with_whatever_a_family_depends_on(net: Model, folder: Path, tmp_path: Path) -> None:
    def family(change: float = 0.0, **options: Any) -> Objective:
        matrix = MATRIX.clone()
        matrix[3, 2] += change
        return ob.directions("conv", matrix, **options)

    searched = {"a": family(), "b": ob.neurons("conv", 1, [(0, 0)]), "v": ob.direction("conv", MATRIX[0])}
    given = ["conv", *(Selection(objective, None, label) for label, objective in searched.items())]
    result = fv.Examples.load(fv.top_examples(net, given, folder, count=2).save(tmp_path / "saved"))

    def covers(layers: Any) -> bool:
        return result.covers(fv.examples_key(net, layers, folder, count=2))

    assert covers(searched)
    assert covers("conv")
    assert covers(["conv", Selection(family(), label="a")])
    assert covers({"a": family(names=[str(i) for i in range(7)])})
    assert not covers({"c": family()})
    assert not covers({"a": family(change=1e-6)})
    assert not covers({"a": family(position=(0, 0))})
    assert not covers({"a": family(similarity="cosine")})
    assert not covers({"a": -family()})
    assert not covers({"b": ob.neurons("conv", 1, [(0, 1)])})
    assert not covers({"v": ob.direction("conv", MATRIX[1])})
    assert not covers({"a": Selection(family(), [0, 1])})
    assert not covers(["conv", "tokens"])


def test_key_of_layers_alone_is_what_it_was(net: Model, folder: Path) -> None:
    """So that the files of earlier versions stay valid."""
    key = fv.examples_key(net, "conv", folder)
    assert key.keys() == {"format", "model", "files", "count", "precision", "layers"}


def test_examples_of_own_code_are_not_used_again(net: Model, folder: Path) -> None:
    """Nothing tells whether the function has changed."""
    result = fv.top_examples(net, ["conv", own_family()], folder, count=1)
    assert not result.covers(fv.examples_key(net, own_family(), folder, count=1))
    assert result.covers(fv.examples_key(net, "conv", folder, count=1))


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_number_of_members(
    net: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))

            def see(value: Any) -> Any:
                if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                    self.numbers = max(self.numbers, value.untyped_storage().nbytes() // value.element_size())
                return value

            tree_map(see, result)
            return result

    members, width, positions = 600, 4, 60
    monkeypatch.setattr(families, "MOST_NUMBERS", 40_000)  # as many as there are features of one image
    matrix = numbers(members, width)
    searched = {
        "fast": ob.directions("conv", matrix),
        "cosine": ob.directions("conv", matrix, similarity="cosine"),
        "topk": ob.sae("conv", matrix, activation="topk", k=5),
        "slow": ob.directions("conv", matrix) - ob.channel("conv", 0),
        "facets": ob.facets(ob.sae("conv", matrix, activation="topk", k=5), 2),
    }
    for label, objective in searched.items():
        with Largest() as largest:
            fv.top_examples(net, {label: objective}, folder, count=2, batch_size=23)
        assert largest.numbers <= 45_000, label
    assert members * width * positions > 3 * 45_000


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (ob.directions("conv", numbers(3, 5)), "the direction has 5 numbers, but layer 'conv' has 4 channels"),
        (ob.neurons("conv", 1, [(7, 0)]), "no position (7, 0) in layer 'conv'"),
        (ob.directions("nowhere", MATRIX), "no layer 'nowhere'"),
        ([FAMILIES["dot"], FAMILIES["relu"], FAMILIES["dot"]], "two requests are called 'directions:conv'"),
        (["conv", Selection(FAMILIES["dot"], label="conv")], "two requests are called 'conv'"),
        ([Selection(FAMILIES["dot"], label="conv"), "conv"], "a layer and a family are both called 'conv'"),
        (ob.l2(), "l2(0.5) reads no layer of the model"),
        (ob.departure("conv", torch.rand(3, 8, 12)), "compares images with a picture of their size"),
        (Selection(FAMILIES["dot"], [2, 7]), "directions:conv has members 0 to 6, got 7"),
        (Selection(FAMILIES["dot"], []), "directions:conv has members 0 to 6, got none"),
        ([3], "expected the name of a layer or an Objective, got 3"),
        (
            ob.family("maps", "conv", {"w": MATRIX}, lambda a, row: a["conv"].mean(0)),
            "maps: the score of an image must be one number, got a tensor (6, 10)",
        ),
    ],
)
def test_invalid_families_raise(net: Model, folder: Path, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fv.top_examples(net, layers, folder)
