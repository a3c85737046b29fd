"""Gradient ascent with momentum."""

from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.optimizer.gradients import subtract_decay
from featvis_func.optimizer.schedules import Schedule, rate_at
from featvis_func.tree import tree_map
from featvis_func.types import Key, Optimizer, OptState, Params
from featvis_func.validation import check_float


class SgdState(NamedTuple):
    """Velocity (``()`` without momentum) and number of steps."""

    velocity: Params
    t: Tensor


def sgd(
    learning_rate: float | Schedule, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """Gradient ascent with momentum.

    ``lr * b`` with the velocity ``b = momentum * b + g``; with Nesterov momentum ``lr * (g + momentum * b)``.

    Args:
        learning_rate: a number above 0, or a schedule, in units of the parameters divided by those of the gradient.
            After :func:`normalize_gradient` without momentum it is the length of a step.
        momentum: in ``[0, 1)``.
        nesterov: use Nesterov momentum; requires a momentum above 0.
        weight_decay: L2 penalty, at least 0: ``weight_decay * params`` is subtracted from the gradient.

    Returns:
        An :class:`Optimizer` with :class:`SgdState`.

    Raises:
        ValueError: if the learning rate is not above 0, the momentum is outside of ``[0, 1)``, ``nesterov`` is set
            without momentum, or the weight decay is negative.

    Source: Polyak 1964 and, for ``nesterov``, Sutskever et al., "On the importance of initialization and momentum in
    deep learning", ICML 2013; equal to ``torch.optim.SGD(maximize=True)`` without dampening.

    >>> rule = sgd(0.1, momentum=0.5)
    >>> state = rule.init(torch.zeros(1), torch.tensor([0, 1]))
    >>> first, state = rule.update(torch.ones(1), state, torch.zeros(1))
    >>> second, state = rule.update(torch.ones(1), state, first)
    >>> [round(u.item(), 3) for u in (first, second)]
    [0.1, 0.15]
    """
    weight_decay = check_float("weight_decay", weight_decay, 0)
    rate = rate_at(learning_rate)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if nesterov and not momentum:
        raise ValueError(f"nesterov=True requires a momentum above 0, got {momentum}")

    def init(params: Params, key: Key) -> SgdState:
        velocity = tree_map(torch.zeros_like, params) if momentum else ()
        return SgdState(velocity, torch.zeros_like(key[0]))

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, SgdState]:
        direction = grads = subtract_decay(grads, params, weight_decay)
        velocity = ()
        if momentum:
            direction = velocity = tree_map(lambda b, g: momentum * b + g, state.velocity, grads)
        if nesterov:
            direction = tree_map(lambda g, b: g + momentum * b, grads, velocity)
        lr = rate(state.t)
        return tree_map(lambda d: (lr * d).to(d.dtype), direction), SgdState(velocity, state.t + 1)

    return Optimizer(init, update)
