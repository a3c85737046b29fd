"""The :class:`Objective`: a pure function of one image's activations, with ``+``, ``-`` and ``*``."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from featvis_func.objective.expression import Combined, Expression, Scaled, UserObjective
from featvis_func.types import Activations, Target

BatchScore: TypeAlias = Callable[[Activations, Target], Tensor]
"""(activations of all filters, targets) -> float ``(n,)``."""

IMAGE = "<image>"
"""The key of the image itself among the activations: ``(c, h, w)``, a video ``(c, t, h, w)`` or a signal ``(c, t)``; in
range, before the random transform."""

PICTURE = "<picture>"
"""The prefix of a layer's name among the activations for :attr:`Objective.picture`."""


class Family(NamedTuple):
    """What is known of the members of a family of objectives beside their numbers, see
    :mod:`featvis_func.objective.families`."""

    label: str
    """A short name, such as ``"directions:blocks.5"``."""
    rows: Mapping[str, Tensor]
    """Tensors with a row for each member."""
    names: tuple[str, ...] | None = None
    """Of the members."""
    vectors: str | None = None
    """The tensor among ``rows`` that holds each member's direction in the space of channels."""
    all_scores: Callable[[Activations], Tensor] | None = None
    """activations of one image -> the scores of all members, ``(count,)``, where there is a faster way than one after
    the other."""
    copies: int = 1
    """Images of each member: image ``i`` is one of member ``i // copies``."""
    command: tuple[str, ...] | None = None
    """Words of the command line that make it, where it was made from them."""

    def name_of(self, number: int) -> str | None:
        """The name of the member in an image, if the members have names."""
        if self.names is None:
            return None
        name = self.names[number // self.copies]
        return name if self.copies == 1 else f"{name}, facet {number % self.copies}"


@dataclass(frozen=True, repr=False)
class Objective:
    """A pure function ``(activations of one image, target) -> ()``, with ``+``, ``-`` and ``*`` by numbers.

    Make one with the functions of :mod:`featvis_func.objective`, or directly from functions of your own.
    """

    score: Callable[[Activations, Target], Tensor]
    """(activations, target) -> float ``()``: the number to maximise."""
    activation_map: Callable[[Activations, Target], Tensor]
    """(activations, target) -> one number per position, ``(h', w')``, ``(t', h', w')``, ``(t,)`` or ``()``: the map
    that is shown beside the image."""
    layers: tuple[str, ...]
    """The layers whose activations it reads, the main one first; empty if it reads only the image."""
    targeted: tuple[str, ...]
    """Those of its layers in which the target selects the channel."""
    name: str
    batch_score: Callable[[Activations, Target], Tensor] | None = None
    """A term that depends on all filters of a run, added to the score of each: (activations, targets), both with the
    leading axis ``n`` -> float ``(n,)``. Its filters are rendered in one batch, in the requested order."""
    variants: int | None = None
    """The number of images that it describes, if the target does not select a channel; ``None``: any number."""
    picture: Tensor | None = None
    """``(c, h, w)`` in ``[0, 1]``, or a video or signal, of the images' size: passed to the model along with each
    image, under the same random transform."""

    expression: Expression | None = None
    """The Python expression that makes it; ``None`` for a user-defined objective."""
    family: Family | None = None
    """Of a family of objectives, whose member the target picks: what is known of the members."""
    group: int = 1
    """The number of successive images that depend on each other, and on no others, by ``batch_score``: they are
    rendered in one batch. 1, if all do."""

    def __call__(self, activations: Activations, target: Target) -> Tensor:
        return self.score(activations, target)

    def __repr__(self) -> str:
        return self.name

    def __add__(self, other: "Objective") -> "Objective":
        return self._combine(other, 1.0)

    def __sub__(self, other: "Objective") -> "Objective":
        return self._combine(other, -1.0)

    def __neg__(self) -> "Objective":
        return -1.0 * self

    def __mul__(self, factor: float) -> "Objective":
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"an objective can only be multiplied by a finite number, got {factor}")
        expression = Scaled(float(factor), self.expression_or_name)
        return replace(
            self,
            score=lambda a, t: factor * self.score(a, t),
            name=str(expression),
            batch_score=_scale(self.batch_score, factor),
            expression=expression,
            family=None if self.family is None else _scale_family(self.family, factor, str(expression)),
        )

    __rmul__ = __mul__

    def _combine(self, other: "Objective", sign: float) -> "Objective":
        if not isinstance(other, Objective):
            return NotImplemented
        counts = {count for count in (self.variants, other.variants) if count is not None}
        if len(counts) > 1:
            raise ValueError(f"{self} and {other} describe different numbers of images: {sorted(counts)}")
        if self.picture is not None and other.picture is not None and self.picture is not other.picture:
            raise ValueError(f"{self} and {other} refer to different pictures; make both from the same tensor")
        groups = {objective.group for objective in (self, other) if objective.batch_score is not None}
        if len(groups) > 1:
            raise ValueError(f"{self} and {other} divide the images into different groups: of {sorted(groups)}")
        if self.group != other.group and all(o.targeted or o.variants is not None for o in (self, other)):
            raise ValueError(f"{self} and {other} pair images of different members; take the facets of the sum instead")
        expression = Combined(self.expression_or_name, "+" if sign > 0 else "-", other.expression_or_name)
        return Objective(
            lambda a, t: self.score(a, t) + sign * other.score(a, t),
            self.activation_map if self.layers or not other.layers else other.activation_map,
            tuple(dict.fromkeys(self.layers + other.layers)),
            tuple(dict.fromkeys(self.targeted + other.targeted)),
            str(expression),
            _add(self.batch_score, _scale(other.batch_score, sign)),
            next(iter(counts), None),
            self.picture if other.picture is None else other.picture,
            expression,
            _combine_families(self.family, other.family, sign, str(expression)),
            next(iter(groups), 1),
        )

    @property
    def expression_or_name(self) -> Expression:
        """The Python expression that makes it, or the name of a user-defined objective."""
        return UserObjective(self.name) if self.expression is None else self.expression


