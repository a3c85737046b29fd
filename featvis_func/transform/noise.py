"""Additive noise, which keeps the optimised image from depending on exact pixel values.

The draw is a few random offsets into a fixed table of random numbers, at which the noise is read. The generator would
take a tenth of a step for numbers of its own: a network's input has 150,000 values.

Source: tables of noise, as in Salimans et al., "Evolution strategies as a scalable alternative to reinforcement
learning", arXiv 1703.03864.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy
import torch
from torch import Tensor

from featvis_func.constants import device_constant
from featvis_func.random import bits
from featvis_func.types import Draw, Key, Transform
from featvis_func.validation import check_float

_LENGTH = 2**21  # numbers in a table
# The noise of an image that would leave fewer offsets is composed of windows, each at an offset of its own. There are
# as many as are drawn; then they come again, moved by a prime near 2**32 / 1.618, as in Fibonacci hashing.
_MIN_OFFSETS, _WINDOW, _OFFSETS, _MOVE = 2**16, 2**20, 16, 0x9E3779B1


def normal_noise(sd: float) -> Transform:
    """Add independent noise ``N(0, sd**2)`` to each value, including the leading axes.

    Args:
        sd: standard deviation, at least 0, in the units of the image (``[0, 1]`` before normalisation).

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` whose draw is offsets into a table of 2**21 independent numbers. The
        noise of an image of up to 2,031,616 values, such as three channels of 822 x 822 pixels, is one window of the
        table, that of a larger one several of 2**20: two draws, and two windows, have numbers in common, shifted by a
        random distance. The numbers are quantiles of the normal distribution, at most 4.4 ``sd``.

    Raises:
        ValueError: if ``sd`` is negative or not finite.

    >>> noise = normal_noise(0.1)
    >>> x = noise.apply(torch.zeros(3, 64, 64), noise.draw(torch.tensor([0, 1])))
    >>> bool(x.mean().abs() < 0.01), round(x.std().item(), 2)
    (True, 0.1)
    """
    sd = check_float("normal_noise: sd", sd, 0)
    return Transform(_offsets, _additive(_normal_table(), sd))


def uniform_noise(amount: float) -> Transform:
    """Add independent noise ``U(-amount, amount)`` to each value, including the leading axes.

    Args:
        amount: largest magnitude of the noise, at least 0, in the units of the image.

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` whose draw is offsets into a table, see :func:`normal_noise`.

    Raises:
        ValueError: if ``amount`` is negative or not finite.

    >>> noise = uniform_noise(0.1)
    >>> x = noise.apply(torch.zeros(3, 64, 64), noise.draw(torch.tensor([0, 1])))
    >>> bool(x.mean().abs() < 0.01), bool(x.abs().max() < 0.1), bool(x.abs().max() > 0.099)
    (True, True, True)
    """
    amount = check_float("uniform_noise: amount", amount, 0)
    return Transform(_offsets, _additive(_uniform_table(), amount))


def _offsets(key: Key) -> Draw:
    return bits(key, (_OFFSETS,))


def _additive(table: Callable[[Tensor], Tensor], strength: float) -> Callable[[Tensor, Draw], Tensor]:
    def apply(image: Tensor, offsets: Draw) -> Tensor:
        numbers = _read(table(image), offsets, image.numel())
        return torch.add(image, numbers.reshape(image.shape).to(image.dtype), alpha=strength)

    return apply


def _read(table: Tensor, offsets: Tensor, count: int) -> Tensor:
    """Numbers of a table at random offsets ``(16,)``: ``(count,)``."""
    length = count if count <= len(table) - _MIN_OFFSETS else _WINDOW
    needed = math.ceil(count / length)
    if needed > _OFFSETS:
        moves = torch.arange(math.ceil(needed / _OFFSETS), device=offsets.device) * _MOVE
        offsets = (offsets + moves[:, None]).flatten()
    windows = table.unfold(0, length, 1)  # one at each offset, a view
    return windows[offsets[:needed] % len(windows)].flatten()[:count]


@cache
def _normal_table() -> Callable[[Tensor], Tensor]:
    levels = torch.arange(2**16, dtype=torch.float64)
    quantiles = math.sqrt(2.0) * torch.special.erfinv((levels + 0.5) / 2**15 - 1.0)
    return _table(quantiles / quantiles.square().mean().sqrt(), stream=0)


@cache
def _uniform_table() -> Callable[[Tensor], Tensor]:
    return _table((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**15 - 1.0, stream=1)


def _table(levels: Tensor, *, stream: int) -> Callable[[Tensor], Tensor]:
    """Independent random choices among ``2**16`` levels, float32: as a constant of the device where it is read."""
    words = numpy.random.Philox(key=stream).random_raw(_LENGTH // 4).astype("<u8").view("<u2")
    return device_constant(levels.to(torch.float32)[torch.from_numpy(words.astype(numpy.int64))], cast=False)
