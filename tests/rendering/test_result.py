"""Results: the image grid, the files and the summary."""

import json
import math
import os
import stat
from dataclasses import fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import safetensors
import safetensors.torch
import torch

from featvis_func.io.animation import animation_bytes
from featvis_func.io.display import Display
from featvis_func.io.pil import picture
from featvis_func.rendering.files import writable_folder
from featvis_func.rendering.result import Result, read_result

GAP = 2


def make(count: int = 5, *, channels: int = 3, h: int = 4, w: int = 6, first: int = 0) -> Result:
    generator = torch.Generator().manual_seed(count)
    return Result(
        images=torch.rand(count, channels, h, w, generator=generator),
        activations=torch.rand(count, 2, 3, generator=generator),
        scores=torch.arange(count) + 0.5,
        best_step=torch.arange(count),
        filters=tuple(range(first, first + count)),
        status=("ok",) * count,
        history=torch.rand(7, count, generator=generator),
        steps=torch.full((count,), 7),
        config={"layer": "conv", "steps": 7},
    )


def of_shape(*shape: int, count: int = 3, **config: Any) -> Result:
    """A result whose images have this shape, with saliency and snapshots of 2 steps."""
    generator = torch.Generator().manual_seed(sum(shape))
    result = make(count)
    return replace(
        result,
        images=torch.rand(count, *shape, generator=generator),
        saliency=torch.rand(count, *shape[1:], generator=generator),
        snapshots=(torch.rand(count, 2, *shape, generator=generator) * 255).to(torch.uint8),
        config={**result.config, **config},
    )


# --- the grid -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [
        (1, None, (1, 1)),
        (2, None, (1, 2)),
        (3, None, (2, 2)),
        (5, None, (2, 3)),
        (9, None, (3, 3)),
        (5, 1, (5, 1)),
        (5, 4, (2, 4)),
        (5, 5, (1, 5)),
        (5, 99, (1, 5)),
    ],
)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grid_geometry(count: int, columns: int | None, shape: tuple[int, int], channels: int) -> None:
    result = make(count, channels=channels)
    grid = result.grid(columns=columns)
    width = 6 * (channels if channels == 2 else 1)
    rows, per_row = shape
    assert grid.size == (per_row * (width + GAP) + GAP, rows * (4 + GAP) + GAP)
    assert grid.mode == {1: "L", 2: "L", 3: "RGB", 4: "RGB"}[channels]
    pixels = np.asarray(grid).copy()
    for i, image in enumerate(result.images):
        y, x = i // per_row * (4 + GAP) + GAP, i % per_row * (width + GAP) + GAP
        tile = pixels[y : y + 4, x : x + width]
        np.testing.assert_array_equal(tile, np.asarray(picture(image)))
        tile[...] = 255
    assert (pixels == 255).all(), "pixels outside of the tiles are not white"


@pytest.mark.parametrize("columns", [0, -1])
def test_grid_with_less_than_one_column_raises(columns: int) -> None:
    with pytest.raises(ValueError, match=f"columns must be at least 1, got {columns}"):
        make().grid(columns=columns)


def test_picture_rounds_and_clamps() -> None:
    values = torch.tensor([0.0, 0.5 / 255 - 1e-5, 0.6 / 255, 1.0, 1.2, -0.1])
    assert np.asarray(picture(values.reshape(1, 1, 6))).ravel().tolist() == [0, 0, 1, 255, 255, 0]


def test_picture_shows_other_channels_side_by_side() -> None:
    rgb = torch.stack([torch.full((2, 3), v) for v in (1.0, 0.0, 0.2)])
    assert picture(rgb).getpixel((2, 1)) == (255, 0, 51)
    side_by_side = np.asarray(picture(torch.stack([torch.zeros(2, 3), torch.ones(2, 3)])))
    assert side_by_side.tolist() == [[0, 0, 0, 255, 255, 255]] * 2


