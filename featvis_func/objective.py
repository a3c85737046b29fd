"""What an image is optimised for: activations -> one number to raise.

An :class:`Objective` sees the activations of one image and the target (the filter number) of that image. It adds,
subtracts and scales; each part names its layer, so that a sum may look at several layers at once.

>>> goal = channel("layer3.1.conv2") - 0.5 * channel("layer2.0.conv1", 7)
>>> goal
channel('layer3.1.conv2') - 0.5 * channel('layer2.0.conv1', 7)
>>> goal.layers
('layer3.1.conv2', 'layer2.0.conv1')
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from featvis_func.types import Activations, Target

Position = tuple[int, int] | int


@dataclass(frozen=True, repr=False)
class Objective:
    """A pure function ``(activations of one image, target) -> ()``, with ``+``, ``-`` and ``*`` by numbers.

    Build one with :func:`channel`, :func:`neuron` or :func:`layer`, or directly from functions of your own.
    """

    score: Callable[[Activations, Target], Tensor]
    """(activations, target) -> float ``()``: what is raised."""
    activation_map: Callable[[Activations, Target], Tensor]
    """(activations, target) -> ``(h', w')``, ``(t,)`` or ``()``: what is shown beside the image."""
    layers: tuple[str, ...]
    """The layers whose activations it reads; the first is the one that it is about."""
    targeted: tuple[str, ...]
    """Those of its layers in which the target picks the channel."""
    name: str

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
        inner = f"({self.name})" if " + " in self.name or " - " in self.name else self.name
        return Objective(
            lambda a, t: factor * self.score(a, t),
            self.activation_map,
            self.layers,
            self.targeted,
            f"{_number(factor)} * {inner}",
        )

    __rmul__ = __mul__

    def _combine(self, other: "Objective", sign: float) -> "Objective":
        if not isinstance(other, Objective):
            return NotImplemented
        grouped = sign < 0 and (" + " in other.name or " - " in other.name)
        right = f"({other.name})" if grouped else other.name
        return Objective(
            lambda a, t: self.score(a, t) + sign * other.score(a, t),
            self.activation_map,
            tuple(dict.fromkeys(self.layers + other.layers)),
            tuple(dict.fromkeys(self.targeted + other.targeted)),
            f"{self.name} {'+' if sign > 0 else '-'} {right}",
        )


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
    name = f"channel({layer!r})" if index is None else f"channel({layer!r}, {index})"
    return _objective(name, layer, index, lambda feature: feature.mean())


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
    parts = [repr(layer)] + ([] if index is None else [str(index)])
    parts += [] if position is None else [f"position={position}"]

    def at(feature: Tensor) -> Tensor:
        if position is None:
            where = tuple(size // 2 for size in feature.shape)
        else:
            where = position if isinstance(position, tuple) else (position,)
        if len(where) != feature.ndim or not all(0 <= i < s for i, s in zip(where, feature.shape, strict=True)):
            raise ValueError(f"no position {position} in layer {layer!r}, whose positions are {tuple(feature.shape)}")
        return feature[where]

    return _objective(f"neuron({', '.join(parts)})", layer, index, at)


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

    def score(activations: Activations, target: Target) -> Tensor:
        return (activations[layer] ** power).mean()

    def activation_map(activations: Activations, target: Target) -> Tensor:
        return (activations[layer] ** power).mean(feature_axis(activations[layer].shape))

    name = f"layer({layer!r})" if power == 1 else f"layer({layer!r}, power=2)"
    return Objective(score, activation_map, (layer,), (), name)


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


def _objective(name: str, layer: str, index: int | None, reduce: Callable[[Tensor], Tensor]) -> Objective:
    """An objective on one channel: ``reduce`` takes that channel's map to a number."""

    def activation_map(activations: Activations, target: Target) -> Tensor:
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
        name,
    )


def _number(value: float) -> str:
    """A number in as few digits as say exactly which."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))
