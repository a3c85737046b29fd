"""The model as a function: ``(weights, images) -> activations``, computed no further than the requested layers.

The module is traced by ``torch.export`` up to the last of these layers, which gives a pure graph without hooks; it runs
eagerly, under ``torch.func`` and inside ``torch.compile(fullgraph=True)``. The user's module is never changed: what is
traced is a copy of its structure that shares its tensors.
"""

import threading
from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featvis_func.backbone.export import (
    MismatchError,
    UnknownOperationError,
    release,
    trace,
    truncate,
    why_not_exported,
)
from featvis_func.backbone.hardware import specialization
from featvis_func.backbone.hooks import (
    Backbone,
    check_constant_calls,
    count_calls,
    example_images,
    float_outputs,
    hook_backbone,
)
from featvis_func.backbone.layers import (
    LayerRef,
    axes_of,
    canonical,
    check_axes,
    parse_layer,
)
from featvis_func.backbone.layers import resolve_layer as resolve_layer
from featvis_func.backbone.user_hooks import changing_hooks, detach, user_hooks
from featvis_func.backbone.verify import (
    PRECISIONS,
    Reference,
    check_outputs,
    compare,
    exact_float32,
    find_mismatch,
    in_precision,
    reference_of,
    with_operations,
)
from featvis_func.models import Model
from featvis_func.models.copying import layer_modules, private_copy
from featvis_func.types import Weights
from featvis_func.validation import first_line, warn_caller

# torch.export keeps some state in the process: two threads must not trace at the same time.
_trace_lock = threading.RLock()


class Features(NamedTuple):
    """A truncated, frozen backbone. Make one with :func:`make_features`."""

    apply: Callable[[Weights, Tensor], dict[str, Tensor]]
    """(weights, images ``(n, c, ...)``, normalised for the module) -> requested layer name -> ``(n, ...)``."""
    weights: Weights
    """The tensors that the layers depend on, detached: copies, which keep their values when the module trains on."""
    shapes: dict[str, tuple[int, ...]]
    """Requested layer name -> shape of its output for one image: ``(c, t, h, w)``, ``(c, h, w)``, ``(t, d)`` or
    ``(d,)``."""
    paths: dict[str, str]
    """Requested layer name -> full name."""
    exported: bool
    """False where ``torch.export`` could not trace the module: it runs with a forward hook and does not compile."""
    redirected: Callable[[Weights, Tensor, Tensor], dict[str, Tensor]] | None = None
    """(weights, images, float ``(n,)``) -> the values of ``apply``. For images with 1, gradients are redirected past
    activations that block them, see :mod:`featvis_func.backbone.redirected_relu`. ``None`` if not exported."""
    packed: tuple[str, ...] = ()
    """Names of packed weights, which may be left out: see :func:`compiled_weights`."""
    size: tuple[int, ...] | None = None
    """Input size for which the shapes hold, as that of a :class:`~featvis_func.models.Model`."""


