"""Images of one filter, encoded as WebP."""

import io
import math
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from featvis_func.gallery.manifest import format_number
from featvis_func.io.animation import animation_bytes, moving_of
from featvis_func.io.display import Display, describe_bands
from featvis_func.io.pil import color_count, middle_frame, picture
from featvis_func.io.plot import MOST_LINES, WIDTH, margin_of, plot

THUMBNAIL = 128
"""Length of a thumbnail's longer side in pixels."""
_QUALITY, _THUMBNAIL_QUALITY, _SNAPSHOT_QUALITY = 90, 60, 80
_LOSSLESS = 100
# Colour map of the activation maps, from dark to light, in even steps of lightness, so that it can be read without
# telling red from green. `gallery.css` shows the same colours in `.ramp`.
_COLORMAP = ((13, 8, 45), (75, 20, 110), (150, 45, 100), (220, 90, 60), (250, 165, 50), (250, 240, 160))
_MAX_SHEET_WIDTH = 16_000  # pixels; WebP allows at most 16,383
# Maps of several time steps: steps per row, and the least length of a map's longer side and the gap in pixels.
_MAP_COLUMNS, _MAP_SIDE, _MAP_GAP = 8, 48, 3
_PLOT_SCALE, _BAR_HEIGHT = 2, 48  # of the plot of a signal; pixels of the map below it


class SnapshotSheet(NamedTuple):
    """Snapshots of one run in a single image, row by row."""

    data: bytes
    columns: int
    rows: int
    frames: int
    size: tuple[int, int]
    """``(h, w)`` of one snapshot in pixels."""


class EncodedImage(NamedTuple):
    """A still picture at full size and as a thumbnail: of a video its middle frame, of a signal its plot."""

    full: bytes
    thumb: bytes
    size: tuple[int, int]
    """``(w, h)`` of the full picture in pixels."""
    thumb_size: tuple[int, int]
    """``(w, h)`` of the thumbnail in pixels."""
    caption: str
    """What the picture shows, for people."""


class EncodedVideo(NamedTuple):
    """A video as an animation, and as a strip of frames."""

    moving: bytes
    strip: bytes
    strip_size: tuple[int, int]
    """``(w, h)`` of the strip in pixels."""


class ActivationMap(NamedTuple):
    """An activation map as an image whose colours range from its minimum to its maximum."""

    data: bytes
    shape: tuple[int, ...]
    """Time steps, if there are several, rows and columns."""
    size: tuple[int, int]
    """``(w, h)`` at which it is displayed, in pixels."""
    low: str
    """Minimum, formatted for display."""
    high: str
    """Maximum, formatted for display."""


