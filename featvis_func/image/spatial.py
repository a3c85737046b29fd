"""Images as pixels at one resolution or at several."""

import torch
from torch import Tensor

from featvis_func.color import Correlation
from featvis_func.constants import device_constant
from featvis_func.image.base import Canvas, Size, bounded, image_shape
from featvis_func.random import normal, split
from featvis_func.types import Image, Key

# Lucid's default number of pyramid levels.
_DEFAULT_LEVELS = 4
# Each pyramid level is multiplied by this factor, so that the learning rate tuned for `fourier` suits it: on TextureNet
# 1 saturates a sixth of all values in 32 steps, and 0.3 reaches lower scores.
_LEVEL_SCALE = 0.5


def pixel_canvas(
    size: Size, *, channels: int = 3, sd: float = 0.01, device: torch.device | str | None = None
) -> Canvas:
    """Canvas of :func:`pixel`: the parameters are the pixels.

    Args:
        size, channels, sd: as for :func:`pixel`.
        device: unused, as there are no constants.

    Returns:
        A :class:`Canvas` with parameters float32 ``(channels, h, w)``, ``(channels, t, h, w)`` or ``(channels, t)``.

    Raises:
        ValueError: if the size or channel count is below 1.

    >>> pixel_canvas(4).decode(torch.ones(3, 4, 4)).mean().item()
    1.0
    """
    shape = image_shape(size, channels)
    return Canvas(shape, lambda key: sd * normal(key, shape), lambda params: params, lambda pixels: pixels)


