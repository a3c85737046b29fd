"""List what can be visualised in a model: its modules, and every other tensor that a name selects."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featvis_func.backbone.export import trace, why_not_exported
from featvis_func.backbone.forward_pass import forward_once
from featvis_func.backbone.hooks import channels_last_seen, example_images, float_outputs, inputs_of
from featvis_func.backbone.layers import (
    OUTPUT,
    LayerRef,
    axes_of,
    check_axes,
    feature_axis_of,
    parse_layer,
    tensors_in,
)
from featvis_func.backbone.truncate import release, truncate
from featvis_func.models import Model
from featvis_func.models.copying import layer_modules, private_copy
from featvis_func.models.inputs import original
from featvis_func.validation import warn_caller


class Layer(NamedTuple):
    """One line of :func:`list_layers`."""

    name: str
    type: str
    """The module's class; ``"input"``, ``"operation"`` or ``"output"`` for other tensors."""
    shape: tuple[int, ...] | None
    """Shape for one image; ``None`` where the module is not called or returns no tensor."""
    filters: int | None
    """Number of channels; ``None`` where there are none, or where the channel axis is ambiguous."""


def list_layers(model: Model, *, all: bool = False) -> list[Layer]:
    """List every named module with its type, the shape of its output for one image, and its number of filters.

    Each of a module's several outputs has a line of its own: ``"attention[0]"``.

    Args:
        model: from :func:`~featvis_func.load_model`.
        all: whether to add every other tensor that has a name, see :mod:`featvis_func.backbone.layers`: each call of a
            module that is called more than once, the inputs of modules, the operations in their forward passes (of a
            model that can be exported, which takes some seconds), and the model's own output.

    Raises:
        ValueError: a forward pass fails on an image of the model's size.

    >>> from featvis_func.models import load_model
    >>> list_layers(load_model("texturenet"))[-1].name
    'head'
    >>> list_layers(load_model("texturenet"), all=True)[-1]
    Layer(name='output', type='output', shape=(32,), filters=32)
    """
    module = private_copy(model.module, share_parameters=True)
    modules = layer_modules(module)
    images = example_images(model, module)[:1]
    outputs, inputs = _call_all(model, module, modules, images)
    with channels_last_seen(module, len(model.size)) as last:
        forward_once(model, module, images)

    def line(ref: LayerRef, kind: str, value: Tensor | None) -> Layer:
        if value is None:
            return Layer(ref.path, kind, None, None)
        shape, plain = tuple(value.shape[1:]), not (ref.parts or ref.input or ref.operation)
        if not 1 <= len(shape) <= 4:
            return Layer(ref.path, kind, shape, None)
        child = modules[ref.module] if plain else nn.Identity()
        axes = axes_of(child, shape, model.size, channels_last=bool(last))
        return Layer(ref.path, kind, shape, None if axes is None else shape[feature_axis_of(axes)])

    def lines_of(ref: LayerRef, kind: str, value: Any) -> Iterator[Layer]:
        for part, tensor in tensors_in(value).items():
            if tensor.ndim > 0:
                yield line(ref._replace(parts=part), kind, tensor)

    listed: list[Layer] = []
    listed_modules: set[nn.Module] = set()
    for name, child in modules.items():
        if not name or child in listed_modules:
            continue
        listed_modules.add(child)
        kind, calls = type(child).__name__, outputs.get(child, [])
        last_call = list(lines_of(LayerRef(name), kind, calls[-1])) if calls else []
        listed += last_call or [line(LayerRef(name), kind, None)]
        if all:
            for number, value in enumerate(calls if len(calls) > 1 else [], 1):
                listed += lines_of(LayerRef(name, call=number), kind, value)
            for number, value in enumerate(inputs[child] if calls else [], 1):
                call = None if number == len(calls) else number
                listed += lines_of(LayerRef(name, call=call, input=True), "input", value)
    if all:
        listed += [line(ref, "operation", value) for ref, value in _operations(model, module)]
        listed += lines_of(LayerRef(""), "output", outputs[original(module)][-1])
    return listed


