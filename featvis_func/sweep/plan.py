"""The plan of a sweep: layers, filters, and the units of work into which these are divided."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote

import torch
from torch import nn

from featvis_func.backbone.layers import parse_layer
from featvis_func.backbone.listing import Layer, find_layer, list_layers, names_more_than_modules
from featvis_func.engine.device import default_batch_size, fit_batch_size
from featvis_func.engine.forward import check_shapes
from featvis_func.models import Model
from featvis_func.models.copying import layer_modules
from featvis_func.objective import Objective, feature_axis
from featvis_func.rendering.resolve import select_members
from featvis_func.validation import check_filters, check_int

_LONGEST_NAME = 100


class Unit(NamedTuple):
    """The unit of work: some filters of one layer, which are rendered and committed together."""

    layer: str
    filters: tuple[int, ...]

    @property
    def name(self) -> str:
        """The path of the unit's files, relative to the folder of all units and without a suffix.

        >>> Unit("block1/a", (8, 9, 10)).name
        'block1%2Fa/00008-00010'
        """
        return f"{folder_of(self.layer)}/{self.filters[0]:05d}-{self.filters[-1]:05d}"


class LayerPlan(NamedTuple):
    """The part of a sweep that concerns one layer."""

    layer: str
    """Full name, with the axes where the user states them."""
    shape: tuple[int, ...]
    """Shape of the layer's output for one image."""
    filters: tuple[int, ...]
    """Filter numbers, in increasing order."""
    batch_size: int
    """Filters at a time."""
    unit_size: int
    """Filters per unit."""

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units, in the order of their filters.

        >>> [unit.filters for unit in LayerPlan("head", (32,), (0, 1, 2, 7), 2, 3).units]
        [(0, 1, 2), (7,)]
        """
        starts = range(0, len(self.filters), self.unit_size)
        return tuple(Unit(self.layer, self.filters[i : i + self.unit_size]) for i in starts)


def folder_of(layer: str) -> str:
    """The name of a layer's folder, valid on any file system; names of two layers may differ in case only."""
    name = quote(layer, safe=" ,=@+")
    if not name.strip("."):  # "." and ".." mean other folders.
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
    """Plan the layers of a sweep, in the order in which the model calls them.

    Args:
        model: from :func:`~featvis_func.load_model`.
        layers: ``"all"`` for every convolution and linear layer that a forward pass calls; or names, unique ends of
            names, and patterns with ``*``, ``?`` and ``[...]``, which are matched with the names of all modules.
        filters: numbers of the filters to render in each layer; a layer with fewer filters is rendered as far as it has
            them. ``None``: all.
        batch_size: filters at a time, or ``"auto"``: 16 on a CPU, 8 for large inputs, 64 elsewhere. A layer with fewer
            filters has smaller batches, see :func:`~featvis_func.engine.device.fit_batch_size`.
        unit_size: filters per unit. Default: the batch size; a smaller unit also makes the batches smaller.
        device: where the sweep will run.

    Raises:
        ValueError: a name or pattern that fits no layer, filters that no layer has, or a number below 1.

    >>> from featvis_func.models import load_model
    >>> [(p.layer, len(p.filters), len(p.units)) for p in plan_layers(load_model("texturenet"), "block[12].conv")]
    [('block1.conv', 24, 2), ('block2.conv', 48, 3)]
    """
    where = torch.device(device)
    size = default_batch_size(where, model.size) if batch_size == "auto" else check_int("batch_size", batch_size, 1)
    unit = None if unit_size is None else check_int("unit_size", unit_size, 1)
    requested = None if filters is None else sorted(check_filters(filters))
    plans = []
    selected = select_layers(model, layers)
    for layer in selected:
        count = layer.filters or 0
        numbers = range(count) if requested is None else [f for f in requested if 0 <= f < count]
        if not numbers:
            continue
        batch = fit_batch_size(size, len(numbers[:unit]), where)
        plans.append(LayerPlan(layer.name, layer.shape or (), tuple(numbers), batch, unit or batch))
    most = max(layer.filters or 0 for layer in selected)
    outside = [f for f in requested or () if not 0 <= f < most]
    if outside:
        raise ValueError(f"no layer of the sweep has a filter {outside[0]}; they have up to {most}, numbered from 0")
    return tuple(plans)