def pixel(
    size: Size,
    *,
    channels: int = 3,
    sd: float = 0.01,
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """Pixel parameterisation: ``sigmoid(matrix @ x)``. More prone to high-frequency noise than the others.

    Args:
        size: image size in pixels, ``h = w`` or ``(h, w)``; ``(t, h, w)`` for a video, ``(t,)`` for a signal.
        channels: image channels, at least 1.
        sd: standard deviation of the initial parameters ``x``.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: device of the constants. Decoding on another device is correct, but copies them every time.

    Returns:
        An :class:`Image` with parameters float32 ``(channels, h, w)``, ``(channels, t, h, w)`` or ``(channels, t)``.

    Raises:
        ValueError: if the size or channel count is below 1, or the correlation matrix has the wrong shape.

    >>> image = pixel(4)
    >>> image.decode(image.init(torch.tensor([0, 1]))).shape
    torch.Size([3, 4, 4])
    """
    return bounded(pixel_canvas(size, channels=channels, sd=sd), correlation=correlation, device=device)


def pyramid_canvas(
    size: Size,
    *,
    channels: int = 3,
    levels: int = 4,
    first: int = 0,
    sd: float = 0.01,
    device: torch.device | str | None = None,
) -> Canvas:
    """Canvas of :func:`laplacian_pyramid`, optionally restricted to its coarse levels.

    ``x = sum_n resize(s_n) / 2`` for ``n`` from ``first`` to ``first + levels - 1``.

    Args:
        size, channels, levels, sd, device: as for :func:`laplacian_pyramid`.
        first: index of the finest level. Level 0 has the resolution of the image.

    Returns:
        A :class:`Canvas` whose parameters are a tuple of float32
        ``(channels, max(1, h // 2**n), max(1, w // 2**n))``, the finest first; time is halved as the other sides are.

    Raises:
        ValueError: if the size, channel count or number of levels is below 1, ``first`` is below 0, or more than one
            level would have a single pixel.

    >>> [tuple(level.shape) for level in pyramid_canvas((8, 6), levels=2, first=1).init(torch.tensor([0, 1]))]
    [(3, 4, 3), (3, 2, 1)]
    """
    c, *full = shape = image_shape(size, channels)
    available = max(full).bit_length()
    if first < 0 or not 1 <= levels <= available - first:
        raise ValueError(
            f"a pyramid of {' x '.join(map(str, full))} pixels has the levels 0 to {available - 1}, got levels={levels}"
            f" and first={first}"
        )
    sides = [[max(1, side >> n) for side in full] for n in range(first, first + levels)]
    resize = [
        [device_constant(_bilinear_matrix(*pair, device)) for pair in zip(full, reduced, strict=True)]
        for reduced in sides
    ]
    up, down = _resize_formulas(len(full))

    def upsample(level: Tensor, n: int) -> Tensor:
        level = _LEVEL_SCALE * level
        if sides[n] == full:
            return level
        weights = [weight(level) for weight in resize[n]]
        return torch.einsum(up, weights[0], level, *weights[1:])

    def downsample(pixels: Tensor, n: int) -> Tensor:
        pixels = pixels / _LEVEL_SCALE
        if sides[n] == full:
            return pixels
        # Average with the transposed upsampling weights, normalised to sum to 1.
        weights = [weight(pixels) / weight(pixels).sum(0) for weight in resize[n]]
        return torch.einsum(down, weights[0], pixels, *weights[1:])

    def init(key: Key) -> tuple[Tensor, ...]:
        return tuple(sd * normal(k, (c, *side)) for k, side in zip(split(key, levels), sides, strict=True))

    def decode(params: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([upsample(level, n) for n, level in enumerate(params)]).sum(0)

    def encode(pixels: Tensor) -> tuple[Tensor, ...]:
        # Burt and Adelson's pyramid, coarsest level first: each level encodes the residual of the coarser ones.
        encoded: list[Tensor] = []
        for n in reversed(range(levels)):
            encoded.append(downsample(pixels, n))
            pixels = pixels - upsample(encoded[-1], n)
        return tuple(reversed(encoded))

    return Canvas(shape, init, decode, encode)


def laplacian_pyramid(
    size: Size,
    *,
    channels: int = 3,
    levels: int | None = None,
    sd: float = 0.01,
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """Sum of images at decreasing resolutions, so that a gradient step changes coarse and fine structure alike.

    ``x = sum_n resize(s_n) / 2``, then ``sigmoid(matrix @ x)`` per pixel. Level ``n`` has sides of
    ``max(1, side // 2**n)`` pixels, and resizing is linear along each side. Time is a side as the others are.

    Args:
        size: image size in pixels, ``h = w`` or ``(h, w)``; ``(t, h, w)`` for a video, ``(t,)`` for a signal.
        channels: image channels, at least 1.
        levels: number of levels; the first has the resolution of the image. Default: 4, or fewer for small images.
        sd: standard deviation of the initial levels.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: device of the constants. Decoding on another device is correct, but copies them every time.

    Returns:
        An :class:`Image` whose parameters are a tuple of float32 ``(channels, h_n, w_n)`` (for videos and signals
        accordingly), the finest first.

    Raises:
        ValueError: if the size, channel count or number of levels is below 1, more than one level would have a single
            pixel, or the correlation matrix has the wrong shape.

    Source: ``laplacian_pyramid_image`` in lucid/optvis/param/spatial.py. Resizing multiplies by two constant matrices,
    so that its backward pass is deterministic on CUDA. It uses half-pixel centres as
    ``torch.nn.functional.interpolate(align_corners=False)`` does, whereas TensorFlow 1 aligned the corners.

    >>> image = laplacian_pyramid(8, channels=1, levels=2)
    >>> image.decode((torch.zeros(1, 8, 8), torch.zeros(1, 4, 4))).shape
    torch.Size([1, 8, 8])
    """
    _, *sides = image_shape(size, channels)
    count = min(_DEFAULT_LEVELS, max(sides).bit_length()) if levels is None else levels
    canvas = pyramid_canvas(size, channels=channels, levels=count, sd=sd, device=device)
    return bounded(canvas, correlation=correlation, device=device)


def _resize_formulas(axes: int) -> tuple[str, str]:
    """Return how ``einsum`` resizes all axes, with the first axis's matrix, the image and the other matrices.

    >>> _resize_formulas(2)
    ('ax,cxy,by->cab', 'ax,cab,by->cxy')
    """
    full, reduced = "abd"[:axes], "xyz"[:axes]
    first, *others = (f + r for f, r in zip(full, reduced, strict=True))
    up, down = (",".join([first, f"c{x}", *others]) + f"->c{y}" for x, y in ((reduced, full), (full, reduced)))
    return up, down


def _bilinear_matrix(target: int, source: int, device: torch.device | str | None) -> Tensor:
    """Return the matrix of a 1-D linear resize: float32 ``(target, source)``, each row summing to 1."""
    centre = (torch.arange(target, dtype=torch.float32, device=device) + 0.5) * (source / target) - 0.5
    distance = centre.clamp(0, source - 1)[:, None] - torch.arange(source, dtype=torch.float32, device=device)
    return (1.0 - distance.abs()).clamp_min(0.0)
