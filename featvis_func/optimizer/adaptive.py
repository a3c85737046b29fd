"""Adam and its variants, whose step size is about the learning rate, independent of the gradient scale."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.optimizer.gradients import subtract_decay
from featvis_func.optimizer.schedules import Schedule, rate_at
from featvis_func.tree import tree_leaves, tree_map
from featvis_func.types import Key, Optimizer, OptState, Params
from featvis_func.validation import check_float


class AdamState(NamedTuple):
    """First moment (``()`` if ``betas[0]`` is 0), second moment, and number of steps, as named by Kingma and Ba."""

    m: Params
    v: Params
    t: Tensor


class NadamState(NamedTuple):
    """As :class:`AdamState`, with the product of all momenta so far, float ``()``."""

    m: Params
    v: Params
    t: Tensor
    mu_product: Tensor


def adam(
    learning_rate: float | Schedule = 0.05,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Adam for gradient ascent: ``lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)``.

    Args:
        learning_rate: a number above 0, or a schedule.
        betas: decay rates of the two moments, each in ``[0, 1)``.
        eps: added to the denominator for numerical stability.
        weight_decay: L2 penalty, at least 0: ``weight_decay * params`` is subtracted from the gradient.

    Returns:
        An :class:`Optimizer` with :class:`AdamState`.

    Raises:
        ValueError: if the learning rate is not above 0, a beta is outside of ``[0, 1)``, or the weight decay is
            negative.

    Source: Kingma and Ba, "Adam", ICLR 2015, algorithm 1; equal to ``torch.optim.Adam(maximize=True)``.

    >>> rule = adam(0.1)
    >>> updates, _ = rule.update(torch.ones(1), rule.init(torch.zeros(1), torch.tensor([0, 1])), torch.zeros(1))
    >>> round(updates.item(), 4)
    0.1
    """
    weight_decay = check_float("weight_decay", weight_decay, 0)
    rate = rate_at(learning_rate)
    b1, b2 = _check_betas(betas)

    def init(params: Params, key: Key) -> AdamState:
        # Without momentum the first moment equals the gradient and is not stored.
        m = tree_map(torch.zeros_like, params) if b1 else ()
        return AdamState(m, tree_map(torch.zeros_like, params), torch.zeros_like(key[0]))

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, AdamState]:
        grads = subtract_decay(grads, params, weight_decay)
        m, v = _moments(grads, state, betas)
        t, lr = state.t + 1, rate(state.t)

        def ascent(m: Tensor, v: Tensor) -> Tensor:
            # The bias corrections are folded into one scalar, which avoids two element-wise operations.
            bias = torch.sqrt(_bias(b2, t.to(v.dtype)))
            rate = lr * bias / _bias(b1, t.to(m.dtype))
            return (m / (torch.sqrt(v) + eps * bias) * rate).to(m.dtype)

        return tree_map(ascent, m, v), AdamState(m if b1 else (), v, t)

    return Optimizer(init, update)


