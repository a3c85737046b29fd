"""Deterministic maps of pixels, and filters whose strength is drawn: any of them takes ``(..., c, h, w)``."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from featvis_func.random import uniform
from featvis_func.types import Draw, Key, Transform


def normalize(mean: Sequence[float], std: Sequence[float], *, device: torch.device | str | None = None) -> Transform:
    """``(x - mean) / std`` per channel: from ``[0, 1]`` to what the model was trained on.

    Args:
        mean, std: one number per channel; every ``std`` above 0.
        device: where the constants live; applied elsewhere it is right but copies them.

    Raises:
        ValueError: different lengths, or a ``std`` that is not above 0.

    >>> t = normalize([0.5], [0.25])
    >>> t.apply(torch.ones(1, 1, 1), t.draw(torch.tensor([0, 1]))).item()
    2.0
    """
    if len(mean) != len(std) or not all(0 < s < math.inf and math.isfinite(m) for m, s in zip(mean, std, strict=True)):
        raise ValueError(f"normalisation needs one mean and one std above 0 per channel, got {mean} and {std}")
    shift = torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None]
    factor = 1.0 / torch.tensor(std, dtype=torch.float32, device=device)[:, None, None]

    def apply(image: Tensor, draw: Draw) -> Tensor:
        if image.shape[-3] != len(mean):
            raise ValueError(f"normalisation for {len(mean)} channels met an image of {image.shape[-3]}")
        return (image - shift.to(image)) * factor.to(image)

    return Transform(lambda key: (), apply)


def gaussian_blur(sigma: float | tuple[float, float], *, radius: int | None = None) -> Transform:
    """Blurs by a Gaussian whose width is drawn, one for all channels: ``sum_d exp(-d**2 / (2 sigma**2)) x[i + d]``.

    The sum over rows and that over columns, each with weights that add up to 1; a constant stays what it is. Beyond
    the border the image is mirrored about its last pixel.

    Args:
        sigma: standard deviation in pixels, above 0, or the bounds of a uniform one.
        radius: the largest ``|d|``, at least 1. Default: 3 times the largest sigma, rounded up.

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` whose draw is sigma, float32 ``()``.

    Raises:
        ValueError: a sigma not above 0, reversed bounds, a radius below 1.

    Source: as torchvision's ``GaussianBlur(2 * radius + 1, sigma)``, and also where the image is smaller than that.

    >>> blur = gaussian_blur((0.5, 1.5))
    >>> round(blur.apply(torch.ones(3, 8, 8), blur.draw(torch.tensor([0, 1]))).mean().item(), 4)
    1.0
    """
    low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    if not 0 < low <= high < math.inf:
        raise ValueError(f"gaussian_blur: sigma must be above 0, or two such bounds, the lower first, got {sigma}")
    radius = math.ceil(3.0 * high) if radius is None else radius
    if radius < 1:
        raise ValueError(f"gaussian_blur: the radius must be at least 1 pixel, got {radius}")

    def draw(key: Key) -> Draw:
        return uniform(key) * (high - low) + low

    def apply(image: Tensor, drawn: Draw) -> Tensor:
        distance = torch.arange(-radius, radius + 1, device=image.device)
        weights = torch.exp(-0.5 * (distance / drawn.to(image.dtype)) ** 2)
        weights = weights / weights.sum()
        planes = image.reshape(1, -1, *image.shape[-2:])
        count = planes.shape[1]
        weights = weights.expand(count, 1, -1)
        blurred = F.conv2d(_mirrored(planes, -2, radius), weights[..., None], groups=count)
        return F.conv2d(_mirrored(blurred, -1, radius), weights[:, :, None], groups=count).reshape(image.shape)

    return Transform(draw, apply)


def roll(pixels: int) -> Transform:
    """Shifts by whole pixels, as on a torus: what leaves on one side comes in on the other. Exact.

    Args:
        pixels: the largest shift, at least 0; uniform among the whole numbers up to it, both ways, in x and y.

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` whose draw is the shift down and to the right, int64 ``(2,)``.

    Raises:
        ValueError: ``pixels`` is negative, or no whole number.

    >>> roll(1).apply(torch.arange(6.0).reshape(1, 2, 3), torch.tensor([1, 1]))
    tensor([[[5., 3., 4.],
             [2., 0., 1.]]])
    """
    if not isinstance(pixels, int) or pixels < 0:
        raise ValueError(f"roll: expected whole pixels, at least 0, got {pixels}")

    def draw(key: Key) -> Draw:
        return torch.floor(uniform(key, (2,)) * (2 * pixels + 1)).long() - pixels

    def apply(image: Tensor, shift: Draw) -> Tensor:
        for axis in (-2, -1):
            source = torch.arange(image.shape[axis], device=image.device) - shift[axis]
            image = image.index_select(axis, source % image.shape[axis])
        return image

    return Transform(draw, apply)


def _mirrored(image: Tensor, axis: int, margin: int) -> Tensor:
    """The image with a margin on both ends of an axis, mirrored about the last pixel as often as it takes."""
    if image.shape[axis] == 1:
        return torch.cat([image] * (2 * margin + 1), axis)
    while margin > 0:
        size = image.shape[axis]
        width = min(margin, size - 1)
        before, after = image.narrow(axis, 1, width), image.narrow(axis, size - 1 - width, width)
        image = torch.cat([before.flip(axis), image, after.flip(axis)], axis)
        margin -= width
    return image
