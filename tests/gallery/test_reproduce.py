"""The Python call that renders an image again, for objectives and parts that a record cannot hold, and families."""

import hashlib
import shlex
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import featvis_func as fv
from featvis_func import objective as o
from featvis_func.cli import main as cli
from featvis_func.gallery.reproduce import reproduce
from featvis_func.models import Model
from featvis_func.rendering.result import read_result
from featvis_func.sweep import open_store, sweep

QUICK: dict[str, Any] = {"steps": 2, "precision": "float32"}
VECTOR = torch.arange(12.0) - 3


def again(result: fv.Result, number: int, **supplied: Any) -> fv.Result:
    """Run the recorded call with the values that it asks for."""
    reproduction = reproduce(result.config, result.config["layer"], number, 0, filters=result.filters)
    assert reproduction.command is None
    for name in supplied:
        assert f"# {name}: " in reproduction.call
    names = dict(supplied)
    exec(reproduction.call, names)
    return names["result"]


OBJECTIVES: list[tuple[o.Objective, dict[str, Any]]] = [
    (o.direction("3", VECTOR), {"vector": VECTOR}),
    (o.direction("3", VECTOR, similarity="cosine"), {"vector": VECTOR}),
    (o.channel_weights("3", VECTOR) - 2 * o.direction_neuron("3", -VECTOR, position=(1, 2)), {}),
    (fv.channel("3") + 0.5 * (o.direction("3", VECTOR) - o.l2()), {"vector": VECTOR}),
    (o.interpolate(fv.channel("3", 1), o.direction("3", VECTOR), count=3), {"vector": VECTOR}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "supplied"), OBJECTIVES, ids=lambda value: None)
def test_objectives_that_hold_tensors_name_them(objective: o.Objective, supplied: dict[str, Any], tiny: Model) -> None:
    result = fv.render(tiny, objective, [0, 1], **QUICK)
    supplied = supplied or {"weights": VECTOR, "vector": -VECTOR}
    other = again(result, 1, **supplied, module=tiny.module)
    torch.testing.assert_close(other.images, result.images)


def test_two_tensors_of_one_name_get_two_variables(tiny: Model) -> None:
    result = fv.render(tiny, o.direction("3", VECTOR) - o.direction("5", VECTOR[:6]), **QUICK)
    other = again(result, 0, vector=VECTOR, vector_2=VECTOR[:6], module=tiny.module)
    torch.testing.assert_close(other.images, result.images)


@pytest.mark.slow
def test_activations_and_pictures_are_named(tiny: Model) -> None:
    picture = torch.rand(3, 20, 20)
    kept = fv.activations_of(tiny, ["3"], picture)
    result = fv.render(tiny, o.inversion(kept) - o.departure("5", picture), **QUICK)
    other = again(result, 0, reference=kept, picture=picture, module=tiny.module)
    torch.testing.assert_close(other.images, result.images)


@pytest.mark.slow
def test_an_objective_of_your_own_is_named(tiny: Model) -> None:
    own = o.Objective(lambda a, t: a["3"].mean(), lambda a, t: a["3"].mean(0), ("3",), (), "everything")
    result = fv.render(tiny, own - 0.1 * o.l2(), **QUICK)
    other = again(result, 0, own_objective=own, module=tiny.module)
    torch.testing.assert_close(other.images, result.images)


@pytest.mark.slow
def test_parts_of_your_own_are_named(tiny: Model) -> None:
    def shift(images: Tensor, draw: Tensor) -> Tensor:
        return images.roll(1, -1)

    parts: dict[str, Any] = {
        "transforms": fv.Transform(lambda key: key, shift),
        "image": fv.pixel(20),
        "optimizer": fv.optimizer.sgd(0.1),
    }
    result = fv.render(tiny, "3", [1], **parts, **QUICK)
    other = again(result, 1, **parts, module=tiny.module)
    torch.testing.assert_close(other.images, result.images)


def test_a_record_without_the_code_of_its_objective_says_so() -> None:
    config = {"model": "texturenet", "objective": "direction('head', <32 numbers>)", "layer": "head", "seed": 0}
    reproduction = reproduce(config, "head", 0, 0)
    assert reproduction.command is None
    compile(reproduction.call, "call", "exec")
    assert "# own_objective: direction('head', <32 numbers>), which is not recorded" in reproduction.call


def test_axes_that_the_user_states_are_recorded() -> None:
    class ChannelsLast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1).contiguous()

    net = nn.Sequential(nn.Conv2d(3, 5, 1), ChannelsLast(), nn.ReLU())
    model = fv.load_model(net, size=5, mean=[0.0] * 3, std=[1.0] * 3)
    result = fv.render(model, "1@hwc", [2], **QUICK)
    assert result.config["layer"] == "1@hwc"
    names: dict[str, Any] = {"module": net}
    exec(reproduce(result.config, result.config["layer"], 2, 0).call, names)
    torch.testing.assert_close(names["result"].images, result.images)


# --- families -------------------------------------------------------------------------------------------------------

