"""Images as Fourier spectra, so that a gradient step changes all spatial scales alike."""

import torch
from torch import Tensor

from featvis_func.color import Correlation, correlation_matrix
from featvis_func.image.base import Canvas, bounded, image_shape
from featvis_func.random import normal
from featvis_func.types import Image, Key

# Lucid divides the inverse transform by this constant, which sets how fast colours saturate. Source: `fft_image` in
# lucid/optvis/param/spatial.py, tensorflow/lucid at v0.3.8.
_LUCID_DIVISOR = 4.0


def frequencies(h: int, w: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the frequency of each entry of ``rfft2``, in cycles per pixel: ``sqrt(fx^2 + fy^2)``.

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
    """Return ``1 / max(f, 1 / max(h, w)) ** decay``, the amplitude spectrum of natural images for ``decay`` near 1.

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
    """Canvas of :func:`fourier`, optionally restricted to its low frequencies.

    ``x = irfft2(s / max(f, 1 / max(h, w)) ** decay, norm="ortho") / 4``.

    Args:
        size, channels, sd, decay, device: as for :func:`fourier`.
        below: keep only frequencies below this one, in cycles per pixel, above 0. ``None`` keeps all.

    Returns:
        A :class:`Canvas` with parameters float32 ``(channels, h, w // 2 + 1, 2)``.

    Raises:
        ValueError: if the size or channel count is below 1, or ``below`` is not above 0.

    >>> low = fourier_canvas(16, channels=1, below=0.01)
    >>> low.decode(torch.randn(1, 16, 9, 2)).std().item() < 1e-6
    True
    """
    c, h, w = image_shape(size, channels)
    scale = power_law(h, w, decay, device=device) / _LUCID_DIVISOR
    if below is not None:
        if not below > 0:
            raise ValueError(f"below must be above 0 cycles per pixel, got {below}")
        scale = torch.where(frequencies(h, w, device=device) < below, scale, 0.0)
    # Repeated for real and imaginary part: broadcasting over the last axis of size 2 is slower.
    scale = torch.stack([scale, scale], dim=-1)

    def init(key: Key) -> Tensor:
        return sd * normal(key, (c, h, w // 2 + 1, 2))

    def decode(params: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.view_as_complex(params * scale.to(params)), s=(h, w), norm="ortho")

    def encode(pixels: Tensor) -> Tensor:
        spectrum = torch.view_as_real(torch.fft.rfft2(pixels, norm="ortho"))
        divisor = scale.to(pixels)
        # Frequencies that `below` removes are encoded as 0.
        return spectrum / torch.where(divisor > 0, divisor, torch.inf)

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
    """Fourier parameterisation: a spectrum scaled by ``1 / f``, so that a step changes all spatial scales alike.

    ``x = irfft2(s / max(f, 1 / max(h, w)) ** decay, norm="ortho") / 4``, then ``sigmoid(matrix @ x)`` per pixel,
    with ``f`` the frequency in cycles per pixel.

    Args:
        size: image size in pixels, ``h = w`` or ``(h, w)``. Odd sides are supported exactly.
        channels: image channels, at least 1.
        sd: standard deviation of the initial parameters. 0.01 gives a nearly uniform grey image.
        decay: the amplitudes are divided by the frequency to this power. 0 gives white noise, 1 the spectrum of natural
            images.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: device of the constants. Decoding on another device is correct, but copies them every time.

    Returns:
        An :class:`Image` with parameters float32 ``(channels, h, w // 2 + 1, 2)``, the last axis holding real and
        imaginary part.

    Raises:
        ValueError: if the size or channel count is below 1, or the correlation matrix has the wrong shape.

    Source: Olah et al., "Feature Visualization", Distill 2017. Deviation from Lucid: ``irfft2`` receives the size, so
    that odd widths need neither an extra column nor a crop.

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
    """Fourier parameterisation with an alpha channel, so that regions the objective does not depend on can fade out.

    As :func:`fourier`, with one more spectrum for the opacity ``sigmoid(x)``, to which the colour correlation does not
    apply. The initial opacity is near 0.5.

    Args:
        size, sd, decay, device: as for :func:`fourier`.
        channels: colour channels, at least 1. The image has one channel more.
        correlation: of the colour channels, see :func:`~featvis_func.color.correlation_matrix`.

    Returns:
        An :class:`Image` with parameters float32 ``(channels + 1, h, w // 2 + 1, 2)``; decodes to
        ``(channels + 1, h, w)``, the last channel alpha.

    Raises:
        ValueError: if the size or channel count is below 1, or the correlation matrix has the wrong shape.

    Source: Mordvintsev et al., "Differentiable Image Parameterizations", Distill 2018, section "Transparency"; Lucid's
    ``image(alpha=True)``. The random transform must composite the image over a background, as
    :func:`~featvis_func.transform.over_background` does; otherwise the opacity receives no gradient.

    >>> image = alpha(8)
    >>> image.decode(image.init(torch.tensor([0, 1]))).shape
    torch.Size([4, 8, 8])
    """
    image_shape(size, channels)
    colors = correlation_matrix(channels, correlation, device=device)
    matrix = None if colors is None else torch.block_diag(colors, colors.new_ones(1, 1))
    return fourier(size, channels=channels + 1, sd=sd, decay=decay, correlation=matrix, device=device)
