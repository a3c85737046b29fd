"""Objectives on units: values, gradients, arithmetic, names, targets and errors."""

import re
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from featvis_func.objective import Objective, channel, feature_axis, layer, neuron


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MAPS, TOKENS, VECTOR = noise(4, 3, 5), noise(6, 4), noise(4)
TARGET = torch.tensor(2)


def one_hot(shape: tuple[int, ...], where: Any, value: float) -> Tensor:
    result = torch.zeros(shape, dtype=torch.float64)
    result[where] = value
    return result


@pytest.mark.parametrize(
    ("objective", "values", "score", "gradient", "activation_map"),
    [
        (channel("a"), MAPS, MAPS[2].mean(), one_hot((4, 3, 5), 2, 1 / 15), MAPS[2]),
        (channel("a", 0), MAPS, MAPS[0].mean(), one_hot((4, 3, 5), 0, 1 / 15), MAPS[0]),
        (channel("a"), TOKENS, TOKENS[:, 2].mean(), one_hot((6, 4), (slice(None), 2), 1 / 6), TOKENS[:, 2]),
        (channel("a", 3), TOKENS, TOKENS[:, 3].mean(), one_hot((6, 4), (slice(None), 3), 1 / 6), TOKENS[:, 3]),
        (channel("a"), VECTOR, VECTOR[2], one_hot((4,), 2, 1), VECTOR[2]),
        (neuron("a"), MAPS, MAPS[2, 1, 2], one_hot((4, 3, 5), (2, 1, 2), 1), MAPS[2]),
        (neuron("a", 1), MAPS, MAPS[1, 1, 2], one_hot((4, 3, 5), (1, 1, 2), 1), MAPS[1]),
        (neuron("a", position=(0, 4)), MAPS, MAPS[2, 0, 4], one_hot((4, 3, 5), (2, 0, 4), 1), MAPS[2]),
        (neuron("a"), TOKENS, TOKENS[3, 2], one_hot((6, 4), (3, 2), 1), TOKENS[:, 2]),
        (neuron("a", 0, position=0), TOKENS, TOKENS[0, 0], one_hot((6, 4), (0, 0), 1), TOKENS[:, 0]),
        (neuron("a"), VECTOR, VECTOR[2], one_hot((4,), 2, 1), VECTOR[2]),
        (layer("a"), MAPS, MAPS.mean(), torch.full((4, 3, 5), 1 / 60, dtype=torch.float64), MAPS.mean(0)),
        (layer("a", power=2), MAPS, (MAPS**2).mean(), 2 * MAPS / 60, (MAPS**2).mean(0)),
        (layer("a", power=2), TOKENS, (TOKENS**2).mean(), 2 * TOKENS / 24, (TOKENS**2).mean(1)),
        (layer("a"), VECTOR, VECTOR.mean(), torch.full((4,), 1 / 4, dtype=torch.float64), VECTOR.mean()),
    ],
    ids=lambda value: repr(value) if isinstance(value, Objective) else "",
)
def test_objective_has_the_stated_value_gradient_and_activation_map(
    objective: Objective, values: Tensor, score: Tensor, gradient: Tensor, activation_map: Tensor
) -> None:
    assert objective({"a": values}, TARGET).shape == ()
    torch.testing.assert_close(objective({"a": values}, TARGET), score)
    torch.testing.assert_close(grad(lambda a: objective.score({"a": a}, TARGET))(values), gradient)
    torch.testing.assert_close(objective.activation_map({"a": values}, TARGET), activation_map)


A, B, C = channel("a"), neuron("b", 1), layer("c")


