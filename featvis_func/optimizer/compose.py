"""Compositions of optimisers."""

from featvis_func.random import split
from featvis_func.types import Key, Optimizer, OptState, Params


def chain(*rules: Optimizer) -> Optimizer:
    """Apply rules in order, each to the output of the previous one. The last output is added to the parameters.

    The image to show is that of the last rule that has one of its own.

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

    averaging = [(i, rule.shown) for i, rule in enumerate(rules) if rule.shown is not None]
    if not averaging:
        return Optimizer(init, update)
    place, shown = averaging[-1]
    return Optimizer(init, update, shown=lambda state, params: shown(state[place], params))
