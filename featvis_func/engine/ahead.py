"""A step whose random numbers are drawn for several steps at once.

A counter-based generator is many small operations, however few numbers it makes. For a step of the default transforms
they are 600, more than the rest of the step has.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.engine.run import RepeatableStep, Step
from featvis_func.engine.step import Ascent
from featvis_func.tree import tree_leaves, tree_map
from featvis_func.types import Draw, Info, State, Target, Weights

# Runs are often as short, between two looks at their filters.
_STEPS = 16
# Of more numbers each operation is no longer small, and they would take memory.
_MOST_NUMBERS = 1024


class _Ahead(NamedTuple):
    """The random numbers of the next steps."""

    first: Tensor
    """int64 ``(n,)``: number of the first step."""
    draws: Draw
    """Each ``(n, k, ...)``."""


class AheadStep(RepeatableStep):
    """The step of an ascent, with the random numbers of up to 16 steps drawn in one call.

    It is a pure function as the step is, with the same results.

    Args:
        ascent: whose step it is.
        wrap: a step -> that step as it will run, such as captured. Its target holds the random numbers, too. Default:
            as it is.
    """

    def __init__(self, ascent: Ascent, wrap: Callable[[Step], Step] | None = None) -> None:
        def step(weights: Weights, state: State, given: Target) -> tuple[State, Info]:
            target, ahead = given
            rows, columns = torch.arange(len(state.step), device=state.step.device), state.step - ahead.first
            draws = tree_map(lambda leaf: leaf[rows, columns], ahead.draws)
            return ascent.step_with(weights, state, target, draws)

        self._ascent = ascent
        self._step = step if wrap is None else wrap(step)

    def repeat(
        self,
        weights: Weights,
        state: State,
        target: Target,
        *,
        steps: int,
        callback: Callable[[Info], object] | None = None,
    ) -> tuple[State, list[Info]]:
        """Take several steps, see :func:`~featvis_func.engine.run.repeat_step`."""
        infos: list[Info] = []
        while len(infos) < steps:
            count = min(_STEPS, steps - len(infos))
            if isinstance(self._step, RepeatableStep):  # captured: it reads as many numbers each time, where they are
                given = target, self._draw(state, _STEPS)
                state, more = self._step.repeat(weights, state, given, steps=count, callback=callback)
                infos += more
                continue
            given = target, self._draw(state, count)
            for _ in range(count):  # each state is freed as soon as the next is known
                state, info = self._step(weights, state, given)
                infos.append(info)
                if callback is not None:
                    callback(info)
        return state, infos

    def _draw(self, state: State, count: int) -> _Ahead:
        numbers = state.step[:, None] + torch.arange(count, device=state.step.device)
        keys = state.key[:, None].expand(-1, count, -1)
        draws = self._ascent.draw(keys.flatten(0, 1), numbers.flatten())
        return _Ahead(state.step, tree_map(lambda leaf: leaf.unflatten(0, (-1, count)), draws))


def draws_are_few(draw: Draw) -> bool:
    """Whether the random numbers of one application of a transform are so few that steps should draw them ahead."""
    return sum(leaf.numel() for leaf in tree_leaves(draw)) <= _MOST_NUMBERS