def _scale_family(family: Family, factor: float, label: str) -> Family:
    scores = family.all_scores
    return family._replace(label=label, all_scores=None if scores is None else lambda a: factor * scores(a))


def _combine_families(first: Family | None, second: Family | None, sign: float, label: str) -> Family | None:
    """What is known of the members of a sum: the tensors of both, under different names."""
    if first is None or second is None:
        only = first or second
        return None if only is None else only._replace(label=label, all_scores=None)
    rows = {**first.rows, **{_unused(name, first.rows): values for name, values in second.rows.items()}}
    one, other = first.all_scores, second.all_scores
    both = None if one is None or other is None else lambda a: one(a) + sign * other(a)
    return Family(label, rows, first.names or second.names, first.vectors, both, first.copies)


def _unused(name: str, names: Mapping[str, Tensor]) -> str:
    number = 2
    while (candidate := f"{name}_{number}") in names:
        number += 1
    return candidate if name in names else name


def _scale(batch_score: BatchScore | None, factor: float) -> BatchScore | None:
    return None if batch_score is None else lambda a, t: factor * batch_score(a, t)


def _add(first: BatchScore | None, second: BatchScore | None) -> BatchScore | None:
    if first is None or second is None:
        return first or second
    return lambda a, t: first(a, t) + second(a, t)


def feature_axis(shape: tuple[int, ...] | torch.Size) -> int:
    """Return the axis of the channels in one image's activations: ``c`` in ``(c, h, w)`` and ``(c, t, h, w)``, ``d`` in
    ``(t, d)`` and ``(d,)``.

    Raises:
        ValueError: if the shape has no axis or more than 4.

    >>> feature_axis((64, 7, 7)), feature_axis((64, 8, 7, 7)), feature_axis((197, 768)), feature_axis((1000,))
    (0, 0, 1, 0)
    """
    if not 1 <= len(shape) <= 4:
        raise ValueError(
            f"activations of shape {tuple(shape)} have no channels; expected (c, h, w), (c, t, h, w), (t, d) or (d,)"
        )
    return 1 if len(shape) == 2 else 0


def features_last(values: Tensor) -> Tensor:
    """Move the channels of activations to the last axis."""
    return values.movedim(feature_axis(values.shape), -1)


def take_channel(values: Tensor, number: Target) -> Tensor:
    """Take the channel of one image's activations that a target picks, ``(*positions)``."""
    axis = feature_axis(values.shape)
    # Not `values[number]`, which copies a tensor index without axes to the host.
    return values.index_select(axis, number.reshape(1)).squeeze(axis)


def check_channel(layer: str, values: Tensor, number: int, *, kind: str = "channel") -> None:
    """Raise ValueError if a layer's activations have no such channel."""
    count = values.shape[feature_axis(values.shape)]
    if not 0 <= number < count:
        raise ValueError(f"no {kind} {number} in layer {layer!r}, which has {count}")


def gram(values: Tensor) -> Tensor:
    """Compute the Gram matrix of the channels of one image: ``G_ab = mean_p x_ap x_bp``, ``(d, d)``."""
    flat = features_last(values)
    flat = flat.reshape(-1, flat.shape[-1])
    return flat.T @ flat / flat.shape[0]


def resolve_position(layer: str, positions: Sequence[int], position: tuple[int, ...] | int | None) -> tuple[int, ...]:
    """Return a position as an index into a layer's activation map.

    Args:
        layer: the layer's name, for the error message.
        positions: shape of the activation map.
        position: ``(row, column)``, ``(frame, row, column)``, or the number of a token or of a time step; ``None``: the
            centre, each side divided by 2.

    Raises:
        ValueError: if the layer has no such position.
    """
    if position is None:
        return tuple(size // 2 for size in positions)
    index = position if isinstance(position, tuple) else (position,)
    if len(index) != len(positions) or not all(0 <= i < s for i, s in zip(index, positions, strict=True)):
        raise ValueError(f"no position {position} in layer {layer!r}, whose positions are {tuple(positions)}")
    return index
