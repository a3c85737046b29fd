"""Smoothed gradients of max pools: compared with plain loops, in graphs of every kind, and as an option."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, unfold

import featvis_func as fv
from featvis_func.backbone.features import Features, make_features
from featvis_func.backbone.smoothed_pools import smoothed
from featvis_func.models import Model
from tests.toys import load_toy

SIZE = 20
pytestmark = pytest.mark.usefixtures("one_thread")


# --- the formula ------------------------------------------------------------------------------------------------------


def in_loops(x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """The gradient of one channel ``(h, w)``, window by window."""
    result = torch.zeros_like(x)
    for i, j in itertools.product(*map(range, g.shape)):
        rows, columns = (
            [k for k in range(at * s - p, at * s - p + length) if 0 <= k < side]
            for at, s, p, length, side in zip((i, j), stride, padding, kernel, x.shape, strict=True)
        )
        places = list(itertools.product(rows, columns))
        largest = max(places, key=lambda place: float(x[place]))
        if x[largest] <= 0:
            result[largest] += g[i, j]
            continue
        # Of torch's average pools: positions of the padding count, positions behind it do not.
        n = math.prod(
            min(at * s - p + length, side + p) - (at * s - p)
            for at, s, p, length, side in zip((i, j), stride, padding, kernel, x.shape, strict=True)
        )
        rms = math.sqrt(sum(max(float(x[place]), 0.0) ** 2 for place in places) / n)
        for place in places:
            result[place] += g[i, j] * max(float(x[place]), 0.0) / (n * rms)
    return result


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil_mode"),
    [([3, 3], [2, 2], [0, 0], False), ([3, 3], [2, 2], [0, 0], True), ([3, 3], [1, 1], [1, 1], False),
     ([2, 3], [2, 1], [1, 0], False), ([2, 2], [3, 3], [0, 0], False), ([5, 5], [2, 3], [2, 2], True)],
)  # fmt: skip
def test_gradient_equals_a_plain_loop(
    kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 10, 11, generator=generator, dtype=torch.float64) - 0.8  # some windows have nothing above 0
    x.requires_grad_()
    y = smoothed(x, max_pool2d(x, kernel, stride, padding, 1, ceil_mode), kernel, stride, padding, ceil_mode)
    assert torch.equal(y, max_pool2d(x, kernel, stride, padding, 1, ceil_mode))
    assert bool((y <= 0).any())
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (actual,) = torch.autograd.grad(y, x, g)
    for image, channel in itertools.product(range(2), range(3)):
        expected = in_loops(x[image, channel].detach(), g[image, channel], kernel, stride, padding)
        torch.testing.assert_close(actual[image, channel], expected)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_gradient_does_not_depend_on_the_scale_of_the_values(scale: float) -> None:
    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(smoothed(x, max_pool2d(x.detach(), 2), [2, 2], [2, 2], [0, 0], False).sum(), x)[0]

    x = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gradient(x * scale), gradient(x))


@pytest.mark.parametrize("value", [1e-44, 4e-23, 1e-20, 1e20, 1e38])
@pytest.mark.parametrize("rectified", [True, False])
def test_squares_that_float32_does_not_hold_give_no_infinity(value: float, rectified: bool) -> None:
    x = torch.full((1, 1, 2, 2), value, requires_grad=True)
    y = smoothed(x, max_pool2d(x.detach(), 2), [2, 2], [2, 2], [0, 0], False, rectified)
    assert torch.isfinite(torch.autograd.grad(y.sum() * 1e10, x)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_images_without_a_positive_value_have_the_pools_own_gradient(dtype: torch.dtype) -> None:
    """Also where a position in no window is larger than all maxima, in one image beside another."""
    x = -torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)).to(dtype) - 0.1
    x[0, :, 2::3], x[1, 0, 0, 0] = 5000.0, 2.0
    x.requires_grad_()
    y = max_pool2d(x, 2, 3)
    (actual,) = torch.autograd.grad(smoothed(x, y, [2, 2], [3, 3], [0, 0], False).sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(y.sum(), x)
    expected[1, 0, 0, 0] = 0.5  # the window's rms is half of its one positive value
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected)


# --- graphs -----------------------------------------------------------------------------------------------------------


class Reference(nn.Module):
    """A max pool whose gradient is that of the formula, by autograd through a weighted sum of each window."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        pool, y = self.pool, self.pool(x)
        k, s, p = ((v, v) if isinstance(v, int) else v for v in (pool.kernel_size, pool.stride, pool.padding))
        n, c = x.shape[:2]
        windows = unfold(x, k, stride=s, padding=p).reshape(n, c, k[0] * k[1], *y.shape[2:])
        positive = torch.where(y[:, :, None] > 0, windows, 1.0).clamp_min(0)
        rms = positive.square().mean(2).sqrt()
        return torch.where(y > 0, y.detach() + rms - rms.detach(), y)


def conv(c: int, d: int) -> nn.Conv2d:
    return nn.Conv2d(c, d, 3, padding=1)


