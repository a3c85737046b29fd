"""Gradient ascent, as pure functions that compose.

>>> rule = chain(normalize_gradient(), add_noise(1e-6), clip_norm(0.1), adam(0.05))
>>> params = torch.zeros(3)
>>> state = rule.init(params, torch.tensor([0, 1]))
>>> updates, state = rule.update(torch.tensor([1.0, -1.0, 2.0]), state, params)
>>> [round(u, 3) for u in updates.tolist()]
[0.05, -0.05, 0.05]

Written for the parameters of one filter, so that under ``vmap`` every norm is that filter's own.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from featvis_func.random import fold_in, normal, split
from featvis_func.types import Key, Optimizer, OptState, Params

Schedule = Callable[[Tensor], Tensor]
"""The number of the step, int64 ``()`` from 0 -> learning rate, float ``()``."""


class AdamState(NamedTuple):
    """Symbols of Kingma and Ba: first moment (nothing without momentum), second moment, steps taken."""

    m: Params
    v: Params
    t: Tensor


class NoiseState(NamedTuple):
    """The stream of the noise and the steps taken."""

    key: Key
    t: Tensor


def adam(
    learning_rate: float | Schedule = 0.05, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Optimizer:
    """Adam, ascending: ``lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)``.

    Args:
        learning_rate: a number above 0, or a schedule.
        betas: the decay of the two moments, each in ``[0, 1)``.
        eps: keeps the division finite.

    Returns:
        An :class:`Optimizer` with :class:`AdamState`.

    Raises:
        ValueError: a learning rate not above 0, or a beta outside ``[0, 1)``.

    Source: Kingma and Ba, "Adam", ICLR 2015, algorithm 1; equal to ``torch.optim.Adam(maximize=True)``.

    >>> rule = adam(0.1)
    >>> updates, _ = rule.update(torch.ones(1), rule.init(torch.zeros(1), torch.tensor([0, 1])), torch.zeros(1))
    >>> round(updates.item(), 4)
    0.1
    """
    schedule = _schedule(learning_rate)
    b1, b2 = betas
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ValueError(f"betas must be in [0, 1), got {betas}")

    def init(params: Params, key: Key) -> AdamState:
        # Without momentum the first moment is the gradient, and is not carried.
        m = pytree.tree_map(torch.zeros_like, params) if b1 else ()
        return AdamState(m, pytree.tree_map(torch.zeros_like, params), torch.zeros_like(key[0]))

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, AdamState]:
        m = pytree.tree_map(lambda m, g: torch.lerp(m, g, 1 - b1), state.m, grads) if b1 else grads
        v = pytree.tree_map(lambda v, g: torch.addcmul(b2 * v, g, g, value=1 - b2), state.v, grads)
        t, lr = state.t + 1, schedule(state.t)

        def ascent(m: Tensor, v: Tensor) -> Tensor:
            # The bias of v is taken out of the fraction, so that it costs one number and not one for each parameter.
            bias = torch.sqrt(_bias(b2, t.to(v.dtype)))
            rate = lr * bias / _bias(b1, t.to(m.dtype))
            return (m / (torch.sqrt(v) + eps * bias) * rate).to(m.dtype)

        return pytree.tree_map(ascent, m, v), AdamState(m if b1 else (), v, t)

    return Optimizer(init, update)


def linear_decay(start: float, end: float, steps: int) -> Schedule:
    """A learning rate that falls along a line, and stays at its end after that.

    Args:
        start: at the first step, above 0.
        end: from step ``steps`` on, at least 0.
        steps: how many steps the fall takes, at least 1.

    Raises:
        ValueError: a number outside of these.

    >>> linear_decay(0.4, 0.2, 10)(torch.tensor([0, 5, 10, 20]))
    tensor([0.4000, 0.3000, 0.2000, 0.2000])
    """
    if not (0 < start < math.inf and 0 <= end < math.inf and steps >= 1):
        raise ValueError(f"expected start > 0, end >= 0 and steps >= 1, got {start}, {end} and {steps}")
    return lambda step: start + (end - start) * (step / steps).clamp_max(1.0)


def normalize_gradient(*, eps: float = 1e-8) -> Optimizer:
    """Divides the gradient by its norm: ``g / (|g| + eps)``, the norm over the filter's whole pytree.

    >>> rule = normalize_gradient()
    >>> rule.update(torch.tensor([3.0, 4.0]), (), ())[0]
    tensor([0.6000, 0.8000])
    """

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        norm = global_norm(grads)
        return pytree.tree_map(lambda g: g / (norm + eps), grads), state

    return Optimizer(_no_state, update)


def clip_norm(largest: float) -> Optimizer:
    """Shortens a gradient that is longer than ``largest``: ``g * min(1, largest / |g|)``.

    Args:
        largest: the largest norm let through, above 0.

    Raises:
        ValueError: ``largest`` is not above 0.

    >>> clip_norm(1.0).update(torch.tensor([3.0, 4.0]), (), ())[0]
    tensor([0.6000, 0.8000])
    """
    if not largest > 0:
        raise ValueError(f"the largest norm must be above 0, got {largest}")

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        # torch.nn.utils.clip_grad_norm_ has the same 1e-6, so that a zero gradient divides by something.
        factor = (largest / (global_norm(grads) + 1e-6)).clamp_max(1.0)
        return pytree.tree_map(lambda g: g * factor, grads), state

    return Optimizer(_no_state, update)


def add_noise(sd: float) -> Optimizer:
    """Adds ``N(0, sd**2)`` to the gradient: where it is zero, the image wanders until the filter wakes.

    Args:
        sd: standard deviation, at least 0.

    Returns:
        An :class:`Optimizer` with :class:`NoiseState`.

    Raises:
        ValueError: ``sd`` is negative.

    >>> rule = add_noise(1.0)
    >>> state = rule.init(torch.zeros(1000), torch.tensor([0, 1]))
    >>> bool((rule.update(torch.zeros(1000), state, ())[0].std() - 1).abs() < 0.1)
    True
    """
    if not sd >= 0:
        raise ValueError(f"the standard deviation of the noise must be at least 0, got {sd}")

    def init(params: Params, key: Key) -> NoiseState:
        return NoiseState(key, torch.zeros_like(key[0]))

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, NoiseState]:
        leaves, spec = pytree.tree_flatten(grads)
        keys = [fold_in(state.key, state.t, stream=i) for i in range(len(leaves))]
        noisy = [g + sd * normal(k, g.shape).to(g.dtype) for k, g in zip(keys, leaves, strict=True)]
        return pytree.tree_unflatten(noisy, spec), NoiseState(state.key, state.t + 1)

    return Optimizer(init, update)


def add_drift(sd: float) -> Optimizer:
    """Adds one fixed direction of ``N(0, sd**2)`` to every gradient.

    Where there is no gradient the image gains contrast along it until the filter wakes. As :func:`add_noise`, but
    steady, and drawn once instead of at each step.

    Args:
        sd: standard deviation, at least 0; small beside a gradient that there is.

    Returns:
        An :class:`Optimizer` whose state is the direction.

    Raises:
        ValueError: ``sd`` is negative.

    >>> rule = add_drift(1e-6)
    >>> state = rule.init(torch.zeros(3), torch.tensor([0, 1]))
    >>> updates, _ = rule.update(torch.zeros(3), state, ())
    >>> bool((updates == 1e-6 * state).all())
    True
    """
    if not sd >= 0:
        raise ValueError(f"the standard deviation of the drift must be at least 0, got {sd}")

    def init(params: Params, key: Key) -> OptState:
        leaves, spec = pytree.tree_flatten(params)
        keys = split(key, len(leaves))
        drawn = [normal(k, leaf.shape).to(leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        return pytree.tree_unflatten(drawn, spec)

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        return pytree.tree_map(lambda g, d: torch.add(g, d, alpha=sd), grads, state), state

    return Optimizer(init, update)


def chain(*rules: Optimizer) -> Optimizer:
    """Passes the gradient through rules in order; the last one's updates are added to the parameters.

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


def global_norm(tree: Params) -> Tensor:
    """The Euclidean norm over all leaves of a pytree: float ``()``.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return torch.sqrt(torch.stack([(leaf * leaf).sum() for leaf in pytree.tree_leaves(tree)]).sum())


def _no_state(params: Params, key: Key) -> OptState:
    return ()


def _bias(beta: float, t: Tensor) -> Tensor:
    """``1 - beta**t``, without the cancellation."""
    return -torch.expm1(t * math.log(beta)) if beta > 0 else torch.ones_like(t)


def _schedule(learning_rate: float | Schedule) -> Callable[[Tensor], Tensor | float]:
    if callable(learning_rate):
        return learning_rate
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"the learning rate must be finite and above 0, got {learning_rate}")
    return lambda step: learning_rate
