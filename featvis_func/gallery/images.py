"""The pictures of one filter, as the bytes of WebP files."""

import io
import math
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from featvis_func.gallery.manifest import short
from featvis_func.io.pil import picture

THUMBNAIL = 128
"""Pixels of a thumbnail's longer side."""
_QUALITY, _SMALL_QUALITY, _FILM_QUALITY = 90, 60, 80
_LOSSLESS = 100
# Of the activation maps, dark to light; even steps of lightness, readable without telling red from green.
_COLOURS = ((13, 8, 45), (75, 20, 110), (150, 45, 100), (220, 90, 60), (250, 165, 50), (250, 240, 160))
_WIDEST = 16_000  # pixels; WebP has no more than 16,383


class Film(NamedTuple):
    """Images over the run, row by row on one sheet."""

    data: bytes
    columns: int
    rows: int
    frames: int
    size: tuple[int, int]
    """``(h, w)`` of one, in pixels."""


class Shown(NamedTuple):
    """An image, in full and as a thumbnail."""

    whole: bytes
    thumb: bytes
    size: tuple[int, int]
    """``(w, h)`` of the first, in pixels."""
    thumb_size: tuple[int, int]


class Map(NamedTuple):
    """An activation map, in colours from its least value to its greatest."""

    data: bytes
    shape: tuple[int, ...]
    """Rows and columns."""
    low: str
    high: str


def image_files(image: Tensor) -> Shown:
    """An image ``(c, h, w)`` in full and as a thumbnail."""
    whole = picture(image)
    small = whole.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.LANCZOS)
    return Shown(webp(whole, _QUALITY), webp(small, _SMALL_QUALITY), whole.size, small.size)


def activation_map(activation: Tensor) -> Map | None:
    """A picture of an activation map; ``None`` where a layer has no positions.

    Tokens are laid out as a square where they fill one, without the first token where they do so without it, or else
    in a row.

    Args:
        activation: ``(h', w')``, ``(t,)`` or ``()``.
    """
    values = map_values(activation)
    if values is None:
        return None
    finite = torch.nan_to_num(values, 0.0, 0.0, 0.0)
    low, high = finite.min(), finite.max()
    level = ((finite - low) / (high - low).clamp_min(torch.finfo(finite.dtype).tiny)).numpy()
    places = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(level, places, np.array(_COLOURS)[:, c]) for c in range(3)]
    coloured = PIL.Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))
    return Map(webp(coloured, _LOSSLESS), tuple(values.shape), short(float(low)), short(float(high)))


def map_values(activation: Tensor) -> Tensor | None:
    """The map as rows and columns.

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


def film(snapshots: Tensor) -> Film:
    """Images over the run on one sheet, for a scrubber.

    Args:
        snapshots: uint8 ``(k, c, h, w)``.
    """
    frames = [picture(frame) for frame in snapshots]
    w, h = frames[0].size
    columns = min(len(frames), max(1, _WIDEST // w))
    rows = -(-len(frames) // columns)
    sheet = PIL.Image.new(frames[0].mode, (columns * w, rows * h))
    for i, frame in enumerate(frames):
        sheet.paste(frame, (i % columns * w, i // columns * h))
    return Film(webp(sheet, _FILM_QUALITY), columns, rows, len(frames), (h, w))


def webp(image: PIL.Image.Image, quality: int) -> bytes:
    """A WebP file of a quality up to 100, which is lossless; equal images are equal bytes."""
    data = io.BytesIO()
    image.save(data, format="WEBP", quality=quality, method=4, lossless=quality == _LOSSLESS)
    return data.getvalue()
