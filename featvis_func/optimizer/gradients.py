"""Gradient transformations that precede an optimiser in a chain."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.constants import device_constant
from featvis_func.random import fold_in, normal, split
from featvis_func.tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from featvis_func.types import Key, Optimizer, OptState, Params
from featvis_func.validation import check_float


class NoiseState(NamedTuple):
    """Key of the noise, and number of steps."""

    key: Key
    t: Tensor


_EPS = 1e-8  # Of PyTorch's and most other optimizers.


def normalize_gradient(*, eps: float = _EPS) -> Optimizer:
    """Divide the gradient by its global norm: ``g / (|g| + eps)``, the norm over all leaves of one filter.

    A gradient with ``0 < |g| < eps`` is divided by ``|g|`` alone, so that filters with tiny weights are rendered like
    others; it is zero only where it was zero.

    Args:
        eps: avoids a division by zero, at least 0. Above 1e-8 it damps small gradients instead, and the formula holds
            for all of them.

    >>> rule = normalize_gradient()
    >>> rule.update(torch.tensor([3.0, 4.0]), (), ())[0]
    tensor([0.6000, 0.8000])
    >>> rule.update(torch.tensor([3e-30, 4e-30]), (), ())[0]
    tensor([0.6000, 0.8000])
    """
    smallest = eps if eps <= _EPS else 0.0

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        norm = global_norm(grads)
        divisor = torch.where((norm > 0) & (norm < smallest), norm, norm + eps)
        return tree_map(lambda g: g / divisor, grads), state

    return Optimizer(_no_state, update)


def normalize_groups(groups: Params, *, eps: float = _EPS) -> Optimizer:
    """Divide the gradient of each group of parameters by its root mean square: ``g / (rms(g) + eps)``.

    With the octaves of a spectrum as groups, a step changes all scales alike, as with Adam. Within a group the
    gradient keeps its shape, whereas Adam moves each parameter by as much, also those whose gradient is rounding or
    noise.

    Args:
        groups: int64 labels from 0, in the structure of the parameters and with as many axes; an axis of length 1
            stands for all entries of the parameter's. :attr:`featvis_func.Image.groups` holds those of an image.
        eps: avoids a division by zero, above 0.

    Returns:
        An :class:`Optimizer` without state.

    Raises:
        ValueError: if a label is negative; when applied, if the labels do not fit the parameters.

    Source: the normalised Laplacian pyramid of gradients in the DeepDream notebook of TensorFlow (Mordvintsev, 2015),
    there on pixels.

    >>> rule = normalize_groups(torch.tensor([0, 0, 1]))
    >>> rule.update(torch.tensor([1.0, 7.0, 1e-3]), (), ())[0]
    tensor([0.2000, 1.4000, 1.0000])
    """
    labels = tree_leaves(groups)
    if min(int(label.min()) for label in labels) < 0:
        raise ValueError("normalize_groups: labels must be at least 0")
    count = 1 + max(int(label.max()) for label in labels)
    # Sums over groups are products with these matrices, summed explicitly: scattering is not deterministic on CUDA, and
    # the rounding of a batched matmul may depend on the batch size.
    numbers = [label.reshape(-1) for label in labels]
    one_hot = [(number == torch.arange(count, device=number.device)[:, None]).float() for number in numbers]
    members = [device_constant(member) for member in one_hot]
    indices = [device_constant(number, cast=False) for number in numbers]
    sizes = [device_constant(member.sum(1)) for member in one_hot]

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        leaves, spec = tree_flatten(grads)
        if [leaf.ndim for leaf in leaves] != [label.ndim for label in labels]:
            shapes = [tuple(leaf.shape) for leaf in leaves], [tuple(label.shape) for label in labels]
            raise ValueError(f"normalize_groups: the parameters are {shapes[0]}, the labels {shapes[1]}")
        totals, entries = [], []
        for leaf, label, member, size in zip(leaves, labels, members, sizes, strict=True):
            squares = leaf.square()
            for axis, side in enumerate(label.shape):
                if side == 1:  # one after the other: both ends at once would take a CPU five times as long
                    squares = squares.sum(axis, keepdim=True)
            totals.append((member(leaf) * squares.reshape(-1)).sum(1))
            entries.append(size(leaf) * (leaf.numel() / label.numel()))
        mean = torch.stack(totals).sum(0) / torch.stack(entries).sum(0).clamp_min(1.0)
        factors = 1.0 / (torch.sqrt(mean) + eps)
        normalised = [
            leaf * _expand_last(factors.to(leaf).index_select(0, index(leaf)).reshape(label.shape), leaf)
            for leaf, label, index in zip(leaves, labels, indices, strict=True)
        ]
        return tree_unflatten(normalised, spec), state

    return Optimizer(_no_state, update)


def pull_to_start(fraction: float) -> Optimizer:
    """Move the parameters back towards their start by a fraction of the distance: ``u - fraction * (p - start)``.

    Follows the optimizer in a chain. What every step agrees on reaches ``1 / fraction`` times the size of a step, what
    points in another direction each time (the noise of random transforms) about ``1 / sqrt(2 * fraction)`` times; and
    the contrast stays bounded, however many steps follow. For an image that starts grey this is decoupled weight decay;
    one that starts from a photograph stays near it.

    Args:
        fraction: in ``[0, 1]``, of each step.

    Returns:
        An :class:`Optimizer` whose state is the start.

    Raises:
        ValueError: if the fraction is outside of ``[0, 1]``.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, around the start instead of 0.

    >>> rule = pull_to_start(0.1)
    >>> state = rule.init(torch.ones(1), torch.tensor([0, 1]))
    >>> rule.update(torch.zeros(1), state, torch.full((1,), 3.0))[0]
    tensor([-0.2000])
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"pull_to_start: fraction must be in [0, 1], got {fraction}")

    def init(params: Params, key: Key) -> OptState:
        return tree_map(torch.clone, params)

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        return tree_map(lambda u, p, s: torch.add(u, p - s, alpha=-fraction), grads, params, state), state

    return Optimizer(init, update)


