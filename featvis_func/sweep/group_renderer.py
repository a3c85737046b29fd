"""Renders filters of several layers with one compiled step."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from featvis_func.backbone.features import Features
from featvis_func.engine.step import activation_maps, filter_keys
from featvis_func.models import Model
from featvis_func.objective import any_channel, channel, feature_axis
from featvis_func.rendering.compose import compose
from featvis_func.rendering.options import RenderOptions
from featvis_func.rendering.plan import plan
from featvis_func.rendering.renderer import float_images
from featvis_func.rendering.resolve import resolve
from featvis_func.rendering.result import Result, select_filters
from featvis_func.sweep.plan import LayerPlan


class GroupRenderer:
    """Renders filters of several layers with one compiled step. The target of a filter picks its layer, too.

    Args:
        model: the model.
        plans: of the layers.
        features: with these layers.
        options: with ``compile`` on. The batch size is theirs, whatever the units.
        take_images: as for :class:`~featvis_func.Renderer`. The images stay on the device until their maps are there.
    """

    def __init__(
        self,
        model: Model,
        plans: Sequence[LayerPlan],
        features: Features,
        options: Mapping[str, Any],
        take_images: Callable[[Tensor], Tensor] = float_images,
    ) -> None:
        shapes = features.shapes
        self.layers = tuple(plan.layer for plan in plans)
        widths = {name: shapes[name][feature_axis(shapes[name])] for name in self.layers}
        self._offsets = dict(zip(self.layers, itertools.accumulate([0, *widths.values()]), strict=False))
        filters = [self._offsets[plan.layer] + number for plan in plans for number in plan.filters]
        checked = RenderOptions.of(options, function="sweep")
        self._resolved = resolve(model, any_channel(*widths.items()), filters, checked, features)
        self._composed = compose(self._resolved)
        self._renderer = plan(self._resolved, self._composed, self._keys)._replace(take_images=lambda images: images)
        self._take_images = take_images

    @property
    def batch_size(self) -> int:
        """Filters at a time."""
        return self._renderer.batch_size

    def render(self, units: Sequence[tuple[str, Sequence[int]]], *, seed: int | None = None) -> list[Result]:
        """Render filters of layers, all together.

        Args:
            units: a layer and some of its filters, each.
            seed: default: that of the options.

        Returns:
            For each unit what the layer's own renderer returns, up to rounding.
        """
        members = [self._offsets[layer] + number for layer, filters in units for number in filters]
        whole = self._renderer(members, seed=seed)
        used = whole.config["batch_size_used"]
        if used < self._renderer.batch_size:
            self._renderer = self._renderer._replace(batch_size=used)  # what fitted into memory
        start, results = 0, []
        for layer, filters in units:
            own = select_filters(whole, range(start, start + len(filters)))
            start += len(filters)
            config = {**whole.config, "layer": layer, "objective": repr(channel(layer)), "objective_code": None}
            maps = self._maps(layer, filters, own, used)
            images = self._take_images(own.images)
            results.append(replace(own, images=images, activations=maps, filters=tuple(filters), config=config))
        return results

    def _maps(self, layer: str, filters: Sequence[int], result: Result, size: int) -> Tensor:
        """The activation maps of a layer's images, ``size`` at a time."""
        features, device = self._resolved.features, self._resolved.device
        keys = filter_keys(result.config["seed"], features.paths[layer], filters, device=device)
        target = torch.tensor(list(filters), device=device)
        rows = [slice(start, start + size) for start in range(0, len(filters), size)]
        maps = [
            activation_maps(
                features, self._composed.transform, channel(layer), features.weights,
                result.images[r].to(device), keys[r], result.best_step[r].to(device), target[r],
            )
            for r in rows
        ]  # fmt: skip
        return torch.cat(maps).cpu().float()

    def _keys(self, members: Sequence[int], seed: int) -> Tensor:
        """The keys of filters, which count through the channels of all layers."""

        def layer_of(member: int) -> str:
            return max((offset, name) for name, offset in self._offsets.items() if offset <= member)[1]

        features, device = self._resolved.features, self._resolved.device
        parts = []
        for layer, group in itertools.groupby(members, layer_of):
            numbers = [member - self._offsets[layer] for member in group]
            parts.append(filter_keys(seed, features.paths[layer], numbers, device=device))
        return torch.cat(parts)


class LayerOfGroup(NamedTuple):
    """The renderer of one layer of a group."""

    group: GroupRenderer
    layer: str
    on_error: Callable[[], None]
    """Called before an error leaves it."""

    def __call__(self, filters: Sequence[int], /, *, seed: int | None = None) -> Result:
        """Render filters, as a :class:`~featvis_func.Renderer` does."""
        try:
            return self.group.render([(self.layer, filters)], seed=seed)[0]
        except Exception:
            self.on_error()
            raise
