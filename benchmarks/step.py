"""Seconds per step of the published script, of this library, and of the floor that no method can pass.

The floor is the forward pass of the truncated, folded backbone and the backward pass to its input, alone: same batch,
dtype and memory layout; eager or compiled with torch's own convolutions, or compiled with those of our compiled step,
whichever is fastest. All take turns, round by round; the time to compile stands apart. On the CPU the script has a
process of its own, since memory is kept here as :func:`run_batched` keeps it, for the library and the floor alike, and a
process that did so once is not as it was before.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils.flop_counter import FlopCounterMode

import featvis_func as fv
from benchmarks.common import Case, cases, interleave, report
from benchmarks.reference import make_reference_step
from featvis_func.backbone.hooks import hook_backbone, private_copy
from featvis_func.backbone.layers import LayerRef
from featvis_func.transform import chain, normalize
from featvis_func.types import Weights

METHODS = ("baseline", "ours eager", "ours compiled", "floor eager", "floor compiled", "floor as ours")
MODELS = ("googlenet", "resnet18", "squeezenet1_0", "vit_b_16")
FILTERS = range(8)


class OurStep:
    """One step of the library as ``render`` runs it, on its own state."""

    def __init__(self, case: Case, device: str, *, steps: int = 32, compiled: bool = False) -> None:
        model, goal = case.model, fv.channel(case.layer)
        self.features = fv.make_features(model, goal.layers, device=device)
        image = fv.fourier(model.size, device=device)
        view = fv.views("default", image=model.size, size=model.size)
        optimizer = fv.default_optimizer(steps)
        self.step = fv.make_step(
            self.features, image, chain(view, normalize(model.mean, model.std, device=device)), goal, optimizer
        )

        self.weights = self.features.weights
        if compiled:
            self.step, self.weights = fv.compile_step(self.step), fv.compiled_weights(self.features)

        def begin(filters: Sequence[int]) -> fv.State:
            keys = fv.filter_keys(0, case.layer, filters, device=device)
            return fv.init_state(self.features, image, goal, optimizer, keys)

        self.begin = begin
        self.start = self.state = begin(FILTERS)
        self.target = torch.tensor(list(FILTERS), device=device)

    def __call__(self) -> None:
        self.state, _ = self.step(self.weights, self.state, self.target)


def measure(case: Case, device: str, rounds: int) -> dict[str, object]:
    """Times one model."""
    torch._dynamo.reset()  # it gives a function up after some compilations, of whatever models
    eager, compiled = OurStep(case, device), OurStep(case, device, compiled=True)
    features = eager.features
    images = torch.randn(len(FILTERS), 3, *case.model.size, device=device)

    def total(x: Tensor, weights: Weights) -> Tensor:
        return features.apply(weights, x)[case.layer].sum()

    # With the value: of a gradient alone the compiler leaves out the last convolution's forward pass.
    floor = grad_and_value(total)
    compiled_floor = torch.compile(floor, fullgraph=True, dynamic=False)
    # Of the module itself: the graph's first convolution is padded to more channels, which is no useful work.
    plain = hook_backbone(private_copy(case.model.module, None), {LayerRef(case.layer): 1})
    with FlopCounterMode(display=False) as counter:
        plain.apply(plain.weights, images.clone().requires_grad_())[case.layer].sum().backward()
    seconds_to_compile = {
        "ours": _seconds(compiled),
        "floor": _seconds(lambda: compiled_floor(images, compiled.weights)),
        "floor of torch's convolutions": _seconds(lambda: compiled_floor(images, eager.weights)),
    }
    calls: dict[str, Callable[[], object]] = {
        "ours eager": eager,
        "ours compiled": compiled,
        "floor eager": lambda: floor(images, eager.weights),
        "floor compiled": lambda: compiled_floor(images, eager.weights),
    }
    if features.packed:
        calls["floor as ours"] = lambda: compiled_floor(images, compiled.weights)
    with ExitStack() as stack:
        if len(features.shapes[case.layer]) == 3:  # the script knows no tokens
            calls["baseline"] = stack.enter_context(script(case, device))
        stack.enter_context(fv.kept_memory(device == "cpu"))
        times = interleave(calls, rounds=rounds)
    median = {name: t.median for name, t in times.items()}
    ours = min(median["ours eager"], median["ours compiled"])
    usual = min(median["floor eager"], median["floor compiled"])
    lowest = min(usual, median.get("floor as ours", usual))
    return {
        "layer": case.layer,
        "trained": case.trained,
        "filters": len(FILTERS),
        "seconds": {name: t._asdict() for name, t in times.items()},
        "seconds_to_compile": seconds_to_compile,
        "ours/floor": ours / lowest,
        "ours/floor of torch's convolutions": ours / usual,
        "ours eager/floor eager": median["ours eager"] / median["floor eager"],
        "baseline/ours": median["baseline"] / ours if "baseline" in median else None,
        "floor_gflop": counter.get_total_flops() / 1e9,
        "ours_gflop_per_second": counter.get_total_flops() / 1e9 / ours,
    }


@contextmanager
def script(case: Case, device: str) -> Iterator[Callable[[], object]]:
    """A step of the published script; on the CPU in a process of its own, of which only one or the other works."""
    if device != "cpu":
        yield make_reference_step(case.model.module, case.layer, list(FILTERS), size=case.model.size[0])
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, case.name), daemon=True)
    process.start()
    theirs.close()

    def call() -> None:
        ours.send(True)
        ours.recv()

    try:
        yield call
    finally:
        ours.close()
        process.join()


def _serve(connection: Connection, name: str) -> None:
    (case,) = cases((name,), "cpu")
    step = make_reference_step(case.model.module, case.layer, list(FILTERS), size=case.model.size[0])
    try:
        while connection.recv():
            step()
            connection.send(True)
    except EOFError:
        return  # nobody asks any more


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(device: str, rounds: int) -> None:
    """Prints and writes the timings of all models."""
    data = {case.name: measure(case, device, rounds) for case in cases(MODELS, device)}
    ratios = ("ours/floor", "ours/floor of torch's convolutions", "baseline/ours", "ours_gflop_per_second")
    table: list[list[object]] = [["model", *METHODS, *ratios]]
    for name, d in data.items():
        seconds: dict = d["seconds"]  # type: ignore[assignment]
        medians = [seconds[k]["median"] if k in seconds else "-" for k in METHODS]
        table.append([name, *medians, *(d[k] or "-" for k in ratios)])
    report("step", device, {"rounds": rounds, "models": data}, table)
