"""Seconds per step of the published script, of this library, and of a lower bound ("floor").

The floor is only the forward pass of the truncated backbone, with folded batch norms, and its backward pass to the
input, for the same batch, dtype and memory layout. It is measured eagerly and compiled with torch's own convolutions,
and compiled with the packed weights that the compiled step uses. All methods run alternately, in rounds of random
order; compile time is reported separately. On the CPU the process retains the memory that a step frees
(:func:`featvis_func.kept_memory`), for the library and the floor alike. That changes the allocator of the whole
process, so the published script runs in a process of its own; only one of the two processes computes at a time.
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
from featvis_func.backbone.hooks import catch
from featvis_func.backbone.layers import LayerRef
from featvis_func.engine.ahead import AheadStep
from featvis_func.engine.run import Step, run
from featvis_func.models.copying import private_copy
from featvis_func.rendering.optimizers import optimizer_for
from featvis_func.transform import chain, normalize
from featvis_func.types import Weights

METHODS = ("published script", "eager", "compiled", "floor eager", "floor compiled", "floor packed")
MODELS = ("googlenet", "resnet18", "squeezenet1_0", "vit_b_16")
FILTERS = range(8)


class LibraryStep:
    """A step of this library with the options that ``render`` uses by default, and the state that it advances.

    Args:
        case: model and layer.
        device: to run on.
        steps: length of the run, which determines the learning rate.
        compiled: whether the step is compiled.
        transforms, optimizer: names, as for ``render``.
        objective: default: the layer's channels.
    """

    def __init__(
        self,
        case: Case,
        device: str,
        *,
        steps: int = 48,
        compiled: bool = False,
        transforms: str = "default",
        optimizer: str = "default",
        objective: fv.Objective | None = None,
    ) -> None:
        model, objective = case.model, objective or fv.channel(case.layer)
        self.features = fv.make_features(model, objective.layers, device=device)
        transform = chain(
            fv.named_transform(transforms, image=model.size, size=model.size, std=model.std),
            normalize(model.mean, model.std, device=device),
        )
        image = fv.fourier(model.size, device=device)
        rule = optimizer_for(optimizer, None, steps, image.groups)
        smooth = optimizer == "default"  # as with `smooth_pools="auto"`
        ascent = fv.make_ascent(self.features, image, transform, objective, rule, smooth_pools=smooth)
        self.step: Step = AheadStep(ascent)
        self.weights = self.features.weights
        if compiled:
            self.step, self.weights = fv.compile_step(ascent.step), fv.compiled_weights(self.features)

        def init(filters: Sequence[int]) -> fv.State:
            return ascent.init(fv.filter_keys(0, case.layer, filters, device=device))

        self.init = init
        self.initial = self.state = init(FILTERS)
        self.target = torch.tensor(list(FILTERS), device=device)

    def __call__(self, steps: int = 1) -> None:
        self.state, _ = run(self.step, self.weights, self.state, self.target, steps=steps)


def measure(case: Case, device: str, rounds: int) -> dict[str, object]:
    """Time one model."""
    torch._dynamo.reset()  # it stops compiling a function after some number of compilations, whatever the model
    eager, compiled = LibraryStep(case, device), LibraryStep(case, device, compiled=True)
    features = eager.features
    images = torch.randn(len(FILTERS), 3, *case.model.size, device=device)

    def total(x: Tensor, weights: Weights) -> Tensor:
        return features.apply(weights, x)[case.layer].sum()

    # With the value: for the gradient alone the compiler would leave out the last convolution's forward pass.
    floor = grad_and_value(total)
    compiled_floor = torch.compile(floor, fullgraph=True, dynamic=False)
    # FLOPs of the module itself: the first convolution of the rewritten graph is padded to more channels.
    module = private_copy(case.model.module, None).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        with catch(module, {LayerRef(case.layer): 1}, stop=True) as caught:
            module(images.clone().requires_grad_())
        caught[case.layer].sum().backward()
    seconds_to_compile = {
        "compiled": _seconds(compiled),
        "floor packed": _seconds(lambda: compiled_floor(images, compiled.weights)),
        "floor compiled": _seconds(lambda: compiled_floor(images, eager.weights)),
    }
    calls: dict[str, Callable[[], object]] = {
        "eager": eager,
        "compiled": compiled,
        "floor eager": lambda: floor(images, eager.weights),
        "floor compiled": lambda: compiled_floor(images, eager.weights),
    }
    if features.packed:
        calls["floor packed"] = lambda: compiled_floor(images, compiled.weights)
    with ExitStack() as stack:
        if len(features.shapes[case.layer]) == 3:  # the published script does not support tokens
            calls["published script"] = stack.enter_context(published_step(case, device))
        stack.enter_context(fv.kept_memory(device == "cpu"))
        times = interleave(calls, rounds=rounds)
    median = {name: t.median for name, t in times.items()}
    step = min(median["eager"], median["compiled"])
    torch_floor = min(median["floor eager"], median["floor compiled"])
    lowest = min(torch_floor, median.get("floor packed", torch_floor))
    return {
        "layer": case.layer,
        "trained": case.trained,
        "filters": len(FILTERS),
        "seconds": {name: t._asdict() for name, t in times.items()},
        "seconds_to_compile": seconds_to_compile,
        "step/floor": step / lowest,
        "step/torch floor": step / torch_floor,
        "eager/floor eager": median["eager"] / median["floor eager"],
        "published script/step": median["published script"] / step if "published script" in median else None,
        "floor_gflop": counter.get_total_flops() / 1e9,
        "step_gflop_per_second": counter.get_total_flops() / 1e9 / step,
    }


@contextmanager
def published_step(case: Case, device: str) -> Iterator[Callable[[], object]]:
    """A step of the published script; on the CPU in another process, for which the call waits."""
    if device != "cpu":
        yield make_reference_step(case.model.module, case.layer, list(FILTERS), size=case.model.size[0])
        return
    context = multiprocessing.get_context("spawn")
    connection, child_connection = context.Pipe()
    process = context.Process(target=_serve, args=(child_connection, case.name), daemon=True)
    process.start()
    child_connection.close()

    def call() -> None:
        connection.send(True)
        connection.recv()

    try:
        yield call
    finally:
        connection.close()
        process.join()


def _serve(connection: Connection, name: str) -> None:
    (case,) = cases((name,), "cpu")
    step = make_reference_step(case.model.module, case.layer, list(FILTERS), size=case.model.size[0])
    try:
        while connection.recv():
            step()
            connection.send(True)
    except EOFError:
        return  # the parent process has closed the connection


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(device: str, rounds: int) -> None:
    """Print and write the timings of all models."""
    data = {case.name: measure(case, device, rounds) for case in cases(MODELS, device)}
    ratios = ("step/floor", "step/torch floor", "published script/step", "step_gflop_per_second")
    table: list[list[object]] = [["model", *METHODS, *ratios]]
    for name, d in data.items():
        seconds: dict = d["seconds"]  # type: ignore[assignment]
        medians = [seconds[k]["median"] if k in seconds else "-" for k in METHODS]
        table.append([name, *medians, *(d[k] or "-" for k in ratios)])
    report("step", device, {"rounds": rounds, "models": data}, table)
