"""Steepest ascent, with momentum."""

from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.optimizer.gradients import check_decay, decayed
from featvis_func.optimizer.schedules import Schedule, rate_at
from featvis_func.tree import tree_map
from featvis_func.types import Key, Optimizer, OptState, Params


class SgdState(NamedTuple):
    """The velocity (nothing without momentum) and the steps taken."""

    velocity: Params
    t: Tensor


def sgd(
    learning_rate: float | Schedule, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """Steepest ascent: ``lr * b`` with the velocity ``b = momentum * b + g``, or ``lr * (g + momentum * b)``.

    Args:
        learning_rate: a number above 0, or a schedule. It is in units of the parameters over those of the gradient;
            behind :func:`normalize_gradient` it is the length of a step.
        momentum: in ``[0, 1)``.
        nesterov: the second form, which looks a step ahead; needs momentum.
        weight_decay: at least 0; so many times the parameters are subtracted from the gradient.

    Returns:
        An :class:`Optimizer` with :class:`SgdState`.

    Raises:
        ValueError: a learning rate not above 0, a momentum outside ``[0, 1)``, ``nesterov`` without momentum, or a
            negative weight decay.

    Source: Polyak 1964 and, for ``nesterov``, Sutskever et al., "On the importance of initialization and momentum in
    deep learning", ICML 2013, in the form of ``torch.optim.SGD(maximize=True)``, which it equals (of no dampening).

    >>> rule = sgd(0.1, momentum=0.5)
    >>> state = rule.init(torch.zeros(1), torch.tensor([0, 1]))
    >>> first, state = rule.update(torch.ones(1), state, torch.zeros(1))
    >>> second, state = rule.update(torch.ones(1), state, first)
    >>> [round(u.item(), 3) for u in (first, second)]
    [0.1, 0.15]
    """
    check_decay(weight_decay)
    rate = rate_at(learning_rate)
    if not 0 <= momentum < 1:
        raise ValueError(f"the momentum must be in [0, 1), got {momentum}")
    if nesterov and not momentum:
        raise ValueError("nesterov=True needs a momentum above 0")

    def init(params: Params, key: Key) -> SgdState:
        velocity = tree_map(torch.zeros_like, params) if momentum else ()
        return SgdState(velocity, torch.zeros_like(key[0]))

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, SgdState]:
        way = grads = decayed(grads, params, weight_decay)
        velocity = ()
        if momentum:
            way = velocity = tree_map(lambda b, g: momentum * b + g, state.velocity, grads)
        if nesterov:
            way = tree_map(lambda g, b: g + momentum * b, grads, velocity)
        lr = rate(state.t)
        return tree_map(lambda w: (lr * w).to(w.dtype), way), SgdState(velocity, state.t + 1)

    return Optimizer(init, update)
