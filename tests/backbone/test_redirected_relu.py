"""Redirected gradients: Lucid's rule, image by image, for every way to call an activation in a module."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featvis_func as fv
from featvis_func.backbone.features import Features, make_features
from featvis_func.backbone.redirected_relu import _FORWARD, _RISES, redirected
from featvis_func.engine.forward import make_forward
from featvis_func.models import Model, load_model
from featvis_func.rendering.api import render
from featvis_func.rendering.optimizers import default_optimizer
from featvis_func.types import Transform
from tests.toys import OneConv, load_toy


class Lucid(torch.autograd.Function):
    """``redirected_relu_grad`` and ``redirected_relu6_grad`` of Lucid, for a loss that is minimised.

    The gradient passes where ``lower <= x <= upper``. In eager mode only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, redirect: Tensor, f: Callable[..., Tensor], lower: float, upper: float) -> Tensor:
        ctx.save_for_backward(x, redirect)
        ctx.rest = f, lower, upper
        return f(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x, redirect), (f, lower, upper), loss = ctx.saved_tensors, ctx.rest, -gradients[0]
        with torch.enable_grad():
            own = torch.autograd.grad(f(inner := x.detach().requires_grad_()), inner, loss)[0]
        result = own.clone()
        for i in range(len(x)):
            off = (x[i] < lower) | (x[i] > upper)
            passed = torch.where(off, torch.zeros_like(loss[i]), loss[i])
            wrong = ((x[i] < lower) & (loss[i] > 0)) | ((x[i] > upper) & (loss[i] < 0))
            if redirect[i] and passed.norm() == 0:
                result[i] = torch.where(wrong, torch.zeros_like(loss[i]), loss[i])
        return -result, None, None, None, None


def minimum_of(f: Callable[..., Tensor]) -> float:
    """Return where a smooth activation has its minimum: it rises from there on."""
    x = torch.linspace(-3, 0, 3_000_001, dtype=torch.float64)
    return float(x[f(x).argmin()])


