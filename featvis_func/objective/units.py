"""Objectives on units: a channel, a region of a channel, a neuron, a whole layer, a class."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from featvis_func.objective.base import (
    Objective,
    check_channel,
    feature_axis,
    features_last,
    resolve_position,
    take_channel,
)
from featvis_func.objective.expression import Call, call
from featvis_func.types import Activations, Target
from featvis_func.validation import suggest

Position = tuple[int, ...] | int
"""``(row, column)``; ``(frame, row, column)`` in a layer of a video model; the number of a token or of a time step."""


def channel(layer: str, index: int | None = None) -> Objective:
    """Maximise the mean of one channel over all positions.

    Args:
        layer: the layer's name; its activations are ``(c, h, w)``, ``(c, t, h, w)``, ``(t, d)`` or ``(d,)``.
        index: the channel (in a transformer the feature ``d``); ``None``: the filter number.

    Raises:
        ValueError: when called, if the layer has no channel ``index``.

    >>> channel("a", 1)({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(5.5000)
    """
    return _channel_objective(call("channel", layer, index), layer, index, lambda feature: feature.mean())


def any_channel(*layers: tuple[str, int]) -> Objective:
    """Maximise the mean of one channel of one of several layers, so that a batch can hold filters of all of them.

    The score is that of :func:`channel`. The targets count through the channels of all layers: with 64 channels in the
    first layer, target 64 is channel 0 of the second. No map is kept, since the layers' maps differ in shape.

    Args:
        layers: names of layers, and their numbers of channels.

    Raises:
        ValueError: if there is no layer, or one without channels; when called, if a layer has another number.

    >>> objective = any_channel(("a", 2), ("b", 3))
    >>> objective({"a": torch.zeros(2, 4, 4), "b": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor(3))
    tensor(2.)
    """
    if not layers or min(count for _, count in layers) < 1:
        raise ValueError(f"any_channel needs layers with at least one channel each, got {layers}")
    total = sum(count for _, count in layers)

    def score(activations: Activations, target: Target) -> torch.Tensor:
        means = []
        for name, count in layers:
            values = features_last(activations[name])
            if values.shape[-1] != count:
                raise ValueError(f"layer {name!r} has {values.shape[-1]} channels, not {count}")
            means.append(values.flatten(0, -2).mean(0) if values.ndim > 1 else values)
        # Not an index, which is slow under vmap; and not a product with 0 and 1, where another mean may be infinite.
        chosen = torch.arange(total, device=target.device) == target
        return torch.where(chosen, torch.cat(means), 0.0).sum()

    def activation_map(activations: Activations, target: Target) -> torch.Tensor:
        return activations[layers[0][0]].new_zeros(())

    expression = call("any_channel", *layers)
    names = tuple(name for name, _ in layers)
    return Objective(score, activation_map, names, (), str(expression), variants=total, expression=expression)


def neuron(layer: str, index: int | None = None, *, position: Position | None = None) -> Objective:
    """Maximise one channel at one position.

    Args:
        layer: the layer's name.
        index: the channel; ``None``: the filter number.
        position: ``(row, column)``; ``(frame, row, column)`` for ``(c, t, h, w)``; the number of the token in a
            transformer, or of the time step in a signal model; ``None``: the centre ``(h // 2, w // 2)``,
            ``(t // 2, h // 2, w // 2)``, ``t // 2``.

    Raises:
        ValueError: when called, if the layer has no channel ``index`` or no such position.

    >>> neuron("a", 1)({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(7.)
    """

    def value_at(feature: torch.Tensor) -> torch.Tensor:
        return feature[resolve_position(layer, feature.shape, position)]

    return _channel_objective(call("neuron", layer, index, position=position), layer, index, value_at)


def layer(layer: str, *, power: Literal[1, 2] = 1) -> Objective:
    """Maximise the mean of a whole layer over all channels and positions, as in DeepDream.

    Args:
        layer: the layer's name.
        power: 1 for the mean of the activations; 2 for the mean of their squares (Lucid's ``deepdream``).

    Raises:
        ValueError: if ``power`` is neither 1 nor 2.

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
    """Maximise the mean of squares of a whole layer, as in Lucid: :func:`layer` with ``power=2``.

    >>> deepdream("a")
    layer('a', power=2)
    """
    return _layer_objective(layer, power=2)


def _channel_objective(
    expression: Call, layer: str, index: int | None, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> Objective:
    """Make an objective on one channel, whose map ``reduce`` reduces to a number."""

    def activation_map(activations: Activations, target: Target) -> torch.Tensor:
        values = activations[layer]
        if index is None:
            return take_channel(values, target)
        check_channel(layer, values, index)
        return values.select(feature_axis(values.shape), index)

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
    """Maximise the mean of one channel over a rectangle of positions, in a layer of a video model over that of every
    frame.

    Args:
        layer: the layer's name; its activations are ``(c, h, w)`` or ``(c, t, h, w)``.
        index: the channel; ``None``: the filter number.
        rows, columns: start and end, as fractions of the height and width: ``(0.0, 0.5)`` is the first half. The
            rectangle contains at least one position.

    Raises:
        ValueError: if not ``0 <= start < end <= 1``; when called, if the layer has no rows and columns.

    >>> region("a", 1, rows=(0, 0.5))({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(0))
    tensor(4.5000)
    """
    for name, (low, high) in (("rows", rows), ("columns", columns)):
        if not 0 <= low < high <= 1:
            raise ValueError(f"region: {name} must be two increasing fractions in [0, 1], got {(low, high)}")

    def to_slice(size: int, bounds: tuple[float, float]) -> slice:
        first = min(math.floor(bounds[0] * size), size - 1)
        return slice(first, max(first + 1, math.ceil(bounds[1] * size)))

    def reduce(feature: torch.Tensor) -> torch.Tensor:
        if feature.ndim not in (2, 3):
            raise ValueError(f"layer {layer!r} has no rows and columns: its positions are {tuple(feature.shape)}")
        return feature[..., to_slice(feature.shape[-2], rows), to_slice(feature.shape[-1], columns)].mean()

    return _channel_objective(call("region", layer, index, rows=rows, columns=columns), layer, index, reduce)


def logit(layer: str, category: int | str | None = None, *, categories: Sequence[str] = ()) -> Objective:
    """Maximise the logit of one class, the value before the softmax.

    Args:
        layer: name of the classifier's last layer; its activations are ``(d,)``.
        category: number of the class, or its name among ``categories``; ``None``: the filter number.
        categories: names of the classes in order: ``load_model(...).categories``.

    Raises:
        ValueError: if the name is unknown; when called, if the layer has no such class.

    >>> logit("fc", "cat", categories=["dog", "cat"])({"fc": torch.tensor([1.0, 3.0])}, torch.tensor(0))
    tensor(3.)
    """
    index = category_number(category, categories) if isinstance(category, str) else category
    return _channel_objective(call("logit", layer, index), layer, index, lambda feature: feature.mean())


def category_number(name: str, categories: Sequence[str]) -> int:
    """The number of a class.

    Raises:
        ValueError: the name is not among ``categories``.
    """
    if name not in categories:
        hint = suggest(name, list(categories)) or f"; there are {len(categories)} categories"
        raise ValueError(f"no category {name!r}{hint}")
    return list(categories).index(name)


_layer_objective = layer  # `deepdream` has a parameter `layer`, which hides the function