def find_layer(model: Model, name: str, listed: Sequence[Layer]) -> Layer:
    """Find one layer with filters by its name, or the unique end of one.

    Args:
        model: from :func:`~featvis_func.load_model`.
        name: also with axes, ``"conv@chw"``, which the layer's name then keeps.
        listed: what :func:`list_layers` returns, with ``all`` where :func:`names_more_than_modules`.

    Raises:
        ValueError: the model has no such layer, or a forward pass does not call it as one.
    """
    ref = parse_layer(model.module, name)
    by_name = {layer.name: layer for layer in listed}
    if ref.axes is not None and ref.path in by_name:
        layer = by_name[ref.path]
        shape = layer.shape or ()
        check_axes(layer.name, ref.axes, shape)
        return layer._replace(name=f"{layer.name}@{ref.axes}", filters=shape[feature_axis_of(ref.axes)])
    found = by_name.get(ref.path)
    if found is None:  # without the number of a call: the last
        found = next((layer for layer in reversed(listed) if layer.name.startswith(f"{ref.path}#")), None)
    if found is None or not found.filters:
        raise ValueError(f"layer {ref.path!r} has no filters: a forward pass does not call it, or not as a layer")
    return found


def names_more_than_modules(model: Model, name: str) -> bool:
    """Whether a name or pattern may select something else than a module's output."""
    if name and any(other.endswith(name) for other in layer_modules(model.module)):
        return False
    return name.partition("[")[0] in ("", OUTPUT) or any(mark in name for mark in "<#/")


def layer_shapes(model: Model, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Find the shapes of layers' activations for one image, as an objective sees them: channels first, tokens
    ``(t, d)``.

    Raises:
        ValueError: as for :func:`find_layer`.

    >>> from featvis_func.models import load_model
    >>> layer_shapes(load_model("texturenet"), ["head", "output"])
    {'head': (32,), 'output': (32,)}
    """
    names = list(names)
    if not names:  # the listing takes a forward pass
        return {}
    listed = list_layers(model, all=any(names_more_than_modules(model, name) for name in names))
    shapes = {}
    for name in names:
        layer = find_layer(model, name, listed)
        filters, sides = layer.filters or 0, list(layer.shape or ())
        sides.remove(filters)
        shapes[name] = (*sides, filters) if len(sides) == 1 else (filters, *sides)
    return shapes


def _call_all(
    model: Model, module: nn.Module, modules: dict[str, nn.Module], images: Tensor
) -> tuple[dict[nn.Module, list[Any]], dict[nn.Module, list[Any]]]:
    """Run a forward pass, and return the outputs and the inputs of each module, call by call."""
    outputs: dict[nn.Module, list[Any]] = {}
    inputs: dict[nn.Module, list[Any]] = {}

    def record(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs.setdefault(child, []).append(output)
        inputs.setdefault(child, []).append(inputs_of(args, kwargs))

    def reset() -> None:
        outputs.clear()
        inputs.clear()

    handles = [child.register_forward_hook(record, with_kwargs=True) for child in set(modules.values())]
    try:
        forward_once(model, module, images, reset=reset)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, inputs


def _operations(model: Model, module: nn.Module) -> list[tuple[LayerRef, Tensor]]:
    """The operations inside of modules, with their values; none, and a warning, where the model cannot be exported."""
    images = example_images(model, module)
    try:
        traced = trace(module, dict.fromkeys(float_outputs(model, module, images), 1), images, None)
    except Exception as error:  # as many kinds as there are models
        warn_caller(
            f"the operations inside of the modules of {model.name} are not listed, since it could not be exported:"
            f" {why_not_exported(error)}"
        )
        return []
    try:
        core = truncate(traced, traced.layers, optimize=False)
        with torch.no_grad():
            values = core.apply(core.weights, images)
    finally:
        release(traced)
    return [(ref, values[ref.path]) for ref in traced.operations]
