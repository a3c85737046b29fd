"""Random changes of colour."""

import math

import torch
from torch import Tensor

from featvis_func.random import uniform
from featvis_func.types import Draw, Key, Transform

# Red, green and blue in grey (ITU-R BT.601), and in I and Q, the two axes of the NTSC's colours (FCC, 1953).
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))

Strength = float | tuple[float, float]


def color_jitter(
    *, brightness: Strength = 0.0, contrast: Strength = 0.0, saturation: Strength = 0.0, hue: Strength = 0.0
) -> Transform:
    """Changes brightness, contrast, saturation and hue by random amounts, in this order.

    ``x * b``; ``mean + c * (x - mean)``, with the mean grey of the image; ``grey + s * (x - grey)``, with the grey of
    the pixel; and a turn by ``h`` of the colour circle about that grey.

    Args:
        brightness, contrast, saturation: a strength ``a`` for factors in ``[max(0, 1 - a), 1 + a]``, or their bounds.
        hue: a strength for turns in ``[-a, a]``, at most 0.5 (the opposite colour), or their bounds.

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` in ``[0, 1]`` whose draw is the three factors and the turn, float32
        ``(4,)``. With other than 3 channels, brightness and contrast (of the mean of all) alone are possible.

    Raises:
        ValueError: a negative strength, bounds that are reversed or too large; at the image, a saturation or a hue for
            other than 3 channels.

    Source: the strengths are those of torchvision's ``ColorJitter``. Deviations: the order is fixed; the hue turns in
    the IQ plane, where it is smooth and linear, and not in HSV; and the result is not clamped, so that what leaves
    ``[0, 1]`` keeps its gradient.

    >>> jitter = color_jitter(brightness=0.4, hue=0.1)
    >>> jitter.apply(torch.rand(3, 8, 8), jitter.draw(torch.tensor([0, 1]))).shape
    torch.Size([3, 8, 8])
    >>> color_jitter().apply(torch.full((3, 1, 1), 0.5), torch.tensor([0.5, 1.0, 1.0, 0.0])).flatten()
    tensor([0.2500, 0.2500, 0.2500])
    """
    factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    bounds = [_bounds(name, own, 1.0, (0.0, math.inf)) for name, own in factors.items()]
    bounds.append(_bounds("hue", hue, 0.0, (-0.5, 0.5)))
    saturates, turns = bounds[2] != (1.0, 1.0), bounds[3] != (0.0, 0.0)
    yiq = torch.tensor(_YIQ, dtype=torch.float64)
    rgb = torch.linalg.inv(yiq)
    # The turn is their sum, weighted by 1, the cosine and the sine. From red by way of green, as hue is counted.
    parts = torch.stack(
        [
            torch.outer(rgb[:, 0], yiq[0]),
            torch.outer(rgb[:, 1], yiq[1]) + torch.outer(rgb[:, 2], yiq[2]),
            torch.outer(rgb[:, 1], yiq[2]) - torch.outer(rgb[:, 2], yiq[1]),
        ]
    )

    def draw(key: Key) -> Draw:
        drawn = uniform(key, (4,))
        return torch.stack([u * (high - low) + low for u, (low, high) in zip(drawn.unbind(), bounds, strict=True)])

    def grey(image: Tensor) -> Tensor:
        if image.shape[-3] != 3:
            return image.mean(-3, keepdim=True)
        return torch.einsum("c,...chw->...hw", yiq[0].to(image), image).unsqueeze(-3)

    def apply(image: Tensor, drawn: Draw) -> Tensor:
        if image.shape[-3] != 3 and (saturates or turns):
            raise ValueError(
                f"saturation and hue are of 3 channels, and the image has {image.shape[-3]}; brightness and contrast"
                " are of any"
            )
        bright, steep, vivid, turn = drawn.to(image.dtype).unbind()
        image = image * bright
        mean = grey(image).mean((-2, -1), keepdim=True)
        image = mean + steep * (image - mean)
        if saturates:
            plain = grey(image)
            image = plain + vivid * (image - plain)
        if turns:
            angle = 2.0 * math.pi * turn
            matrix = torch.einsum("p,pij->ij", _weights(angle), parts.to(image))
            image = torch.einsum("ij,...jhw->...ihw", matrix, image)
        return image

    return Transform(draw, apply)


def _weights(angle: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(angle), torch.cos(angle), torch.sin(angle)])


def _bounds(name: str, strength: Strength, centre: float, limits: tuple[float, float]) -> tuple[float, float]:
    """The bounds of a factor, of its strength or as they are given."""
    if isinstance(strength, tuple):
        low, high = strength
    else:
        low, high = (centre - strength, centre + strength)
        if strength >= 0 and centre > 0:
            low = max(0.0, low)
    if not limits[0] <= low <= high <= limits[1] or high == math.inf:
        raise ValueError(
            f"color_jitter: {name} must be a strength of at least 0, or bounds in [{limits[0]:g}, {limits[1]:g}], the"
            f" lower first, got {strength}"
        )
    return float(low), float(high)
