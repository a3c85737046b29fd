"""Repeating a step, without waiting for the device."""

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from featvis_func.types import Info, State, Target, Weights

Step: TypeAlias = Callable[[Weights, State, Target], tuple[State, Info]]
"""(weights, state, target) -> (state, info): a pure function over a batch of filters."""


@runtime_checkable
class RepeatableStep(Protocol):
    """A step that has a faster way of being repeated than one call after the other."""

    def __call__(self, weights: Weights, state: State, target: Target) -> tuple[State, Info]:
        """Take one step."""
        state, (info,) = self.repeat(weights, state, target, steps=1)
        return state, info

    def repeat(
        self,
        weights: Weights,
        state: State,
        target: Target,
        *,
        steps: int,
        callback: Callable[[Info], object] | None = None,
    ) -> tuple[State, list[Info]]:
        """Do what :func:`repeat_step` does with the step."""
        ...


def run(
    step: Step,
    weights: Weights,
    state: State,
    target: Target,
    *,
    steps: int,
    callback: Callable[[Info], object] | None = None,
) -> tuple[State, Info]:
    """Repeat a step, without waiting for the device.

    Args:
        step: of an :class:`~featvis_func.Ascent`, compiled or not.
        weights, state, target: its arguments.
        steps: number of repetitions, at least 1.
        callback: called with each step's :class:`Info`, whose tensors are still on the device.

    Returns:
        The last state, and an :class:`Info` of stacked reports, each ``(steps, n)``.

    Raises:
        ValueError: fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    state, infos = repeat_step(step, weights, state, target, steps=steps, callback=callback)
    return state, Info(*(torch.stack(column) for column in zip(*infos, strict=True)))


def repeat_step(
    step: Step,
    weights: Weights,
    state: State,
    target: Target,
    *,
    steps: int,
    callback: Callable[[Info], object] | None = None,
) -> tuple[State, list[Info]]:
    """Repeat a step as :func:`run` does; returns the last state, and the report of each step."""
    if isinstance(step, RepeatableStep):
        return step.repeat(weights, state, target, steps=steps, callback=callback)
    infos = []
    for _ in range(steps):
        state, info = step(weights, state, target)
        infos.append(info)
        if callback is not None:
            callback(info)
    return state, infos