class Applies(nn.Module):
    """Calls a function in its forward pass."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# Name -> module, and the same activation as a function.
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "relu": (lambda: Applies(torch.relu), F.relu),
    "relu functional in place": (lambda: Applies(partial(F.relu, inplace=True)), F.relu),
    "relu method in place": (lambda: Applies(Tensor.relu_), F.relu),
    "relu module": (nn.ReLU, F.relu),
    "relu module in place": (lambda: nn.ReLU(inplace=True), F.relu),
    "relu6": (lambda: Applies(F.relu6), F.relu6),
    "relu6 module in place": (lambda: nn.ReLU6(inplace=True), F.relu6),
    "hardtanh": (lambda: nn.Hardtanh(-0.1, 0.2), partial(F.hardtanh, min_val=-0.1, max_val=0.2)),
    "hardtanh of one": (lambda: Applies(F.hardtanh), F.hardtanh),
    "hardsigmoid": (nn.Hardsigmoid, F.hardsigmoid),
    "hardswish in place": (lambda: nn.Hardswish(inplace=True), F.hardswish),
    "gelu": (lambda: Applies(F.gelu), F.gelu),
    "gelu tanh": (lambda: nn.GELU("tanh"), partial(F.gelu, approximate="tanh")),
    "silu": (lambda: Applies(F.silu), F.silu),
    "silu module in place": (lambda: nn.SiLU(inplace=True), F.silu),
    "mish": (nn.Mish, F.mish),
}
BOUNDS = {
    "relu": (0.0, torch.inf),
    "relu6": (0.0, 6.0),
    "hardtanh": (-0.1, 0.2),
    "hardtanh of one": (-1.0, 1.0),
    "hardsigmoid": (-3.0, 3.0),
}


def bounds_of(name: str) -> tuple[float, float]:
    kind = name if name in BOUNDS else name.split()[0]
    return BOUNDS[kind] if kind in BOUNDS else (minimum_of(ACTIVATIONS[name][1]), torch.inf)


def net(*activation: nn.Module) -> nn.Sequential:
    """The identity, an activation, and an average pool; in float64."""
    module = nn.Sequential(nn.Conv2d(3, 3, 1), *activation, nn.AvgPool2d(3, 1))
    first = module[0]
    with torch.no_grad():
        first.get_parameter("weight").copy_(torch.eye(3)[:, :, None, None])
        first.get_parameter("bias").zero_()
    return module.double().eval()


def images_around(levels: Tensor, spread: float = 0.3) -> Tensor:
    """Return an image of noise around each level: ``(n, 3, 6, 6)``."""
    noise = torch.randn(len(levels), 3, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return levels[:, None, None, None] + spread * noise


def traced(module: nn.Module, layer: str, size: int = 6) -> Features:
    features = make_features(load_toy(module, size=size), [layer])
    assert features.exported
    return features


def slope(run: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values, and the gradient of a fixed linear combination of them."""
    images = images.clone().requires_grad_()
    values = run(images)
    mixture = torch.randn(values.shape, generator=torch.Generator().manual_seed(5), dtype=values.dtype)
    return values.detach(), torch.autograd.grad((mixture * values).sum(), images)[0]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_redirected_gradient_equals_lucids(name: str) -> None:
    make, f = ACTIVATIONS[name]
    lower, upper = bounds_of(name)
    module = net(make())
    features = traced(module, "2")
    assert features.redirected is not None
    # Below R, above R if it is bounded, partly inside; each with and without redirection.
    levels = torch.tensor([lower - 3.0, min(upper, 20.0) + 3.0, lower], dtype=torch.float64).repeat(2)
    images = images_around(levels)
    redirect = torch.tensor([1.0] * 3 + [0.0] * 3)
    run = features.redirected
    values, gradient = slope(lambda x: run(features.weights, x, redirect)["2"], images)
    plain, own = slope(lambda x: features.apply(features.weights, x)["2"], images)
    assert torch.equal(values, plain)
    assert_equal(own, slope(module, images)[1])

    def by_lucid(x: Tensor) -> Tensor:
        return module[2](Lucid.apply(module[0](x), redirect, f, lower, upper))

    assert_equal(gradient, slope(by_lucid, images)[1])
    # Another gradient where it is redirected and blocked; elsewhere the activation's own, bit for bit.
    changed = [True, upper < torch.inf, False, False, False, False]
    assert [bool((a != b).any()) for a, b in zip(gradient, own, strict=True)] == changed
    assert gradient[0].any()


