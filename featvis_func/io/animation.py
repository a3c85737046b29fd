"""Images one after another, as an animated GIF or WebP."""

import itertools
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featvis_func.io.atomic import write_file
from featvis_func.io.pil import picture, to_uint8
from featvis_func.validation import check_name

FORMATS = ("gif", "webp")
"""What an animation can be written as."""

_TICK = {"gif": 0.01, "webp": 0.001}  # seconds in which each counts
_SHORTEST = 0.02  # seconds; viewers slow down what changes faster


def animate(frames: Tensor, path: str | Path, *, seconds: float = 2.0, hold: float = 1.0) -> Path:
    """Writes an animation that loops, whole or not at all.

    Args:
        frames: as for :func:`animation_bytes`.
        path: a ``.gif`` or ``.webp`` in a folder that exists. GIF has 256 colours a frame, and pixels that are
            opaque, from half on, or are not.
        seconds, hold: as for :func:`animation_bytes`.

    Returns:
        The path.

    Raises:
        ValueError: another suffix, a file that cannot be written, or as :func:`animation_bytes`.
    """
    path = Path(path)
    check_name("suffix of an animation", path.suffix.lower(), [f".{name}" for name in FORMATS])
    data = animation_bytes(frames, path.suffix.lower()[1:], seconds=seconds, hold=hold)
    try:
        write_file(path, data)
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return path


def animation_bytes(
    frames: Tensor, format: str = "webp", *, seconds: float = 2.0, hold: float = 1.0, quality: int = 90
) -> bytes:
    """An animation that loops, as the bytes of a file; equal frames are equal bytes.

    Args:
        frames: ``(k, c, h, w)``, uint8 or float in ``[0, 1]``; 1 channel is grey, 3 RGB, 4 RGBA, of others each stands
            in grey beside the one before. Equal neighbours become one longer frame.
        format: one of :data:`FORMATS`.
        seconds: from the first frame to the end of the last, without ``hold``; above 0. A frame takes at least 0.02 s.
        hold: further seconds of the last frame, at least 0.
        quality: of WebP, 0 to 100; 100 is lossless.

    Raises:
        ValueError: an unknown format, frames of another shape or type, or a number out of range.

    >>> animation_bytes(torch.rand(3, 3, 8, 8), "gif")[:6]
    b'GIF89a'
    """
    check_name("format of an animation", format, FORMATS)
    if frames.ndim != 4 or 0 in frames.shape or not (frames.dtype == torch.uint8 or frames.is_floating_point()):
        raise ValueError(
            f"expected frames (k, c, h, w), uint8 or float in [0, 1], got {tuple(frames.shape)} {frames.dtype}"
        )
    if not (0 < seconds < math.inf and 0 <= hold < math.inf):
        raise ValueError(f"expected seconds above 0 and hold of at least 0, got seconds={seconds}, hold={hold}")
    if not 0 <= quality <= 100:
        raise ValueError(f"quality must be 0 to 100, got {quality}")
    options: dict[str, Any] = {"lossless": quality == 100, "quality": quality, "method": 4}
    if format == "gif":
        options = {"optimize": False}
        if frames.shape[1] == 4:  # a pixel is opaque, or is not; and no frame shows through the next one
            frames = frames if frames.dtype == torch.uint8 else to_uint8(frames)
            frames = torch.cat([frames[:, :3], (frames[:, 3:] >= 128).to(torch.uint8) * 255], dim=1)
            options["disposal"] = 2
    first, *others = (picture(frame) for frame in frames)
    data = BytesIO()
    first.save(
        data, format=format, save_all=True, append_images=others, loop=0,
        duration=_durations(len(frames), seconds, hold, tick=_TICK[format]), **options,
    )  # fmt: skip
    return data.getvalue()


def _durations(count: int, seconds: float, hold: float, *, tick: float) -> list[int]:
    """Milliseconds of each frame, in whole ticks, whose sum is off by no more than one of them.

    >>> _durations(3, 1.0, 0.5, tick=0.01)
    [330, 340, 830]
    """
    each = max(seconds / count, _SHORTEST)
    ends = [round(i * each / tick) for i in range(count)] + [round((count * each + hold) / tick)]
    return [round((end - start) * tick * 1000) for start, end in itertools.pairwise(ends)]
