"""Adaptive average pools whose gradient is deterministic on every device; torch's own on CUDA has no such kernel."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def adaptive_mean(values: Tensor, size: Sequence[int | None]) -> Tensor:
    """Average over windows that divide the last axes as evenly as possible, one axis after the other.

    Args:
        values: of at least as many axes as there are sizes.
        size: number of windows along each of the last axes; ``None``: as many as there are values.

    >>> adaptive_mean(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), [1, 2])
    tensor([[2., 4.]])
    """
    for axis, count in enumerate(size, -len(size)):
        length = values.shape[axis]
        if count is None or count == length:
            continue
        if length % count == 0:
            values = values.unflatten(axis, (count, length // count)).mean(axis)
        else:
            bounds = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
            values = torch.stack([values.narrow(axis, low, high - low).mean(axis) for low, high in bounds], axis)
    return values


REPLACED: Mapping[Any, Callable[..., Tensor]] = {
    _aten.adaptive_avg_pool1d.default: adaptive_mean,
    _aten.adaptive_avg_pool2d.default: adaptive_mean,
    _aten._adaptive_avg_pool2d.default: adaptive_mean,
    _aten.adaptive_avg_pool3d.default: adaptive_mean,
    _aten._adaptive_avg_pool3d.default: adaptive_mean,
}
"""Operation of a traced graph -> the function that replaces it."""