@pytest.mark.parametrize(
    ("objective", "name", "weights"),
    [
        (A, "channel('a')", (1, 0, 0)),
        (B, "neuron('b', 1)", (0, 1, 0)),
        (C, "layer('c')", (0, 0, 1)),
        (A + B, "channel('a') + neuron('b', 1)", (1, 1, 0)),
        (A - B, "channel('a') - neuron('b', 1)", (1, -1, 0)),
        (-A, "-1 * channel('a')", (-1, 0, 0)),
        (2 * A, "2 * channel('a')", (2, 0, 0)),
        (A * 0.5, "0.5 * channel('a')", (0.5, 0, 0)),
        (A + 2 * B, "channel('a') + 2 * neuron('b', 1)", (1, 2, 0)),
        (2 * (A + B), "2 * (channel('a') + neuron('b', 1))", (2, 2, 0)),
        (A - (B + C), "channel('a') - (neuron('b', 1) + layer('c'))", (1, -1, -1)),
        (A - (B - C), "channel('a') - (neuron('b', 1) - layer('c'))", (1, -1, 1)),
        (A - B - C, "channel('a') - neuron('b', 1) - layer('c')", (1, -1, -1)),
        (A + (B - C), "channel('a') + neuron('b', 1) - layer('c')", (1, 1, -1)),
        (-(A - B), "-1 * (channel('a') - neuron('b', 1))", (-1, 1, 0)),
        (3 * (2 * A), "3 * 2 * channel('a')", (6, 0, 0)),
        (0.5 * (A - 2 * (B + C)), None, (0.5, -1, -1)),
        (A + A, "channel('a') + channel('a')", (2, 0, 0)),
    ],
    ids=lambda value: repr(value) if isinstance(value, Objective) else "",
)
def test_sums_and_multiples_have_the_value_and_the_name_of_the_expression(
    objective: Objective, name: str | None, weights: tuple[float, float, float]
) -> None:
    """The name, evaluated as Python, makes an equal objective."""
    activations = {"a": MAPS, "b": TOKENS, "c": VECTOR}
    terms = (MAPS[2].mean(), TOKENS[3, 1], VECTOR.mean())
    expected = sum(w * term for w, term in zip(weights, terms, strict=True))
    torch.testing.assert_close(objective(activations, TARGET), expected)
    if name is not None:
        assert repr(objective) == name
    evaluated = eval(repr(objective), {"channel": channel, "neuron": neuron, "layer": layer})
    torch.testing.assert_close(evaluated(activations, TARGET), expected)
    assert evaluated.layers == objective.layers


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (channel("x.conv", 7), "channel('x.conv', 7)"),
        (neuron("x"), "neuron('x')"),
        (neuron("x", 3, position=(1, 2)), "neuron('x', 3, position=(1, 2))"),
        (neuron("x", position=4), "neuron('x', position=4)"),
        (layer("x", power=2), "layer('x', power=2)"),
    ],
)
def test_name_is_the_call_without_default_arguments(objective: Objective, name: str) -> None:
    assert repr(objective) == objective.name == name


def test_sum_lists_each_layer_once_and_shows_the_map_of_the_first() -> None:
    objective = channel("b") - 2 * channel("a", 1) + layer("c") + neuron("b", 0) + channel("d")
    assert objective.layers == ("b", "a", "c", "d")
    assert objective.targeted == ("b", "d")
    assert layer("c").targeted == channel("a", 1).targeted == neuron("a", 1).targeted == ()
    total = channel("a") + channel("b")
    torch.testing.assert_close(total.activation_map({"a": MAPS, "b": TOKENS}, TARGET), MAPS[2])
    torch.testing.assert_close((-total).activation_map({"a": MAPS, "b": TOKENS}, TARGET), MAPS[2])


def test_gradient_of_a_sum_is_the_gradient_of_each_term_in_its_layer() -> None:
    objective = channel("a") - 0.5 * channel("b", 1)
    gradients = grad(lambda a: objective.score(a, TARGET))({"a": MAPS, "b": TOKENS})
    torch.testing.assert_close(gradients["a"], one_hot((4, 3, 5), 2, 1 / 15))
    torch.testing.assert_close(gradients["b"], one_hot((6, 4), (slice(None), 1), -0.5 / 6))