def encode_image(image: Tensor, display: Display = Display()) -> EncodedImage:  # noqa: B008
    """Encode an image ``(c, h, w)``, the middle frame of a video ``(c, t, h, w)`` or the plot of a signal ``(c, t)``.

    Args:
        image: float in ``[0, 1]`` or uint8.
        display: which channels are shown, and whether the last one is an opacity.
    """
    caption = describe(image, display)
    if image.ndim == 2:
        full = plot(image, scale=_PLOT_SCALE, alpha=display.alpha)
        thumb = plot(image, size=(THUMBNAIL, THUMBNAIL), alpha=display.alpha)
        # Lines are both sharper and smaller without loss.
        return EncodedImage(webp(full, _LOSSLESS), webp(thumb, _LOSSLESS), full.size, thumb.size, caption)
    full = picture(middle_frame(image), display)
    thumb = full.copy()
    thumb.thumbnail((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.LANCZOS)
    return EncodedImage(webp(full, _QUALITY), webp(thumb, _THUMBNAIL_QUALITY), full.size, thumb.size, caption)


def encode_video(video: Tensor, format: str, display: Display = Display()) -> EncodedVideo | None:  # noqa: B008
    """Encode a video ``(c, t, h, w)``; ``None`` for an image or a signal.

    Args:
        video: float in ``[0, 1]`` or uint8.
        format: of the animation, ``"webp"`` or ``"gif"``.
        display: as for :func:`encode_image`.
    """
    moving = moving_of(video, None, display)
    if moving is None:
        return None
    strip = picture(video, display)
    return EncodedVideo(animation_bytes(format=format, **moving._asdict()), webp(strip, _QUALITY), strip.size)


def describe(image: Tensor, display: Display) -> str:
    """Say what a picture shows.

    >>> describe(torch.zeros(6, 24, 40), Display(bands=(3, 2, 1)))
    'Image, 40 × 24 pixels; channels 3, 2, 1 of 6 as red, green, blue'
    >>> describe(torch.zeros(1, 500), Display())
    'Signal, 500 samples, from 0 to 1'
    """
    channels = color_count(image, display)
    if image.ndim == 2:
        if channels == 1:
            return f"Signal, {image.shape[1]} samples, from 0 to 1"
        rows = "lines from 0 to 1" if channels <= MOST_LINES else "rows from dark for 0 to light for 1"
        return f"Signal, {image.shape[1]} samples; {channels} channels as {rows}, channel 0 on top"
    h, w = image.shape[-2:]
    kind = "Image," if image.ndim == 3 else f"Video, {image.shape[1]} frames of"
    words = describe_bands(display, channels)
    return f"{kind} {w} × {h} pixels{words and '; ' + words}"


def activation_map(
    activation: Tensor,
    image: Tensor | None = None,
    display: Display = Display(),  # noqa: B008
) -> ActivationMap | None:
    """Draw an activation map.

    Args:
        activation: ``(*positions)`` with at most 3 axes. Maps ``(t', h', w')`` of several time steps are side by side,
            the first on the left, 8 in a row, in common colours. Positions ``(t',)`` of a signal are a bar as wide as
            the lines of its plot.
        image: that the activation is of, which gives the map its shape. By default an image ``(c, h, w)``.
        display: as for :func:`encode_image`.

    Returns:
        The drawing, or ``None`` if the layer has no positions, see :func:`map_values`.
    """
    values = map_values(activation, square=image is None or image.ndim == 3)
    if values is None:
        return None
    finite = torch.nan_to_num(values, 0.0, 0.0, 0.0)
    low, high = finite.min(), finite.max()
    level = ((finite - low) / (high - low).clamp_min(torch.finfo(finite.dtype).tiny)).numpy()
    if values.ndim == 3:
        drawn = _side_by_side(_colored(level))
    elif image is not None and image.ndim == 2 and len(values) == 1:
        drawn = _bar(level[0], margin_of(color_count(image, display)))
    else:
        drawn = PIL.Image.fromarray(_colored(level))
    size = drawn.size
    if image is not None and image.ndim != 2 and values.ndim == 2:  # as large as the image that it belongs to
        size = picture(middle_frame(image), display).size
    words = format_number(float(low)), format_number(float(high))
    return ActivationMap(webp(drawn, _LOSSLESS), tuple(values.shape), size, *words)


def _colored(level: np.ndarray) -> np.ndarray:
    """Colours ``(..., 3)`` of levels in ``[0, 1]``."""
    stops = np.linspace(0, 1, len(_COLORMAP))
    channels = [np.interp(level, stops, np.array(_COLORMAP)[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _bar(level: np.ndarray, margin: int) -> PIL.Image.Image:
    """Draw a row of levels below the lines of a plot; of many levels the highest at each pixel."""
    w = _PLOT_SCALE * WIDTH
    if len(level) > w:
        level = np.maximum.reduceat(level, np.arange(w) * len(level) // w)
    pixels = _colored(level[np.arange(w) * len(level) // w]).repeat(_BAR_HEIGHT, axis=0).reshape(w, _BAR_HEIGHT, 3)
    bar = PIL.Image.new("RGBA", (_PLOT_SCALE * margin + w, _BAR_HEIGHT))
    bar.paste(PIL.Image.fromarray(pixels.swapaxes(0, 1).copy()), (_PLOT_SCALE * margin, 0))
    return bar


def _side_by_side(maps: np.ndarray) -> PIL.Image.Image:
    """Arrange maps ``(t, h, w, 3)`` in rows of 8, enlarged, with transparent gaps."""
    times = max(1, math.ceil(_MAP_SIDE / max(maps.shape[1:3])))
    maps = maps.repeat(times, axis=1).repeat(times, axis=2)
    count, h, w = maps.shape[:3]
    columns = min(count, _MAP_COLUMNS)
    rows = -(-count // columns)
    sheet = np.zeros((rows * (h + _MAP_GAP) - _MAP_GAP, columns * (w + _MAP_GAP) - _MAP_GAP, 4), np.uint8)
    for i, drawn in enumerate(maps):
        y, x = i // columns * (h + _MAP_GAP), i % columns * (w + _MAP_GAP)
        sheet[y : y + h, x : x + w, :3] = drawn
        sheet[y : y + h, x : x + w, 3] = 255
    return PIL.Image.fromarray(sheet)


def map_values(activation: Tensor, *, square: bool = True) -> Tensor | None:
    """Arrange an activation in rows and columns, or in several such maps.

    Tokens are arranged in a square if their number is a square. If it is a square without the first token (a class
    token), that token is dropped. Any other number of tokens is arranged in one row.

    Args:
        activation: ``(t', h', w')``, ``(h', w')``, ``(t,)`` or ``()``.
        square: whether ``(t,)`` are tokens of an image, and not positions in time.

    Returns:
        float32 ``(rows, columns)``, or ``(t', rows, columns)`` for several time steps; ``None`` for a single value.

    >>> map_values(torch.arange(5.0))
    tensor([[1., 2.],
            [3., 4.]])
    """
    values = activation.float()
    if values.numel() < 2:
        return values if values.ndim == 2 else None
    if values.ndim == 3 and len(values) == 1:
        return values[0]
    if values.ndim != 1:
        return values
    count = values.numel()
    for skipped in (0, 1) if square else ():
        side = math.isqrt(count - skipped)
        if side > 1 and side * side == count - skipped:
            return values[skipped:].reshape(side, side)
    return values.reshape(1, -1)


def snapshot_sheet(snapshots: Tensor, display: Display = Display()) -> SnapshotSheet:  # noqa: B008
    """Combine the snapshots of a run into one image, for the slider on a filter's page.

    Args:
        snapshots: uint8 ``(k, c, *positions)``. Each is drawn by :func:`~featvis_func.io.pil.picture`.
        display: which channels are shown, and whether the last one is an opacity.
    """
    frames = [picture(frame, display) for frame in snapshots]
    w, h = frames[0].size
    columns = min(len(frames), max(1, _MAX_SHEET_WIDTH // w))
    rows = -(-len(frames) // columns)
    sheet = PIL.Image.new(frames[0].mode, (columns * w, rows * h))
    for i, frame in enumerate(frames):
        sheet.paste(frame, (i % columns * w, i // columns * h))
    quality = _LOSSLESS if snapshots.ndim == 3 else _SNAPSHOT_QUALITY  # of plots
    return SnapshotSheet(webp(sheet, quality), columns, rows, len(frames), (h, w))


def webp(image: PIL.Image.Image, quality: int) -> bytes:
    """Encode an image as WebP with a quality up to 100, which is lossless. Equal images give equal bytes."""
    data = io.BytesIO()
    image.save(data, format="WEBP", quality=quality, method=4, lossless=quality == _LOSSLESS)
    return data.getvalue()