@pytest.mark.parametrize("kind", _RISES)
def test_activations_rise_in_the_interval_of_the_table(kind: str) -> None:
    lower, upper = _RISES[kind]
    inner = [lower + 1e-4] if upper is None else [lower + 1e-4, upper - 1e-4]
    outer = [lower - 1e-4] if upper is None else [lower - 1e-4, upper + 1e-4]

    def slopes(at: list[float]) -> Tensor:
        x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(_FORWARD[kind](x, lower, upper).sum(), x)[0]

    assert (slopes(inner) > 0).all()
    assert (slopes(outer) <= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("layer", [nn.LeakyReLU(inplace=True), nn.ELU(), nn.Softplus(), nn.Sigmoid()], ids=str)
def test_activations_that_rise_everywhere_are_not_redirected(layer: nn.Module) -> None:
    features = traced(net(layer), "2")
    assert features.redirected is not None
    run = features.redirected
    images = images_around(torch.tensor([-4.0, 4.0], dtype=torch.float64))
    gradient = slope(lambda x: run(features.weights, x, torch.ones(2))["2"], images)[1]
    assert torch.equal(gradient, slope(lambda x: features.apply(features.weights, x)["2"], images)[1])


def test_a_gradient_that_is_not_finite_is_not_redirected() -> None:
    features = traced(net(nn.ReLU()), "2")
    assert features.redirected is not None
    run = features.redirected
    images = images_around(torch.tensor([1.0, -3.0], dtype=torch.float64))
    images = images.requires_grad_()
    values = run(features.weights, images, torch.ones(2))["2"]
    gradient = torch.autograd.grad((values * torch.tensor([torch.nan, 1.0])[:, None, None, None]).sum(), images)[0]
    assert gradient[0].isnan().all()
    assert gradient[1].isfinite().all()


# --- the graph -------------------------------------------------------------------------------------------------------


class Merged(nn.Module):
    """1 x 1 convolutions of one tensor with ReLUs, which the graph merges; the second one is off."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.branches = nn.ModuleList([nn.Conv2d(5, count, 1) for count in (2, 3)])
        self.last = nn.Identity()
        with torch.no_grad():
            self.branches[1].get_parameter("bias").fill_(-50.0)

    def forward(self, x: Tensor, rectify: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
        x = self.stem(x)
        return self.last(torch.cat([rectify(branch(x)) for branch in self.branches], 1))


class Pooled(nn.Module):
    """A ReLU before a max pool, which the graph moves behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.last = nn.Identity()
        with torch.no_grad():
            self.conv.get_parameter("bias").fill_(-50.0)

    def forward(self, x: Tensor, rectify: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        x = self.conv(x)
        if rectify is not None:
            return self.last(rectify(F.max_pool2d(x, 2)))
        return self.last(F.max_pool2d(torch.relu(x), 2))


@pytest.mark.slow
@pytest.mark.parametrize("make", [Merged, Pooled])
def test_redirected_gradient_of_optimized_graphs_equals_lucids(make: Callable[[], nn.Module]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = make().double().eval()
    features = traced(module, "last")
    assert features.redirected is not None
    run = features.redirected
    images, redirect = images_around(torch.zeros(3, dtype=torch.float64), 1.0), torch.tensor([1.0, 0.0, 1.0])
    values, gradient = slope(lambda x: run(features.weights, x, redirect)["last"], images)
    assert torch.equal(values, slope(lambda x: features.apply(features.weights, x)["last"], images)[0])

    def rectify(x: Tensor) -> Tensor:
        return Lucid.apply(x, redirect, F.relu, 0.0, torch.inf)

    assert_equal(gradient, slope(lambda x: module(x, rectify), images)[1])
    own = slope(module, images)[1]
    assert [bool((a - b).abs().max() > 1e-6) for a, b in zip(gradient, own, strict=True)] == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "last", [nn.Conv2d(3, 2, 3), nn.Sequential(nn.Flatten(), nn.Linear(108, 2))], ids=["conv", "linear"]
)
def test_activations_before_the_last_convolution_are_not_redirected(last: nn.Module) -> None:
    features = traced(net(nn.ReLU(), last)[:3], "2")
    assert features.redirected is not None
    run = features.redirected
    images = images_around(torch.tensor([-90.0, -90.0], dtype=torch.float64))
    gradient = slope(lambda x: run(features.weights, x, torch.ones(2))["2"], images)[1]
    assert torch.equal(gradient, slope(lambda x: features.apply(features.weights, x)["2"], images)[1])


class Folded(OneConv):
    """An activation of a tensor whose first axis is that of images and channels."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.relu(x.flatten(0, 1) - 50.0).reshape(x.shape)


def test_activations_with_another_first_axis_are_not_redirected() -> None:
    module = nn.Sequential(Folded(), nn.Identity())
    features = traced(module, "1")
    assert features.redirected is not None
    run = features.redirected
    images = images_around(torch.zeros(2)).float()
    assert not slope(lambda x: run(features.weights, x, torch.ones(2))["1"], images)[1].any()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_gradient_equals_eager_for_every_mask(backend: str) -> None:
    features = traced(net(nn.ReLU(inplace=True) if backend == "inductor" else nn.GELU()).float(), "2")
    assert features.redirected is not None
    run = features.redirected
    images = images_around(torch.tensor([-4.0, -4.0, 0.5])).float()

    def gradient(images: Tensor, redirect: Tensor) -> tuple[Tensor, Tensor]:
        def score(images: Tensor, redirect: Tensor) -> Tensor:
            values = run(features.weights, images, redirect)["2"]
            return (values * torch.tensor([1.0, -1.0, 1.0])[:, None, None]).sum()

        return torch.func.grad(score, argnums=(0, 1))(images, redirect)

    compiled = torch.compile(gradient, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mask in ([1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]):
            redirect = torch.tensor(mask)
            expected = gradient(images, redirect)
            torch.testing.assert_close(compiled(images, redirect), expected, rtol=1e-5, atol=1e-6)
            assert expected[1].tolist() == [*mask[:2], 0.0]
            assert [bool((g > 0.05).any()) for g in expected[0][:2]] == [m > 0 for m in mask[:2]]


@pytest.mark.slow
@pytest.mark.parametrize("argnums", [(0,), (0, 1)], ids=str)
def test_redirected_compiled_equals_eager_for_arguments_of_grad(argnums: tuple[int, ...]) -> None:
    """Without other operations before it."""
    x = torch.tensor([[-1.0, -2.0], [-1.0, 3.0], [-1.0, -2.0]])
    mask = torch.tensor([1.0, 1.0, 0.0])

    def score(x: Tensor, redirect: Tensor) -> Tensor:
        return (redirected(x, redirect, "relu", 0.0, None) * torch.tensor([0.5, -0.5])).sum()

    gradient = torch.func.grad(score, argnums=argnums)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), gradient(x, mask))


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dead_model() -> Model:
    """A model whose ReLU is off for images near grey."""
    module = net(nn.ReLU(inplace=True)).float()
    with torch.no_grad():
        module[0].get_parameter("bias").fill_(-0.55)
    return load_model(module, mean=(0, 0, 0), std=(1, 1, 1), size=24)


@pytest.mark.slow
def test_redirection_revives_filters_that_start_dead(dead_model: Model) -> None:
    optimizer = default_optimizer(8, drift=0.0)
    grey = render(dead_model, "1", steps=8, optimizer=optimizer, transforms="none")
    assert grey.status == ("dead",) * 3
    assert (grey.history == 0).all()
    revived = render(dead_model, "1", steps=8, optimizer=optimizer, transforms="none", redirect=4)
    assert revived.status == ("ok",) * 3
    assert (revived.history[0] == 0).all()
    assert (revived.scores > 0.05).all()
    assert revived.config["redirect"] == 4


def test_filters_without_a_gradient_after_redirection_are_dead(dead_model: Model) -> None:
    with torch.no_grad():
        dead_model.module.get_submodule("0").get_parameter("bias").fill_(-5.0)  # no image reaches zero
    result = render(dead_model, "1", steps=6, optimizer=default_optimizer(6, drift=0.0), redirect=3)
    assert result.status == ("dead",) * 3


@pytest.mark.slow
def test_redirection_moves_gelu_above_its_minimum() -> None:
    """Its own gradient moves the input towards minus infinity, where the value is zero."""
    module = net(nn.GELU()).float()
    with torch.no_grad():
        module[0].get_parameter("weight").mul_(8.0)
        module[0].get_parameter("bias").fill_(-6.0)  # grey gives -2
    model = load_model(module, mean=(0, 0, 0), std=(1, 1, 1), size=24)
    optimizer = default_optimizer(12, lr=0.2, drift=0.0)
    assert (render(model, "1", steps=12, optimizer=optimizer, transforms="none").scores < 0).all()
    assert (render(model, "1", steps=12, optimizer=optimizer, transforms="none", redirect=6).scores > 0).all()


@pytest.mark.slow
def test_redirection_does_not_depend_on_the_batch(dead_model: Model) -> None:
    alone = [render(dead_model, "1", [i], steps=6, redirect=3, size=16) for i in range(3)]
    for width in (2, 3):
        together = render(dead_model, "1", steps=6, redirect=3, size=16, batch_size=width)
        for i, one in enumerate(alone):
            torch.testing.assert_close(together.images[i], one.images[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(together.history[:, i], one.history[:, 0], rtol=1e-4, atol=1e-6)


def ascent_of(model: Model, image: fv.Image, redirect: int) -> tuple[fv.Ascent, Features]:
    features = make_features(model, ["1"])
    transform = fv.named_transform("none", image=(24, 24), size=(24, 24))
    optimizer = default_optimizer(8, drift=0.0)
    return fv.make_ascent(features, image, transform, fv.channel("1"), optimizer, redirect=redirect), features


def test_each_filter_is_redirected_by_its_own_step(dead_model: Model) -> None:
    ascent, features = ascent_of(dead_model, fv.fourier(24), redirect=3)
    filters = torch.tensor([0, 1, 2])
    state = ascent.init(fv.filter_keys(0, "1", filters.tolist()))
    state = state._replace(step=torch.tensor([2, 3, 0]))
    _, info = ascent.step(features.weights, state, filters)
    assert (info.grad_norm > 0).tolist() == [True, False, True]
    assert info.alive.tolist() == [False, False, False]
    brighter = state._replace(params=state.params + 1.0)  # all filters are above zero
    _, info = ascent.step(features.weights, brighter, filters)
    assert info.alive.tolist() == [True, True, True]


@pytest.mark.slow
def test_a_compiled_step_needs_no_recompilation_when_redirection_ends(dead_model: Model) -> None:
    ascent, features = ascent_of(dead_model, fv.pixel(24), redirect=2)
    target = torch.tensor([0, 1])
    state = ascent.init(fv.filter_keys(0, "1", [0, 1]))._replace(step=torch.tensor([0, 1]))
    compiled = torch.compile(ascent.step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        info = None
        for _ in range(3):
            expected = ascent.step(features.weights, state, target)
            state, info = compiled(features.weights, state, target)
            torch.testing.assert_close((state.params, *info), (expected[0].params, *expected[1]), rtol=1e-4, atol=1e-5)
    assert info is not None
    assert info.alive.tolist() == [True, True]


@pytest.mark.slow
def test_default_of_redirect(dead_model: Model) -> None:
    result = render(dead_model, "1", [0], steps=8, transforms="none")
    assert result.config["redirect"] == 16
    assert result.status == ("ok",)
    for optimizer in ("published", default_optimizer(1)):
        assert render(dead_model, "1", [0], steps=1, optimizer=optimizer).config["redirect"] == 0


def test_all_transformed_copies_of_a_filter_are_redirected_alike() -> None:
    masks: list[Tensor] = []

    def run(weights: Any, images: Tensor, redirect: Tensor) -> dict[str, Tensor]:
        masks.append(redirect)
        return {"a": images}

    features = Features(lambda weights, images: {}, {}, {"a": (3, 4, 4)}, {"a": "a"}, True, redirected=run)
    transform = Transform(lambda k: k, lambda image, draw: torch.stack([image, image]))
    forward = make_forward(features, transform, fv.layer("a"), redirect=2)
    forward(torch.zeros(3, 3, 4, 4), torch.tensor([1.0, 0.0, 1.0]), {}, torch.zeros(3, 2), torch.arange(3))
    assert masks[0].tolist() == [1, 1, 0, 0, 1, 1]


class Branches(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + 1 if x.sum() > 0 else x).relu()


@pytest.mark.filterwarnings("ignore:Branches runs with a forward hook")
def test_redirect_is_an_error_for_a_model_with_a_forward_hook() -> None:
    model = load_toy(Branches(), size=8)
    assert make_features(model, ["conv"]).redirected is None
    with pytest.raises(ValueError, match="redirect=1: the model runs with a forward hook"):
        render(model, "conv", [0], steps=2, redirect=1)
    assert render(model, "conv", [0], steps=1).config["redirect"] == 0


@pytest.mark.parametrize("number", [-1, 0.5])
def test_redirect_must_be_a_number_of_steps(tiny: Model, number: Any) -> None:
    with pytest.raises(ValueError, match="redirect must be"):
        render(tiny, "3", [0], steps=2, redirect=number)