@pytest.mark.parametrize("make", [channel, neuron])
def test_target_selects_the_channel_under_vmap(make: Callable[[str], Objective]) -> None:
    batch, targets = noise(3, 4, 3, 5), torch.tensor([3, 0, 3])
    scores = vmap(make("a").score)({"a": batch}, targets)
    maps = vmap(make("a").activation_map)({"a": batch}, targets)
    channels = torch.stack([batch[0, 3], batch[1, 0], batch[2, 3]])
    torch.testing.assert_close(maps, channels)
    torch.testing.assert_close(scores, channels.mean((1, 2)) if make is channel else channels[:, 1, 2])


def test_objective_of_ones_own_can_be_multiplied_and_keeps_its_name() -> None:
    own = Objective(lambda a, t: a["a"].max(), lambda a, t: a["a"][0], ("a",), (), "greatest")
    torch.testing.assert_close((2 * own)({"a": MAPS}, TARGET), 2 * MAPS.max())
    assert repr(2 * own) == "2 * greatest"


@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 5), 0), ((6, 4), 1), ((4,), 0), (torch.Size([6, 4]), 1)])
def test_feature_axis_is_the_axis_of_the_channels(shape: tuple[int, ...], axis: int) -> None:
    assert feature_axis(shape) == axis


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: channel("a", 4)({"a": MAPS}, TARGET), "no channel 4 in layer 'a', which has 4"),
        (lambda: channel("a", -1)({"a": MAPS}, TARGET), "no channel -1 in layer 'a', which has 4"),
        (lambda: channel("a", 4)({"a": TOKENS}, TARGET), "no channel 4 in layer 'a', which has 4"),
        (lambda: neuron("a", 9)({"a": VECTOR}, TARGET), "no channel 9 in layer 'a', which has 4"),
        (
            lambda: neuron("a", position=(3, 0))({"a": MAPS}, TARGET),
            "no position (3, 0) in layer 'a', whose positions are (3, 5)",
        ),
        (
            lambda: neuron("a", position=(0, -1))({"a": MAPS}, TARGET),
            "no position (0, -1) in layer 'a', whose positions are (3, 5)",
        ),
        (
            lambda: neuron("a", position=1)({"a": MAPS}, TARGET),
            "no position 1 in layer 'a', whose positions are (3, 5)",
        ),
        (
            lambda: neuron("a", position=(1, 1))({"a": TOKENS}, TARGET),
            "no position (1, 1) in layer 'a', whose positions are (6,)",
        ),
        (lambda: neuron("a", position=0)({"a": VECTOR}, TARGET), "no position 0 in layer 'a', whose positions are ()"),
        (lambda: layer("a", power=cast(Any, 3)), "power must be 1 (mean) or 2 (mean of squares), got 3"),
        (
            lambda: channel("a")({"a": noise(1, 4, 2, 3, 5)}, TARGET),
            "activations of shape (1, 4, 2, 3, 5) have no channels; expected (c, h, w), (c, t, h, w), (t, d) or (d,)",
        ),
        (lambda: feature_axis(()), "activations of shape () have no channels"),
    ],
)
def test_invalid_arguments_raise_value_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("other", ["a", True, None, torch.tensor(2.0)], ids=repr)
def test_multiplying_by_anything_but_a_number_raises_a_type_error(other: Any) -> None:
    with pytest.raises(TypeError):
        _ = channel("a") * other


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_multiplying_by_a_number_that_is_not_finite_raises_a_value_error(factor: float) -> None:
    with pytest.raises(ValueError, match=f"can only be multiplied by a finite number, got {factor}"):
        _ = factor * channel("a")


def test_adding_anything_but_an_objective_raises_a_type_error() -> None:
    with pytest.raises(TypeError):
        _ = channel("a") + cast(Any, 1)
    with pytest.raises(TypeError):
        _ = channel("a") - cast(Any, "b")


@pytest.mark.parametrize(("factor", "text"), [(0.5, "0.5"), (2, "2"), (0.123456789, "0.123456789")])
def test_name_contains_all_digits_of_a_factor(factor: float, text: str) -> None:
    assert repr(factor * channel("a")) == f"{text} * channel('a')"
