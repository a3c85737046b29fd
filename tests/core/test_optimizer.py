"""Optimisers against torch's own and against plain formulas."""

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from featvis_func import random
from featvis_func.optimizer import (
    adam,
    adamw,
    add_drift,
    add_noise,
    chain,
    clip_norm,
    exponential_decay,
    global_norm,
    nadam,
    normalize_gradient,
    sgd,
)
from featvis_func.rendering.presets import OPTIMIZERS, default_optimizer, plain_optimizer, published_optimizer
from featvis_func.tree import tree_leaves, tree_map, tree_structure
from featvis_func.types import Optimizer

KEY = random.key(0)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def climb(rule: Optimizer, params: Any, grads: list[Any]) -> Any:
    state = rule.init(params, KEY)
    for gradient in grads:
        updates, state = rule.update(gradient, state, params)
        params = tree_map(torch.add, params, updates)
    return params


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99), (0.9, 0.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adam_equals_torch(dtype: torch.dtype, betas: tuple[float, float], eps: float) -> None:
    """After each of 100 steps of gradients that differ widely in size, relative to the way walked.

    The bias corrections are float32 whatever the parameters are, and 1 - 0.999 has an error of 1e-5 there.
    """
    scales = torch.tensor([1e-4, 1e-2, 1.0, 1e2], dtype=dtype)
    start = noise(4, dtype=dtype)
    theirs = start.clone().requires_grad_()
    reference = torch.optim.Adam([theirs], lr=0.05, betas=betas, eps=eps, maximize=True)
    rule = adam(0.05, betas=betas, eps=eps)
    ours, state = start, rule.init(start, KEY)
    for step in range(100):
        gradient = scales * noise(4, seed=step, dtype=dtype)
        theirs.grad = gradient.clone()
        reference.step()
        updates, state = rule.update(gradient, state, ours)
        ours = ours + updates
        assert ours.dtype == dtype
        walked = 0.05 * (step + 1)
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=2e-5 * walked)
    assert int(state.t) == 100


def test_adam_ascends() -> None:
    """The maximum of -(x - 3)**2 is reached from below."""
    x = torch.zeros(1)
    rule = adam(0.1)
    state = rule.init(x, KEY)
    for _ in range(300):
        updates, state = rule.update(-2 * (x - 3), state, x)
        x = x + updates
    assert x.item() == pytest.approx(3.0, abs=1e-2)


def test_schedule_is_given_the_number_of_the_step_from_zero() -> None:
    seen: list[int] = []

    def schedule(step: Tensor) -> Tensor:
        seen.append(int(step))
        return 0.1 * 0.5**step

    rule = adam(schedule, betas=(0.0, 0.0), eps=0.0)
    x = torch.zeros(1)
    state = rule.init(x, KEY)
    for expected in (0.1, 0.05, 0.025):
        updates, state = rule.update(torch.full((1,), 7.0), state, x)
        assert updates.item() == pytest.approx(expected)
    assert seen == [0, 1, 2]


def test_schedule_equals_torch_lambda_lr() -> None:
    theirs = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.Adam([theirs], lr=0.2, maximize=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(reference, lambda step: 1 / (1 + step))
    grads = [noise(3, seed=seed) for seed in range(20)]
    for gradient in grads:
        theirs.grad = gradient.clone()
        reference.step()
        scheduler.step()
    ours = climb(adam(lambda step: 0.2 / (1 + step)), torch.zeros(3, dtype=torch.float64), grads)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_normalize_gradient_formula(eps: float) -> None:
    tree = {"a": noise(3), "b": [noise(2, 2, seed=1)]}
    norm = math.sqrt((tree["a"] ** 2).sum().item() + (tree["b"][0] ** 2).sum().item())
    updates, state = normalize_gradient(eps=eps).update(tree, (), tree)
    torch.testing.assert_close(updates["a"], tree["a"] / (norm + eps))
    torch.testing.assert_close(updates["b"][0], tree["b"][0] / (norm + eps))
    assert state == ()


@pytest.mark.parametrize(
    "rule",
    [
        normalize_gradient(),
        clip_norm(0.1),
        adam(),
        adamw(),
        nadam(),
        sgd(0.1, momentum=0.9),
        default_optimizer(8),
        published_optimizer(),
    ],
)
def test_a_zero_gradient_stays_finite(rule: Optimizer) -> None:
    params = torch.zeros(4)
    updates, _ = rule.update(params, rule.init(params, KEY), params)
    assert updates.isfinite().all()


@pytest.mark.parametrize("largest", [0.1, 1.0, 1e3])
def test_clip_norm_equals_torch(largest: float) -> None:
    tree = [noise(3), noise(2, 4, seed=1)]
    theirs = [torch.zeros_like(leaf, requires_grad=True) for leaf in tree]
    for leaf, gradient in zip(theirs, tree, strict=True):
        leaf.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(theirs, largest)
    ours, _ = clip_norm(largest).update(tree, (), tree)
    for own, leaf in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, leaf.grad)
    assert global_norm(ours).item() <= largest
    if largest > 100:
        assert all(torch.equal(own, leaf) for own, leaf in zip(ours, tree, strict=True))


