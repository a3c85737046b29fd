"""What a step costs beside its arithmetic: waits for the device, graph breaks, compilations, and launches.

A wait is a copy from the device to the host's program (``.item()`` and its like); on CUDA the steps run under
``torch.cuda.set_sync_debug_mode("error")`` besides, where a single one would end the benchmark. Launches are the
device's kernels on CUDA, and on the CPU the operations that torch dispatches (a compiled graph's own loops are none).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Case, cases, report
from benchmarks.reference import make_reference_step
from benchmarks.step import FILTERS, OurStep

MODELS = ("googlenet", "resnet18", "squeezenet1_0")
STEPS = 5


@contextmanager
def no_waits(device: str) -> Iterator[None]:
    """On CUDA, an error at every wait for the device."""
    if device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def count(call: Callable[[], object], device: str) -> dict[str, float]:
    """Waits and launches of one call, as means over a few."""
    call()  # warm-up
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            call()
    events = profiler.events() or []
    waits = sum(event.name == "aten::_local_scalar_dense" for event in events)
    if device == "cuda":
        launches = sum(event.device_type == DeviceType.CUDA for event in events)
    else:
        # An operation that calls others is not counted besides them.
        launches = sum(
            event.name.startswith("aten::") and not any(c.name.startswith("aten::") for c in event.cpu_children)
            for event in events
        )
    return {"waits": waits / STEPS, "launches": launches / STEPS}


def measure(case: Case, device: str) -> dict[str, object]:
    """Counts for one model: the script, and this library eager and compiled."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, compiled = OurStep(case, device), OurStep(case, device, compiled=True)
    compiled()
    after_first = counters["stats"]["unique_graphs"]
    others = compiled.begin([f + 1 for f in FILTERS])  # copies numbers to the device, and so waits
    with no_waits(device):
        eager()
        for _ in range(STEPS):
            compiled()
        compiled.state, compiled.target = others, compiled.target + 1
        compiled()
    return {
        "layer": case.layer,
        "graph_breaks": sum(counters["graph_break"].values()),
        "graphs_after_the_first_step": after_first,
        "graphs_compiled_after_that": counters["stats"]["unique_graphs"] - after_first,
        "baseline": count(make_reference_step(case.model.module, case.layer, list(FILTERS)), device),
        "ours eager": count(eager, device),
        "ours compiled": count(compiled, device),
    }


def main(device: str, rounds: int) -> None:
    """Prints and writes the counts. They do not vary: ``rounds`` has no effect."""
    data = {case.name: measure(case, device) for case in cases(MODELS, device)}
    methods = ("baseline", "ours eager", "ours compiled")
    kinds = ("graph_breaks", "graphs_after_the_first_step", "graphs_compiled_after_that")
    heads = [f"{method} {kind}" for kind in ("waits", "launches") for method in methods]
    table: list[list[object]] = [["model", *kinds, *heads]]
    for name, d in data.items():
        counts = [d[method][kind] for kind in ("waits", "launches") for method in methods]  # type: ignore[index]
        table.append([name, *(d[kind] for kind in kinds), *counts])
    report("overhead", device, {"steps": STEPS, "models": data}, table)
