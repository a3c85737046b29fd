"""What a step asks of its device, told without one: on the device "meta", which has no values.

Reading a value there fails, and a tensor that stayed on the CPU shows as an operation between two devices. On CUDA each
of them would make the host wait.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # type: ignore[import-not-found]
from torch.utils._python_dispatch import TorchDispatchMode

import featvis_func as fv
from featvis_func import image as images
from featvis_func import objective as o
from featvis_func import transform as t
from featvis_func.backbone import hardware
from featvis_func.backbone import truncate as truncating
from featvis_func.backbone.features import Features
from featvis_func.constants import device_constant
from featvis_func.tree import tree_leaves, tree_map

SIDE = 96
LAYER, WIDTH, EARLIER, EARLIER_WIDTH = "block6.conv", 96, "block3.conv", 80
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default)


class Watch(TorchDispatchMode):
    """Collects the operations that read a value, and those that involve another device than "meta"."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.moves: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.reads.append(str(func))
            return 1
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {}, output)) if isinstance(leaf, Tensor)]
        # A tensor of no axes is a number of Python's, which a kernel takes as an argument.
        if any(tensor.device.type != "meta" and tensor.ndim for tensor in tensors):
            self.moves.append(f"{func} {[tuple(tensor.shape) for tensor in tensors]}")
        return output


def features(model: fv.Model, layers: tuple[str, ...]) -> Features:
    """Features as on a device without a specialization, their weights on "meta"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncating, "specialization", lambda device_type: hardware.GENERIC)
        made = fv.make_features(model, layers, precision="float32")
    return made._replace(weights={name: weight.to("meta") for name, weight in made.weights.items()})


@functools.cache
def texturenet_features(layers: tuple[str, ...]) -> Features:
    return features(fv.load_model("texturenet"), layers)


def step_on_meta(
    objective: o.Objective,
    filters: Sequence[int] | None,
    options: dict[str, Any],
    model: fv.Model | None = None,
) -> tuple[Watch, bool]:
    """Take a step; returns what was seen, and whether the state has the shapes, dtypes and strides of before."""
    made = texturenet_features(objective.layers) if model is None else features(model, objective.layers)
    with Watch():  # while something is built, values may be read: each is 1
        renderer = fv.make_renderer(
            model or "texturenet", objective, filters, features=made, device="meta", compile=False, steps=2, **options
        )
        state, target = renderer.init(list(renderer.filters), 0)
    with Watch() as watch:
        new, _ = renderer.step(renderer.weights, state, target)
    kept = tree_map(lambda a, b: (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), state, new)
    return watch, all(tree_leaves(kept))


def assert_stays(watch: Watch, same: bool) -> None:
    assert watch.reads == []
    assert watch.moves == []
    assert same, "a compiled step would be compiled again, a captured one would be wrong"


def shown(*more: fv.Transform) -> fv.Transform:
    return t.chain(t.warp(t.jitter(4), size=(SIDE, SIDE)), *more)


def reference() -> dict[str, Tensor]:
    return {LAYER: torch.rand(WIDTH, 12, 12)}


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"transforms {name}": {"transforms": name} for name in ("small", "published", "lucid", "maco", "none")},
    **{
        f"optimizer {name}": {"optimizer": name}
        for name in ("activation", "published", "adam", "adamw", "nadam", "sgd")
    },
    "deterministic": {"deterministic": True},
    "saliency": {"saliency": True},
    **{f"image {name}": {"image": name} for name in ("pixel", "phase", "laplacian_pyramid", "cppn", "alpha")},
    # Made by the user without a device.
    "own fourier": {"image": images.fourier(SIDE)},
    "own phase": {"image": images.phase(SIDE)},
    "own pixel": {"image": images.pixel(SIDE)},
    "own pyramid": {"image": images.laplacian_pyramid(SIDE)},
    "own cppn": {"image": images.cppn(SIDE)},
    "own alpha": {"image": images.alpha(SIDE)},
    "own shared": {"image": images.shared(images.fourier_canvas(SIDE), images.pyramid_canvas(SIDE, first=1))},
    "color_jitter": {"transforms": shown(t.color_jitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1))},
    "gaussian_blur": {"transforms": shown(t.gaussian_blur(1.0))},
    "multiview": {
        "transforms": t.multiview(shown(t.color_jitter(hue=0.1), t.normal_noise(0.1), t.uniform_noise(0.1)), 3)
    },
}
OBJECTIVES: dict[str, o.Objective] = {
    "channel": o.channel(LAYER),
    "any_channel": o.any_channel((LAYER, WIDTH), (EARLIER, EARLIER_WIDTH)),
    "neuron": o.neuron(LAYER),
    "region": o.region(LAYER, rows=(0.0, 0.5)),
    "layer": o.layer(LAYER, power=2),
    "direction": o.direction(LAYER, torch.rand(WIDTH)),
    "direction cosine": o.direction(LAYER, torch.rand(WIDTH), similarity="dot_cosine"),
    "direction_neuron": o.direction_neuron(LAYER, torch.rand(WIDTH)),
    "channel_weights": o.channel_weights(LAYER, torch.rand(WIDTH)),
    "style": o.style(reference()),
    "caricature": o.caricature(reference()),
    "inversion": o.inversion(reference()),
    "activation_difference": o.activation_difference(reference()),
    "departure": o.channel(LAYER) - o.departure(LAYER, torch.rand(3, SIDE, SIDE)),
    "diversity": o.channel(LAYER, 3) - o.diversity(LAYER),
    "alignment": o.channel(LAYER, 3) - o.alignment(LAYER),
    "interpolate": o.interpolate(o.channel(LAYER, 1), o.channel(LAYER, 2), count=4),
    "total_variation": o.channel(LAYER) - o.total_variation(),
    "blur": o.channel(LAYER) - o.blur(),
    "l1": o.channel(LAYER) - o.l1(),
    "l2": o.channel(LAYER) - o.l2(),
}


def some_quick(names: Iterable[str], *quick: str) -> list[Any]:
    """The names as parameters, all but a few of them slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_quick(OPTIONS, "default", "transforms maco", "optimizer adamw", "own cppn"))