def plan_family(
    label: str,
    objective: Objective,
    shapes: Mapping[str, tuple[int, ...]],
    size: Sequence[int],
    filters: Iterable[int] | int | None = None,
    *,
    batch_size: int | str = "auto",
    unit_size: int | None = None,
    device: torch.device | str = "cpu",
) -> LayerPlan:
    """Plan a family of objectives, which a sweep renders as it does the filters of a layer.

    Args:
        label: the family's name in the sweep.
        objective: of which the target picks a member, or a channel.
        shapes: layer -> shape of its activations for one image, see
            :func:`~featvis_func.backbone.listing.layer_shapes`.
        size: input size of the model.
        filters: numbers of members. ``None``: all.
        batch_size, unit_size, device: as for :func:`plan_layers`. Members that depend on each other share a batch and
            a unit.

    Raises:
        ValueError: members that the family does not have, sizes that divide groups of members, or an objective that
            does not fit its layers.

    >>> from featvis_func.objective import neurons
    >>> plan_family("few", neurons("conv", range(3), [(0, 0)]), {"conv": (8, 4, 4)}, (32, 32), batch_size=2).filters
    (0, 1, 2)
    """
    if objective.batch_score is not None and objective.group == 1:
        raise ValueError(f"a sweep cannot divide the images of {objective}, since all of them depend on each other")
    check_shapes(objective, shapes)
    requested = None if filters is None else sorted(check_filters(filters))
    widths = {name: shapes[name][feature_axis(shapes[name])] for name in objective.targeted}
    numbers = select_members(objective, widths, requested)
    group = objective.group
    where = torch.device(device)
    batch = default_batch_size(where, size) if batch_size == "auto" else check_int("batch_size", batch_size, 1)
    unit = None if unit_size is None else check_int("unit_size", unit_size, 1)
    if (unit or group) % group or (batch_size != "auto" and batch < group):
        raise ValueError(
            f"the images of {objective} come in groups of {group}: batch_size must be at least {group} and unit_size a"
            f" multiple of it, got {batch_size} and {unit_size}"
        )
    batch = max(group, batch // group * group)
    batch = fit_batch_size(batch, len(numbers[:unit]), where, group=group)
    return LayerPlan(label, shapes[objective.layers[0]], tuple(numbers), batch, unit or batch)


def select_layers(model: Model, layers: str | Iterable[str]) -> list[Layer]:
    """Find the layers that ``layers=`` of a sweep means, see :func:`plan_layers`.

    Raises:
        ValueError: a name or pattern that fits no layer.
    """
    listed = list_layers(model)
    usable = [layer for layer in listed if layer.filters]
    if layers == "all":
        kinds = (nn.modules.conv._ConvNd, nn.Linear)
        modules = layer_modules(model.module)
        selected = [layer for layer in usable if isinstance(modules.get(layer.name), kinds)]
        if not selected:
            raise ValueError(f"{model.name} has no convolution and no linear layer; name its layers")
        return selected
    chosen: dict[str, Layer] = {}
    # Inputs, single calls, operations and the model's output are listed only where a name has their marks.
    patterns = [layers] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
    if any(isinstance(pattern, str) and names_more_than_modules(model, pattern) for pattern in patterns):
        listed = list_layers(model, all=True)
        usable = [layer for layer in listed if layer.filters]
    known = {layer.name: None for layer in usable}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"layers must be 'all', names or patterns, got {pattern!r}")
        matching = [layer.name for layer in usable if fnmatch.fnmatchcase(layer.name, pattern)]
        is_pattern = pattern not in known and any(mark in pattern for mark in "*?[")
        if is_pattern and (matching or not _is_output(model, pattern)):
            if not matching:
                raise ValueError(f"no layer of {model.name} fits the pattern {pattern!r}; 'featvis layers' lists them")
            chosen |= {layer.name: layer for layer in usable if layer.name in matching and layer.name not in chosen}
        else:
            layer = find_layer(model, pattern, listed)
            chosen[layer.name if layer in listed else layer.name.rpartition("@")[0]] = layer  # or with stated axes
    if not chosen:
        raise ValueError("no layers were asked for: the list is empty")
    return [chosen[layer.name] for layer in listed if layer.name in chosen]


def _is_output(model: Model, name: str) -> bool:
    """Whether a name with brackets refers to one of the several outputs of a module."""
    try:
        return bool(parse_layer(model.module, name).parts)
    except ValueError:
        return False


def count_positions(layer: Layer) -> int:
    """The number of positions of a layer's activation map, of any layout and any number of axes.

    >>> count_positions(Layer("conv", "Conv3d", (64, 8, 7, 7), 64)), count_positions(Layer("head", "Linear", (10,), 10))
    (392, 1)
    """
    return math.prod(layer.shape or ()) // (layer.filters or 1)
