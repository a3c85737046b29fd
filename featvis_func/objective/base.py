"""What all objectives are: a pure function of one image's activations, which adds, subtracts and scales."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from featvis_func.objective.expression import Combined, Expression, Scaled
from featvis_func.types import Activations, Target

BatchScore: TypeAlias = Callable[[Activations, Target], Tensor]
"""(activations of all filters, targets) -> float ``(n,)``."""

IMAGE = "<image>"
"""Where an objective finds the image itself among the activations: ``(c, h, w)``, in range, without the view."""

PICTURE = "<picture>"
"""What stands before a layer's name among the activations where they are those of the objective's own picture."""


@dataclass(frozen=True, repr=False)
class Objective:
    """A pure function ``(activations of one image, target) -> ()``, with ``+``, ``-`` and ``*`` by numbers.

    Build one with the functions of :mod:`featvis_func.objective`, or directly from functions of your own.
    """

    score: Callable[[Activations, Target], Tensor]
    """(activations, target) -> float ``()``: what is raised."""
    activation_map: Callable[[Activations, Target], Tensor]
    """(activations, target) -> ``(h', w')``, ``(t,)`` or ``()``: what is shown beside the image."""
    layers: tuple[str, ...]
    """The layers whose activations it reads; the first is the one that it is about. None: the image alone."""
    targeted: tuple[str, ...]
    """Those of its layers in which the target picks the channel."""
    name: str
    batch_score: Callable[[Activations, Target], Tensor] | None = None
    """What couples the filters of a run, added to the score of each: (activations, target), both with the leading axis
    ``n`` -> float ``(n,)``. Its filters are rendered together, in the order asked for."""
    variants: int | None = None
    """How many images it describes, if it picks no channel by the target; ``None``: any number."""
    picture: Tensor | None = None
    """``(c, h, w)`` in ``[0, 1]``, of the images' size: shown to the model beside each image, under the same view."""

    expression: Expression | None = None
    """How it is written in Python; ``None``: an objective of the user's own, known by its name."""

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
            raise ValueError(f"an objective can only be weighted by a finite number, got {factor}")
        expression = Scaled(float(factor), self.expression_or_name)
        return Objective(
            lambda a, t: factor * self.score(a, t),
            self.activation_map,
            self.layers,
            self.targeted,
            str(expression),
            _scaled(self.batch_score, factor),
            self.variants,
            self.picture,
            expression,
        )

    __rmul__ = __mul__

    def _combine(self, other: "Objective", sign: float) -> "Objective":
        if not isinstance(other, Objective):
            return NotImplemented
        counts = {count for count in (self.variants, other.variants) if count is not None}
        if len(counts) > 1:
            raise ValueError(f"{self} and {other} describe different numbers of images: {sorted(counts)}")
        if self.picture is not None and other.picture is not None and self.picture is not other.picture:
            raise ValueError(f"{self} and {other} are about different pictures; build both from the same tensor")
        expression = Combined(self.expression_or_name, "+" if sign > 0 else "-", other.expression_or_name)
        return Objective(
            lambda a, t: self.score(a, t) + sign * other.score(a, t),
            self.activation_map if self.layers or not other.layers else other.activation_map,
            tuple(dict.fromkeys(self.layers + other.layers)),
            tuple(dict.fromkeys(self.targeted + other.targeted)),
            str(expression),
            _added(self.batch_score, _scaled(other.batch_score, sign)),
            next(iter(counts), None),
            self.picture if other.picture is None else other.picture,
            expression,
        )

    @property
    def expression_or_name(self) -> Expression:
        """How it is written in Python, or the name of an objective of the user's own."""
        return self.name if self.expression is None else self.expression


def _scaled(batch_score: BatchScore | None, factor: float) -> BatchScore | None:
    return None if batch_score is None else lambda a, t: factor * batch_score(a, t)


def _added(first: BatchScore | None, second: BatchScore | None) -> BatchScore | None:
    if first is None or second is None:
        return first or second
    return lambda a, t: first(a, t) + second(a, t)


def feature_axis(shape: tuple[int, ...] | torch.Size) -> int:
    """The axis of the channels in one image's activations: ``c`` in ``(c, h, w)``, ``d`` in ``(t, d)`` and ``(d,)``.

    Raises:
        ValueError: another number of axes.

    >>> feature_axis((64, 7, 7)), feature_axis((197, 768)), feature_axis((1000,))
    (0, 1, 0)
    """
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"activations of shape {tuple(shape)} have no channels; expected (c, h, w), (t, d) or (d,)")
    return 1 if len(shape) == 2 else 0


def features_last(values: Tensor) -> Tensor:
    """Activations with the channels as their last axis."""
    return values.movedim(feature_axis(values.shape), -1)


def gram(values: Tensor) -> Tensor:
    """How channels go together over the positions of one image: ``G_ab = mean_p x_ap x_bp``, ``(d, d)``."""
    flat = features_last(values)
    flat = flat.reshape(-1, flat.shape[-1])
    return flat.T @ flat / flat.shape[0]


def place(layer: str, positions: Sequence[int], position: tuple[int, int] | int | None) -> tuple[int, ...]:
    """A position among those of a layer; ``None``: the centre, each side halved.

    Raises:
        ValueError: the layer has no such position.
    """
    if position is None:
        return tuple(size // 2 for size in positions)
    where = position if isinstance(position, tuple) else (position,)
    if len(where) != len(positions) or not all(0 <= i < s for i, s in zip(where, positions, strict=True)):
        raise ValueError(f"no position {position} in layer {layer!r}, whose positions are {tuple(positions)}")
    return where