def test_step_stays_on_its_device_with_every_option(name: str) -> None:
    watch, same = step_on_meta(o.channel(LAYER), range(4), OPTIONS[name])
    assert_stays(watch, same)


@pytest.mark.parametrize("name", some_quick(OBJECTIVES, "any_channel", "direction", "style", "diversity"))
def test_step_stays_on_its_device_with_every_objective(name: str) -> None:
    objective = OBJECTIVES[name]
    watch, same = step_on_meta(objective, None if objective.variants else range(4), {})
    assert_stays(watch, same)


@pytest.mark.parametrize("name", ["opacity", "boundary_complexity"])
def test_step_stays_on_its_device_with_penalties_on_the_opacity(name: str) -> None:
    watch, same = step_on_meta(o.channel(LAYER) - getattr(o, name)(), range(4), {"image": "alpha"})
    assert_stays(watch, same)


@pytest.mark.parametrize("layer", ["2", "3"])
def test_step_stays_on_its_device_with_smoothed_pools(layer: str) -> None:
    """Behind the pool, and with a redirected activation between it and the layer."""
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()
    watch, same = step_on_meta(
        o.channel(layer), range(4), {}, fv.load_model(module, size=20, mean=[0.5] * 3, std=[0.25] * 3)
    )
    assert_stays(watch, same)


def test_watch_sees_a_read_and_a_move() -> None:
    with Watch() as watch:
        bool(torch.zeros(1, device="meta").any())
        torch.zeros(3).to("meta")
    assert watch.reads
    assert watch.moves


@pytest.mark.parametrize("inside", [True, False])
def test_constant_is_copied_once(inside: bool) -> None:
    """Also if a function transform makes the first call, which must not leave a tensor of its own behind."""
    like = torch.zeros(2, device="meta")
    value = device_constant(torch.ones(2))
    calls: list[Callable[[], Any]] = [
        lambda: torch.func.grad(lambda x: (x * value(x)).sum())(like),
        lambda: torch.func.vmap(torch.func.grad(lambda x: (x * value(x)).sum()))(like[None]),
        lambda: value(like),
    ]
    with Watch() as first:
        calls[0 if inside else -1]()
    assert len(first.moves) == 1
    with Watch() as watch:
        for call in calls:
            call()
    assert not watch.moves
    assert not is_functorch_wrapped_tensor(value(like))


def test_constant_converts_unless_it_must_not() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    assert device_constant(torch.ones(2))(like).dtype == torch.float64
    assert device_constant(torch.arange(2), cast=False)(like).dtype == torch.int64
