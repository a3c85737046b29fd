"""Tensors that a pure function refers to, on whatever device it runs."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def device_constant(value: Tensor, *, cast: bool = True) -> Callable[[Tensor], Tensor]:
    """Return a function that gives a tensor on the device and, with ``cast``, in the dtype of another.

    The tensor is copied to each device once, at the first call outside of ``torch.compile``, so that a step neither
    copies nor waits for the copy. ``make_ascent`` and its ``init`` make such calls of everything that a step uses.

    >>> scale = device_constant(torch.tensor([1.0, 2.0]))
    >>> scale(torch.zeros(3, dtype=torch.float64))
    tensor([1., 2.], dtype=torch.float64)
    """
    copies: dict[str, Tensor] = {}

    def on_device_of(like: Tensor) -> Tensor:
        dtype = like.dtype if cast else value.dtype
        if value.device == like.device:
            return value.to(dtype)
        name = str(like.device)
        if name in copies:
            return copies[name].to(dtype)
        if torch.compiler.is_compiling():
            return value.to(like.device, dtype)
        # What a function transform computes must not outlive it.
        with temporarily_clear_interpreter_stack():
            copies[name] = value.to(like.device)
        return copies[name].to(dtype)

    return on_device_of
