"""Objectives on the image itself: what to take away from an objective so that the image stays plain.

All are means over pixels, so that a weight means the same at any size. They are penalties: subtract them.

>>> from featvis_func.objective.units import channel
>>> channel("conv", 3) - 0.2 * total_variation()
channel('conv', 3) - 0.2 * total_variation()
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from featvis_func.objective.base import IMAGE, Objective
from featvis_func.objective.expression import Call, call
from featvis_func.types import Activations, Target

# Under a root, where the gradient at zero would not be finite.
_EPS = 1e-6
# Of the middle of the range to the smoothness, in Lucid's penalty on the border.
_TO_THE_MIDDLE = 0.8


def total_variation() -> Objective:
    """How much neighbouring pixels differ: ``mean |x_{i+1,j} - x_{ij}| + mean |x_{i,j+1} - x_{ij}|``.

    Source: Rudin, Osher and Fatemi (1992), anisotropic; Lucid sums instead.

    >>> total_variation()({IMAGE: torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])}, torch.tensor(0))
    tensor(1.)
    """

    def pixels(x: Tensor) -> Tensor:
        down = F.pad((x[:, 1:] - x[:, :-1]).abs(), (0, 0, 0, 1)) * (x.shape[1] / max(1, x.shape[1] - 1))
        right = F.pad((x[:, :, 1:] - x[:, :, :-1]).abs(), (0, 1)) * (x.shape[2] / max(1, x.shape[2] - 1))
        return down + right

    return _penalty(call("total_variation"), pixels)


def l1(value: float = 0.5) -> Objective:
    """How far pixels are from a value: ``mean |x - value|``.

    >>> l1()({IMAGE: torch.tensor([[[0.0, 0.5], [1.0, 0.5]]])}, torch.tensor(0))
    tensor(0.2500)
    """
    return _penalty(call("l1", _finite(value)), lambda x: (x - value).abs())


def l2(value: float = 0.5) -> Objective:
    """How far pixels are from a value, the far ones above all: ``sqrt(mean (x - value)^2)``.

    Gradient: finite where all pixels have the value, too.

    >>> l2()({IMAGE: torch.tensor([[[0.0, 0.5], [1.0, 0.5]]])}, torch.tensor(0)).round(decimals=3)
    tensor(0.3540)
    """
    squares = _penalty(call("l2", _finite(value)), lambda x: (x - value).square())
    return replace(squares, score=lambda a, t: (squares.score(a, t) + _EPS**2).sqrt())


def blur() -> Objective:
    """How much pixels differ from their surroundings: ``mean (x - b(x))^2 / 2``, with ``b`` a 3 x 3 binomial filter.

    Gradient: of the pixels alone; the surroundings count as given, so that each pixel is drawn towards them.

    Source: Lucid, ``optvis/objectives.py`` (``blur_input_each_step``).

    >>> blur()({IMAGE: torch.zeros(1, 4, 4)}, torch.tensor(0))
    tensor(0.)
    """
    return _penalty(call("blur"), lambda x: 0.5 * (x - _blurred(x).detach()).square())


def boundary_complexity(width: int = 20, value: float = 0.5) -> Objective:
    """How much happens at the border: there, the mean of ``(x - b(x))^2 + 0.8 (x - value)^2``; ``b`` is :func:`blur`'s.

    Args:
        width: of the border, in pixels, at least 1; a smaller image is all border.
        value: what the border shall be.

    Raises:
        ValueError: a width below 1.

    Source: Lucid, ``optvis/objectives.py`` (``penalize_boundary_complexity``), with a filter of 5 pixels.

    >>> boundary_complexity(1)({IMAGE: torch.full((1, 4, 4), 0.5)}, torch.tensor(0))
    tensor(0.)
    """
    if width < 1:
        raise ValueError(f"the border's width must be at least 1 pixel, got {width}")

    def pixels(x: Tensor) -> Tensor:
        h, w = x.shape[1:]
        row = torch.arange(h, device=x.device)[:, None]
        column = torch.arange(w, device=x.device)
        border = (row < width) | (row >= h - width) | (column < width) | (column >= w - width)
        count = h * w - max(0, h - 2 * width) * max(0, w - 2 * width)
        return ((x - _blurred(x)).square() + _TO_THE_MIDDLE * (x - value).square()) * border * (h * w / count)

    return _penalty(call("boundary_complexity", width, _finite(value)), pixels)


def opacity() -> Objective:
    """How much of an image with an alpha channel is there: the mean of its last channel.

    Subtracted, it leaves in the picture what the objective needs, and the rest transparent.

    >>> opacity()({IMAGE: torch.tensor([[[0.5]], [[0.5]], [[0.5]], [[0.25]]])}, torch.tensor(0))
    tensor(0.2500)
    """
    return _penalty(call("opacity"), lambda x: x[-1:])


def _penalty(expression: Call, pixels: Callable[[Tensor], Tensor]) -> Objective:
    """The mean of a map ``(c, h, w) -> (c, h, w)`` of the image."""

    def activation_map(activations: Activations, target: Target) -> Tensor:
        return pixels(activations[IMAGE]).mean(0)

    return Objective(
        lambda a, t: activation_map(a, t).mean(), activation_map, (), (), str(expression), expression=expression
    )


def _blurred(x: Tensor) -> Tensor:
    """A 3 x 3 binomial filter; beyond the border the image goes on as it ends."""
    padded = F.pad(x[None], (1, 1, 1, 1), mode="replicate")[0]
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"the value must be finite, got {value}")
    return value
