"""Images as spectra: all scales of the picture move alike."""

import torch
from torch import Tensor

from featvis_func.color import Correlation, correlation_matrix
from featvis_func.image.base import Canvas, bounded, image_shape
from featvis_func.random import normal
from featvis_func.types import Image, Key

# Lucid divides the inverse transform by this; it sets how fast colours saturate. Source: lucid/optvis/param/
# spatial.py, `fft_image`, tensorflow/lucid at v0.3.8.
_LUCID_DIVISOR = 4.0


def frequencies(h: int, w: int, *, device: torch.device | str | None = None) -> Tensor:
    """The frequency of each entry of ``rfft2``, in cycles per pixel: ``sqrt(fx^2 + fy^2)``.

    Returns:
        float32 ``(h, w // 2 + 1)``.

    >>> frequencies(2, 4)
    tensor([[0.0000, 0.2500, 0.5000],
            [0.5000, 0.5590, 0.7071]])
    """
    fy = torch.fft.fftfreq(h, device=device)[:, None]
    fx = torch.fft.rfftfreq(w, device=device)[None, :]
    return torch.sqrt(fx**2 + fy**2)


def power_law(h: int, w: int, decay: float, *, device: torch.device | str | None = None) -> Tensor:
    """``1 / max(f, 1 / max(h, w)) ** decay``: how the amplitudes of natural images fall, for ``decay`` about 1.

    Returns:
        float32 ``(h, w // 2 + 1)``.

    >>> power_law(1, 4, 1.0)
    tensor([[4., 4., 2.]])
    """
    return frequencies(h, w, device=device).clamp_min(1.0 / max(h, w)) ** -decay


def fourier_canvas(
    size: int | tuple[int, int],
    *,
    channels: int = 3,
    sd: float = 0.01,
    decay: float = 1.0,
    below: float | None = None,
    device: torch.device | str | None = None,
) -> Canvas:
    """What :func:`fourier` shows, before colour and range; or its low frequencies alone.

    ``x = irfft2(s / max(f, 1 / max(h, w)) ** decay, norm="ortho") / 4``.

    Args:
        size, channels, sd, decay, device: as for :func:`fourier`.
        below: leaves out the frequencies from this one on, in cycles per pixel, above 0; ``None``: keeps all.

    Returns:
        A :class:`Canvas` with parameters float32 ``(channels, h, w // 2 + 1, 2)``.

    Raises:
        ValueError: a size or channel count below 1, or ``below`` not above 0.

    >>> low = fourier_canvas(16, channels=1, below=0.01)
    >>> low.decode(torch.randn(1, 16, 9, 2)).std().item() < 1e-6
    True
    """
    c, h, w = image_shape(size, channels)
    scale = power_law(h, w, decay, device=device) / _LUCID_DIVISOR
    if below is not None:
        if not below > 0:
            raise ValueError(f"below must be a frequency above 0, in cycles per pixel, got {below}")
        scale = torch.where(frequencies(h, w, device=device) < below, scale, 0.0)
    # For the real and for the imaginary part: one factor for both would be multiplied pair by pair, which takes longer.
    scale = torch.stack([scale, scale], dim=-1)

    def init(key: Key) -> Tensor:
        return sd * normal(key, (c, h, w // 2 + 1, 2))

    def decode(params: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.view_as_complex(params * scale.to(params)), s=(h, w), norm="ortho")

    def encode(pixels: Tensor) -> Tensor:
        spectrum = torch.view_as_real(torch.fft.rfft2(pixels, norm="ortho"))
        held = scale.to(pixels)
        return spectrum / torch.where(held > 0, held, torch.inf)

    return Canvas((c, h, w), init, decode, encode)


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
    canvas = fourier_canvas(size, channels=channels, sd=sd, decay=decay, device=device)
    return bounded(canvas, correlation=correlation, device=device)


def alpha(
    size: int | tuple[int, int],
    *,
    channels: int = 3,
    sd: float = 0.01,
    decay: float = 1.0,
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """Colours and, as the last channel, how opaque each pixel is: what the filter does not care about can vanish.

    As :func:`fourier`, with one more spectrum for the opacity ``sigmoid(x)``, which takes no part in the correlation of
    the colours. It starts near 0.5.

    Args:
        size, sd, decay, device: as for :func:`fourier`.
        channels: of colour, at least 1; one more comes out.
        correlation: of the colours, see :func:`~featvis_func.color.correlation_matrix`.

    Returns:
        An :class:`Image` with parameters float32 ``(channels + 1, h, w // 2 + 1, 2)``; decoded ``(channels + 1, h,
        w)``.

    Raises:
        ValueError: a size or channel count below 1, or a correlation of another shape.

    Source: Mordvintsev et al., "Differentiable Image Parameterizations", Distill 2018, section "Transparency"; Lucid's
    ``image(alpha=True)``. The view must lay the image over a background: without one the opacity has no gradient.

    >>> image = alpha(8)
    >>> image.decode(image.init(torch.tensor([0, 1]))).shape
    torch.Size([4, 8, 8])
    """
    image_shape(size, channels)
    colors = correlation_matrix(channels, correlation, device=device)
    matrix = None if colors is None else torch.block_diag(colors, colors.new_ones(1, 1))
    return fourier(size, channels=channels + 1, sd=sd, decay=decay, correlation=matrix, device=device)
