"""The parts of a dictionary as a file has them, before the checks that hold for every file."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Warn = Callable[[str], None]


class Parts(NamedTuple):
    """What a file says of a dictionary; the tensors are float32, contiguous and share no memory with the file."""

    format: str
    name: str
    """Of the tensor of the directions."""
    directions: Tensor
    encoder: Tensor | None = None
    encoder_bias: Tensor | None = None
    center: Tensor | None = None
    threshold: Tensor | None = None
    activation: str = "none"
    k: int | None = None
    normalize: str = "none"

    def without_encoder(self, reason: str, warn: Warn) -> "Parts":
        """The directions alone, because the encoder cannot be written as a matrix, a bias and a centre."""
        warn(f"{self.format}: the encoder is left out, because {reason}; the directions are read")
        return Parts(self.format, self.name, self.directions)


def owned(tensor: Tensor, name: str, *, transpose: bool = False) -> Tensor:
    """A float32 contiguous copy.

    Raises:
        ValueError: If the numbers are no floating-point numbers.
    """
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise ValueError(f"{name} must be dense floating-point numbers, got {tensor.dtype}, {tensor.layout}")
    tensor = tensor.detach()
    return (tensor.mT if transpose else tensor).to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def take(state: Mapping[str, Tensor], name: str, *shape: int, transpose: bool = False) -> Tensor:
    """A tensor of a state dict, whose shape is known where ``shape`` is given."""
    if name not in state:
        raise ValueError(f"there is no tensor {name!r}; the file has {', '.join(state)}")
    value = state[name]
    if shape and tuple(value.shape) != shape:
        raise ValueError(f"{name} is {tuple(value.shape)}, but must be {shape}")
    return owned(value, name, transpose=transpose)


def number(state: Mapping[str, Tensor], name: str) -> float:
    """The number in a tensor of one element."""
    value = take(state, name)
    if value.numel() != 1:
        raise ValueError(f"{name} is {tuple(value.shape)}, but must be one number")
    return value.item()


def matrix(state: Mapping[str, Tensor], name: str, d: int | None = None) -> Tensor:
    """A matrix ``(n, d)``."""
    value = take(state, name)
    if value.ndim != 2 or 0 in value.shape or (d is not None and value.shape[1] != d):
        expected = f"(n, {d})" if d is not None else "(n, d)"
        raise ValueError(f"{name} is {tuple(value.shape)}, but must be {expected}, with the members as rows")
    return value
