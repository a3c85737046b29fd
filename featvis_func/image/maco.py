"""Images with a fixed magnitude spectrum and trainable phases (MACO)."""

import math

import torch
from torch import Tensor

from featvis_func.color import Correlation
from featvis_func.image.base import image_shape, value_range
from featvis_func.image.spectral import power_law
from featvis_func.random import uniform
from featvis_func.types import Image, Key
from featvis_func.validation import check_float


def phase(
    size: int | tuple[int, int],
    *,
    channels: int = 3,
    magnitude: Tensor | None = None,
    decay: float = 1.2,
    contrast: float | None = 2.0,
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """Spectrum with trainable phases and fixed magnitudes, which keeps the frequency content of natural images.

    ``x = irfft2(r * exp(i * phi), norm="ortho")``, then ``sigmoid(matrix @ x)`` per pixel. The fixed magnitudes ``r``
    bound the high frequencies and the contrast of the image.

    Args:
        size: image size in pixels, ``h = w`` or ``(h, w)``. Odd sides are supported exactly.
        channels: image channels, at least 1.
        magnitude: ``r``, at least 0, float ``(channels, h, w // 2 + 1)``, or ``(h, w // 2 + 1)`` for all channels, of
            mean-subtracted images in decorrelated colour, as :func:`~featvis_func.image_statistics` measures it.
            Default: ``1 / max(f, 1 / max(h, w)) ** decay``, with ``f`` the frequency in cycles per pixel.
        decay: exponent of the default magnitude. Natural images have 1.2 on average (Tolhurst, Tadmor and Chao,
            "Amplitude spectra of natural images", 1992). Smaller values give more fine detail.
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
    c, h, w = image_shape(size, channels)
    values = value_range(c, correlation, device)
    self_conjugate, conjugate_pair = _conjugate_masks(h, w, device)
    r = power_law(h, w, decay, device=device) if magnitude is None else _check_magnitude(magnitude, (c, h, w), device)
    if contrast is not None:
        contrast = check_float("contrast", contrast, above=0)
        r = r * (contrast / _root_mean_square(r.expand(c, h, w // 2 + 1), self_conjugate | conjugate_pair, w * h))

    def init(key: Key) -> Tensor:
        return uniform(key, (c, h, w // 2 + 1), low=-math.pi, high=math.pi)

    def decode(params: Tensor) -> Tensor:
        # Row k is paired with row -k (mod h).
        partner = torch.roll(torch.flip(params, (-2,)), 1, -2)
        phi = params - partner * conjugate_pair.to(params)
        spectrum = r.to(params)[..., None] * torch.stack([torch.cos(phi), torch.sin(phi)], dim=-1)
        return values.to_image(torch.fft.irfft2(torch.view_as_complex(spectrum), s=(h, w), norm="ortho"))

    def encode(picture: Tensor) -> Tensor:
        parts = torch.view_as_real(torch.fft.rfft2(values.to_canvas(picture), norm="ortho"))
        real, imaginary = parts.unbind(-1)
        phi = torch.atan2(imaginary, real)
        # One entry of each conjugate pair holds the angle, the other 0: decoding takes their difference.
        second_of_pair = torch.arange(h, device=picture.device)[:, None] * 2 > h
        return torch.where(conjugate_pair.to(picture.device) & second_of_pair, 0.0, phi)

    return Image(init, decode, encode=encode)


def magnitude_of(picture: Tensor, *, correlation: Correlation = "auto") -> Tensor:
    """Return the magnitude spectrum of an image, for use as ``phase(magnitude=..., contrast=None)``.

    Args:
        picture: ``(c, h, w)`` in ``[0, 1]``.
        correlation: the colour correlation that is passed to :func:`phase`.

    Returns:
        ``(c, h, w // 2 + 1)``, of the dtype and on the device of ``picture``.

    Raises:
        ValueError: if the correlation matrix has the wrong shape.

    >>> from featvis_func.image import from_image
    >>> picture = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(0))
    >>> image = from_image(phase((6, 7), magnitude=magnitude_of(picture), contrast=None), picture)
    >>> torch.allclose(image.decode(image.init(torch.tensor([0, 1]))), picture, atol=1e-3)
    True
    """
    values = value_range(picture.shape[-3], correlation, picture.device)
    return torch.fft.rfft2(values.to_canvas(picture), norm="ortho").abs()


def _conjugate_masks(h: int, w: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Return masks of the ``rfft2`` entries that are self-conjugate, and of those conjugate to another in their column.

    Entries of all other columns are conjugate to entries that ``rfft2`` does not store.

    Returns:
        Two bool tensors ``(h, w // 2 + 1)``.
    """
    row = torch.arange(h, device=device)[:, None]
    column = torch.arange(w // 2 + 1, device=device)[None, :]
    same_column = (2 * column) % w == 0
    same_row = (2 * row) % h == 0
    return same_row & same_column, ~same_row & same_column


def _root_mean_square(r: Tensor, same_column: Tensor, pixels: int) -> float:
    """Root mean square of an image ``(c, h, w)`` with the magnitudes ``r``, by Parseval's theorem.

    Entries outside of ``same_column`` count twice, because ``rfft2`` does not store their conjugates.
    """
    power = (r.double() ** 2 * (2.0 - same_column.double())).sum() / (len(r) * pixels)
    return math.sqrt(power.item())


def _check_magnitude(magnitude: Tensor, shape: tuple[int, int, int], device: torch.device | str | None) -> Tensor:
    """Return a float32 copy of a magnitude spectrum for images of the given shape, or raise ValueError."""
    c, h, w = shape
    r = torch.as_tensor(magnitude, dtype=torch.float32, device=device).detach().clone()
    expected = ((c, h, w // 2 + 1), (h, w // 2 + 1))
    if r.shape not in expected:
        raise ValueError(
            f"magnitude of {c} x {h} x {w} images must have shape {expected[0]} or {expected[1]}, got {tuple(r.shape)};"
            f" measure it at size=({h}, {w})"
        )
    if not bool((r.isfinite() & (r >= 0)).all()) or not bool((r > 0).any()):
        raise ValueError(
            "magnitude must be finite, at least 0 and not zero everywhere,"
            f" got values from {r.min().item():g} to {r.max().item():g}"
        )
    return r
