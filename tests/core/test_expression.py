"""Objectives as Python code: ``to_code`` writes an expression that makes an equal objective again."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featvis_func import objective as o
from featvis_func.objective import IMAGE, PICTURE, Objective
from featvis_func.objective.expression import Code, call, number, to_code


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VECTOR, OTHER_VECTOR = noise(4, seed=1), noise(4, seed=2)
MATRIX = noise(3, 4, seed=11)
REFERENCE = {"a": noise(4, 6, 5, seed=3)}
REFERENCES = {**REFERENCE, "b": noise(7, 4, seed=4)}
PHOTOGRAPH = noise(3, 9, 8, seed=5).sigmoid()
ACTIVATIONS = {
    "a": noise(4, 6, 5, seed=6),
    "b": noise(7, 4, seed=7),
    "fc": noise(4, seed=8),
    IMAGE: noise(3, 9, 8, seed=9).sigmoid(),
    PICTURE + "a": noise(4, 6, 5, seed=10),
}
TARGET = torch.tensor(2)
OWN = Objective(lambda a, t: a["a"].max(), lambda a, t: a["a"][0], ("a",), (), "largest activation")

# Objective, and the values of the variables in its code.
CASES: list[tuple[Objective, dict[str, Any]]] = [
    (o.channel("a"), {}),
    (o.channel("a", 1), {}),
    (o.any_channel(("fc", 4), ("a", 4)), {}),
    (o.neuron("a"), {}),
    (o.neuron("a", 3, position=(1, 2)), {}),
    (o.neuron("b", position=4), {}),
    (o.layer("a"), {}),
    (o.layer("a", power=2), {}),
    (o.deepdream("a"), {}),
    (o.region("a"), {}),
    (o.region("a", 1, rows=(0, 0.5), columns=(0.25, 1.0)), {}),
    (o.logit("fc"), {}),
    (o.logit("fc", "owl", categories=["dog", "cat", "owl", "cow"]), {}),
    (o.direction("a", VECTOR), {"vector": VECTOR}),
    (o.direction("a", VECTOR, similarity="cosine"), {"vector": VECTOR}),
    (o.direction("b", VECTOR, similarity="dot_cosine", power=3), {"vector": VECTOR}),
    (o.direction_neuron("a", VECTOR), {"vector": VECTOR}),
    (o.direction_neuron("a", VECTOR, position=(0, 4), similarity="dot_cosine"), {"vector": VECTOR}),
    (o.channel_weights("a", VECTOR), {"weights": VECTOR}),
    (o.activation_difference(REFERENCE), {"reference": REFERENCE}),
    (o.activation_difference(REFERENCES, loss="l2"), {"reference": REFERENCES}),
    (o.inversion(REFERENCES), {"reference": REFERENCES}),
    (o.caricature(REFERENCE), {"reference": REFERENCE}),
    (o.caricature(REFERENCE, power=2), {"reference": REFERENCE}),
    (o.style(REFERENCE), {"reference": REFERENCE}),
    (o.style(REFERENCES, loss="l2"), {"reference": REFERENCES}),
    (o.departure("a", PHOTOGRAPH), {"picture": PHOTOGRAPH}),
    (o.total_variation(), {}),
    (o.l1(), {}),
    (o.l1(0.25), {}),
    (o.l2(0.25), {}),
    (o.blur(), {}),
    (o.boundary_complexity(), {}),
    (o.boundary_complexity(2, 0.25), {}),
    (o.opacity(), {}),
    (o.diversity("a"), {}),
    (o.alignment("a"), {}),
    (o.alignment("a", decay=3.0), {}),
    (o.interpolate(o.channel("a", 0), o.neuron("b", 1, position=2), count=5), {}),
    # Sums, differences and multiples.
    (o.channel("a") + o.layer("b"), {}),
    (o.channel("a") - 0.123456789 * o.layer("b"), {}),
    (-o.channel("a"), {}),
    (2 * (o.channel("a") - 3 * o.layer("b")), {}),
    (o.channel("a") - (o.layer("b") - o.total_variation()), {}),
    (o.channel("a") - o.layer("b") - o.total_variation(), {}),
    (o.channel("a") + (o.layer("b") - o.total_variation()), {}),
    (o.channel("a", 1) - 2 * o.diversity("a") + 0.5 * o.alignment("a"), {}),
    # An interpolation inside of a sum, of sums, and with tensors.
    (o.interpolate(2 * o.channel("a", 0) - o.blur(), o.layer("b"), count=3) - 0.1 * o.l2(), {}),
    (o.interpolate(o.direction("a", VECTOR), o.channel("a", 1), count=4), {"vector": VECTOR}),
    # Several tensors in one expression.
    (o.direction("a", VECTOR) - 2 * o.direction("a", OTHER_VECTOR), {"vector": VECTOR, "vector_2": OTHER_VECTOR}),
    (
        o.interpolate(o.direction("a", VECTOR), o.direction("a", OTHER_VECTOR), count=2) + o.direction("b", VECTOR),
        {"vector": VECTOR, "vector_2": OTHER_VECTOR, "vector_3": VECTOR},
    ),
    (
        o.channel_weights("a", VECTOR) + o.style(REFERENCE) - o.inversion(REFERENCES) - o.departure("a", PHOTOGRAPH),
        {"weights": VECTOR, "reference": REFERENCE, "reference_2": REFERENCES, "picture": PHOTOGRAPH},
    ),
    # Families.
    (o.directions("a", MATRIX), {"matrix": MATRIX}),
    (o.directions("b", MATRIX, similarity="dot_cosine", power=1, position=3), {"matrix": MATRIX}),
    (o.sae("a", MATRIX), {"encoder": MATRIX}),
    (
        o.sae("a", MATRIX, VECTOR[:3], center=VECTOR, normalize="layer_norm", activation="jumprelu", threshold=0.5),
        {"encoder": MATRIX, "bias": VECTOR[:3], "center": VECTOR, "threshold": torch.full((3,), 0.5).double()},
    ),
    (o.sae("a", MATRIX, activation="topk", k=2, position=(1, 2)), {"encoder": MATRIX}),
    (o.neurons("a", [2, 0], [(1, 2), (5, 4)]), {}),
    (o.logits("fc", [3, "dog", 1], categories=["dog", "cat"]), {}),
    (o.facets(o.channel("a"), 3, weight=0.5), {}),
    (
        o.facets(o.directions("a", MATRIX) - o.sae("a", MATRIX), 2, layer="a"),
        {"matrix": MATRIX, "encoder": MATRIX},
    ),
    (o.member(o.directions("a", MATRIX), 1) + o.member(o.channel("a"), 3), {"matrix": MATRIX}),
    # A user's own objectives.
    (OWN, {"own_objective": OWN}),
    (2 * OWN - o.layer("b"), {"own_objective": OWN}),
    (o.interpolate(OWN, o.channel("a", 0), count=3), {"own_objective": OWN}),
    (OWN + o.layer("b") + OWN, {"own_objective": OWN, "own_objective_2": OWN}),
]


def code_of(objective: Objective) -> Code:
    return to_code(objective.expression_or_name)


def evaluate(code: Code, variables: dict[str, Any]) -> Objective:
    """Run the code as a reader of it would: import the functions, define the variables, evaluate the expression."""
    namespace = dict(variables)
    lines = [f"from featvis_func.objective import {name}" for name in code.functions]
    exec("\n".join([*lines, f"result = {code.expression}"]), namespace)
    return namespace["result"]


@pytest.mark.parametrize(("objective", "variables"), CASES, ids=lambda v: repr(v) if isinstance(v, Objective) else "")
def test_code_makes_an_equal_objective(objective: Objective, variables: dict[str, Any]) -> None:
    code = code_of(objective)
    assert list(code.values) == list(variables)
    made = evaluate(code, variables)
    assert repr(made) == repr(objective)
    assert (made.layers, made.targeted, made.variants) == (objective.layers, objective.targeted, objective.variants)
    assert torch.equal(made(ACTIVATIONS, TARGET), objective(ACTIVATIONS, TARGET))
    assert torch.equal(made.activation_map(ACTIVATIONS, TARGET), objective.activation_map(ACTIVATIONS, TARGET))
    assert (made.batch_score is None) == (objective.batch_score is None)
    if made.batch_score is not None and objective.batch_score is not None:
        batch, targets = {"a": noise(6, 4, 3, 3, seed=11)}, torch.arange(6)
        assert torch.equal(made.batch_score(batch, targets), objective.batch_score(batch, targets))


def test_cases_cover_every_objective_function() -> None:
    called = {name for objective, _ in CASES for name in code_of(objective).functions}
    # `deepdream` returns `layer(..., power=2)`, and `family` a user's own; the others in the module make no objective.
    assert called == {name for name in vars(o) if name[0].islower() and callable(getattr(o, name))} - {
        "deepdream",
        "family",
        "feature_axis",
    }


def test_values_describe_the_variables() -> None:
    objective = o.direction("a", VECTOR) + o.inversion(REFERENCES) - 2 * OWN
    code = code_of(objective)
    assert code.expression == "direction('a', vector) + inversion(reference) - 2 * own_objective"
    assert code.functions == ("direction", "inversion")
    assert code.values == {
        "vector": "a tensor (4,) of torch.float64",
        "reference": "the activations of 'a', 'b' for an image, by fv.activations_of",
        "own_objective": "your own objective 'largest activation'",
    }


def test_own_objective_keeps_its_name_for_display() -> None:
    assert repr(2 * OWN - o.layer("b")) == "2 * largest activation - layer('b')"
    assert repr(o.interpolate(OWN, o.channel("a", 0), count=3)) == (
        "interpolate(largest activation, channel('a', 0), count=3)"
    )


def test_nested_multiples_are_written_without_parentheses() -> None:
    objective = 3 * (2 * o.channel("a"))
    code = code_of(objective)
    assert code.expression == repr(objective) == "3 * 2 * channel('a')"
    torch.testing.assert_close(evaluate(code, {})(ACTIVATIONS, TARGET), objective(ACTIVATIONS, TARGET))


def test_call_leaves_out_arguments_that_are_none() -> None:
    assert call("neuron", "a", None, position=None) == call("neuron", "a")
    assert str(call("neuron", "a", None, position=3)) == "neuron('a', position=3)"


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, 1e-7, 1 / 3, 123456789.0, 1e20])
def test_number_identifies_the_value(value: float) -> None:
    assert float(number(value)) == value
    assert len(number(value)) <= len(repr(value))


def test_numbers_of_numpy_are_written_as_numbers() -> None:
    objective = o.neuron("a", np.int64(3), position=(np.int64(1), np.int32(2)))  # type: ignore[arg-type]
    assert to_code(objective.expression_or_name).expression == repr(objective) == "neuron('a', 3, position=(1, 2))"
