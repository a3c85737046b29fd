"""Geometric steps as matrices, which :func:`~featvis_func.transform.warp` multiplies into one."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """A random 2-D affine step, as the map from where a pixel is shown to where it is looked up."""

    numbers: int
    """How many uniform numbers it takes."""
    matrix: Callable[[Tensor], Tensor]
    """float32 ``(numbers,)`` in ``[0, 1)`` -> ``(3, 3)``, homogeneous ``(x, y, 1)`` in pixels of the image from its
    centre, y down; or ``(3, 5)``, with two more columns for shifts in shares of the image's width and height."""
    grow: float = 0.0
    """Pixels by which it widens (pad) or narrows (crop) the frame that is shown."""
    frame: Callable[[float, float], tuple[float, float]] | None = None
    """``(h, w)`` of the frame before it, in pixels of the image -> after it, where it does more than grow."""


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
        return matrix_of((one, zero, shift[0]), (zero, one, shift[1]))

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
        return matrix_of((inverse, zero, zero), (zero, inverse, zero))

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
        return matrix_of((cos, -sin, zero), (sin, cos, zero))

    return Affine(1, matrix)


def flip(horizontal: bool = True, vertical: bool = False, *, probability: float = 0.5) -> Affine:
    """Mirrors about the centre, with the given probability for each direction of its own.

    Args:
        horizontal: whether left and right may change places.
        vertical: whether top and bottom may.
        probability: in ``[0, 1]``.

    Raises:
        ValueError: a probability outside of ``[0, 1]``.

    >>> flip().matrix(torch.tensor([0.4, 0.6])).diagonal()
    tensor([-1.,  1.,  1.])
    >>> flip(vertical=True).matrix(torch.tensor([0.6, 0.4])).diagonal()
    tensor([ 1., -1.,  1.])
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"flip: the probability must be in [0, 1], got {probability}")

    def matrix(u: Tensor) -> Tensor:
        one, zero = torch.ones_like(u[0]), torch.zeros_like(u[0])
        signs = torch.where(u < probability, -1.0, 1.0).to(u.dtype)
        return matrix_of((signs[0] if horizontal else one, zero, zero), (zero, signs[1] if vertical else one, zero))

    return Affine(2, matrix)


def pad(pixels: float) -> Affine:
    """Widens the frame by ``pixels`` on each side (negative: crops), shown in the padding value of :func:`warp`.

    >>> pad(12).grow
    24.0
    """
    if not math.isfinite(pixels):
        raise ValueError(f"the padding must be finite, got {pixels} pixels")
    return Affine(0, lambda u: torch.eye(3, device=u.device), 2.0 * pixels)


def matrix_of(*rows: tuple[Tensor, ...]) -> Tensor:
    """Two rows of 3 or 5 scalars, and a last one that keeps the 1 -> ``(3, 3)`` or ``(3, 5)``."""
    zero = torch.zeros_like(rows[0][0])
    last = (zero, zero, torch.ones_like(zero), *(zero,) * (len(rows[0]) - 3))
    return torch.stack([torch.stack(row) for row in (*rows, last)])


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