SHAPES = {"six channels": (6, 4, 6), "video": (3, 12, 4, 6), "six-channel video": (6, 2, 4, 6), "signal": (3, 40)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("alpha", [False, True], ids=["opaque", "alpha"])
def test_grid_consists_of_the_pictures(shape: tuple[int, ...], alpha: bool) -> None:
    result = of_shape(*shape, count=5, **({"alpha": True} if alpha else {}))
    pictures = result.pictures()
    for drawn, image in zip(pictures, result.images, strict=True):
        assert drawn.tobytes() == picture(image, Display(alpha=alpha)).tobytes()
    gap = 14 if len(shape) == 2 else GAP
    w, h = pictures[0].size
    for columns in (None, 2):
        grid = np.asarray(result.grid(columns=columns)).copy()
        per_row = (grid.shape[1] - gap) // (w + gap)
        assert grid.shape[:2] == (-(-5 // per_row) * (h + gap) + gap, per_row * (w + gap) + gap)
        assert columns is None or per_row == columns
        for i, drawn in enumerate(pictures):
            y, x = i // per_row * (h + gap) + gap, i % per_row * (w + gap) + gap
            np.testing.assert_array_equal(grid[y : y + h, x : x + w], np.asarray(drawn))
            grid[y : y + h, x : x + w] = 255
        assert (grid == 255).all()


def test_bands_are_those_of_the_configuration_or_of_the_call() -> None:
    result = of_shape(6, 4, 6, bands=[3, 2, 1])
    for bands, shown in ((None, (3, 2, 1)), ((5,), (5,)), ([0, 1, 2], (0, 1, 2))):
        expected = picture(result.images[1], Display(bands=shown))
        assert result.pictures(bands=bands)[1].tobytes() == expected.tobytes()
        pixels = np.asarray(result.grid(columns=1, bands=bands))
        np.testing.assert_array_equal(pixels[8:12, 2:8], np.asarray(expected))
    for bands, message in (((6,), "bands has channel 6, but the channels are 0 to 5"), ((0, 1), "bands must be 1")):
        with pytest.raises(ValueError, match=message):
            result.grid(bands=bands)
    with pytest.raises(ValueError, match=r"bands are channels of images and videos, got \(0,\) for signals"):
        of_shape(6, 40).grid(bands=(0,))


def test_notebook_shows_the_grid() -> None:
    result = make()
    image = PIL.Image.open(BytesIO(result._repr_png_()))
    assert image.format == "PNG"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(result.grid()))


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (("ok", "ok", "ok"), "Result(3 images 3 x 4 x 6, mean score 1.5)"),
        (("ok", "dead", "dead"), "Result(3 images 3 x 4 x 6, mean score 1.5, {'dead': 2})"),
        (("nonfinite", "dead", "ok"), "Result(3 images 3 x 4 x 6, mean score 1.5, {'dead': 1, 'nonfinite': 1})"),
    ],
)
def test_repr(status: tuple[str, ...], expected: str) -> None:
    assert repr(replace(make(3), status=status)) == expected


@pytest.mark.parametrize(
    ("shape", "words"),
    [((3, 16, 4, 6), "2 videos 3 x 16 x 4 x 6"), ((12, 500), "2 signals 12 x 500"), ((6, 4, 6), "2 images 6 x 4 x 6")],
)
def test_repr_names_what_was_rendered(shape: tuple[int, ...], words: str) -> None:
    assert repr(of_shape(*shape, count=2)) == f"Result({words}, mean score 1)"


def reject(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf], ids=str)
def test_summary_is_strict_json(score: float) -> None:
    result = make(2)
    not_ok = replace(result, scores=torch.tensor([1.5, score]), best_step=torch.tensor([3, -1]), status=("ok", "dead"))
    summary = json.loads(json.dumps(not_ok.summary()), parse_constant=reject)
    assert summary["config"] == {"layer": "conv", "steps": 7}
    assert summary["filters"] == [
        {"filter": 0, "score": 1.5, "best_step": 3, "steps": 7, "status": "ok"},
        {"filter": 1, "score": None, "best_step": -1, "steps": 7, "status": "dead"},
    ]
    assert summary["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"featvis-func", "torch", "torchvision", "numpy"} <= set(summary["versions"])


# --- files ----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_save_writes_the_promised_files(tmp_path: Path) -> None:
    result = make(3, first=9)
    files = result.save(tmp_path / "a" / "b")
    names = ["grid.png", "filter-0009.png", "filter-0010.png", "filter-0011.png", "result.safetensors", "run.json"]
    assert [path.name for path in files] == names
    assert sorted(contents(tmp_path / "a" / "b")) == sorted(names)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(files[0])), np.asarray(result.grid()))
    for path, image in zip(files[1:4], result.images, strict=True):
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(path)), np.asarray(picture(image)))
    tensors = safetensors.torch.load_file(files[4])
    for name in ("images", "activations", "scores", "best_step", "history", "steps"):
        assert torch.equal(tensors.pop(name), getattr(result, name))
    assert tensors.pop("filters").tolist() == [9, 10, 11]
    assert not tensors
    with safetensors.safe_open(files[4], "pt") as file:
        assert json.loads(file.metadata()["run"], parse_constant=reject) == result.summary()
    text = files[5].read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert json.loads(text, parse_constant=reject) == result.summary()


