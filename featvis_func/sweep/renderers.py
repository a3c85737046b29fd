"""The renderers of a sweep's layers: one trace of the model, and one compiled step for many layers."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from featvis_func.backbone.features import Features, TracedModel, trace_model
from featvis_func.backbone.hardware import specialization
from featvis_func.engine.device import compiling_pays
from featvis_func.models import Model, device_for
from featvis_func.objective import Objective, channel
from featvis_func.rendering.input_size import image_size
from featvis_func.rendering.options import DEFAULTS, RenderOptions
from featvis_func.rendering.plan import make_renderer
from featvis_func.rendering.renderer import Renderer, float_images
from featvis_func.rendering.result import Result
from featvis_func.sweep.group_renderer import GroupRenderer, LayerOfGroup
from featvis_func.sweep.groups import COSTS, Group, choose_groups, measure_steps
from featvis_func.sweep.plan import LayerPlan, Unit
from featvis_func.sweep.shard import stored_images
from featvis_func.validation import first_line, warn_caller


def renderers(
    model: Model,
    config: Mapping[str, Any],
    plans: Sequence[LayerPlan],
    *,
    objectives: Mapping[str, Objective] | None = None,
    device: torch.device | str | None = None,
    retain_memory: bool = True,
    remaining: Callable[[], Mapping[str, int]] | None = None,
) -> "LayerRenderers":
    """Return a function that makes the renderer of a layer from its plan.

    Args:
        model: the model.
        config: configuration of the run; ``config["render"]`` holds the render options.
        plans, objectives, device, remaining: as for :class:`LayerRenderers`.
        retain_memory: as for :func:`~featvis_func.render`.
    """
    batch_size = config.get("batch_size", "auto")
    options = {**DEFAULTS, **config["render"], "batch_size": batch_size, "retain_memory": retain_memory}
    on_device = device_for(model, device).type != "cpu"
    take_images = partial(stored_images, dtype=config["image_dtype"]) if on_device else float_images
    return LayerRenderers(
        model, options, plans, objectives=objectives, device=device, remaining=remaining, take_images=take_images
    )


class LayerRenderers:
    """Makes the renderers of a sweep's layers, one after the other.

    The model is traced once. Where it saves time, a step is compiled once for a group of layers, which computes as far
    as the last of them. Where a group fails, its layers are rendered one by one.

    Args:
        model: the model.
        options: render options, all but ``device``.
        plans: of all layers of the sweep, in the order in which the model calls them, and of its families.
        objectives: label of each family -> its objective.
        device: device to compute on. Default: the device of the model.
        remaining: returns layer -> number of its filters that are not done, which decides whether compiling pays.
            Default: all filters.
        take_images: as for :class:`~featvis_func.Renderer`.
    """

    def __init__(
        self,
        model: Model,
        options: Mapping[str, Any],
        plans: Sequence[LayerPlan],
        *,
        objectives: Mapping[str, Objective] | None = None,
        device: torch.device | str | None = None,
        remaining: Callable[[], Mapping[str, int]] | None = None,
        take_images: Callable[[Tensor], Tensor] = float_images,
    ) -> None:
        self._take_images = take_images
        self._model = model
        self._families = dict(objectives or {})
        self._options = {**options, "device": device}
        self._uncompiled = "cudagraphs" if device_for(model, device).type == "cuda" else "no"
        self._plans = {plan.layer: plan for plan in plans}
        self._remaining = remaining or (lambda: {plan.layer: len(plan.filters) for plan in plans})
        self._trace: TracedModel | None = None
        self._traceable = len(plans) > 1  # a trace of one layer serves no other
        self._groups: dict[str, Group] | None = None
        self._current: GroupRenderer | None = None

    def __call__(self, plan: LayerPlan) -> Renderer | LayerOfGroup:
        """The renderer of a layer.

        Raises:
            ValueError: the layer cannot be rendered.
        """
        current = self._enter_group(plan.layer)
        if current is not None:
            return LayerOfGroup(current, plan.layer, lambda: self._dissolve(current.layers))
        group = (self._groups or {}).get(plan.layer)
        return self.single(plan, compile=None if group is None else "yes" if group.compiled else self._uncompiled)

    def _enter_group(self, layer: str) -> GroupRenderer | None:
        """The renderer of a layer's group; ``None`` where the layer is rendered alone."""
        if self._groups is None:
            try:
                self._groups = self._choose_groups()
            except Exception as error:  # of any kind: of a layer that cannot be rendered, or a device without memory
                warn_caller(f"each layer has a step of its own, since none could be measured: {first_line(error)}")
                self._groups = {}
        group = self._groups.get(layer)
        if self._current is not None and (group is None or self._current.layers != group.layers):
            self._current = None  # before the next one is made: the memory may not hold two
        if self._current is None and group is not None and group.compiled and len(group.layers) > 1:
            try:
                self._current = self._make_group(group)
            except Exception as error:  # of any kind, since each layer alone may still be rendered
                warn_caller(f"the layers {', '.join(group.layers)} are rendered one by one: {first_line(error)}")
                self._dissolve(group.layers)
        return self._current

    def single(self, plan: LayerPlan, *, compile: str | None = None) -> Renderer:
        """The renderer of one layer, whatever its group.

        Args:
            plan: of the layer.
            compile: instead of the option.
        """
        options = {**self._options, "batch_size": plan.batch_size}
        if compile is not None:
            options["compile"] = compile
        objective = self._families.get(plan.layer) or channel(plan.layer)
        features = self._features(objective.layers)
        made = make_renderer(self._model, objective, plan.filters, features=features, **options)
        return made._replace(take_images=self._take_images)

    def batches(self, units: Sequence[Unit]) -> Iterator[list[Unit]]:
        """The units, those together that :meth:`render_together` can render in one batch."""
        batch: list[Unit] = []
        for unit in units:
            group = self._enter_group(unit.layer)
            size = sum(len(other.filters) for other in batch) + len(unit.filters)
            fits = group is not None and batch and batch[0].layer in group.layers and size <= group.batch_size
            if batch and not fits:
                yield batch
                batch = []
                self._enter_group(unit.layer)  # what was rendered may have changed the groups
            batch.append(unit)
        if batch:
            yield batch

    def render_together(self, units: Sequence[Unit]) -> list[Result]:
        """Render units of one of :meth:`batches`."""
        group = self._enter_group(units[0].layer)
        if group is None:
            raise ValueError(f"layer {units[0].layer!r} is in no group")
        try:
            return group.render([(unit.layer, unit.filters) for unit in units])
        except Exception:
            self._dissolve(group.layers)
            raise

    def _dissolve(self, layers: Sequence[str]) -> None:
        """Render the layers of a group one by one from now on."""
        self._groups = {layer: group for layer, group in (self._groups or {}).items() if layer not in layers}
        self._current = None

    def _features(self, layers: Sequence[str]) -> Features | None:
        """Cut from the trace of all layers; ``None`` where one of them cannot be traced, for each alone to be tried."""
        if self._trace is None and self._traceable:
            device, precision = self._options["device"], self._options["precision"]
            try:
                read = [self._families[name].layers if name in self._families else (name,) for name in self._plans]
                names = list(dict.fromkeys(itertools.chain(*read)))
                self._trace = trace_model(self._model, names, device=device, precision=precision)
            except ValueError:
                self._traceable = False
        return None if self._trace is None else self._trace.features(layers)

    def _make_group(self, group: Group) -> GroupRenderer:
        features = self._features(group.layers)
        assert features is not None
        plans = [self._plans[layer] for layer in group.layers]
        return GroupRenderer(self._model, plans, features, {**self._options, "compile": "yes"}, self._take_images)

    def _choose_groups(self) -> dict[str, Group]:
        """Layer -> its group; empty where each layer decides for itself whether its step is compiled."""
        options = RenderOptions.of(self._options, function="sweep")
        wanted = options.compile
        remaining = self._remaining() if self._traceable and wanted != "no" else {}
        layers = [plan for name, plan in self._plans.items() if name not in self._families]
        plans = [plan for plan in layers if remaining.get(plan.layer)]
        batches = [math.ceil(remaining[plan.layer] / plan.batch_size) for plan in plans]
        device = device_for(self._model, self._options["device"])
        images = sum(remaining[plan.layer] for plan in plans)
        pixels = images * options.steps * math.prod(image_size(options.size, self._model))
        captured = wanted == "cudagraphs" and device.type == "cuda"  # which takes no longer for each layer by itself
        if len(plans) < 2 or captured or (wanted == "auto" and not compiling_pays(device, pixels)):
            return {}
        features = self._features([plans[-1].layer])
        if features is None or not features.exported:
            return {}
        with specialization(device.type).retain_memory():
            seconds, _ = measure_steps(plans, lambda plan: self.single(plan, compile=self._uncompiled))
        groups = choose_groups(
            [plan.layer for plan in plans],
            seconds,
            [options.steps * count for count in batches],
            COSTS.get(device.type, COSTS["cpu"]),
            always=wanted != "auto",
        )
        return {layer: group for group in groups for layer in group.layers}
