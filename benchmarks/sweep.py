"""Where the time of a sweep goes: loading, tracing, compiling, steps and commits, and filters per hour.

Whole networks: every convolution and linear layer of SqueezeNet and of GoogLeNet, a few filters of each, with the
default options, from loading the model to the last committed unit, in one process. The published script's own loop is
measured on a sample of the same layers, in alternation with nothing else: seconds of a step times the number of steps.

A commit runs in a thread of its own beside the next steps; its seconds are those of the thread. What the rows do not
name (the progress file, drawing the starts, choosing groups) is the difference to the total.
"""

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import featvis_func as fv
from benchmarks.common import cases, report
from benchmarks.reference import make_reference_step
from featvis_func.backbone import features
from featvis_func.backbone.listing import list_layers
from featvis_func.engine import batching
from featvis_func.engine import device as engine_device
from featvis_func.sweep import renderers, sweep, worker

# Model -> filters of each layer.
FILTERS = {"squeezenet1_0": 16, "googlenet": 4}
STEPS = 48
_SCRIPT_LAYERS, _SCRIPT_STEPS, _SCRIPT_BATCH = 3, 3, 8


class Parts(NamedTuple):
    """Seconds of a sweep by what they were spent on."""

    load: float
    trace: float
    """Running the model with hooks, and ``torch.export``."""
    cut: float
    """Truncating and checking the graphs of layers and groups."""
    measure: float
    """Steps of a few layers, by which groups are chosen."""
    compile: float
    """First calls of compiled steps."""
    steps: float
    commits: float
    total: float


@contextmanager
def timed(seconds: dict[str, float], calls: Counter[str]) -> Iterator[None]:
    """Add up the seconds of the parts of a sweep within the block."""

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed_function(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[name] += time.perf_counter() - start
                calls[name] += 1

        return timed_function

    compile_step = engine_device.compile_step

    def compile_timed(step: Any, **options: Any) -> Any:
        compiled, names = compile_step(step, **options), ["compile"]

        def call(*args: Any) -> Any:
            return wrap(names.pop() if names else "compiled steps", compiled)(*args)

        return call

    with ExitStack() as stack:
        for module, attribute, name in (
            (features, "make_source", "trace"),
            (features, "cut", "cut"),
            (renderers, "measure_steps", "measure"),
            (worker, "commit", "commits"),
        ):
            stack.enter_context(mock.patch.object(module, attribute, wrap(name, getattr(module, attribute))))
        stack.enter_context(mock.patch.object(batching, "run", wrap("run", batching.run)))
        stack.enter_context(mock.patch.object(engine_device, "compile_step", compile_timed))
        yield


def run_sweep(
    load: Callable[[], fv.Model], filters: int | None, device: str, **options: Any
) -> tuple[Parts, dict[str, int]]:
    """Sweep a network; returns the seconds, and the number of layers, filters, traces and compilations."""
    seconds: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, timed(seconds, calls):
        start = time.perf_counter()
        model = load()
        seconds["load"] = time.perf_counter() - start
        numbers = None if filters is None else range(filters)
        status = sweep(model, "all", numbers, out=Path(folder) / "out", device=device, **options)
        total = time.perf_counter() - start
    if not status.complete:
        raise RuntimeError(f"the sweep is not complete: {status}")
    # `run` holds the first calls of compiled steps.
    steps = seconds["run"] - seconds["compile"]
    parts = Parts(
        seconds["load"], seconds["trace"], seconds["cut"], seconds["measure"], seconds["compile"], steps,
        seconds["commits"], total,
    )  # fmt: skip
    counts = {"filters": status.filters, "traces": calls["trace"], "compilations": calls["compile"]}
    return parts, counts


def script_seconds(model: fv.Model, layers: list[str]) -> float:
    """Seconds per filter of the published script's loop, from a sample of the layers."""
    sample = [layers[round(i * (len(layers) - 1) / (_SCRIPT_LAYERS - 1))] for i in range(_SCRIPT_LAYERS)]
    total = 0.0
    for layer in sample:
        step = make_reference_step(model.module, layer, list(range(_SCRIPT_BATCH)), input_size=model.size[0])
        step()
        start = time.perf_counter()
        for _ in range(_SCRIPT_STEPS):
            step()
        total += (time.perf_counter() - start) / _SCRIPT_STEPS / _SCRIPT_BATCH * STEPS
    return total / len(sample)


def main(device: str, rounds: int) -> None:
    """Sweep each network once; ``rounds`` is ignored."""
    rows: list[dict[str, Any]] = []
    for name, filters in FILTERS.items():
        parts, counts = run_sweep(lambda name=name: cases([name], device)[0].model, filters, device, steps=STEPS)
        model = cases([name], device)[0].model
        # The script takes maps only.
        layers = [layer.name for layer in list_layers(model) if layer.filters and len(layer.shape or ()) == 3]
        script = script_seconds(model, layers)
        beside = 1.0 - parts.steps / parts.total
        each = parts.total / counts["filters"]
        rows.append({
            "model": name, **counts, **parts._asdict(), "beside_steps": beside, "filters_per_hour": 3600 / each,
            "script_over_ours": script / each,
        })  # fmt: skip
        torch._dynamo.reset()
    table = [list(rows[0]), *([*row.values()] for row in rows)]
    report("sweep", device, {"steps": STEPS, "filters_per_layer": FILTERS, "models": rows}, table)
