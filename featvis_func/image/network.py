"""Images as small networks from the place of a pixel to its colour (CPPN)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from featvis_func.color import Correlation
from featvis_func.image.base import image_shape, value_range
from featvis_func.random import normal, split
from featvis_func.types import Image, Key

Activation = Callable[[Tensor], Tensor]
"""``(hidden, p)`` -> ``(any number, p)``, bounded: where it is not, large weights overflow."""

# What one unit of a parameter adds to a weight, so that the default optimiser, tuned for `fourier`, suits it: on
# TextureNet 0.03 burns out a third of all values in 32 steps, and 0.01 comes less far in 128.
_WEIGHT = 1 / 64
# Standard deviation of the first biases. Source: lucid/optvis/param/cppn.py.
_BIAS = 0.1


def _composite(x: Tensor) -> Tensor:
    """``arctan(x)`` and its square, each of root mean square 1 for a standard normal ``x``."""
    a = torch.atan(x)
    return torch.cat([a / 0.67, a * a / 0.6])


def _unbiased(x: Tensor) -> Tensor:
    """``arctan(x)`` and its square, each of mean 0 and deviation 1 for a standard normal ``x``."""
    a = torch.atan(x)
    return torch.cat([a / 0.67, (a * a - 0.45) / 0.396])


# The constants are those of lucid/optvis/param/cppn.py, which says how to measure them.
ACTIVATIONS: dict[str, Activation] = {"composite": _composite, "unbiased": _unbiased}
"""The activations that go by name."""


def cppn(
    size: int | tuple[int, int],
    *,
    channels: int = 3,
    hidden: int = 24,
    layers: int = 8,
    activation: str | Activation = "unbiased",
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """A compositional pattern-producing network: smooth pictures that know no resolution.

    ``sigmoid(matrix @ net(x, y))`` per pixel, ``net`` being ``layers`` times ``activation((weight @ z + bias) / 64)``
    and one linear map to the channels. The pixels span ``[-sqrt(3), sqrt(3)]`` along the longer side. It takes more
    steps than the others to come as far, 128 rather than 32, and each costs more.

    Args:
        size: pixels, ``h = w`` or ``(h, w)``.
        channels: image channels, at least 1.
        hidden: units of each layer, at least 1.
        layers: hidden layers, at least 1.
        activation: ``"unbiased"`` (``arctan(z)`` and its square, brought to mean 0 and deviation 1), ``"composite"``
            (scaled to a root mean square of 1 alone), or a bounded function ``(hidden, p) -> (any number, p)``.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: where the coordinates live; decoding elsewhere is right but copies them.

    Returns:
        An :class:`Image` whose parameters are a tuple of ``layers + 1`` pairs ``(weight (o, i), bias (o,))``, float32.
        64ths of them are weights, which start as ``N(0, 1 / i)``, and biases, as ``N(0, 0.01)``. It cannot start from
        a picture.

    Raises:
        ValueError: a size, channel count, width or depth below 1, an unknown activation, or a correlation of another
            shape.

    Source: Mordvintsev et al., "Differentiable Image Parameterizations", Distill 2018, section "Compositional Pattern
    Producing Networks"; ``cppn`` in lucid/optvis/param/cppn.py, which knows square images alone. Deviations: it puts
    the centres of the outermost pixels on the border, where here their edges are, so that a picture keeps its place in
    any resolution; its activation is ``"composite"``, its last weights start as 0 and its colours are not correlated.

    The same parameters, decoded by a ``cppn`` of another size, are the same picture in more pixels:

    >>> small, large = cppn(16), cppn(48)
    >>> params = small.init(torch.tensor([0, 1]))
    >>> large.decode(params).shape
    torch.Size([3, 48, 48])
    >>> torch.allclose(large.decode(params)[:, 1::3, 1::3], small.decode(params), atol=1e-4)
    True
    """
    c, h, w = image_shape(size, channels)
    if hidden < 1 or layers < 1:
        raise ValueError(f"a cppn needs at least 1 hidden unit and 1 layer, got hidden={hidden} and layers={layers}")
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)} or a function")
    activate = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    values = value_range(c, correlation, device)
    place = _places(h, w, device)
    inner = activate(torch.zeros(hidden, 1)).shape[0]
    widths = [(hidden, 2), *((hidden, inner) for _ in range(layers - 1)), (c, inner)]

    def init(key: Key) -> tuple[tuple[Tensor, Tensor], ...]:
        keys = split(key, 2 * len(widths))
        return tuple(
            (i**-0.5 / _WEIGHT * normal(keys[2 * n], (o, i)), _BIAS / _WEIGHT * normal(keys[2 * n + 1], (o,)))
            for n, (o, i) in enumerate(widths)
        )

    def decode(params: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
        z = place.to(params[0][0])
        for weight, bias in params[:-1]:
            z = activate(_WEIGHT * (weight @ z + bias[:, None]))
        weight, bias = params[-1]
        return values.enter((_WEIGHT * (weight @ z + bias[:, None])).unflatten(1, (h, w)))

    return Image(init, decode)


def _places(h: int, w: int, device: torch.device | str | None) -> Tensor:
    """Where the pixels are: float32 ``(2, h * w)``, x and y from the centre, of deviation 1 along the longer side."""
    unit = 2.0 * math.sqrt(3.0) / max(h, w)
    x = (torch.arange(w, device=device) + 0.5 - w / 2) * unit
    y = (torch.arange(h, device=device) + 0.5 - h / 2) * unit
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)]).flatten(1)
