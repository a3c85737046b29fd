"""Run a private copy of a module with hooks that are attached for one block of code.

The user's module itself is never changed.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from featvis_func.backbone.layers import LayerRef, tensors_in, works_channels_last
from featvis_func.models import Model
from featvis_func.types import Weights
from featvis_func.validation import first_line

T = TypeVar("T")


class Backbone(NamedTuple):
    """``(weights, images) -> full layer name -> activations``, and its weights."""

    apply: Callable[[Weights, Tensor], dict[str, Tensor]]
    weights: Weights
    redirected: Callable[[Weights, Tensor, Tensor], dict[str, Tensor]] | None = None
    """As ``apply``, with a float ``(n,)``: 1 for images whose gradients are redirected. ``None`` without a graph."""
    packed: tuple[str, ...] = ()
    """Names of packed weights, which may be left out: see :func:`featvis_func.compiled_weights`."""


class _AllCaught(Exception):  # noqa: N818 - a signal, not an error
    """All layers are caught; the rest of the forward pass is not needed."""


def private_copy(module: nn.Module, device: torch.device | str | None) -> nn.Module:
    """Copy a module's structure, in evaluation mode and without hooks; tensors are shared unless they must move."""
    registered = [*module.parameters(), *module.buffers()]
    plain = [v for child in module.modules() for v in vars(child).values() if isinstance(v, Tensor)]
    moves = device is not None and any(_elsewhere(t, device) for t in (*registered, *plain))
    moves = moves or any(t.is_inference() for t in registered)
    # deepcopy takes the objects of this table instead of making copies: new parameters that share the storage, so that
    # not even an assignment to `.data` reaches the user's module, and empty tables of hooks. Buffers are copied: they
    # are small, and some forward passes write to them.
    instead: dict[int, Any] = {id(t): t.detach().clone() for t in plain}
    if not moves:
        for p in module.parameters():
            instead[id(p)] = nn.Parameter(p.detach(), p.requires_grad) if type(p) is nn.Parameter else p
    for child in module.modules():
        for hooks in (child._forward_hooks, child._backward_hooks, child._backward_pre_hooks):
            instead[id(hooks)] = OrderedDict()
        # torch's own pre-hooks, such as that of weight_norm, compute the module's weight: they stay.
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
    """Whether a tensor is on another device; "cuda" means any CUDA device."""
    target = torch.device(device)
    return tensor.device.type != target.type or (target.index is not None and tensor.device.index != target.index)


def example_images(model: Model, module: nn.Module) -> Tensor:
    """Return three different images of noise, in the module's dtype and on its device."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    shape = (3, model.channels, *model.size)
    return wave(math.prod(shape)).reshape(shape).to(device=weight.device, dtype=weight.dtype)


def wave(count: int) -> Tensor:
    """Return a fixed pattern that looks like noise, float64 ``(count,)`` in ``[-1, 1]``; uses no random generator."""
    return torch.sin(torch.arange(count, dtype=torch.float64) ** 2 * 0.618034)


class _RandomOperations(TorchDispatchMode):
    """Notes whether an operation of this thread draws from a global random generator."""

    drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = _random_states()
        output = func(*args, **(kwargs or {}))
        self.drew = self.drew or not _equal(before, _random_states())
        return output


def keeping_random_state(function: Callable[[], T]) -> tuple[T, bool]:
    """Call a function, and restore the global random generators if it has drawn from them.

    All threads share the generators, so that they are restored only if it was this function that has drawn: otherwise
    another thread would draw the same numbers again. Where the generators have changed, a second call tells, in which
    each operation is watched; the first call is not watched, because not every model runs that way.

    Args:
        function: takes no arguments, and may be called twice.

    Returns:
        What it returns, and whether it has drawn.
    """
    before = _random_states()
    result = function()
    if _equal(before, _random_states()):
        return result, False
    operations = _RandomOperations()
    try:
        with operations:
            result = function()
    except Exception:  # it cannot be watched
        operations.drew = True
    if operations.drew:
        torch.set_rng_state(before[0])
        for device, state in enumerate(before[1:]):
            torch.cuda.set_rng_state(state, device)
    return result, operations.drew


def _equal(states: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(states) == len(others) and all(map(torch.equal, states, others))


def _random_states() -> list[Tensor]:
    """Return the states of the global random generators: that of the CPU, then those of the CUDA devices."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else [])]


