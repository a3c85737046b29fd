"""Copy a module, so that the user's own is never changed."""

import copy

import torch
from torch import nn


def private_copy(module: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Copy a module, in evaluation mode.

    >>> private_copy(nn.Dropout().train()).training
    False
    """
    copied = copy.deepcopy(module).eval()
    return copied if device is None else copied.to(device)