def test_noise_is_normal_fresh_each_step_and_its_keys_own() -> None:
    rule = add_noise(0.3)
    gradient = noise(20_000, dtype=torch.float32)
    state = rule.init(gradient, KEY)
    first, second_state = rule.update(gradient, state, gradient)
    second, _ = rule.update(gradient, second_state, gradient)
    other, _ = rule.update(gradient, rule.init(gradient, random.key(1)), gradient)
    again, _ = rule.update(gradient, state, gradient)
    added = [x - gradient for x in (first, second, other)]
    for x in added:
        assert abs(x.mean().item()) < 5 * 0.3 / math.sqrt(20_000)
        assert x.std().item() == pytest.approx(0.3, rel=5 / math.sqrt(2 * 20_000))
    correlation = torch.corrcoef(torch.stack(added)) - torch.eye(3)
    assert correlation.abs().max().item() < 5 / math.sqrt(20_000)
    assert torch.equal(first, again)
    assert int(second_state.t) == 1


def test_noise_formula() -> None:
    """Leaf i of step t adds sd times the normal numbers of the key with t folded in, stream i."""
    rule = add_noise(0.3)
    tree = {"a": noise(3), "b": noise(2, 2, seed=1)}
    state = rule.init(tree, KEY)
    for step in range(3):
        updates, state = rule.update(tree, state, tree)
        for i, name in enumerate(("a", "b")):
            drawn = random.normal(random.fold_in(KEY, step, stream=i), tree[name].shape)
            torch.testing.assert_close(updates[name], tree[name] + 0.3 * drawn.double())


def test_leaves_get_different_noise() -> None:
    tree = (torch.zeros(5), torch.zeros(5))
    rule = add_noise(1.0)
    updates, _ = rule.update(tree, rule.init(tree, KEY), tree)
    assert not torch.equal(updates[0], updates[1])


def test_no_noise_changes_nothing() -> None:
    rule = add_noise(0)
    gradient = noise(5)
    assert torch.equal(rule.update(gradient, rule.init(gradient, KEY), gradient)[0], gradient)


def test_chain_passes_the_gradient_on_in_order() -> None:
    gradient = torch.tensor([30.0, 40.0])
    scaled_last = chain(clip_norm(5.0), normalize_gradient())
    scaled_first = chain(normalize_gradient(), clip_norm(5.0))
    halved = chain(normalize_gradient(), clip_norm(0.5))
    for rule, expected in ((scaled_last, 1.0), (scaled_first, 1.0), (halved, 0.5)):
        updates, _ = rule.update(gradient, rule.init(gradient, KEY), gradient)
        assert updates.norm().item() == pytest.approx(expected, rel=1e-5)
    last_grows, _ = chain(clip_norm(0.5), normalize_gradient()).update(gradient, ((), ()), gradient)
    assert last_grows.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_chain_of_nothing_passes_the_gradient() -> None:
    gradient = noise(3)
    assert chain().init(gradient, KEY) == ()
    assert torch.equal(chain().update(gradient, (), gradient)[0], gradient)


