"""What a sweep renders: the layers, their filters, and the units of work that they are cut into."""

import fnmatch
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import nn

from featvis_func.backbone.features import Layer, list_layers
from featvis_func.backbone.layers import check_axes, feature_axis_of, parse_layer
from featvis_func.engine.device import CPU_BATCH_SIZE
from featvis_func.models import Model
from featvis_func.rendering.renderer import Renderer
from featvis_func.validation import check_filters, check_int

# Filters at a time on an accelerator; where the memory does not suffice, it is halved.
_CUDA_BATCH_SIZE = 64
_LONGEST_NAME = 100
# Bytes that are stored beside images, activation maps and history: what a shard and its sidecar tell of a filter, and
# what each pair of these takes whatever it tells.
_BYTES_PER_FILTER, _BYTES_PER_UNIT = 170, 1300


class Unit(NamedTuple):
    """The least that is rendered, and committed, at once: some filters of one layer."""

    layer: str
    filters: tuple[int, ...]

    @property
    def name(self) -> str:
        """The path of its files, without their suffix.

        >>> Unit("block1/a", (8, 9, 10)).name
        'block1%2Fa/00008-00010'
        """
        return f"{folder_of(self.layer)}/{self.filters[0]:05d}-{self.filters[-1]:05d}"


class LayerPlan(NamedTuple):
    """What is rendered of one layer."""

    layer: str
    shape: tuple[int, ...]
    """Of its output for one image."""
    filters: tuple[int, ...]
    """In rising order."""
    batch_size: int
    unit_size: int

    @property
    def units(self) -> tuple[Unit, ...]:
        """In order.

        >>> [unit.filters for unit in LayerPlan("head", (32,), (0, 1, 2, 7), 2, 3).units]
        [(0, 1, 2), (7,)]
        """
        cuts = range(0, len(self.filters), self.unit_size)
        return tuple(Unit(self.layer, self.filters[i : i + self.unit_size]) for i in cuts)


def folder_of(layer: str) -> str:
    """A folder's name for a layer, on any file system; different layers have different ones, but for their case."""
    name = quote(layer, safe=" ,=@+")
    if not name.strip("."):  # which would be this folder, or the one above
        name = name.replace(".", "%2E")
    if len(name) <= _LONGEST_NAME:
        return name
    import hashlib

    return f"{name[:_LONGEST_NAME]}~{hashlib.sha256(layer.encode()).hexdigest()[:8]}"


