"""Animations, decoded with Pillow."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from featvis_func.io.animation import FORMATS, animate, animation_bytes, moving_of, snapshot_display, write_moving
from featvis_func.io.display import Display
from featvis_func.io.pil import picture


def make_frames(count: int = 4, channels: int = 3, h: int = 10, w: int = 12) -> Tensor:
    """Create random frames with few enough colours for a GIF palette."""
    coarse = torch.randint(0, 256, (count, channels, 2, 2), generator=torch.Generator().manual_seed(channels))
    return coarse.to(torch.uint8).repeat_interleave(h // 2, 2).repeat_interleave(w // 2, 3)


def decode(data: bytes | Path) -> list[tuple[np.ndarray, int]]:
    """Return the RGBA pixels and the duration in milliseconds of each frame."""
    with PIL.Image.open(data if isinstance(data, Path) else BytesIO(data)) as image:
        frames = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            frames.append((np.asarray(image.convert("RGBA")).astype(int), image.info["duration"]))
        assert image.info["loop"] == 0
        return frames


@pytest.mark.parametrize(
    ("channels", "display"),
    [
        *((channels, Display()) for channels in (1, 2, 3, 4, 6)),
        *((channels, Display(alpha=True)) for channels in (2, 3, 4, 7)),
        (6, Display(bands=(3, 2, 1))),
        (6, Display(bands=(5,))),
        (7, Display(alpha=True, bands=(3, 2, 1))),
    ],
    ids=str,
)
@pytest.mark.parametrize("format", FORMATS)
def test_decoded_frames_equal_the_input(format: str, channels: int, display: Display) -> None:
    frames = make_frames(channels=channels)
    if display.alpha:  # Both formats represent these opacities exactly.
        frames[:, -1] = torch.where(frames[:, -1] > 99, 255, 0)
    decoded = decode(animation_bytes(frames, format, quality=100, display=display))
    assert len(decoded) == 4
    for (pixels, _), frame in zip(decoded, frames, strict=True):
        shown = picture(frame, display)
        assert (shown.mode == "RGBA") == display.alpha
        expected = np.asarray(shown.convert("RGBA")).astype(int)
        assert pixels.shape == expected.shape
        np.testing.assert_array_equal(pixels[..., 3], expected[..., 3])
        opaque = expected[..., 3] > 0
        # Pillow merges similar colours of a GIF with transparent pixels.
        rounding = 8 if format == "gif" and display.alpha else 0
        np.testing.assert_allclose(pixels[opaque], expected[opaque], rtol=0, atol=rounding)


def test_lossy_webp_is_close_to_lossless() -> None:
    ramp = torch.linspace(0, 1, 32)
    frames = torch.stack([torch.stack([ramp.expand(32, 32) * k, ramp[:, None].expand(32, 32), ramp.expand(32, 32)])
                          for k in (0.2, 0.6, 1.0)])  # fmt: skip
    lossy, exact = animation_bytes(frames), animation_bytes(frames, quality=100)
    for (pixels, _), (expected, _) in zip(decode(lossy), decode(exact), strict=True):
        assert np.abs(pixels - expected).mean() < 3
    assert animation_bytes(frames, quality=20) != lossy


def test_float_and_uint8_frames_give_identical_bytes() -> None:
    frames = make_frames()
    for format in FORMATS:
        assert animation_bytes(frames, format) == animation_bytes(frames.double() / 255, format)
        assert animation_bytes(frames, format) == animation_bytes(frames.clone(), format)


def test_gif_thresholds_opacity_and_webp_keeps_it() -> None:
    frames = make_frames(channels=4)
    frames[:, 3] = torch.tensor([0, 40, 100, 127, 128, 180, 200, 255, 255, 255, 255, 255])
    display = Display(alpha=True)
    encoded = (animation_bytes(frames, format, quality=100, display=display) for format in FORMATS)
    (gif, *_), (webp, *_) = map(decode, encoded)
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
def test_frame_durations(count: int, options: dict[str, Any], expected: list[int]) -> None:
    frames = make_frames(count)
    if count > 1:
        assert [ms for _, ms in decode(animation_bytes(frames, "gif", **options))] == expected
        durations = [ms for _, ms in decode(animation_bytes(frames, "webp", **options))]
        assert sum(durations) == pytest.approx(sum(expected), abs=10)
        assert np.abs(np.subtract(durations, expected)).max() <= 10
    else:
        with PIL.Image.open(BytesIO(animation_bytes(frames, "webp", **options))) as still:
            assert getattr(still, "n_frames", 1) == 1


def test_merging_equal_frames_keeps_their_duration(tmp_path: Path) -> None:
    frames = make_frames(3)[[0, 1, 2, 2, 2]]
    for format in FORMATS:
        decoded = decode(animation_bytes(frames, format, seconds=1.0, hold=0.5))
        assert sum(ms for _, ms in decoded) == 1500
        assert sum(ms for _, ms in decoded[:2]) == 400


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "A.GIF"])
def test_animate_selects_the_format_by_suffix(tmp_path: Path, name: str) -> None:
    frames = make_frames()
    path = animate(frames, tmp_path / name, seconds=1.0, hold=0.0)
    assert path == tmp_path / name
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with PIL.Image.open(path) as image:
        assert image.format == name[2:].upper()
        assert image.size == (12, 10)
    assert path.read_bytes() == animation_bytes(frames, name[2:].lower(), seconds=1.0, hold=0.0)
    animate(frames[:2], str(path))
    assert len(decode(path)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "a.png"}, r"unknown suffix of an animation '\.png'; expected one of \.gif, \.webp"),
        ({"path": "a"}, "unknown suffix of an animation ''; expected"),
        ({"path": "none/a.gif"}, r"cannot write .*a\.gif.*No such file"),
        ({"frames": torch.zeros(3, 4)}, r"frames must be \(k, c, h, w\), .* got \(3, 4\) torch.float32"),
        ({"frames": torch.zeros(0, 3, 4, 4)}, r"got \(0, 3, 4, 4\)"),
        ({"frames": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "got .* torch.int64"),
        ({"seconds": 0.0}, "seconds must be finite and above 0, got 0.0"),
        ({"seconds": float("nan")}, "seconds must be finite and above 0, got nan"),
        ({"hold": -1.0}, "hold must be finite and at least 0, got -1.0"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_animate_invalid_arguments_raise_and_write_nothing(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arguments = {"frames": make_frames(), "path": "a.gif", **change}
    with pytest.raises(ValueError, match=message):
        animate(**{**arguments, "path": tmp_path / arguments["path"]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quality", [-1, 101])
def test_quality_out_of_range_raises(quality: int) -> None:
    with pytest.raises(ValueError, match=rf"quality must be in \[0, 100\], got {quality}"):
        animation_bytes(make_frames(), quality=quality)


def test_unknown_format_raises() -> None:
    with pytest.raises(ValueError, match="unknown format of an animation 'mp4'; expected one of gif, webp"):
        animation_bytes(make_frames(), "mp4")


# --- videos, signals and snapshots ----------------------------------------------------------------------------------


def test_video_plays_its_frames_at_8_per_second(tmp_path: Path) -> None:
    video = make_frames(16).movedim(0, 1)
    moving = moving_of(video, None)
    assert moving is not None
    decoded = decode(write_moving(tmp_path / "a.webp", moving, None, None))
    assert sum(ms for _, ms in decoded) == pytest.approx(2000, abs=10)
    assert len(decoded) == 16
    slow = decode(write_moving(tmp_path / "a.gif", moving, 4.0, 1.0))
    assert sum(ms for _, ms in slow) == 5000
    for index in (0, 7, 15):
        np.testing.assert_array_equal(slow[index][0], np.asarray(picture(video[:, index]).convert("RGBA")))


def test_a_video_is_played_and_not_its_snapshots() -> None:
    video, snapshots = torch.rand(3, 5, 4, 6), torch.zeros(2, 3, 5, 4, 6, dtype=torch.uint8)
    moving = moving_of(video, snapshots)
    assert moving is not None
    assert torch.equal(moving.frames, video.movedim(1, 0))
    still = moving_of(video[:, 0], snapshots[:, :, 0])
    assert still is not None
    assert (still.frames.shape, still.seconds, still.hold) == ((2, 3, 4, 6), 2.0, 1.0)
    assert moving_of(video[:, 0], None) is None
    assert moving_of(video[:, 0, 0], None) is None


def test_snapshots_lack_an_opacity_that_was_added_to_the_image() -> None:
    display = Display(alpha=True, bands=(2, 1, 0))
    image, snapshots = torch.rand(4, 5, 6), torch.zeros(2, 4, 5, 6, dtype=torch.uint8)
    assert snapshot_display(image, snapshots, display) == display
    assert snapshot_display(image, snapshots[:, :3], display) == Display(bands=(2, 1, 0))


@pytest.mark.parametrize("shape", [(3, 100), (3, 9, 4, 5)], ids=["signals", "videos"])
def test_snapshots_of_signals_and_videos_are_drawn_like_them(shape: tuple[int, ...]) -> None:
    frames = (torch.rand(2, *shape) * 255).to(torch.uint8)
    decoded = decode(animation_bytes(frames, quality=100))
    for (pixels, _), frame in zip(decoded, frames, strict=True):
        np.testing.assert_array_equal(pixels[..., :3], np.asarray(picture(frame)))
    if len(shape) == 2:  # plots are lossless at any quality
        assert animation_bytes(frames, quality=10) == animation_bytes(frames, quality=100)


def test_animate_takes_bands_and_an_opacity(tmp_path: Path) -> None:
    frames = make_frames(channels=6)
    path = animate(frames, tmp_path / "a.gif", bands=(3, 2, 1))
    assert path.read_bytes() == animation_bytes(frames[:, [3, 2, 1]], "gif")
    assert animate(frames, path).read_bytes() == animation_bytes(frames[:, :3], "gif")
    path = animate(frames, tmp_path / "a.webp", alpha=True, bands=(4,))
    assert path.read_bytes() == animation_bytes(frames[:, [4, 4, 4, 5]], display=Display(alpha=True))
    with pytest.raises(ValueError, match=r"bands has channel 5, but the channels are 0 to 4; got \(5,\)"):
        animate(frames, path, alpha=True, bands=(5,))
    with pytest.raises(ValueError, match=r"bands must be 1 channel \(grey\) or 3 .*, got \(0, 1\)"):
        animate(frames, path, bands=(0, 1))
