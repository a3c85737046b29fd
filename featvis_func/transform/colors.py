"""Random changes of brightness, contrast, saturation and hue."""

import math

import torch
from torch import Tensor

from featvis_func.constants import device_constant
from featvis_func.random import uniform
from featvis_func.transform.pixels import check_image
from featvis_func.types import Draw, Key, Transform

# Weights of red, green and blue in luma (ITU-R BT.601), and in I and Q, the chroma axes of NTSC (FCC, 1953).
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))

Strength = float | tuple[float, float]


def color_jitter(
    *, brightness: Strength = 0.0, contrast: Strength = 0.0, saturation: Strength = 0.0, hue: Strength = 0.0
) -> Transform:
    """Change brightness, contrast, saturation and hue by random amounts, in this order.

    ``x * b``; ``mean + c * (x - mean)``, with ``mean`` the mean grey value of the image; ``grey + s * (x - grey)``,
    with ``grey`` the grey value of the pixel; and a rotation of the hue by ``h`` turns at constant grey value.

    Args:
        brightness, contrast, saturation: a strength ``a`` for a factor in ``[max(0, 1 - a), 1 + a]``, or bounds of the
            factor.
        hue: a strength ``a`` for a rotation in ``[-a, a]`` turns, at most 0.5 (the complementary colour), or bounds.

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` in ``[0, 1]`` whose draw is the three factors and the rotation,
        float32 ``(4,)``. Unless ``c = 3``, only brightness and contrast are supported, with the mean over all channels
        as the grey value.

    Raises:
        ValueError: if a strength is negative, or bounds are reversed or too large; when applied, if saturation or hue
            are enabled and the image has other than 3 channels.

    Source: the parameters follow torchvision's ``ColorJitter``. Deviations: the order is fixed; the hue is rotated in
    the IQ plane, where the rotation is linear and smooth, rather than in HSV; and the result is not clamped, so that
    values outside of ``[0, 1]`` keep their gradient.

    >>> jitter = color_jitter(brightness=0.4, hue=0.1)
    >>> jitter.apply(torch.rand(3, 8, 8), jitter.draw(torch.tensor([0, 1]))).shape
    torch.Size([3, 8, 8])
    >>> color_jitter().apply(torch.full((3, 1, 1), 0.5), torch.tensor([0.5, 1.0, 1.0, 0.0])).flatten()
    tensor([0.2500, 0.2500, 0.2500])
    """
    factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    bounds = [_bounds(name, strength, 1.0, (0.0, math.inf)) for name, strength in factors.items()]
    bounds.append(_bounds("hue", hue, 0.0, (-0.5, 0.5)))
    has_saturation, has_hue = bounds[2] != (1.0, 1.0), bounds[3] != (0.0, 0.0)
    yiq = torch.tensor(_YIQ, dtype=torch.float64)
    rgb = torch.linalg.inv(yiq)
    # The hue rotation is the sum of these terms, weighted by 1, the cosine and the sine. Positive angles rotate red
    # towards green.
    luma_weights = device_constant(yiq[0])
    rotation_terms = device_constant(
        torch.stack(
            [
                torch.outer(rgb[:, 0], yiq[0]),
                torch.outer(rgb[:, 1], yiq[1]) + torch.outer(rgb[:, 2], yiq[2]),
                torch.outer(rgb[:, 1], yiq[2]) - torch.outer(rgb[:, 2], yiq[1]),
            ]
        )
    )

    def draw(key: Key) -> Draw:
        drawn = uniform(key, (4,))
        return torch.stack([u * (high - low) + low for u, (low, high) in zip(drawn.unbind(), bounds, strict=True)])

    def grey(image: Tensor) -> Tensor:
        return torch.einsum("c,...chw->...hw", luma_weights(image), image).unsqueeze(-3)

    def mean_grey(image: Tensor) -> Tensor:
        means = image.mean((-2, -1), keepdim=True)
        if image.shape[-3] != 3:
            return means.mean(-3, keepdim=True)
        return (luma_weights(image)[:, None, None] * means).sum(-3, keepdim=True)

    def apply(image: Tensor, drawn: Draw) -> Tensor:
        check_image("color_jitter", image)
        if image.shape[-3] != 3 and (has_saturation or has_hue):
            raise ValueError(
                f"color_jitter: saturation and hue need 3 channels, got {image.shape[-3]}; only brightness and"
                " contrast work with any number of channels"
            )
        brightness_factor, contrast_factor, saturation_factor, turns = drawn.to(image.dtype).unbind()
        # Both at once, in one pass over the pixels: the mean grey value changes with the brightness only.
        factor = brightness_factor * contrast_factor
        image = factor * image + (brightness_factor - factor) * mean_grey(image)
        if has_saturation:
            luma = grey(image)
            image = luma + saturation_factor * (image - luma)
        if has_hue:
            angle = 2.0 * math.pi * turns
            matrix = torch.einsum("p,pij->ij", _rotation_weights(angle), rotation_terms(image))
            image = torch.einsum("ij,...jhw->...ihw", matrix, image)
        return image

    return Transform(draw, apply)


def _rotation_weights(angle: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(angle), torch.cos(angle), torch.sin(angle)])


def _bounds(name: str, strength: Strength, centre: float, limits: tuple[float, float]) -> tuple[float, float]:
    """Return the bounds of a factor, given its strength or the bounds themselves."""
    if isinstance(strength, tuple):
        low, high = strength
    else:
        low, high = (centre - strength, centre + strength)
        if strength >= 0 and centre > 0:
            low = max(0.0, low)
    if not limits[0] <= low <= high <= limits[1] or high == math.inf:
        raise ValueError(
            f"color_jitter: {name} must be a strength of at least 0 or increasing bounds in"
            f" [{limits[0]:g}, {limits[1]:g}], got {strength}"
        )
    return float(low), float(high)
