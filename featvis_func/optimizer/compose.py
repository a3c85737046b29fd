"""Rules of rules."""

from featvis_func.random import split
from featvis_func.types import Key, Optimizer, OptState, Params


def chain(*rules: Optimizer) -> Optimizer:
    """Passes the gradient through rules in order; the last one's updates are added to the parameters.

    >>> import torch
    >>> from featvis_func.optimizer import clip_norm, normalize_gradient
    >>> chain(normalize_gradient(), clip_norm(0.5)).update(torch.tensor([3.0, 4.0]), ((), ()), ())[0]
    tensor([0.3000, 0.4000])
    """

    def init(params: Params, key: Key) -> OptState:
        return tuple(rule.init(params, k) for rule, k in zip(rules, split(key, len(rules)), strict=True))

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        states = []
        for rule, own in zip(rules, state, strict=True):
            grads, new = rule.update(grads, own, params)
            states.append(new)
        return grads, tuple(states)

    return Optimizer(init, update)
