"""Convert tensors to uint8 and to PIL images."""

import math
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from einops import rearrange
from torch import Tensor

from featvis_func.io.display import Display, bands_of, check_shown
from featvis_func.io.plot import plot

STRIP = 8
"""Largest number of frames of a video in a picture."""
_FRAME_GAP = 1  # White pixels between the frames.


def to_uint8(images: Tensor) -> Tensor:
    """Convert values in ``[0, 1]`` to uint8, clamped and rounded to nearest.

    Args:
        images: float tensor of any shape.

    Returns:
        uint8 tensor of the same shape, on the same device.

    >>> to_uint8(torch.tensor([-0.1, 0.0, 0.5, 1.0])).tolist()
    [0, 0, 128, 255]
    """
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def picture(image: Tensor, display: Display = Display()) -> PIL.Image.Image:  # noqa: B008
    """Draw an image, a video or a signal as one still picture.

    * An image ``(c, h, w)`` of 1 channel is grey, of 3 RGB. 2 channels are side by side in grey. Of more the first
      three are shown as RGB, unless ``display.bands`` says otherwise.
    * A video ``(c, t, h, w)`` is a strip of frames side by side, from the first to the last: all of up to 8 frames, or
      8 that are evenly spaced.
    * A signal ``(c, t)`` is a plot with one line per channel, see :func:`~featvis_func.io.plot.plot`.

    Args:
        image: float in ``[0, 1]`` or uint8.
        display: which channels are shown, and whether the last one is an opacity.

    Returns:
        A PIL image of mode ``L``, ``RGB`` or, with an opacity, ``RGBA``; of a signal always ``RGB``.

    Raises:
        ValueError: another number of axes, or bands that the image does not have.

    >>> picture(torch.zeros(2, 4, 5)).size, picture(torch.zeros(6, 4, 5), Display(bands=(3, 2, 1))).mode
    ((10, 4), 'RGB')
    >>> picture(torch.zeros(3, 16, 4, 5)).size  # 8 frames, with 7 gaps of 1 pixel
    (47, 4)
    """
    check_shown(display.bands, color_count(image, display), image.ndim - 1)
    if image.ndim == 2:
        return plot(image, alpha=display.alpha)
    if image.ndim == 3:
        return PIL.Image.fromarray(_frame(image, display))
    frames = [_frame(image[:, i], display) for i in strip_frames(image.shape[1])]
    h, w, *modes = frames[0].shape
    sheet = np.full((h, len(frames) * (w + _FRAME_GAP) - _FRAME_GAP, *modes), 255, np.uint8)
    for i, frame in enumerate(frames):
        sheet[:, i * (w + _FRAME_GAP) : i * (w + _FRAME_GAP) + w] = frame
    return PIL.Image.fromarray(sheet)


def arrange(
    tiles: Sequence[PIL.Image.Image], columns: int | None = None, *, square: bool = True, gap: int = 2
) -> PIL.Image.Image:
    """Arrange pictures of equal size and mode in a grid on white, in order, row by row.

    Args:
        tiles: the pictures, at least one.
        columns: pictures per row, at least 1. Default: what comes nearest to a square.
        square: whether the pictures count as squares in that.
        gap: white pixels between the pictures and around them.

    >>> [arrange([PIL.Image.new("L", (60, 10))] * 9, square=square).size for square in (True, False)]
    [(188, 38), (126, 62)]
    """
    w, h = tiles[0].size
    if columns is None:
        columns = math.ceil(math.sqrt(len(tiles) * (1.0 if square else h / w)))
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    step_x, step_y = w + gap, h + gap
    modes = np.asarray(tiles[0]).shape[2:]
    sheet = np.full((rows * step_y + gap, columns * step_x + gap, *modes), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * step_y + gap, i % columns * step_x + gap
        sheet[y : y + h, x : x + w] = np.asarray(tile)
    return PIL.Image.fromarray(sheet)


def color_count(image: Tensor, display: Display) -> int:
    """Return the number of channels without an opacity.

    Raises:
        ValueError: not an image, a video or a signal.
    """
    if image.ndim not in (2, 3, 4) or 0 in image.shape:
        raise ValueError(
            "expected an image (c, h, w), a video (c, t, h, w) or a signal (c, t) with at least one channel and"
            f" position, got {tuple(image.shape)}"
        )
    return image.shape[0] - _has_opacity(image, display)


def middle_frame(image: Tensor) -> Tensor:
    """Return the middle frame ``(c, h, w)`` of a video; an image or a signal as it is."""
    return image[:, image.shape[1] // 2] if image.ndim == 4 else image


def strip_frames(count: int) -> list[int]:
    """Return which frames of a video a picture shows.

    >>> strip_frames(3), strip_frames(16)
    ([0, 1, 2], [0, 2, 4, 6, 9, 11, 13, 15])
    """
    if count <= STRIP:
        return list(range(count))
    return [round(i * (count - 1) / (STRIP - 1)) for i in range(STRIP)]


def _has_opacity(image: Tensor, display: Display) -> bool:
    return display.alpha and image.shape[0] > 1


def _frame(image: Tensor, display: Display) -> np.ndarray:
    """Pixels ``(h, w)``, ``(h, w, 3)`` or ``(h, w, 4)`` of an image ``(c, h, w)``."""
    values = (image if image.dtype == torch.uint8 else to_uint8(image)).cpu()
    opacity = values[-1:] if _has_opacity(image, display) else None
    colors = values if opacity is None else values[:-1]
    bands = bands_of(display, len(colors))
    if bands is None:  # side by side
        opacity = None if opacity is None else opacity.repeat(1, 1, len(colors))
        colors = rearrange(colors, "c h w -> 1 h (c w)")
    elif bands != tuple(range(len(colors))):
        colors = colors[list(bands)]
    if opacity is not None:
        colors = torch.cat([colors.expand(3, -1, -1), opacity])
    pixels = colors[0] if len(colors) == 1 else rearrange(colors, "c h w -> h w c")
    return pixels.contiguous().numpy()
