"""Noise on the pixels of a view: what keeps an image from resting on values that are exact to the last digit.

The draw is a key, and the numbers are made where the shape of the image is known. They have 16 random bits each, four
to a block of the generator: half the work of :mod:`featvis_func.random`'s, and finer than any image is stored.
"""

import math

import torch
from torch import Tensor

from featvis_func.random import bits
from featvis_func.types import Draw, Key, Transform


def normal_noise(sd: float) -> Transform:
    """Adds ``N(0, sd**2)`` to each value, its own in every view.

    Args:
        sd: standard deviation, at least 0, in the units of the image (``[0, 1]`` before normalisation).

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` whose draw is a key. No noise exceeds 4.9 ``sd`` (16-bit uniforms).

    Raises:
        ValueError: ``sd`` is negative.

    >>> noise = normal_noise(0.1)
    >>> x = noise.apply(torch.zeros(3, 64, 64), noise.draw(torch.tensor([0, 1])))
    >>> bool(x.mean().abs() < 0.01), round(x.std().item(), 2)
    (True, 0.1)
    """
    if not 0 <= sd < math.inf:
        raise ValueError(f"normal_noise: the standard deviation must be finite and at least 0, got {sd}")

    def apply(image: Tensor, key: Draw) -> Tensor:
        count = image.numel()
        pairs = _unit(key, 2 * ((count + 1) // 2)).unflatten(0, (2, -1))
        radius, angle = torch.sqrt(-2.0 * torch.log(pairs[0])), 2.0 * math.pi * pairs[1]
        drawn = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:count].reshape(image.shape)
        return image + sd * drawn.to(image.dtype)

    return Transform(_key, apply)


def uniform_noise(amount: float) -> Transform:
    """Adds ``U(-amount, amount)`` to each value, its own in every view.

    Args:
        amount: the largest noise, at least 0, in the units of the image.

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` whose draw is a key.

    Raises:
        ValueError: ``amount`` is negative.

    >>> noise = uniform_noise(0.1)
    >>> x = noise.apply(torch.zeros(3, 64, 64), noise.draw(torch.tensor([0, 1])))
    >>> bool(x.mean().abs() < 0.01), bool(x.abs().max() < 0.1), bool(x.abs().max() > 0.099)
    (True, True, True)
    """
    if not 0 <= amount < math.inf:
        raise ValueError(f"uniform_noise: the amount must be finite and at least 0, got {amount}")

    def apply(image: Tensor, key: Draw) -> Tensor:
        drawn = 2.0 * _unit(key, image.numel()) - 1.0
        return image + amount * drawn.reshape(image.shape).to(image.dtype)

    return Transform(_key, apply)


def _key(key: Key) -> Draw:
    return key


def _unit(key: Key, count: int) -> Tensor:
    """Uniform numbers in ``(0, 1)``, the middles of 65536 equal parts: float32 ``(count,)``."""
    words = bits(key, ((count + 1) // 2,))
    halves = torch.cat([words >> 16, words & 0xFFFF])[:count]
    return (halves.to(torch.float32) + 0.5) * 2.0**-16
