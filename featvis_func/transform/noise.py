"""Additive noise, which keeps the optimised image from depending on exact pixel values.

The draw is a few random places in a fixed table of random numbers, from where the noise is read. Numbers of its own for
each value would take the generator a tenth of a step: a network's input has 150,000 values.

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
# An image of more values than leave enough places for it is composed of pieces, each from a place of its own.
_PIECE, _MIN_PLACES, _DRAWN_PLACES = 2**20, 2**16, 16
_MOVE = 0x9E3779B1


def normal_noise(sd: float) -> Transform:
    """Add independent noise ``N(0, sd**2)`` to each value, including the leading axes.

    Args:
        sd: standard deviation, at least 0, in the units of the image (``[0, 1]`` before normalisation).

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` whose draw is places in a table of 2**21 independent numbers. The
        noise of an image of up to 2,031,616 values, such as three channels of 822 x 822 pixels, is a window of the
        table; that of a larger one consists of windows of 2**20. So two draws have numbers in common, shifted by a
        random distance. The numbers are the quantiles of the normal distribution, at most 4.3 ``sd``.

    Raises:
        ValueError: if ``sd`` is negative or not finite.

    >>> noise = normal_noise(0.1)
    >>> x = noise.apply(torch.zeros(3, 64, 64), noise.draw(torch.tensor([0, 1])))
    >>> bool(x.mean().abs() < 0.01), round(x.std().item(), 2)
    (True, 0.1)
    """
    sd = check_float("normal_noise: sd", sd, 0)
    return Transform(_places, _adding(_normal_table(), sd))


def uniform_noise(amount: float) -> Transform:
    """Add independent noise ``U(-amount, amount)`` to each value, including the leading axes.

    Args:
        amount: largest magnitude of the noise, at least 0, in the units of the image.

    Returns:
        A :class:`Transform` of ``(..., c, h, w)`` whose draw is places in a table, see :func:`normal_noise`.

    Raises:
        ValueError: if ``amount`` is negative or not finite.

    >>> noise = uniform_noise(0.1)
    >>> x = noise.apply(torch.zeros(3, 64, 64), noise.draw(torch.tensor([0, 1])))
    >>> bool(x.mean().abs() < 0.01), bool(x.abs().max() < 0.1), bool(x.abs().max() > 0.099)
    (True, True, True)
    """
    amount = check_float("uniform_noise: amount", amount, 0)
    return Transform(_places, _adding(_uniform_table(), amount))


def _places(key: Key) -> Draw:
    return bits(key, (_DRAWN_PLACES,))


def _adding(table: Callable[[Tensor], Tensor], strength: float) -> Callable[[Tensor, Draw], Tensor]:
    def apply(image: Tensor, places: Draw) -> Tensor:
        numbers = _read(table(image), places, image.numel())
        return torch.add(image, numbers.reshape(image.shape).to(image.dtype), alpha=strength)

    return apply


def _read(table: Tensor, places: Tensor, count: int) -> Tensor:
    """Numbers of a table, from random places ``(16,)`` on: ``(count,)``."""
    length = count if count <= len(table) - _MIN_PLACES else _PIECE
    pieces = math.ceil(count / length)
    if pieces > _DRAWN_PLACES:  # the same places again, all moved by the same distance
        moves = torch.arange(math.ceil(pieces / _DRAWN_PLACES), device=places.device) * _MOVE
        places = (places + moves[:, None]).flatten()
    windows = table.unfold(0, length, 1)  # a view
    return windows[places[:pieces] % len(windows)].flatten()[:count]


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
