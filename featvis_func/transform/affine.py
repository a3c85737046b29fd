"""Random affine steps as matrices, which :func:`~featvis_func.transform.warp` multiplies into one."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.validation import check_float


class Affine(NamedTuple):
    """Random 2-D affine step: a map from output coordinates to the input coordinates that are sampled."""

    numbers: int
    """Number of uniform random numbers that ``matrix`` takes."""
    matrix: Callable[[Tensor], Tensor]
    """float32 ``(numbers,)`` in ``[0, 1)`` -> ``(3, 3)``, for homogeneous ``(x, y, 1)`` in image pixels relative to
    the centre, y down. ``(3, 5)`` has two more columns, for shifts in fractions of the image width and height."""
    grow: float = 0.0
    """Change of the width and height of the visible frame in pixels: positive for padding, negative for cropping."""
    frame: Callable[[float, float], tuple[float, float]] | None = None
    """``(h, w)`` of the frame before the step, in image pixels -> ``(h, w)`` after it. Replaces ``grow`` if given."""


def jitter(pixels: float) -> Affine:
    """Shift by a random offset, uniform in ``[-pixels, pixels)`` and independent in x and y.

    Args:
        pixels: largest shift in image pixels, at least 0.

    Raises:
        ValueError: if ``pixels`` is negative or not finite.

    >>> jitter(8).matrix(torch.tensor([0.75, 0.5]))
    tensor([[1., 0., 4.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    pixels = check_float("jitter: pixels", pixels, 0)

    def matrix(u: Tensor) -> Tensor:
        shift = (2.0 * u - 1.0) * pixels
        one, zero = torch.ones_like(u[0]), torch.zeros_like(u[0])
        return matrix_of((one, zero, shift[0]), (zero, one, shift[1]))

    return Affine(2, matrix)


def scale(low: float = 0.95, high: float = 1.05, *, choices: Sequence[float] | None = None) -> Affine:
    """Scale about the centre by a random factor.

    Args:
        low, high: bounds of the uniformly distributed factor, above 0. A factor of 2 shows the central half of the
            image at twice its size.
        choices: factors to pick from with equal probability, instead of the bounds.

    Raises:
        ValueError: if a factor is not above 0, or ``low`` is larger than ``high``.

    >>> scale(2, 2).matrix(torch.zeros(1)).diagonal().tolist()
    [0.5, 0.5, 1.0]
    """
    pick = _uniform_or_choice("scale", low, high, choices)
    if not min(choices or (low, high)) > 0:
        raise ValueError(f"scale: factors must be above 0, got {tuple(choices or (low, high))}")

    def matrix(u: Tensor) -> Tensor:
        inverse = 1.0 / pick(u[0])
        zero = torch.zeros_like(inverse)
        return matrix_of((inverse, zero, zero), (zero, inverse, zero))

    return Affine(1, matrix)


def rotate(degrees: float = 5.0, *, choices: Sequence[float] | None = None) -> Affine:
    """Rotate about the centre by a random angle, counter-clockwise if positive.

    Args:
        degrees: the angle is uniform in ``[-degrees, degrees)``; at least 0.
        choices: angles in degrees to pick from with equal probability, instead.

    Raises:
        ValueError: if ``degrees`` is negative or not finite, or there are no choices.

    >>> rotate(90).matrix(torch.ones(1)).round().int().tolist()
    [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    """
    degrees = check_float("rotate: degrees", degrees, 0)
    pick = _uniform_or_choice("rotate", -degrees, degrees, choices)

    def matrix(u: Tensor) -> Tensor:
        angle = pick(u[0]) * (math.pi / 180.0)
        cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
        return matrix_of((cos, -sin, zero), (sin, cos, zero))

    return Affine(1, matrix)


def flip(horizontal: bool = True, vertical: bool = False, *, probability: float = 0.5) -> Affine:
    """Flip at random, independently in each enabled direction.

    Args:
        horizontal: whether left and right may be swapped.
        vertical: whether top and bottom may be swapped.
        probability: of a flip in each enabled direction, in ``[0, 1]``.

    Raises:
        ValueError: if the probability is outside of ``[0, 1]``.

    >>> flip().matrix(torch.tensor([0.4, 0.6])).diagonal()
    tensor([-1.,  1.,  1.])
    >>> flip(vertical=True).matrix(torch.tensor([0.6, 0.4])).diagonal()
    tensor([ 1., -1.,  1.])
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"flip: probability must be in [0, 1], got {probability}")

    def matrix(u: Tensor) -> Tensor:
        one, zero = torch.ones_like(u[0]), torch.zeros_like(u[0])
        signs = torch.where(u < probability, -1.0, 1.0).to(u.dtype)
        return matrix_of((signs[0] if horizontal else one, zero, zero), (zero, signs[1] if vertical else one, zero))

    return Affine(2, matrix)


def pad(pixels: float) -> Affine:
    """Pad the image by ``pixels`` on each side with the padding value of :func:`warp`; crop if negative.

    >>> pad(12).grow
    24.0
    """
    pixels = check_float("pad: pixels", pixels)
    return Affine(0, lambda u: torch.eye(3, dtype=u.dtype, device=u.device), 2.0 * pixels)


def matrix_of(*rows: tuple[Tensor, ...]) -> Tensor:
    """Stack two rows of 3 or 5 scalars and the last row of a homogeneous matrix: ``(3, 3)`` or ``(3, 5)``."""
    zero = torch.zeros_like(rows[0][0])
    last = (zero, zero, torch.ones_like(zero), *(zero,) * (len(rows[0]) - 3))
    return torch.stack([torch.stack(row) for row in (*rows, last)])


def _uniform_or_choice(
    name: str, low: float, high: float, choices: Sequence[float] | None
) -> Callable[[Tensor], Tensor]:
    """Return a map from a uniform number ``()`` in ``[0, 1)`` to the range from low to high, or to one choice."""
    if choices is None:
        if not -math.inf < low <= high < math.inf:
            raise ValueError(f"{name}: bounds must be finite with low <= high, got low={low} and high={high}")
        return lambda u: u * (high - low) + low
    values = tuple(float(c) for c in choices)
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{name}: choices must be finite and at least one, got {values}")

    def pick(u: Tensor) -> Tensor:
        # A sum over one-hot indicators needs neither a table on the device nor indexing by a tensor.
        index = torch.floor(u * len(values))
        return torch.stack([v * (index == i).to(u.dtype) for i, v in enumerate(values)]).sum(0)

    return pick
