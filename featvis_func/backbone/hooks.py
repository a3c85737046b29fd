"""Run a private copy of a module with hooks that are attached for one block of code.

The user's module itself is never changed, see :func:`featvis_func.models.copying.private_copy`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from featvis_func.backbone.forward_pass import forward_once, without_checkpoints
from featvis_func.backbone.layers import LayerRef, select, tensors_in, works_channels_last
from featvis_func.backbone.vjp import differentiable
from featvis_func.models import Model
from featvis_func.models.copying import layer_modules
from featvis_func.types import Weights


class Backbone(NamedTuple):
    """``(weights, images) -> full layer name -> activations``, and its weights."""

    apply: Callable[[Weights, Tensor], dict[str, Tensor]]
    weights: Weights
    redirected: Callable[[Weights, Tensor, Tensor], dict[str, Tensor]] | None = None
    """As ``apply``, with a float ``(n,)``: 1 for images whose gradients are redirected. ``None`` without a graph."""
    packed: tuple[str, ...] = ()
    """Names of packed weights, which may be left out: see :func:`featvis_func.compiled_weights`."""
    smoothed: Callable[[Weights, Tensor, Tensor], dict[str, Tensor]] | None = None
    """As ``redirected``, with smoothed gradients of max pools. ``None`` without a graph, or without such pools."""


class _AllCaught(Exception):  # noqa: N818 - a signal, not an error
    """All layers are caught; the rest of the forward pass is not needed."""


def example_images(model: Model, module: nn.Module) -> Tensor:
    """Return three different images of noise, in the module's dtype and on its device."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros((), dtype=torch.float32))
    shape = (3, model.channels, *model.size)
    return wave(math.prod(shape)).reshape(shape).to(device=weight.device, dtype=weight.dtype)


def wave(count: int) -> Tensor:
    """Return a fixed pattern that looks like noise, float64 ``(count,)`` in ``[-1, 1]``; uses no random generator."""
    return torch.sin(torch.arange(count, dtype=torch.float64) ** 2 * 0.618034)


def attach(module: nn.Module, ref: LayerRef, receive: Callable[[Any], None]) -> RemovableHandle:
    """Call a function with the layer's output, or input, at each call of its module."""
    child = layer_modules(module)[ref.module]
    if not ref.input:
        return child.register_forward_hook(lambda child, args, output: receive(output))

    def before(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(inputs_of(args, kwargs))

    return child.register_forward_pre_hook(before, with_kwargs=True)


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's only argument; of several, a dictionary by number and keyword."""
    return args[0] if len(args) == 1 and not kwargs else {**dict(enumerate(args)), **kwargs}


def float_outputs(model: Model, module: nn.Module, images: Tensor) -> list[LayerRef]:
    """Find the tensors of floats, with an entry per image, of the model's own output.

    Raises:
        ValueError: there is none, or the module fails on these images.
    """
    found: list[LayerRef] = []

    def keep(child: nn.Module, args: Any, output: Any) -> None:
        for part, value in tensors_in(output).items():
            if value.is_floating_point() and value.ndim > 1 and len(value) == len(images):
                found.append(LayerRef("", part))

    handle = module.register_forward_hook(keep)
    try:
        forward_once(model, module, images, reset=found.clear)
    finally:
        handle.remove()
    if not found:
        raise ValueError(f"{model.name} returns no tensor with an entry per image, which its operations lead to")
    return found


@contextmanager
def channels_last_seen(module: nn.Module, positions: int) -> Iterator[list[nn.Module]]:
    """Collect the modules called within the block that work with channels last.

    Args:
        module: the model.
        positions: as for :func:`~featvis_func.backbone.layers.works_channels_last`.
    """
    channels_last: list[nn.Module] = []

    def inspect(child: nn.Module, args: Any, output: Any) -> None:
        if works_channels_last(child, output, positions):
            channels_last.append(child)

    handles = [child.register_forward_hook(inspect) for child in module.modules()]
    try:
        yield channels_last
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def catch(module: nn.Module, calls: Mapping[LayerRef, int], *, stop: bool) -> Iterator[dict[str, Tensor]]:
    """Catch layers within the block; with ``stop`` the block ends as soon as all are caught.

    Args:
        module: a private copy.
        calls: layer -> at which call of its module it is caught.
        stop: whether to skip the rest of the forward pass.

    Raises:
        ValueError: at the end of the block, if a layer was called less often than that.
    """
    remaining = dict(calls)
    caught: dict[str, Tensor] = {}

    def receive(ref: LayerRef, value: Any) -> None:
        remaining[ref] -= 1
        if remaining[ref] != 0:
            return
        tensor = select(value, ref.parts)
        if tensor is None:
            raise ValueError(no_tensor(ref, value))
        # A copy, because an in-place operation that follows would overwrite it.
        caught[ref.path] = tensor.clone()
        if stop and len(caught) == len(calls):
            raise _AllCaught

    handles = [attach(module, ref, partial(receive, ref)) for ref in calls]
    try:
        with without_checkpoints():
            yield caught
    except _AllCaught:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for ref, number in calls.items():
        if ref.path not in caught:
            raise ValueError(varying_calls(ref, number, number - remaining[ref]))


def no_tensor(ref: LayerRef, value: Any) -> str:
    """Why a layer's name selects no tensor, and which names would."""
    choice = ", ".join(repr(ref._replace(parts=part, axes=None).path) for part in tensors_in(value))
    what = "takes" if ref.input else "gives"
    kind = f"a {type(value).__name__}"
    if isinstance(value, Tensor):
        problem = f"layer {ref.path!r} does not exist: {ref._replace(parts='').path!r} {what} a single tensor"
    elif ref.parts:
        problem = f"layer {ref.path!r} {what} no tensor: {ref._replace(parts='').path!r} is {kind}"
    else:
        problem = f"layer {ref.path!r} {what} {kind} instead of a tensor, which has no channels"
    return f"{problem}; choose one of {choice}" if choice else problem


def varying_calls(ref: LayerRef, expected: int, number: int) -> str:
    """Why a layer that is not called equally often in each forward pass cannot be used."""
    name, times = ref.module or "the model", "time" if expected == 1 else "times"
    return (
        f"{name!r} is called {expected} {times} in one forward pass and {number} in another: the number depends on the"
        f" images or on how many there are, so that its {'input' if ref.input else 'output'} is not one tensor with an"
        f" entry per image"
    )


def hook_backbone(module: nn.Module, calls: Mapping[LayerRef, int], *, accumulate: bool = False) -> Backbone:
    """Return the hook fallback, for modules that cannot be exported: a forward pass that stops at the last layer.

    It runs in ordinary autograd, see :mod:`featvis_func.backbone.vjp`, one thread at a time.

    Args:
        module: a private copy.
        calls: layer -> at which call of its module it is caught.
        accumulate: see :func:`~featvis_func.backbone.vjp.differentiable`.
    """
    state = {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}

    def run(weights: Weights, images: Tensor) -> dict[str, Tensor]:
        own = all(weights.get(name) is tensor for name, tensor in state.items())
        with catch(module, calls, stop=True) as caught:
            if own:
                module(images)
            else:
                functional_call(module, weights, (images,))
        return {ref.path: caught[ref.path] for ref in calls}

    return Backbone(differentiable(run, accumulate=accumulate), state)
