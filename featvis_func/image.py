"""Parameterisations: which tensors stand for an image.

Each factory returns an :class:`~featvis_func.types.Image` of pure functions for one image: ``init(key)`` draws
parameters, ``decode(params)`` maps any finite parameters (up to 1e30) into the valid range ``[0, 1]``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from featvis_func.color import Correlation, correlate, correlation_matrix
from featvis_func.random import normal
from featvis_func.types import Image, Key

# Lucid divides the inverse transform by this; it sets how fast colours saturate. Source: lucid/optvis/param/
# spatial.py, `fft_image`, tensorflow/lucid at v0.3.8.
_LUCID_DIVISOR = 4.0


def image_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Checks and completes an image size.

    Args:
        size: pixels, one number for a square or ``(h, w)``.

    Returns:
        ``(h, w)``.

    Raises:
        ValueError: a side is below 1.

    >>> image_size(64)
    (64, 64)
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"image size must be whole pixels, at least 1, or (h, w) of such, got {size}")
    return sides


def fourier(
    size: int | tuple[int, int],
    *,
    channels: int = 3,
    sd: float = 0.01,
    decay: float = 1.0,
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """The spectrum of the image, so that a gradient step moves all scales of the picture alike.

    ``x = irfft2(s / max(f, 1 / max(h, w)) ** decay, norm="ortho") / 4``, then ``sigmoid(matrix @ x)`` per pixel,
    with ``f`` the frequency in cycles per pixel.

    Args:
        size: pixels, ``h = w`` or ``(h, w)``; odd sides are exact.
        channels: image channels, at least 1.
        sd: standard deviation of the initial spectrum; 0.01 starts as nearly even grey.
        decay: power of the frequency that the amplitudes are divided by. 0: white; 1: as in natural images.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: where the constants live; decoding elsewhere is right but copies them.

    Returns:
        An :class:`Image` with parameters float32 ``(channels, h, w // 2 + 1, 2)``, last axis real and imaginary.

    Raises:
        ValueError: a size or channel count below 1, or a correlation of another shape.

    Source: Olah et al., "Feature Visualization", Distill 2017. Deviation from Lucid: ``irfft2`` is given the size, so
    that an odd width needs no extra column and no crop.

    >>> image = fourier((5, 7), channels=1)
    >>> image.decode(image.init(torch.tensor([0, 1]))).shape
    torch.Size([1, 5, 7])
    """
    h, w = image_size(size)
    to_range = _to_range(channels, correlation, device)
    fy = torch.fft.fftfreq(h, device=device)[:, None]
    fx = torch.fft.rfftfreq(w, device=device)[None, :]
    frequency = torch.sqrt(fx**2 + fy**2).clamp_min(1.0 / max(h, w))
    scale = frequency**-decay / _LUCID_DIVISOR

    def init(key: Key) -> Tensor:
        return sd * normal(key, (channels, h, w // 2 + 1, 2))

    def decode(params: Tensor) -> Tensor:
        spectrum = params * scale.to(params)[..., None]
        pixels = torch.fft.irfft2(torch.view_as_complex(spectrum), s=(h, w), norm="ortho")
        return to_range(pixels)

    return Image(init, decode)


def pixel(
    size: int | tuple[int, int],
    *,
    channels: int = 3,
    sd: float = 0.01,
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """The pixels themselves: ``sigmoid(matrix @ x)``. Climbs to noise more readily than :func:`fourier`.

    Args:
        size: pixels, ``h = w`` or ``(h, w)``.
        channels: image channels, at least 1.
        sd: standard deviation of the initial pixels, before the sigmoid.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: where the constants live; decoding elsewhere is right but copies them.

    Returns:
        An :class:`Image` with parameters float32 ``(channels, h, w)``.

    Raises:
        ValueError: a size or channel count below 1, or a correlation of another shape.

    >>> image = pixel(4)
    >>> image.decode(image.init(torch.tensor([0, 1]))).shape
    torch.Size([3, 4, 4])
    """
    h, w = image_size(size)
    to_range = _to_range(channels, correlation, device)

    def init(key: Key) -> Tensor:
        return sd * normal(key, (channels, h, w))

    return Image(init, to_range)


def _to_range(channels: int, correlation: Correlation, device: torch.device | str | None) -> Callable[[Tensor], Tensor]:
    """Decorrelated, unbounded ``(c, h, w)`` -> channels in ``[0, 1]``."""
    if channels < 1:
        raise ValueError(f"an image needs at least 1 channel, got {channels}")
    matrix = correlation_matrix(channels, correlation, device=device)
    return lambda pixels: torch.sigmoid(correlate(pixels, matrix))