def test_links_of_a_chain_draw_from_keys_of_their_own() -> None:
    gradient = torch.zeros(6)
    rule = chain(add_noise(1.0), add_noise(1.0))
    both, _ = rule.update(gradient, rule.init(gradient, KEY), gradient)
    parts = [
        add_noise(1.0).update(gradient, add_noise(1.0).init(gradient, key), gradient)[0] for key in random.split(KEY, 2)
    ]
    torch.testing.assert_close(both, parts[0] + parts[1])
    assert not torch.equal(parts[0], parts[1])


def test_published_optimizer_is_the_published_rule() -> None:
    """Unit gradient, noise of 1e-6, clipped to 0.1, Adam: by torch's own parts."""
    theirs = noise(50).requires_grad_()
    ours = theirs.detach().clone()
    reference = torch.optim.Adam([theirs], lr=0.05, maximize=True)
    rule = published_optimizer()
    state = rule.init(ours, KEY)
    for step in range(20):
        gradient = 100 * noise(50, seed=step)
        theirs.grad = gradient / (gradient.norm() + 1e-8)
        torch.nn.utils.clip_grad_norm_([theirs], 0.1)
        reference.step()
        updates, state = rule.update(gradient, state, ours)
        ours = ours + updates
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-2)
    asleep, _ = rule.update(torch.zeros(50), rule.init(torch.zeros(50), KEY), torch.zeros(50))
    assert (asleep.abs() > 0.01).float().mean() > 0.9


@pytest.mark.parametrize("rule", [normalize_gradient(), clip_norm(0.5)], ids=["normalize", "clip"])
def test_the_norm_is_each_filters_own(rule: Optimizer) -> None:
    """A huge neighbour changes nothing."""
    grads = torch.stack([noise(4), 1e6 * noise(4, seed=1)])
    updates = vmap(lambda g: rule.update(g, (), g)[0])(grads)
    alone, _ = rule.update(grads[0], (), grads[0])
    torch.testing.assert_close(updates[0], alone)
    torch.testing.assert_close(updates[1].norm().item(), 1.0 if rule.update(grads[1], (), ())[0].norm() > 0.9 else 0.5)


def test_filters_draw_their_own_noise() -> None:
    rule, zeros = add_noise(1.0), torch.zeros(3, 4)
    keys = torch.stack([random.key(seed) for seed in (1, 2, 1)])
    states = vmap(rule.init)(zeros, keys)
    updates, _ = vmap(rule.update)(zeros, states, zeros)
    assert torch.equal(updates[0], updates[2])
    assert not torch.equal(updates[0], updates[1])


@pytest.mark.parametrize(
    "make",
    [
        adam,
        adamw,
        nadam,
        lambda: sgd(0.1, momentum=0.9, nesterov=True),
        normalize_gradient,
        lambda: clip_norm(0.1),
        lambda: add_noise(1e-3),
        published_optimizer,
    ],
    ids=["adam", "adamw", "nadam", "sgd", "normalize", "clip", "noise", "published"],
)
def test_params_may_be_any_pytree(make: Callable[[], Optimizer]) -> None:
    tree = {"a": [noise(2), noise(1, seed=1)], "b": (noise(2, 3, seed=2),)}
    rule = make()
    before = copy.deepcopy(tree)
    updates, state = rule.update(tree, rule.init(tree, KEY), tree)
    rule.update(updates, state, tree)
    assert tree_structure(updates) == tree_structure(tree)
    for update, leaf, kept in zip(*map(tree_leaves, (updates, tree, before)), strict=True):
        assert update.shape == leaf.shape
        assert update.dtype == leaf.dtype
        assert torch.equal(leaf, kept)


def test_one_leaf_or_several_make_the_same_step() -> None:
    """The norm and the moments of a vector do not depend on how it is cut into leaves."""
    gradient = noise(6)
    rule = chain(normalize_gradient(), clip_norm(0.1), adam())
    whole, _ = rule.update(gradient, rule.init(gradient, KEY), gradient)
    cut = {"a": gradient[:2], "b": gradient[2:]}
    parts, _ = rule.update(cut, rule.init(cut, KEY), cut)
    torch.testing.assert_close(torch.cat([parts["a"], parts["b"]]), whole)


