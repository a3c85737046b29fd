"""Sweeps of models of videos and of signals, from the plan to the images read back."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import featvis_func as fv
from featvis_func.models import Model
from featvis_func.sweep import dry_run, open_store, sweep, validate

pytestmark = pytest.mark.usefixtures("cached_tracing", "one_thread")
by_kind = pytest.mark.parametrize("model", ["video_model", "signal_model"], indirect=True, ids=["video", "signal"])
QUICK: dict[str, Any] = {"steps": 2, "precision": "float32", "compile": "no"}


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Model:
    return request.getfixturevalue(request.param)


def positions_of(model: Model, layer: str) -> tuple[int, ...]:
    return {"0": model.size, "2": (2, 7, 9) if len(model.size) == 3 else (30,), "5": ()}[layer]


@pytest.mark.slow
@by_kind
def test_images_are_read_back_as_they_are_rendered(model: Model, tmp_path: Path) -> None:
    options = {**QUICK, "snapshots": 2}
    status = sweep(model, "all", out=tmp_path, unit_size=2, image_dtype="float16", progress=False, **options)
    assert status.complete
    assert (status.units, status.filters) == (8, 15)
    assert validate(tmp_path).sound
    store = open_store(tmp_path)
    assert store.layers == ("0", "2", "5")
    for layer in store.layers:
        stored, expected = store.layer(layer), fv.render(model, layer, batch_size=2, **options)
        assert stored.filters == expected.filters
        assert stored.activations.shape[1:] == positions_of(model, layer)
        torch.testing.assert_close(stored.images, expected.images, rtol=0, atol=1e-3)
        torch.testing.assert_close(stored.activations, expected.activations)
        torch.testing.assert_close(stored.history, expected.history)
        assert stored.snapshots is not None
        assert expected.snapshots is not None
        assert torch.equal(stored.snapshots, expected.snapshots)
        entry = store[layer, 3]
        assert torch.equal(entry.image, stored.images[3])
        assert torch.equal(entry.activation, stored.activations[3])


@by_kind
def test_sweep_goes_on_where_it_was_interrupted(model: Model, tmp_path: Path) -> None:
    options: dict[str, Any] = {**QUICK, "unit_size": 2, "progress": False}
    sweep(model, "2", out=tmp_path, **options)
    shards = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert len(shards) == 2
    max(tmp_path.rglob("2/*.json")).unlink()
    damaged = min(shards)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    report = validate(tmp_path)
    assert not report.sound
    assert (report.status.done, len(report.status.damaged)) == (0, 1)
    assert sweep(model, "2", out=tmp_path, **options).complete
    assert {path: path.read_bytes() for path in tmp_path.rglob("units/**/*.safetensors")} == shards
    assert validate(tmp_path).sound


@by_kind
def test_size_is_recorded_with_all_sides(model: Model, tmp_path: Path) -> None:
    expected = [6, 8, 8] if len(model.size) == 3 else [8]
    with pytest.warns(UserWarning, match="are stretched") if len(expected) == 3 else nullcontext():
        assert sweep(model, "2", [0], out=tmp_path, size=8, progress=False, **QUICK).complete
        assert sweep(model, "2", [0], out=tmp_path, size=tuple(expected), progress=False, **QUICK).complete
    config = json.loads((tmp_path / "run.json").read_text())["config"]
    assert (config["render"]["size"], config["input_size"]) == (expected, [*model.size])
    assert open_store(tmp_path)["2", 0].image.shape == (model.channels, *expected)


def test_size_of_images_is_recorded_with_both_sides(tiny: Model, tmp_path: Path) -> None:
    """A folder that another version has written can be continued."""
    assert sweep(tiny, "5", [0], out=tmp_path, size=8, progress=False, **QUICK).complete
    assert json.loads((tmp_path / "run.json").read_text())["config"]["render"]["size"] == [8, 8]
    assert sweep(tiny, "5", [0], out=tmp_path, size=(8, 8), progress=False, **QUICK).complete


@by_kind
@pytest.mark.slow
def test_estimate_counts_the_values_of_images_and_maps(model: Model) -> None:
    image = model.channels * math.prod(model.size)
    for layer, filters in (("0", 6), ("2", 4), ("5", 5)):
        plan = dry_run(model, iter([layer]), batch_size=2, steps=3, precision="float32")
        positions = math.prod(positions_of(model, layer))
        per_filter = image + 4 * positions + 4 * 3 + 170
        assert plan.estimate.bytes == filters * per_filter + len(plan.plans[0].units) * 1300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transforms": "maco"}, "transforms='maco' is for images and videos; signals have default, none"),
        ({"image": "alpha"}, "alpha is for images and videos"),
        ({"size": (8, 8)}, "takes signals, whose size is N samples"),
    ],
)
def test_what_signals_do_not_have_is_refused_before_anything_is_written(
    signal_model: Model, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    for call in (lambda **given: sweep(signal_model, "2", out=tmp_path / "out", **given),
                 lambda **given: dry_run(signal_model, "2", **given)):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call(**{**QUICK, **options})
    assert not (tmp_path / "out").exists()
