"""Counter-based random numbers, in plain integer tensor operations and without global state.

The generator is Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
A key identifies a stream and is never advanced, so equal keys give equal numbers on every device, eager, under
``torch.func.vmap`` and under ``torch.compile``. :func:`bits`, and :func:`uniform` on the unit interval, are bit-equal;
:func:`normal` depends on the device's ``log`` and ``cos``. Use a key either to draw numbers or to derive keys, not for
both. The rounds run on int32, whose additions and shifts wrap around as those of unsigned words do; words are given and
returned in int64.

>>> k = key(0)
>>> bool((uniform(k, (3,)) == uniform(k, (3,))).all())
True
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from featvis_func.types import Key
from featvis_func.validation import check_seed

_MASK = 0xFFFFFFFF
# Parity constant of the key schedule, and rotation distances of Threefry-2x32 (table 2 of the paper).
_PARITY = 0x1BD11BDA
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_ROUNDS = 20


def threefry2x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20 block function: two key words and two counter words to two random words.

    Args:
        key: two int64 tensors in ``[0, 2**32)``, broadcastable against the counter.
        counter: two int64 tensors in ``[0, 2**32)``.

    Returns:
        Two int64 tensors in ``[0, 2**32)``, of the broadcast shape.

    Source: Salmon et al. 2011, section 4.2; tested against the known answers of Random123.

    >>> zero = torch.tensor(0)
    >>> [hex(int(word)) for word in threefry2x32((zero, zero), (zero, zero))]
    ['0x6b200159', '0x99ba4efe']
    """
    x, y = _rounds(key, counter)
    return x.long() & _MASK, y.long() & _MASK


def _rounds(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The two words as int32, with the bits of the unsigned words."""
    k0, k1, x, y = (word.int() for word in (*key, *counter))
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x, y = x + k0, y + k1
    for i in range(_ROUNDS):
        r = _ROTATIONS[i % len(_ROTATIONS)]
        x = x + y
        # Rotated: the bits that leave on the left, without copies of the sign, come in on the right.
        y = torch.add((y >> (32 - r)) & ((1 << r) - 1), y, alpha=1 << r) ^ x
        if i % 4 == 3:
            j = i // 4 + 1
            x = x + schedule[j % 3]
            y = y + (schedule[(j + 1) % 3] + j)
    return x, y


def key(seed: int, *, device: torch.device | str | None = None) -> Key:
    """Create a key from a seed.

    Args:
        seed: an integer in ``[0, 2**64)``.
        device: device of the key. Random numbers are generated on the device of their key.

    Returns:
        int64 ``(2,)``: the high and low 32 bits of the seed.

    Raises:
        ValueError: if the seed is outside of ``[0, 2**64)``.

    >>> key(7)
    tensor([0, 7])
    """
    seed = check_seed(seed)
    return torch.tensor([seed >> 32, seed & _MASK], dtype=torch.int64, device=device)


def fold_in(key: Key, data: int | Tensor, *, stream: int | Tensor = 0) -> Key:
    """Derive a key from a key and a number. Distinct numbers or streams give independent keys.

    Args:
        key: int64 ``(2,)``.
        data: an integer, or an int64 tensor ``()``, taken modulo ``2**32``.
        stream: a second number in ``[0, 2**32)``, an integer, or an int64 tensor ``()``.

    Returns:
        int64 ``(2,)``.

    >>> fold_in(key(0), 1).shape
    torch.Size([2])
    """
    zero = torch.zeros_like(key[0])
    return torch.stack(threefry2x32((key[0], key[1]), (zero + stream, zero + (data & _MASK))))


def split(key: Key, count: int) -> tuple[Key, ...]:
    """Derive several keys: ``split(key, count)[i]`` equals ``fold_in(key, i)``.

    Args:
        key: int64 ``(2,)``.
        count: number of keys.

    Returns:
        ``count`` keys, each int64 ``(2,)``.

    >>> bool((split(key(0), 3)[2] == fold_in(key(0), 2)).all())
    True
    """
    number = torch.arange(count, dtype=torch.int64, device=key.device)
    return torch.stack(threefry2x32((key[0], key[1]), (torch.zeros_like(number), number)), dim=1).unbind()


def bits(key: Key, shape: Sequence[int]) -> Tensor:
    """Return uniformly distributed 32-bit words.

    Args:
        key: int64 ``(2,)``.
        shape: shape of the result.

    Returns:
        int64 ``shape`` in ``[0, 2**32)``.

    >>> bits(key(1), (2, 3)).shape
    torch.Size([2, 3])
    """
    return _words(key, shape).long() & _MASK


def _words(key: Key, shape: Sequence[int]) -> Tensor:
    """:func:`bits` as int32, with the bits of the unsigned words."""
    count = math.prod(shape)
    counter = torch.arange((count + 1) // 2, dtype=torch.int32, device=key.device)
    words = torch.cat(_rounds((key[0], key[1]), (torch.zeros_like(counter), counter)))
    return words[:count].reshape(tuple(shape))


def _uniform24(key: Key, shape: Sequence[int]) -> Tensor:
    """Float32 whole numbers in ``[0, 2**24)``: the upper 24 bits of :func:`bits`."""
    return ((_words(key, shape) >> 8) & (_MASK >> 8)).to(torch.float32)


def uniform(key: Key, shape: Sequence[int] = (), *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Return uniformly distributed numbers with 24 random bits.

    Args:
        key: int64 ``(2,)``.
        shape: shape of the result.
        low, high: bounds.

    Returns:
        float32 ``shape`` in ``[low, high)``. Unless ``low`` is 0, rounding can give ``high`` itself.

    >>> x = uniform(key(0), (1000,), low=-1, high=1)
    >>> bool(x.min() >= -1), bool(x.max() <= 1), bool(x.mean().abs() < 0.1)
    (True, True, True)
    """
    unit = _uniform24(key, shape) * 2.0**-24
    return unit * (high - low) + low


def normal(key: Key, shape: Sequence[int] = ()) -> Tensor:
    """Return standard normal numbers, by the Box-Muller transform.

    Args:
        key: int64 ``(2,)``.
        shape: shape of the result.

    Returns:
        float32 ``shape``. Magnitudes are below 5.8, because the uniform numbers have 24 bits.

    >>> x = normal(key(0), (10000,))
    >>> bool(x.mean().abs() < 0.05), bool((x.std() - 1).abs() < 0.05)
    (True, True)
    """
    count = math.prod(shape)
    pairs = _uniform24(key, (2, (count + 1) // 2))
    # The logarithm takes a number in (0, 1], the angle one in [0, 1).
    radius = torch.sqrt(-2.0 * torch.log((pairs[0] + 1.0) * 2.0**-24))
    angle = pairs[1] * (2.0 * math.pi * 2.0**-24)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:count].reshape(tuple(shape))
