"""Count the calls of a layer's module, to know at which of them the layer is caught."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from featvis_func.backbone.forward_pass import forward_once
from featvis_func.backbone.hooks import attach, channels_last_seen, no_tensor, varying_calls
from featvis_func.backbone.layers import LayerRef, select
from featvis_func.models import Model
from featvis_func.models.copying import layer_modules
from featvis_func.validation import warn_caller


def count_calls(
    model: Model, module: nn.Module, refs: Sequence[LayerRef], images: Tensor
) -> tuple[dict[LayerRef, int], bool]:
    """Find at which call of its module, in one forward pass, each layer is to be caught.

    A layer that is called in training mode only, such as an auxiliary classifier, is reached with the modules around it
    in training mode; a warning says so.

    Args:
        model: for its name and size.
        module: a private copy of the model's, in evaluation mode; left in the mode in which the layers are called.
        refs: the layers.
        images: ``(n, c, ...)``.

    Returns:
        Layer -> the number of the call, from 1; and whether any module works with channels last.

    Raises:
        ValueError: a layer is not called, or not as often as its name says, or its tensor is not one and has no part of
            that name.
    """
    calls, last = _count_calls(model, module, refs, images)
    missing = [ref for ref, number in calls.items() if number == 0]
    if missing:
        modules = layer_modules(module)
        around = {
            name: modules[name] for ref in missing for name in _ancestors(ref.module) if not modules[name].training
        }
        for child in around.values():
            child.training = True  # of this module alone, not of those inside it
        calls, last = _count_calls(model, module, refs, images)
        absent = next((ref for ref, number in calls.items() if number == 0), None)
        if absent is not None:
            raise ValueError(f"layer {absent.path!r} is not called in the forward pass, so that it has no output")
        names = ", ".join(repr(name) if name else model.name for name in around)
        warn_caller(
            f"layer {missing[0].path!r} is called in training mode only: {names} itself, without the modules inside,"
            f" runs in training mode"
        )
    for ref, number in calls.items():
        if ref.call is not None and ref.call > number:
            raise ValueError(f"layer {ref.path!r}: a forward pass calls {ref.module or 'the model'!r} {number} times")
    return {ref: number if ref.call is None else ref.call for ref, number in calls.items()}, last


def _ancestors(name: str) -> list[str]:
    """The names of the modules around a module, from the root."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts))]


def _count_calls(
    model: Model, module: nn.Module, refs: Sequence[LayerRef], images: Tensor
) -> tuple[dict[LayerRef, int], bool]:
    calls: dict[LayerRef, int] = {}
    wrong: dict[LayerRef, str] = {}

    def reset() -> None:
        calls.update(dict.fromkeys(refs, 0))

    def count(ref: LayerRef, value: Any) -> None:
        calls[ref] += 1
        if select(value, ref.parts) is None:
            wrong[ref] = no_tensor(ref, value)

    handles = [attach(module, ref, partial(count, ref)) for ref in refs]
    try:
        with channels_last_seen(module, images.ndim - 2) as last:
            forward_once(model, module, images, reset=reset)
    finally:
        for handle in handles:
            handle.remove()
    if wrong:
        raise ValueError(next(iter(wrong.values())))
    return calls, bool(last)


def check_constant_calls(model: Model, module: nn.Module, calls: Mapping[LayerRef, int], images: Tensor) -> None:
    """Raise ValueError if a layer is not called equally often for other images and other numbers of them.

    Args:
        model: for its name.
        module: a private copy.
        calls: layer -> at which call of its module it is caught.
        images: the ones for which that was counted.
    """
    others = [images[:1], images[1:], torch.full_like(images[:1], 3.0), torch.full_like(images[:1], -3.0)]
    for batch in others:
        counted, _ = _count_calls(model, module, list(calls), batch)
        for ref, number in counted.items():
            if number < calls[ref] or (ref.call is None and number != calls[ref]):
                raise ValueError(varying_calls(ref, calls[ref], number))
