"""Random views: what makes an image that survives small changes, rather than a pattern of pixels.

Geometric steps (:func:`jitter`, :func:`scale`, :func:`rotate`, :func:`pad`) are matrices. :func:`warp` multiplies any
number of them into one and samples the image once, straight at the model's input size. :func:`chain` composes
views with what is not geometry.

>>> view = chain(warp(jitter(8), rotate(5), size=(224, 224)), normalize((0.5,) * 3, (0.25,) * 3))
>>> view.apply(torch.rand(3, 100, 120), view.draw(torch.tensor([0, 1]))).shape
torch.Size([3, 224, 224])
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from featvis_func.random import split, uniform
from featvis_func.types import Draw, Key, Transform

# Beyond this reduction bilinear sampling would skip pixels, and the image is filtered down first.
_MAX_REDUCTION = 1.5


class Affine(NamedTuple):
    """A random 2-D affine step, as the map from where a pixel is shown to where it is looked up."""

    numbers: int
    """How many uniform numbers it takes."""
    matrix: Callable[[Tensor], Tensor]
    """float32 ``(numbers,)`` in ``[0, 1)`` -> ``(3, 3)``, homogeneous ``(x, y, 1)`` in pixels of the image from its
    centre, y down."""
    grow: float = 0.0
    """Pixels by which it widens (pad) or narrows (crop) the frame that is shown."""


def jitter(pixels: float) -> Affine:
    """Shifts by up to ``pixels`` each way, uniformly and independently in x and y.

    Args:
        pixels: the largest shift, at least 0, in pixels of the image.

    Raises:
        ValueError: ``pixels`` is negative.

    >>> jitter(8).matrix(torch.tensor([0.75, 0.5]))
    tensor([[1., 0., 4.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    if not 0 <= pixels < math.inf:
        raise ValueError(f"jitter must be finite and at least 0 pixels, got {pixels}")

    def matrix(u: Tensor) -> Tensor:
        shift = (2.0 * u - 1.0) * pixels
        one, zero = torch.ones_like(u[0]), torch.zeros_like(u[0])
        return _matrix((one, zero, shift[0]), (zero, one, shift[1]))

    return Affine(2, matrix)


def scale(low: float = 0.95, high: float = 1.05, *, choices: Sequence[float] | None = None) -> Affine:
    """Enlarges about the centre by a random factor.

    Args:
        low, high: bounds of the uniform factor, above 0; 2 shows the middle half of the image at twice its size.
        choices: factors to pick from evenly, instead of the bounds.

    Raises:
        ValueError: a factor is not above 0, or the bounds are reversed.

    >>> scale(2, 2).matrix(torch.zeros(1)).diagonal().tolist()
    [0.5, 0.5, 1.0]
    """
    pick = _one_number("scale", low, high, choices)
    if not min(choices or (low, high)) > 0:
        raise ValueError(f"scale factors must be above 0, got {tuple(choices or (low, high))}")

    def matrix(u: Tensor) -> Tensor:
        inverse = 1.0 / pick(u[0])
        zero = torch.zeros_like(inverse)
        return _matrix((inverse, zero, zero), (zero, inverse, zero))

    return Affine(1, matrix)


def rotate(degrees: float = 5.0, *, choices: Sequence[float] | None = None) -> Affine:
    """Turns about the centre by a random angle, counter-clockwise where positive.

    Args:
        degrees: the largest angle, at least 0, drawn uniformly both ways.
        choices: angles in degrees to pick from evenly, instead.

    Raises:
        ValueError: ``degrees`` is negative.

    >>> rotate(90).matrix(torch.ones(1)).round().int().tolist()
    [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    """
    if not degrees >= 0:
        raise ValueError(f"rotate: degrees must be at least 0, got {degrees}")
    pick = _one_number("rotate", -degrees, degrees, choices)

    def matrix(u: Tensor) -> Tensor:
        angle = pick(u[0]) * (math.pi / 180.0)
        cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
        return _matrix((cos, -sin, zero), (sin, cos, zero))

    return Affine(1, matrix)


def pad(pixels: float) -> Affine:
    """Widens the frame by ``pixels`` on each side (negative: crops), shown in the padding value of :func:`warp`.

    >>> pad(12).grow
    24.0
    """
    if not math.isfinite(pixels):
        raise ValueError(f"the padding must be finite, got {pixels} pixels")
    return Affine(0, lambda u: torch.eye(3, device=u.device), 2.0 * pixels)


def warp(*steps: Affine, size: tuple[int, int], padding: float = 0.5, deterministic: bool = False) -> Transform:
    """Composes geometric steps into ONE matrix and ONE bilinear sampling, at the model's input size.

    The first step acts on the image first. The frame (the image, widened and narrowed by :func:`pad`) fills the
    output. Images more than 1.5 times larger than the output are filtered down first, so that no pixel is skipped.

    Args:
        steps: any number of geometric steps; none merely resizes.
        size: ``(h', w')`` of the output in pixels.
        padding: the value outside of the image.
        deterministic: sample by four indexings instead of ``grid_sample``, whose backward pass adds in no fixed order
            on CUDA; to be run under ``torch.use_deterministic_algorithms(True)``. Equal up to rounding; slower.

    Returns:
        A :class:`Transform` whose draw is the matrix ``(3, 3)``.

    Raises:
        ValueError: an output side below 1, or steps that crop the whole image away.

    Gradient: flows to the image, not to the matrix.

    >>> view = warp(size=(2, 2), padding=0.0)
    >>> view.apply(torch.ones(1, 2, 2), view.draw(torch.tensor([0, 1])))
    tensor([[[1., 1.],
             [1., 1.]]])
    """
    out_h, out_w = size
    if out_h < 1 or out_w < 1:
        raise ValueError(f"the view's size must be at least 1 x 1 pixels, got {out_h} x {out_w}")
    grow = sum(step.grow for step in steps)

    def draw(key: Key) -> Tensor:
        numbers = uniform(key, (sum(step.numbers for step in steps),)).split([step.numbers for step in steps])
        matrix = torch.eye(3, device=key.device)
        for step, own in zip(steps, numbers, strict=True):
            # Sums of products written out: a matrix product may round otherwise in another batch.
            matrix = (matrix[:, :, None] * step.matrix(own)[None, :, :]).sum(1)
        return matrix

    def apply(image: Tensor, matrix: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        frame_h, frame_w = h + grow, w + grow
        if frame_h <= 0 or frame_w <= 0:
            raise ValueError(f"the view's steps crop {-grow:g} pixels from an image of {h} x {w}")
        image = _reduce(_reduce(image, -2, frame_h / out_h), -1, frame_w / out_w)
        matrix = matrix.detach().to(image.dtype)
        x = _centred(out_w, image) * (frame_w / out_w)
        y = _centred(out_h, image)[:, None] * (frame_h / out_h)
        # What depends on the column alone and on the row alone first: one pass over the pixels. In half sides of the
        # image, from its centre.
        column = (matrix[0, 0] * x + matrix[0, 2]) * (2.0 / w) + matrix[0, 1] * y * (2.0 / w)
        row = (matrix[1, 0] * x + matrix[1, 2]) * (2.0 / h) + matrix[1, 1] * y * (2.0 / h)
        if deterministic:
            return _sample(image - padding, column, row) + padding
        grid = torch.stack([column, row], dim=-1)
        view = F.grid_sample(
            (image - padding)[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False
        )
        return view[0] + padding

    return Transform(draw, apply)


def normalize(mean: Sequence[float], std: Sequence[float], *, device: torch.device | str | None = None) -> Transform:
    """``(x - mean) / std`` per channel: from ``[0, 1]`` to what the model was trained on.

    Args:
        mean, std: one number per channel; every ``std`` above 0.
        device: where the constants live; applied elsewhere it is right but copies them.

    Raises:
        ValueError: different lengths, or a ``std`` that is not above 0.

    >>> t = normalize([0.5], [0.25])
    >>> t.apply(torch.ones(1, 1, 1), t.draw(torch.tensor([0, 1]))).item()
    2.0
    """
    if len(mean) != len(std) or not all(0 < s < math.inf and math.isfinite(m) for m, s in zip(mean, std, strict=True)):
        raise ValueError(f"normalisation needs one mean and one std above 0 per channel, got {mean} and {std}")
    shift = torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None]
    factor = 1.0 / torch.tensor(std, dtype=torch.float32, device=device)[:, None, None]

    def apply(image: Tensor, draw: Draw) -> Tensor:
        if image.shape[0] != len(mean):
            raise ValueError(f"normalisation for {len(mean)} channels met an image of {image.shape[0]}")
        return (image - shift.to(image)) * factor.to(image)

    return Transform(lambda key: (), apply)


def chain(*transforms: Transform) -> Transform:
    """Applies transforms in order, each with its own randomness.

    >>> t = chain(normalize([0.5], [1.0]), normalize([0.5], [1.0]))
    >>> t.apply(torch.ones(1, 1, 1), t.draw(torch.tensor([0, 1]))).item()
    0.0
    """

    def draw(key: Key) -> Draw:
        return tuple(t.draw(k) for t, k in zip(transforms, split(key, len(transforms)), strict=True))

    def apply(image: Tensor, draws: Draw) -> Tensor:
        for t, d in zip(transforms, draws, strict=True):
            image = t.apply(image, d)
        return image

    return Transform(draw, apply)


def _matrix(*rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Two rows of scalars -> ``(3, 3)``."""
    zero = torch.zeros_like(rows[0][0])
    return torch.stack([torch.stack(row) for row in (*rows, (zero, zero, torch.ones_like(zero)))])


def _one_number(name: str, low: float, high: float, choices: Sequence[float] | None) -> Callable[[Tensor], Tensor]:
    """A map from a uniform number ``()`` to one between the bounds, or to one of the choices."""
    if choices is None:
        if not -math.inf < low <= high < math.inf:
            raise ValueError(f"{name}: expected finite bounds, the lower one first, got {low} and {high}")
        return lambda u: u * (high - low) + low
    values = tuple(float(c) for c in choices)
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{name}: expected at least one choice, all finite, got {values}")

    def pick(u: Tensor) -> Tensor:
        # A sum of indicators: no table on a device, no indexing by a tensor.
        index = torch.floor(u * len(values))
        return torch.stack([v * (index == i) for i, v in enumerate(values)]).sum(0)

    return pick


def _centred(count: int, like: Tensor) -> Tensor:
    """Pixel centres along a side, from the middle: ``(count,)``."""
    return torch.arange(count, device=like.device, dtype=like.dtype) + (0.5 - count / 2)


def _reduce(image: Tensor, dim: int, reduction: float) -> Tensor:
    """Filters one side down by a triangle (antialiased bilinear), if it is reduced by more than 1.5."""
    if reduction <= _MAX_REDUCTION:
        return image
    size = image.shape[dim]
    target = max(1, round(size / reduction))
    step = size / target
    source = torch.arange(size, device=image.device, dtype=image.dtype) + 0.5
    centre = (torch.arange(target, device=image.device, dtype=image.dtype) + 0.5) * step
    weight = (1.0 - (source - centre[:, None]).abs() / step).clamp_min(0.0)
    weight = weight / weight.sum(1, keepdim=True)
    return torch.einsum("...s,ts->...t", image.movedim(dim, -1), weight).movedim(-1, dim)


def _sample(image: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """``grid_sample``, bilinear with zeros outside, by indexing.

    Of indexing torch has a backward pass that adds in a fixed order; it takes it under deterministic algorithms.

    Args:
        image: ``(c, h, w)``.
        column, row: ``(h', w')``, where to look, in half sides from the centre.

    Returns:
        ``(c, h', w')``.
    """
    h, w = image.shape[-2:]
    x, y = (column + 1.0) * (w / 2) - 0.5, (row + 1.0) * (h / 2) - 0.5
    left, top = torch.floor(x), torch.floor(y)
    pixels = image.flatten(1)
    total = torch.zeros_like(pixels[:, :1, None])
    for i, wy in ((top, 1.0 - (y - top)), (top + 1.0, y - top)):
        for j, wx in ((left, 1.0 - (x - left)), (left + 1.0, x - left)):
            inside = (i >= 0) & (i < h) & (j >= 0) & (j < w)
            index = i.clamp(0, h - 1).long() * w + j.clamp(0, w - 1).long()
            total = total + pixels[:, index] * torch.where(inside, wx * wy, 0.0)
    return total
