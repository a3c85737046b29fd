"""Redirected gradients: Lucid's rule, image by image, on whatever form an activation has in a module."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featvis_func as fv
from featvis_func.backbone.features import Features, make_features
from featvis_func.backbone.redirected_relu import _FORWARD, _RISES
from featvis_func.engine.forward import make_scoring
from featvis_func.engine.step import init_state, make_step
from featvis_func.models import Model, load_model
from featvis_func.rendering.api import render
from featvis_func.rendering.presets import default_optimizer
from featvis_func.types import Transform
from tests.toys import OneConv


class Lucid(torch.autograd.Function):
    """The rule of ``redirected_relu_grad`` and ``redirected_relu6_grad`` in its own terms: of a loss that falls.

    Where ``lower <= x <= upper`` is what the activation lets through; only in eager mode, entry by entry.
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
            let_through = torch.where(off, torch.zeros_like(loss[i]), loss[i])
            wrong = ((x[i] < lower) & (loss[i] > 0)) | ((x[i] > upper) & (loss[i] < 0))
            if redirect[i] and let_through.norm() == 0:
                result[i] = torch.where(wrong, torch.zeros_like(loss[i]), loss[i])
        return -result, None, None, None, None


def minimum_of(f: Callable[..., Tensor]) -> float:
    """Where a smooth rectifier is least: from there on it rises."""
    x = torch.linspace(-3, 0, 3_000_001, dtype=torch.float64)
    return float(x[f(x).argmin()])


class Applies(nn.Module):
    """A function as it stands in somebody's forward pass."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# What an activation is called -> the forms that it has, and the part where it rises.
PACKINGS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
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


def bounds_of(form: str) -> tuple[float, float]:
    name = form if form in BOUNDS else form.split()[0]
    return BOUNDS[name] if name in BOUNDS else (minimum_of(PACKINGS[form][1]), torch.inf)


def net(*activation: nn.Module) -> nn.Sequential:
    """Before the activation the images' own values, channel by channel; behind it means of them."""
    module = nn.Sequential(nn.Conv2d(3, 3, 1), *activation, nn.AvgPool2d(3, 1))
    first = module[0]
    with torch.no_grad():
        first.get_parameter("weight").copy_(torch.eye(3)[:, :, None, None])
        first.get_parameter("bias").zero_()
    return module.double().eval()


