"""Convergence step and SVG path of a filter's score history."""

import math
from typing import NamedTuple

from torch import Tensor

_WIDTH, _HEIGHT = 320.0, 120.0
CONVERGED_FRACTION = 0.95
"""A filter has converged once its score has covered this fraction of the range from its first to its best score."""


class Curve(NamedTuple):
    """Line plot of a score history for SVG: 320 by 120 units, x is the step, y the score with the highest on top."""

    path: str
    """The ``d`` attribute of an SVG path."""
    best: tuple[float, float]
    """``(x, y)`` of the best score."""
    low: float
    high: float
    steps: int


def convergence_step(history: Tensor) -> int:
    """Return the first step whose score has covered 95% of the range from the first to the best score.

    Args:
        history: ``(steps,)`` scores; values that are not finite are ignored.

    Returns:
        The step, or ``-1`` if no value is finite.

    >>> import torch
    >>> convergence_step(torch.tensor([0.0, 5.0, 9.6, 10.0, 9.0]))
    2
    """
    finite = [(step, score) for step, score in enumerate(history.tolist()) if math.isfinite(score)]
    if not finite:
        return -1
    first, best = finite[0][1], max(score for _, score in finite)
    threshold = first + CONVERGED_FRACTION * (best - first)
    return next(step for step, score in finite if score >= threshold)


def curve(history: Tensor) -> Curve | None:
    """Plot a score history.

    Args:
        history: ``(steps,)`` scores; values that are not finite leave gaps.

    Returns:
        The plot, or ``None`` if fewer than two values are finite.
    """
    finite = [(step, score) for step, score in enumerate(history.tolist()) if math.isfinite(score)]
    if len(finite) < 2:
        return None
    low, high = min(score for _, score in finite), max(score for _, score in finite)
    last_step = finite[-1][0]

    def to_point(step: int, score: float) -> tuple[float, float]:
        level = (score - low) / (high - low) if high > low else 0.5
        return round(_WIDTH * step / max(1, last_step), 1), round(_HEIGHT * (1 - level), 1)

    commands = []
    previous_step = -2
    for step, score in finite:
        x, y = to_point(step, score)
        commands.append(f"{'L' if step == previous_step + 1 else 'M'}{x:g} {y:g}")
        previous_step = step
    best = max(finite, key=lambda pair: pair[1])
    return Curve("".join(commands), to_point(*best), low, high, last_step + 1)
