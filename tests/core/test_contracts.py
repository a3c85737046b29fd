"""One table of every component of the functional core, through the properties that all of them promise."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from featvis_func import image as images
from featvis_func import objective as objectives
from featvis_func import optimizer as optimizers
from featvis_func import random
from featvis_func import transform as transforms
from featvis_func.rendering.presets import VIEWS, default_optimizer, published_optimizer, views
from featvis_func.tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from featvis_func.types import Image, Optimizer, Transform


class Case(NamedTuple):
    """A pure function of pytrees of tensors, and how to make its arguments."""

    function: Callable[..., Any]
    inputs: Callable[[int, torch.dtype], tuple[Any, ...]]
    """(seed, dtype of the floats) -> arguments, of the same shapes for every seed."""
    smooth: tuple[int, ...] = ()
    """The arguments in which it is differentiable."""
    random: bool = False
    """Whether its only argument is a key on which the result depends."""
    backend: str = "inductor"
    """Draws pass through inductor in test_random and in the default optimizer, objectives in a step; elsewhere tracing
    them is enough."""


def floats(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def of_key(function: Callable[..., Any], *, random_result: bool = True) -> Case:
    return Case(function, lambda seed, _: (random.key(seed),), random=random_result, backend="aot_eager")


def image_cases(name: str, image: Image, *, random_start: bool = True, backend: str = "aot_eager") -> dict[str, Case]:
    start = image.init(random.key(0))
    leaves, layout = tree_flatten(start)
    shape = tuple(image.decode(start).shape)

    def params(seed: int, dtype: torch.dtype, *, many: tuple[int, ...] = ()) -> tuple[Any, ...]:
        drawn = [floats(seed + 7 * i, (*many, *leaf.shape), dtype) for i, leaf in enumerate(leaves)]
        return (tree_unflatten(drawn, layout),)

    def picture(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return (torch.sigmoid(floats(seed, shape, dtype)),)

    cases = {
        f"{name} init": of_key(image.init, random_result=random_start),
        f"{name} decode": Case(image.decode, params, smooth=(0,), backend=backend),
    }
    if image.encode is not None:
        cases[f"{name} encode"] = Case(image.encode, picture, smooth=(0,), backend="aot_eager")
    if image.share_params is not None:
        several = partial(params, many=(3,))
        cases[f"{name} couple"] = Case(image.share_params, several, smooth=(0,), backend="aot_eager")
    return cases


def transform_cases(
    name: str,
    transform: Transform,
    shape: tuple[int, ...] = (2, 4, 5),
    *,
    random_draw: bool = True,
    backend: str = "inductor",
) -> dict[str, Case]:
    def inputs(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return floats(seed, shape, dtype), transform.draw(random.key(seed))

    draw = of_key(transform.draw, random_result=random_draw)
    return {f"{name} draw": draw, f"{name} apply": Case(transform.apply, inputs, smooth=(0,), backend=backend)}


def objective_cases(goal: objectives.Objective, **shapes: tuple[int, ...]) -> dict[str, Case]:
    def inputs(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        activations = {name: floats(seed + 7 * i, shape, dtype) for i, (name, shape) in enumerate(shapes.items())}
        return activations, torch.tensor(seed % 3)

    def both(activations: dict[str, Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        return goal.score(activations, target), goal.activation_map(activations, target)

    return {f"{goal} of {'; '.join(map(str, shapes.values()))}": Case(both, inputs, smooth=(0,), backend="aot_eager")}


def across_cases(goal: objectives.Objective, shape: tuple[int, ...]) -> dict[str, Case]:
    """What couples images, of three of them; under ``vmap`` over runs."""

    def inputs(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return {"a": floats(seed, (3, *shape), dtype)}, torch.arange(3)

    across = goal.batch_score
    assert across is not None
    return {f"{goal} across {shape}": Case(across, inputs, smooth=(0,), backend="aot_eager")}


def optimizer_cases(name: str, rule: Optimizer, *, backend: str = "inductor") -> dict[str, Case]:
    def tree(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"a": floats(seed, (3,), dtype), "b": floats(seed + 1, (2, 2), dtype)}

    def start(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return tree(seed, dtype), random.key(seed)

    def inputs(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        params = tree(seed + 2, dtype)
        state = rule.init(params, random.key(seed))
        return tree(seed, dtype), rule.update(tree(seed + 4, dtype), state, params)[1], params

    update = Case(rule.update, inputs, smooth=(0,), backend=backend)
    stateless = not tree_leaves(rule.init(*start(0, torch.float32)))
    init = {} if stateless else {f"{name} init": Case(rule.init, start, backend="aot_eager")}
    return {**init, f"{name} update": update}


WARPS: dict[str, tuple[transforms.Affine, ...]] = {
    "jitter": (transforms.jitter(1.5),),
    "scale": (transforms.scale(0.8, 1.2),),
    "scale choices": (transforms.scale(choices=[0.5, 0.9, 1.1]),),
    "rotate": (transforms.rotate(20),),
    "rotate choices": (transforms.rotate(choices=[-30, 5, 60]),),
    "pad and shift": (transforms.pad(1), transforms.jitter(0.5)),
    "crop and shift": (transforms.pad(-0.5), transforms.jitter(0.5)),
    "all steps": (transforms.pad(1), transforms.jitter(1), transforms.scale(), transforms.rotate(), transforms.pad(-1)),
}
CROPS: dict[str, tuple[transforms.Affine, ...]] = {
    "flip": (transforms.flip(vertical=True),),
    "crop": (transforms.crop((3, 2)),),
    "box": (transforms.box_crop(),),
    "uniform box": (transforms.box_crop(0.2, 0.9, normal=None, centre_sd=None),),
    "crops among others": (
        transforms.rotate(20),
        transforms.crop((3, 4)),
        transforms.jitter(1),
        transforms.box_crop(),
        transforms.crop_or_pad((2, 5)),
        transforms.flip(),
    ),
}
VIEWS_OF_PIXELS: dict[str, tuple[Transform, tuple[int, ...]]] = {
    "blur": (transforms.gaussian_blur((0.5, 1.5)), (2, 4, 5)),
    "roll": (transforms.roll(3), (2, 4, 5)),
    "normal noise": (transforms.normal_noise(0.1), (2, 3, 5)),
    "uniform noise": (transforms.uniform_noise(0.1), (2, 3, 5)),
    "color jitter": (transforms.color_jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2), (3, 4, 5)),
    "blur of views": (transforms.gaussian_blur((0.5, 0.8)), (2, 3, 4, 5)),
    "roll of views": (transforms.roll(2), (2, 3, 4, 5)),
    "color jitter of views": (transforms.color_jitter(contrast=0.2, hue=0.1), (2, 3, 2, 3)),
    "color jitter 4 channels": (transforms.color_jitter(brightness=(0.5, 2.0)), (4, 2, 3)),
    **{f"over {kind} background": (transforms.over_background(kind), (3, 4, 5)) for kind in transforms.BACKGROUNDS},
    "multiview": (
        transforms.chain(
            transforms.multiview(transforms.warp(transforms.crop(3), size=(4, 3)), 2),
            transforms.uniform_noise(0.1),
            transforms.normalize((0.1, 0.2, 0.3), (0.5, 2.0, 1.0)),
        ),
        (3, 4, 5),
    ),
}
SCHEDULES: dict[str, optimizers.Schedule] = {
    "constant": optimizers.constant(0.1),
    "linear_decay": optimizers.linear_decay(0.4, 0.2, 3),
    "cosine_decay": optimizers.cosine_decay(0.4, 0.2, 3),
    "exponential_decay": optimizers.exponential_decay(0.4, 0.5),
    "warmup": optimizers.warmup(optimizers.linear_decay(0.4, 0.2, 3), 2),
    "piecewise": optimizers.piecewise([0.4, optimizers.cosine_decay(0.2, 0.1, 3)], [2]),
}

CASES: dict[str, Case] = {
    **image_cases("fourier even", images.fourier((4, 6)), backend="inductor"),
    **image_cases("fourier odd 1 channel", images.fourier((5, 7), channels=1), backend="inductor"),
    **image_cases("fourier mixed 4 channels", images.fourier((3, 4), channels=4, decay=0.5)),
    **image_cases("fourier 1 pixel", images.fourier(1)),
    **image_cases("fourier own matrix", images.fourier((4, 3), channels=2, correlation=[[1.0, 0.5], [0.0, 2.0]])),
    **image_cases("pixel", images.pixel((3, 4)), backend="inductor"),
    **image_cases("pixel 1 channel", images.pixel(3, channels=1)),
    **image_cases("pixel 4 channels", images.pixel((1, 5), channels=4)),
    **image_cases("phase even", images.phase((4, 6)), backend="inductor"),
    **image_cases("phase odd 2 channels", images.phase((5, 3), channels=2, decay=0.5, contrast=2.0)),
    **image_cases("phase own magnitude", images.phase((3, 4), magnitude=torch.arange(9.0).reshape(3, 3))),
    **image_cases("pyramid", images.laplacian_pyramid((4, 6), levels=3), backend="inductor"),
    **image_cases("pyramid odd 1 channel", images.laplacian_pyramid((5, 3), channels=1)),
    **image_cases("cppn", images.cppn((3, 4), hidden=3, layers=2), backend="inductor"),
    **image_cases("cppn unbiased 4 channels", images.cppn(3, channels=4, hidden=2, layers=1, activation="unbiased")),
    **image_cases("alpha", images.alpha((3, 4))),
    **image_cases("alpha of grey", images.alpha((4, 3), channels=1)),
    **image_cases(
        "shared", images.shared(images.fourier_canvas((4, 5)), images.pyramid_canvas((4, 5), levels=2, first=1))
    ),
    **image_cases(
        "shared low", images.shared(images.pixel_canvas(4, channels=1), images.fourier_canvas(4, channels=1, below=0.3))
    ),
    **image_cases("start", images.from_image(images.fourier((3, 4)), torch.full((3, 3, 4), 0.3)), random_start=False),
    **image_cases("noisy start", images.from_image(images.laplacian_pyramid(4), torch.full((3, 4, 4), 0.3), noise=0.1)),
    **{
        name: case
        for label, steps in WARPS.items()
        for name, case in transform_cases(f"warp {label}", transforms.warp(*steps, size=(3, 4))).items()
    },
    **{
        name: case
        for label, steps in CROPS.items()
        for name, case in transform_cases(
            f"warp {label}", transforms.warp(*steps, size=(3, 4)), backend="aot_eager"
        ).items()
    },
    **transform_cases(
        "warp crop or pad",
        transforms.warp(transforms.crop_or_pad(3), size=(3, 3)),
        random_draw=False,
        backend="aot_eager",
    ),
    **{
        name: case
        for label, (view, shape) in VIEWS_OF_PIXELS.items()
        for name, case in transform_cases(label, view, shape, backend="aot_eager").items()
    },
    **transform_cases("warp of nothing", transforms.warp(size=(3, 4)), random_draw=False),
    **transform_cases("warp far down", transforms.warp(transforms.jitter(2), size=(2, 3)), (1, 9, 10)),
    **transform_cases(
        "warp deterministic",
        transforms.warp(transforms.jitter(2), transforms.rotate(9), size=(3, 4), deterministic=True),
    ),
    **transform_cases("warp padding", transforms.warp(transforms.jitter(3), size=(4, 5), padding=0.0)),
    **{
        name: case
        for preset in VIEWS
        for name, case in transform_cases(
            f"views {preset}",
            views(preset, image=(24, 20), size=(16, 12)),
            (1, 24, 20),
            random_draw=preset != "none",
            backend="aot_eager" if preset == "maco" else "inductor",
        ).items()
    },
    **{
        name: case
        for name, case in transform_cases("normalize", transforms.normalize((0.1, 0.2), (0.5, 2.0))).items()
        if name == "normalize apply"  # its draw holds no tensor
    },
    **transform_cases(
        "transform chain",
        transforms.chain(
            transforms.warp(transforms.jitter(1), size=(5, 5)),
            transforms.normalize((0.1, 0.2), (0.5, 2.0)),
            transforms.warp(transforms.rotate(9), size=(2, 3)),
        ),
    ),
    **objective_cases(objectives.channel("a"), a=(3, 2, 4)),
    **objective_cases(objectives.channel("a", 1), a=(3, 2, 4)),
    **objective_cases(objectives.channel("a"), a=(5, 3)),
    **objective_cases(objectives.channel("a"), a=(4,)),
    **objective_cases(objectives.neuron("a"), a=(3, 3, 4)),
    **objective_cases(objectives.neuron("a", 2, position=(0, 3)), a=(3, 2, 4)),
    **objective_cases(objectives.neuron("a", position=1), a=(5, 3)),
    **objective_cases(objectives.neuron("a"), a=(4,)),
    **objective_cases(objectives.layer("a"), a=(3, 2, 4)),
    **objective_cases(objectives.layer("a", power=2), a=(5, 3)),
    **objective_cases(
        2 * (objectives.channel("a") - 0.5 * objectives.neuron("b", 1)) + -objectives.layer("c", power=2),
        a=(3, 2, 2),
        b=(4, 3),
        c=(6,),
    ),
    **objective_cases(objectives.direction("a", [1.0, -2.0, 0.5]), a=(3, 2, 4)),
    **objective_cases(objectives.direction("a", [1.0, -2.0, 0.5], similarity="cosine"), a=(5, 3)),
    **objective_cases(objectives.direction_neuron("a", [1.0, -2.0], similarity="dot_cosine", power=1), a=(2, 2, 2)),
    **objective_cases(objectives.channel_weights("a", [1.0, -2.0, 0.5]), a=(3,)),
    **objective_cases(objectives.region("a", rows=(0.0, 0.6), columns=(0.5, 1.0)), a=(3, 3, 4)),
    **objective_cases(objectives.logit("a"), a=(4,)),
    **objective_cases(objectives.activation_difference({"a": floats(9, (3, 2, 4), torch.float64)}), a=(3, 2, 4)),
    **objective_cases(objectives.inversion({"a": floats(9, (5, 3), torch.float64)}), a=(5, 3)),
    **objective_cases(objectives.caricature({"a": floats(9, (3, 2, 4), torch.float64)}), a=(3, 2, 4)),
    **objective_cases(objectives.style({"a": floats(9, (3, 2, 2), torch.float64)}, loss="l2"), a=(3, 2, 4)),
    **across_cases(objectives.diversity("a"), (4, 2, 3)),
    **across_cases(objectives.alignment("a"), (5, 4)),
    **across_cases(objectives.channel("a") - 2.0 * objectives.diversity("a"), (4,)),
    **objective_cases(objectives.departure("a", torch.zeros(3, 8, 8)), **{"a": (3, 2, 4), "<picture>a": (3, 2, 4)}),
    **objective_cases(
        objectives.interpolate(objectives.channel("a", 0), objectives.neuron("b", 1), count=4), a=(3, 2, 4), b=(2, 3, 3)
    ),
    **{
        name: case
        for penalty in (
            objectives.total_variation(),
            objectives.l1(2.0),
            objectives.l2(),
            objectives.boundary_complexity(1),
            objectives.opacity(),
        )
        for name, case in objective_cases(penalty, **{objectives.IMAGE: (2, 4, 5)}).items()
    },
    **optimizer_cases("adam", optimizers.adam(0.05)),
    **optimizer_cases("adam schedule", optimizers.adam(lambda step: 0.1 / (1 + step), betas=(0.5, 0.9), eps=1e-3)),
    **optimizer_cases("adam with decay", optimizers.adam(0.05, weight_decay=0.1), backend="aot_eager"),
    **optimizer_cases("adamw", optimizers.adamw(optimizers.linear_decay(0.4, 0.2, 3)), backend="aot_eager"),
    **optimizer_cases("nadam", optimizers.nadam(optimizers.cosine_decay(0.4, 0.2, 3)), backend="aot_eager"),
    **optimizer_cases("sgd", optimizers.sgd(0.05), backend="aot_eager"),
    **optimizer_cases(
        "sgd nesterov",
        optimizers.sgd(optimizers.constant(0.05), momentum=0.9, nesterov=True, weight_decay=0.1),
        backend="aot_eager",
    ),
    **{
        f"schedule {name}": Case(schedule, lambda seed, _: (torch.tensor(seed),), backend="aot_eager")
        for name, schedule in SCHEDULES.items()
    },
    **optimizer_cases("normalize_gradient", optimizers.normalize_gradient()),
    **optimizer_cases("clip_norm", optimizers.clip_norm(0.5)),
    **optimizer_cases("add_drift", optimizers.add_drift(0.1)),
    **optimizer_cases("add_noise", optimizers.add_noise(0.1), backend="aot_eager"),
    **optimizer_cases("default optimizer", default_optimizer(8)),
    **optimizer_cases("published optimizer", published_optimizer()),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def close(actual: Any, expected: Any, *, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@every_case
def test_vmap_equals_loop(case: Case) -> None:
    single = [case.inputs(seed, torch.float32) for seed in range(3)]
    together = tree_map(lambda *leaves: torch.stack(leaves), *single)
    apart = [case.function(*inputs) for inputs in single]
    close(vmap(case.function)(*together), tree_map(lambda *leaves: torch.stack(leaves), *apart))


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@every_case
def test_compiled_equals_eager_without_recompiling(case: Case) -> None:
    # As in compile_step: without it inductor takes long over the generator's rounds.
    options: dict[str, Any] | None = {"realize_opcount_threshold": 10} if case.backend == "inductor" else None
    compiled = torch.compile(case.function, fullgraph=True, backend=case.backend, options=options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            inputs = case.inputs(seed, torch.float32)
            close(compiled(*inputs), case.function(*inputs), tolerance=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.random])
def test_the_key_decides(name: str) -> None:
    case = CASES[name]
    first, again, *others = (tree_leaves(case.function(random.key(seed))) for seed in (5, 5, *range(6, 16)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_case
def test_dtype_and_device_are_kept(case: Case, dtype: torch.dtype) -> None:
    """On the meta device any constant left on the CPU fails to meet its operand."""
    inputs = case.inputs(0, dtype)
    expected = dtype if any(leaf.is_floating_point() for leaf in tree_leaves(inputs)) else torch.float32
    devices = ["cpu", "meta"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        moved = tree_map(lambda leaf, device=device: leaf.to(device), inputs)
        results = tree_leaves(case.function(*moved))
        assert results
        assert {leaf.device.type for leaf in results} == {device}
        assert {leaf.dtype for leaf in results} <= {expected, torch.int64}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.smooth])
def test_gradient_equals_finite_differences(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(1, torch.float64)
    chosen, layout = tree_flatten([inputs[i] for i in case.smooth])

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        replaced = dict(zip(case.smooth, tree_unflatten(list(leaves), layout), strict=True))
        result = case.function(*(replaced.get(i, own) for i, own in enumerate(inputs)))
        return tuple(leaf for leaf in tree_leaves(result) if leaf.is_floating_point())

    leaves = [leaf.clone().requires_grad_() for leaf in chosen]
    large = sum(leaf.numel() for leaf in leaves) > 200
    assert torch.autograd.gradcheck(function, leaves, fast_mode=large)


@every_case
def test_arguments_are_not_written_to(case: Case) -> None:
    inputs = case.inputs(2, torch.float32)
    before = tree_map(torch.clone, inputs)
    versions = [leaf._version for leaf in tree_leaves(inputs)]
    case.function(*inputs)
    close(inputs, before, tolerance=0.0)
    assert [leaf._version for leaf in tree_leaves(inputs)] == versions


@every_case
def test_result_shares_no_state_with_a_second_call(case: Case) -> None:
    """Nothing is remembered between calls: the first result stays, and a repeat equals it."""
    inputs, others = case.inputs(3, torch.float32), case.inputs(4, torch.float32)
    first = case.function(*inputs)
    kept = tree_map(torch.clone, first)
    case.function(*others)
    close(first, kept, tolerance=0.0)
    close(case.function(*inputs), kept, tolerance=0.0)
