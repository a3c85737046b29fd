"""Images of one filter, encoded as WebP."""

import io
import math
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from featvis_func.gallery.manifest import format_number
from featvis_func.io.pil import picture

THUMBNAIL = 128
"""Length of a thumbnail's longer side in pixels."""
_QUALITY, _THUMBNAIL_QUALITY, _SNAPSHOT_QUALITY = 90, 60, 80
_LOSSLESS = 100
# Colour map of the activation maps, from dark to light, in even steps of lightness, so that it can be read without
# telling red from green. `gallery.css` shows the same colours in `.ramp`.
_COLORMAP = ((13, 8, 45), (75, 20, 110), (150, 45, 100), (220, 90, 60), (250, 165, 50), (250, 240, 160))
_MAX_SHEET_WIDTH = 16_000  # pixels; WebP allows at most 16,383


class SnapshotSheet(NamedTuple):
    """Snapshots of one run in a single image, row by row."""

    data: bytes
    columns: int
    rows: int
    frames: int
    size: tuple[int, int]
    """``(h, w)`` of one snapshot in pixels."""


class EncodedImage(NamedTuple):
    """An image at full size and as a thumbnail."""

    full: bytes
    thumb: bytes
    size: tuple[int, int]
    """``(w, h)`` of the full image in pixels."""
    thumb_size: tuple[int, int]
    """``(w, h)`` of the thumbnail in pixels."""


class ActivationMap(NamedTuple):
    """An activation map as an image whose colours range from its minimum to its maximum."""

    data: bytes
    shape: tuple[int, ...]
    """Rows and columns."""
    low: str
    """Minimum, formatted for display."""
    high: str
    """Maximum, formatted for display."""


def encode_image(image: Tensor) -> EncodedImage:
    """Encode an image ``(c, h, w)`` at full size and as a thumbnail."""
    full = picture(image)
    thumb = full.copy()
    thumb.thumbnail((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.LANCZOS)
    return EncodedImage(webp(full, _QUALITY), webp(thumb, _THUMBNAIL_QUALITY), full.size, thumb.size)


def activation_map(activation: Tensor) -> ActivationMap | None:
    """Draw an activation map.

    Args:
        activation: ``(h', w')``, ``(t,)`` or ``()``.

    Returns:
        The drawing, or ``None`` if the layer has no spatial positions, see :func:`map_values`.
    """
    values = map_values(activation)
    if values is None:
        return None
    finite = torch.nan_to_num(values, 0.0, 0.0, 0.0)
    low, high = finite.min(), finite.max()
    level = ((finite - low) / (high - low).clamp_min(torch.finfo(finite.dtype).tiny)).numpy()
    stops = np.linspace(0, 1, len(_COLORMAP))
    channels = [np.interp(level, stops, np.array(_COLORMAP)[:, c]) for c in range(3)]
    image = PIL.Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))
    return ActivationMap(
        webp(image, _LOSSLESS), tuple(values.shape), format_number(float(low)), format_number(float(high))
    )


def map_values(activation: Tensor) -> Tensor | None:
    """Arrange an activation in rows and columns.

    Tokens are arranged in a square if their number is a square. If it is a square without the first token (a class
    token), that token is dropped. Any other number of tokens is arranged in one row.

    Args:
        activation: ``(h', w')``, ``(t,)`` or ``()``.

    Returns:
        float32 ``(rows, columns)``, or ``None`` for a single value.

    >>> map_values(torch.arange(5.0))
    tensor([[1., 2.],
            [3., 4.]])
    """
    values = activation.float()
    if values.ndim == 2:
        return values
    if values.ndim == 0 or values.numel() < 2:
        return None
    count = values.numel()
    for skipped in (0, 1):
        side = math.isqrt(count - skipped)
        if side > 1 and side * side == count - skipped:
            return values.reshape(-1)[skipped:].reshape(side, side)
    return values.reshape(1, -1)


def snapshot_sheet(snapshots: Tensor) -> SnapshotSheet:
    """Combine the snapshots of a run into one image, for the slider on a filter's page.

    Args:
        snapshots: uint8 ``(k, c, h, w)``.
    """
    frames = [picture(frame) for frame in snapshots]
    w, h = frames[0].size
    columns = min(len(frames), max(1, _MAX_SHEET_WIDTH // w))
    rows = -(-len(frames) // columns)
    sheet = PIL.Image.new(frames[0].mode, (columns * w, rows * h))
    for i, frame in enumerate(frames):
        sheet.paste(frame, (i % columns * w, i // columns * h))
    return SnapshotSheet(webp(sheet, _SNAPSHOT_QUALITY), columns, rows, len(frames), (h, w))


def webp(image: PIL.Image.Image, quality: int) -> bytes:
    """Encode an image as WebP with a quality up to 100, which is lossless. Equal images give equal bytes."""
    data = io.BytesIO()
    image.save(data, format="WEBP", quality=quality, method=4, lossless=quality == _LOSSLESS)
    return data.getvalue()
