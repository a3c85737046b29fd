"""Run a private copy of a module with hooks that are attached for one block of code.

The user's module itself is never changed, see :func:`featvis_func.models.copying.private_copy`.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from featvis_func.backbone.layers import LayerRef, select, tensors_in, works_channels_last
from featvis_func.backbone.vjp import differentiable
from featvis_func.models import Model
from featvis_func.models.copying import layer_modules
from featvis_func.types import Weights
from featvis_func.validation import first_line, warn_caller

T = TypeVar("T")


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


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Context manager in which this thread's reentrant checkpoints run their function as it is.

    They would run it without a gradient first, so that a layer inside had none.
    """
    _install_bypass()
    before = getattr(_bypass, "active", False)
    _bypass.active = True
    try:
        yield
    finally:
        _bypass.active = before


_bypass = threading.local()


def _install_bypass() -> None:
    """Wrap torch's reentrant checkpoint so that it does nothing in a thread within :func:`without_checkpoints`."""
    original = CheckpointFunction.apply
    if hasattr(original, "bypassed"):
        return

    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if getattr(_bypass, "active", False):
            return function(*args)
        return original(function, preserve_rng_state, *args)

    apply.bypassed = True  # type: ignore[attr-defined]
    CheckpointFunction.apply = apply


def forward_once(
    model: Model, module: nn.Module, images: Tensor, *, reset: Callable[[], object] = lambda: None
) -> None:
    """Run a complete forward pass for the hooks that it calls.

    Args:
        model: for its name and size.
        module: to be run.
        images: ``(n, c, ...)``.
        reset: called before each pass, of which there may be two: see :func:`keeping_random_state`.

    Raises:
        ValueError: the module fails on these images.
    """

    def run() -> None:
        reset()
        with torch.no_grad(), without_checkpoints():
            module(images)

    try:
        keeping_random_state(run)
    except Exception as error:
        shape = " x ".join(map(str, images.shape[1:]))
        assumed = f" ({' and '.join(model.assumed)} assumed)" if model.assumed else ""
        raise ValueError(f"{model.name} fails on an image of {shape}{assumed}: {first_line(error)}") from error


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
            wrong[ref] = _no_tensor(ref, value)

    handles = [_attach(module, ref, partial(count, ref)) for ref in refs]
    try:
        with channels_last_seen(module, images.ndim - 2) as last:
            forward_once(model, module, images, reset=reset)
    finally:
        for handle in handles:
            handle.remove()
    if wrong:
        raise ValueError(next(iter(wrong.values())))
    return calls, bool(last)


def _no_tensor(ref: LayerRef, value: Any) -> str:
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


def _attach(module: nn.Module, ref: LayerRef, receive: Callable[[Any], None]) -> RemovableHandle:
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
            raise ValueError(_no_tensor(ref, value))
        # A copy, because an in-place operation that follows would overwrite it.
        caught[ref.path] = tensor.clone()
        if stop and len(caught) == len(calls):
            raise _AllCaught

    handles = [_attach(module, ref, partial(receive, ref)) for ref in calls]
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


def varying_calls(ref: LayerRef, expected: int, number: int) -> str:
    """Why a layer that is not called equally often in each forward pass cannot be used."""
    name, times = ref.module or "the model", "time" if expected == 1 else "times"
    return (
        f"{name!r} is called {expected} {times} in one forward pass and {number} in another: the number depends on the"
        f" images or on how many there are, so that its {'input' if ref.input else 'output'} is not one tensor with an"
        f" entry per image"
    )


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