def clip_norm(largest: float) -> Optimizer:
    """Clip the global norm of the gradient: ``g * min(1, largest / |g|)``.

    Args:
        largest: largest norm, above 0; infinity disables clipping.

    Raises:
        ValueError: if ``largest`` is not above 0.

    >>> clip_norm(1.0).update(torch.tensor([3.0, 4.0]), (), ())[0]
    tensor([0.6000, 0.8000])
    """
    if not largest > 0:
        raise ValueError(f"clip_norm: largest must be above 0, got {largest}")

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        # torch.nn.utils.clip_grad_norm_ adds the same 1e-6, which avoids a division by zero.
        factor = (largest / (global_norm(grads) + 1e-6)).clamp_max(1.0)
        return tree_map(lambda g: g * factor, grads), state

    return Optimizer(_no_state, update)


def add_noise(sd: float) -> Optimizer:
    """Add noise ``N(0, sd**2)`` to the gradient.

    Where the gradient is zero, the image performs a random walk until the filter becomes active.

    Args:
        sd: standard deviation, at least 0.

    Returns:
        An :class:`Optimizer` with :class:`NoiseState`.

    Raises:
        ValueError: if ``sd`` is negative or not finite.

    >>> rule = add_noise(1.0)
    >>> state = rule.init(torch.zeros(1000), torch.tensor([0, 1]))
    >>> bool((rule.update(torch.zeros(1000), state, ())[0].std() - 1).abs() < 0.1)
    True
    """
    sd = check_float("add_noise: sd", sd, 0)

    def init(params: Params, key: Key) -> NoiseState:
        return NoiseState(key, torch.zeros_like(key[0]))

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, NoiseState]:
        leaves, spec = tree_flatten(grads)
        keys = [fold_in(state.key, state.t, stream=i) for i in range(len(leaves))]
        noisy = [g + sd * normal(k, g.shape).to(g.dtype) for k, g in zip(keys, leaves, strict=True)]
        return tree_unflatten(noisy, spec), NoiseState(state.key, state.t + 1)

    return Optimizer(init, update)


def add_drift(sd: float) -> Optimizer:
    """Add one fixed random direction ``N(0, sd**2)`` to every gradient.

    Where the gradient is zero, the image gains contrast along this direction until the filter becomes active. Unlike
    :func:`add_noise`, the direction is drawn once instead of at each step.

    Args:
        sd: standard deviation, at least 0; small compared with typical gradients.

    Returns:
        An :class:`Optimizer` whose state is the direction.

    Raises:
        ValueError: if ``sd`` is negative or not finite.

    >>> rule = add_drift(1e-6)
    >>> state = rule.init(torch.zeros(3), torch.tensor([0, 1]))
    >>> updates, _ = rule.update(torch.zeros(3), state, ())
    >>> bool((updates == 1e-6 * state).all())
    True
    """
    sd = check_float("add_drift: sd", sd, 0)

    def init(params: Params, key: Key) -> OptState:
        leaves, spec = tree_flatten(params)
        keys = split(key, len(leaves))
        drawn = [normal(k, leaf.shape).to(leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        return tree_unflatten(drawn, spec)

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        return tree_map(lambda g, d: torch.add(g, d, alpha=sd), grads, state), state

    return Optimizer(init, update)


def global_norm(tree: Params) -> Tensor:
    """Return the Euclidean norm over all leaves of a pytree: float ``()``.

    Where the squares would underflow or overflow, the leaves are divided by the largest magnitude first.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    >>> global_norm([torch.tensor([3e-30, 4e-30])]), global_norm([torch.tensor([3e30, 4e30])])
    (tensor(5.0000e-30), tensor(5.0000e+30))
    """
    leaves = [leaf for leaf in tree_leaves(tree) if leaf.numel()]
    norm = torch.sqrt(torch.stack([(leaf * leaf).sum() for leaf in leaves]).sum())
    largest = torch.stack([leaf.abs().amax() for leaf in leaves]).amax()
    # Below this the squares are subnormal, or zero. Elsewhere the plain norm is kept, bit by bit.
    numbers = torch.finfo(norm.dtype)
    underflow = (largest > 0) & (largest < math.sqrt(numbers.tiny / numbers.eps))
    rescaled = underflow | (norm.isinf() & largest.isfinite())
    divisor = torch.where(rescaled, largest, torch.ones_like(largest))
    parts = torch.stack([torch.linalg.vector_norm(leaf / divisor) for leaf in leaves])
    return torch.where(rescaled, divisor * torch.linalg.vector_norm(parts), norm)


def subtract_decay(values: Params, params: Params, decay: float | Tensor) -> Params:
    """Return ``values - decay * params`` leaf by leaf, or ``values`` itself if decay is the Python number 0."""
    if isinstance(decay, float | int) and not decay:
        return values
    return tree_map(lambda v, p: (v - decay * p).to(v.dtype), values, params)


def _expand_last(factor: Tensor, like: Tensor) -> Tensor:
    """Repeat a factor along the last axis, so that a product with it reads both in order."""
    return factor.expand(*factor.shape[:-1], like.shape[-1]).contiguous() if like.ndim else factor


def _no_state(params: Params, key: Key) -> OptState:
    return ()