def plan_layers(
    model: Model,
    layers: str | Iterable[str] = "all",
    filters: Iterable[int] | int | None = None,
    *,
    batch_size: int | str = "auto",
    unit_size: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[LayerPlan, ...]:
    """The layers of a sweep, in the model's order.

    Args:
        model: whose layers.
        layers: ``"all"``: every convolution and linear layer that a forward pass calls; or names, unique ends of names,
            and patterns with ``*``, ``?`` and ``[...]`` among all of the model's modules.
        filters: of each layer; those that a layer lacks are left out of it. ``None``: all.
        batch_size: filters at a time, or ``"auto"``: 8 on a CPU, 64 elsewhere; no more than the layer has.
        unit_size: filters in a unit, default: the batch size; where it is less than that, the batches are as small.
        device: where the sweep will run.

    Raises:
        ValueError: a name or pattern that fits no layer, filters that no layer has, numbers below 1.

    >>> from featvis_func.models import load_model
    >>> [(p.layer, len(p.filters), len(p.units)) for p in plan_layers(load_model("texturenet"), "block[12].conv")]
    [('block1.conv', 24, 3), ('block2.conv', 48, 6)]
    """
    size = None if batch_size == "auto" else check_int("batch_size", batch_size, 1)
    unit = None if unit_size is None else check_int("unit_size", unit_size, 1)
    wanted = None if filters is None else sorted(check_filters(filters))
    plans = []
    chosen = select_layers(model, layers)
    for layer in chosen:
        count = layer.filters or 0
        own = range(count) if wanted is None else [f for f in wanted if 0 <= f < count]
        if not own:
            continue
        batch = size or (CPU_BATCH_SIZE if torch.device(device).type == "cpu" else _CUDA_BATCH_SIZE)
        batch = min(batch, unit or batch, len(own))
        plans.append(LayerPlan(layer.name, layer.shape or (), tuple(own), batch, unit or batch))
    most = max(layer.filters or 0 for layer in chosen)
    outside = [f for f in wanted or () if not 0 <= f < most]
    if outside:
        raise ValueError(f"no layer of the sweep has a filter {outside[0]}; they have up to {most}, numbered from 0")
    return tuple(plans)


def select_layers(model: Model, layers: str | Iterable[str]) -> list[Layer]:
    """The layers that a sweep's ``layers=`` means: see :func:`plan_layers`."""
    found = list_layers(model)
    usable = [layer for layer in found if layer.filters]
    if layers == "all":
        kinds = (nn.modules.conv._ConvNd, nn.Linear)
        modules = dict(model.module.named_modules())
        chosen = [layer for layer in usable if isinstance(modules.get(layer.name), kinds)]
        if not chosen:
            raise ValueError(f"{model.name} has no convolution and no linear layer; name its layers")
        return chosen
    names: set[str] = set()
    stated: dict[str, str] = {}
    known = {layer.name for layer in usable}
    for pattern in [layers] if isinstance(layers, str) or not isinstance(layers, Iterable) else layers:
        if not isinstance(pattern, str):
            raise ValueError(f"layers must be 'all', names or patterns, got {pattern!r}")
        fitting = [layer.name for layer in usable if fnmatch.fnmatchcase(layer.name, pattern)]
        marked = pattern not in known and any(mark in pattern for mark in "*?[")
        if marked and (fitting or not _is_output(model, pattern)):
            if not fitting:
                raise ValueError(f"no layer of {model.name} fits the pattern {pattern!r}; 'featvis layers' lists them")
            names.update(fitting)
        else:
            site = parse_layer(model.module, pattern)
            name = site.path
            if site.axes is not None:
                stated[name] = site.axes
            elif name not in known:
                raise ValueError(f"layer {name!r} has no filters: a forward pass does not call it, or not as a layer")
            names.add(name)
    if not names:
        raise ValueError("no layers were asked for: the list is empty")
    named = [layer for layer in found if layer.name in names]
    return [_with_axes(layer, stated[layer.name]) if layer.name in stated else layer for layer in named]


def _is_output(model: Model, name: str) -> bool:
    """Whether a name with brackets means one of a module's several outputs."""
    try:
        return bool(parse_layer(model.module, name).parts)
    except ValueError:
        return False


def _with_axes(layer: Layer, axes: str) -> Layer:
    """A layer whose axes the user states, under the name that says so."""
    shape = layer.shape or ()
    check_axes(layer.name, axes, shape)
    return layer._replace(name=f"{layer.name}@{axes}", filters=shape[feature_axis_of(axes)])


class Estimate(NamedTuple):
    """What a sweep will take, on the device and in the state of the machine in which it was measured."""

    seconds: float
    """For all filters, on one worker; without loading, tracing and compiling."""
    bytes: int


def estimate(
    plans: Sequence[LayerPlan], make: Callable[[LayerPlan], Renderer], *, itemsize: int, probes: int = 3
) -> Estimate:
    """Times a step of a few layers, and draws a line between these.

    Args:
        plans: at least one.
        make: a layer -> what renders it.
        itemsize: bytes of one stored value of an image.
        probes: layers to time, at least 1.
    """
    count = min(probes, len(plans))
    probed = sorted({round(i * (len(plans) - 1) / max(1, count - 1)) for i in range(count)})
    costs: dict[int, float] = {}
    total = 0
    config: dict[str, Any] = {}
    pixels = 0  # values of an image
    for index in probed:
        plan = plans[index]
        renderer = make(plan)
        config = renderer.config
        chosen = (list(plan.filters) * renderer.batch_size)[: renderer.batch_size]
        state, target = renderer.init(chosen, config["seed"])
        times = []
        for _ in range(3):
            start = time.perf_counter()
            state, info = renderer.step(renderer.weights, state, target)
            float(info.score.sum())  # which waits for the device
            times.append(time.perf_counter() - start)
        costs[index] = min(times[1:])
        pixels = state.best.image[0].numel()
    seconds = 0.0
    for index, plan in enumerate(plans):
        low = max(i for i in probed if i <= index)
        high = min(i for i in probed if i >= index)
        share = 0.0 if low == high else (index - low) / (high - low)
        batches = sum(-(-len(unit.filters) // plan.batch_size) for unit in plan.units)
        seconds += batches * config["steps"] * (costs[low] * (1 - share) + costs[high] * share)
        places = torch.Size(plan.shape[1:]).numel() if len(plan.shape) == 3 else max(plan.shape[:-1], default=1)
        images = pixels * (itemsize + config.get("snapshots", 0))
        each = images + places * 4 + config["steps"] * 4 + _BYTES_PER_FILTER
        total += len(plan.filters) * each + len(plan.units) * _BYTES_PER_UNIT
    return Estimate(seconds, total)