class Branches(nn.Module):
    """As in Inception: a pool of concatenated ReLUs, merged 1 x 1 siblings, and a sum of two ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other, self.last = conv(3, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), conv(8, 5)
        self.inner, self.outer = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        both = torch.cat([self.one(x).relu(), self.other(x).relu()], 1)
        return self.last(self.outer(self.inner(both) + both))


NETS: dict[str, Callable[[], nn.Module]] = {
    "pool behind a ReLU": lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(3, 2), conv(8, 5)),
    "ReLU in place": lambda: nn.Sequential(conv(3, 8), nn.ReLU(inplace=True), nn.MaxPool2d(2), conv(8, 5)),
    "pool before a ReLU": lambda: nn.Sequential(conv(3, 8), nn.MaxPool2d((3, 2), (2, 1), 1), nn.ReLU(), conv(8, 5)),
    "no ReLU": lambda: nn.Sequential(conv(3, 8), nn.MaxPool2d(2), conv(8, 5)),
    "GELU": lambda: nn.Sequential(conv(3, 8), nn.GELU(), nn.MaxPool2d(2), conv(8, 5)),
    "two pools": lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1), conv(8, 5)),
    "pool last": lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(3, 2)),
    "branches": Branches,
}


def made(make: Callable[[], nn.Module]) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_toy(make().eval(), size=SIZE)


def gradient(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    values = run(images)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((values * weights).sum(), images)[0]


def images_for(model: Model) -> Tensor:
    return torch.randn(2, model.channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def run_of(features: Features, name: str, redirect: float = 0.0) -> Callable[[Tensor], Tensor]:
    assert features.smoothed is not None
    run = features.smoothed
    return lambda images: run(features.weights, images, torch.full((len(images),), redirect))[name]


@pytest.mark.parametrize("name", NETS)
def test_values_are_the_same_and_gradients_those_of_the_formula(name: str) -> None:
    model = made(NETS[name])
    features = make_features(model, ["output"], precision="float32")
    images = images_for(model)
    assert torch.equal(run_of(features, "output")(images), features.apply(features.weights, images)["output"])
    actual = gradient(run_of(features, "output"), images)
    for path, pool in list(model.module.named_modules()):
        if isinstance(pool, nn.MaxPool2d) and pool.stride != 1:
            model.module.set_submodule(path, Reference(pool))
    torch.testing.assert_close(actual, gradient(model.module, images), rtol=1e-4, atol=1e-5)
    own = gradient(lambda images: features.apply(features.weights, images)["output"], images)
    assert (own - actual).norm() > 0.05 * own.norm()


def test_layers_together_have_the_gradients_of_each_alone() -> None:
    """A pool that is a layer itself, with a ReLU behind it that is redirected, is smoothed as it is for a later one."""
    model = made(lambda: nn.Sequential(conv(3, 8), nn.MaxPool2d(2), nn.ReLU(), conv(8, 5), nn.ReLU()))
    images = images_for(model)
    together = make_features(model, ["2", "4"], precision="float32")
    for name in ("2", "4"):
        alone = make_features(model, [name], precision="float32")
        expected = gradient(run_of(alone, name, 1.0), images)
        torch.testing.assert_close(gradient(run_of(together, name, 1.0), images), expected, rtol=1e-5, atol=1e-6)


def test_a_redirected_gradient_goes_through_a_pool_as_without_smoothing() -> None:
    model = made(lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2)))
    with torch.no_grad():
        model.module.get_submodule("0").bias -= 100.0  # type: ignore[operator]
    features = make_features(model, ["2"], precision="float32")
    assert features.redirected is not None
    run, mask, images = features.redirected, torch.ones(2), images_for(model)
    expected = gradient(lambda images: run(features.weights, images, mask)["2"].sum(), images)
    assert expected.abs().max() > 0
    actual = gradient(lambda images: run_of(features, "2", 1.0)(images).sum(), images)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("make", [
    lambda: conv(3, 4),
    lambda: nn.Sequential(conv(3, 4), nn.MaxPool2d(2, dilation=2)),
    lambda: nn.Sequential(conv(3, 4), nn.MaxPool2d(3, 1)),
])  # fmt: skip
def test_nothing_is_smoothed_without_a_pool_that_can_be(make: Callable[[], nn.Module]) -> None:
    assert make_features(made(make), ["output"]).smoothed is None


# --- the option -------------------------------------------------------------------------------------------------------


def render(model: Model, **options: Any) -> fv.Result:
    return fv.render(model, "3", [0, 3], steps=4, precision="float32", progress=False, **options)


@pytest.mark.slow
def test_the_default_optimizer_smooths_pools_and_others_do_not() -> None:
    model = made(NETS["pool behind a ReLU"])
    for optimizer, expected in (("default", "yes"), ("activation", "no"), (fv.optimizer.sgd(0.1), "no")):
        images = {
            value: render(model, optimizer=optimizer, smooth_pools=value).images for value in ("auto", True, "no")
        }
        assert not torch.equal(images[True], images["no"])
        assert torch.equal(images["auto"], images[True if expected == "yes" else "no"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pool behind a ReLU", "no ReLU"])
def test_compiled_step_equals_the_eager_one(name: str) -> None:
    model = made(lambda: nn.Sequential(*NETS[name]().children(), nn.ReLU()))
    objective = fv.objective.layer("4" if name == "pool behind a ReLU" else "3")
    fast: dict[str, Any] = {
        "steps": 3,
        "precision": "float32",
        "optimizer": "sgd",
        "image": "pixel",
        "transforms": "none",
    }
    eager, compiled = (
        fv.render(model, objective, [0, 3], **fast, compile=compile, smooth_pools=True) for compile in (False, True)
    )
    torch.testing.assert_close(compiled.images, eager.images, rtol=0, atol=1e-4)


class DependsOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = conv(3, 4), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x)) if float(x.sum()) > -1e9 else x


@pytest.mark.filterwarnings("ignore::UserWarning")  # that the model cannot be exported
def test_a_model_that_runs_with_a_hook_is_not_smoothed() -> None:
    model = made(DependsOnValues)
    options: dict[str, Any] = {"steps": 2, "progress": False}
    plain = fv.render(model, "pool", [0], smooth_pools=False, **options).images
    assert torch.equal(fv.render(model, "pool", [0], **options).images, plain)
    with pytest.raises(ValueError, match="smooth_pools: the model runs with a forward hook"):
        fv.render(model, "pool", [0], smooth_pools=True, **options)
