"""Write a sequence of images as an animated GIF or WebP."""

import itertools
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featvis_func.io.atomic import write_file
from featvis_func.io.pil import picture, to_uint8
from featvis_func.validation import check_float, check_name

FORMATS = ("gif", "webp")
"""Supported file formats."""

_TICK = {"gif": 0.01, "webp": 0.001}  # seconds, the unit of frame durations in each format
_MIN_DURATION = 0.02  # seconds; viewers slow down animations with shorter frames


def animate(frames: Tensor, path: str | Path, *, seconds: float = 2.0, hold: float = 1.0) -> Path:
    """Write a looping animation to a file, atomically.

    Args:
        frames: as for :func:`animation_bytes`.
        path: a ``.gif`` or ``.webp`` file in an existing folder. GIF is limited to 256 colours per frame, and to pixels
            that are either opaque (opacity of at least one half) or transparent.
        seconds, hold: as for :func:`animation_bytes`.

    Returns:
        The path.

    Raises:
        ValueError: If the suffix is unknown, the file cannot be written, or as for :func:`animation_bytes`.
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
    """Encode a looping animation as the bytes of a file; equal frames give identical bytes.

    Args:
        frames: ``(k, c, h, w)``, uint8 or float in ``[0, 1]``. 1 channel is grey, 3 are RGB, 4 are RGBA; any other
            number is shown as grey images side by side. Consecutive equal frames are merged into a longer one.
        format: one of :data:`FORMATS`.
        seconds: duration of all frames without ``hold``, above 0. Each frame is shown for at least 0.02 s.
        hold: additional duration of the last frame in seconds, at least 0.
        quality: WebP quality, 0 to 100, where 100 is lossless. Ignored for GIF.

    Returns:
        The contents of the file.

    Raises:
        ValueError: If the format is unknown, the frames have another shape or dtype, or a number is out of range.

    >>> animation_bytes(torch.rand(3, 3, 8, 8), "gif")[:6]
    b'GIF89a'
    """
    check_name("format of an animation", format, FORMATS)
    if frames.ndim != 4 or 0 in frames.shape or not (frames.dtype == torch.uint8 or frames.is_floating_point()):
        raise ValueError(
            f"frames must be (k, c, h, w), uint8 or float in [0, 1], got {tuple(frames.shape)} {frames.dtype}"
        )
    seconds, hold = check_float("seconds", seconds, above=0), check_float("hold", hold, 0)
    if not 0 <= quality <= 100:
        raise ValueError(f"quality must be in [0, 100], got {quality}")
    options: dict[str, Any] = {"lossless": quality == 100, "quality": quality, "method": 4}
    if format == "gif":
        options = {"optimize": False}
        if frames.shape[1] == 4:  # GIF has no partial opacity.
            frames = frames if frames.dtype == torch.uint8 else to_uint8(frames)
            frames = torch.cat([frames[:, :3], (frames[:, 3:] >= 128).to(torch.uint8) * 255], dim=1)
            options["disposal"] = 2  # Clear each frame before the next, which would show it where transparent.
    first, *others = (picture(frame) for frame in frames)
    data = BytesIO()
    first.save(
        data, format=format, save_all=True, append_images=others, loop=0,
        duration=_durations(len(frames), seconds, hold, tick=_TICK[format]), **options,
    )  # fmt: skip
    return data.getvalue()


def _durations(count: int, seconds: float, hold: float, *, tick: float) -> list[int]:
    """Return frame durations in milliseconds, rounded to multiples of ``tick`` seconds so that errors do not add up.

    >>> _durations(3, 1.0, 0.5, tick=0.01)
    [330, 340, 830]
    """
    each = max(seconds / count, _MIN_DURATION)
    ends = [round(i * each / tick) for i in range(count)] + [round((count * each + hold) / tick)]
    return [round((end - start) * tick * 1000) for start, end in itertools.pairwise(ends)]
