"""The model as a function: ``(weights, images) -> activations``, computed no further than the requested layers.

The module is traced by ``torch.export`` up to the last of these layers, which gives a pure graph without hooks; it runs
eagerly, under ``torch.func`` and inside ``torch.compile(fullgraph=True)``. The user's module is never changed: what is
traced is a copy of its structure that shares its tensors.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featvis_func.backbone.hardware import specialization
from featvis_func.backbone.layers import LayerRef, axes_of, canonical, check_axes
from featvis_func.backbone.layers import resolve_layer as resolve_layer
from featvis_func.backbone.source import Source, cut, make_source
from featvis_func.backbone.verify import PRECISIONS, check_outputs, exact_float32, in_precision
from featvis_func.models import Model
from featvis_func.models.copying import layer_modules
from featvis_func.types import Weights

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
    smoothed: Callable[[Weights, Tensor, Tensor], dict[str, Tensor]] | None = None
    """As ``redirected``, and the gradients of strided max pools are smoothed, see
    :mod:`featvis_func.backbone.smoothed_pools`. ``None`` if not exported, or without such pools."""


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
    _check_precision(precision)
    with _exclusive():
        source = make_source(model, layers, device)
        try:
            return _features(source, layers, precision, verify)
        finally:
            source.close()


class TracedModel:
    """A model that is traced once, for any of some layers. Make one with :func:`trace_model`.

    Args:
        source: made with ``partial``.
        precision: see :func:`make_features`.
    """

    def __init__(self, source: Source, precision: str) -> None:
        self._source = source
        self._precision = precision
        weakref.finalize(self, source.close)

    def features(self, layers: Sequence[str]) -> Features:
        """The model truncated behind the last of some of its layers, as from :func:`make_features`.

        Raises:
            ValueError: as :func:`make_features` does.
        """
        with _exclusive():
            return _features(self._source, layers, self._precision, verify=True)


def trace_model(
    model: Model, layers: Sequence[str], *, device: torch.device | str | None = None, precision: str = "auto"
) -> TracedModel:
    """Trace a model once, up to the last of some layers, to cut the features of any of them from the trace.

    A cut takes a tenth of the time of a trace, or less: it runs the truncated graph on two images.

    Args: as for :func:`make_features`, which says what it raises.

    >>> from featvis_func.models import load_model
    >>> traced = trace_model(load_model("texturenet"), ["block1.conv", "head"])
    >>> traced.features(["head"]).shapes.keys()
    dict_keys(['head'])
    """
    _check_precision(precision)
    with _exclusive():
        return TracedModel(make_source(model, layers, device, partial=True), precision)


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


@contextmanager
def _exclusive() -> Iterator[None]:
    with _trace_lock, torch.inference_mode(False), exact_float32():
        yield


def _features(source: Source, layers: Sequence[str], precision: str, verify: bool) -> Features:
    model, module = source.model, source.module
    refs = {name: source.refs[name] for name in layers}
    paths = {name: ref.path for name, ref in refs.items()}
    core, exported, reference = cut(source, layers, verify=verify)
    check_outputs(model, paths, reference)
    axes, shapes = {}, {}
    for name, ref in refs.items():
        value = reference.values[ref.path]
        axes[name] = _axes(model, module, ref, tuple(value.shape[1:]), source.channels_last)
        shapes[name] = tuple(canonical(value, axes[name]).shape[1:])
    dtype, weights = in_precision(model, core, precision, reference)

    def named(run: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        def apply(weights: Weights, images: Tensor, *redirect: Tensor) -> dict[str, Tensor]:
            outputs = run(weights, images.to(dtype), *redirect)
            return {name: canonical(outputs[path], axes[name]) for name, path in paths.items()}

        return apply

    redirected, smoothed = (run and named(run) for run in (core.redirected, core.smoothed))
    apply = named(core.apply)
    return Features(apply, weights, shapes, paths, exported, redirected, core.packed, model.size, smoothed)


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


def device_of(features: Features, default: torch.device | str | None = None) -> torch.device:
    """Return the device of some features' weights; without weights the default, or the CPU."""
    return next((w.device for w in features.weights.values()), torch.device(default or "cpu"))
