"""Objectives on directions, reference images and the image itself: values and gradients against the stated formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import featvis_func as fv
from featvis_func import objective as o
from featvis_func.objective import IMAGE, Objective
from featvis_func.random import fold_in, uniform
from featvis_func.rendering.activations import activations_of

pytestmark = pytest.mark.usefixtures("cached_tracing")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MAPS, TOKENS, LOGITS = noise(4, 6, 5), noise(7, 4, seed=1), noise(4, seed=2)
OTHER_MAPS, OTHER_TOKENS = noise(4, 6, 5, seed=3), noise(7, 4, seed=4)
VECTOR = noise(4, seed=5)
PIXELS = torch.rand(3, 9, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
TARGET = torch.tensor(2)


def rows_of(x: Tensor) -> Tensor:
    """Reshape activations to (positions, channels)."""
    return x.flatten(1).T if x.ndim == 3 else x.reshape(-1, x.shape[-1])


def dot(x: Tensor) -> Tensor:
    return rows_of(x) @ VECTOR


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(rows_of(x), rows_of(y).expand(len(rows_of(x)), -1), dim=1)


def centre(x: Tensor) -> int:
    return math.prod(x.shape[1:]) // 2 if x.ndim == 2 else (x.shape[1] // 2) * x.shape[2] + x.shape[2] // 2


def gram(x: Tensor) -> Tensor:
    return torch.stack([torch.stack([(a * b).mean() for b in rows_of(x).T]) for a in rows_of(x).T])


def blurred(x: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype)
    kernel = (kernel[:, None] * kernel / 16)[None, None]
    padded = torch.nn.functional.pad(x[:, None], (1, 1, 1, 1), mode="replicate")
    return torch.nn.functional.conv2d(padded, kernel)[:, 0]


def border(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1:], dtype=torch.bool)
    mask[2:-2, 2:-2] = False
    return ((x - blurred(x)) ** 2 + 0.8 * (x - 0.25) ** 2)[:, mask].mean()


def total_variation(x: Tensor) -> Tensor:
    return x.diff(dim=1).abs().mean() + x.diff(dim=2).abs().mean()


D = o.direction
CASES: list[tuple[Objective, str, Tensor, Callable[[Tensor], Tensor]]] = [
    (D("a", VECTOR), "a", MAPS, lambda x: dot(x).mean()),
    (D("a", VECTOR), "a", TOKENS, lambda x: dot(x).mean()),
    (D("a", VECTOR), "a", LOGITS, lambda x: x @ VECTOR),
    (D("a", VECTOR, similarity="cosine"), "a", MAPS, lambda x: cosine(x, VECTOR).mean()),
    (D("a", VECTOR, similarity="cosine"), "a", LOGITS, lambda x: cosine(x, VECTOR).mean()),
    (
        D("a", VECTOR, similarity="dot_cosine", power=3),
        "a",
        TOKENS,
        lambda x: (dot(x) * cosine(x, VECTOR).clamp_min(0.1) ** 3).mean(),
    ),
    (D("a", VECTOR, similarity="dot_cosine", power=0), "a", MAPS, lambda x: dot(x).mean()),
    (o.direction_neuron("a", VECTOR), "a", MAPS, lambda x: x[:, 3, 2] @ VECTOR),
    (o.direction_neuron("a", VECTOR, position=(0, 4)), "a", MAPS, lambda x: x[:, 0, 4] @ VECTOR),
    (o.direction_neuron("a", VECTOR, position=6, similarity="cosine"), "a", TOKENS, lambda x: cosine(x, VECTOR)[6]),
    (o.channel_weights("a", VECTOR), "a", MAPS, lambda x: (x.mean((1, 2)) * VECTOR).sum()),
    (o.region("a", 1, rows=(0, 0.5)), "a", MAPS, lambda x: x[1, :3].mean()),
    (o.region("a", rows=(0.5, 1), columns=(0.2, 0.4)), "a", MAPS, lambda x: x[2, 3:, 1:2].mean()),
    (o.region("a", columns=(0.99, 1)), "a", MAPS, lambda x: x[2, :, 4].mean()),
    (o.logit("a"), "a", LOGITS, lambda x: x[2]),
    (o.logit("a", "cow", categories=["dog", "cat", "owl", "cow"]), "a", LOGITS, lambda x: x[3]),
    (o.deepdream("a"), "a", TOKENS, lambda x: (x**2).mean()),
    (o.activation_difference({"a": OTHER_MAPS}), "a", MAPS, lambda x: (x - OTHER_MAPS).abs().mean()),
    (o.activation_difference({"a": OTHER_TOKENS}, loss="l2"), "a", TOKENS, lambda x: ((x - OTHER_TOKENS) ** 2).mean()),
    (o.inversion({"a": OTHER_MAPS}), "a", MAPS, lambda x: -((x - OTHER_MAPS) ** 2).sum() / (OTHER_MAPS**2).sum()),
    (
        o.caricature({"a": OTHER_MAPS}, power=2),
        "a",
        MAPS,
        lambda x: ((rows_of(x) * rows_of(OTHER_MAPS)).sum(1) * cosine_pairs(x, OTHER_MAPS).clamp_min(0.1) ** 2).mean(),
    ),
    (o.style({"a": OTHER_MAPS}), "a", MAPS, lambda x: -(gram(x) - gram(OTHER_MAPS)).abs().mean()),
    (o.style({"a": OTHER_TOKENS}, loss="l2"), "a", MAPS, lambda x: -((gram(x) - gram(OTHER_TOKENS)) ** 2).mean()),
    (o.total_variation(), IMAGE, PIXELS, total_variation),
    (o.total_variation(), IMAGE, PIXELS[:, :1], lambda x: x.diff(dim=2).abs().mean()),
    (o.l1(0.3), IMAGE, PIXELS, lambda x: (x - 0.3).abs().mean()),
    (o.l2(), IMAGE, PIXELS, lambda x: ((x - 0.5) ** 2).mean().sqrt()),
    (o.blur(), IMAGE, PIXELS, lambda x: 0.5 * ((x - blurred(x).detach()) ** 2).mean()),
    (o.boundary_complexity(2, 0.25), IMAGE, PIXELS, border),
    (o.opacity(), IMAGE, PIXELS, lambda x: x[2].sum() / 72),
    (o.boundary_complexity(9), IMAGE, PIXELS, lambda x: ((x - blurred(x)) ** 2 + 0.8 * (x - 0.5) ** 2).mean()),
]


def cosine_pairs(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(rows_of(x), rows_of(y), dim=1)


@pytest.mark.parametrize(
    ("objective", "layer", "values", "formula"), CASES, ids=lambda v: str(v) if isinstance(v, Objective) else ""
)
def test_value_and_gradient_equal_the_formula(
    objective: Objective, layer: str, values: Tensor, formula: Callable[[Tensor], Tensor]
) -> None:
    x, y = values.clone().requires_grad_(), values.clone().requires_grad_()
    score, expected = objective({layer: x}, TARGET), formula(y)
    assert score.shape == ()
    torch.testing.assert_close(score, expected, rtol=1e-9, atol=1e-9)
    gradient = torch.autograd.grad(score, x)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, y)[0], rtol=1e-8, atol=1e-9)
    assert bool(gradient.any())
    activation_map = objective.activation_map({layer: values}, TARGET)
    assert activation_map.shape == (values.shape[:1] if values.ndim == 2 else values.shape[1:])


@pytest.mark.parametrize("objective", [o.l2(0.0), o.direction("a", [1.0, 0.0], similarity="cosine")], ids=str)
def test_gradient_is_finite_where_the_formula_has_no_derivative(objective: Objective) -> None:
    values = torch.zeros(2, 3, 3, requires_grad=True)
    gradient = torch.autograd.grad(objective({"a": values, IMAGE: values}, TARGET), values)[0]
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("make", [o.activation_difference, o.inversion, o.caricature, o.style])
def test_objective_on_several_layers_is_the_sum_over_the_layers(make: Callable[..., Objective]) -> None:
    reference = {"a": OTHER_MAPS, "b": OTHER_TOKENS}
    objective = make(reference)
    terms = [make({layer: values}) for layer, values in reference.items()]
    activations = {"a": MAPS, "b": TOKENS}
    torch.testing.assert_close(objective(activations, TARGET), sum(term(activations, TARGET) for term in terms))
    assert objective.layers == ("a", "b")
    assert repr(objective) == f"{make.__name__}('a', 'b')"


def test_reference_and_vector_are_copied() -> None:
    reference = OTHER_MAPS.clone()
    vector = VECTOR.clone()
    objectives = [o.inversion({"a": reference}), o.direction("a", vector)]
    before = [objective({"a": MAPS}, TARGET) for objective in objectives]
    reference.zero_()
    vector.zero_()
    assert [objective({"a": MAPS}, TARGET) for objective in objectives] == before


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (o.direction("a", VECTOR), "direction('a', <4 numbers>)"),
        (o.direction("a", VECTOR, similarity="cosine"), "direction('a', <4 numbers>, similarity='cosine')"),
        (o.region("a", 3, rows=(0, 0.5)), "region('a', 3, rows=(0, 0.5), columns=(0.0, 1.0))"),
        (o.logit("fc", 7), "logit('fc', 7)"),
        (fv.channel("a") - 0.1 * o.total_variation(), "channel('a') - 0.1 * total_variation()"),
        (o.boundary_complexity(3) + o.l1(), "boundary_complexity(3, 0.5) + l1(0.5)"),
    ],
)
def test_name_is_the_call_with_tensors_abbreviated(objective: Objective, name: str) -> None:
    assert repr(objective) == name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: o.direction("a", torch.zeros(3)), "not all zero"),
        (lambda: o.direction("a", [1.0, math.nan]), "finite"),
        (lambda: o.direction("a", torch.ones(2, 2)), r"one finite number per channel.*\(2, 2\)"),
        (lambda: o.direction("a", [1.0], similarity="angle"), "unknown similarity 'angle'"),  # type: ignore[arg-type]
        (lambda: o.direction("a", [1.0], power=-1), "direction: power must be finite and at least 0, got -1"),
        (
            lambda: o.direction("a", [1.0])({"a": MAPS}, TARGET),
            "the direction has 1 numbers, but layer 'a' has 4 channels",
        ),
        (lambda: o.direction_neuron("a", VECTOR, position=9)({"a": TOKENS}, TARGET), "no position 9"),
        (lambda: o.region("a", rows=(0.5, 0.5)), "region: rows must be two increasing fractions"),
        (lambda: o.region("a", columns=(0, 1.5)), "region: columns must be two increasing fractions"),
        (lambda: o.region("a")({"a": TOKENS}, TARGET), "no rows and columns"),
        (lambda: o.logit("fc", "kat", categories=["dog", "cat"]), "no category 'kat'; did you mean 'cat'"),
        (lambda: o.logit("fc", "cat"), "no category 'cat'; there are 0 categories"),
        (lambda: o.inversion({}), "the reference must have at least 1 layer"),
        (
            lambda: o.inversion({"a": TOKENS})({"a": MAPS}, TARGET),
            r"inversion: the reference is \(7, 4\) in layer 'a', the image is \(4, 6, 5\)",
        ),
        (
            lambda: o.style({"a": noise(3, 2, 2)})({"a": MAPS}, TARGET),
            "style: the reference has 3 channels in layer 'a', the image has 4",
        ),
        (lambda: o.style({"a": MAPS}, loss="l3"), "unknown loss 'l3'"),  # type: ignore[arg-type]
        (lambda: o.caricature({"a": MAPS}, power=-1), "caricature: power must be finite and at least 0, got -1"),
        (lambda: o.l1(math.nan), "value must be finite, got nan"),
        (lambda: o.boundary_complexity(0), "boundary_complexity: width must be at least 1, got 0"),
        (lambda: fv.render("texturenet", o.total_variation()), "reads no layer"),
        (lambda: activations_of(fv.load_model("texturenet"), ["head"], torch.rand(1, 9, 9)), r"\(3, h, w\)"),
        (lambda: activations_of(fv.load_model("texturenet"), ["hed"], torch.rand(3, 9, 9)), "did you mean 'head'"),
    ],
)
def test_invalid_arguments_raise_value_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- with a trained model -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_activations_of_equals_a_forward_pass_of_the_module(texturenet: fv.Model) -> None:
    image = uniform(fold_in(torch.tensor([0, 0]), torch.tensor(3)), (3, *texturenet.size))
    mean, std = (torch.tensor(v)[:, None, None] for v in (texturenet.mean, texturenet.std))
    expected = texturenet.module(((image - mean) / std)[None])[0]
    torch.testing.assert_close(activations_of(texturenet, ["head"], image)["head"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_total_variation_penalty_makes_the_image_smoother(texturenet: fv.Model) -> None:
    channel, penalty = fv.channel("block4.conv", 3), o.total_variation()
    plain, smooth = (
        fv.render(texturenet, objective, steps=16).images[0] for objective in (channel, channel - 200 * penalty)
    )
    assert penalty({IMAGE: smooth}, TARGET) < 0.7 * penalty({IMAGE: plain}, TARGET)


@pytest.mark.slow
def test_inversion_approaches_its_reference(texturenet: fv.Model) -> None:
    image = fv.render(texturenet, "block6.conv", [13], steps=8).images[0]
    reference = activations_of(texturenet, ["block2.conv"], image)
    result = fv.render(texturenet, o.inversion(reference), steps=48, transforms="none")
    assert result.scores.item() > -0.3  # 0 is a perfect match; activations of zero have -1
    assert result.activations.shape[1:] == reference["block2.conv"].shape[1:]


@pytest.mark.slow
def test_direction_along_one_channel_renders_the_image_of_that_channel(texturenet: fv.Model) -> None:
    one_hot = torch.zeros(32)
    one_hot[7] = 1.0
    as_direction = fv.render(texturenet, o.direction("head", one_hot), steps=4)
    as_channel = fv.render(texturenet, fv.channel("head", 7), steps=4)
    torch.testing.assert_close(as_direction.images, as_channel.images, rtol=0, atol=1e-3)
