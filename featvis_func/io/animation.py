"""Write a sequence of images, or a video, as an animated GIF or WebP."""

import itertools
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor

from featvis_func.io.atomic import write_file
from featvis_func.io.display import Display
from featvis_func.io.pil import picture
from featvis_func.validation import check_bands, check_float, check_name

FORMATS = ("gif", "webp")
"""Supported file formats."""

FRAME_RATE = 8
"""Frames per second at which videos are played, unless a duration is given."""

_TICK = {"gif": 0.01, "webp": 0.001}  # seconds, the unit of frame durations in each format
_MIN_DURATION = 0.02  # seconds; viewers slow down animations with shorter frames


class Moving(NamedTuple):
    """What can be played of one filter."""

    frames: Tensor
    """Frames and the other fields are arguments of :func:`animation_bytes`."""
    display: Display
    seconds: float
    hold: float


def moving_of(image: Tensor, snapshots: Tensor | None, display: Display = Display()) -> Moving | None:  # noqa: B008
    """What can be played of one filter: a video, at 8 frames per second; else the snapshots of its run, in 2 seconds.

    Args:
        image: ``(c, h, w)``, ``(c, t, h, w)`` or ``(c, t)``.
        snapshots: ``(k, c, *positions)``, if there are any.
        display: how the image is shown.

    Returns:
        The frames; ``None`` for an image or a signal without snapshots.

    >>> moving_of(torch.zeros(3, 16, 4, 5), None).frames.shape
    torch.Size([16, 3, 4, 5])
    """
    if image.ndim == 4:
        return Moving(image.movedim(1, 0), display, seconds=image.shape[1] / FRAME_RATE, hold=0.0)
    if snapshots is None:
        return None
    return Moving(snapshots, snapshot_display(image, snapshots, display), seconds=2.0, hold=1.0)


def snapshot_display(image: Tensor, snapshots: Tensor, display: Display) -> Display:
    """How snapshots are shown: like the image, without the opacity that :meth:`Result.transparent` adds to it."""
    return display._replace(alpha=display.alpha and snapshots.shape[1] == image.shape[0])


def write_moving(path: str | Path, moving: Moving, seconds: float | None, hold: float | None) -> Path:
    """Write what can be played of one filter to a file.

    Args:
        path, seconds, hold: as for :func:`animate`; ``None``: those of ``moving``.
        moving: from :func:`moving_of`.
    """
    return animate(
        moving.frames,
        path,
        seconds=moving.seconds if seconds is None else seconds,
        hold=moving.hold if hold is None else hold,
        **moving.display._asdict(),
    )


def animate(
    frames: Tensor,
    path: str | Path,
    *,
    seconds: float = 2.0,
    hold: float = 1.0,
    alpha: bool = False,
    bands: tuple[int, ...] | None = None,
) -> Path:
    """Write a looping animation to a file, atomically.

    Args:
        frames: ``(k, c, h, w)``, uint8 or float in ``[0, 1]``; a video ``(c, t, h, w)`` is ``video.movedim(1, 0)``.
            Also ``(k, c, t)`` for plots of signals and ``(k, c, t, h, w)`` for strips of videos.
        path: a ``.gif`` or ``.webp`` file in an existing folder. GIF is limited to 256 colours per frame, and to pixels
            that are either opaque (opacity of at least one half) or transparent.
        seconds, hold: as for :func:`animation_bytes`.
        alpha: whether the last channel is an opacity.
        bands: one channel, shown as grey, or three, shown as red, green and blue. Default: the first three (grey if
            there is one channel, side by side in grey if there are two).

    Returns:
        The path.

    Raises:
        ValueError: If the suffix is unknown, the file cannot be written, or as for :func:`animation_bytes`.
    """
    path = Path(path)
    check_name("suffix of an animation", path.suffix.lower(), [f".{name}" for name in FORMATS])
    display = Display(alpha, None if bands is None else check_bands(bands))
    data = animation_bytes(frames, path.suffix.lower()[1:], seconds=seconds, hold=hold, display=display)
    try:
        write_file(path, data)
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return path


def animation_bytes(
    frames: Tensor,
    format: str = "webp",
    *,
    seconds: float = 2.0,
    hold: float = 1.0,
    quality: int = 90,
    display: Display = Display(),  # noqa: B008
) -> bytes:
    """Encode a looping animation as the bytes of a file; equal frames give identical bytes.

    Args:
        frames: ``(k, c, *positions)``, uint8 or float in ``[0, 1]``. Each is drawn by
            :func:`~featvis_func.io.pil.picture`. Consecutive equal frames are merged into a longer one.
        format: one of :data:`FORMATS`.
        seconds: duration of all frames without ``hold``, above 0. Each frame is shown for at least 0.02 s.
        hold: additional duration of the last frame in seconds, at least 0.
        quality: WebP quality, 0 to 100, where 100 is lossless. Ignored for GIF, and for plots, which are lossless.
        display: which channels are shown, and whether the last one is an opacity.

    Returns:
        The contents of the file.

    Raises:
        ValueError: If the format is unknown, the frames have another shape or dtype, a number is out of range, or there
            are no such bands.

    >>> animation_bytes(torch.rand(3, 3, 8, 8), "gif")[:6]
    b'GIF89a'
    """
    check_name("format of an animation", format, FORMATS)
    known = frames.dtype == torch.uint8 or frames.is_floating_point()
    if frames.ndim not in (3, 4, 5) or 0 in frames.shape or not known:
        raise ValueError(
            "frames must be (k, c, h, w), or (k, c, t) for signals, or (k, c, t, h, w) for videos, uint8 or float in"
            f" [0, 1], got {tuple(frames.shape)} {frames.dtype}"
        )
    seconds, hold = check_float("seconds", seconds, above=0), check_float("hold", hold, 0)
    if not 0 <= quality <= 100:
        raise ValueError(f"quality must be in [0, 100], got {quality}")
    quality = 100 if frames.ndim == 3 else quality
    options: dict[str, Any] = {"lossless": quality == 100, "quality": quality, "method": 4}
    first, *others = (picture(frame, display) for frame in frames)
    if format == "gif":
        options = {"optimize": False}
        if first.mode == "RGBA":  # GIF has no partial opacity.
            first, *others = (_opaque_or_not(image) for image in (first, *others))
            options["disposal"] = 2  # Clear each frame before the next, which would show it where transparent.
    data = BytesIO()
    first.save(
        data, format=format, save_all=True, append_images=others, loop=0,
        duration=_durations(len(frames), seconds, hold, tick=_TICK[format]), **options,
    )  # fmt: skip
    return data.getvalue()


def _opaque_or_not(image: PIL.Image.Image) -> PIL.Image.Image:
    image.putalpha(image.getchannel("A").point([0] * 128 + [255] * 128))
    return image


def _durations(count: int, seconds: float, hold: float, *, tick: float) -> list[int]:
    """Return frame durations in milliseconds, rounded to multiples of ``tick`` seconds so that errors do not add up.

    >>> _durations(3, 1.0, 0.5, tick=0.01)
    [330, 340, 830]
    """
    each = max(seconds / count, _MIN_DURATION)
    ends = [round(i * each / tick) for i in range(count)] + [round((count * each + hold) / tick)]
    return [round((end - start) * tick * 1000) for start, end in itertools.pairwise(ends)]
