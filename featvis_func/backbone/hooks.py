"""Looking into a module: a private copy of its structure, and hooks that live for one block of code.

Nothing here changes the module that it is given.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from featvis_func.backbone.layers import LayerRef, tensors_in, works_channels_last
from featvis_func.models import Model
from featvis_func.types import Weights
from featvis_func.validation import first_line


class Backbone(NamedTuple):
    """``(weights, images) -> full layer name -> activations``, and its weights."""

    apply: Callable[[Weights, Tensor], dict[str, Tensor]]
    weights: Weights
    redirected: Callable[[Weights, Tensor, Tensor], dict[str, Tensor]] | None = None
    """As ``apply``, with a float ``(n,)``: 1 for images whose gradients are redirected. None: only a graph can that."""
    packed: tuple[str, ...] = ()
    """Names of further weights, which can be left out: see :func:`~featvis_func.cpu.winograd.add_packed_weights`."""


class _Caught(Exception):  # noqa: N818 - a signal, not an error
    """All layers are caught; the rest of the forward pass is not needed."""


def private_copy(module: nn.Module, device: torch.device | str | None) -> nn.Module:
    """The module's structure anew, in evaluation mode and without hooks; the tensors shared unless they must move."""
    held = [*module.parameters(), *module.buffers()]
    plain = [v for child in module.modules() for v in vars(child).values() if isinstance(v, Tensor)]
    moves = device is not None and any(_elsewhere(t, device) for t in (*held, *plain))
    moves = moves or any(t.is_inference() for t in held)
    # What deepcopy finds here, it takes instead of copying: new parameters over the same storage, so that not even an
    # assignment to `.data` reaches the user's; and empty rooms for hooks. Buffers are small, and some forwards write.
    instead: dict[int, Any] = {id(t): t.detach().clone() for t in plain}
    if not moves:
        for p in module.parameters():
            instead[id(p)] = nn.Parameter(p.detach(), p.requires_grad) if type(p) is nn.Parameter else p
    for child in module.modules():
        for hooks in (child._forward_hooks, child._backward_hooks, child._backward_pre_hooks):
            instead[id(hooks)] = OrderedDict()
        # torch's own, such as weight_norm's, compute the module's weight.
        instead[id(child._forward_pre_hooks)] = OrderedDict(
            (number, hook)
            for number, hook in child._forward_pre_hooks.items()
            if type(hook).__module__.startswith("torch.nn.utils")
        )
    try:
        new = copy.deepcopy(module, instead)
    except Exception as error:
        raise ValueError(f"the structure of {type(module).__name__} cannot be copied: {error}") from error
    return (new.to(device) if moves else new).eval()


def _elsewhere(tensor: Tensor, device: torch.device | str) -> bool:
    """Whether a tensor is on another device; "cuda" is the current CUDA device."""
    wanted = torch.device(device)
    return tensor.device.type != wanted.type or (wanted.index is not None and tensor.device.index != wanted.index)


def example_images(model: Model, module: nn.Module) -> Tensor:
    """Three different images, as the module wants them: noise, so that no two layers agree by chance."""
    some = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    shape = (3, model.channels, *model.size)
    return wave(math.prod(shape)).reshape(shape).to(device=some.device, dtype=some.dtype)


def wave(count: int) -> Tensor:
    """A fixed pattern that looks like noise, float64 ``(count,)`` in [-1, 1]: no generator is touched."""
    return torch.sin(torch.arange(count, dtype=torch.float64) ** 2 * 0.618034)


def forward_once(model: Model, module: nn.Module, images: Tensor) -> None:
    """A whole forward pass for its side effects on hooks."""
    try:
        with torch.no_grad():
            module(images)
    except Exception as error:
        shape = f"{model.channels} x {model.size[0]} x {model.size[1]}"
        raise ValueError(f"{model.name} fails on an image of {shape}: {first_line(error)}") from error


def count_calls(
    model: Model, module: nn.Module, refs: Sequence[LayerRef], images: Tensor
) -> tuple[dict[LayerRef, int], bool]:
    """How often one forward pass calls each layer, so that the last call is known; and whether any module works with
    channels last.

    Raises:
        ValueError: a layer that is not called, or whose output is no tensor and has no part of that name.
    """
    calls = dict.fromkeys(refs, 0)
    wrong: dict[LayerRef, str] = {}

    def counter(ref: LayerRef) -> Callable[..., None]:
        def count(child: nn.Module, args: Any, output: Any) -> None:
            calls[ref] += 1
            found = tensors_in(output)
            if ref.parts not in found:
                choice = ", ".join(f"{ref.module + part!r}" for part in found)
                kind = f"gives a {type(output).__name__} instead of a tensor, which has no channels"
                wrong[ref] = f"layer {ref.path!r} {kind}{f'; choose one of {choice}' if choice else ''}"

        return count

    handles = [module.get_submodule(ref.module).register_forward_hook(counter(ref)) for ref in calls]
    try:
        with channels_last_seen(module) as last:
            forward_once(model, module, images)
    finally:
        for handle in handles:
            handle.remove()
    for ref, number in calls.items():
        if ref in wrong:
            raise ValueError(wrong[ref])
        if number == 0:
            raise ValueError(f"layer {ref.path!r} is not called in the forward pass, so that it has no output")
    return calls, bool(last)


@contextmanager
def channels_last_seen(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Collects those of the modules called within the block that work with channels last."""
    found: list[nn.Module] = []

    def look(child: nn.Module, args: Any, output: Any) -> None:
        if works_channels_last(child, output):
            found.append(child)

    handles = [child.register_forward_hook(look) for child in module.modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def catch(module: nn.Module, calls: Mapping[LayerRef, int], *, stop: bool) -> Iterator[dict[str, Tensor]]:
    """Catches the layers' outputs within the block; with ``stop`` the block ends once all are caught."""
    left = dict(calls)
    caught: dict[str, Tensor] = {}

    def hook(ref: LayerRef) -> Callable[..., None]:
        def catch(child: nn.Module, args: Any, output: Any) -> None:
            left[ref] -= 1
            if left[ref] == 0:
                # A copy: an in-place operation that follows would overwrite what was caught.
                caught[ref.path] = tensors_in(output)[ref.parts].clone()
                if stop and len(caught) == len(calls):
                    raise _Caught

        return catch

    handles = [module.get_submodule(ref.module).register_forward_hook(hook(ref)) for ref in calls]
    try:
        yield caught
    except _Caught:
        pass
    finally:
        for handle in handles:
            handle.remove()


def hook_backbone(module: nn.Module, calls: Mapping[LayerRef, int]) -> Backbone:
    """The slow road, which every module can take: a forward pass that stops at the last layer."""

    def apply(weights: Weights, images: Tensor) -> dict[str, Tensor]:
        with catch(module, calls, stop=True) as caught:
            functional_call(module, weights, (images,))
        return caught

    state = {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}
    return Backbone(apply, state)