def images_around(levels: Tensor, spread: float = 0.3) -> Tensor:
    """One image of noise about each level: ``(n, 3, 6, 6)``."""
    noise = torch.randn(len(levels), 3, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return levels[:, None, None, None] + spread * noise


def traced(module: nn.Module, layer: str, size: int = 6) -> Features:
    features = make_features(load_model(module, size=size), [layer])
    assert features.exported
    return features


def slope(run: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """The values and the gradient of a fixed mixture of them."""
    images = images.clone().requires_grad_()
    values = run(images)
    mixture = torch.randn(values.shape, generator=torch.Generator().manual_seed(5), dtype=values.dtype)
    return values.detach(), torch.autograd.grad((mixture * values).sum(), images)[0]


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", PACKINGS)
def test_the_gradient_is_lucids_and_the_values_stay(form: str) -> None:
    make, f = PACKINGS[form]
    lower, upper = bounds_of(form)
    module = net(make())
    features = traced(module, "2")
    assert features.redirected is not None
    # Shut from below, shut from above if that can be, partly open; each once asked for and once not.
    levels = torch.tensor([lower - 3.0, min(upper, 20.0) + 3.0, lower], dtype=torch.float64).repeat(2)
    images = images_around(levels)
    redirect = torch.tensor([1.0] * 3 + [0.0] * 3)
    run = features.redirected
    values, gradient = slope(lambda x: run(features.weights, x, redirect)["2"], images)
    plain, own = slope(lambda x: features.apply(features.weights, x)["2"], images)
    assert torch.equal(values, plain)
    exactly(own, slope(module, images)[1])

    def by_hand(x: Tensor) -> Tensor:
        return module[2](Lucid.apply(module[0](x), redirect, f, lower, upper))

    exactly(gradient, slope(by_hand, images)[1])
    # Asked for and shut: another gradient, if not of the wrong sign everywhere. Otherwise: its own, bit for bit.
    shut = [True, upper < torch.inf, False, False, False, False]
    assert [bool((a != b).any()) for a, b in zip(gradient, own, strict=True)] == shut
    assert gradient[0].any()


@pytest.mark.parametrize("kind", _RISES)
def test_an_activation_rises_from_where_the_table_says(kind: str) -> None:
    lower, upper = _RISES[kind]
    inner = [lower + 1e-4] if upper is None else [lower + 1e-4, upper - 1e-4]
    outer = [lower - 1e-4] if upper is None else [lower - 1e-4, upper + 1e-4]

    def slopes(at: list[float]) -> Tensor:
        x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(_FORWARD[kind](x, lower, upper).sum(), x)[0]

    assert (slopes(inner) > 0).all()
    assert (slopes(outer) <= 0).all()


@pytest.mark.parametrize("layer", [nn.LeakyReLU(inplace=True), nn.ELU(), nn.Softplus(), nn.Sigmoid()], ids=str)
def test_what_rises_everywhere_is_left_alone(layer: nn.Module) -> None:
    features = traced(net(layer), "2")
    assert features.redirected is not None
    run = features.redirected
    images = images_around(torch.tensor([-4.0, 4.0], dtype=torch.float64))
    gradient = slope(lambda x: run(features.weights, x, torch.ones(2))["2"], images)[1]
    assert torch.equal(gradient, slope(lambda x: features.apply(features.weights, x)["2"], images)[1])


def test_a_gradient_that_is_not_finite_got_through() -> None:
    features = traced(net(nn.ReLU()), "2")
    assert features.redirected is not None
    run = features.redirected
    images = images_around(torch.tensor([1.0, -3.0], dtype=torch.float64))
    images = images.requires_grad_()
    values = run(features.weights, images, torch.ones(2))["2"]
    gradient = torch.autograd.grad((values * torch.tensor([torch.nan, 1.0])[:, None, None, None]).sum(), images)[0]
    assert gradient[0].isnan().all()
    assert gradient[1].isfinite().all()


# --- the graph that is rewritten --------------------------------------------------------------------------------------


class Merged(nn.Module):
    """Rectified 1 x 1 convolutions of one tensor, which the graph computes as one; the second one is shut."""

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
    """A ReLU before a maximum pool, which the graph computes behind it."""

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


@pytest.mark.parametrize("make", [Merged, Pooled])
def test_rewritten_graphs_obey_the_rule(make: Callable[[], nn.Module]) -> None:
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

    exactly(gradient, slope(lambda x: module(x, rectify), images)[1])
    own = slope(module, images)[1]
    assert [bool((a - b).abs().max() > 1e-6) for a, b in zip(gradient, own, strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    "last", [nn.Conv2d(3, 2, 3), nn.Sequential(nn.Flatten(), nn.Linear(108, 2))], ids=["conv", "linear"]
)
def test_activations_before_the_last_convolution_are_left_alone(last: nn.Module) -> None:
    features = traced(net(nn.ReLU(), last)[:3], "2")
    assert features.redirected is not None
    run = features.redirected
    images = images_around(torch.tensor([-90.0, -90.0], dtype=torch.float64))
    gradient = slope(lambda x: run(features.weights, x, torch.ones(2))["2"], images)[1]
    assert torch.equal(gradient, slope(lambda x: features.apply(features.weights, x)["2"], images)[1])


class Folded(OneConv):
    """An activation whose first axis counts rows of all images."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.relu(x.flatten(0, 1) - 50.0).reshape(x.shape)


def test_an_activation_of_another_first_axis_is_left_alone() -> None:
    module = nn.Sequential(Folded(), nn.Identity())
    features = traced(module, "1")
    assert features.redirected is not None
    run = features.redirected
    images = images_around(torch.zeros(2)).float()
    assert not slope(lambda x: run(features.weights, x, torch.ones(2))["1"], images)[1].any()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_whoever_is_redirected(backend: str) -> None:
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


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asleep() -> Model:
    """Behind the ReLU no filter sees anything in an image near grey."""
    module = net(nn.ReLU(inplace=True)).float()
    with torch.no_grad():
        module[0].get_parameter("bias").fill_(-0.55)
    return load_model(module, mean=(0, 0, 0), std=(1, 1, 1), size=24)


def test_a_filter_that_starts_dead_wakes(asleep: Model) -> None:
    rule = default_optimizer(8, drift=0.0)
    grey = render(asleep, "1", steps=8, optimizer=rule, views="none")
    assert grey.status == ("dead",) * 3
    assert (grey.history == 0).all()
    awake = render(asleep, "1", steps=8, optimizer=rule, views="none", redirect=4)
    assert awake.status == ("ok",) * 3
    assert (awake.history[0] == 0).all()
    assert (awake.scores > 0.05).all()
    assert awake.config["redirect"] == 4


def test_what_still_has_no_gradient_of_its_own_is_dead(asleep: Model) -> None:
    with torch.no_grad():
        asleep.module.get_submodule("0").get_parameter("bias").fill_(-5.0)  # beyond what any image can excite
    result = render(asleep, "1", steps=6, optimizer=default_optimizer(6, drift=0.0), redirect=3)
    assert result.status == ("dead",) * 3


def test_a_gelu_climbs_out_of_its_left_side() -> None:
    """Its own gradient flees to where the value is zero and nothing fires."""
    module = net(nn.GELU()).float()
    with torch.no_grad():
        module[0].get_parameter("weight").mul_(8.0)
        module[0].get_parameter("bias").fill_(-6.0)  # grey gives -2
    model = load_model(module, mean=(0, 0, 0), std=(1, 1, 1), size=24)
    rule = default_optimizer(12, lr=0.2, drift=0.0)
    assert (render(model, "1", steps=12, optimizer=rule, views="none").scores < 0).all()
    assert (render(model, "1", steps=12, optimizer=rule, views="none", redirect=6).scores > 0.1).all()


def test_company_and_their_ages_change_nothing(asleep: Model) -> None:
    alone = [render(asleep, "1", [i], steps=6, redirect=3, size=16) for i in range(3)]
    for width in (2, 3):
        together = render(asleep, "1", steps=6, redirect=3, size=16, batch_size=width)
        for i, one in enumerate(alone):
            torch.testing.assert_close(together.images[i], one.images[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(together.history[:, i], one.history[:, 0], rtol=1e-4, atol=1e-6)


def test_each_filters_own_step_says_whether_it_is_redirected(asleep: Model) -> None:
    goal, rule, image = fv.channel("1"), default_optimizer(8, drift=0.0), fv.fourier(24)
    features = make_features(asleep, ["1"])
    view = fv.views("none", image=(24, 24), size=(24, 24))
    step = make_step(features, image, view, goal, rule, redirect=3)
    filters = torch.tensor([0, 1, 2])
    state = init_state(features, image, goal, rule, fv.filter_keys(0, "1", filters.tolist()))
    state = state._replace(step=torch.tensor([2, 3, 0]))
    _, info = step(features.weights, state, filters)
    assert (info.grad_norm > 0).tolist() == [True, False, True]
    assert info.alive.tolist() == [False, False, False]
    _, info = step(features.weights, state._replace(params=state.params + 1.0), filters)  # all fire
    assert info.alive.tolist() == [True, True, True]


def test_a_compiled_step_goes_on_from_redirected_steps_to_others(asleep: Model) -> None:
    goal, rule, image = fv.channel("1"), default_optimizer(8), fv.pixel(24)
    features = make_features(asleep, ["1"])
    step = make_step(features, image, fv.views("none", image=(24, 24), size=(24, 24)), goal, rule, redirect=2)
    target = torch.tensor([0, 1])
    state = init_state(features, image, goal, rule, fv.filter_keys(0, "1", [0, 1]))
    state = state._replace(step=torch.tensor([0, 1]))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        info = None
        for _ in range(3):
            (state, info), expected = compiled(features.weights, state, target), step(features.weights, state, target)
            torch.testing.assert_close((state.params, *info), (expected[0].params, *expected[1]), rtol=1e-4, atol=1e-5)
    assert info is not None
    assert info.alive.tolist() == [True, True]


def test_what_is_redirected_by_default(asleep: Model) -> None:
    result = render(asleep, "1", [0], steps=8, views="none")
    assert result.config["redirect"] == 16
    assert result.status == ("ok",)
    for optimizer in ("published", default_optimizer(1)):
        assert render(asleep, "1", [0], steps=1, optimizer=optimizer).config["redirect"] == 0


def test_all_views_of_a_filter_are_redirected_alike() -> None:
    seen: list[Tensor] = []

    def run(weights: Any, images: Tensor, redirect: Tensor) -> dict[str, Tensor]:
        seen.append(redirect)
        return {"a": images}

    features = Features(lambda weights, images: {}, {}, {"a": (3, 4, 4)}, {"a": "a"}, True, run)
    view = Transform(lambda k: k, lambda image, draw: torch.stack([image, image]))
    scoring = make_scoring(features, view, fv.layer("a"), redirect=2)
    scoring(torch.zeros(3, 3, 4, 4), torch.tensor([1.0, 0.0, 1.0]), {}, torch.zeros(3, 2), torch.arange(3))
    assert seen[0].tolist() == [1, 1, 0, 0, 1, 1]


class Branches(OneConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + 1 if x.sum() > 0 else x).relu()


@pytest.mark.filterwarnings("ignore:Branches runs through a hook")
def test_a_model_that_runs_through_a_hook_is_refused() -> None:
    model = load_model(Branches(), size=8)
    assert make_features(model, ["conv"]).redirected is None
    with pytest.raises(ValueError, match="redirect=1: the model runs through a hook"):
        render(model, "conv", [0], steps=2, redirect=1)
    assert render(model, "conv", [0], steps=1).config["redirect"] == 0


@pytest.mark.parametrize("number", [-1, 0.5])
def test_other_numbers_are_refused(tiny: Model, number: Any) -> None:
    with pytest.raises(ValueError, match="redirect must be"):
        render(tiny, "3", [0], steps=2, redirect=number)
