"""What a sweep will cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from featvis_func.rendering.renderer import Renderer
from featvis_func.sweep.groups import measure_steps
from featvis_func.sweep.plan import LayerPlan

# Bytes that are stored besides images, activation maps and history: per filter, and per pair of shard and sidecar.
_BYTES_PER_FILTER, _BYTES_PER_UNIT = 170, 1300


class Estimate(NamedTuple):
    """The estimated cost of a sweep, on the device and under the load under which it was measured."""

    seconds: float
    """For all filters, on one worker, without loading, tracing and compiling."""
    bytes: int
    """Size of the stored results."""


def estimate(
    plans: Sequence[LayerPlan],
    make: Callable[[LayerPlan], Renderer],
    *,
    positions: Mapping[str, int],
    itemsize: int,
    probes: int = 3,
) -> Estimate:
    """Estimate the cost of a sweep: measure a step of a few layers, and interpolate linearly between them.

    Args:
        plans: of the sweep's layers, at least one.
        make: the plan of a layer -> its renderer.
        positions: layer -> number of positions of its activation map, see :func:`count_positions`.
        itemsize: bytes of one stored value of an image.
        probes: number of layers to measure, at least 1.
    """
    steps, renderer = measure_steps(plans, make, probes=probes)
    config = renderer.config
    state, _ = renderer.init(list(plans[-1].filters[:1]), config["seed"])
    values = state.best.image[0].numel()
    seconds, size = 0.0, 0
    for plan, step in zip(plans, steps, strict=True):
        batches = sum(-(-len(unit.filters) // plan.batch_size) for unit in plan.units)
        seconds += batches * config["steps"] * step
        images = values * (itemsize + config.get("snapshots", 0))
        per_filter = images + positions[plan.layer] * 4 + config["steps"] * 4 + _BYTES_PER_FILTER
        size += len(plan.filters) * per_filter + len(plan.units) * _BYTES_PER_UNIT
    return Estimate(seconds, size)