def forward_once(
    model: Model, module: nn.Module, images: Tensor, *, reset: Callable[[], object] = lambda: None
) -> None:
    """Run a complete forward pass for the hooks that it calls.

    Args:
        model: for its name and size.
        module: to be run.
        images: ``(n, c, h, w)``.
        reset: called before each pass, of which there may be two: see :func:`keeping_random_state`.

    Raises:
        ValueError: the module fails on these images.
    """

    def run() -> None:
        reset()
        with torch.no_grad():
            module(images)

    try:
        keeping_random_state(run)
    except Exception as error:
        shape = f"{model.channels} x {model.size[0]} x {model.size[1]}"
        raise ValueError(f"{model.name} fails on an image of {shape}: {first_line(error)}") from error


def count_calls(
    model: Model, module: nn.Module, refs: Sequence[LayerRef], images: Tensor
) -> tuple[dict[LayerRef, int], bool]:
    """Count how often one forward pass calls each layer, and check whether any module works with channels last.

    Raises:
        ValueError: a layer is not called, or its output is not a tensor and has no part of that name.
    """
    calls: dict[LayerRef, int] = {}
    wrong: dict[LayerRef, str] = {}

    def reset() -> None:
        calls.update(dict.fromkeys(refs, 0))

    def counter(ref: LayerRef) -> Callable[..., None]:
        def count(child: nn.Module, args: Any, output: Any) -> None:
            calls[ref] += 1
            tensors = tensors_in(output)
            if ref.parts not in tensors:
                choice = ", ".join(f"{ref.module + part!r}" for part in tensors)
                kind = f"gives a {type(output).__name__} instead of a tensor, which has no channels"
                wrong[ref] = f"layer {ref.path!r} {kind}{f'; choose one of {choice}' if choice else ''}"

        return count

    handles = [module.get_submodule(ref.module).register_forward_hook(counter(ref)) for ref in refs]
    try:
        with channels_last_seen(module) as last:
            forward_once(model, module, images, reset=reset)
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
    """Collect the modules called within the block that work with channels last."""
    channels_last: list[nn.Module] = []

    def inspect(child: nn.Module, args: Any, output: Any) -> None:
        if works_channels_last(child, output):
            channels_last.append(child)

    handles = [child.register_forward_hook(inspect) for child in module.modules()]
    try:
        yield channels_last
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def catch(module: nn.Module, calls: Mapping[LayerRef, int], *, stop: bool) -> Iterator[dict[str, Tensor]]:
    """Catch the layers' outputs within the block; with ``stop`` the block ends as soon as all are caught."""
    remaining = dict(calls)
    caught: dict[str, Tensor] = {}

    def hook(ref: LayerRef) -> Callable[..., None]:
        def catch(child: nn.Module, args: Any, output: Any) -> None:
            remaining[ref] -= 1
            if remaining[ref] == 0:
                # A copy, because an in-place operation that follows would overwrite the output.
                caught[ref.path] = tensors_in(output)[ref.parts].clone()
                if stop and len(caught) == len(calls):
                    raise _AllCaught

        return catch

    handles = [module.get_submodule(ref.module).register_forward_hook(hook(ref)) for ref in calls]
    try:
        yield caught
    except _AllCaught:
        pass
    finally:
        for handle in handles:
            handle.remove()


def hook_backbone(module: nn.Module, calls: Mapping[LayerRef, int]) -> Backbone:
    """Return the hook fallback, for modules that cannot be exported: a forward pass that stops at the last layer."""

    def apply(weights: Weights, images: Tensor) -> dict[str, Tensor]:
        with catch(module, calls, stop=True) as caught:
            functional_call(module, weights, (images,))
        return caught

    state = {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}
    return Backbone(apply, state)
