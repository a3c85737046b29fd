"""Plots of signals, drawn with PIL."""

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from torch import Tensor

MOST_LINES = 16
"""Signals of more channels are drawn as a heat map, with one row per channel."""
# Of Okabe and Ito, "Color universal design" (2008): those that stand out on white, told apart without seeing red from
# green. Channels that follow each other differ.
COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (0, 0, 0))
WIDTH = 320
"""Width of the lines in pixels."""
_HEIGHT, _LABELS = 192, 22  # pixels, of all channels and of the margin with their numbers
_MIN_LANE, _MAX_LANE = 24, 128  # pixels: height of one channel
_MAX_HEIGHT = 1024  # pixels, of a heat map; more channels are averaged
_SCALE = 4  # Lines are drawn this many times as large, and averaged.
_EDGE, _MIDDLE = (200, 204, 212), (232, 234, 239)
_SAMPLES_PER_PIXEL = 4  # More samples than these are reduced to the lowest and highest at each pixel.


def plot(
    signal: Tensor, *, size: tuple[int, int] | None = None, scale: int = 1, alpha: bool = False
) -> PIL.Image.Image:
    """Plot a signal over time, one line per channel.

    Each channel has a lane of its own, channel 0 on top, with an axis from 0 at its lower edge to 1 at its upper edge
    and a light line at 0.5. More than 16 channels are a heat map with one row per channel, from black for 0 to white
    for 1.

    Args:
        signal: ``(c, t)``, float in ``[0, 1]`` or uint8.
        size: ``(w, h)`` in pixels. Default: 320 pixels wide and as high as the channels need, with their numbers on the
            left if there are several, see :func:`margin_of`.
        scale: enlarges the default size, at least 1.
        alpha: whether the last channel is an opacity; the lines fade to white where it is 0.

    Returns:
        A PIL image of mode ``RGB``.

    >>> plot(torch.rand(3, 1000)).size, plot(torch.rand(12, 50), size=(128, 128)).size
    ((342, 192), (128, 128))
    """
    values = (signal.float() / 255 if signal.dtype == torch.uint8 else signal.detach().float()).cpu()
    values = torch.nan_to_num(values).clamp(0, 1).numpy()
    opacity = values[-1] if alpha and len(values) > 1 else None
    values = values if opacity is None else values[:-1]
    w, h = (scale * WIDTH, scale * _height(len(values))) if size is None else size
    drawn = _heat(values, w, h) if len(values) > MOST_LINES else _lines(values, w, h, scale)
    if opacity is not None:
        strength = np.interp(np.linspace(0, 1, w), np.linspace(0, 1, len(opacity)), opacity)[:, None]
        faded = 255 + (np.asarray(drawn).astype(np.float32) - 255) * strength
        drawn = PIL.Image.fromarray(faded.round().astype(np.uint8))
    margin = 0 if size is not None else scale * margin_of(len(values))
    if not margin:
        return drawn
    labelled = PIL.Image.new("RGB", (margin + w, h), "white")
    labelled.paste(drawn, (margin, 0))
    pen, font = PIL.ImageDraw.Draw(labelled), PIL.ImageFont.load_default(11 * scale)
    for channel in range(len(values)):
        middle = (channel + 0.5) * h / len(values)
        pen.text((margin - 6 * scale, middle), str(channel), _color(channel), font, anchor="rm")
    return labelled


def margin_of(channels: int) -> int:
    """Return the width of the margin with the numbers of the channels, beside 320 pixels for the lines."""
    return _LABELS if 1 < channels <= MOST_LINES else 0


def _height(channels: int) -> int:
    if channels > MOST_LINES:
        return min(_MAX_HEIGHT, channels * max(1, 2 * _HEIGHT // channels))
    return channels * min(_MAX_LANE, max(_MIN_LANE, _HEIGHT // channels))


def _color(channel: int) -> tuple[int, int, int]:
    return COLORS[channel % len(COLORS)]


def _lines(values: np.ndarray, w: int, h: int, scale: int) -> PIL.Image.Image:
    """The lanes of all channels, one below the other."""
    sheet = PIL.Image.new("RGB", (w * _SCALE, h * _SCALE), "white")
    pen = PIL.ImageDraw.Draw(sheet)
    lane = h * _SCALE / len(values)
    margin = min(lane / 8, 6 * _SCALE * scale)
    width = _SCALE if lane < 16 * _SCALE else scale * 3 * _SCALE // 2
    for channel, line in enumerate(values):
        bottom, span = (channel + 1) * lane - margin, lane - 2 * margin
        for level, color in ((0.5, _MIDDLE), (0.0, _EDGE), (1.0, _EDGE)):
            if level != 0.5 or lane >= 16 * _SCALE:
                y = round(bottom - level * span)
                pen.rectangle((0, y - _SCALE // 2, w * _SCALE, y + _SCALE // 2 - 1), color)
        x, level = _points(line, w)
        y = bottom - level * span
        for edge in (0, (w - 1) * _SCALE):
            pen.rectangle((edge, bottom - span, edge + _SCALE - 1, bottom), _EDGE)
        pen.line([*zip((x * w * _SCALE).tolist(), y.tolist(), strict=True)], _color(channel), width, joint="curve")
    return sheet.reduce(_SCALE)


def _points(line: np.ndarray, w: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in ``[0, 1]`` and values of the points of a line; of many samples only the extremes at each pixel."""
    if len(line) == 1:
        return np.array([0.0, 1.0]), line.repeat(2)
    if len(line) <= _SAMPLES_PER_PIXEL * w:
        return np.linspace(0, 1, len(line)), line
    starts = np.arange(w) * len(line) // w
    extremes = np.stack([np.minimum.reduceat(line, starts), np.maximum.reduceat(line, starts)], 1)
    return ((np.arange(w) + 0.5) / w).repeat(2), extremes.reshape(-1)


def _heat(values: np.ndarray, w: int, h: int) -> PIL.Image.Image:
    """One row per channel, from black for 0 to white for 1; what is smaller than a pixel is averaged."""
    grey = PIL.Image.fromarray((values * 255).round().astype(np.uint8))
    across = PIL.Image.Resampling.BOX if values.shape[1] > w else PIL.Image.Resampling.NEAREST
    down = PIL.Image.Resampling.BOX if len(values) > h else PIL.Image.Resampling.NEAREST
    return grey.resize((w, len(values)), across).resize((w, h), down).convert("RGB")
