"""Families of objectives against plain eager formulas, alone and under vmap."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from featvis_func import objective as objectives
from featvis_func.objective import (
    Objective,
    channel,
    direction,
    directions,
    facets,
    family,
    logits,
    member,
    neurons,
    sae,
)
from featvis_func.objective.expression import tensors_of, to_code
from featvis_func.objective.rebuild import from_code


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# One image's activations of each layout, all with 6 channels.
LAYOUTS = {"map": random(6, 3, 4), "video": random(6, 2, 3, 2), "tokens": random(5, 6), "vector": random(6)}
MATRIX, BIAS, CENTER = random(9, 6, seed=1), random(9, seed=2), random(6, seed=3)
THRESHOLD = random(9, seed=4)  # also below 0


def rows_of(values: Tensor) -> Tensor:
    """Activations as ``(positions, channels)``."""
    return values.reshape(-1, 6) if values.ndim < 3 else values.flatten(1).T


def of_all(objective: Objective, values: Tensor) -> Tensor:
    """The scores of all members for one image, by vmap as in a step."""
    assert objective.variants is not None
    return vmap(lambda t: objective({"a": values}, t))(torch.arange(objective.variants))


def gradients(objective: Objective, values: Tensor) -> Tensor:
    return vmap(lambda t: grad(lambda v: objective({"a": v}, t))(values))(torch.arange(objective.variants or 1))


def plain_gradients(score: Any, values: Tensor) -> Tensor:
    """d score_i / d values, by ordinary autograd, member by member."""
    parts = []
    for i in range(len(MATRIX)):
        leaf = values.clone().requires_grad_()
        score(leaf)[i].backward()
        parts.append(leaf.grad)
    return torch.stack(parts)


def pre_activations(values: Tensor) -> Tensor:
    """Of an eager autoencoder: ``(positions, features)``."""
    return (rows_of(values) - CENTER) @ MATRIX.T + BIAS


def top_two(features: Tensor) -> Tensor:
    kept = torch.zeros_like(features)
    index = features.topk(2, dim=1).indices
    return kept.scatter(1, index, features.gather(1, index)).relu()


PLAIN = {
    "none": lambda v: pre_activations(v),
    "relu": lambda v: pre_activations(v).relu(),
    "jumprelu": lambda v: pre_activations(v).relu() * (pre_activations(v) > THRESHOLD),
    "topk": lambda v: top_two(pre_activations(v)),
}
SETTINGS: dict[str, dict[str, Any]] = {"none": {}, "relu": {}, "jumprelu": {"threshold": THRESHOLD}, "topk": {"k": 2}}


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_of_an_autoencoder_are_those_of_a_plain_one_and_so_are_their_gradients(
    layout: str, activation: str
) -> None:
    values = LAYOUTS[layout]
    objective = sae("a", MATRIX, BIAS, center=CENTER, activation=activation, **SETTINGS[activation])  # type: ignore[arg-type]

    def plain(v: Tensor) -> Tensor:
        return PLAIN[activation](v).mean(0)

    torch.testing.assert_close(of_all(objective, values), plain(values), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(objective, values), plain_gradients(plain, values), rtol=1e-12, atol=1e-12)
    assert objective.family is not None
    assert objective.family.all_scores is not None
    torch.testing.assert_close(objective.family.all_scores({"a": values}), plain(values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", PLAIN)
def test_a_feature_at_one_token(activation: str) -> None:
    values = LAYOUTS["tokens"]
    objective = sae("a", MATRIX, BIAS, center=CENTER, activation=activation, position=2, **SETTINGS[activation])  # type: ignore[arg-type]
    expected = PLAIN[activation](values)[2]
    torch.testing.assert_close(of_all(objective, values), expected, rtol=1e-12, atol=1e-12)
    assert objective.family is not None
    assert objective.family.all_scores is not None
    torch.testing.assert_close(objective.family.all_scores({"a": values}), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("similarity", ["dot", "cosine", "dot_cosine"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_direction_is_the_objective_of_its_row(layout: str, similarity: Any) -> None:
    values, rows = LAYOUTS[layout], directions("a", MATRIX, similarity=similarity, power=1.5)
    singles = [direction("a", row, similarity=similarity, power=1.5) for row in MATRIX]
    zero = torch.tensor(0)
    for i, single in enumerate(singles):
        number = torch.tensor(i)
        assert torch.equal(rows({"a": values}, number), single({"a": values}, zero))
        assert torch.equal(rows.activation_map({"a": values}, number), single.activation_map({"a": values}, zero))
        assert torch.equal(
            grad(lambda v, t=number: rows({"a": v}, t))(values),
            grad(lambda v, one=single: one({"a": v}, zero))(values),
        )
    assert rows.family is not None
    assert rows.family.all_scores is not None
    torch.testing.assert_close(rows.family.all_scores({"a": values}), of_all(rows, values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_identity_gives_the_channels_bit_for_bit(layout: str) -> None:
    values = LAYOUTS[layout].float()
    batch = torch.stack([values, values.flip(0), 2 * values])
    targets = torch.tensor([5, 0, 3])
    results = [
        vmap(lambda v, t, o=o: (o({"a": v}, t), grad(lambda w: o({"a": w}, t))(v)))(batch, targets)
        for o in (channel("a"), directions("a", torch.eye(6)))
    ]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("layout", "positions"), [("map", [(0, 3), (2, 1)]), ("video", [(1, 2, 0)]), ("tokens", [4, 0])]
)
def test_neurons_are_channels_at_positions(layout: str, positions: list[Any]) -> None:
    values = LAYOUTS[layout]
    objective = neurons("a", [5, 2], positions)
    expected = [
        objectives.neuron("a", c, position=p)({"a": values}, torch.tensor(0)) for c in (5, 2) for p in positions
    ]
    assert torch.equal(of_all(objective, values), torch.stack(expected))
    assert objective.family is not None
    assert objective.family.names is not None
    assert len(objective.family.names) == len(expected) == len(set(objective.family.names))


def test_logits_by_number_and_by_name() -> None:
    objective = logits("a", ["dog", 4, "cat"], categories=["cat", "x", "dog"])
    assert torch.equal(of_all(objective, LAYOUTS["vector"]), LAYOUTS["vector"][[2, 4, 0]])
    assert objective.family is not None
    assert objective.family.names == ("dog", "4", "cat")


def test_sums_and_differences_pair_members_of_the_same_number() -> None:
    values, other = LAYOUTS["map"], random(9, 6, seed=7)
    objective = directions("a", MATRIX) - 0.5 * directions("a", other, similarity="cosine")
    expected = of_all(directions("a", MATRIX), values) - 0.5 * of_all(
        directions("a", other, similarity="cosine"), values
    )
    torch.testing.assert_close(of_all(objective, values), expected, rtol=1e-12, atol=1e-12)
    known = objective.family
    assert known is not None
    assert known.all_scores is not None
    assert set(known.rows) == {"matrix", "matrix_2"}
    torch.testing.assert_close(known.all_scores({"a": values}), expected, rtol=1e-12, atol=1e-12)


def test_families_of_different_numbers_of_members_do_not_add() -> None:
    with pytest.raises(ValueError, match=r"different numbers of images: \[6, 9\]"):
        _ = directions("a", MATRIX) + directions("a", torch.eye(6))


def test_one_member_of_a_family_or_channel_of_a_layer() -> None:
    values = LAYOUTS["map"]
    for objective in (directions("a", MATRIX), channel("a")):
        chosen = member(objective, 4)
        assert chosen.variants is None
        assert not chosen.targeted
        for number in (0, 3):
            assert torch.equal(chosen({"a": values}, torch.tensor(number)), objective({"a": values}, torch.tensor(4)))
    with pytest.raises(ValueError, match="members 0 to 8, got 9"):
        member(directions("a", MATRIX), 9)


def test_a_family_of_ones_own_gathers_every_tensor() -> None:
    rows = {"scale": torch.arange(1.0, 5.0), "index": torch.tensor([3, 2, 1, 0])}
    own = family(
        "own", ["a"], rows, lambda a, row: a["a"].flatten().index_select(0, row["index"].reshape(1))[0] * row["scale"]
    )
    values = LAYOUTS["vector"].float()
    assert torch.equal(of_all(own, values), values[[3, 2, 1, 0]] * rows["scale"])


class TestFacets:
    GRAMS = torch.stack([random(6, 3, 3, seed=s) for s in range(6)])

    def test_each_image_is_compared_with_those_of_its_own_unit_alone(self) -> None:
        objective = facets(channel("a"), 3, weight=2.0)
        assert objective.group == 3
        assert objective.batch_score is not None
        targets = torch.tensor([3, 4, 5, 12, 13, 14])
        together = objective.batch_score({"a": self.GRAMS}, targets)
        for start in (0, 3):
            alone = objective.batch_score({"a": self.GRAMS[start : start + 3]}, targets[start : start + 3])
            torch.testing.assert_close(together[start : start + 3], alone)
            assert objectives.diversity("a").batch_score is not None
            style = objectives.diversity("a").batch_score({"a": self.GRAMS[start : start + 3]}, targets[:3])  # type: ignore[misc]
            size = self.GRAMS[start : start + 3, int(targets[start]) // 3].mean((1, 2)).abs()
            torch.testing.assert_close(alone, -2.0 * size * style)

    def test_the_images_of_a_unit_are_scored_as_the_unit(self) -> None:
        objective = facets(directions("a", MATRIX), 2)
        values = LAYOUTS["map"]
        assert objective.variants == 18
        assert torch.equal(of_all(objective, values), of_all(directions("a", MATRIX), values).repeat_interleave(2))
        known = objective.family
        assert known is not None
        assert known.name_of(3) is None
        named = facets(directions("a", MATRIX, names=[f"n{i}" for i in range(9)]), 2).family
        assert named is not None
        assert named.name_of(3) == "n1, facet 1"

    def test_what_cannot_have_facets(self) -> None:
        for objective, words in (
            (channel("a") - objectives.diversity("a"), "depend on each other already"),
            (objectives.l2(), "reads no layer"),
        ):
            with pytest.raises(ValueError, match=words):
                facets(objective, 2)
        with pytest.raises(ValueError, match="facets: count must be at least 2, got 1"):
            facets(channel("a"), 1)


@pytest.mark.parametrize(
    "objective",
    [
        directions("a", MATRIX.float(), similarity="cosine", position=3),
        sae("a", MATRIX, BIAS, center=CENTER, activation="topk", k=3),
        sae("a", MATRIX, activation="jumprelu", threshold=0.25),
        neurons("a", [1, 2], [(0, 1), (2, 2)]),
        logits("a", [3, 1]),
        facets(directions("a", MATRIX) - 0.5 * channel("b", 7), 3, weight=0.5),
        -2.0 * (channel("a") - objectives.deepdream("b")) + directions("a", MATRIX[:, :4]),
        member(sae("a", MATRIX), 2),
    ],
    ids=str,
)
def test_a_family_is_made_again_from_its_code_and_tensors(objective: Objective) -> None:
    made = from_code(to_code(objective.expression_or_name)._asdict(), tensors_of(objective.expression_or_name))
    assert str(made) == str(objective)
    assert made.layers == objective.layers
    assert made.variants == objective.variants
    assert made.group == objective.group
    assert made.targeted == objective.targeted
    if set(objective.layers) == {"a"} and "position=3" not in str(objective):
        for number in range(2):
            values = LAYOUTS["vector"] if "logits" in str(objective) else LAYOUTS["map"]
            assert torch.equal(
                made({"a": values}, torch.tensor(number)), objective({"a": values}, torch.tensor(number))
            )


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "channel.__globals__", "open('x')", "channel(**{})", "1 + 1", "channel(",
        "[channel('a') for _ in 'a']", "replace(channel('a'))", "direction('a', vector)", "channel('a') if 1 else 2",
    ],
)  # fmt: skip
def test_code_that_is_no_objective_is_not_run(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be made again|is not the code of an objective"):
        from_code({"expression": text}, {})


NOT_FINITE = MATRIX.clone()
NOT_FINITE[3, 2], NOT_FINITE[7] = torch.nan, torch.inf


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: directions("a", NOT_FINITE), "2 of 9 directions have numbers that are not finite, the first is 3"),
        (lambda: directions("a", torch.zeros(0, 6)), r"expected a matrix \(n, d\) .* got \(0, 6\)"),
        (lambda: directions("a", torch.zeros(6)), r"expected a matrix \(n, d\) .* got \(6,\)"),
        (lambda: directions("a", torch.zeros(2, 6)), "all 2 directions are zero"),
        (lambda: directions("a", MATRIX, similarity="sideways"), "unknown similarity 'sideways'"),  # type: ignore[arg-type]
        (lambda: directions("a", MATRIX, names=["one"]), "expected 9 names, one for each member, got 1"),
        (lambda: directions("a", MATRIX, names="abcdefghi"), "expected 9 names, one for each member, got 'abcdefghi'"),
        (lambda: directions("a", MATRIX)({"a": random(5, 2, 2)}, torch.tensor(0)), "has 6 numbers, but .* 5 channels"),
        (lambda: sae("a", MATRIX)({"a": random(5, 2, 2)}, torch.tensor(0)), "has 6 numbers, but .* 5 channels"),
        (lambda: sae("a", MATRIX, BIAS[:4]), r"bias must be 9 finite numbers, .* got \(4,\)"),
        (lambda: sae("a", MATRIX, center=BIAS), r"center must be 6 finite numbers, .* got \(9,\)"),
        (lambda: sae("a", MATRIX, activation="topk"), "activation 'topk' needs k"),
        (lambda: sae("a", MATRIX, activation="topk", k=10), "k must be at most the number of features, 9, got 10"),
        (lambda: sae("a", MATRIX, k=2), "activation 'none' takes no k"),
        (lambda: sae("a", MATRIX, activation="jumprelu"), "activation 'jumprelu' needs threshold"),
        (lambda: neurons("a", [], [(0, 0)]), "at least one channel and one position"),
        (lambda: neurons("a", [0], []), "at least one channel and one position"),
        (lambda: neurons("a", [0], [(0, 0), 3]), "positions of one form"),
        (lambda: neurons("a", [6], [(0, 0)])({"a": random(6, 2, 2)}, torch.tensor(0)), "no channel 6 .* has 6"),
        (lambda: neurons("a", [0], [(0, 2)])({"a": random(6, 2, 2)}, torch.tensor(0)), r"no position \(0, 2\)"),
        (lambda: neurons("a", [0], 5), "expected a list of positions"),  # type: ignore[arg-type]
        (lambda: neurons("a", [0], [(1.5, 0)]), "position must be a whole number"),  # type: ignore[list-item]
        (lambda: member(channel("a"), 6)({"a": random(6, 2, 2)}, torch.tensor(0)), "no channel 6 in layer 'a'"),
        (lambda: logits("a", ["tabbi"], categories=["tabby"]), "no category 'tabbi'; did you mean 'tabby'"),
        (lambda: logits("a", []), "at least one class"),
        (lambda: logits("a", [6])({"a": random(6)}, torch.tensor(0)), "no class 6 in layer 'a', which has 6"),
        (lambda: family("own", "a", {}, lambda a, row: a["a"].mean()), "tensors with a row for each member"),
        (lambda: family("own", "a", {"x": torch.ones(2), "y": torch.ones(3)}, lambda a, row: a["a"]), "got rows"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [channel("a"), directions("a", MATRIX), facets(channel("a"), 3)], ids=str)
def test_facets_do_not_add_to_what_pairs_other_images(other: Objective) -> None:
    for one, two in ((facets(channel("a"), 2), other), (other, facets(channel("a"), 2))):
        with pytest.raises(ValueError, match=r"pair images of different members|different groups|numbers of images"):
            _ = one - two
    assert (facets(channel("a"), 2) - channel("b", 7) - objectives.l2()).group == 2  # the same for every image


@pytest.mark.parametrize("vectors", ["nope", "number", "cube"])
def test_vectors_are_a_matrix_among_the_rows(vectors: str) -> None:
    rows = {"matrix": MATRIX, "number": BIAS, "cube": random(9, 2, 3)}
    with pytest.raises(ValueError, match=f"vectors must name a matrix among the rows, got '{vectors}'"):
        family("own", "a", rows, lambda a, row: a["a"].mean(), vectors=vectors)


def test_rows_of_ones_own_are_copied_and_need_no_gradient() -> None:
    matrix = torch.nn.Parameter(MATRIX.clone())
    own = family("own", "a", {"m": matrix}, lambda a, row: a["a"] @ row["m"], vectors="m")
    before = of_all(own, LAYOUTS["vector"])
    matrix.data.zero_()
    assert torch.equal(of_all(own, LAYOUTS["vector"]), before)
    assert own.family is not None
    assert not own.family.rows["m"].requires_grad


def test_some_zero_directions_are_said() -> None:
    with_zeros = MATRIX.clone()
    with_zeros[[2, 5]] = 0
    with pytest.warns(UserWarning, match="2 of 9 directions are zero and have no image, the first is 2"):
        directions("a", with_zeros)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        directions("a", MATRIX)


def test_changing_the_matrix_afterwards_changes_nothing() -> None:
    matrix = MATRIX.clone()
    objective = directions("a", matrix)
    before = of_all(objective, LAYOUTS["map"])
    matrix.zero_()
    assert torch.equal(of_all(objective, LAYOUTS["map"]), before)
