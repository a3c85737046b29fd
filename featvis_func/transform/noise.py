"""Additive noise, which keeps the optimised image from depending on exact pixel values.

The draw is a key, and the numbers are generated when the shape of the image is known. Uniform ones have 16 random bits
each, four to a block of the generator, and normal ones 8: a half and a quarter of the cost of
:mod:`featvis_func.random`, which would take a seventh of a step.
"""

import math

import torch
from torch import Tensor

from featvis_func.constants import device_constant
from featvis_func.random import bits
from featvis_func.types import Draw, Key, Transform
from featvis_func.validation import check_float


def normal_noise(sd: float) -> Transform:
    """Add independent noise ``N(0, sd**2)`` to each value, including the leading axes.

    Args:
        sd: standard deviation, at least 0, in the units of the image (``[0, 1]`` before normalisation).

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` whose draw is a key. It takes 256 values, all as likely, at the
        quantiles of the normal distribution: at most 2.9 ``sd``, and with the standard deviation ``sd``.

    Raises:
        ValueError: if ``sd`` is negative or not finite.

    >>> noise = normal_noise(0.1)
    >>> x = noise.apply(torch.zeros(3, 64, 64), noise.draw(torch.tensor([0, 1])))
    >>> bool(x.mean().abs() < 0.01), round(x.std().item(), 2)
    (True, 0.1)
    """
    sd = check_float("normal_noise: sd", sd, 0)

    quantiles = math.sqrt(2.0) * torch.special.erfinv((torch.arange(256, dtype=torch.float64) + 0.5) / 128.0 - 1.0)
    values = device_constant((sd * quantiles / quantiles.square().mean().sqrt()).to(torch.float32))

    def apply(image: Tensor, key: Draw) -> Tensor:
        count = image.numel()
        words = bits(key, ((count + 3) // 4,))
        parts = torch.cat([words & 0xFF, (words >> 8) & 0xFF, (words >> 16) & 0xFF, words >> 24])[:count]
        return image + values(image)[parts].reshape(image.shape)

    return Transform(_key, apply)


def uniform_noise(amount: float) -> Transform:
    """Add independent noise ``U(-amount, amount)`` to each value, including the leading axes.

    Args:
        amount: largest magnitude of the noise, at least 0, in the units of the image.

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` whose draw is a key.

    Raises:
        ValueError: if ``amount`` is negative or not finite.

    >>> noise = uniform_noise(0.1)
    >>> x = noise.apply(torch.zeros(3, 64, 64), noise.draw(torch.tensor([0, 1])))
    >>> bool(x.mean().abs() < 0.01), bool(x.abs().max() < 0.1), bool(x.abs().max() > 0.099)
    (True, True, True)
    """
    amount = check_float("uniform_noise: amount", amount, 0)

    def apply(image: Tensor, key: Draw) -> Tensor:
        drawn = 2.0 * _uniform16(key, image.numel()) - 1.0
        return image + amount * drawn.reshape(image.shape).to(image.dtype)

    return Transform(_key, apply)


def _key(key: Key) -> Draw:
    return key


def _uniform16(key: Key, count: int) -> Tensor:
    """Return uniform numbers in ``(0, 1)``, the midpoints of 65536 equal intervals: float32 ``(count,)``."""
    words = bits(key, ((count + 1) // 2,))
    halves = torch.cat([words >> 16, words & 0xFFFF])[:count]
    return (halves.to(torch.float32) + 0.5) * 2.0**-16
