"""Objectives on directions in the space of channels, such as those of a linear probe or a sparse dictionary."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from featvis_func.constants import device_constant
from featvis_func.objective.base import Objective, features_last, resolve_position
from featvis_func.objective.expression import Call, call
from featvis_func.objective.units import Position
from featvis_func.types import Activations, Target
from featvis_func.validation import check_float, check_name

Similarity = Literal["dot", "cosine", "dot_cosine"]
SIMILARITIES: tuple[str, ...] = get_args(Similarity)

# Lower bound of the cosine that a dot product is multiplied by, as in Lucid.
_MIN_COSINE = 0.1
# Added to the norms, so that the gradient is finite at zero.
_EPS = 1e-6


def direction(
    layer: str, vector: Sequence[float] | Tensor, *, similarity: Similarity = "dot", power: float = 2.0
) -> Objective:
    """Maximise the similarity to a direction in the space of channels: ``mean_p s(x_p, v)`` over the positions ``p``.

    Args:
        layer: the layer's name.
        vector: one number per channel, finite and not all zero; its length has an effect only for ``"dot"`` and
            ``"dot_cosine"``.
        similarity: ``"dot"``: ``x . v``; ``"cosine"``: ``x . v / (|x| |v|)``; ``"dot_cosine"``: the dot product times
            ``max(0.1, cosine) ** power``, which rewards both length and direction.
        power: exponent of the cosine for ``"dot_cosine"``, at least 0.

    Raises:
        ValueError: if the vector does not have one axis, is zero or not finite, the similarity is unknown or ``power``
            below 0; when called, if the vector's length is not the number of channels.

    Source: Lucid, ``optvis/objectives.py`` (``direction``, ``_dot_cossim``); here per image, there over the batch.

    >>> direction("a", [0.0, 1.0])({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(5.5000)
    """
    values, expression = _check_direction("direction", layer, vector, similarity, power)
    on_device = device_constant(values)

    def activation_map(activations: Activations, target: Target) -> Tensor:
        values = features_last(activations[layer])
        return similarity_to(layer, values, on_device(values), similarity, power)

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
    """Maximise the similarity to a direction at one position.

    Args: as for :func:`direction`; ``position`` as for :func:`neuron`.

    Raises:
        ValueError: as for :func:`direction`; when called, if the layer has no such position.

    >>> direction_neuron("a", [0.0, 1.0], position=(0, 0))({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(4.)
    """
    values, expression = _check_direction("direction_neuron", layer, vector, similarity, power, position)
    on_device = device_constant(values)

    def activation_map(activations: Activations, target: Target) -> Tensor:
        values = features_last(activations[layer])
        return similarity_to(layer, values, on_device(values), similarity, power)

    def score(activations: Activations, target: Target) -> Tensor:
        similarities = activation_map(activations, target)
        return similarities[resolve_position(layer, similarities.shape, position)]

    return Objective(score, activation_map, (layer,), (), str(expression), expression=expression)


def channel_weights(layer: str, weights: Sequence[float] | Tensor) -> Objective:
    """Maximise a weighted sum of channels: ``sum_c w_c mean_p x_cp``.

    Args:
        layer: the layer's name.
        weights: one number per channel, finite and not all zero.

    Raises:
        ValueError: as for :func:`direction`.

    >>> channel_weights("a", [1.0, -1.0])({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(-4.)
    """
    values, _ = _check_direction("channel_weights", layer, weights, "dot", 0.0)
    objective = direction(layer, values)
    expression = call("channel_weights", layer, values)
    return replace(objective, name=str(expression), expression=expression)


def _check_direction(
    function: str,
    layer: str,
    vector: Sequence[float] | Tensor,
    similarity: str,
    power: float,
    position: Position | None = None,
) -> tuple[Tensor, Call]:
    """Check the arguments, and return a copy of the vector as a tensor and the call that makes the objective."""
    values = torch.as_tensor(vector).detach().clone()
    values = values if values.is_floating_point() else values.float()
    if values.ndim != 1 or not bool(values.isfinite().all()) or not bool(values.any()):
        raise ValueError(
            f"{function}: expected one finite number per channel, not all zero, got a tensor {tuple(values.shape)}"
        )
    check_name("similarity", similarity, SIMILARITIES)
    check_float(f"{function}: power", power, 0)
    return values, call(
        function,
        layer,
        values,
        position=position,
        similarity=None if similarity == "dot" else similarity,
        power=power if similarity == "dot_cosine" else None,
    )


def check_width(layer: str, channels: int, length: int) -> None:
    """Raise ValueError if directions do not have one number per channel of a layer."""
    if channels != length:
        raise ValueError(f"the direction has {length} numbers, but layer {layer!r} has {channels} channels")


def similarity_to(layer: str, values: Tensor, direction: Tensor, similarity: str, power: float) -> Tensor:
    """Compute the similarity of each position to a vector: ``(..., c) -> (...)``."""
    check_width(layer, values.shape[-1], len(direction))
    return from_dots((values * direction).sum(-1), values, direction, similarity, power)


def from_dots(dots: Tensor, x: Tensor, y: Tensor, similarity: str, power: float) -> Tensor:
    """Compute a similarity of ``x`` and ``y`` along the last axis from their dot products."""
    if similarity == "dot":
        return dots
    cosines = _cosines(dots, x, y)
    return cosines if similarity == "cosine" else dots * cosines.clamp_min(_MIN_COSINE) ** power


def dot_cosine(x: Tensor, y: Tensor, power: float) -> Tensor:
    """Compute ``x . y max(0.1, cosine)^power`` along the last axis.

    >>> dot_cosine(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]), 2).round(decimals=3)
    tensor(2.)
    """
    return from_dots((x * y).sum(-1), x, y, "dot_cosine", power)


def cosine_similarity(x: Tensor, y: Tensor) -> Tensor:
    """Compute the cosine of the angle along the last axis, with a gradient that is finite also at zero.

    >>> cosine_similarity(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])).round(decimals=3)
    tensor(0.7070)
    """
    return _cosines((x * y).sum(-1), x, y)


def _cosines(dots: Tensor, x: Tensor, y: Tensor) -> Tensor:
    squares = (x.square().sum(-1) + _EPS**2) * (y.square().sum(-1) + _EPS**2)
    return dots / squares.sqrt()
