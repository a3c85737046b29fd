"""Overhead of a step beside its arithmetic: synchronizations with the device, graph breaks, compilations and launches.

A synchronization is a copy of a number from the device to the host (``.item()``). On CUDA the steps also run under
``torch.cuda.set_sync_debug_mode("error")``, so that a single synchronization ends the benchmark. Launches are kernels
on CUDA; on the CPU they are the operations that torch dispatches (the loops of a compiled graph are not among them).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Case, cases, report
from benchmarks.reference import make_reference_step
from benchmarks.step import FILTERS, LibraryStep

MODELS = ("googlenet", "resnet18", "squeezenet1_0")
METHODS = ("published script", "eager", "compiled")
STEPS = 5


@contextmanager
def forbid_synchronization(device: str) -> Iterator[None]:
    """On CUDA, raise an error at every synchronization within the block."""
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
    """Count the synchronizations and launches of one call, as means over :data:`STEPS` calls."""
    call()  # warm-up
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            call()
    events = profiler.events() or []
    synchronizations = sum(event.name == "aten::_local_scalar_dense" for event in events)
    if device == "cuda":
        launches = sum(event.device_type == DeviceType.CUDA for event in events)
    else:
        # Only innermost operations: one that calls others is not counted in addition to them.
        launches = sum(
            event.name.startswith("aten::") and not any(c.name.startswith("aten::") for c in event.cpu_children)
            for event in events
        )
    return {"synchronizations": synchronizations / STEPS, "launches": launches / STEPS}


def measure(case: Case, device: str) -> dict[str, object]:
    """Count for one model: the published script, and this library eager and compiled."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, compiled = LibraryStep(case, device), LibraryStep(case, device, compiled=True)
    compiled()
    after_first = counters["stats"]["unique_graphs"]
    other_filters = compiled.init([f + 1 for f in FILTERS])  # copies numbers to the device, which synchronizes
    with forbid_synchronization(device):
        eager()
        for _ in range(STEPS):
            compiled()
        compiled.state, compiled.target = other_filters, compiled.target + 1
        compiled()
    return {
        "layer": case.layer,
        "graph_breaks": sum(counters["graph_break"].values()),
        "graphs_of_first_step": after_first,
        "graphs_compiled_later": counters["stats"]["unique_graphs"] - after_first,
        "published script": count(make_reference_step(case.model.module, case.layer, list(FILTERS)), device),
        "eager": count(eager, device),
        "compiled": count(compiled, device),
    }


def main(device: str, rounds: int) -> None:
    """Print and write the counts. They are the same in every run, so that ``rounds`` has no effect."""
    data = {case.name: measure(case, device) for case in cases(MODELS, device)}
    kinds = ("graph_breaks", "graphs_of_first_step", "graphs_compiled_later")
    headings = [f"{kind}: {method}" for kind in ("synchronizations", "launches") for method in METHODS]
    table: list[list[object]] = [["model", *kinds, *headings]]
    for name, d in data.items():
        counts = [
            d[method][kind]  # type: ignore[index]
            for kind in ("synchronizations", "launches")
            for method in METHODS
        ]
        table.append([name, *(d[kind] for kind in kinds), *counts])
    report("overhead", device, {"steps": STEPS, "models": data}, table)
