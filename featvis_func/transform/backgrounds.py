"""Random backgrounds for images with an alpha channel."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from featvis_func.random import normal, uniform
from featvis_func.transform.pixels import check_image
from featvis_func.types import Draw, Key, Transform
from featvis_func.validation import check_name

# Smooth background: the largest number of waves along a side, and the standard deviation before the sigmoid.
_WAVES = 16
_CONTRAST = 2.0


def over_background(kind: str = "smooth") -> Transform:
    """Composite an image with an alpha channel over a random background: ``(..., c + 1, h, w)`` -> ``(..., c, h, w)``.

    ``colour * alpha + (1 - alpha) * background``, with an independent background for each image of the leading axes.
    The objective can only rely on opaque pixels. With a penalty on the mean of alpha, or with random crops, the image
    becomes transparent where the objective does not depend on it.

    Args:
        kind: one of :data:`BACKGROUNDS`.

            * ``"smooth"``: smooth random colours: the sigmoid of normal noise whose amplitudes fall with the frequency,
              limited to 16 waves along a side.
            * ``"noise"``: independent values, uniform in ``[0, 1)``.
            * ``"color"``: one colour, each channel uniform in ``[0, 1)``.

    Returns:
        A :class:`Transform` of images in ``[0, 1]`` whose last channel is alpha. Its draw is a key.

    Raises:
        ValueError: if the kind is unknown; when applied, if the image has fewer than 2 channels.

    Source: Mordvintsev et al., "Differentiable image parameterizations", Distill 2018, and ``collapse_alpha_random`` in
    Lucid's ``optvis/transform.py``. Deviations: the noise is limited to 16 waves, its channels are independent, and its
    contrast does not depend on the image size.

    >>> transform = over_background("color")
    >>> image = torch.cat([torch.zeros(3, 2, 2), torch.ones(1, 2, 2)])
    >>> bool((transform.apply(image, transform.draw(torch.tensor([0, 1]))) == 0).all())
    True
    """
    check_name("background", kind, BACKGROUNDS)
    background = BACKGROUNDS[kind]

    def apply(image: Tensor, key: Draw) -> Tensor:
        check_image("over_background", image)
        if image.shape[-3] < 2:
            raise ValueError(f"over_background needs an image (..., c + 1, h, w) with c >= 1, got {tuple(image.shape)}")
        colour, alpha = image[..., :-1, :, :], image[..., -1:, :, :]
        backdrop = background(key, tuple(colour.shape)).to(image.dtype)
        return backdrop + alpha * (colour - backdrop)

    return Transform(lambda key: key, apply)


def _smooth(key: Key, shape: tuple[int, ...]) -> Tensor:
    """Sigmoid of a sum of waves with random coefficients, of standard deviation ``_CONTRAST`` before the sigmoid."""
    rows, row_waves = _waves(shape[-2], key.device)
    columns, column_waves = _waves(shape[-1], key.device)
    amplitude = 1.0 / torch.sqrt(row_waves[:, None] ** 2 + column_waves**2).clamp_min(1.0)
    amplitude = amplitude * (_CONTRAST / torch.sqrt((amplitude**2).sum()))
    coefficients = normal(key, (*shape[:-2], len(row_waves), len(column_waves))) * amplitude
    return torch.sigmoid(torch.matmul(torch.matmul(rows, coefficients), columns.T))


def _waves(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a constant, cosines and sines along a side, of mean square 1, and their frequencies.

    Returns:
        float32 ``(size, waves)`` and ``(waves,)``.
    """
    count = min(_WAVES, (size - 1) // 2)
    frequency = torch.arange(1, count + 1, device=device, dtype=torch.float32)
    angle = torch.arange(size, dtype=torch.float32, device=device)[:, None] * frequency * (2.0 * math.pi / size)
    constant = torch.ones(size, 1, dtype=torch.float32, device=device)
    waves = torch.cat([constant, math.sqrt(2.0) * torch.cos(angle), math.sqrt(2.0) * torch.sin(angle)], 1)
    return waves, torch.cat([torch.zeros(1, dtype=torch.float32, device=device), frequency, frequency])


def _color(key: Key, shape: tuple[int, ...]) -> Tensor:
    return uniform(key, (*shape[:-2], 1, 1))


BACKGROUNDS: dict[str, Callable[[Key, tuple[int, ...]], Tensor]] = {
    "smooth": _smooth,
    "noise": uniform,
    "color": _color,
}
"""The backgrounds by name, each a function ``(key, shape)`` -> float32 in ``[0, 1]``."""
