"""The model as a function: ``(weights, images) -> activations``, computed no further than the requested layers.

The module is traced by ``torch.export`` up to the last of these layers, which gives a pure graph without hooks; it runs
eagerly, under ``torch.func`` and inside ``torch.compile(fullgraph=True)``. The user's module is never changed: what is
traced is a copy of its structure that shares its tensors.
"""

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featvis_func.backbone.export import release, trace, truncate
from featvis_func.backbone.hardware import specialization
from featvis_func.backbone.hooks import (
    Backbone,
    channels_last_seen,
    count_calls,
    example_images,
    forward_once,
    hook_backbone,
    private_copy,
)
from featvis_func.backbone.layers import (
    LayerRef,
    axes_of,
    canonical,
    check_axes,
    feature_axis_of,
    parse_layer,
    tensors_in,
)
from featvis_func.backbone.layers import resolve_layer as resolve_layer
from featvis_func.backbone.verify import PRECISIONS, Reference, check_outputs, find_mismatch, in_precision, reference_of
from featvis_func.models import Model
from featvis_func.types import Weights
from featvis_func.validation import first_line

# torch.export keeps some state in the process: two threads must not trace at the same time.
_trace_lock = threading.RLock()


class Features(NamedTuple):
    """A truncated, frozen backbone. Make one with :func:`make_features`."""

    apply: Callable[[Weights, Tensor], dict[str, Tensor]]
    """(weights, images ``(n, c, h, w)``, normalised for the module) -> requested layer name -> ``(n, ...)``."""
    weights: Weights
    """The tensors that the layers depend on, detached: the module's own, unless folded, converted or cast."""
    shapes: dict[str, tuple[int, ...]]
    """Requested layer name -> shape of its output for one image: ``(c, h, w)``, ``(t, d)`` or ``(d,)``."""
    paths: dict[str, str]
    """Requested layer name -> full name."""
    exported: bool
    """False where ``torch.export`` could not trace the module: it runs with a forward hook and does not compile."""
    redirected: Callable[[Weights, Tensor, Tensor], dict[str, Tensor]] | None = None
    """(weights, images, float ``(n,)``) -> the values of ``apply``. For images with 1, gradients are redirected past
    activations that block them, see :mod:`featvis_func.backbone.redirected_relu`. ``None`` if not exported."""
    packed: tuple[str, ...] = ()
    """Names of packed weights, which may be left out: see :func:`compiled_weights`."""


class Layer(NamedTuple):
    """One line of :func:`list_layers`."""

    name: str
    type: str
    shape: tuple[int, ...] | None
    """Shape of the output for one image; ``None`` where the module is not called or returns no tensor."""
    filters: int | None
    """Number of channels; ``None`` where there are none, or where the channel axis is ambiguous."""


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
    follows. Hooks that the user attached are neither run nor removed.

    Args:
        model: see :func:`~featvis_func.load_model`.
        layers: names from ``named_modules()``; a unique ending is enough. A suffix ``[0]`` or ``[key]`` selects from an
            output of several tensors, and ``@`` with one of :data:`~featvis_func.backbone.layers.AXES` states its axes.
        device: where to compute. Default: where the module is.
        precision: of weights and activations, one of :data:`~featvis_func.backbone.verify.PRECISIONS`.
        verify: whether to compare the truncated graph with the module once.

    Returns:
        A :class:`Features`. Where the module cannot be exported, it runs with a forward hook, and a warning says why.

    Raises:
        ValueError: an unknown precision, or one in which the model does not run or gives other values; an unknown or
            ambiguous layer, one that the forward pass does not call, or one whose output has no channels; or a forward
            pass that fails on an image of the model's size.

    >>> from featvis_func.models import load_model
    >>> make_features(load_model("texturenet"), ["head"]).shapes["head"][0] >= 24
    True
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    with _trace_lock, torch.inference_mode(False):
        return _make_features(model, layers, device, precision, verify)


