"""Objectives on units: a channel, a part of it, a neuron, a whole layer, a class."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from featvis_func.objective.base import Objective, feature_axis, place
from featvis_func.objective.expression import Call, call
from featvis_func.types import Activations, Target
from featvis_func.validation import suggest

Position = tuple[int, int] | int
"""``(row, column)``, or the number of a token."""


def channel(layer: str, index: int | None = None) -> Objective:
    """The mean of one channel over all positions.

    Args:
        layer: the layer's name; its activations are ``(c, h, w)``, ``(t, d)`` or ``(d,)``.
        index: the channel (in a transformer the feature ``d``); ``None``: the filter number of the run.

    Raises:
        ValueError: when called, an index that the layer does not have.

    >>> channel("a", 1)({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(5.5000)
    """
    return _of_channel(call("channel", layer, index), layer, index, lambda feature: feature.mean())


def neuron(layer: str, index: int | None = None, *, position: Position | None = None) -> Objective:
    """One channel at one position.

    Args:
        layer: the layer's name.
        index: the channel; ``None``: the filter number of the run.
        position: ``(row, column)``, or the token's number in a transformer; ``None``: the centre
            ``(h // 2, w // 2)``, ``t // 2``.

    Raises:
        ValueError: when called, an index or a position that the layer does not have.

    >>> neuron("a", 1)({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(7.)
    """

    def at(feature: torch.Tensor) -> torch.Tensor:
        return feature[place(layer, feature.shape, position)]

    return _of_channel(call("neuron", layer, index, position=position), layer, index, at)


def layer(layer: str, *, power: Literal[1, 2] = 1) -> Objective:
    """The whole layer, as in DeepDream: the mean over all channels and positions.

    Args:
        layer: the layer's name.
        power: 1 for the mean; 2 for the mean of squares (Lucid's ``deepdream``).

    Raises:
        ValueError: another power.

    >>> layer("a", power=2)({"a": torch.tensor([[[3.0]], [[1.0]]])}, torch.tensor(0))
    tensor(5.)
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 (mean) or 2 (mean of squares), got {power}")

    def score(activations: Activations, target: Target) -> torch.Tensor:
        return (activations[layer] ** power).mean()

    def activation_map(activations: Activations, target: Target) -> torch.Tensor:
        return (activations[layer] ** power).mean(feature_axis(activations[layer].shape))

    expression = call("layer", layer, power=None if power == 1 else power)
    return Objective(score, activation_map, (layer,), (), str(expression), expression=expression)


def deepdream(layer: str) -> Objective:
    """The mean of squares of a whole layer, as Lucid has it: :func:`layer` with ``power=2``.

    >>> deepdream("a")
    layer('a', power=2)
    """
    return _whole_layer(layer, power=2)


def _of_channel(
    expression: Call, layer: str, index: int | None, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> Objective:
    """An objective on one channel: ``reduce`` takes that channel's map to a number."""

    def activation_map(activations: Activations, target: Target) -> torch.Tensor:
        values = activations[layer]
        axis = feature_axis(values.shape)
        if index is None:
            # Not `values[target]`: a tensor index of no axes is read on the host.
            return values.index_select(axis, target.reshape(1)).squeeze(axis)
        if not 0 <= index < values.shape[axis]:
            raise ValueError(f"no channel {index} in layer {layer!r}, which has {values.shape[axis]}")
        return values.select(axis, index)

    return Objective(
        lambda a, t: reduce(activation_map(a, t)),
        activation_map,
        (layer,),
        (layer,) if index is None else (),
        str(expression),
        expression=expression,
    )


def region(
    layer: str,
    index: int | None = None,
    *,
    rows: tuple[float, float] = (0.0, 1.0),
    columns: tuple[float, float] = (0.0, 1.0),
) -> Objective:
    """The mean of one channel over a rectangle of positions.

    Args:
        layer: the layer's name; its activations are ``(c, h, w)``.
        index: the channel; ``None``: the filter number of the run.
        rows, columns: from and to, as shares of the height and width: ``(0.0, 0.5)`` is the first half. A rectangle
            holds at least one position.

    Raises:
        ValueError: bounds outside of 0 to 1 or reversed; when called, a layer without rows and columns.

    >>> region("a", 1, rows=(0, 0.5))({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(4.5000)
    """
    for name, (low, high) in (("rows", rows), ("columns", columns)):
        if not 0 <= low < high <= 1:
            raise ValueError(f"{name} must be two shares of 0 to 1, the lower one first, got {(low, high)}")

    def within(size: int, bounds: tuple[float, float]) -> slice:
        first = min(math.floor(bounds[0] * size), size - 1)
        return slice(first, max(first + 1, math.ceil(bounds[1] * size)))

    def reduce(feature: torch.Tensor) -> torch.Tensor:
        if feature.ndim != 2:
            raise ValueError(f"layer {layer!r} has no rows and columns: its positions are {tuple(feature.shape)}")
        return feature[within(feature.shape[0], rows), within(feature.shape[1], columns)].mean()

    return _of_channel(call("region", layer, index, rows=rows, columns=columns), layer, index, reduce)


def logit(layer: str, category: int | str | None = None, *, categories: Sequence[str] = ()) -> Objective:
    """A class, before the softmax.

    Args:
        layer: of the classifier's last module; its activations are ``(d,)``.
        category: its number, or its name among ``categories``; ``None``: the filter number of the run.
        categories: the names of the classes in order: ``load_model(...).categories``.

    Raises:
        ValueError: an unknown name; when called, a number that the layer does not have.

    >>> logit("fc", "cat", categories=["dog", "cat"])({"fc": torch.tensor([1.0, 3.0])}, torch.tensor(0))
    tensor(3.)
    """
    if isinstance(category, str):
        if category not in categories:
            shown = f"{suggest(category, list(categories)) or f'; there are {len(categories)}'}"
            raise ValueError(f"no category {category!r}{shown}")
        index: int | None = list(categories).index(category)
    else:
        index = category
    return _of_channel(call("logit", layer, index), layer, index, lambda feature: feature.mean())


_whole_layer = layer  # by a name that no parameter hides