def test_global_norm() -> None:
    tree = [noise(3), {"x": noise(2, 2, seed=1)}]
    flat = torch.cat([leaf.flatten() for leaf in tree_leaves(tree)])
    torch.testing.assert_close(global_norm(tree), flat.norm())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adam(0), "the learning rate must be finite and above 0, got 0"),
        (lambda: adam(-0.1), "the learning rate must be finite and above 0, got -0.1"),
        (lambda: adam(math.nan), "the learning rate must be finite and above 0, got nan"),
        (lambda: adam(betas=(1.0, 0.9)), "betas must be in [0, 1), got (1.0, 0.9)"),
        (lambda: adam(betas=(0.9, -0.1)), "betas must be in [0, 1), got (0.9, -0.1)"),
        (lambda: adam(weight_decay=-0.1), "the weight decay must be finite and at least 0, got -0.1"),
        (lambda: adamw(weight_decay=math.nan), "the weight decay must be finite and at least 0, got nan"),
        (lambda: nadam(math.inf), "the learning rate must be finite and above 0, got inf"),
        (lambda: nadam(betas=(1.0, 0.9)), "betas must be in [0, 1), got (1.0, 0.9)"),
        (lambda: nadam(momentum_decay=-1), "the momentum decay must be finite and at least 0, got -1"),
        (lambda: sgd(0), "the learning rate must be finite and above 0, got 0"),
        (lambda: sgd(0.1, momentum=1.0), "the momentum must be in [0, 1), got 1.0"),
        (lambda: sgd(0.1, nesterov=True), "nesterov=True needs a momentum above 0"),
        (lambda: plain_optimizer("lion"), "unknown optimizer 'lion'; expected one of adam, adamw, nadam, sgd"),
        (lambda: plain_optimizer("sgd", lr=0.0), "the learning rate must be finite and above 0, got 0.0"),
        (lambda: clip_norm(0), "the largest norm must be above 0, got 0"),
        (lambda: clip_norm(math.nan), "the largest norm must be above 0, got nan"),
        (lambda: add_noise(-1), "the standard deviation of the noise must be at least 0, got -1"),
        (lambda: add_noise(math.nan), "the standard deviation of the noise must be at least 0, got nan"),
    ],
)
def test_errors(make: Callable[[], Optimizer], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.9999), (0.0, 0.99)], ids=str)
def test_adam_equals_torch_to_float64_rounding(betas: tuple[float, float]) -> None:
    theirs = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.Adam([theirs], lr=0.05, betas=betas, maximize=True)
    grads = [noise(4, seed=seed) for seed in range(100)]
    for gradient in grads:
        theirs.grad = gradient.clone()
        reference.step()
    ours = climb(adam(0.05, betas=betas), torch.zeros(4, dtype=torch.float64), grads)
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-10)


def test_default_optimizer_is_rmsprop_with_a_falling_rate() -> None:
    """Without momentum Adam is RMSprop with a bias correction; the rate falls from 8 / steps to 0.3 of that."""
    steps = 10
    rule, ours, second = default_optimizer(steps), torch.zeros(20), torch.zeros(20)
    state = rule.init(ours, KEY)
    expected = ours.clone()
    for step in range(steps):
        gradient = noise(20, seed=step).float()
        unit = gradient / gradient.norm()  # the drift is lost in the tolerance
        second = 0.99 * second + 0.01 * unit**2
        rate = 0.8 * (1 - 0.7 * step / steps)
        expected = expected + rate * unit / (second / (1 - 0.99 ** (step + 1))).sqrt()
        updates, state = rule.update(gradient, state, ours)
        ours = ours + updates
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_default_optimizer_wakes_a_filter_only_with_drift() -> None:
    asleep = torch.zeros(50)
    for drift, moves in ((0.0, False), (1e-6, True)):
        rule = default_optimizer(8, drift=drift)
        updates, _ = rule.update(asleep, rule.init(asleep, KEY), asleep)
        assert bool((updates.abs() > 0.01).any()) == moves


def three(seed: int) -> list[Tensor]:
    """Several tensors, whose sizes and magnitudes differ."""
    return [noise(4, seed=seed), 1e-3 * noise(2, 3, seed=seed + 1000), 10 * noise(1, seed=seed + 2000)]


