"""Averages over the iterates of a run."""

from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.tree import tree_map
from featvis_func.types import Key, Optimizer, OptState, Params
from featvis_func.validation import check_float


class AverageState(NamedTuple):
    """The average so far, and the number of updates."""

    mean: Params
    t: Tensor
    """int64 ``()``."""


def average_iterates(power: float = 3.0) -> Optimizer:
    """Show the average of all iterates, weighted by about ``t ** power``.

    Each step follows the gradient under one random transform, which moves the image to and fro; what the steps agree on
    is left in the average. Unlike with a smaller learning rate, the steps stay large. The average is known at any time,
    whatever the number of steps. The last rule of a chain; it leaves the updates as they are.

    Args:
        power: at least 0. With 0 all iterates count alike, with 3 the last quarter of them two thirds.

    Returns:
        An :class:`Optimizer` with :class:`AverageState`, and with ``shown``.

    Raises:
        ValueError: if ``power`` is negative or not finite.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992); the weights are those
    of the polynomial-decay averaging of Shamir and Zhang, ICML 2013.

    >>> rule = average_iterates(0.0)
    >>> state = rule.init(torch.zeros(1), torch.tensor([0, 1]))
    >>> for position in (0.0, 1.0, 2.0):  # each update moves by 1
    ...     _, state = rule.update(torch.ones(1), state, torch.tensor([position]))
    >>> rule.shown(state, torch.tensor([3.0]))
    tensor([2.])
    """
    power = check_float("average_iterates: power", power, 0)

    def init(params: Params, key: Key) -> AverageState:
        return AverageState(tree_map(torch.clone, params), torch.zeros_like(key[0]))

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, AverageState]:
        weight = (power + 1.0) / (state.t.to(torch.float32) + (power + 1.0))

        def moved(mean: Tensor, position: Tensor, step: Tensor) -> Tensor:
            return torch.lerp(mean, position + step, weight.to(mean.dtype))

        return grads, AverageState(tree_map(moved, state.mean, params, grads), state.t + 1)

    return Optimizer(init, update, shown=lambda state, params: state.mean)
