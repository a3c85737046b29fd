"""Which layers of a sweep share one compiled step, by what compiling and stepping cost."""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from featvis_func.engine.run import run
from featvis_func.rendering.renderer import Renderer
from featvis_func.sweep.plan import LayerPlan


class Group(NamedTuple):
    """Consecutive layers of a sweep."""

    layers: tuple[str, ...]
    compiled: bool
    """Whether one compiled step serves all of them; otherwise each layer has an eager step of its own."""


class Costs(NamedTuple):
    """What compiling costs and gains on a type of device."""

    compile_seconds: float
    """Of one step, whatever its length."""
    compiled_share: float
    """Time of a compiled step, relative to that of the eager one."""
    layer_share: float
    """By which a compiled step takes longer for each further layer that it reads."""


COSTS = {
    # Measured on 2 cores, images of 224 x 224 pixels, bfloat16: 26 to 43 s without a cache; per image 0.80
    # (SqueezeNet), 0.90 (GoogLeNet), 0.92 (ResNet-18) and 0.94 (MobileNet-v2) of an eager step of 16; a tenth more for
    # all of SqueezeNet's 26 layers.
    "cpu": Costs(40.0, 0.9, 0.004),
    # Not measured: a third less memory traffic, as counted.
    "cuda": Costs(45.0, 0.67, 0.004),
}
"""Type of device -> costs."""


def choose_groups(
    layers: Sequence[str], seconds: Sequence[float], steps: Sequence[int], costs: Costs, *, always: bool = False
) -> list[Group]:
    """Divide layers into groups so that the sweep takes the least time, by dynamic programming.

    A compiled step of a group takes as long as that of the slowest of its layers, and a little more for each further
    one; so a group per layer compiles most and computes least, and one group for all the reverse.

    Args:
        layers: in the order in which the model calls them.
        seconds: of an eager step of each.
        steps: number of steps, of a batch each, that each layer needs.
        costs: of compiling.
        always: whether every step must be compiled.

    Returns:
        The groups, in the order of the layers.

    >>> costs = Costs(compile_seconds=40.0, compiled_share=0.8, layer_share=0.0)
    >>> choose_groups(["a", "b", "c"], [0.1, 0.1, 1.0], [1000, 1000, 1000], costs)
    [Group(layers=('a', 'b'), compiled=False), Group(layers=('c',), compiled=True)]
    """
    count = len(layers)
    best = [0.0] + [math.inf] * count  # best[i]: seconds of the first i layers
    previous: list[tuple[int, bool]] = [(0, False)] * (count + 1)
    for end in range(1, count + 1):
        slowest, total, eager = 0.0, 0, 0.0
        for start in range(end - 1, -1, -1):
            slowest, total = max(slowest, seconds[start]), total + steps[start]
            eager += seconds[start] * steps[start]
            share = costs.compiled_share * (1.0 + costs.layer_share * (end - start - 1))
            compiled = costs.compile_seconds + share * slowest * total
            if best[start] + compiled < best[end]:
                best[end], previous[end] = best[start] + compiled, (start, True)
            if not always and best[start] + eager <= best[end]:
                best[end], previous[end] = best[start] + eager, (start, False)
    groups, end = [], count
    while end:
        start, compiled = previous[end]
        groups.append(Group(tuple(layers[start:end]), compiled))
        end = start
    return groups[::-1]


def measure_steps(
    plans: Sequence[LayerPlan], make: Callable[[LayerPlan], Renderer], *, probes: int = 3
) -> tuple[list[float], Renderer]:
    """Measure a step of a few layers, and interpolate linearly between them.

    Args:
        plans: at least one.
        make: the plan of a layer -> its renderer.
        probes: number of layers to measure, at least 1.

    Returns:
        Seconds of a step of a full batch of each plan, and one of the renderers.
    """
    count = min(probes, len(plans))
    probed = sorted({round(i * (len(plans) - 1) / max(1, count - 1)) for i in range(count)})
    measured: dict[int, float] = {}
    renderer = make(plans[0])
    for index in probed:
        renderer = make(plans[index]) if index else renderer
        filters = (list(plans[index].filters) * renderer.batch_size)[: renderer.batch_size]
        state, target = renderer.init(filters, renderer.config["seed"])
        # What a run has only once is a large part of a step elsewhere than on a CPU.
        steps = 1 if renderer.device.type == "cpu" else 8
        times = []
        for _ in range(3):
            start = time.perf_counter()
            state, info = run(renderer.step, renderer.weights, state, target, steps=steps)
            float(info.score.sum())  # waits until the device has finished
            times.append((time.perf_counter() - start) / steps)
        measured[index] = min(times[1:])
    seconds = []
    for index in range(len(plans)):
        low = max(i for i in probed if i <= index)
        high = min(i for i in probed if i >= index)
        weight = 0.0 if low == high else (index - low) / (high - low)
        seconds.append(measured[low] * (1 - weight) + measured[high] * weight)
    return seconds, renderer
