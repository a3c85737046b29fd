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

import featvis_func as fv
from benchmarks.common import Case, cases, report
from benchmarks.reference import make_reference_step
from benchmarks.step import FILTERS, LibraryStep
from featvis_func.backbone.listing import layer_shapes

MODELS = ("googlenet", "resnet18", "squeezenet1_0")
METHODS = ("published script", "eager", "compiled")
STEPS = 16  # an eager run draws the random numbers of as many at once
MEMBERS = 4096


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
    """Count the synchronizations and launches of a call that takes :data:`STEPS` steps, as means of a step."""
    call()  # warm-up
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
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


def families(case: Case) -> dict[str, fv.Objective]:
    """Families of objectives of 4,096 members on a model's layer."""
    shape = layer_shapes(case.model, [case.layer])[case.layer]
    numbers = torch.Generator().manual_seed(0)
    matrix = torch.randn(MEMBERS, shape[0], generator=numbers)
    positions = [(i, j) for i in range(shape[1]) for j in range(shape[2])]
    return {
        "directions": fv.directions(case.layer, matrix),
        "cosine": fv.directions(case.layer, matrix, similarity="cosine"),
        "sae, TopK": fv.sae(case.layer, matrix, activation="topk", k=32),
        "neurons": fv.neurons(case.layer, range(min(shape[0], MEMBERS // len(positions))), positions),
        "facets": fv.facets(fv.directions(case.layer, matrix), 4),
        "difference": fv.directions(case.layer, matrix) - 0.5 * fv.sae(case.layer, matrix),
    }


def measure(case: Case, device: str, objective: fv.Objective | None = None) -> dict[str, object]:
    """Count for one model: the published script, and this library eager and compiled.

    Args:
        case: model and layer.
        device: to run on.
        objective: of this library. Default: the layer's channels, which alone the published script has.
    """
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager = LibraryStep(case, device, objective=objective)
    compiled = LibraryStep(case, device, compiled=True, objective=objective)
    compiled()
    after_first = counters["stats"]["unique_graphs"]
    other_filters = compiled.init([f + 1 for f in FILTERS])  # copies numbers to the device, which synchronizes
    with forbid_synchronization(device):
        eager()
        compiled(STEPS)
        compiled.state, compiled.target = other_filters, compiled.target + 1
        compiled()
    return {
        "layer": case.layer,
        "graph_breaks": sum(counters["graph_break"].values()),
        "graphs_of_first_step": after_first,
        "graphs_compiled_later": counters["stats"]["unique_graphs"] - after_first,
        **({"published script": _of_script(case, device)} if objective is None else {}),
        "eager": count(lambda: eager(STEPS), device),
        "compiled": count(lambda: compiled(STEPS), device),
    }


def _of_script(case: Case, device: str) -> dict[str, float]:
    step = make_reference_step(case.model.module, case.layer, list(FILTERS))

    def call() -> None:
        for _ in range(STEPS):
            step()

    return count(call, device)


def main(device: str, rounds: int) -> None:
    """Print and write the counts. They are the same in every run, so that ``rounds`` has no effect."""
    data = {case.name: measure(case, device) for case in cases(MODELS, device)}
    (squeezenet,) = cases(("squeezenet1_0",), device)
    for name, objective in families(squeezenet).items():
        data[f"squeezenet1_0, {name}"] = measure(squeezenet, device, objective)
    kinds = ("graph_breaks", "graphs_of_first_step", "graphs_compiled_later")
    headings = [f"{kind}: {method}" for kind in ("synchronizations", "launches") for method in METHODS]
    table: list[list[object]] = [["model", *kinds, *headings]]
    for name, d in data.items():
        counts = [
            d[method][kind] if method in d else "-"  # type: ignore[index]
            for kind in ("synchronizations", "launches")
            for method in METHODS
        ]
        table.append([name, *(d[kind] for kind in kinds), *counts])
    report("overhead", device, {"steps": STEPS, "models": data}, table)
