"""Gradient ascent in plain PyTorch: a hook that clones a layer's output, autograd and a loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import featvis_func as fv
from featvis_func.types import Image, Optimizer

STEPS = 4
_RATE = 2.0


def start(size: tuple[int, ...], channels: int) -> Tensor:
    """The parameters from which both ascents start."""
    count = channels * torch.Size(size).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32) * 0.7).reshape(channels, *size)


def plain_history(
    module: nn.Module,
    layer: str,
    filters: list[int],
    *,
    size: tuple[int, ...],
    channels: int = 3,
    pick: Callable[[Any], Tensor] = lambda output: output,
    run: Callable[[nn.Module, Tensor], Any] = lambda module, images: module(images),
    axis: int = 1,
) -> Tensor:
    """Return the scores of each step, ``(steps, n)``: the mean of a channel at the layer's last call.

    Args:
        module: in the mode in which it is to run.
        layer: name of the module whose output is caught.
        filters: channels.
        size: of the images.
        channels: of the images.
        pick: the layer's output -> its activations.
        run: how the module is called.
        axis: of the channels in the activations.
    """
    caught: list[Tensor] = []
    target = module.get_submodule(layer)
    handle = target.register_forward_hook(lambda child, args, output: caught.append(pick(output).clone()))
    params = torch.stack([start(size, channels)] * len(filters))
    history = []
    try:
        for _ in range(STEPS):
            params.requires_grad_()
            caught.clear()
            run(module, torch.sigmoid(params))
            values = caught[-1].movedim(axis, -1).flatten(1, -2) if caught[-1].ndim > 2 else caught[-1][:, None]
            scores = torch.stack([values[i, :, f].mean() for i, f in enumerate(filters)])
            history.append(scores.detach())
            (gradient,) = torch.autograd.grad(scores.sum(), params)
            params = (params + _RATE * gradient).detach()
    finally:
        handle.remove()
    return torch.stack(history)


def history(
    model: Any, layer: str, filters: list[int], *, size: tuple[int, ...], channels: int = 3, **options: Any
) -> Tensor:
    """The same by the library."""
    image = Image(lambda key: start(size, channels), torch.sigmoid)
    optimizer = Optimizer(lambda params, key: (), lambda grads, state, params: (_RATE * grads, state))
    result = fv.render(
        model, layer, filters, steps=STEPS, size=size, image=image, optimizer=optimizer, transforms="none", **options
    )
    return result.history