def _make_features(
    model: Model, layers: Sequence[str], device: torch.device | str | None, precision: str, verify: bool
) -> Features:
    refs = {name: parse_layer(model.module, name) for name in layers}
    if not refs:
        raise ValueError("no layers were requested: the list is empty")
    paths = {name: ref.path for name, ref in refs.items()}
    module = private_copy(model.module, device)
    images = example_images(model, module)
    distinct = list(dict.fromkeys(ref._replace(axes=None) for ref in refs.values()))
    calls, channels_last = count_calls(model, module, distinct, images)
    reference = reference_of(module, calls, images)
    check_outputs(model, paths, reference)
    axes, shapes = {}, {}
    for name, ref in refs.items():
        value = reference.values[ref.path]
        axes[name] = _axes(model, module, ref, tuple(value.shape[1:]), channels_last)
        shapes[name] = tuple(canonical(value, axes[name]).shape[1:])
    core, exported = _backbone(model, module, calls, reference, verify)
    dtype, weights = in_precision(model, core, precision, reference)

    def named(run: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        def apply(weights: Weights, images: Tensor, *redirect: Tensor) -> dict[str, Tensor]:
            outputs = run(weights, images.to(dtype), *redirect)
            return {name: canonical(outputs[path], axes[name]) for name, path in paths.items()}

        return apply

    redirected = None if core.redirected is None else named(core.redirected)
    return Features(named(core.apply), weights, shapes, paths, exported, redirected, core.packed)


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
    child = nn.Identity() if ref.parts else module.get_submodule(ref.module)
    axes = axes_of(child, shape, model.size, channels_last=channels_last)
    if axes is None:
        raise ValueError(
            f"layer {ref.path!r} gives {shape} per image, whose first or last axis could be the channels; state"
            f" which: '{ref.path}@chw' or '{ref.path}@hwc'"
        )
    return axes


def _backbone(
    model: Model, module: nn.Module, calls: Mapping[LayerRef, int], reference: Reference, verify: bool
) -> tuple[Backbone, bool]:
    """Return the module as a graph, and True; where no graph computes the same, the hook fallback, and False."""
    try:
        traced = trace(module, calls, reference.images)
        try:
            core = truncate(traced, traced.layers)
            mismatch = find_mismatch(core, reference) if verify else ""
            if mismatch:
                # In very deep networks the rounding of the graph passes can switch ReLUs: use the graph as traced.
                core = truncate(traced, traced.layers, optimize=False)
                mismatch = find_mismatch(core, reference)
        finally:
            release(traced)
        if not mismatch:
            return core, True
    except Exception as error:
        # torch.export fails in as many ways as there are models; every failure means the hook fallback.
        mismatch = f"{type(error).__name__}: {first_line(error)}"
    warnings.warn(
        f"{model.name} runs with a forward hook, slower and without torch.compile, since it could not be exported:"
        f" {mismatch}",
        stacklevel=5,
    )
    return hook_backbone(module, calls), False


def device_of(features: Features, default: torch.device | str | None = None) -> torch.device:
    """Return the device of some features' weights; without weights the default, or the CPU."""
    return next((w.device for w in features.weights.values()), torch.device(default or "cpu"))


def list_layers(model: Model) -> list[Layer]:
    """List every named module with its type, the shape of its output for one image, and its number of filters.

    Each of a module's several outputs has a line of its own: ``"attention[0]"``.

    >>> from featvis_func.models import load_model
    >>> list_layers(load_model("texturenet"))[-1].name
    'head'
    """
    module = private_copy(model.module, None)
    names = {m: n for n, m in module.named_modules(remove_duplicate=True) if n}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in names.values()}

    def record(child: nn.Module, args: Any, output: Any) -> None:
        shapes[names[child]] = {part: tuple(v.shape[1:]) for part, v in tensors_in(output).items() if v.ndim > 0}

    for child in names:
        child.register_forward_hook(record)
    with channels_last_seen(module) as last:
        forward_once(model, module, example_images(model, module)[:1])

    def width(child: nn.Module, part: str, shape: tuple[int, ...] | None) -> int | None:
        if shape is None or not 1 <= len(shape) <= 3:
            return None
        axes = axes_of(nn.Identity() if part else child, shape, model.size, channels_last=bool(last))
        return None if axes is None else shape[feature_axis_of(axes)]

    return [
        Layer(name + part, type(child).__name__, shape, width(child, part, shape))
        for child, name in names.items()
        for part, shape in (shapes[name] or {"": None}).items()
    ]
