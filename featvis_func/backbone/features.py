"""The model as a function: ``(weights, images) -> activations``, computed no further than the layers asked for.

The module is traced by ``torch.export`` up to the last of the layers, which gives a pure graph without hooks; it runs
eagerly, under ``torch.func`` and inside ``torch.compile(fullgraph=True)``. The user's module is never changed: the work
is done on a copy of its structure that shares its tensors.
"""

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featvis_func.backbone.export import release, trace, truncate
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
from featvis_func.cpu.winograd import add_packed_weights
from featvis_func.models import Model
from featvis_func.random import key
from featvis_func.transform import chain, normalize, warp
from featvis_func.types import Weights
from featvis_func.validation import first_line

# torch.export keeps its state in the process: two threads that trace at once disturb each other.
_tracing = threading.RLock()


class Features(NamedTuple):
    """A truncated, frozen backbone. Make one with :func:`make_features`."""

    apply: Callable[[Weights, Tensor], dict[str, Tensor]]
    """(weights, images ``(n, c, h, w)`` as the module wants them) -> layer name as asked for -> ``(n, ...)``."""
    weights: Weights
    """The tensors that the layers depend on, detached: the module's own, unless folded, rearranged or cast."""
    shapes: dict[str, tuple[int, ...]]
    """Layer name as asked for -> shape of its output for one image: ``(c, h, w)``, ``(t, d)`` or ``(d,)``."""
    paths: dict[str, str]
    """Layer name as asked for -> its full name."""
    exported: bool
    """False: runs through a hook, because ``torch.export`` could not trace the module; such features do not compile."""
    redirected: Callable[[Weights, Tensor, Tensor], dict[str, Tensor]] | None = None
    """(weights, images, float ``(n,)``) -> what ``apply`` gives; for images with 1 gradients are redirected past
    activations that let none through: see :mod:`featvis_func.backbone.redirected_relu`. None where the module is not exported."""
    packed: tuple[str, ...] = ()
    """Names of further weights, which can be left out: see :func:`compiled_weights`."""


class Layer(NamedTuple):
    """One line of :func:`list_layers`."""

    name: str
    type: str
    shape: tuple[int, ...] | None
    """Of the output for one image; ``None`` where the module is not called or returns no tensor."""
    filters: int | None
    """``None`` where there are no channels, or where it cannot be told which axis is theirs."""


