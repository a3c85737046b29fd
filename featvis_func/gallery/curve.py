"""A filter's score over the run, as numbers and as a drawing."""

import math
from typing import NamedTuple

from torch import Tensor

_WIDTH, _HEIGHT = 320.0, 120.0
# A filter counts as converged where it first has made so much of its way from its first score to its best.
SETTLED = 0.95


class Curve(NamedTuple):
    """A drawing of 320 by 120 units, for SVG: x is the step, y the score, greatest on top."""

    path: str
    best: tuple[float, float]
    """Where the best score is."""
    low: float
    high: float
    steps: int


def settled_step(history: Tensor) -> int:
    """The first step at which the score had made 95% of its way from its first value to its best; ``-1``: none.

    Args:
        history: ``(steps,)``; values that are not finite count as not taken.

    >>> import torch
    >>> settled_step(torch.tensor([0.0, 5.0, 9.6, 10.0, 9.0]))
    2
    """
    values = [v for v in enumerate(history.tolist()) if math.isfinite(v[1])]
    if not values:
        return -1
    first, best = values[0][1], max(v for _, v in values)
    wanted = first + SETTLED * (best - first)
    return next(step for step, value in values if value >= wanted)


def curve(history: Tensor) -> Curve | None:
    """The score over the steps; ``None`` where fewer than two are finite.

    Args:
        history: ``(steps,)``; values that are not finite leave gaps.
    """
    values = history.tolist()
    finite = [(step, v) for step, v in enumerate(values) if math.isfinite(v)]
    if len(finite) < 2:
        return None
    low, high = min(v for _, v in finite), max(v for _, v in finite)
    last = finite[-1][0]

    def place(step: int, value: float) -> tuple[float, float]:
        level = (value - low) / (high - low) if high > low else 0.5
        return round(_WIDTH * step / max(1, last), 1), round(_HEIGHT * (1 - level), 1)

    words = []
    before = -2
    for step, value in finite:
        x, y = place(step, value)
        words.append(f"{'L' if step == before + 1 else 'M'}{x:g} {y:g}")
        before = step
    best = max(finite, key=lambda pair: pair[1])
    return Curve("".join(words), place(*best), low, high, last + 1)
