"""Animations, as Pillow opens them again."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from featvis_func.io.animation import FORMATS, animate, animation_bytes
from featvis_func.io.pil import picture


def some_frames(count: int = 4, channels: int = 3, h: int = 10, w: int = 12) -> Tensor:
    """Few colours, so that a GIF has room for all of them."""
    coarse = torch.randint(0, 256, (count, channels, 2, 2), generator=torch.Generator().manual_seed(channels))
    return coarse.to(torch.uint8).repeat_interleave(h // 2, 2).repeat_interleave(w // 2, 3)


def opened(data: bytes | Path) -> list[tuple[np.ndarray, int]]:
    """Each frame's pixels, RGBA, and its milliseconds."""
    with PIL.Image.open(data if isinstance(data, Path) else BytesIO(data)) as film:
        found = []
        for index in range(getattr(film, "n_frames", 1)):
            film.seek(index)
            film.load()
            found.append((np.asarray(film.convert("RGBA")).astype(int), film.info["duration"]))
        assert film.info["loop"] == 0
        return found


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_every_frame_comes_back(format: str, channels: int) -> None:
    frames = some_frames(channels=channels)
    if channels == 4:  # all that both can show
        frames[:, 3] = torch.where(frames[:, 3] > 99, 255, 0)
    found = opened(animation_bytes(frames, format, quality=100))
    assert len(found) == 4
    for (pixels, _), frame in zip(found, frames, strict=True):
        expected = np.asarray(picture(frame).convert("RGBA")).astype(int)
        assert pixels.shape == expected.shape
        np.testing.assert_array_equal(pixels[..., 3], expected[..., 3])
        opaque = expected[..., 3] > 0
        np.testing.assert_array_equal(pixels[opaque], expected[opaque])


def test_a_webp_that_may_lose_something_stays_near() -> None:
    ramp = torch.linspace(0, 1, 32)
    frames = torch.stack([torch.stack([ramp.expand(32, 32) * k, ramp[:, None].expand(32, 32), ramp.expand(32, 32)])
                          for k in (0.2, 0.6, 1.0)])  # fmt: skip
    small, exact = animation_bytes(frames), animation_bytes(frames, quality=100)
    for (pixels, _), (expected, _) in zip(opened(small), opened(exact), strict=True):
        assert np.abs(pixels - expected).mean() < 3
    assert animation_bytes(frames, quality=20) != small


def test_floats_and_bytes_are_one() -> None:
    frames = some_frames()
    for format in FORMATS:
        assert animation_bytes(frames, format) == animation_bytes(frames.double() / 255, format)
        assert animation_bytes(frames, format) == animation_bytes(frames.clone(), format)


def test_partial_opacity_is_whole_or_none_in_a_gif_and_kept_in_a_webp() -> None:
    frames = some_frames(channels=4)
    frames[:, 3] = torch.tensor([0, 40, 100, 127, 128, 180, 200, 255, 255, 255, 255, 255])
    (gif, *_), (webp, *_) = (opened(animation_bytes(frames, format, quality=100)) for format in FORMATS)
    assert gif[0][0, :, 3].tolist() == [0] * 4 + [255] * 8
    assert webp[0][0, :, 3].tolist() == frames[0, 3, 0].tolist()


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        (4, {}, [500, 500, 500, 1500]),
        (3, {"seconds": 1.0, "hold": 0.0}, [330, 340, 330]),
        (1, {"seconds": 0.4, "hold": 0.1}, [500]),
        (5, {"seconds": 0.01, "hold": 1.0}, [20, 20, 20, 20, 1020]),
    ],
    ids=str,
)
def test_durations(count: int, options: dict[str, Any], expected: list[int]) -> None:
    frames = some_frames(count)
    if count > 1:
        assert [ms for _, ms in opened(animation_bytes(frames, "gif", **options))] == expected
        found = [ms for _, ms in opened(animation_bytes(frames, "webp", **options))]
        assert sum(found) == pytest.approx(sum(expected), abs=10)
        assert np.abs(np.subtract(found, expected)).max() <= 10
    else:
        with PIL.Image.open(BytesIO(animation_bytes(frames, "webp", **options))) as still:
            assert getattr(still, "n_frames", 1) == 1


def test_equal_neighbours_take_as_long_as_they_would(tmp_path: Path) -> None:
    frames = some_frames(3)[[0, 1, 2, 2, 2]]
    for format in FORMATS:
        found = opened(animation_bytes(frames, format, seconds=1.0, hold=0.5))
        assert sum(ms for _, ms in found) == 1500
        assert sum(ms for _, ms in found[:2]) == 400


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "A.GIF"])
def test_a_file_is_written_by_its_suffix(tmp_path: Path, name: str) -> None:
    frames = some_frames()
    path = animate(frames, tmp_path / name, seconds=1.0, hold=0.0)
    assert path == tmp_path / name
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with PIL.Image.open(path) as film:
        assert film.format == name[2:].upper()
        assert film.size == (12, 10)
    assert path.read_bytes() == animation_bytes(frames, name[2:].lower(), seconds=1.0, hold=0.0)
    animate(frames[:2], str(path))
    assert len(opened(path)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "a.png"}, r"unknown suffix of an animation '\.png'; expected one of \.gif, \.webp"),
        ({"path": "a"}, "unknown suffix of an animation ''; expected"),
        ({"path": "none/a.gif"}, r"cannot write .*a\.gif.*No such file"),
        ({"frames": torch.zeros(3, 4, 4)}, r"expected frames \(k, c, h, w\), .* got \(3, 4, 4\) torch.float32"),
        ({"frames": torch.zeros(0, 3, 4, 4)}, r"got \(0, 3, 4, 4\)"),
        ({"frames": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "got .* torch.int64"),
        ({"seconds": 0.0}, "expected seconds above 0 and hold of at least 0, got seconds=0.0, hold=1.0"),
        ({"seconds": float("nan")}, "got seconds=nan"),
        ({"hold": -1.0}, "hold=-1.0"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments = {"frames": some_frames(), "path": "a.gif", **change}
    with pytest.raises(ValueError, match=message):
        animate(**{**arguments, "path": tmp_path / arguments["path"]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quality", [-1, 101])
def test_other_qualities(quality: int) -> None:
    with pytest.raises(ValueError, match=f"quality must be 0 to 100, got {quality}"):
        animation_bytes(some_frames(), quality=quality)


def test_other_formats() -> None:
    with pytest.raises(ValueError, match="unknown format of an animation 'mp4'; expected one of gif, webp"):
        animation_bytes(some_frames(), "mp4")
