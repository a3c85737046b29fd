"""Properties that every component of the functional core has, tested on one table of components."""

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
from featvis_func.rendering.optimizers import default_optimizer, published_optimizer
from featvis_func.rendering.presets import named_transform
from featvis_func.tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from featvis_func.types import Image, Optimizer, Transform


class Case(NamedTuple):
    """A pure function of pytrees of tensors, and how to make its arguments."""

    function: Callable[..., Any]
    inputs: Callable[[int, torch.dtype], tuple[Any, ...]]
    """(seed, dtype of the floats) -> arguments, of the same shapes for every seed."""
    smooth: tuple[int, ...] = ()
    """The arguments in which it is differentiable."""
    of_key: bool = False
    """Whether its only argument is a key."""
    random: bool = False
    """Whether its result depends on the key."""


def floats(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def key_case(function: Callable[..., Any], *, random_result: bool = True) -> Case:
    return Case(function, lambda seed, _: (random.key(seed),), of_key=True, random=random_result)


def image_cases(name: str, image: Image, *, random_init: bool = True) -> dict[str, Case]:
    start = image.init(random.key(0))
    leaves, layout = tree_flatten(start)
    shape = tuple(image.decode(start).shape)

    def params(seed: int, dtype: torch.dtype, *, batch: tuple[int, ...] = ()) -> tuple[Any, ...]:
        values = [floats(seed + 7 * i, (*batch, *leaf.shape), dtype) for i, leaf in enumerate(leaves)]
        return (tree_unflatten(values, layout),)

    def pixels(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return (torch.sigmoid(floats(seed, shape, dtype)),)

    cases = {
        f"{name} init": key_case(image.init, random_result=random_init),
        f"{name} decode": Case(image.decode, params, smooth=(0,)),
    }
    if image.encode is not None:
        cases[f"{name} encode"] = Case(image.encode, pixels, smooth=(0,))
    if image.share_params is not None:
        cases[f"{name} share_params"] = Case(image.share_params, partial(params, batch=(3,)), smooth=(0,))
    return cases


def transform_cases(
    name: str, transform: Transform, shape: tuple[int, ...] = (2, 4, 5), *, random_draw: bool = True
) -> dict[str, Case]:
    def inputs(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return floats(seed, shape, dtype), transform.draw(random.key(seed))

    cases = {f"{name} apply": Case(transform.apply, inputs, smooth=(0,))}
    if tree_leaves(transform.draw(random.key(0))):
        cases[f"{name} draw"] = key_case(transform.draw, random_result=random_draw)
    return cases


def objective_cases(objective: objectives.Objective, **shapes: tuple[int, ...]) -> dict[str, Case]:
    """The score and the activation map, for activations of these shapes."""

    def inputs(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        activations = {name: floats(seed + 7 * i, shape, dtype) for i, (name, shape) in enumerate(shapes.items())}
        return activations, torch.tensor(seed % 3)

    def score_and_map(activations: dict[str, Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        return objective.score(activations, target), objective.activation_map(activations, target)

    return {f"{objective} of {'; '.join(map(str, shapes.values()))}": Case(score_and_map, inputs, smooth=(0,))}


def batch_score_cases(objective: objectives.Objective, shape: tuple[int, ...]) -> dict[str, Case]:
    """The term that depends on all images of a run, here of 3 images."""

    def inputs(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return {"a": floats(seed, (3, *shape), dtype)}, torch.arange(3)

    assert objective.batch_score is not None
    return {f"{objective} batch_score of {shape}": Case(objective.batch_score, inputs, smooth=(0,))}


def optimizer_cases(name: str, optimizer: Optimizer) -> dict[str, Case]:
    def tree(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"a": floats(seed, (3,), dtype), "b": floats(seed + 1, (2, 2), dtype)}

    def params_and_key(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return tree(seed, dtype), random.key(seed)

    def inputs(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        params = tree(seed + 2, dtype)
        state = optimizer.init(params, random.key(seed))
        return tree(seed, dtype), optimizer.update(tree(seed + 4, dtype), state, params)[1], params

    cases = {f"{name} update": Case(optimizer.update, inputs, smooth=(0,))}
    if tree_leaves(optimizer.init(*params_and_key(0, torch.float32))):
        cases[f"{name} init"] = Case(optimizer.init, params_and_key)
    return cases


# Each row has code that no other row runs. The formulas, with more arguments each, are in the tests of the components.
IMAGES: dict[str, Image] = {
    "fourier": images.fourier((4, 6)),
    "fourier of odd size, own correlation": images.fourier((5, 3), channels=2, correlation=[[1.0, 0.5], [0.0, 2.0]]),
    "fourier of 1 pixel": images.fourier(1, channels=1),
    "pixel": images.pixel((3, 4)),
    "pixel of 4 channels": images.pixel((1, 5), channels=4),
    "phase": images.phase((4, 6)),
    "phase of odd size": images.phase((5, 3), channels=2, decay=0.5, contrast=2.0),
    "phase with own magnitude": images.phase((3, 4), magnitude=torch.arange(9.0).reshape(3, 3)),
    "pyramid": images.laplacian_pyramid((4, 3), levels=3),
    "cppn": images.cppn((3, 4), hidden=3, layers=2),
    "cppn unbiased": images.cppn(3, channels=4, hidden=2, layers=1, activation="unbiased"),
    "alpha": images.alpha((3, 4)),
    "shared": images.shared(images.fourier_canvas((3, 4)), images.pyramid_canvas((3, 4), levels=2, first=1)),
    "shared low frequencies": images.shared(
        images.pixel_canvas(4, channels=1), images.fourier_canvas(4, channels=1, below=0.3)
    ),
    "fourier of a video": images.fourier((3, 4, 5)),
    "fourier of a signal": images.fourier((7,), channels=2),
    "phase of a video": images.phase((3, 4, 6), channels=2),
    "phase of a signal": images.phase((6,), channels=1),
    "pyramid of a video": images.laplacian_pyramid((3, 4, 3), levels=2),
    "pyramid of a signal": images.laplacian_pyramid((5,), channels=2, levels=2),
    "cppn of a video": images.cppn((2, 3, 4), hidden=3, layers=2),
    "alpha of a video": images.alpha((2, 3, 4)),
    "noisy start": images.from_image(images.pixel(4), torch.full((3, 4, 4), 0.3), noise=0.1),
}
WARPS: dict[str, tuple[transforms.Affine, ...]] = {
    "jitter": (transforms.jitter(1.5),),
    "scale choices": (transforms.scale(choices=[0.5, 0.9, 1.1]),),
    "rotate choices": (transforms.rotate(choices=[-30, 5, 60]),),
    "crop": (transforms.crop((3, 2)),),
    "box_crop": (transforms.box_crop(),),
    "uniform box_crop": (transforms.box_crop(0.2, 0.9, normal=None, centre_sd=None),),
    "all affine steps": (transforms.pad(1), transforms.jitter(1), transforms.scale(), transforms.rotate()),
    "crops and affine steps": (
        transforms.rotate(20),
        transforms.crop((3, 4)),
        transforms.jitter(1),
        transforms.box_crop(),
        transforms.crop_or_pad((2, 5)),
        transforms.flip(vertical=True),
    ),
}
PIXEL_TRANSFORMS: dict[str, tuple[Transform, tuple[int, ...]]] = {
    "gaussian_blur": (transforms.gaussian_blur((0.5, 1.5)), (2, 4, 5)),
    "roll": (transforms.roll(3), (2, 4, 5)),
    "normal_noise": (transforms.normal_noise(0.1), (2, 3, 5)),
    "uniform_noise": (transforms.uniform_noise(0.1), (2, 3, 5)),
    "color_jitter": (transforms.color_jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2), (3, 3, 4)),
    "color_jitter of 4 channels": (transforms.color_jitter(brightness=(0.5, 2.0)), (4, 2, 3)),
    "gaussian_blur of several copies": (transforms.gaussian_blur((0.5, 0.8)), (2, 2, 3, 4)),
    "roll of several copies": (transforms.roll(2), (2, 2, 3, 4)),
    "color_jitter of several copies": (transforms.color_jitter(contrast=0.2, hue=0.1), (2, 3, 2, 3)),
    "warp_time of a signal": (transforms.warp_time(size=5, shift=2.0, scale=(0.7, 1.5)), (2, 6)),
    "warp_time of far fewer samples": (transforms.warp_time(size=3, shift=2.0), (2, 9)),
    "warp_time of a video": (transforms.warp_time(size=4, shift=1.0, axis=-3), (2, 3, 2, 3)),
    "per_frame of a warp": (
        transforms.per_frame(transforms.warp(transforms.jitter(1), transforms.rotate(), size=(3, 4))),
        (2, 3, 4, 5),
    ),
    "per_frame of colours over a background": (
        transforms.per_frame(
            transforms.chain(transforms.over_background(), transforms.color_jitter(brightness=0.2, hue=0.1))
        ),
        (4, 2, 3, 4),
    ),
    "per_frame of copies": (
        transforms.per_frame(transforms.multiview(transforms.warp(transforms.jitter(1), size=(2, 3)), 2)),
        (2, 3, 2, 3),
    ),
    "named_transform default of a video": (named_transform("default", image=(4, 5, 6), size=(3, 4, 5)), (2, 4, 5, 6)),
    "named_transform maco of a video": (named_transform("maco", image=(4, 5, 6), size=(4, 4, 5)), (2, 4, 5, 6)),
    "named_transform default of a signal": (named_transform("default", image=(9,), size=(8,)), (2, 9)),
    **{f"over_background {kind}": (transforms.over_background(kind), (3, 3, 4)) for kind in transforms.BACKGROUNDS},
    "multiview": (
        transforms.chain(
            transforms.multiview(transforms.warp(transforms.crop(2), size=(2, 3)), 2),
            transforms.uniform_noise(0.1),
            transforms.normalize((0.1, 0.2, 0.3), (0.5, 2.0, 1.0)),
        ),
        (3, 3, 4),
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
OPTIMIZERS: dict[str, Optimizer] = {
    "adam with schedule": optimizers.adam(lambda step: 0.1 / (1 + step), betas=(0.5, 0.9), eps=1e-3),
    "adam with decay": optimizers.adam(0.05, weight_decay=0.1),
    "adamw": optimizers.adamw(optimizers.linear_decay(0.4, 0.2, 3)),
    "nadam": optimizers.nadam(optimizers.cosine_decay(0.4, 0.2, 3)),
    "sgd": optimizers.sgd(0.05),
    "sgd nesterov": optimizers.sgd(optimizers.constant(0.05), momentum=0.9, nesterov=True, weight_decay=0.1),
    "normalize_gradient": optimizers.normalize_gradient(),
    "clip_norm": optimizers.clip_norm(0.5),
    "add_drift": optimizers.add_drift(0.1),
    "add_noise": optimizers.add_noise(0.1),
    "default": default_optimizer(8),
    "published": published_optimizer(),
}
ABOUT_A = floats(9, (3, 2, 4), torch.float64)
SUM = 2 * (objectives.channel("a") - 0.5 * objectives.neuron("b", 1)) + -objectives.layer("c", power=2)
OBJECTIVES: tuple[tuple[objectives.Objective, dict[str, tuple[int, ...]]], ...] = (
    (objectives.channel("a"), {"a": (3, 2, 4)}),
    (objectives.channel("a", 1), {"a": (3, 2, 4)}),
    (objectives.channel("a"), {"a": (5, 3)}),
    (objectives.channel("a"), {"a": (4,)}),
    (objectives.neuron("a", 2, position=(0, 3)), {"a": (3, 2, 4)}),
    (objectives.neuron("a"), {"a": (5, 3)}),
    (objectives.layer("a"), {"a": (3, 2, 4)}),
    (SUM, {"a": (3, 2, 2), "b": (4, 3), "c": (6,)}),
    (objectives.direction("a", [1.0, -2.0, 0.5]), {"a": (3, 2, 4)}),
    (objectives.direction("a", [1.0, -2.0, 0.5], similarity="cosine"), {"a": (5, 3)}),
    (objectives.direction_neuron("a", [1.0, -2.0], similarity="dot_cosine", power=1), {"a": (2, 2, 2)}),
    (objectives.channel_weights("a", [1.0, -2.0, 0.5]), {"a": (3,)}),
    (objectives.region("a", rows=(0.0, 0.6), columns=(0.5, 1.0)), {"a": (3, 3, 4)}),
    (objectives.logit("a"), {"a": (4,)}),
    (objectives.activation_difference({"a": ABOUT_A}), {"a": (3, 2, 4)}),
    (objectives.inversion({"a": ABOUT_A}), {"a": (3, 2, 4)}),
    (objectives.caricature({"a": ABOUT_A}), {"a": (3, 2, 4)}),
    (objectives.style({"a": ABOUT_A}, loss="l2"), {"a": (3, 2, 4)}),
    (objectives.departure("a", torch.zeros(3, 8, 8)), {"a": (3, 2, 4), "<picture>a": (3, 2, 4)}),
    (
        objectives.interpolate(objectives.channel("a", 0), objectives.neuron("b", 1), count=4),
        {"a": (3, 2, 4), "b": (2, 3, 3)},
    ),
    (objectives.total_variation(), {objectives.IMAGE: (2, 4, 5)}),
    (objectives.l1(2.0), {objectives.IMAGE: (2, 4, 5)}),
    (objectives.l2(), {objectives.IMAGE: (2, 4, 5)}),
    (objectives.boundary_complexity(1), {objectives.IMAGE: (2, 3, 4)}),
    (objectives.opacity(), {objectives.IMAGE: (2, 4, 5)}),
    (objectives.channel("a"), {"a": (3, 2, 4, 2)}),
    (objectives.neuron("a", 1, position=(0, 1, 1)), {"a": (3, 2, 4, 2)}),
    (objectives.region("a", 2, rows=(0.0, 0.5)), {"a": (3, 2, 4, 2)}),
    (objectives.direction("a", [1.0, -2.0, 0.5]), {"a": (3, 2, 4, 2)}),
    (objectives.total_variation(), {objectives.IMAGE: (2, 2, 3, 2)}),
    (objectives.total_variation(), {objectives.IMAGE: (2, 6)}),
    (objectives.boundary_complexity(1), {objectives.IMAGE: (2, 3, 3, 4)}),
    (objectives.boundary_complexity(1), {objectives.IMAGE: (2, 6)}),
)

CASES: dict[str, Case] = {
    **{name: case for label, image in IMAGES.items() for name, case in image_cases(label, image).items()},
    **image_cases("start", images.from_image(images.fourier((3, 4)), torch.full((3, 3, 4), 0.3)), random_init=False),
    **{
        name: case
        for label, steps in WARPS.items()
        for name, case in transform_cases(f"warp {label}", transforms.warp(*steps, size=(3, 4))).items()
    },
    **transform_cases("warp crop_or_pad", transforms.warp(transforms.crop_or_pad(3), size=(3, 3)), random_draw=False),
    **transform_cases("warp without steps", transforms.warp(size=(3, 4)), random_draw=False),
    **transform_cases("warp to a far smaller size", transforms.warp(transforms.jitter(2), size=(2, 3)), (1, 8, 9)),
    **transform_cases(
        "warp deterministic", transforms.warp(transforms.jitter(2), size=(3, 4), deterministic=True), (1, 4, 5)
    ),
    **transform_cases("warp with padding", transforms.warp(transforms.jitter(3), size=(4, 5), padding=0.0)),
    **{
        name: case
        for label, (transform, shape) in PIXEL_TRANSFORMS.items()
        for name, case in transform_cases(label, transform, shape).items()
    },
    **transform_cases("normalize", transforms.normalize((0.1, 0.2), (0.5, 2.0))),
    **transform_cases("normalize of a video", transforms.normalize((0.1, 0.2), (0.5, 2.0), sides=3), (2, 2, 3, 2)),
    **transform_cases("normalize of a signal", transforms.normalize((0.1, 0.2), (0.5, 2.0), sides=1), (2, 5)),
    **transform_cases("named_transform maco", named_transform("maco", image=(12, 10), size=(8, 6)), (1, 12, 10)),
    **{name: case for objective, shapes in OBJECTIVES for name, case in objective_cases(objective, **shapes).items()},
    **batch_score_cases(objectives.diversity("a"), (3, 2, 2)),
    **batch_score_cases(objectives.diversity("a"), (3, 2, 2, 2)),
    **batch_score_cases(objectives.alignment("a"), (5, 4)),
    **batch_score_cases(objectives.channel("a") - 2.0 * objectives.diversity("a"), (4,)),
    **{
        name: case
        for label, optimizer in OPTIMIZERS.items()
        for name, case in optimizer_cases(f"optimizer {label}", optimizer).items()
    },
    **{
        f"schedule {name}": Case(schedule, lambda seed, _: (torch.tensor(seed),))
        for name, schedule in SCHEDULES.items()
    },
}

# One case for each kind of operation, because compiling is slow. Inductor, which generates code, compiles
# those of the default rendering; for the others tracing is enough. Whole steps are compiled in tests/rendering and
# tests/engine.
COMPILED: dict[str, str] = {
    "fourier decode": "inductor",
    "warp all affine steps apply": "inductor",
    "optimizer default update": "inductor",
    "phase decode": "aot_eager",
    "pyramid encode": "aot_eager",
    "cppn decode": "aot_eager",
    "shared share_params": "aot_eager",
    "warp jitter draw": "aot_eager",
    "warp deterministic apply": "aot_eager",
    "fourier of a video decode": "aot_eager",
    "phase of a video decode": "aot_eager",
    "pyramid of a video encode": "aot_eager",
    "warp_time of a signal apply": "aot_eager",
    "named_transform default of a video apply": "aot_eager",
    "per_frame of copies apply": "aot_eager",
    "boundary_complexity(1, 0.5) of (2, 3, 3, 4)": "aot_eager",
    "total_variation() of (2, 2, 3, 2)": "aot_eager",
    "color_jitter apply": "aot_eager",
    "over_background smooth apply": "aot_eager",
    "multiview apply": "aot_eager",
    f"{SUM} of (3, 2, 2); (4, 3); (6,)": "aot_eager",
    "boundary_complexity(1, 0.5) of (2, 3, 4)": "aot_eager",
    "alignment('a') batch_score of (5, 4)": "aot_eager",
    "optimizer sgd nesterov update": "aot_eager",
    "schedule piecewise": "aot_eager",
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def close(actual: Any, expected: Any, *, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@every_case
def test_vmap_equals_loop(case: Case) -> None:
    single = [case.inputs(seed, torch.float32) for seed in range(3)]
    batched = tree_map(lambda *leaves: torch.stack(leaves), *single)
    results = [case.function(*inputs) for inputs in single]
    close(vmap(case.function)(*batched), tree_map(lambda *leaves: torch.stack(leaves), *results))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@pytest.mark.parametrize(("name", "backend"), COMPILED.items(), ids=COMPILED)
def test_compiled_equals_eager_without_recompiling(name: str, backend: str) -> None:
    function, inputs = CASES[name].function, CASES[name].inputs
    # As in compile_step: otherwise Inductor takes long for the rounds of the random number generator.
    options: dict[str, Any] | None = {"realize_opcount_threshold": 10} if backend == "inductor" else None
    compiled = torch.compile(function, fullgraph=True, backend=backend, options=options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            arguments = inputs(seed, torch.float32)
            close(compiled(*arguments), function(*arguments), tolerance=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.random])
def test_result_is_a_function_of_the_key(name: str) -> None:
    function = CASES[name].function
    first, again, *others = (tree_leaves(function(random.key(seed))) for seed in (5, 5, *range(6, 16)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n, case in CASES.items() for d in (torch.float32, torch.float64)[: 1 if case.of_key else 2]],
    ids=str,
)
def test_dtype_and_device_of_the_arguments_are_kept(name: str, dtype: torch.dtype) -> None:
    """A constant on the CPU would raise an error where it meets a tensor on the meta device."""
    case = CASES[name]
    inputs = case.inputs(0, dtype)
    expected = dtype if any(leaf.is_floating_point() for leaf in tree_leaves(inputs)) else torch.float32
    devices = ["cpu", "meta"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        moved = tree_map(lambda leaf, device=device: leaf.to(device), inputs)
        results = tree_leaves(case.function(*moved))
        assert results
        assert {leaf.device.type for leaf in results} == {device}
        assert {leaf.dtype for leaf in results} <= {expected, torch.int64}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.smooth])
def test_gradient_equals_finite_differences(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(1, torch.float64)
    variables, layout = tree_flatten([inputs[i] for i in case.smooth])

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        replaced = dict(zip(case.smooth, tree_unflatten(list(leaves), layout), strict=True))
        result = case.function(*(replaced.get(i, given) for i, given in enumerate(inputs)))
        return tuple(leaf for leaf in tree_leaves(result) if leaf.is_floating_point())

    leaves = [leaf.clone().requires_grad_() for leaf in variables]
    large = sum(leaf.numel() for leaf in leaves) > 60
    assert torch.autograd.gradcheck(function, leaves, fast_mode=large)


@every_case
def test_arguments_are_not_modified(case: Case) -> None:
    inputs = case.inputs(2, torch.float32)
    before = tree_map(torch.clone, inputs)
    versions = [leaf._version for leaf in tree_leaves(inputs)]
    case.function(*inputs)
    close(inputs, before, tolerance=0.0)
    assert [leaf._version for leaf in tree_leaves(inputs)] == versions


@every_case
def test_calls_do_not_depend_on_earlier_calls(case: Case) -> None:
    """A second call does not change the first result, and a third with the first arguments equals it."""
    inputs, other_inputs = case.inputs(3, torch.float32), case.inputs(4, torch.float32)
    first = case.function(*inputs)
    copy = tree_map(torch.clone, first)
    case.function(*other_inputs)
    close(first, copy, tolerance=0.0)
    close(case.function(*inputs), copy, tolerance=0.0)
