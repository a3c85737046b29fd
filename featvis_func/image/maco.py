"""Images with a fixed magnitude spectrum and trainable phases (MACO)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from featvis_func.color import Correlation
from featvis_func.constants import device_constant
from featvis_func.image.base import Size, image_shape, value_range
from featvis_func.image.spectral import power_law
from featvis_func.random import uniform
from featvis_func.types import Image, Key
from featvis_func.validation import check_float

# Exponent of the default magnitude, per side of the image: 1.2 for images.
_DECAY_PER_SIDE = 0.6


def phase(
    size: Size,
    *,
    channels: int = 3,
    magnitude: Tensor | None = None,
    decay: float | None = None,
    contrast: float | None = 2.0,
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """Spectrum with trainable phases and fixed magnitudes, which keeps the frequency content of natural images.

    ``x = irfft2(r * exp(i * phi), norm="ortho")``, then ``sigmoid(matrix @ x)`` per pixel. The fixed magnitudes ``r``
    bound the high frequencies and the contrast of the image. A video has a spectrum over time and space, a signal one
    over time; their magnitudes have one axis more, or one less, than those below.

    Args:
        size: image size in pixels, ``h = w`` or ``(h, w)``; ``(t, h, w)`` for a video, ``(t,)`` for a signal. Odd sides
            are supported exactly.
        channels: image channels, at least 1.
        magnitude: ``r``, at least 0, float ``(channels, h, w // 2 + 1)``, or ``(h, w // 2 + 1)`` for all channels, of
            mean-subtracted images in decorrelated colour, as :func:`~featvis_func.image_statistics` measures it.
            Default: ``1 / max(f, 1 / max(h, w)) ** decay``, with ``f`` the frequency of :func:`fourier`.
        decay: exponent of the default magnitude; smaller values give more fine detail. Default: 1.2 for images, which
            natural images have on average (Tolhurst, Tadmor and Chao, "Amplitude spectra of natural images", 1992), and
            accordingly 1.8 for videos and 0.6 for signals.
        contrast: root mean square of ``x`` over pixels and channels, to which ``r`` is scaled. With 2, pixel values
            have a standard deviation near 0.23, as in ImageNet. ``None`` uses ``r`` unscaled.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: device of the constants. Decoding on another device is correct, but copies them every time.

    Returns:
        An :class:`Image` with parameters float32 ``(channels, h, w // 2 + 1)``: phases in radians, initialised
        uniformly over the circle. To start from an image and keep its magnitudes, see :func:`magnitude_of`.

    Raises:
        ValueError: if the size or channel count is below 1; if the magnitude has the wrong shape, is negative, not
            finite or zero everywhere; if the contrast is not above 0; or if the correlation matrix has the wrong shape.

    Source: Fel et al., "Unlocking Feature Visualization for Deeper Networks with MAgnitude Constrained Optimization",
    NeurIPS 2023, section 3; ``maco_preconditioner`` in serre-lab/Horama and ``maco_image_parametrization`` in
    deel-ai/xplique. As in both implementations, colours are decorrelated, ``x`` has a fixed contrast, and a sigmoid
    bounds the values. Deviations:

    * They draw phases from a normal distribution. Here they are uniform, so that ``exp(i * phi)`` has mean zero;
      otherwise all waves are in phase at the corner and form a bright spot.
    * They standardise phases and ``x`` at each step. Here no parameter depends on another, and the power of ``x`` is
      that of ``r`` by construction.
    * ``rfft2`` stores the first column (and, for even widths, the last) with its complex conjugates. They give both
      entries of such a pair a phase of its own, whose average has less than the prescribed magnitude. Here the
      difference of the two parameters is the phase.
    * Entries that are their own conjugate, such as the mean, are real: ``r * cos(phi)``.
    * Their default magnitude is the average over ImageNet, read from a file, and their contrast is 1. Here the defaults
      are a power law and 2.

    >>> image = phase(8, channels=1, decay=1.0)
    >>> x = torch.logit(image.decode(image.init(torch.tensor([0, 1]))))
    >>> r = torch.fft.rfft2(x, norm="ortho").abs()
    >>> round((r[0, 1, 0] / r[0, 2, 0]).item(), 3)
    2.0
    """
    c, *sides = shape = image_shape(size, channels)
    axes = tuple(range(-len(sides), 0))
    values = value_range(shape, correlation, device)
    self_conjugate, conjugate_pair, second_of_pair = _conjugate_masks(sides, device)
    if magnitude is None:
        exponent = _DECAY_PER_SIDE * len(sides) if decay is None else check_float("decay", decay)
        r = power_law(sides, exponent, device=device)
    else:
        r = _check_magnitude(magnitude, shape, device)
    entries = (c, *conjugate_pair.shape)
    if contrast is not None:
        contrast = check_float("contrast", contrast, above=0)
        r = r * (contrast / _root_mean_square(r.expand(entries), self_conjugate | conjugate_pair, math.prod(sides)))

    magnitudes, pairs = device_constant(r), device_constant(conjugate_pair)

    def init(key: Key) -> Tensor:
        return uniform(key, entries, low=-math.pi, high=math.pi)

    def decode(params: Tensor) -> Tensor:
        partner = params
        for axis in axes[:-1]:  # Entry k is paired with entry -k (mod n) of each axis but the last.
            partner = torch.roll(torch.flip(partner, (axis,)), 1, axis)
        phi = params - partner * pairs(params)
        spectrum = magnitudes(params)[..., None] * torch.stack([torch.cos(phi), torch.sin(phi)], dim=-1)
        return values.to_image(torch.fft.irfftn(torch.view_as_complex(spectrum), s=sides, dim=axes, norm="ortho"))

    def encode(picture: Tensor) -> Tensor:
        parts = torch.view_as_real(torch.fft.rfftn(values.to_canvas(picture), dim=axes, norm="ortho"))
        real, imaginary = parts.unbind(-1)
        phi = torch.atan2(imaginary, real)
        # One entry of each conjugate pair holds the angle, the other 0: decoding takes their difference.
        return torch.where(second_of_pair.to(picture.device), 0.0, phi)

    return Image(init, decode, encode=encode)


def magnitude_of(picture: Tensor, *, correlation: Correlation = "auto") -> Tensor:
    """Return the magnitude spectrum of an image, for use as ``phase(magnitude=..., contrast=None)``.

    Args:
        picture: ``(c, h, w)``, ``(c, t, h, w)`` or ``(c, t)`` in ``[0, 1]``.
        correlation: the colour correlation that is passed to :func:`phase`.

    Returns:
        ``(c, h, w // 2 + 1)``, ``(c, t, h, w // 2 + 1)`` or ``(c, t // 2 + 1)``, of the dtype and on the device of
        ``picture``.

    Raises:
        ValueError: if the correlation matrix has the wrong shape.

    >>> from featvis_func.image import from_image
    >>> picture = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(0))
    >>> image = from_image(phase((6, 7), magnitude=magnitude_of(picture), contrast=None), picture)
    >>> torch.allclose(image.decode(image.init(torch.tensor([0, 1]))), picture, atol=1e-3)
    True
    """
    values = value_range(tuple(picture.shape), correlation, picture.device)
    return torch.fft.rfftn(values.to_canvas(picture), dim=tuple(range(1, picture.ndim)), norm="ortho").abs()


def _conjugate_masks(sides: Sequence[int], device: torch.device | str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return masks of the ``rfftn`` entries that are self-conjugate, and of those conjugate to another in their column.

    A column is what the last axis counts. Entries of all columns but the first (and, for an even side, the last) are
    conjugate to entries that ``rfftn`` does not store.

    Returns:
        Three bool tensors of the shape of the spectrum: self-conjugate entries; both entries of each conjugate pair;
        one entry of each pair.
    """
    *others, last = sides
    column = torch.arange(last // 2 + 1, device=device)
    same_column = ((2 * column) % last == 0).expand(*others, -1)
    self_conjugate, second_of_pair = same_column, torch.zeros_like(same_column)
    for axis, side in enumerate(others):
        index = torch.arange(side, device=device).reshape(-1, *(1,) * (len(others) - axis))
        # The first axis along which the two entries of a pair differ tells which is the second.
        second_of_pair = second_of_pair | (self_conjugate & (2 * index > side))
        self_conjugate = self_conjugate & ((2 * index) % side == 0)
    return self_conjugate, same_column & ~self_conjugate, second_of_pair


def _root_mean_square(r: Tensor, same_column: Tensor, pixels: int) -> float:
    """Root mean square of an image with the magnitudes ``r``, by Parseval's theorem.

    Entries outside of ``same_column`` count twice, because ``rfftn`` does not store their conjugates.
    """
    power = (r.double() ** 2 * (2.0 - same_column.double())).sum() / (len(r) * pixels)
    return math.sqrt(power.item())


def _check_magnitude(magnitude: Tensor, shape: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    """Return a float32 copy of a magnitude spectrum for images of the given shape, or raise ValueError."""
    r = torch.as_tensor(magnitude, dtype=torch.float32, device=device).detach().clone()
    entries = (*shape[:-1], shape[-1] // 2 + 1)
    if r.shape not in (entries, entries[1:]):
        raise ValueError(
            f"magnitude of {' x '.join(map(str, shape))} images must have shape {entries} or {entries[1:]}, got"
            f" {tuple(r.shape)}; measure it at size={shape[1:]}"
        )
    if not bool((r.isfinite() & (r >= 0)).all()) or not bool((r > 0).any()):
        raise ValueError(
            "magnitude must be finite, at least 0 and not zero everywhere,"
            f" got values from {r.min().item():g} to {r.max().item():g}"
        )
    return r
