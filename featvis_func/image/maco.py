"""Images of a fixed magnitude spectrum, whose phase alone is free (MACO)."""

import math

import torch
from torch import Tensor

from featvis_func.color import Correlation
from featvis_func.image.base import image_shape, value_range
from featvis_func.image.spectral import power_law
from featvis_func.random import uniform
from featvis_func.types import Image, Key


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
    """Only the phase of the spectrum is free: the picture keeps the frequency content of natural images.

    ``x = irfft2(r * exp(i * phi), norm="ortho")``, then ``sigmoid(matrix @ x)`` per pixel. So no filter can have more
    high frequencies, or more contrast, than the magnitudes ``r`` grant.

    Args:
        size: pixels, ``h = w`` or ``(h, w)``; odd sides are exact.
        channels: image channels, at least 1.
        magnitude: ``r``, at least 0, float ``(channels, h, w // 2 + 1)``, or ``(h, w // 2 + 1)`` for all channels; of
            decorrelated colours about their mean, as :func:`~featvis_func.image_statistics` measures it.
            Default: ``1 / max(f, 1 / max(h, w)) ** decay``.
        decay: power of the default magnitude; natural images have 1.2 on average (Tolhurst, Tadmor and Chao, "Amplitude
            spectra of natural images", 1992). Less is grainier.
        contrast: the root mean square of ``x`` over pixels and channels, to which ``r`` is scaled; 2 gives the values
            of pixels a standard deviation near 0.23, as of ImageNet. ``None``: ``r`` is taken as it is.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: where the constants live; decoding elsewhere is right but copies them.

    Returns:
        An :class:`Image` with parameters float32 ``(channels, h, w // 2 + 1)``: phases in radians, at first uniform
        over the circle. To start from a picture and keep its own magnitudes, see :func:`magnitude_of`.

    Raises:
        ValueError: a size or channel count below 1, a magnitude of another shape, negative, not finite or all zero, a
            contrast that is not above 0, or a correlation of another shape.

    Source: Fel et al., "Unlocking Feature Visualization for Deeper Networks with MAgnitude Constrained Optimization",
    NeurIPS 2023, section 3; ``maco_preconditioner`` in serre-lab/Horama and ``maco_image_parametrization`` in
    deel-ai/xplique. As there: colours decorrelated, ``x`` of a fixed contrast, a sigmoid. Deviations: they draw phases
    from a normal distribution and standardise phases and ``x`` anew at each step; here phases start uniform (the mean
    of ``exp(i * phi)`` is then zero; where it is not, all waves meet in the corner as a bright spot), no parameter
    depends on another, and ``x`` needs no scaling since its power is that of ``r`` whatever the phases. They let waves
    that a real picture holds twice (first and last column of ``rfft2``) have two phases, whose mean has less than the
    magnitude; here the difference of both is the phase. The waves that are their own mirror image, the mean among them,
    are ``r * cos(phi)``. The default magnitude is a power law and its contrast 2: theirs are a file of ImageNet's mean
    and 1.

    >>> image = phase(8, channels=1, decay=1.0)
    >>> x = torch.logit(image.decode(image.init(torch.tensor([0, 1]))))
    >>> r = torch.fft.rfft2(x, norm="ortho").abs()
    >>> round((r[0, 1, 0] / r[0, 2, 0]).item(), 3)
    2.0
    """
    c, h, w = image_shape(size, channels)
    values = value_range(c, correlation, device)
    own, twin = _mirrored(h, w, device)
    r = power_law(h, w, decay, device=device) if magnitude is None else _checked(magnitude, (c, h, w), device)
    if contrast is not None:
        if not 0 < contrast < math.inf:
            raise ValueError(f"the contrast must be finite and above 0, or None, got {contrast}")
        r = r * (contrast / _root_mean_square(r.expand(c, h, w // 2 + 1), own | twin, w * h))

    def init(key: Key) -> Tensor:
        return uniform(key, (c, h, w // 2 + 1), low=-math.pi, high=math.pi)

    def decode(params: Tensor) -> Tensor:
        opposite = torch.roll(torch.flip(params, (-2,)), 1, -2)
        phi = params - opposite * twin.to(params)
        spectrum = r.to(params)[..., None] * torch.stack([torch.cos(phi), torch.sin(phi)], dim=-1)
        return values.enter(torch.fft.irfft2(torch.view_as_complex(spectrum), s=(h, w), norm="ortho"))

    def encode(picture: Tensor) -> Tensor:
        parts = torch.view_as_real(torch.fft.rfft2(values.leave(picture), norm="ortho"))
        real, imaginary = parts.unbind(-1)
        phi = torch.atan2(imaginary, real)
        # Of twins one has the angle; that of the other is its opposite.
        upper = torch.arange(h, device=picture.device)[:, None] * 2 > h
        return torch.where(twin.to(picture.device) & upper, 0.0, phi)

    return Image(init, decode, encode=encode)


def magnitude_of(picture: Tensor, *, correlation: Correlation = "auto") -> Tensor:
    """The magnitudes of one picture, for :func:`phase` with ``contrast=None`` to keep.

    Args:
        picture: ``(c, h, w)`` in ``[0, 1]``.
        correlation: of the colours, as it is given to :func:`phase`.

    Returns:
        ``(c, h, w // 2 + 1)``, of the picture's dtype and device.

    Raises:
        ValueError: a correlation of another shape.

    >>> from featvis_func.image import from_image
    >>> picture = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(0))
    >>> image = from_image(phase((6, 7), magnitude=magnitude_of(picture), contrast=None), picture)
    >>> torch.allclose(image.decode(image.init(torch.tensor([0, 1]))), picture, atol=1e-3)
    True
    """
    values = value_range(picture.shape[-3], correlation, picture.device)
    return torch.fft.rfft2(values.leave(picture), norm="ortho").abs()


def _mirrored(h: int, w: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Which entries of ``rfft2`` are their own mirror image, and which have theirs in the same column: bool
    ``(h, w // 2 + 1)`` each. Those of the other columns have it in the half that ``rfft2`` leaves out."""
    row = torch.arange(h, device=device)[:, None]
    column = torch.arange(w // 2 + 1, device=device)[None, :]
    same_column = (2 * column) % w == 0
    same_row = (2 * row) % h == 0
    return same_row & same_column, ~same_row & same_column


def _root_mean_square(r: Tensor, same_column: Tensor, pixels: int) -> float:
    """Of the picture ``(c, h, w)`` with these magnitudes, by Parseval's theorem."""
    power = (r.double() ** 2 * (2.0 - same_column.double())).sum() / (len(r) * pixels)
    return math.sqrt(power.item())


def _checked(magnitude: Tensor, shape: tuple[int, int, int], device: torch.device | str | None) -> Tensor:
    c, h, w = shape
    r = torch.as_tensor(magnitude, dtype=torch.float32, device=device).detach().clone()
    known = ((c, h, w // 2 + 1), (h, w // 2 + 1))
    if r.shape not in known:
        raise ValueError(
            f"the magnitude of {c} x {h} x {w} images must have shape {known[0]} or {known[1]}, got {tuple(r.shape)};"
            f" measure it at size=({h}, {w})"
        )
    if not bool((r.isfinite() & (r >= 0)).all()) or not bool((r > 0).any()):
        raise ValueError("magnitudes must be finite and at least 0, and some above 0")
    return r
