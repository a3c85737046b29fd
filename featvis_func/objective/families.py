"""Families of objectives: one image for each member, be it a neuron, a class, or a facet of a unit.

A family is an :class:`Objective` whose target is the number of a member. What makes the members differ are tensors with
a row for each, from which the step takes the rows of its batch: one compiled step serves all members, and a batch, a
sweep and a gallery take a family as they take the channels of a layer. Families of directions are in
:mod:`featvis_func.objective.dictionaries`.

>>> objective = neurons("layer3", [12, 40], [(3, 4), (0, 0)])
>>> objective.variants, objective.family.names
(4, ('12 at 3,4', '12 at 0,0', '40 at 3,4', '40 at 0,0'))
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor
from torch.func import vmap

from featvis_func.constants import device_constant
from featvis_func.objective.base import (
    Family,
    Objective,
    check_channel,
    features_last,
    resolve_position,
    take_channel,
)
from featvis_func.objective.expression import Expression, call
from featvis_func.objective.together import style_cosines
from featvis_func.objective.units import Position, category_number
from featvis_func.types import Activations, Target
from featvis_func.validation import check_float, check_int

Rows = Mapping[str, Tensor]
"""The rows of one member, by the names of the tensors."""


def family(
    label: str,
    layers: str | Sequence[str],
    rows: Mapping[str, Tensor],
    score: Callable[[Activations, Rows], Tensor],
    activation_map: Callable[[Activations, Rows], Tensor] | None = None,
    *,
    names: Sequence[str] | None = None,
    vectors: str | None = None,
    all_scores: Callable[[Activations], Tensor] | None = None,
    expression: Expression | None = None,
) -> Objective:
    """Make a family of objectives from tensors with a row for each member.

    Args:
        label: a short name of the family.
        layers: the layers whose activations it reads, the main one first.
        rows: name -> tensor ``(n, ...)``, with one row for each of ``n`` members.
        score: (activations of one image, the rows of one member) -> ``()``: the number to maximise.
        activation_map: the same arguments -> the map to show beside the image. Default: the score.
        names: of the members.
        vectors: the tensor that holds each member's direction in the space of channels, by which a gallery finds the
            nearest members.
        all_scores: activations of one image -> the scores of all members, ``(n,)``, where there is a faster way than
            one after the other.
        expression: the Python expression that makes it.

    Raises:
        ValueError: no layer, no members, tensors with different numbers of rows, or another number of names.

    >>> objective = family("scaled", "a", {"by": torch.tensor([1.0, 2.0])}, lambda a, row: a["a"].sum() * row["by"])
    >>> objective({"a": torch.ones(3)}, torch.tensor(1))
    tensor(6.)
    """
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    counts = {name: len(values) if values.ndim else 0 for name, values in rows.items()}
    if not layers or not counts or min(counts.values()) < 1 or len(set(counts.values())) > 1:
        raise ValueError(f"{label}: expected a layer, and tensors with a row for each member, got rows {counts}")
    count = next(iter(counts.values()))
    if vectors is not None and (vectors not in rows or rows[vectors].ndim != 2):
        shapes = {name: tuple(values.shape) for name, values in rows.items()}
        raise ValueError(f"{label}: vectors must name a matrix among the rows, got {vectors!r} of {shapes}")
    if expression is None:
        rows = {name: torch.as_tensor(values).detach().clone() for name, values in rows.items()}
    if names is not None and (isinstance(names, str) or len(names) != count):
        given = repr(names) if isinstance(names, str) else len(names)
        raise ValueError(f"{label}: expected {count} names, one for each member, got {given}")
    constants = {name: device_constant(values, cast=False) for name, values in rows.items()}

    def rows_of(activations: Activations, target: Target) -> dict[str, Tensor]:
        like, index = activations[layers[0]], target.reshape(1)
        own = {name: values(like).index_select(0, index).squeeze(0) for name, values in constants.items()}
        return {name: row.to(like.dtype) if row.is_floating_point() else row for name, row in own.items()}

    shown = score if activation_map is None else activation_map
    return Objective(
        lambda a, t: score(a, rows_of(a, t)),
        lambda a, t: shown(a, rows_of(a, t)),
        layers,
        (),
        label if expression is None else str(expression),
        variants=count,
        expression=expression,
        family=Family(label, dict(rows), None if names is None else tuple(map(str, names)), vectors, all_scores),
    )


def neurons(
    layer: str, channels: int | Sequence[int], positions: Sequence[Position], *, names: Sequence[str] | None = None
) -> Objective:
    """Maximise channels at positions: a member for each channel at each position, the positions of a channel together.

    Args:
        layer: the layer's name.
        channels: one or several.
        positions: of each channel, as for :func:`neuron`.
        names: of the members. Default: made from channel and position.

    Raises:
        ValueError: no channel or no position, or a number below 0; when called, if the layer does not have them.

    >>> objective = neurons("a", 1, [(0, 0), (1, 1)])
    >>> [float(objective({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(i))) for i in (0, 1)]
    [4.0, 7.0]
    """
    several = isinstance(channels, Iterable)
    numbers = [check_int("neurons: channel", c, 0) for c in (channels if several else [channels])]
    if not isinstance(positions, Iterable):
        raise ValueError(f"neurons: expected a list of positions, such as [(3, 4)], got {positions!r}")
    places = [
        tuple(check_int("neurons: position", i) for i in (p if isinstance(p, Iterable) else (p,))) for p in positions
    ]
    if not numbers or not places:
        raise ValueError(f"neurons: expected at least one channel and one position, got {channels!r}, {positions!r}")
    if len({len(place) for place in places}) > 1 or min(min(place, default=-1) for place in places) < 0:
        raise ValueError(f"neurons: expected positions of one form, such as (3, 4), from 0, got {positions!r}")
    members = list(product(numbers, places))

    def activation_map(activations: Activations, row: Rows) -> Tensor:
        values = activations[layer]
        check_channel(layer, values, max(numbers))
        sides = features_last(values).shape[:-1]
        for place in places:
            resolve_position(layer, sides, place)
        return take_channel(values, row["channel"])

    def score(activations: Activations, row: Rows) -> Tensor:
        feature = activation_map(activations, row)
        index = row["position"].new_zeros(())
        for i, side in enumerate(feature.shape):
            index = index * side + row["position"][i]
        return feature.reshape(-1).index_select(0, index.reshape(1)).squeeze(0)

    rows = {"channel": torch.tensor([c for c, _ in members]), "position": torch.tensor([p for _, p in members])}
    described = [f"{c} at {','.join(map(str, p))}" for c, p in members]
    return family(
        f"neuron:{layer}",
        layer,
        rows,
        score,
        activation_map,
        names=described if names is None else names,
        expression=call("neurons", layer, tuple(numbers), tuple(places)),
    )


def logits(layer: str, chosen: Sequence[int | str], *, categories: Sequence[str] = ()) -> Objective:
    """Maximise the logit of each of several classes, the value before the softmax.

    Args:
        layer: name of the classifier's last layer; its activations are ``(d,)``.
        chosen: numbers of classes, or their names among ``categories``.
        categories: names of the classes in order: ``load_model(...).categories``.

    Raises:
        ValueError: no class, or an unknown name; when called, if the layer has no such class.

    >>> objective = logits("fc", ["cat", 0], categories=["dog", "cat"])
    >>> [float(objective({"fc": torch.tensor([1.0, 3.0])}, torch.tensor(i))) for i in (0, 1)]
    [3.0, 1.0]
    """
    given = list(chosen) if not isinstance(chosen, str | int) else [chosen]
    numbers = [
        category_number(c, categories) if isinstance(c, str) else check_int("logits: class", c, 0) for c in given
    ]
    if not numbers:
        raise ValueError("logits: expected at least one class, got none")

    def activation_map(activations: Activations, row: Rows) -> Tensor:
        check_channel(layer, activations[layer], max(numbers), kind="class")
        return take_channel(activations[layer], row["category"])

    names = [categories[n] if n < len(categories) else str(n) for n in numbers]
    return family(
        f"logit:{layer}",
        layer,
        {"category": torch.tensor(numbers)},
        lambda a, row: activation_map(a, row).mean(),
        activation_map,
        names=names,
        expression=call("logits", layer, tuple(numbers)),
    )


def facets(objective: Objective, count: int, *, weight: float = 0.2, layer: str | None = None) -> Objective:
    """Show each member of a family, or each channel of a layer, in several images that differ in style.

    The facets of member ``m`` are the images ``count * m`` to ``count * m + count - 1``, rendered in one batch. Each
    image's score is reduced by ``weight`` times its magnitude times the mean of ``cos(G(x_i), G(x_j))`` over the
    member's other images, see :func:`diversity`; the magnitude counts as a constant in the gradient, so that a weight
    means the same in every layer.

    Args:
        objective: whose target picks a channel or a member; or one that describes a single image.
        count: images per member, at least 2.
        weight: of the similarity, at least 0.
        layer: the layer whose activations are compared. Default: the objective's own.

    Raises:
        ValueError: a number out of range, an objective whose images depend on each other already, or one without a
            layer.

    Source: Olah et al., "Feature Visualization" (2017), section "Diversity".

    >>> objective = facets(family("two", "a", {"v": torch.eye(2)}, lambda a, r: a["a"] @ r["v"]), 3)
    >>> objective.variants, objective.group
    (6, 3)
    """
    count, weight = check_int("facets: count", count, 2), check_float("facets: weight", weight, 0)
    if objective.batch_score is not None:
        raise ValueError(f"facets: the images of {objective} depend on each other already")
    if not objective.layers:
        raise ValueError(f"facets: {objective} reads no layer of the model")
    compared = objective.layers[0] if layer is None else layer

    def member(target: Target) -> Target:
        return torch.div(target, count, rounding_mode="floor")

    def batch_score(activations: Activations, target: Target) -> Tensor:
        cosines = style_cosines(activations[compared])
        members, number = member(target), torch.arange(len(target), device=target.device)
        others = (members[:, None] == members) & (number[:, None] != number)
        size = vmap(objective.score)(activations, members).detach().abs()
        return -weight * size * (cosines * others).sum(1) / (count - 1)

    known = objective.family or Family(str(objective.layers[0]), {})
    scores = known.all_scores
    total = None if objective.targeted else count * (objective.variants or 1)
    expression = call(
        "facets",
        objective.expression_or_name,
        count,
        weight=None if weight == 0.2 else weight,
        layer=layer,
    )
    return replace(
        objective,
        score=lambda a, t: objective.score(a, member(t)),
        activation_map=lambda a, t: objective.activation_map(a, member(t)),
        layers=tuple(dict.fromkeys((*objective.layers, compared))),
        name=str(expression),
        batch_score=batch_score,
        variants=total,
        expression=expression,
        family=known._replace(
            label=f"{known.label} x{count}",
            all_scores=None if scores is None else lambda a: scores(a).repeat_interleave(count),
            copies=count,
        ),
        group=count,
    )


def member(objective: Objective, number: int) -> Objective:
    """Choose one member of a family, or one channel of a layer, whatever the filter number.

    Args:
        objective: whose target picks a member or a channel.
        number: of the member, from 0.

    Raises:
        ValueError: the family has no such member, or its images depend on each other.

    >>> member(neurons("a", 1, [(0, 0), (1, 1)]), 1)({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(7.)
    """
    number = check_int("member: number", number, 0)
    if objective.batch_score is not None:
        raise ValueError(f"member: the images of {objective} depend on each other")
    if objective.variants is not None and number >= objective.variants:
        raise ValueError(f"{objective} has members 0 to {objective.variants - 1}, got {number}")
    expression = call("member", objective.expression_or_name, number)

    def chosen(function: Callable[[Activations, Target], Tensor]) -> Callable[[Activations, Target], Tensor]:
        def of_member(activations: Activations, target: Target) -> Tensor:
            for layer in objective.targeted:
                check_channel(layer, activations[layer], number)
            return function(activations, torch.full_like(target, number))

        return of_member

    return replace(
        objective,
        score=chosen(objective.score),
        activation_map=chosen(objective.activation_map),
        targeted=(),
        name=str(expression),
        variants=None,
        expression=expression,
        family=None,
    )