MATRIX = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_a_sweeps_family_is_read_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = o.directions("head", MATRIX) - 0.5 * o.sae("head", MATRIX.flip(0), torch.arange(6.0))
    layers = {"mine": objective, "pairs": o.facets(o.directions("head", MATRIX[:2]), 2), "negative": -o.channel("head")}
    options: dict[str, Any] = {"steps": 2, "size": 32, "seed": 4, "image_dtype": "float16", "batch_size": 2}
    sweep("texturenet", layers, [2, 3], out=tmp_path / "store", **options)
    store = open_store(tmp_path / "store")
    monkeypatch.chdir(store.path)
    for label in layers:
        reproduction = reproduce(store.config, label, 3, 4, filters=store.filters(label))
        assert reproduction.command is None
        assert "not recorded" not in reproduction.call
        names: dict[str, Any] = {}
        exec(reproduction.call, names)
        result = names["result"]
        assert result.filters == ((2, 3) if label == "pairs" else (3,))
        torch.testing.assert_close(result.images[-1], store[label, 3].image, rtol=0, atol=2e-3)


def test_a_layer_beside_families_is_reproduced_as_before() -> None:
    config = {"model": "texturenet", "render": {"steps": 2}, "families": {"mine": {"objective": "x", "group": 1}}}
    assert reproduce(config, "head", 3, 0).command == "featvis render texturenet --layer head --filters 3 --steps 2"


@pytest.mark.slow
def test_the_command_of_a_family_renders_the_image_again(tmp_path: Path) -> None:
    file = tmp_path / "my dictionary.safetensors"
    safetensors.torch.save_file({"W_dec": MATRIX}, file)
    words = ["--objective", f"directions:head:{file}[W_dec]:1-2", "--minus", "0.5*channel:head:3", "--facets", "2"]
    quick = ["--steps", "2", "--size", "32", "--device", "cpu"]
    assert cli.main(["sweep", "texturenet", *words, *quick, "--out", str(tmp_path / "store")]) == 0
    assert cli.main(["render", "texturenet", *words, *quick, "--no-gallery", "--out", str(tmp_path / "first")]) == 0
    store, first = open_store(tmp_path / "store"), read_result(tmp_path / "first")
    (label,) = store.layers
    assert first.filters == store.filters(label) == (2, 3, 4, 5)
    expected = first.images[3]
    torch.testing.assert_close(store[label, 5].image, expected, rtol=0, atol=0.01)
    for config, name in ((store.config, label), (first.config, first.config["layer"])):
        command = reproduce(config, name, 5, 0).command
        assert command is not None
        again = shlex.split(command)
        assert again[again.index("--filters") + 1] == "4-5"
        assert cli.main([*again[1:], "--no-gallery", "--device", "cpu", "--out", str(tmp_path / "again")]) == 0
        result = read_result(tmp_path / "again")
        assert result.filters == (4, 5)
        torch.testing.assert_close(result.images[1], expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_results_family_names_the_tensor_and_its_checksum() -> None:
    result = fv.render("texturenet", o.directions("head", MATRIX), [1, 4], size=32, **QUICK)
    reproduction = reproduce(result.config, result.config["layer"], 4, 0, filters=result.filters)
    digest = hashlib.sha256(MATRIX.numpy().data).hexdigest()
    assert f"(6, 32) of torch.float32, which is not recorded; the SHA-256 of its numbers is {digest}" in (
        reproduction.call
    )
    names: dict[str, Any] = {"matrix": MATRIX}
    exec(reproduction.call, names)
    assert names["result"].filters == (4,)
    torch.testing.assert_close(names["result"].images[0], result.images[1], rtol=0, atol=1e-4)


def test_a_family_whose_images_depend_on_each_other_is_rendered_together() -> None:
    objective = o.directions("head", MATRIX) - o.diversity("head")
    result = fv.render("texturenet", objective, [1, 4], size=32, **QUICK)
    assert "objective, [1, 4]," in reproduce(result.config, result.config["layer"], 4, 0, filters=result.filters).call


def test_a_family_of_your_own_is_named(tmp_path: Path) -> None:
    own = o.family("mine", "head", {"v": MATRIX}, lambda a, row: (a["head"] * row["v"][:, None, None]).mean())
    sweep("texturenet", own, [1], out=tmp_path, steps=2, size=32)
    store = open_store(tmp_path)
    reproduction = reproduce(store.config, "mine", 1, 0)
    compile(reproduction.call, "call", "exec")
    assert "# own_objective: your own objective 'mine', which is not recorded" in reproduction.call
    assert "load_file" not in reproduction.call


@pytest.mark.slow
def test_what_is_stated_of_a_model_with_a_preset_is_repeated() -> None:
    model = fv.load_model(fv.load_model("texturenet", mean=[0.4] * 3, std=[0.2] * 3), size=48)
    result = fv.render(model, "head", [3], steps=1, progress=False)
    again = reproduce(result.config, "head", 3, 0)
    command = "featvis render texturenet --mean 0.4,0.4,0.4 --std 0.2,0.2,0.2 --input-size 48x48 --layer head"
    assert again.command is not None
    assert again.command.startswith(command)
    assert "size=(48, 48)" in again.call
    plain = reproduce(fv.render("texturenet", "head", [3], steps=1, progress=False).config, "head", 3, 0)
    assert plain.command is not None
    assert plain.command.startswith("featvis render texturenet --layer head --filters 3 --steps 1")
