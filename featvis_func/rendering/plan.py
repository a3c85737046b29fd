"""From a model, a layer and options to a renderer of the layer's filters, in three steps.

:func:`~featvis_func.rendering.resolve.resolve` checks what was given and finds what it means,
:func:`~featvis_func.rendering.compose.compose` builds the algorithm from its parts, and :func:`plan` decides how it
runs. :func:`make_renderer` is all three.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from featvis_func.backbone.features import Features, compiled_weights
from featvis_func.backbone.layers import AXES
from featvis_func.engine.device import CompiledStep, default_batch_size, fit_batch_size, select_step
from featvis_func.engine.memory import MAX_BATCH_SIZE, probe_batch_size
from featvis_func.engine.step import filter_keys
from featvis_func.models import Model
from featvis_func.objective import Objective
from featvis_func.rendering.compose import Composed, compose
from featvis_func.rendering.options import RenderOptions
from featvis_func.rendering.record import make_config
from featvis_func.rendering.renderer import Renderer
from featvis_func.rendering.resolve import Resolved, resolve
from featvis_func.types import State, Target


def make_renderer(
    model: str | nn.Module | Model,
    objective: str | Objective,
    filters: Iterable[int] | int | None = None,
    *,
    features: Features | None = None,
    **options: Any,
) -> Renderer:
    """Trace the model up to a layer and compose the step, once for any number of renderings.

    Args:
        model, objective, features: as for :func:`featvis_func.render`.
        filters: all that will be rendered, in one call or in several; from their number ``compile="auto"`` decides
            whether compiling pays.
        **options: as for :func:`featvis_func.render`.

    Raises:
        ValueError: bad input, with what was given, what was expected and what exists.
        TypeError: an unknown option.
    """
    checked = RenderOptions.of(options, function="make_renderer")
    resolved = resolve(model, objective, filters, checked, features)
    return plan(resolved, compose(resolved))


def plan(
    resolved: Resolved, composed: Composed, keys: Callable[[Sequence[int], int], Tensor] | None = None
) -> Renderer:
    """Decide whether the step is compiled and how large the batches are.

    Args:
        resolved, composed: what to render, and how.
        keys: (filter numbers, seed) -> keys of the filters, int64 ``(n, 2)``. Default: :func:`filter_keys` of the
            objective's first layer.

    Raises:
        ValueError: compiling was requested for a model that cannot be exported, or a batch size or tolerance for
            filters that need a single batch.
    """
    options, features, device = resolved.options, resolved.features, resolved.device
    filters = resolved.filters
    make_step = partial(
        select_step,
        composed.ascent,
        device=device,
        pixels=len(filters) * options.steps * math.prod(composed.size),
        exported=features.exported,
        # Snapshots end a run: what is drawn for steps after the next one is drawn in vain.
        ahead=composed.draws_ahead and 4 * options.snapshots <= options.steps,
        name=resolved.model.name,
    )
    step = make_step(str(options.compile))
    compiled = isinstance(step, CompiledStep)
    weights = compiled_weights(features) if compiled else features.weights
    layer = features.paths[resolved.objective.layers[0]]

    def init(chosen: Sequence[int], seed: int) -> tuple[State, Target]:
        own = filter_keys(seed, layer, chosen, device=device) if keys is None else keys(chosen, seed)
        state = composed.ascent.init(own)
        return state, torch.tensor(list(chosen), dtype=torch.int64, device=device)

    batch_size = default_batch_size(device, resolved.model.size, compiled=compiled)
    if isinstance(options.batch_size, int):
        batch_size = options.batch_size
    if composed.single_batch:
        if options.tolerance is not None or (options.batch_size != "auto" and batch_size < len(filters)):
            raise ValueError(
                f"the {len(filters)} images of {resolved.objective} depend on each other: they need one batch and no"
                f" tolerance, got batch_size={options.batch_size}, tolerance={options.tolerance}"
            )
        batch_size = len(filters)
    elif options.batch_size == "auto" and device.type == "cuda" and not options.deterministic:
        batch_size = probe_batch_size(
            lambda: make_step("no" if compiled else str(options.compile)),
            features.weights,
            lambda chosen: init(chosen, options.seed),
            filters,
            device=device,
            most=min(MAX_BATCH_SIZE, len(filters)),
        )
    group = 1 if composed.single_batch else resolved.objective.group
    if group > 1:
        batch_size = _whole_groups(batch_size, group, options, resolved.objective)
    if not composed.single_batch:
        batch_size = fit_batch_size(batch_size, len(filters), device, group=group, compiled=compiled)
    floats = (w.dtype for w in features.weights.values() if w.is_floating_point())
    return Renderer(
        tuple(filters),
        batch_size,
        make_config(
            resolved.model,
            resolved.objective,
            options,
            layer=_with_axes(resolved.objective.layers[0], layer),
            size=composed.size,
            precision=str(next(floats, torch.float32)).removeprefix("torch."),
            device=device.type,
            alpha=composed.alpha,
        ),
        options,
        step,
        weights,
        init,
        device,
        composed.single_batch,
        composed.ascent.decode,
        composed.ascent.finish,
        group,
        resolved.objective.family,
    )


def _whole_groups(batch_size: int, group: int, options: RenderOptions, objective: Objective) -> int:
    """The batch size in whole groups of images that depend on each other."""
    if options.tolerance is not None or (options.batch_size != "auto" and batch_size < group):
        raise ValueError(
            f"the images of {objective} depend on each other in groups of {group}: they need at least that batch size"
            f" and no tolerance, got batch_size={options.batch_size}, tolerance={options.tolerance}"
        )
    return max(group, batch_size // group * group)


def _with_axes(requested: str, path: str) -> str:
    """A layer's full name, with its axes where the user states them."""
    name, at, axes = requested.rpartition("@")
    return f"{path}@{axes}" if name and at and axes in AXES and not path.endswith(f"@{axes}") else path
