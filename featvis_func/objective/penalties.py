"""Penalties on the image itself: subtract them from an objective to regularise the image.

All are normalised by the number of pixels, so that a weight means the same at every image size. They take images
``(c, h, w)``, videos ``(c, t, h, w)`` and signals ``(c, t)``; time counts as one more side, unless stated otherwise.

>>> from featvis_func.objective.units import channel
>>> channel("conv", 3) - 0.2 * total_variation()
channel('conv', 3) - 0.2 * total_variation()
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import add, or_

import torch
import torch.nn.functional as F
from torch import Tensor

from featvis_func.objective.base import IMAGE, Objective
from featvis_func.objective.expression import Call, call
from featvis_func.types import Activations, Target
from featvis_func.validation import check_float, check_int

# Added under a square root, whose gradient at zero is not finite.
_EPS = 1e-6
# Weight of the distance from the value relative to the smoothness, in Lucid's penalty on the border.
_VALUE_WEIGHT = 0.8


def total_variation() -> Objective:
    """Compute the total variation: ``mean |x_{i+1,j} - x_{ij}| + mean |x_{i,j+1} - x_{ij}|``, of a video also between
    frames, of a signal between samples.

    Source: Rudin, Osher and Fatemi (1992), anisotropic; Lucid takes the sum instead.

    >>> total_variation()({IMAGE: torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])}, torch.tensor(0))
    tensor(1.)
    """

    def pixel_map(x: Tensor) -> Tensor:
        return reduce(add, [_differences(x, axis) for axis in range(1, x.ndim)])

    return _penalty(call("total_variation"), pixel_map)


def l1(value: float = 0.5) -> Objective:
    """Compute the mean distance of the pixels from a value: ``mean |x - value|``.

    Raises:
        ValueError: if ``value`` is not finite.

    >>> l1()({IMAGE: torch.tensor([[[0.0, 0.5], [1.0, 0.5]]])}, torch.tensor(0))
    tensor(0.2500)
    """
    return _penalty(call("l1", _check_value(value)), lambda x: (x - value).abs())


def l2(value: float = 0.5) -> Objective:
    """Compute the root mean square distance of the pixels from a value: ``sqrt(mean (x - value)^2)``.

    Raises:
        ValueError: if ``value`` is not finite.

    Gradient: finite also where all pixels have the value.

    >>> l2()({IMAGE: torch.tensor([[[0.0, 0.5], [1.0, 0.5]]])}, torch.tensor(0)).round(decimals=3)
    tensor(0.3540)
    """
    squares = _penalty(call("l2", _check_value(value)), lambda x: (x - value).square())
    return replace(squares, score=lambda a, t: (squares.score(a, t) + _EPS**2).sqrt())


def blur() -> Objective:
    """Compute the distance from the blurred image: ``mean (x - b(x))^2 / 2``, with ``b`` a 3 x 3 binomial filter.

    For a video the filter is 3 x 3 x 3, for a signal it has 3 samples.

    Gradient: ``b(x)`` is treated as a constant, so that descent moves each pixel towards the mean of its neighbours.

    Source: Lucid, ``optvis/objectives.py`` (``blur_input_each_step``).

    >>> blur()({IMAGE: torch.zeros(1, 4, 4)}, torch.tensor(0))
    tensor(0.)
    """
    return _penalty(call("blur"), lambda x: 0.5 * (x - _blurred(x).detach()).square())


def boundary_complexity(width: int = 20, value: float = 0.5) -> Objective:
    """Compute the complexity of the image's border: the mean over its pixels of ``(x - b(x))^2 + 0.8 (x - value)^2``.

    ``b`` is the filter of :func:`blur`, here with its gradient.

    Args:
        width: width of the border in pixels, at least 1; an image of less than twice this size is all border. A video
            has the borders of its frames, a signal its two ends.
        value: the value that is not penalised.

    Raises:
        ValueError: if ``width`` is below 1 or ``value`` is not finite.

    Source: Lucid, ``optvis/objectives.py`` (``penalize_boundary_complexity``), with a filter of 5 pixels.

    >>> boundary_complexity(1)({IMAGE: torch.full((1, 4, 4), 0.5)}, torch.tensor(0))
    tensor(0.)
    """
    check_int("boundary_complexity: width", width, 1)

    def pixel_map(x: Tensor) -> Tensor:
        sides = x.shape[1:][-2:]  # of a video those of a frame
        border = reduce(or_, [_near_the_ends(x, axis, width) for axis in range(-len(sides), 0)])
        total = math.prod(sides)
        count = total - math.prod([max(0, side - 2 * width) for side in sides])
        return ((x - _blurred(x)).square() + _VALUE_WEIGHT * (x - value).square()) * border * (total / count)

    return _penalty(call("boundary_complexity", width, _check_value(value)), pixel_map)


def opacity() -> Objective:
    """Compute the mean opacity of an image with an alpha channel, which is its last channel.

    Subtracted, it makes transparent whatever does not contribute to the objective.

    >>> opacity()({IMAGE: torch.tensor([[[0.5]], [[0.5]], [[0.5]], [[0.25]]])}, torch.tensor(0))
    tensor(0.2500)
    """
    return _penalty(call("opacity"), lambda x: x[-1:])


def _penalty(expression: Call, pixel_map: Callable[[Tensor], Tensor]) -> Objective:
    """Make an objective from a map of the image to one of the same shape, whose mean is the score."""

    def activation_map(activations: Activations, target: Target) -> Tensor:
        return pixel_map(activations[IMAGE]).mean(0)

    return Objective(
        lambda a, t: activation_map(a, t).mean(), activation_map, (), (), str(expression), expression=expression
    )


def _differences(x: Tensor, axis: int) -> Tensor:
    """Absolute differences of neighbours along an axis, 0 at its end, scaled so that their mean is over the others."""
    size = x.shape[axis]
    difference = (x.narrow(axis, 1, size - 1) - x.narrow(axis, 0, size - 1)).abs()
    return F.pad(difference, (0, 0) * (x.ndim - 1 - axis) + (0, 1)) * (size / max(1, size - 1))


def _near_the_ends(x: Tensor, axis: int, width: int) -> Tensor:
    """Bool, to be broadcast with ``x``: the positions near both ends of an axis, which is counted from the last."""
    index = torch.arange(x.shape[axis], device=x.device).reshape(-1, *(1,) * (-1 - axis))
    return (index < width) | (index >= x.shape[axis] - width)


def _blurred(x: Tensor) -> Tensor:
    """Apply a binomial filter of 3 along each axis; the image is padded by repeating its border."""
    blurred = F.pad(x[None], (1, 1) * (x.ndim - 1), mode="replicate")[0]
    for axis in range(1, x.ndim):
        size = blurred.shape[axis] - 2
        before, centre, after = (blurred.narrow(axis, start, size) for start in range(3))
        blurred = (before + 2 * centre + after) / 4
    return blurred


def _check_value(value: float) -> float:
    check_float("value", value)
    return value