def test_image_names_sort_by_filter(tmp_path: Path) -> None:
    files = replace(make(2), filters=(7, 123456)).save(tmp_path)
    assert [path.name for path in files[1:3]] == ["filter-000007.png", "filter-123456.png"]


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    make().save(tmp_path / "first")
    make().save(tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    other = make()
    other.images[0, 0, 0, 0] += 0.5
    other.save(tmp_path / "third")
    assert contents(tmp_path / "third") != contents(tmp_path / "first")


def test_saving_again_replaces_the_files(tmp_path: Path) -> None:
    make(channels=1).save(tmp_path)
    make().save(tmp_path)
    make().save(tmp_path / "fresh")
    fresh = contents(tmp_path / "fresh")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == fresh


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_file_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        files = make().save(tmp_path)
        assert os.umask(mask) == mask
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
# For the third file: each is written, synchronised, followed by its folder, and renamed.
@pytest.mark.parametrize(("where", "number"), [("replace", 3), ("write", 3), ("fsync", 5)])
def test_interrupted_save_leaves_complete_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str, number: int
) -> None:
    make().save(tmp_path)
    before = contents(tmp_path)
    real, calls = getattr(os, where), []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(os, where, fail)
    other = make(channels=1)
    expected = ValueError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        other.save(tmp_path)
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
        assert "filter-0001.png" in str(caught.value)
    after = contents(tmp_path)
    assert sorted(after) == sorted(before), "a temporary file is left"
    changed = [name for name in before if after[name] != before[name]]
    assert sorted(changed) == ["filter-0000.png", "grid.png"]
    assert after["run.json"] == before["run.json"]


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_file_in_place_of_the_folder_raises(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot write to the folder") as caught:
        make().save(tmp_path / path)
    assert repr(str(tmp_path / path)) in str(caught.value)
    assert contents(tmp_path) == {"file": b"mine"}


def test_folder_in_place_of_a_file_raises(tmp_path: Path) -> None:
    (tmp_path / "grid.png").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*grid\.png"):
        make().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_folder_without_write_permission_raises(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot write to the folder"):
        make().save(tmp_path)


def test_writable_folder_leaves_no_file(tmp_path: Path) -> None:
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    assert writable_folder(str(tmp_path)) == tmp_path


def test_images_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    replace(make(3), filters=(0, 1, 2)).save(tmp_path)
    replace(make(1), filters=(1,)).save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("filter-0001.png", "grid.png", "mine.txt", "result.safetensors", "run.json")
    }


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optional", [(), ("saliency",), ("snapshots",), ("saliency", "snapshots")], ids=str)
def test_read_result_returns_what_was_saved(tmp_path: Path, optional: tuple[str, ...]) -> None:
    result = with_snapshots(3, first=9)
    result = replace(result, saliency=torch.rand(3, 4, 6), status=("ok", "dead", "nonfinite"))
    result = replace(result, **{name: None for name in ("saliency", "snapshots") if name not in optional})
    result.save(tmp_path)
    read = read_result(tmp_path)
    for field in fields(Result):
        expected, value = getattr(result, field.name), getattr(read, field.name)
        assert torch.equal(value, expected) if isinstance(expected, torch.Tensor) else value == expected, field.name


def rewrite(
    folder: Path, *, rename: dict[str, str] | None = None, config: dict[str, Any] | None = None, drop: str = ""
) -> None:
    """Change the names of tensors and entries of the configuration in a saved result."""
    path = folder / "result.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        summary = json.loads(file.metadata()["run"])
    tensors = {(rename or {}).get(n, n): t for n, t in safetensors.torch.load_file(path).items() if n != drop}
    summary["config"] |= config or {}
    safetensors.torch.save_file(tensors, path, {"run": json.dumps(summary)})


def test_read_result_reads_the_names_of_earlier_versions(tmp_path: Path) -> None:
    result = replace(make(3), saliency=torch.rand(3, 4, 6))
    result.save(tmp_path)
    rewrite(tmp_path, rename={"saliency": "transparency"}, config={"views": "lucid", "slots": 8, "transparency": True})
    read = read_result(tmp_path)
    assert result.saliency is not None
    assert read.saliency is not None
    assert torch.equal(read.saliency, result.saliency)
    assert read.transparent().images.shape == (3, 4, 4, 6)
    assert read.config == {**result.config, "transforms": "lucid", "batch_size_used": 8, "saliency": True}


def test_read_result_names_unknown_and_missing_tensors(tmp_path: Path) -> None:
    make(3).save(tmp_path)
    rewrite(tmp_path, rename={"steps": "lengths"}, drop="history")
    with pytest.raises(ValueError, match=r"result\.safetensors' is damaged: it lacks history, steps"):
        read_result(tmp_path)
    replace(make(3), saliency=torch.rand(3, 4, 6)).save(tmp_path)
    rewrite(tmp_path, rename={"saliency": "heat"})
    with pytest.raises(
        ValueError,
        match=r"result\.safetensors' holds heat, which this version does not know; expected images, .*saliency",
    ):
        read_result(tmp_path)


def test_read_result_of_another_folder_or_a_damaged_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no result\.safetensors of a rendering that can be read"):
        read_result(tmp_path / "none")
    make(3).save(tmp_path)
    path = tmp_path / "result.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"result\.safetensors' is damaged: "):
        read_result(tmp_path)
    safetensors.torch.save_file({"images": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"result\.safetensors' is damaged: 'run'"):
        read_result(tmp_path)


# --- snapshots ------------------------------------------------------------------------------------------------------


def with_snapshots(count: int = 3, *, channels: int = 3, first: int = 0, frames: int = 4) -> Result:
    result = make(count, channels=channels, first=first)
    return replace(result, snapshots=torch.randint(0, 256, (count, frames, channels, 4, 6)).to(torch.uint8))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_snapshots_are_saved_and_animated(tmp_path: Path, channels: int) -> None:
    result = with_snapshots(3, first=9, channels=channels)
    files = result.save(tmp_path)
    animations = ["filter-0009.webp", "filter-0010.webp", "filter-0011.webp"]
    assert [path.name for path in files if path.suffix == ".webp"] == animations
    assert files[-1].name == "run.json"
    assert sorted(contents(tmp_path)) == sorted(path.name for path in files)
    tensors = safetensors.torch.load_file(tmp_path / "result.safetensors")
    assert result.snapshots is not None
    assert torch.equal(tensors["snapshots"], result.snapshots)
    assert json.loads((tmp_path / "run.json").read_text())["snapshots"] == 4
    with PIL.Image.open(tmp_path / animations[1]) as animation:
        assert getattr(animation, "n_frames", 1) == 4
        assert animation.size == (6 * (2 if channels == 2 else 1), 4)
    before = contents(tmp_path)
    result.save(tmp_path / "again")
    assert contents(tmp_path / "again") == before


def test_animations_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    with_snapshots(3).save(tmp_path)
    (tmp_path / "filter-0007.webp").write_bytes(b"mine")
    make(2, first=1).save(tmp_path)
    (tmp_path / "filter-0001.webp").write_bytes(b"mine, too")  # The last run has written no animation.
    make(1, first=2).save(tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith("filter")} == {
        *("filter-0002.png", "filter-0007.webp", "filter-0001.webp")
    }


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animate_writes_the_snapshots_of_a_filter(tmp_path: Path, suffix: str) -> None:
    result = with_snapshots(channels=1, first=5)
    path = result.animate(tmp_path / f"six.{suffix}", 6, seconds=0.4, hold=0.6)
    assert result.snapshots is not None
    total = 0
    with PIL.Image.open(path) as animation:
        for index, frame in enumerate(result.snapshots[1, :, 0]):
            animation.seek(index)
            animation.load()
            total += animation.info["duration"]
            if suffix == "gif":
                np.testing.assert_array_equal(np.asarray(animation.convert("L")), frame.numpy())
    assert total == 1000


def test_animate_raises_for_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this result has no snapshots; render with snapshots="):
        make().animate(tmp_path / "a.gif", 0)
    with pytest.raises(ValueError, match="this result has no filter 3; it has 0-2"):
        with_snapshots().animate(tmp_path / "a.gif", 3)
    with pytest.raises(ValueError, match=r"unknown suffix of an animation '\.mp4'; expected one of \.gif, \.webp"):
        with_snapshots().animate(tmp_path / "a.mp4", 0)
    assert list(tmp_path.iterdir()) == []


# --- any number of channels, videos and signals ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_everything_is_saved_and_read_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    result = of_shape(*shape)
    files = result.save(tmp_path)
    for path, image in zip(files[1:4], result.pictures(), strict=True):
        assert PIL.Image.open(path).tobytes() == image.tobytes()
    assert len([p for p in files if p.suffix == ".webp"]) == 3
    read = read_result(tmp_path)
    for name in ("images", "saliency", "snapshots"):
        assert torch.equal(getattr(read, name), getattr(result, name)), "the tensors hold all channels"
    assert read.config == result.config
    before = contents(tmp_path)
    read.save(tmp_path / "again")
    assert contents(tmp_path / "again") == before


def contents_of_animations(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.webp"))]


def test_a_video_is_saved_as_an_animation_that_plays_it(tmp_path: Path) -> None:
    result = replace(of_shape(3, 12, 4, 6), snapshots=None)
    result.save(tmp_path)
    expected = [animation_bytes(video.movedim(1, 0), seconds=1.5, hold=0.0) for video in result.images]
    assert contents_of_animations(tmp_path) == expected
    replace(result, snapshots=of_shape(3, 12, 4, 6).snapshots).save(tmp_path / "with snapshots")
    assert contents_of_animations(tmp_path / "with snapshots") == expected
    path = result.animate(tmp_path / "one.webp", 1)
    assert path.read_bytes() == expected[1]
    path.unlink()
    make(2).save(tmp_path)  # which has no animations
    assert contents_of_animations(tmp_path) == []


def test_saved_bands_are_recorded(tmp_path: Path) -> None:
    result = of_shape(6, 4, 6)
    result.save(tmp_path, bands=(3, 2, 1))
    read = read_result(tmp_path)
    assert read.config == {**result.config, "bands": [3, 2, 1]}
    assert json.loads((tmp_path / "run.json").read_text())["config"]["bands"] == [3, 2, 1]
    expected = result.grid(bands=(3, 2, 1)).tobytes()
    assert PIL.Image.open(tmp_path / "grid.png").tobytes() == read.grid().tobytes() == expected
    assert expected != result.grid().tobytes()
    assert result.snapshots is not None
    frames = animation_bytes(result.snapshots[0][:, [3, 2, 1]])
    assert (tmp_path / "filter-0000.webp").read_bytes() == frames
    before = contents(tmp_path)
    read.save(tmp_path / "later")
    assert contents(tmp_path / "later") == before
    with pytest.raises(ValueError, match="bands has channel 7"):
        result.save(tmp_path / "none", bands=(7,))
    assert not (tmp_path / "none").exists()


def test_four_channels_have_an_opacity_only_where_the_library_has_made_one(tmp_path: Path) -> None:
    infrared = replace(of_shape(4, 4, 6, mean=[0.0] * 4), saliency=None, snapshots=None)
    infrared.save(tmp_path / "infrared")
    assert read_result(tmp_path / "infrared").grid().mode == infrared.grid().mode == "RGB"
    for config in ({"alpha": True}, {"image": "alpha"}, {"render": {"image": "alpha"}}):
        assert replace(infrared, config=config).grid().mode == "RGBA"


def test_opacity_of_earlier_versions_is_recognised(tmp_path: Path) -> None:
    """They recorded neither that an Image of the user's own has one, nor that transparent() has added one."""
    old = replace(of_shape(4, 4, 6, mean=[0.0] * 3), snapshots=None)
    old.save(tmp_path)
    read = read_result(tmp_path)
    assert read.config["alpha"] is True
    assert read.grid().mode == "RGBA"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_transparent_adds_an_opacity_once(tmp_path: Path, shape: tuple[int, ...]) -> None:
    result = of_shape(*shape)
    faded = result.transparent()
    assert faded.images.shape == (3, shape[0] + 1, *shape[1:])
    assert faded.config == {**result.config, "alpha": True}
    assert torch.equal(faded.images[:, :-1], result.images)
    assert 0 <= faded.images[:, -1].min() < faded.images[:, -1].max() == 1
    assert torch.equal(faded.snapshots, result.snapshots)  # type: ignore[arg-type]
    for drawn in faded.pictures():
        assert drawn.mode == ("RGB" if len(shape) == 2 else "RGBA")
    twice = faded.transparent()
    torch.testing.assert_close(twice.images[:, -1], faded.images[:, -1].square())
    faded.save(tmp_path)
    if len(shape) < 4:  # the snapshots have no opacity, and are shown as before
        result.save(tmp_path / "plain")
        assert contents_of_animations(tmp_path) == contents_of_animations(tmp_path / "plain")
    assert read_result(tmp_path).config["alpha"] is True


def test_transparent_smooths_frames_and_signals_along_their_own_axes() -> None:
    saliency = torch.zeros(1, 2, 128, 128)
    saliency[0, 0, 64, 64] = 1.0
    result = replace(of_shape(3, 2, 128, 128, count=1), saliency=saliency)
    opacity = result.transparent(percentile=100).images[0, -1]
    assert (opacity[0] > 0).sum() == 25
    assert (opacity[1] == 0).all()
    signal = replace(of_shape(3, 128, count=1), saliency=saliency[:, 0, 64])
    assert (signal.transparent(percentile=100).images[0, -1] > 0).sum() == 5