def make_features(
    model: Model,
    layers: Sequence[str],
    *,
    device: torch.device | str | None = None,
    precision: str = "auto",
    verify: bool = True,
) -> Features:
    """Truncate a model behind the last of some layers.

    A layer means its module's own output, in evaluation mode, at its last call, before any in-place operation that
    follows; suffixes of its name select other tensors, see :mod:`featvis_func.backbone.layers`.

    Forward, pre- and backward hooks that the user attached are part of the model where they change values. To see
    which do, all of them run a few times, on images of noise, while the features are made; those that only look are
    left out then.

    Args:
        model: see :func:`~featvis_func.load_model`.
        layers: names from ``named_modules()``; a unique ending is enough. ``""`` or ``"output"`` is the model's own
            output.
        device: where to compute. Default: where the module is.
        precision: of weights and activations, one of :data:`~featvis_func.backbone.verify.PRECISIONS`.
        verify: whether to compare the truncated graph with the module once.

    Returns:
        A :class:`Features`. Where the module cannot be exported, or not be differentiated by ``torch.func``, it runs
        with a forward hook in ordinary autograd, and a warning says why.

    Raises:
        ValueError: an unknown precision, or one in which the model does not run or gives other values; an unknown or
            ambiguous layer, one that the forward pass does not call, or not equally often for all images, or one whose
            output has no channels; a forward pass that fails on an image of the model's size; or a module that cannot
            be differentiated.

    >>> from featvis_func.models import load_model
    >>> make_features(load_model("texturenet"), ["head"]).shapes["head"][0] >= 24
    True
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    with _trace_lock, torch.inference_mode(False), exact_float32():
        return _make_features(model, layers, device, precision, verify)


def _make_features(
    model: Model, layers: Sequence[str], device: torch.device | str | None, precision: str, verify: bool
) -> Features:
    refs = {name: parse_layer(model.module, name) for name in layers}
    if not refs:
        raise ValueError("no layers were requested: the list is empty")
    paths = {name: ref.path for name, ref in refs.items()}
    module = private_copy(model.module, device).requires_grad_(False)
    images = example_images(model, module)
    distinct = list(dict.fromkeys(ref._replace(axes=None) for ref in refs.values()))
    operations = [ref for ref in distinct if ref.operation]
    hooked = [ref for ref in distinct if not ref.operation]
    if operations:  # they are found in the graph of the whole model
        hooked += [ref for ref in float_outputs(model, module, images) if ref not in hooked]
    calls, channels_last = count_calls(model, module, hooked, images)
    reference = _reference(module, calls, images)
    core, exported, reference = _backbone(model, module, calls, reference, verify, operations)
    check_outputs(model, paths, reference)
    axes, shapes = {}, {}
    for name, ref in refs.items():
        value = reference.values[ref.path]
        axes[name] = _axes(model, module, ref, tuple(value.shape[1:]), channels_last)
        shapes[name] = tuple(canonical(value, axes[name]).shape[1:])
    dtype, weights = in_precision(model, core, precision, reference)

    def named(run: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        def apply(weights: Weights, images: Tensor, *redirect: Tensor) -> dict[str, Tensor]:
            outputs = run(weights, images.to(dtype), *redirect)
            return {name: canonical(outputs[path], axes[name]) for name, path in paths.items()}

        return apply

    redirected = None if core.redirected is None else named(core.redirected)
    return Features(named(core.apply), weights, shapes, paths, exported, redirected, core.packed, model.size)


def _reference(module: nn.Module, calls: Mapping[LayerRef, int], images: Tensor) -> Reference:
    """Run a private copy of the module, and remove those of the user's hooks that change nothing."""
    hooks = user_hooks(module)
    with changing_hooks(hooks) as changing:
        reference = reference_of(module, calls, images)
    idle = [hook for hook in hooks if hook not in changing]
    if idle:
        attach = detach(idle)
        if compare(module, calls, reference):
            attach()  # a hook changes something else than what it is given, such as a weight
    return reference


def compiled_weights(features: Features) -> Weights:
    """Return the weights with which compiled features run fastest: on a CPU, with packed weights for some kernels.

    Compiled features also take ``features.weights``, with the same values up to rounding. Packed weights, such as
    ``"conv.weight.transformed"``, are computed from the kernels, and have to be computed again if these change. They
    take 8 times the memory of the float32 3 x 3 kernels that have them, see :mod:`featvis_func.cpu.winograd`. Eager
    mode ignores them. Each renderer that compiles computes packed weights, unless its features have them already:
    ``features._replace(weights=compiled_weights(features))``.

    >>> from featvis_func.models import load_model
    >>> features = make_features(load_model("texturenet"), ["block3.conv"], precision="float32")
    >>> sorted(compiled_weights(features).keys() - features.weights.keys())
    ['block3.conv.weight.flipped', 'block3.conv.weight.transformed']
    """
    return specialization(device_of(features).type).pack_weights(features.weights, features.packed)


