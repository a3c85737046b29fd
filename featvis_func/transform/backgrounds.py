"""Backgrounds for images that have an alpha channel."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from featvis_func.random import normal, uniform
from featvis_func.types import Draw, Key, Transform
from featvis_func.validation import check_name

# Of the smooth background: the most waves along a side, and the standard deviation of its pixels before the sigmoid.
_WAVES = 16
_CONTRAST = 2.0


def over_background(kind: str = "smooth") -> Transform:
    """Lays an image with an alpha channel over a random background: ``(..., c + 1, h, w)`` -> ``(..., c, h, w)``.

    ``colour * alpha + (1 - alpha) * background``, with another background in every view. So alpha pays where the model
    needs the pixels, and costs nothing where it does not: with a penalty on the mean of alpha, or with crops, the
    image shows what matters and is transparent elsewhere.

    Args:
        kind: of the background, one of :data:`BACKGROUNDS`.

            * ``"smooth"``: clouds of random colours, the sigmoid of normal noise whose amplitudes fall with the
              frequency, up to 16 waves along a side.
            * ``"noise"``: each value uniform in ``[0, 1)``.
            * ``"color"``: one colour, each channel uniform in ``[0, 1)``.

    Returns:
        A :class:`Transform` of images in ``[0, 1]``, the last channel alpha; its draw is a key.

    Raises:
        ValueError: an unknown kind; at the image, fewer than 2 channels.

    Source: Mordvintsev et al., "Differentiable image parameterizations", Distill 2018, and ``collapse_alpha_random`` in
    Lucid's ``optvis/transform.py``. Deviations: the noise is cut at 16 waves, its channels are independent, and its
    contrast is the same for every size of the image.

    >>> lay = over_background("color")
    >>> image = torch.cat([torch.zeros(3, 2, 2), torch.ones(1, 2, 2)])
    >>> bool((lay.apply(image, lay.draw(torch.tensor([0, 1]))) == 0).all())
    True
    """
    check_name("background", kind, BACKGROUNDS)
    background = BACKGROUNDS[kind]

    def apply(image: Tensor, key: Draw) -> Tensor:
        if image.shape[-3] < 2:
            raise ValueError(f"an image over a background has colours and alpha, 2 channels or more, got {image.shape}")
        colour, alpha = image[..., :-1, :, :], image[..., -1:, :, :]
        behind = background(key, tuple(colour.shape)).to(image.dtype)
        return behind + alpha * (colour - behind)

    return Transform(lambda key: key, apply)


def _smooth(key: Key, shape: tuple[int, ...]) -> Tensor:
    """Waves of random strengths along rows and columns; of unit variance before the sigmoid's contrast."""
    rows, row_waves = _waves(shape[-2], key.device)
    columns, column_waves = _waves(shape[-1], key.device)
    amplitude = 1.0 / torch.sqrt(row_waves[:, None] ** 2 + column_waves**2).clamp_min(1.0)
    amplitude = amplitude * (_CONTRAST / torch.sqrt((amplitude**2).sum()))
    strengths = normal(key, (*shape[:-2], len(row_waves), len(column_waves))) * amplitude
    return torch.sigmoid(torch.matmul(torch.matmul(rows, strengths), columns.T))


def _waves(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A constant, cosines and sines along a side, of mean square 1, as ``(size, waves)``; and their frequencies."""
    count = min(_WAVES, (size - 1) // 2)
    frequency = torch.arange(1, count + 1, device=device, dtype=torch.float32)
    angle = torch.arange(size, device=device)[:, None] * frequency * (2.0 * math.pi / size)
    constant = torch.ones(size, 1, device=device)
    waves = torch.cat([constant, math.sqrt(2.0) * torch.cos(angle), math.sqrt(2.0) * torch.sin(angle)], 1)
    return waves, torch.cat([torch.zeros(1, device=device), frequency, frequency])


def _color(key: Key, shape: tuple[int, ...]) -> Tensor:
    return uniform(key, (*shape[:-2], 1, 1))


BACKGROUNDS: dict[str, Callable[[Key, tuple[int, ...]], Tensor]] = {
    "smooth": _smooth,
    "noise": uniform,
    "color": _color,
}
"""The backgrounds known by name: (key, shape) -> float32 in ``[0, 1]``."""
