"""Objectives on directions in the space of channels, such as a probe's or a dictionary's."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from featvis_func.objective.base import Objective, features_last, place
from featvis_func.objective.expression import Call, call
from featvis_func.objective.units import Position
from featvis_func.types import Activations, Target
from featvis_func.validation import check_name

Similarity = Literal["dot", "cosine", "dot_cosine"]

# The least that a dot product is multiplied by, as in Lucid.
_LEAST_COSINE = 0.1
_EPS = 1e-6


def direction(
    layer: str, vector: Sequence[float] | Tensor, *, similarity: Similarity = "dot", power: float = 2.0
) -> Objective:
    """A direction in the space of channels: ``mean_p s(x_p, v)`` over the positions ``p`` of one image.

    Args:
        layer: the layer's name.
        vector: one number per channel, not all zero; its length matters to ``"dot"`` and ``"dot_cosine"`` alone.
        similarity: ``"dot"``: ``x . v``; ``"cosine"``: ``x . v / (|x| |v|)``; ``"dot_cosine"``: the dot product times
            ``max(0.1, cosine) ** power``, which wants length and direction.
        power: of the cosine, at least 0.

    Raises:
        ValueError: a vector that is not one, zero or not finite; another similarity; when called, another length.

    Source: Lucid, ``optvis/objectives.py`` (``direction``, ``_dot_cossim``); here per image, not over the batch.

    >>> direction("a", [0.0, 1.0])({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(5.5000)
    """
    values, expression = _vector("direction", layer, vector, similarity, power)

    def activation_map(activations: Activations, target: Target) -> Tensor:
        return _similar(layer, features_last(activations[layer]), values, similarity, power)

    return Objective(
        lambda a, t: activation_map(a, t).mean(), activation_map, (layer,), (), str(expression), expression=expression
    )


def direction_neuron(
    layer: str,
    vector: Sequence[float] | Tensor,
    *,
    position: Position | None = None,
    similarity: Similarity = "dot",
    power: float = 2.0,
) -> Objective:
    """A direction in the space of channels, at one position: see :func:`direction` and :func:`neuron`.

    >>> direction_neuron("a", [0.0, 1.0], position=(0, 0))({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(4.)
    """
    values, expression = _vector("direction_neuron", layer, vector, similarity, power, position)

    def activation_map(activations: Activations, target: Target) -> Tensor:
        return _similar(layer, features_last(activations[layer]), values, similarity, power)

    def score(activations: Activations, target: Target) -> Tensor:
        shown = activation_map(activations, target)
        return shown[place(layer, shown.shape, position)]

    return Objective(score, activation_map, (layer,), (), str(expression), expression=expression)


def channel_weights(layer: str, weights: Sequence[float] | Tensor) -> Objective:
    """A weighted sum of channels: ``sum_c w_c mean_p x_cp``.

    Args:
        layer: the layer's name.
        weights: one number per channel.

    Raises:
        ValueError: as for :func:`direction`.

    >>> channel_weights("a", [1.0, -1.0])({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(-4.)
    """
    values, _ = _vector("channel_weights", layer, weights, "dot", 0.0)
    goal = direction(layer, values)
    expression = call("channel_weights", layer, values)
    return replace(goal, name=str(expression), expression=expression)


def _vector(
    kind: str,
    layer: str,
    vector: Sequence[float] | Tensor,
    similarity: str,
    power: float,
    position: Position | None = None,
) -> tuple[Tensor, Call]:
    """A copy of a direction as a tensor, and the call that makes the objective."""
    values = torch.as_tensor(vector).detach().clone()
    values = values if values.is_floating_point() else values.float()
    if values.ndim != 1 or not bool(values.isfinite().all()) or not bool(values.any()):
        raise ValueError(f"{kind} needs one finite number per channel, not all zero, got {tuple(values.shape)}")
    check_name("similarity", similarity, ("dot", "cosine", "dot_cosine"))
    if not 0 <= power < math.inf:
        raise ValueError(f"the power of the cosine must be finite and at least 0, got {power}")
    return values, call(
        kind,
        layer,
        values,
        position=position,
        similarity=None if similarity == "dot" else similarity,
        power=power if similarity == "dot_cosine" else None,
    )


def _similar(layer: str, values: Tensor, vector: Tensor, similarity: str, power: float) -> Tensor:
    """How like a vector each position is: ``(..., c) -> (...)``."""
    if values.shape[-1] != len(vector):
        raise ValueError(
            f"a direction of {len(vector)} numbers met layer {layer!r}, which has {values.shape[-1]} channels"
        )
    vector = vector.to(values)
    dot = (values * vector).sum(-1)
    if similarity == "dot":
        return dot
    return cosine_of(values, vector) if similarity == "cosine" else dot_cosine(values, vector, power)


def dot_cosine(x: Tensor, y: Tensor, power: float) -> Tensor:
    """``x . y max(0.1, cosine)^power`` along the last axis.

    >>> dot_cosine(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]), 2).round(decimals=3)
    tensor(2.)
    """
    return (x * y).sum(-1) * cosine_of(x, y).clamp_min(_LEAST_COSINE) ** power


def cosine_of(x: Tensor, y: Tensor) -> Tensor:
    """The cosine along the last axis; its gradient is finite at zero, too.

    >>> cosine_of(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])).round(decimals=3)
    tensor(0.7070)
    """
    squares = (x.square().sum(-1) + _EPS**2) * (y.square().sum(-1) + _EPS**2)
    return (x * y).sum(-1) / squares.sqrt()
