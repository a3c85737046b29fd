"""Optimisers compared with those of torch and with explicit formulas."""

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
from featvis_func.image import alpha, fourier
from featvis_func.image.spectral import frequencies, octaves
from featvis_func.optimizer import (
    adam,
    adamw,
    add_drift,
    add_noise,
    average_iterates,
    chain,
    clip_norm,
    exponential_decay,
    global_norm,
    nadam,
    normalize_gradient,
    normalize_groups,
    pull_to_start,
    sgd,
)
from featvis_func.rendering.optimizers import default_optimizer, plain_optimizer, published_optimizer
from featvis_func.rendering.options import OPTIMIZERS
from featvis_func.tree import tree_leaves, tree_map, tree_structure
from featvis_func.types import Image, Optimizer

KEY = random.key(0)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ascend(rule: Optimizer, params: Any, grads: list[Any]) -> Any:
    """Return the parameters after one update per gradient."""
    state = rule.init(params, KEY)
    for gradient in grads:
        updates, state = rule.update(gradient, state, params)
        params = tree_map(torch.add, params, updates)
    return params


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99), (0.9, 0.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adam_matches_torch(dtype: torch.dtype, betas: tuple[float, float], eps: float) -> None:
    """Compare after each of 100 steps with gradients of very different scales, relative to the distance travelled.

    The tolerance allows for bias corrections in float32, where 1 - 0.999 has a relative error of 1e-5.
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
        distance = 0.05 * (step + 1)
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=2e-5 * distance)
    assert int(state.t) == 100


def test_adam_finds_the_maximum_of_a_parabola() -> None:
    """The maximum of -(x - 3)**2 is reached from 0."""
    x = torch.zeros(1)
    rule = adam(0.1)
    state = rule.init(x, KEY)
    for _ in range(300):
        updates, state = rule.update(-2 * (x - 3), state, x)
        x = x + updates
    assert x.item() == pytest.approx(3.0, abs=1e-2)


def test_schedule_receives_the_step_counted_from_zero() -> None:
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


def test_adam_with_a_schedule_matches_lambda_lr() -> None:
    theirs = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.Adam([theirs], lr=0.2, maximize=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(reference, lambda step: 1 / (1 + step))
    grads = [noise(3, seed=seed) for seed in range(20)]
    for gradient in grads:
        theirs.grad = gradient.clone()
        reference.step()
        scheduler.step()
    ours = ascend(adam(lambda step: 0.2 / (1 + step)), torch.zeros(3, dtype=torch.float64), grads)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_normalize_gradient_matches_the_formula(eps: float) -> None:
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
def test_zero_gradient_gives_finite_updates(rule: Optimizer) -> None:
    params = torch.zeros(4)
    updates, _ = rule.update(params, rule.init(params, KEY), params)
    assert updates.isfinite().all()


@pytest.mark.parametrize("largest", [0.1, 1.0, 1e3])
def test_clip_norm_matches_torch(largest: float) -> None:
    tree = [noise(3), noise(2, 4, seed=1)]
    theirs = [torch.zeros_like(leaf, requires_grad=True) for leaf in tree]
    for leaf, gradient in zip(theirs, tree, strict=True):
        leaf.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(theirs, largest)
    ours, _ = clip_norm(largest).update(tree, (), tree)
    for result, leaf in zip(ours, theirs, strict=True):
        torch.testing.assert_close(result, leaf.grad)
    assert global_norm(ours).item() <= largest
    if largest > 100:
        assert all(torch.equal(result, leaf) for result, leaf in zip(ours, tree, strict=True))


def test_noise_is_normal_and_independent_over_steps_and_keys() -> None:
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


def test_add_noise_matches_the_formula() -> None:
    """At step t, leaf i receives ``sd * normal(fold_in(key, t, stream=i))``."""
    rule = add_noise(0.3)
    tree = {"a": noise(3), "b": noise(2, 2, seed=1)}
    state = rule.init(tree, KEY)
    for step in range(3):
        updates, state = rule.update(tree, state, tree)
        for i, name in enumerate(("a", "b")):
            drawn = random.normal(random.fold_in(KEY, step, stream=i), tree[name].shape)
            torch.testing.assert_close(updates[name], tree[name] + 0.3 * drawn.double())


def test_noise_differs_between_leaves() -> None:
    tree = (torch.zeros(5), torch.zeros(5))
    rule = add_noise(1.0)
    updates, _ = rule.update(tree, rule.init(tree, KEY), tree)
    assert not torch.equal(updates[0], updates[1])


def test_add_noise_with_sd_0_is_the_identity() -> None:
    rule = add_noise(0)
    gradient = noise(5)
    assert torch.equal(rule.update(gradient, rule.init(gradient, KEY), gradient)[0], gradient)


def test_chain_applies_rules_in_order() -> None:
    gradient = torch.tensor([30.0, 40.0])
    normalized_last = chain(clip_norm(5.0), normalize_gradient())
    normalized_first = chain(normalize_gradient(), clip_norm(5.0))
    halved = chain(normalize_gradient(), clip_norm(0.5))
    for rule, expected in ((normalized_last, 1.0), (normalized_first, 1.0), (halved, 0.5)):
        updates, _ = rule.update(gradient, rule.init(gradient, KEY), gradient)
        assert updates.norm().item() == pytest.approx(expected, rel=1e-5)
    lengthened, _ = chain(clip_norm(0.5), normalize_gradient()).update(gradient, ((), ()), gradient)
    assert lengthened.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_empty_chain_is_the_identity() -> None:
    gradient = noise(3)
    assert chain().init(gradient, KEY) == ()
    assert torch.equal(chain().update(gradient, (), gradient)[0], gradient)


def test_chained_rules_have_independent_keys() -> None:
    gradient = torch.zeros(6)
    rule = chain(add_noise(1.0), add_noise(1.0))
    both, _ = rule.update(gradient, rule.init(gradient, KEY), gradient)
    parts = [
        add_noise(1.0).update(gradient, add_noise(1.0).init(gradient, key), gradient)[0] for key in random.split(KEY, 2)
    ]
    torch.testing.assert_close(both, parts[0] + parts[1])
    assert not torch.equal(parts[0], parts[1])


def test_published_optimizer_matches_torch() -> None:
    """Normalised gradient, noise of 1e-6, clipping to 0.1 and Adam, composed from torch functions."""
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
    inactive, _ = rule.update(torch.zeros(50), rule.init(torch.zeros(50), KEY), torch.zeros(50))
    assert (inactive.abs() > 0.01).float().mean() > 0.9


@pytest.mark.parametrize("rule", [normalize_gradient(), clip_norm(0.5)], ids=["normalize", "clip"])
def test_norm_is_computed_per_filter_under_vmap(rule: Optimizer) -> None:
    """A second filter with a very large gradient does not change the update of the first."""
    grads = torch.stack([noise(4), 1e6 * noise(4, seed=1)])
    updates = vmap(lambda g: rule.update(g, (), g)[0])(grads)
    alone, _ = rule.update(grads[0], (), grads[0])
    torch.testing.assert_close(updates[0], alone)
    torch.testing.assert_close(updates[1].norm().item(), 1.0 if rule.update(grads[1], (), ())[0].norm() > 0.9 else 0.5)


def test_noise_differs_between_filters_with_different_keys() -> None:
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
def test_params_may_be_any_pytree_and_are_not_modified(make: Callable[[], Optimizer]) -> None:
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


def test_update_does_not_depend_on_the_split_into_leaves() -> None:
    gradient = noise(6)
    rule = chain(normalize_gradient(), clip_norm(0.1), adam())
    single, _ = rule.update(gradient, rule.init(gradient, KEY), gradient)
    tree = {"a": gradient[:2], "b": gradient[2:]}
    parts, _ = rule.update(tree, rule.init(tree, KEY), tree)
    torch.testing.assert_close(torch.cat([parts["a"], parts["b"]]), single)


def test_global_norm_is_the_norm_of_the_concatenated_leaves() -> None:
    tree = [noise(3), {"x": noise(2, 2, seed=1)}]
    flat = torch.cat([leaf.flatten() for leaf in tree_leaves(tree)])
    torch.testing.assert_close(global_norm(tree), flat.norm())


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-22, 1e-19, 1e-15, 1e-10, 1.0, 1e18, 1e30])
@pytest.mark.parametrize(
    "wrap", [lambda f: f, pytest.param(compiled, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_norm_and_unit_gradient_at_any_scale(wrap: Callable[[Any], Any], scale: float) -> None:
    """Float32 squares of these underflow or overflow. Each row of the batch has a scale of its own."""
    grads = {"a": torch.stack([noise(50), noise(50) * scale, torch.zeros(50)]).float()}
    grads["b"] = torch.stack([noise(2, 3, seed=1), noise(2, 3, seed=1) * scale, torch.zeros(2, 3)]).float()
    exact = torch.cat([leaf[1].double().flatten() for leaf in grads.values()])
    norms = wrap(vmap(global_norm))(grads)
    assert norms[1].item() == pytest.approx(exact.norm().item(), rel=1e-5)
    assert norms[2] == 0
    plain = torch.sqrt(torch.stack([(leaf[0] ** 2).sum() for leaf in grads.values()]).sum())
    torch.testing.assert_close(norms[0], plain)
    unit, _ = wrap(vmap(lambda g: normalize_gradient().update(g, (), g)))(grads)
    ours = torch.cat([leaf[1].flatten() for leaf in unit.values()])
    torch.testing.assert_close(ours.double(), exact / exact.norm(), rtol=1e-5, atol=1e-6)
    assert not any(leaf[2].any() for leaf in unit.values())


def test_ordinary_gradients_are_normalised_as_by_the_plain_formula_bit_by_bit() -> None:
    for scale in (1e-7, 1e-3, 1.0, 1e6):
        gradient = (scale * noise(4, 100)).float()
        norm = torch.sqrt((gradient * gradient).sum())
        assert torch.equal(global_norm(gradient), norm)
        assert torch.equal(normalize_gradient().update(gradient, (), ())[0], gradient / (norm + 1e-8))


def test_norm_of_values_that_are_not_finite_is_not_finite() -> None:
    assert global_norm(torch.tensor([1.0, math.inf])).isinf()
    assert global_norm(torch.tensor([1.0, math.nan])).isnan()
    assert global_norm([torch.zeros(0), torch.tensor([1e-30, 0.0])]).item() == pytest.approx(1e-30)


def test_a_large_eps_damps_small_gradients() -> None:
    gradient = torch.tensor([3e-9, 4e-9])
    torch.testing.assert_close(normalize_gradient(eps=0.5).update(gradient, (), ())[0], gradient / 0.5)
    zero = torch.zeros(3)
    assert not normalize_gradient().update(zero, (), ())[0].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adam(0), "the learning rate must be finite and above 0, got 0"),
        (lambda: adam(-0.1), "the learning rate must be finite and above 0, got -0.1"),
        (lambda: adam(math.nan), "the learning rate must be finite and above 0, got nan"),
        (lambda: adam(betas=(1.0, 0.9)), "betas must be in [0, 1), got (1.0, 0.9)"),
        (lambda: adam(betas=(0.9, -0.1)), "betas must be in [0, 1), got (0.9, -0.1)"),
        (lambda: adam(weight_decay=-0.1), "weight_decay must be finite and at least 0, got -0.1"),
        (lambda: adamw(weight_decay=math.nan), "weight_decay must be finite and at least 0, got nan"),
        (lambda: nadam(math.inf), "the learning rate must be finite and above 0, got inf"),
        (lambda: nadam(betas=(1.0, 0.9)), "betas must be in [0, 1), got (1.0, 0.9)"),
        (lambda: nadam(momentum_decay=-1), "momentum_decay must be finite and at least 0, got -1"),
        (lambda: sgd(0), "the learning rate must be finite and above 0, got 0"),
        (lambda: sgd(0.1, momentum=1.0), "momentum must be in [0, 1), got 1.0"),
        (lambda: sgd(0.1, nesterov=True), "nesterov=True requires a momentum above 0, got 0.0"),
        (lambda: plain_optimizer("lion"), "unknown optimizer 'lion'; expected one of adam, adamw, nadam, sgd"),
        (lambda: plain_optimizer("sgd", lr=0.0), "the learning rate must be finite and above 0, got 0.0"),
        (lambda: clip_norm(0), "clip_norm: largest must be above 0, got 0"),
        (lambda: clip_norm(math.nan), "clip_norm: largest must be above 0, got nan"),
        (lambda: add_noise(-1), "add_noise: sd must be finite and at least 0, got -1"),
        (lambda: add_noise(math.nan), "add_noise: sd must be finite and at least 0, got nan"),
    ],
)
def test_invalid_arguments_raise_value_error(make: Callable[[], Optimizer], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.9999), (0.0, 0.99)], ids=str)
def test_adam_matches_torch_to_float64_rounding(betas: tuple[float, float]) -> None:
    theirs = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.Adam([theirs], lr=0.05, betas=betas, maximize=True)
    grads = [noise(4, seed=seed) for seed in range(100)]
    for gradient in grads:
        theirs.grad = gradient.clone()
        reference.step()
    ours = ascend(adam(0.05, betas=betas), torch.zeros(4, dtype=torch.float64), grads)
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-10)


def test_default_optimizer_is_rmsprop_with_a_decaying_rate() -> None:
    """Without momentum Adam is RMSprop with a bias correction; the rate decays from 8 / steps to 0.3 of that."""
    steps = 10
    rule, ours, second = default_optimizer(steps), torch.zeros(20), torch.zeros(20)
    state = rule.init(ours, KEY)
    expected = ours.clone()
    for step in range(steps):
        gradient = noise(20, seed=step).float()
        unit = gradient / gradient.norm()  # the drift is smaller than the tolerance
        second = 0.99 * second + 0.01 * unit**2
        rate = 0.8 * (1 - 0.7 * step / steps)
        expected = expected + rate * unit / (second / (1 - 0.99 ** (step + 1))).sqrt()
        updates, state = rule.update(gradient, state, ours)
        ours = ours + updates
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_default_optimizer_moves_an_inactive_filter_only_with_drift() -> None:
    zeros = torch.zeros(50)
    for drift, moves in ((0.0, False), (1e-6, True)):
        rule = default_optimizer(8, drift=drift)
        updates, _ = rule.update(zeros, rule.init(zeros, KEY), zeros)
        assert bool((updates.abs() > 0.01).any()) == moves


def tensors(seed: int) -> list[Tensor]:
    """Return three tensors of different shapes and magnitudes."""
    return [noise(4, seed=seed), 1e-3 * noise(2, 3, seed=seed + 1000), 10 * noise(1, seed=seed + 2000)]


RULES: dict[str, tuple[Optimizer, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "adam": (
        adam(0.05, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.05, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1, maximize=True),
    ),
    "adamw": (adamw(0.05), lambda p: torch.optim.AdamW(p, 0.05, maximize=True)),
    "adamw with other options": (
        adamw(0.02, betas=(0.0, 0.95), eps=1e-4, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, 0.02, betas=(0.0, 0.95), eps=1e-4, weight_decay=0.3, maximize=True),
    ),
    "nadam": (nadam(0.05), lambda p: torch.optim.NAdam(p, 0.05, maximize=True)),
    "nadam with other options": (
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
    "sgd with nesterov momentum": (
        sgd(0.05, momentum=0.7, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.7, nesterov=True, weight_decay=0.1, maximize=True),
    ),
}


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """Set float64 as the default dtype, in which torch stores the product of momenta of NAdam."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("name", RULES)
def test_rules_match_torch_to_float64_rounding(name: str) -> None:
    rule, make = RULES[name]
    ours = tensors(-1)
    theirs = [leaf.clone().requires_grad_() for leaf in ours]
    reference, state = make(theirs), rule.init(ours, KEY)
    for step in range(100):
        grads = tensors(step)
        for leaf, gradient in zip(theirs, grads, strict=True):
            leaf.grad = gradient.clone()
        reference.step()
        updates, state = rule.update(grads, state, ours)
        ours = tree_map(torch.add, ours, updates)
        for result, leaf in zip(ours, theirs, strict=True):
            torch.testing.assert_close(result, leaf.detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", [adamw, nadam, sgd])
def test_rules_accept_a_schedule(rule: Callable[..., Optimizer]) -> None:
    """With a rate that halves at each step, step n is that of a constant rate times ``0.5**n``."""
    params, grads = noise(3), [noise(3, seed=seed) for seed in range(4)]
    halving, steady = rule(exponential_decay(0.4, 0.5)), rule(0.4)
    halving_state, steady_state = halving.init(params, KEY), steady.init(params, KEY)
    for step, gradient in enumerate(grads):
        updates, halving_state = halving.update(gradient, halving_state, params)
        expected, steady_state = steady.update(gradient, steady_state, params)
        torch.testing.assert_close(updates, expected * 0.5**step, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS[3:])
@pytest.mark.parametrize("lr", [None, 0.3])
def test_plain_optimizer_is_normalize_drift_and_the_named_rule(name: str, lr: float | None) -> None:
    normalized_sgd = lambda lr: chain(normalize_gradient(), sgd(lr, momentum=0.9))  # noqa: E731
    rules = {"adam": adam, "adamw": adamw, "nadam": nadam, "sgd": normalized_sgd}
    default_lr = 0.1 if name == "sgd" else 0.05
    expected = chain(normalize_gradient(), add_drift(1e-6), rules[name](default_lr if lr is None else lr))
    grads = [10.0**seed * noise(5, seed=seed) for seed in range(-2, 3)]
    start = noise(5, seed=9)
    assert torch.equal(ascend(plain_optimizer(name, lr=lr), start, grads), ascend(expected, start, grads))
    zeros = torch.zeros(5)
    for drift, moves in ((1e-6, True), (0.0, False)):
        assert bool((ascend(plain_optimizer(name, drift=drift), zeros, [zeros]).abs() > 0.01).any()) == moves


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", OPTIMIZERS[3:])
def test_plain_optimizer_is_invariant_to_the_gradient_scale(name: str, scale: float) -> None:
    start, grads = noise(5, seed=9), [noise(5, seed=seed) for seed in range(5)]
    scaled = ascend(plain_optimizer(name), start, [scale * gradient for gradient in grads])
    torch.testing.assert_close(scaled, ascend(plain_optimizer(name), start, grads), rtol=0.05, atol=0.05)


# Groups.


def test_normalize_groups_divides_each_group_by_its_root_mean_square() -> None:
    """Two leaves, labels that broadcast over the first and last axis, and a group that spans both leaves."""
    generator = torch.Generator().manual_seed(0)
    grads = {
        "a": torch.randn(3, 4, 2, generator=generator, dtype=torch.float64),
        "b": torch.randn(5, generator=generator, dtype=torch.float64) * 1e-3,
    }
    labels = {"a": torch.tensor([0, 1, 1, 2])[None, :, None], "b": torch.tensor([2, 2, 0, 3, 3])}
    updates, _ = normalize_groups(labels, eps=1e-300).update(grads, (), ())
    members = [
        (grads["a"][:, label == labels["a"][0, :, 0]], grads["b"][label == labels["b"]]) for label in torch.arange(4)
    ]
    for label, (a, b) in enumerate(members):
        rms = torch.cat([a.flatten(), b]).square().mean().sqrt()
        torch.testing.assert_close(updates["a"][:, labels["a"][0, :, 0] == label], a / rms)
        torch.testing.assert_close(updates["b"][labels["b"] == label], b / rms)


def test_normalize_groups_accepts_a_single_number() -> None:
    updates, _ = normalize_groups(torch.tensor(0)).update(torch.tensor(-3.0), (), ())
    torch.testing.assert_close(updates, torch.tensor(-1.0))


def test_normalize_groups_leaves_a_group_without_a_gradient_at_zero() -> None:
    updates, _ = normalize_groups(torch.tensor([0, 0, 1])).update(torch.tensor([0.0, 0.0, 3.0]), (), ())
    assert updates.tolist() == [0.0, 0.0, pytest.approx(1.0)]


@pytest.mark.parametrize(
    ("labels", "grads", "message"),
    [(torch.tensor([0, -1]), torch.ones(2), "at least 0"), (torch.tensor([0, 1]), torch.ones(2, 2), r"are \[\(2, 2\)")],
)
def test_normalize_groups_refuses_labels_that_do_not_fit(labels: Tensor, grads: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize_groups(labels).update(grads, (), ())


def test_pull_to_start_keeps_what_steps_agree_on() -> None:
    """Steps that agree reach 1 / fraction; alternating ones stay near the start, however many follow."""
    rule = chain(sgd(1.0), pull_to_start(0.1))
    start = torch.tensor([2.0, 2.0])
    params, state = start, rule.init(start, KEY)
    for i in range(200):
        updates, state = rule.update(torch.tensor([1.0, (-1.0) ** i]), state, params)
        params = params + updates
    assert params[0].item() == pytest.approx(2 + 1 / 0.1, rel=1e-4)
    assert abs(params[1].item() - 2) < 1


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_pull_to_start_refuses_other_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        pull_to_start(fraction)


@pytest.mark.parametrize("sides", [(8, 8), (7, 10), (5, 6, 7), (12,)])
def test_octaves_hold_frequencies_within_a_factor_of_the_square_root_of_two(sides: tuple[int, ...]) -> None:
    f, labels = frequencies(*sides), octaves(sides)
    assert labels.shape == f.shape
    for label in labels[f > 1.001 / max(sides)].unique():
        inside = f[(labels == label) & (f > 0)]
        assert inside.max() <= inside.min() * 2**0.5 * 1.001


@pytest.mark.parametrize("make", [fourier, alpha])
def test_default_optimizer_moves_all_octaves_of_an_image_alike(make: Callable[..., Image]) -> None:
    """The gradient of one octave is a thousand times smaller; a step has the same root mean square there."""
    image = make((16, 12), channels=2)
    assert isinstance(image.groups, Tensor)
    params = image.init(KEY)
    labels = image.groups.expand(params.shape)
    grads = torch.randn(params.shape, generator=torch.Generator().manual_seed(0)) * torch.where(labels == 2, 1e-3, 1.0)
    rule = default_optimizer(64, groups=image.groups, drift=0.0)
    updates, _ = rule.update(grads, rule.init(params, KEY), params)
    for label in labels.unique():
        assert updates[labels == label].square().mean().sqrt().item() == pytest.approx(10 / 64, rel=1e-3)


@pytest.mark.parametrize(("steps", "rate"), [(10, 0.5), (32, 10 / 64), (48, 10 / 64), (64, 10 / 64), (200, 0.05)])
def test_default_rate_depends_on_the_number_of_steps(steps: int, rate: float) -> None:
    image = fourier(8, channels=1)
    rule = default_optimizer(steps, groups=image.groups, drift=0.0)
    params = torch.zeros_like(image.init(KEY))
    updates, _ = rule.update(torch.randn(params.shape), rule.init(params, KEY), params)
    assert updates.square().mean().sqrt().item() == pytest.approx(rate, rel=0.1)


def test_default_optimizer_keeps_the_contrast_bounded_for_any_number_of_steps() -> None:
    image = fourier(8, channels=1)
    for steps in (1, 8, 64, 300):
        rule = default_optimizer(steps, groups=image.groups, drift=0.0)
        params = image.init(KEY)
        state = rule.init(params, KEY)
        direction = torch.ones_like(params)
        for _ in range(steps):
            updates, state = rule.update(direction, state, params)
            params = params + updates
        assert 1 < params.abs().max().item() < 5.2


@pytest.mark.parametrize("count", [2, 5, 8])
def test_default_update_of_a_filter_is_the_same_in_every_batch(count: int) -> None:
    """Bit by bit: ascent from grey amplifies every difference in rounding."""
    image = fourier((24, 20))
    rule = default_optimizer(64, groups=image.groups)
    keys = torch.stack([random.fold_in(KEY, i) for i in range(count)])
    params = vmap(image.init)(keys)
    grads = noise(*params.shape, dtype=torch.float32)
    together, _ = vmap(rule.update)(grads, vmap(rule.init)(params, keys), params)
    for i in range(count):
        alone, _ = vmap(rule.update)(
            grads[i : i + 1], vmap(rule.init)(params[i : i + 1], keys[i : i + 1]), params[i : i + 1]
        )
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_average_iterates_weights_each_iterate_by_a_polynomial(power: float) -> None:
    """The weights of iterate t are proportional to t (t + 1) ... (t + power - 1), of degree ``power``."""
    rule = chain(sgd(0.1), average_iterates(power))
    params, iterates = {"a": noise(3), "b": noise(2, 2, seed=1)}, []
    state = rule.init(params, KEY)
    assert rule.shown is not None
    assert tree_map(torch.equal, rule.shown(state, params), params) == {"a": True, "b": True}
    for t in range(6):
        grads = {"a": noise(3, seed=2 + t), "b": noise(2, 2, seed=20 + t)}
        updates, state = rule.update(grads, state, params)
        assert torch.equal(updates["a"], 0.1 * grads["a"]), "it leaves the updates as they are"
        params = tree_map(torch.add, params, updates)
        iterates.append(params)
    weights = torch.tensor([math.prod(t + i for i in range(int(power))) for t in range(1, 7)], dtype=torch.float64)
    for name, mean in rule.shown(state, params).items():
        values = torch.stack([iterate[name] for iterate in iterates])
        expected = torch.einsum("t,t...->...", weights / weights.sum(), values)
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-7)


def test_chain_shows_what_its_last_rule_with_an_own_image_shows() -> None:
    assert chain(sgd(0.1), normalize_gradient()).shown is None
    inner = chain(average_iterates(0.0), sgd(0.1))
    rule = chain(normalize_gradient(), inner, average_iterates(3.0))
    state = rule.init(torch.zeros(2), KEY)
    _, state = rule.update(torch.ones(2), state, torch.zeros(2))
    assert rule.shown is not None
    assert torch.equal(rule.shown(state, torch.zeros(2)), state[-1].mean)


@pytest.mark.parametrize("power", [-1.0, math.nan, math.inf])
def test_average_iterates_refuses_other_powers(power: float) -> None:
    with pytest.raises(ValueError, match="average_iterates: power"):
        average_iterates(power)
