"""Compositions of optimisers."""

from featvis_func.random import split
from featvis_func.types import Key, Optimizer, OptState, Params


def chain(*rules: Optimizer) -> Optimizer:
    """Apply rules in order, each to the output of the previous one. The last output is added to the parameters.

    >>> import torch
    >>> from featvis_func.optimizer import clip_norm, normalize_gradient
    >>> chain(normalize_gradient(), clip_norm(0.5)).update(torch.tensor([3.0, 4.0]), ((), ()), ())[0]
    tensor([0.3000, 0.4000])
    """

    def init(params: Params, key: Key) -> OptState:
        return tuple(rule.init(params, k) for rule, k in zip(rules, split(key, len(rules)), strict=True))

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        new_states = []
        for rule, rule_state in zip(rules, state, strict=True):
            grads, new_state = rule.update(grads, rule_state, params)
            new_states.append(new_state)
        return grads, tuple(new_states)

    return Optimizer(init, update)
