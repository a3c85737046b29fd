"""Sweeps of any number of channels, videos and signals: what is stored, and how it is shown."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import featvis_func as fv
from featvis_func.io.animation import animation_bytes
from featvis_func.sweep import open_store, sweep
from featvis_func.sweep.layout import sealed, start_folder, unsealed
from featvis_func.sweep.shard import STATUSES, commit
from tests.sweep_toys import toy_result, toy_run

SHAPES = {"six channels": (6, 8, 8), "video": (3, 5, 8, 8), "signal": (3, 40)}


def store_of(path: Path, shape: tuple[int, ...], *, dtype: str = "float16", **render: Any) -> fv.Result:
    """Write a sweep of 4 filters whose images have this shape; return what was written."""
    run = toy_run({"conv": 4}, unit_size=2, image_dtype=dtype, render={"seed": 7, "steps": 5, **render})
    folder = start_folder(path, run)
    generator = torch.Generator().manual_seed(0)
    result = replace(
        toy_result("conv", range(4), 7),
        images=torch.rand(4, *shape, generator=generator).half().float(),
        activations=torch.rand(4, *shape[1:], generator=generator),
        snapshots=(torch.rand(4, 2, *shape, generator=generator) * 255).to(torch.uint8),
        status=("ok", "flat", "dead", "nonfinite"),
    )
    for unit in folder.run.units:
        rows = list(unit.filters)
        names = ("images", "activations", "scores", "best_step", "steps", "snapshots")
        part = replace(result, **{name: getattr(result, name)[rows] for name in names})
        part = replace(part, history=result.history[:, rows], filters=unit.filters)
        part = replace(part, status=tuple(result.status[row] for row in rows))
        commit(folder, unit, part, [7] * len(rows), seconds=1.0)
    return result


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_all_channels_and_frames_are_stored(tmp_path: Path, shape: tuple[int, ...]) -> None:
    written = store_of(tmp_path / "store", shape)
    store = open_store(tmp_path / "store")
    read = store.layer("conv")
    for name in ("images", "activations", "snapshots"):
        assert torch.equal(getattr(read, name), getattr(written, name))
    assert read.status == ("ok", "flat", "dead", "nonfinite")
    assert store.status().odd == {"flat": 1, "dead": 1, "nonfinite": 1}
    entry = store["conv", 2]
    assert torch.equal(entry.image, written.images[2])
    assert entry.activation.shape == shape[1:]
    files = store.export(tmp_path / "out")
    assert PIL.Image.open(files[0]).tobytes() == written.grid().tobytes()
    assert len([path for path in files if path.suffix == ".webp"]) == 4


def test_codes_of_earlier_shards_keep_their_meaning() -> None:
    assert STATUSES[:3] == ("ok", "dead", "nonfinite")
    assert STATUSES[3:] == ("flat",)


def test_recorded_bands_and_opacity_are_shown(tmp_path: Path) -> None:
    written = store_of(tmp_path / "store", (7, 8, 8), image="alpha", bands=[3, 2, 1])
    store = open_store(tmp_path / "store")
    shown = np.asarray(store.layer("conv").grid(columns=1))[2:10, 2:10]
    expected = (written.images[0, [3, 2, 1, 6]] * 255).round().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(shown, expected)
    path = store.animate("conv", 1, tmp_path / "a.webp")
    assert written.snapshots is not None
    frames = written.snapshots[1][:, [3, 2, 1, 6]]
    with PIL.Image.open(path) as animation:
        assert animation.convert("RGBA").getbands() == ("R", "G", "B", "A")
        assert getattr(animation, "n_frames", 1) == len(frames)


def test_a_video_of_a_sweep_is_played(tmp_path: Path) -> None:
    written = store_of(tmp_path / "store", (3, 5, 8, 8))
    path = open_store(tmp_path / "store").animate("conv", 1, tmp_path / "a.webp")
    assert path.read_bytes() == animation_bytes(written.images[1].movedim(1, 0), seconds=5 / 8, hold=0.0)


# --- the option -----------------------------------------------------------------------------------------------------


def six_channels() -> fv.Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(6, 3, 3), nn.ReLU()).eval()
    return fv.load_model(module, size=12, mean=[0.0] * 6, std=[1.0] * 6)


QUICK: dict[str, Any] = {"steps": 1, "progress": False}


def test_a_sweep_records_its_bands(tmp_path: Path) -> None:
    assert sweep(six_channels(), "0", [0, 1], out=tmp_path, bands=(3, 2, 1), **QUICK).complete
    assert json.loads((tmp_path / "run.json").read_text())["config"]["render"]["bands"] == [3, 2, 1]
    result = open_store(tmp_path).layer("0")
    assert result.images.shape == (2, 6, 12, 12)
    assert result.grid().tobytes() == result.grid(bands=(3, 2, 1)).tobytes() != result.grid(bands=(0, 1, 2)).tobytes()
    with pytest.raises(ValueError, match=r"render.bands: \[3,2,1\] in the folder, null requested"):
        sweep(six_channels(), "0", [0, 1], out=tmp_path, **QUICK)


def test_bands_that_do_not_exist_start_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bands has channel 6, but the channels are 0 to 5"):
        sweep(six_channels(), "0", [0], out=tmp_path / "out", bands=(6,), **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sweep_of_an_earlier_version_is_continued(tmp_path: Path) -> None:
    """Its run.json lacks the option, which now has its default."""
    assert sweep(six_channels(), "0", [0, 1], out=tmp_path, **QUICK).complete
    value = unsealed(tmp_path / "run.json")
    del value["config"]["render"]["bands"]
    (tmp_path / "run.json").write_bytes(sealed(value))
    for path in tmp_path.glob("units/*/*"):
        path.unlink()
    assert sweep(six_channels(), "0", [0, 1], out=tmp_path, **QUICK).complete
    assert open_store(tmp_path).layer("0").grid().mode == "RGB"
    with pytest.raises(ValueError, match=r"render.bands: null in the folder, \[0,1,2\] requested"):
        sweep(six_channels(), "0", [0, 1], out=tmp_path, bands=(0, 1, 2), **QUICK)
