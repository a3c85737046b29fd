"""Images as pixels, of one resolution or of several."""

import torch
from torch import Tensor

from featvis_func.color import Correlation
from featvis_func.image.base import Canvas, bounded, image_shape
from featvis_func.random import normal, split
from featvis_func.types import Image, Key

# What one unit of a level's pixel adds to the picture, so that the default optimiser, tuned for `fourier`, suits it: on
# TextureNet 1 burns out a sixth of all values in 32 steps, 0.3 comes less far.
_LEVEL = 0.5


def pixel_canvas(
    size: int | tuple[int, int], *, channels: int = 3, sd: float = 0.01, device: torch.device | str | None = None
) -> Canvas:
    """What :func:`pixel` shows, before colour and range: ``x``.

    Args: as for :func:`pixel`.

    Returns:
        A :class:`Canvas` with parameters float32 ``(channels, h, w)``.

    Raises:
        ValueError: a size or channel count below 1.

    >>> pixel_canvas(4).decode(torch.ones(3, 4, 4)).mean().item()
    1.0
    """
    shape = image_shape(size, channels)
    return Canvas(shape, lambda key: sd * normal(key, shape), lambda params: params, lambda pixels: pixels)


def pixel(
    size: int | tuple[int, int],
    *,
    channels: int = 3,
    sd: float = 0.01,
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """The pixels themselves: ``sigmoid(matrix @ x)``. Climbs to noise more readily than the others.

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
    return bounded(pixel_canvas(size, channels=channels, sd=sd), correlation=correlation, device=device)


def pyramid_canvas(
    size: int | tuple[int, int],
    *,
    channels: int = 3,
    levels: int = 4,
    first: int = 0,
    sd: float = 0.01,
    device: torch.device | str | None = None,
) -> Canvas:
    """What :func:`laplacian_pyramid` shows, before colour and range; or its coarse levels alone.

    ``x = sum_n resize(s_n) / 2`` for ``n`` from ``first`` to ``first + levels - 1``.

    Args:
        size, channels, levels, sd, device: as for :func:`laplacian_pyramid`.
        first: number of the finest level; 0 has the pixels of the picture.

    Returns:
        A :class:`Canvas` with parameters: a tuple of float32 ``(channels, max(1, h // 2**n), max(1, w // 2**n))``.

    Raises:
        ValueError: a size, channel count or number of levels below 1, ``first`` below 0, or two levels of one pixel.

    >>> [tuple(level.shape) for level in pyramid_canvas((8, 6), levels=2, first=1).init(torch.tensor([0, 1]))]
    [(3, 4, 3), (3, 2, 1)]
    """
    c, h, w = image_shape(size, channels)
    most = max(h, w).bit_length() - first
    if first < 0 or not 1 <= levels <= most:
        raise ValueError(
            f"a pyramid of {h} x {w} pixels has levels 0 to {max(h, w).bit_length() - 1}, each half as large as the one"
            f" before; got levels={levels} from first={first} on"
        )
    sides = [(max(1, h >> n), max(1, w >> n)) for n in range(first, first + levels)]
    resize = [(_bilinear(h, rows, device), _bilinear(w, columns, device)) for rows, columns in sides]

    def up(level: Tensor, n: int) -> Tensor:
        level = _LEVEL * level
        if sides[n] == (h, w):
            return level
        down, across = resize[n]
        return torch.einsum("yi,cij,xj->cyx", down.to(level), level, across.to(level))

    def down(pixels: Tensor, n: int) -> Tensor:
        pixels = pixels / _LEVEL
        if sides[n] == (h, w):
            return pixels
        # The weights that brought a pixel up say what it is the mean of.
        rows, columns = (weight.to(pixels) / weight.to(pixels).sum(0) for weight in resize[n])
        return torch.einsum("yi,cyx,xj->cij", rows, pixels, columns)

    def init(key: Key) -> tuple[Tensor, ...]:
        return tuple(sd * normal(k, (c, *side)) for k, side in zip(split(key, levels), sides, strict=True))

    def decode(params: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([up(level, n) for n, level in enumerate(params)]).sum(0)

    def encode(pixels: Tensor) -> tuple[Tensor, ...]:
        # Burt and Adelson's pyramid, from its top: each level has what the coarser ones could not hold.
        found: list[Tensor] = []
        for n in reversed(range(levels)):
            found.append(down(pixels, n))
            pixels = pixels - up(found[-1], n)
        return tuple(reversed(found))

    return Canvas((c, h, w), init, decode, encode)


def laplacian_pyramid(
    size: int | tuple[int, int],
    *,
    channels: int = 3,
    levels: int | None = None,
    sd: float = 0.01,
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """The sum of images of falling resolution: coarse and fine parts of the picture move alike.

    ``x = sum_n resize(s_n) / 2``, level ``n`` with sides of ``max(1, side // 2**n)`` pixels and bilinear resizing, then
    ``sigmoid(matrix @ x)`` per pixel.

    Args:
        size: pixels, ``h = w`` or ``(h, w)``.
        channels: image channels, at least 1.
        levels: how many; the first has the pixels of the image. Default: 4, or fewer where the image is too small.
        sd: standard deviation of the initial levels.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: where the constants live; decoding elsewhere is right but copies them.

    Returns:
        An :class:`Image` whose parameters are a tuple of float32 ``(channels, h_n, w_n)``, the finest first.

    Raises:
        ValueError: a size, channel count or number of levels below 1, two levels of one pixel, or a correlation of
            another shape.

    Source: ``laplacian_pyramid_image`` in lucid/optvis/param/spatial.py. Resizing is a product with two constant
    matrices, whose backward pass adds in a fixed order on CUDA, too; its half-pixel centres are those of
    ``torch.nn.functional.interpolate``, where TensorFlow 1 had corners.

    >>> image = laplacian_pyramid(8, channels=1, levels=2)
    >>> image.decode((torch.zeros(1, 8, 8), torch.zeros(1, 4, 4))).shape
    torch.Size([1, 8, 8])
    """
    _, h, w = image_shape(size, channels)
    count = min(_LEVELS, max(h, w).bit_length()) if levels is None else levels
    canvas = pyramid_canvas(size, channels=channels, levels=count, sd=sd, device=device)
    return bounded(canvas, correlation=correlation, device=device)


# Lucid's default.
_LEVELS = 4


def _bilinear(target: int, source: int, device: torch.device | str | None) -> Tensor:
    """The matrix that resizes a side: float32 ``(target, source)``, each row adding up to 1."""
    centre = (torch.arange(target, device=device) + 0.5) * (source / target) - 0.5
    distance = centre.clamp(0, source - 1)[:, None] - torch.arange(source, device=device)
    return (1.0 - distance.abs()).clamp_min(0.0)