def _axes(model: Model, module: nn.Module, ref: LayerRef, shape: tuple[int, ...], channels_last: bool) -> str:
    """Return the meaning of a layer's axes, as stated by the user or inferred."""
    if ref.axes is not None:
        check_axes(ref.path, ref.axes, shape)
        return ref.axes
    # The type of a module says nothing about the axes of one of several outputs.
    child = nn.Identity() if ref.parts or ref.input or ref.operation else layer_modules(module)[ref.module]
    axes = axes_of(child, shape, model.size, channels_last=channels_last)
    if axes is None:
        first, last = ("chw", "hwc") if len(shape) == 3 else ("cthw", "thwc")
        raise ValueError(
            f"layer {ref.path!r} gives {shape} per image, whose first or last axis could be the channels; state"
            f" which: '{ref.path}@{first}' or '{ref.path}@{last}'"
        )
    return axes


def _backbone(
    model: Model,
    module: nn.Module,
    calls: Mapping[LayerRef, int],
    reference: Reference,
    verify: bool,
    operations: Sequence[LayerRef],
) -> tuple[Backbone, bool, Reference]:
    """Return the module as a graph, and True; where no graph computes the same, the hook fallback, and False.

    Also the reference, with the values of operations inside of modules, which no hook can catch: they are those of the
    graph as traced, whose other values are the module's.
    """
    dropped = ""
    try:
        traced = trace(module, calls, reference.images, operations)
        try:
            plain = truncate(traced, traced.layers, optimize=False)
            if operations:
                mismatch = find_mismatch(_only(plain, reference.values), reference)
                if mismatch:
                    raise MismatchError(mismatch)
                reference = with_operations(plain, reference)
            core = truncate(traced, traced.layers)
            mismatch = find_mismatch(core, reference) if verify else ""
            if mismatch:
                # In very deep networks the rounding of the graph passes can switch ReLUs: use the graph as traced.
                dropped, core = mismatch, plain
                mismatch = find_mismatch(core, reference)
        finally:
            release(traced)
    except UnknownOperationError:
        raise
    except Exception as error:
        # torch.export fails in as many ways as there are models; every failure means the hook fallback.
        mismatch = why_not_exported(error)
    else:
        if not mismatch:
            if dropped:
                warn_caller(
                    f"{model.name} runs as it was traced, slower, without folded batch norms and the other changes of"
                    f" its graph: with them {dropped}"
                )
            return core, True, reference
    if operations:
        raise ValueError(
            f"layer {operations[0].path!r} is an operation inside of a module, which can only be reached in a model"
            f" that can be exported: {mismatch}"
        )
    check_constant_calls(model, module, calls, reference.images)
    warn_caller(
        f"{model.name} runs with a forward hook, slower and without torch.compile, since it could not be exported:"
        f" {mismatch}"
    )
    return _hook_fallback(model, module, calls, reference), False, reference


def _only(core: Backbone, paths: Container[str]) -> Backbone:
    """The same backbone with some of its layers."""

    def apply(weights: Weights, images: Tensor) -> dict[str, Tensor]:
        return {path: value for path, value in core.apply(weights, images).items() if path in paths}

    return core._replace(apply=apply)


def _hook_fallback(model: Model, module: nn.Module, calls: Mapping[LayerRef, int], reference: Reference) -> Backbone:
    """Return the hook fallback, checked by the same means as a graph.

    Raises:
        ValueError: the module cannot be differentiated.
    """
    errors = []
    for accumulate in (False, True):
        core = hook_backbone(module, calls, accumulate=accumulate)
        try:
            mismatch = find_mismatch(core, reference)
        except Exception as error:  # whatever a module's backward pass raises
            errors.append(error)
            continue
        if mismatch and not reference.random:
            warn_caller(f"{model.name} does not repeat itself: {mismatch} in a second run")
        return core
    raise ValueError(f"{model.name} cannot be differentiated: {first_line(errors[0])}") from errors[0]


def device_of(features: Features, default: torch.device | str | None = None) -> torch.device:
    """Return the device of some features' weights; without weights the default, or the CPU."""
    return next((w.device for w in features.weights.values()), torch.device(default or "cpu"))
