"""Images as small networks from pixel coordinates to colours (CPPN)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from featvis_func.color import Correlation
from featvis_func.constants import device_constant
from featvis_func.image.base import Size, image_shape, value_range
from featvis_func.random import normal, split
from featvis_func.types import Image, Key
from featvis_func.validation import check_int

Activation = Callable[[Tensor], Tensor]
"""``(hidden, p)`` -> ``(any number, p)``. Must be bounded: large weights overflow otherwise."""

# Weights are the parameters times this factor, so that the learning rate tuned for `fourier` suits them: on
# TextureNet 0.03 saturates a third of all values in 32 steps, and 0.01 reaches lower scores in 128.
_WEIGHT_SCALE = 1 / 64
# Standard deviation of the initial biases. Source: lucid/optvis/param/cppn.py.
_BIAS_STD = 0.1


def _composite(x: Tensor) -> Tensor:
    """Return ``arctan(x)`` and its square, each with root mean square 1 for a standard normal ``x``."""
    a = torch.atan(x)
    return torch.cat([a / 0.67, a * a / 0.6])


def _unbiased(x: Tensor) -> Tensor:
    """Return ``arctan(x)`` and its square, each with mean 0 and standard deviation 1 for a standard normal ``x``."""
    a = torch.atan(x)
    return torch.cat([a / 0.67, (a * a - 0.45) / 0.396])


# The constants above are from lucid/optvis/param/cppn.py, which documents how they were measured.
ACTIVATIONS: dict[str, Activation] = {"composite": _composite, "unbiased": _unbiased}
"""The built-in activations, by name."""


def cppn(
    size: Size,
    *,
    channels: int = 3,
    hidden: int = 24,
    layers: int = 8,
    activation: str | Activation = "unbiased",
    correlation: Correlation = "auto",
    device: torch.device | str | None = None,
) -> Image:
    """Compositional pattern-producing network: a resolution-independent function from coordinates to colours.

    ``sigmoid(matrix @ net(x, y))`` per pixel; ``net(x, y, t)`` for a video, ``net(t)`` for a signal. ``net`` has
    ``layers`` hidden layers ``activation((weight @ z + bias) / 64)`` and a linear map to the channels. The pixels span
    ``[-sqrt(3), sqrt(3)]`` along the longest side. Compared with the other parameterisations it needs more steps for
    the same result, 128 rather than 32, and each step costs more.

    Args:
        size: image size in pixels, ``h = w`` or ``(h, w)``; ``(t, h, w)`` for a video, ``(t,)`` for a signal.
        channels: image channels, at least 1.
        hidden: units per hidden layer, at least 1.
        layers: number of hidden layers, at least 1.
        activation: ``"unbiased"`` (``arctan(z)`` and its square, normalised to mean 0 and standard deviation 1),
            ``"composite"`` (the same, scaled to a root mean square of 1), or a bounded function
            ``(hidden, p) -> (any number, p)``.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: device of the coordinates. Decoding on another device is correct, but copies them every time.

    Returns:
        An :class:`Image` whose parameters are a tuple of ``layers + 1`` pairs ``(weight (o, i), bias (o,))``, float32.
        Divided by 64, initial weights are ``N(0, 1 / i)`` and initial biases ``N(0, 0.01)``. It has no ``encode``, so
        :func:`from_image` does not accept it.

    Raises:
        ValueError: if the size, channel count, width or depth is below 1, the activation is unknown, or the
            correlation matrix has the wrong shape.

    Source: Mordvintsev et al., "Differentiable Image Parameterizations", Distill 2018, section "Compositional Pattern
    Producing Networks"; ``cppn`` in lucid/optvis/param/cppn.py, which supports square images only. Deviations: Lucid
    places the centres of the outermost pixels on the border of the coordinate range; here their outer edges lie on it,
    so that an image keeps its position at any resolution. Lucid uses the ``"composite"`` activation, initialises the
    last weights with 0 and does not correlate the colours.

    The same parameters, decoded by a ``cppn`` of another size, give the same image at another resolution:

    >>> small, large = cppn(16), cppn(48)
    >>> params = small.init(torch.tensor([0, 1]))
    >>> large.decode(params).shape
    torch.Size([3, 48, 48])
    >>> torch.allclose(large.decode(params)[:, 1::3, 1::3], small.decode(params), atol=1e-4)
    True
    """
    c, *sides = shape = image_shape(size, channels)
    hidden, layers = check_int("hidden", hidden, 1), check_int("layers", layers, 1)
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)} or a function")
    activate = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    values = value_range(shape, correlation, device)
    coordinates = device_constant(_pixel_coordinates(sides, device))
    features = activate(torch.zeros(hidden, 1, dtype=torch.float32)).shape[0]
    shapes = [(hidden, len(sides)), *((hidden, features) for _ in range(layers - 1)), (c, features)]

    def init(key: Key) -> tuple[tuple[Tensor, Tensor], ...]:
        keys = split(key, 2 * len(shapes))
        return tuple(
            (
                i**-0.5 / _WEIGHT_SCALE * normal(keys[2 * n], (o, i)),
                _BIAS_STD / _WEIGHT_SCALE * normal(keys[2 * n + 1], (o,)),
            )
            for n, (o, i) in enumerate(shapes)
        )

    def decode(params: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
        z = coordinates(params[0][0])
        for weight, bias in params[:-1]:
            z = activate(_WEIGHT_SCALE * (weight @ z + bias[:, None]))
        weight, bias = params[-1]
        return values.to_image((_WEIGHT_SCALE * (weight @ z + bias[:, None])).unflatten(1, sides))

    return Image(init, decode)


def _pixel_coordinates(sides: Sequence[int], device: torch.device | str | None) -> Tensor:
    """Return centred coordinates of the pixels, with standard deviation 1 along the longest side.

    Returns:
        float32 ``(axes, pixels)``, the coordinate of the last axis first: ``x, y`` for ``(h, w)``.
    """
    unit = 2.0 * math.sqrt(3.0) / max(sides)
    axes = [(torch.arange(side, dtype=torch.float32, device=device) + 0.5 - side / 2) * unit for side in sides]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1]).flatten(1)
