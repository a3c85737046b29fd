"""Normalisation, also of videos and signals; blur and cyclic shift of images ``(..., c, h, w)``."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from featvis_func.constants import device_constant
from featvis_func.random import uniform
from featvis_func.types import Draw, Key, Transform
from featvis_func.validation import check_int


def normalize(
    mean: Sequence[float], std: Sequence[float], *, sides: int = 2, device: torch.device | str | None = None
) -> Transform:
    """Normalise each channel as the model expects: ``(x - mean) / std``.

    Args:
        mean, std: one number per channel; every ``std`` above 0.
        sides: number of axes that follow the channels: 2 for images ``(..., c, h, w)``, 3 for videos
            ``(..., c, t, h, w)``, 1 for signals ``(..., c, t)``.
        device: device of the constants. Applying it on another device is correct, but copies them every time.

    Raises:
        ValueError: if the lengths differ, a ``std`` is not above 0 or ``sides`` is below 1; when applied, if the image
            has another number of channels.

    >>> t = normalize([0.5], [0.25])
    >>> t.apply(torch.ones(1, 1, 1), t.draw(torch.tensor([0, 1]))).item()
    2.0
    """
    if len(mean) != len(std) or not all(0 < s < math.inf and math.isfinite(m) for m, s in zip(mean, std, strict=True)):
        raise ValueError(f"normalize needs one mean and one std above 0 per channel, got mean={mean} and std={std}")
    column = (-1, *(1,) * check_int("normalize: sides", sides, 1))
    shift = device_constant(torch.tensor(mean, dtype=torch.float32, device=device).reshape(column))
    factor = device_constant(1.0 / torch.tensor(std, dtype=torch.float32, device=device).reshape(column))

    def apply(image: Tensor, draw: Draw) -> Tensor:
        axis = -1 - sides
        if image.ndim <= sides or image.shape[axis] != len(mean):
            raise ValueError(
                f"normalize expected an image with {len(mean)} channels, got"
                f" {image.shape[axis] if image.ndim > sides else tuple(image.shape)}"
            )
        return (image - shift(image)) * factor(image)

    return Transform(lambda key: (), apply)


def gaussian_blur(sigma: float | tuple[float, float], *, radius: int | None = None) -> Transform:
    """Blur by a Gaussian of random width, the same for all channels: ``sum_d exp(-d**2 / (2 sigma**2)) x[i + d]``.

    The kernel is separable, and its weights are normalised to sum to 1. Images are padded by reflection.

    Args:
        sigma: standard deviation in pixels, above 0, or ``(low, high)`` for a uniformly distributed one.
        radius: largest ``|d|``, at least 1. Default: 3 times the largest sigma, rounded up.

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` whose draw is sigma, float32 ``()``.

    Raises:
        ValueError: if a sigma is not above 0, the bounds are reversed, or the radius is below 1.

    Source: torchvision's ``GaussianBlur(2 * radius + 1, sigma)``, extended to images smaller than the kernel.

    >>> blur = gaussian_blur((0.5, 1.5))
    >>> round(blur.apply(torch.ones(3, 8, 8), blur.draw(torch.tensor([0, 1]))).mean().item(), 4)
    1.0
    """
    low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    if not 0 < low <= high < math.inf:
        raise ValueError(f"gaussian_blur: sigma must be above 0, or bounds with 0 < low <= high, got {sigma}")
    radius = check_int("gaussian_blur: radius", math.ceil(3.0 * high) if radius is None else radius, 1)

    def draw(key: Key) -> Draw:
        return uniform(key) * (high - low) + low

    def apply(image: Tensor, drawn: Draw) -> Tensor:
        check_image("gaussian_blur", image)
        distance = torch.arange(-radius, radius + 1, device=image.device)
        weights = torch.exp(-0.5 * (distance / drawn.to(image.dtype)) ** 2)
        weights = weights / weights.sum()
        planes = image.reshape(1, -1, *image.shape[-2:])
        count = planes.shape[1]
        weights = weights.expand(count, 1, -1)
        blurred = F.conv2d(_reflect_pad(planes, -2, radius), weights[..., None], groups=count)
        return F.conv2d(_reflect_pad(blurred, -1, radius), weights[:, :, None], groups=count).reshape(image.shape)

    return Transform(draw, apply)


def roll(pixels: int) -> Transform:
    """Shift cyclically by a random whole number of pixels, as ``torch.roll`` does. Exact.

    Args:
        pixels: largest shift, at least 0. Shifts in x and y are independent and uniform over ``-pixels`` to
            ``pixels``.

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` whose draw is the shift down and to the right, int64 ``(2,)``.

    Raises:
        ValueError: if ``pixels`` is negative or not an integer.

    >>> roll(1).apply(torch.arange(6.0).reshape(1, 2, 3), torch.tensor([1, 1]))
    tensor([[[5., 3., 4.],
             [2., 0., 1.]]])
    """
    pixels = check_int("roll: pixels", pixels, 0)

    def draw(key: Key) -> Draw:
        return torch.floor(uniform(key, (2,)) * (2 * pixels + 1)).long() - pixels

    def apply(image: Tensor, shift: Draw) -> Tensor:
        check_image("roll", image)
        for axis in (-2, -1):
            source = torch.arange(image.shape[axis], device=image.device) - shift[axis]
            image = image.index_select(axis, source % image.shape[axis])
        return image

    return Transform(draw, apply)


def check_image(name: str, image: Tensor) -> None:
    """Raise ValueError if a tensor cannot be ``(..., c, h, w)``, such as a signal."""
    if image.ndim < 3:
        raise ValueError(f"{name} expected images (..., c, h, w), got {tuple(image.shape)}; signals have warp_time")


def _reflect_pad(image: Tensor, axis: int, margin: int) -> Tensor:
    """Pad both ends of an axis by reflection about the border pixel, repeatedly if the margin exceeds the image."""
    if image.shape[axis] == 1:
        return torch.cat([image] * (2 * margin + 1), axis)
    while margin > 0:
        size = image.shape[axis]
        width = min(margin, size - 1)
        before, after = image.narrow(axis, 1, width), image.narrow(axis, size - 1 - width, width)
        image = torch.cat([before.flip(axis), image, after.flip(axis)], axis)
        margin -= width
    return image
