"""Where in its layer an objective's score comes from, as far as the expression that makes it tells."""

from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.objective.base import resolve_position
from featvis_func.objective.expression import Call, Combined, Expression, Scaled, UserObjective

_AT_CENTRE = ("neuron", "direction_neuron")  # without `position`


class Reading(NamedTuple):
    """How the score of an objective depends on its map."""

    sign: int
    """-1 where the score falls with the map, as that of ``-channel("conv")`` does; else 1."""
    places: Tensor | None
    """int64 ``(p,)``: flat index of the one position that the score reads, for target ``i`` entry ``i % p``. ``None``:
    it reads all, or is not known to read one."""


def reading_of(expression: Expression, layer: str, sides: tuple[int, ...]) -> Reading:
    """Find how the score of an objective depends on its map.

    Args:
        expression: of the objective.
        layer: its main layer, for error messages.
        sides: shape of its map.

    Raises:
        ValueError: it reads a position that the layer does not have.

    >>> from featvis_func.objective import channel, neurons
    >>> reading_of((channel("conv") - neurons("conv", 3, [(0, 1)])).expression, "conv", (4, 5))
    Reading(sign=1, places=None)
    >>> reading_of((-2 * neurons("conv", [3, 7], [(0, 1), (2, 0)])).expression, "conv", (4, 5))
    Reading(sign=-1, places=tensor([ 1, 10]))
    """
    if isinstance(expression, Scaled):
        inner = reading_of(expression.inner, layer, sides)
        return inner._replace(sign=inner.sign * (-1 if expression.factor < 0 else 1))
    if isinstance(expression, Combined):
        if _reads_layer(expression.left):
            return reading_of(expression.left, layer, sides)
        inner = reading_of(expression.right, layer, sides)
        return inner._replace(sign=inner.sign * (-1 if expression.sign == "-" else 1))
    if isinstance(expression, UserObjective):
        return Reading(1, None)
    if expression.function in ("facets", "member"):
        inner = reading_of(expression.arguments[0], layer, sides)
        number = expression.arguments[1]
        if inner.places is None:
            return inner
        if expression.function == "facets":
            return inner._replace(places=inner.places.repeat_interleave(number))
        return inner._replace(places=inner.places[number % len(inner.places)].reshape(1))
    positions = _positions(expression)
    if positions is None or not sides:
        return Reading(1, None)
    places = []
    for position in positions:
        place = 0
        for index, side in zip(resolve_position(layer, sides, position), sides, strict=True):
            place = place * side + index
        places.append(place)
    return Reading(1, torch.tensor(places))


def _positions(expression: Call) -> tuple[tuple[int, ...] | int | None, ...] | None:
    if expression.function == "neurons":
        return expression.arguments[2]
    position = dict(expression.keywords).get("position")
    return (position,) if position is not None or expression.function in _AT_CENTRE else None


def _reads_layer(expression: Expression) -> bool:
    """Whether an objective reads a layer: a penalty on the image has only numbers as its arguments."""
    if isinstance(expression, Scaled):
        return _reads_layer(expression.inner)
    if isinstance(expression, Combined):
        return _reads_layer(expression.left) or _reads_layer(expression.right)
    if isinstance(expression, UserObjective):
        return True
    return any(not isinstance(value, int | float) for value in expression.arguments)