def adamw(
    learning_rate: float | Schedule = 0.05,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """Adam with decoupled weight decay: ``adam - lr * weight_decay * params``.

    Args:
        learning_rate, betas, eps: as for :func:`adam`.
        weight_decay: at least 0.

    Returns:
        An :class:`Optimizer` with :class:`AdamState`.

    Raises:
        ValueError: as for :func:`adam`.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2; equal to
    ``torch.optim.AdamW(maximize=True)``.

    >>> rule = adamw(0.1, weight_decay=0.5)
    >>> updates, _ = rule.update(torch.ones(1), rule.init(torch.ones(1), torch.tensor([0, 1])), torch.ones(1))
    >>> round(updates.item(), 4)
    0.05
    """
    weight_decay = check_float("weight_decay", weight_decay, 0)
    rate = rate_at(learning_rate)
    plain = adam(learning_rate, betas=betas, eps=eps)

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
        updates, new = plain.update(grads, state, params)
        # The decay uses the learning rate of the same step.
        return subtract_decay(updates, params, rate(state.t) * weight_decay), new

    return Optimizer(plain.init, update)


def nadam(
    learning_rate: float | Schedule = 0.05,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 0.004,
) -> Optimizer:
    """Adam with Nesterov momentum.

    ``lr * ((1 - mu_t) / (1 - p_t) * g + mu_(t+1) / (1 - p_t * mu_(t+1)) * m) / (sqrt(v / (1 - b2^t)) + eps)``, with
    ``mu_t = b1 * (1 - 0.96^(t * momentum_decay) / 2)`` and ``p_t`` the product of ``mu_1`` to ``mu_t``.

    Args:
        learning_rate: a number above 0, or a schedule. MACO uses 1.0 for phases.
        betas, eps, weight_decay: as for :func:`adam`.
        momentum_decay: at least 0; how fast the momentum grows from ``b1 / 2`` to ``b1``.

    Returns:
        An :class:`Optimizer` with :class:`NadamState`.

    Raises:
        ValueError: as for :func:`adam`, or if the momentum decay is negative.

    Source: Dozat, "Incorporating Nesterov momentum into Adam", ICLR workshop 2016; equal to
    ``torch.optim.NAdam(maximize=True)``.

    >>> rule = nadam(0.1)
    >>> updates, _ = rule.update(torch.ones(1), rule.init(torch.zeros(1), torch.tensor([0, 1])), torch.zeros(1))
    >>> round(updates.item(), 3)
    0.106
    """
    weight_decay = check_float("weight_decay", weight_decay, 0)
    rate = rate_at(learning_rate)
    b1, b2 = _check_betas(betas)
    momentum_decay = check_float("momentum_decay", momentum_decay, 0)

    def init(params: Params, key: Key) -> NadamState:
        m, v = (tree_map(torch.zeros_like, params) for _ in range(2))
        return NadamState(m, v, torch.zeros_like(key[0]), tree_leaves(params)[0].new_ones(()))

    def momentum(t: Tensor) -> Tensor:
        return b1 * (1.0 - 0.5 * torch.exp(t * (momentum_decay * math.log(0.96))))

    def update(grads: Params, state: OptState, params: Params) -> tuple[Params, NadamState]:
        grads = subtract_decay(grads, params, weight_decay)
        m, v = _moments(grads, state, betas)
        t, lr = state.t + 1, rate(state.t)
        steps = t.to(state.mu_product.dtype)
        mu, mu_next = momentum(steps), momentum(steps + 1)
        product = state.mu_product * mu
        grad_scale, moment_scale = lr * (1.0 - mu) / (1.0 - product), lr * mu_next / (1.0 - product * mu_next)

        def ascent(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
            bias = torch.sqrt(_bias(b2, t.to(v.dtype)))
            return ((grad_scale * g + moment_scale * m) / (torch.sqrt(v) + eps * bias) * bias).to(g.dtype)

        return tree_map(ascent, grads, m, v), NadamState(m, v, t, product)

    return Optimizer(init, update)


def _moments(grads: Params, state: OptState, betas: tuple[float, float]) -> tuple[Params, Params]:
    """Return the updated moving averages of the gradient and of its square."""
    b1, b2 = betas
    m = tree_map(lambda m, g: torch.lerp(m, g, 1 - b1), state.m, grads) if b1 else grads
    v = tree_map(lambda v, g: torch.addcmul(b2 * v, g, g, value=1 - b2), state.v, grads)
    return m, v


def _bias(beta: float, t: Tensor) -> Tensor:
    """Return ``1 - beta**t`` without cancellation."""
    return -torch.expm1(t * math.log(beta)) if beta > 0 else torch.ones_like(t)


def _check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    """Return the betas, or raise ValueError if one is outside of ``[0, 1)``."""
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), got {betas}")
    return betas