RULES: dict[str, tuple[Optimizer, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "adam": (
        adam(0.05, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.05, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1, maximize=True),
    ),
    "adamw": (adamw(0.05), lambda p: torch.optim.AdamW(p, 0.05, maximize=True)),
    "adamw, not by default": (
        adamw(0.02, betas=(0.0, 0.95), eps=1e-4, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, 0.02, betas=(0.0, 0.95), eps=1e-4, weight_decay=0.3, maximize=True),
    ),
    "nadam": (nadam(0.05), lambda p: torch.optim.NAdam(p, 0.05, maximize=True)),
    "nadam, not by default": (
        nadam(1.0, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1, momentum_decay=0.05),
        lambda p: torch.optim.NAdam(
            p, 1.0, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1, momentum_decay=0.05, maximize=True
        ),
    ),
    "nadam without momentum": (
        nadam(0.05, betas=(0.0, 0.9)),
        lambda p: torch.optim.NAdam(p, 0.05, betas=(0.0, 0.9), maximize=True),
    ),
    "sgd": (sgd(0.05), lambda p: torch.optim.SGD(p, 0.05, maximize=True)),
    "sgd with momentum and decay": (
        sgd(0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, maximize=True),
    ),
    "sgd of nesterov": (
        sgd(0.05, momentum=0.7, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.7, nesterov=True, weight_decay=0.1, maximize=True),
    ),
}


@pytest.fixture
def double() -> Iterator[None]:
    """torch keeps NAdam's product of momenta in the default precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", RULES)
def test_rules_equal_torch_to_float64_rounding(name: str) -> None:
    rule, make = RULES[name]
    ours = three(-1)
    theirs = [leaf.clone().requires_grad_() for leaf in ours]
    reference, state = make(theirs), rule.init(ours, KEY)
    for step in range(100):
        grads = three(step)
        for leaf, gradient in zip(theirs, grads, strict=True):
            leaf.grad = gradient.clone()
        reference.step()
        updates, state = rule.update(grads, state, ours)
        ours = tree_map(torch.add, ours, updates)
        for own, leaf in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, leaf.detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", [adamw, nadam, sgd])
def test_rules_take_a_schedule(rule: Callable[..., Optimizer]) -> None:
    """A rate that is halved at each step makes the n-th step of constant rate, halved so often."""
    params, grads = noise(3), [noise(3, seed=seed) for seed in range(4)]
    halving, steady = rule(exponential_decay(0.4, 0.5)), rule(0.4)
    one, other = halving.init(params, KEY), steady.init(params, KEY)
    for step, gradient in enumerate(grads):
        updates, one = halving.update(gradient, one, params)
        expected, other = steady.update(gradient, other, params)
        torch.testing.assert_close(updates, expected * 0.5**step, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS[2:])
@pytest.mark.parametrize("lr", [None, 0.3])
def test_plain_rules_climb_by_the_unit_gradient_and_wake_what_sleeps(name: str, lr: float | None) -> None:
    unit_steps = lambda lr: chain(normalize_gradient(), sgd(lr, momentum=0.9))  # noqa: E731
    rules = {"adam": adam, "adamw": adamw, "nadam": nadam, "sgd": unit_steps}
    usual = 0.1 if name == "sgd" else 0.05
    expected = chain(normalize_gradient(), add_drift(1e-6), rules[name](usual if lr is None else lr))
    grads = [10.0**seed * noise(5, seed=seed) for seed in range(-2, 3)]
    start = noise(5, seed=9)
    assert torch.equal(climb(plain_optimizer(name, lr=lr), start, grads), climb(expected, start, grads))
    asleep = torch.zeros(5)
    for drift, moves in ((1e-6, True), (0.0, False)):
        assert bool((climb(plain_optimizer(name, drift=drift), asleep, [asleep]).abs() > 0.01).any()) == moves


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", OPTIMIZERS[2:])
def test_plain_rules_do_not_know_the_size_of_the_gradient(name: str, scale: float) -> None:
    start, grads = noise(5, seed=9), [noise(5, seed=seed) for seed in range(5)]
    scaled = climb(plain_optimizer(name), start, [scale * gradient for gradient in grads])
    torch.testing.assert_close(scaled, climb(plain_optimizer(name), start, grads), rtol=0.05, atol=0.05)
