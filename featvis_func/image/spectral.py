"""Images as Fourier spectra, so that a gradient step changes all scales alike, in space and in time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from featvis_func.color import Correlation, correlation_matrix
from featvis_func.constants import device_constant
from featvis_func.image.base import Canvas, Size, bounded, image_shape
from featvis_func.random import normal
from featvis_func.types import Image, Key
from featvis_func.validation import check_float

# Lucid divides the inverse transform by this constant, which sets how fast colours saturate. Source: `fft_image` in
# lucid/optvis/param/spatial.py, tensorflow/lucid at v0.3.8.
_LUCID_DIVISOR = 4.0


def frequencies(*sides: int, device: torch.device | str | None = None) -> Tensor:
    """Return the frequency of each entry of ``rfftn``, in cycles per pixel: ``sqrt(fx^2 + fy^2)`` for ``h, w``.

    For ``t, h, w`` it is the joint frequency ``sqrt(fx^2 + fy^2 + ft^2)``, with ``ft`` in cycles per frame: what moves
    by one pixel per frame has the same frequency in time as in space.

    Returns:
        float32 ``(*sides[:-1], sides[-1] // 2 + 1)``.

    >>> frequencies(2, 4)
    tensor([[0.0000, 0.2500, 0.5000],
            [0.5000, 0.5590, 0.7071]])
    """
    squares = torch.fft.rfftfreq(sides[-1], dtype=torch.float32, device=device) ** 2
    for axis, side in enumerate(sides[-2::-1], 1):
        squares = squares + torch.fft.fftfreq(side, dtype=torch.float32, device=device).reshape(-1, *(1,) * axis) ** 2
    return torch.sqrt(squares)


def power_law(sides: Sequence[int], decay: float, *, device: torch.device | str | None = None) -> Tensor:
    """Return ``1 / max(f, 1 / max(sides)) ** decay``, the amplitude spectrum of natural images for ``decay`` near 1.

    Returns:
        float32 ``(*sides[:-1], sides[-1] // 2 + 1)``.

    >>> power_law((1, 4), 1.0)
    tensor([[4., 4., 2.]])
    """
    return frequencies(*sides, device=device).clamp_min(1.0 / max(sides)) ** -decay


def octaves(sides: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """Number the half octaves of the frequencies of ``rfftn``, from 0 for up to ``2 ** 0.5 / max(sides)``.

    Returns:
        int64 ``(*sides[:-1], sides[-1] // 2 + 1)``.

    >>> octaves((1, 16))
    tensor([[0, 0, 2, 3, 4, 4, 5, 5, 6]])
    """
    # The margin keeps whole octaves, which are exact powers of two, on one side of the rounding.
    relative = (frequencies(*sides, device=device) * max(sides)).clamp_min(1.0)
    return torch.floor(2.0 * torch.log2(relative) + 1e-3).long()


def fourier_canvas(
    size: Size,
    *,
    channels: int = 3,
    sd: float = 0.01,
    decay: float | None = None,
    below: float | None = None,
    device: torch.device | str | None = None,
) -> Canvas:
    """Canvas of :func:`fourier`, optionally restricted to its low frequencies.

    ``x = irfft2(s / max(f, 1 / max(h, w)) ** decay, norm="ortho") / 4``.

    Args:
        size, channels, sd, decay, device: as for :func:`fourier`.
        below: keep only frequencies below this one, in cycles per pixel, above 0. ``None`` keeps all.

    Returns:
        A :class:`Canvas` with the parameters of :func:`fourier`.

    Raises:
        ValueError: if the size or channel count is below 1, or ``below`` is not above 0.

    >>> low = fourier_canvas(16, channels=1, below=0.01)
    >>> low.decode(torch.randn(1, 16, 9, 2)).std().item() < 1e-6
    True
    """
    c, *sides = shape = image_shape(size, channels)
    axes = tuple(range(-len(sides), 0))
    decay = len(sides) / 2 if decay is None else check_float("decay", decay)
    scale = power_law(sides, decay, device=device) / _LUCID_DIVISOR
    if below is not None:
        if not below > 0:
            raise ValueError(f"below must be above 0 cycles per pixel, got {below}")
        scale = torch.where(frequencies(*sides, device=device) < below, scale, 0.0)
    # Repeated for real and imaginary part: broadcasting over the last axis of size 2 is slower.
    scale = torch.stack([scale, scale], dim=-1)
    scale_of = device_constant(scale)

    def init(key: Key) -> Tensor:
        return sd * normal(key, (c, *scale.shape))

    def decode(params: Tensor) -> Tensor:
        return torch.fft.irfftn(torch.view_as_complex(params * scale_of(params)), s=sides, dim=axes, norm="ortho")

    def encode(pixels: Tensor) -> Tensor:
        spectrum = torch.view_as_real(torch.fft.rfftn(pixels, dim=axes, norm="ortho"))
        divisor = scale_of(pixels)
        # Frequencies that `below` removes are encoded as 0.
        return spectrum / torch.where(divisor > 0, divisor, torch.inf)

    return Canvas(shape, init, decode, encode, groups=octaves(sides, device=device)[None, ..., None])


def fourier(
    size: Size,
    *,
    channels: int = 3,
    sd: float = 0.01,
    decay: float | None = None,
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """Fourier parameterisation: a spectrum scaled by ``1 / f``, so that a step changes all spatial scales alike.

    ``x = irfft2(s / max(f, 1 / max(h, w)) ** decay, norm="ortho") / 4``, then ``sigmoid(matrix @ x)`` per pixel,
    with ``f`` the frequency in cycles per pixel. A video has a spectrum over time and space, and ``f`` is the joint
    frequency ``sqrt(fx^2 + fy^2 + ft^2)``, with ``ft`` in cycles per frame; a signal has one over time.

    Args:
        size: image size in pixels, ``h = w`` or ``(h, w)``; ``(t, h, w)`` for a video of ``t`` frames, ``(t,)`` for a
            signal of ``t`` samples. Odd sides are supported exactly.
        channels: image channels, at least 1.
        sd: standard deviation of the initial parameters. 0.01 gives a nearly uniform grey image.
        decay: the amplitudes are divided by the frequency to this power; 0 gives white noise. Default: half the number
            of sides, with which all octaves have the same power: 1 for images, 3/2 for videos, 1/2 for signals, about
            as natural images, motion pictures and music have it.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: device of the constants; they are copied once to each other one.

    Returns:
        An :class:`Image` with parameters float32 ``(channels, h, w // 2 + 1, 2)``, the last axis holding real and
        imaginary part; ``(channels, t, h, w // 2 + 1, 2)`` and ``(channels, t // 2 + 1, 2)`` for videos and signals.

    Raises:
        ValueError: if the size or channel count is below 1, or the correlation matrix has the wrong shape.

    Source: Olah et al., "Feature Visualization", Distill 2017. Deviation from Lucid: ``irfft2`` receives the size, so
    that odd widths need neither an extra column nor a crop. The power of motion pictures is ``f^-3`` times a function
    of the ratio of temporal and spatial frequency (Dong and Atick, "Statistics of natural time-varying images", 1995,
    for objects whose spectrum is that of natural images); that of music and speech is ``1 / f`` (Voss and Clarke,
    "'1/f noise' in music and speech", 1975).

    >>> image = fourier((5, 7), channels=1)
    >>> image.decode(image.init(torch.tensor([0, 1]))).shape
    torch.Size([1, 5, 7])
    """
    canvas = fourier_canvas(size, channels=channels, sd=sd, decay=decay, device=device)
    return bounded(canvas, correlation=correlation, device=device)


def alpha(
    size: Size,
    *,
    channels: int = 3,
    sd: float = 0.01,
    decay: float | None = None,
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """Fourier parameterisation with an alpha channel, so that regions the objective does not depend on can fade out.

    As :func:`fourier`, with one more spectrum for the opacity ``sigmoid(x)``, to which the colour correlation does not
    apply. The initial opacity is near 0.5. For images and videos; nothing lies behind a signal.

    Args:
        size, sd, decay, device: as for :func:`fourier`.
        channels: colour channels, at least 1. The image has one channel more.
        correlation: of the colour channels, see :func:`~featvis_func.color.correlation_matrix`.

    Returns:
        An :class:`Image` with the parameters of a :func:`fourier` of ``channels + 1``; decodes to
        ``(channels + 1, h, w)``, the last channel alpha.

    Raises:
        ValueError: if the size or channel count is below 1, the size is that of a signal, or the correlation matrix has
            the wrong shape.

    Source: Mordvintsev et al., "Differentiable Image Parameterizations", Distill 2018, section "Transparency"; Lucid's
    ``image(alpha=True)``. The random transform must composite the image over a background, as
    :func:`~featvis_func.transform.over_background` does; otherwise the opacity receives no gradient.

    >>> image = alpha(8)
    >>> image.decode(image.init(torch.tensor([0, 1]))).shape
    torch.Size([4, 8, 8])
    """
    if len(image_shape(size, channels)) == 2:
        raise ValueError(
            "alpha is for images and videos; a signal can be fourier, pixel, phase, laplacian_pyramid or cppn"
        )
    colors = correlation_matrix(channels, correlation, device=device)
    matrix = None if colors is None else torch.block_diag(colors, colors.new_ones(1, 1))
    image = fourier(size, channels=channels + 1, sd=sd, decay=decay, correlation=matrix, device=device)
    assert isinstance(image.groups, Tensor)
    # The opacity has octaves of its own: its gradient is of another size than those of the colours.
    opacity = image.groups + image.groups.max() + 1
    return image._replace(groups=torch.cat([image.groups.expand(channels, *image.groups.shape[1:]), opacity]))