def make_features(
    model: Model,
    layers: Sequence[str],
    *,
    device: torch.device | str | None = None,
    precision: str = "auto",
    verify: bool = True,
) -> Features:
    """Truncates a model behind the last of some layers.

    A layer means its module's own output, in evaluation mode, at its last call; an in-place operation that follows does
    not count. Hooks that the user attached are neither run nor removed.

    Args:
        model: see :func:`~featvis_func.load_model`.
        layers: names from ``named_modules()``; a unique ending is enough. Behind it ``[0]`` or ``[key]`` chooses from
            an output of several tensors, and ``@`` with one of :data:`~featvis_func.backbone.layers.AXES` states its axes.
        device: where to compute. Default: where the module is.
        precision: of the weights and the activations, one of :data:`~featvis_func.backbone.verify.PRECISIONS`.
        verify: compare the truncated graph with the module once.

    Returns:
        A :class:`Features`. Where the module cannot be exported it goes through a hook and says so by a warning.

    Raises:
        ValueError: an unknown precision, or one in which the model does not run or gives other values; an unknown or
            ambiguous layer, one that the forward pass does not call, or one whose output has no
            channels; or a forward pass that fails on an image of the model's size.

    >>> from featvis_func.models import load_model
    >>> make_features(load_model("texturenet"), ["head"]).shapes["head"][0] >= 24
    True
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    # What a forward pass draws, or records for gradients, stays in here.
    with _tracing, torch.inference_mode(False), torch.random.fork_rng():
        return _make_features(model, layers, device, precision, verify)


def _make_features(
    model: Model, layers: Sequence[str], device: torch.device | str | None, precision: str, verify: bool
) -> Features:
    refs = {name: parse_layer(model.module, name) for name in layers}
    if not refs:
        raise ValueError("no layers were asked for")
    paths = {name: ref.path for name, ref in refs.items()}
    module = private_copy(model.module, device)
    images = example_images(model, module)
    different = list(dict.fromkeys(ref._replace(axes=None) for ref in refs.values()))
    calls, channels_last = count_calls(model, module, different, images)
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
            found = run(weights, images.to(dtype), *redirect)
            return {name: canonical(found[path], axes[name]) for name, path in paths.items()}

        return apply

    redirected = None if core.redirected is None else named(core.redirected)
    return Features(named(core.apply), weights, shapes, paths, exported, redirected, core.packed)


def compiled_weights(features: Features) -> Weights:
    """The weights with which features run soonest where they are compiled: on the CPU with further packed of kernels.

    Compiled features take these or ``features.weights``, to the same values up to rounding. The further packed, such as
    ``"conv.weight.transformed"``, are made of the kernels here, and belong to them: 8 times the memory of the 3 x 3 kernels of
    float32 that are worth it, see :mod:`featvis_func.cpu.winograd`. In eager mode they do nothing. Each renderer that
    compiles makes its own, unless the features that it is given hold them already: ``features._replace(weights=
    compiled_weights(features))``.

    >>> from featvis_func.models import load_model
    >>> features = make_features(load_model("texturenet"), ["block3.conv"])
    >>> sorted(compiled_weights(features).keys() - features.weights.keys())
    ['block3.conv.weight.flipped', 'block3.conv.weight.transformed']
    """
    return add_packed_weights(features.weights, features.packed)


def _axes(model: Model, module: nn.Module, ref: LayerRef, shape: tuple[int, ...], channels_last: bool) -> str:
    """What the axes of a layer mean: as stated, or as can be told."""
    if ref.axes is not None:
        check_axes(ref.path, ref.axes, shape)
        return ref.axes
    # Of an output of several tensors, the kind of module tells nothing.
    child = nn.Identity() if ref.parts else module.get_submodule(ref.module)
    found = axes_of(child, shape, model.size, channels_last=channels_last)
    if found is None:
        raise ValueError(
            f"layer {ref.path!r} gives {shape} per image, of which the first or the last could be the channels; say"
            f" which: '{ref.path}@chw' or '{ref.path}@hwc'"
        )
    return found


def _backbone(
    model: Model, module: nn.Module, calls: Mapping[LayerRef, int], reference: Reference, verify: bool
) -> tuple[Backbone, bool]:
    """The module as a graph, and True; where there is none that gives the same, through a hook, and False."""
    try:
        traced = trace(module, calls, reference.images)
        try:
            core = truncate(traced, traced.layers)
            wrong = find_mismatch(core, reference) if verify else ""
            if wrong:
                # In very deep networks the rounding of rewrites can tip rectifiers; the graph goes as it was traced.
                core = truncate(traced, traced.layers, optimize=False)
                wrong = find_mismatch(core, reference)
        finally:
            release(traced)
        if not wrong:
            return core, True
    except Exception as error:
        # torch.export fails in as many ways as there are models; any of them means the other road.
        wrong = f"{type(error).__name__}: {first_line(error)}"
    warnings.warn(
        f"{model.name} runs through a hook, slower and without torch.compile, since it could not be exported: {wrong}",
        stacklevel=5,
    )
    return hook_backbone(module, calls), False


def activations_of(
    model: Model,
    layers: Sequence[str],
    image: Tensor,
    *,
    device: torch.device | str | None = None,
    features: Features | None = None,
) -> dict[str, Tensor]:
    """What some layers make of an image: the reference of :func:`~featvis_func.objective.inversion` and the like.

    Args:
        model: from :func:`~featvis_func.load_model`.
        layers: names of layers, or unique ends of names.
        image: float ``(c, h, w)`` in ``[0, 1]``; brought to the model's input size.
        device: where to compute. Default: where the model is.
        features: the model's, from :func:`make_features`, if they are there; their layers include these.

    Returns:
        layer, by the name given -> its activations, without a gradient.

    Raises:
        ValueError: an unknown layer, or an image of another form.

    >>> from featvis_func.models import load_model
    >>> activations_of(load_model("texturenet"), ["head"], torch.rand(3, 50, 70))["head"].shape
    torch.Size([32])
    """
    if image.ndim != 3 or image.shape[0] != model.channels or not image.is_floating_point():
        raise ValueError(
            f"expected an image ({model.channels}, h, w) of floats in [0, 1], got {tuple(image.shape)} {image.dtype}"
        )
    if features is None:
        features = make_features(model, layers, device=device, precision="float32")
    where = device_of(features, image.device)
    view = chain(warp(size=model.size), normalize(model.mean, model.std, device=where))
    image = image.detach().to(where, torch.float32)
    with torch.no_grad():
        seen = view.apply(image, view.draw(key(0, device=where)))
        found = features.apply(features.weights, seen[None])
        return {name: found[name][0].float() for name in layers}


def device_of(features: Features, default: torch.device | str | None = None) -> torch.device:
    """Where features compute: where their weights are; those without any, where they are told, or on the CPU."""
    return next((w.device for w in features.weights.values()), torch.device(default or "cpu"))


def list_layers(model: Model) -> list[Layer]:
    """Every named module with its type, the shape of its output for one image, and its number of filters.

    Of an output of several tensors, each has a line: ``"attention[0]"``.

    >>> from featvis_func.models import load_model
    >>> list_layers(load_model("texturenet"))[-1].name
    'head'
    """
    module = private_copy(model.module, None)
    names = {m: n for n, m in module.named_modules(remove_duplicate=True) if n}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in names.values()}

    def note(child: nn.Module, args: Any, output: Any) -> None:
        shapes[names[child]] = {part: tuple(v.shape[1:]) for part, v in tensors_in(output).items() if v.ndim > 0}

    for child in names:
        child.register_forward_hook(note)
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
