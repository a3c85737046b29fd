"""What is done to a gradient before a rule makes a step of it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.random import fold_in, normal, split
from featvis_func.tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from featvis_func.types import Key, Optimizer, OptState, Params


class NoiseState(NamedTuple):
    """The stream of the noise and the steps taken."""

    key: Key
    t: Tensor


def normalize_gradient(*, eps: float = 1e-8) -> Optimizer:
    """Divides the gradient by its norm: ``g / (|g| + eps)``, the norm over the filter's whole pytree.

    >>> rule = normalize_gradient()
    >>> rule.update(torch.tensor([3.0, 4.0]), (), ())[0]
    tensor([0.6000, 0.8000])
    """

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        norm = global_norm(grads)
        return tree_map(lambda g: g / (norm + eps), grads), state

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
        return tree_map(lambda g: g * factor, grads), state

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
        leaves, spec = tree_flatten(grads)
        keys = [fold_in(state.key, state.t, stream=i) for i in range(len(leaves))]
        noisy = [g + sd * normal(k, g.shape).to(g.dtype) for k, g in zip(keys, leaves, strict=True)]
        return tree_unflatten(noisy, spec), NoiseState(state.key, state.t + 1)

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
        leaves, spec = tree_flatten(params)
        keys = split(key, len(leaves))
        drawn = [normal(k, leaf.shape).to(leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        return tree_unflatten(drawn, spec)

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        return tree_map(lambda g, d: torch.add(g, d, alpha=sd), grads, state), state

    return Optimizer(init, update)


def global_norm(tree: Params) -> Tensor:
    """The Euclidean norm over all leaves of a pytree: float ``()``.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return torch.sqrt(torch.stack([(leaf * leaf).sum() for leaf in tree_leaves(tree)]).sum())


def decayed(values: Params, params: Params, decay: float | Tensor) -> Params:
    """``values - decay * params``, leaf by leaf; untouched for a decay of the number 0."""
    if isinstance(decay, float | int) and not decay:
        return values
    return tree_map(lambda v, p: (v - decay * p).to(v.dtype), values, params)


def check_decay(weight_decay: float) -> None:
    """Raises ValueError for a weight decay below 0."""
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"the weight decay must be finite and at least 0, got {weight_decay}")


def _no_state(params: Params, key: Key) -> OptState:
    return ()
