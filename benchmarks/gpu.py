"""Everything that has to be known of a GPU, in one command and within nine minutes: is it right, and how fast is it?

``python -m benchmarks gpu --device cuda`` needs nothing but the package and torch; it uses random weights. Each part is
measured even if an earlier one fails; the error then stands in its place. One table comes last, and everything is in
``results/gpu-cuda.json``. On a CPU (``--device cpu``) the same runs as a test of the benchmark itself, with a smaller
sweep; the parts about CUDA are left out.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.func import grad_and_value
from torch.utils.flop_counter import FlopCounterMode

import featvis_func as fv
from benchmarks.common import report, timing
from benchmarks.overhead import forbid_synchronization
from benchmarks.reference import make_reference_step
from benchmarks.sweep import run_sweep
from featvis_func.backbone.verify import float32_precision
from featvis_func.engine.device import algorithms, select_step
from featvis_func.engine.run import run
from featvis_func.rendering.compose import compose
from featvis_func.rendering.options import IMAGES, OPTIMIZERS, TRANSFORMS, RenderOptions
from featvis_func.rendering.renderer import Renderer
from featvis_func.rendering.resolve import resolve

MODEL, LAYER, BATCH = "torchvision:googlenet@none", "inception4c.branch4.1.conv", 64
WIDE_LAYER, WIDTH = "inception4c.branch2.1.conv", 256  # as many filters as the largest batch
SWEPT = ("torchvision:googlenet@none", "torchvision:resnet50@none")
_ROUNDS = 9
_STEPS = 4  # between two readings of the clock
_TOLERANCES = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 0.1}


def main(device: str, rounds: int) -> None:
    """Run all parts; ``rounds`` is ignored."""
    start = time.perf_counter()
    data: dict[str, Any] = {}
    for name, part in PARTS.items():
        if device == "cpu" and name in _CUDA_ONLY:
            continue
        began = time.perf_counter()
        try:
            data[name] = part(device)
        except Exception as error:  # whatever a new machine raises: the other parts are still worth having
            data[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        data[name]["seconds_of_this_part"] = time.perf_counter() - began
        print(f"{time.perf_counter() - start:6.1f} s  {name}: {data[name]}", flush=True)
    table: list[list[object]] = [["part", "what", "value"]]
    for part, values in data.items():
        table += [[part, what, value] for what, value in values.items() if not isinstance(value, dict | list)]
    report("gpu", device, {"model": MODEL, "layer": LAYER, "batch": BATCH, "parts": data}, table)


def renderer(device: str, filters: int = 4, **options: Any) -> Renderer:
    """A renderer of TextureNet in float32 without TF32, unless the options say otherwise."""
    given = {"steps": 8, "compile": "no", "batch_size": filters, **options}
    features = _features(device, given.pop("precision", "float32"))
    return fv.make_renderer("texturenet", "block6.conv", range(filters), features=features, device=device, **given)


@functools.cache
def _features(device: str, precision: str) -> fv.Features:
    return fv.make_features(fv.load_model("texturenet"), ["block6.conv"], device=device, precision=precision)


def correctness(device: str) -> dict[str, Any]:
    """The largest relative error of a step's scores and gradient norms against float32 on the CPU.

    For every parameterisation, preset of transforms and optimizer; and, with the defaults, in TF32 and bfloat16.
    """
    worst: dict[str, float] = {}
    cases: dict[str, dict[str, Any]] = {"float32 default": {}}
    cases |= {f"float32 {name}": {"image": name} for name in IMAGES}
    cases |= {f"float32 {name} transforms": {"transforms": name} for name in TRANSFORMS}
    cases |= {f"float32 {name} optimizer": {"optimizer": name} for name in OPTIMIZERS}
    cases |= {"tf32 default": {}, "bfloat16 default": {"precision": "bfloat16"}}
    for name, options in cases.items():
        with float32_precision("tf32" if name.startswith("tf32") else "ieee"):
            infos = [_one_step(renderer(where, **options)) for where in ("cpu", device)]
        errors = [
            ((a.cpu().double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12)).item()
            for a, b in zip(infos[1], infos[0], strict=True)
        ]
        worst[name] = max(errors)
    wrong = [name for name, error in worst.items() if error > _TOLERANCES[name.split()[0]]]
    return {"worst": max(worst.values()), "wrong": ", ".join(wrong) or "none", "errors": worst}


def _one_step(made: Renderer) -> tuple[Tensor, Tensor]:
    state, target = made.init(list(made.filters), 0)
    _, info = made.step(made.weights, state, target)
    return info.score, info.grad_norm


def reruns(device: str) -> dict[str, Any]:
    """Whether two runs with ``deterministic=True`` are equal bit by bit, also behind an adaptive pool (VGG).

    And whether a step that is captured as a CUDA graph has the images of the eager one.
    """
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d((6, 5)))
    pooled = fv.load_model(net.eval(), size=64, mean=[0.5] * 3, std=[0.25] * 3)
    equal = {}
    for name, model, layer in (("texturenet", "texturenet", "block6.conv"), ("adaptive pool", pooled, "2")):
        runs = [fv.render(model, layer, range(4), steps=8, device=device, deterministic=True) for _ in range(2)]
        equal[name] = torch.equal(runs[0].images, runs[1].images)
    if device != "cpu":
        # In two batches, so that a captured state is replaced.
        options: dict[str, Any] = {"steps": 8, "batch_size": 2, "device": device, "deterministic": True}
        eager, captured = (
            fv.render("texturenet", "block6.conv", range(4), compile=c, **options) for c in ("no", "cudagraphs")
        )
        equal["captured and eager"] = torch.equal(captured.images, eager.images)
    return equal


def host_waits(device: str) -> dict[str, Any]:
    """Steps under ``torch.cuda.set_sync_debug_mode("error")``: eager, compiled and captured."""
    taken = {}
    for compile in ("no", "yes", "cudagraphs"):
        made = renderer(device, compile=compile)
        state, target = made.init(list(made.filters), 0)
        state, _ = made.step(made.weights, state, target)
        with forbid_synchronization(device):
            for _ in range(3):
                state, _ = made.step(made.weights, state, target)
        taken[f"steps without a wait, compile={compile}"] = 3
    return taken


def speed(device: str) -> dict[str, Any]:
    """Medians of a step, compiled in every way, of the backbone alone and of the published script, at one batch."""
    batch = BATCH if device != "cpu" else 4
    model = fv.load_model(MODEL)
    calls: dict[str, Callable[[], object]] = {}
    for compile in ("no", "yes", "cudagraphs") if device != "cpu" else ("no",):
        made = fv.make_renderer(model, LAYER, range(batch), batch_size=batch, device=device, compile=compile)
        calls[f"compile={compile}"] = _stepping(made, _STEPS if device != "cpu" else 1)
    features = fv.make_features(model, [LAYER], device=device)
    images = torch.rand(batch, 3, *model.size, device=device)
    floor = grad_and_value(lambda x, w: features.apply(w, x)[LAYER].float().sum())
    calls["floor eager"] = lambda: floor(images, features.weights)
    compiled = torch.compile(floor, fullgraph=True, dynamic=False)
    if device != "cpu":
        calls["floor compiled"] = lambda: compiled(images, features.weights)
    module = fv.load_model(MODEL).module.to(device)
    calls["published script"] = make_reference_step(module, LAYER, list(range(batch)), size=model.size[0])
    seconds: dict[str, float] = {}
    first: dict[str, float] = {}
    for name, call in calls.items():
        steps = _STEPS if device != "cpu" and name.startswith("compile=") else 1
        first[name] = _seconds(call, device)
        samples = [_seconds(call, device) / steps for _ in range(_ROUNDS if device != "cpu" else 1)]
        seconds[name] = timing(samples).median
    with FlopCounterMode(display=False) as counter:
        floor(images, features.weights)
    step = min(value for name, value in seconds.items() if name.startswith("compile="))
    lowest = min(value for name, value in seconds.items() if name.startswith("floor"))
    moved = 8 * 2**30 if device != "cpu" else 2**26
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    copy = timing([_seconds(source.clone, device) for _ in range(_ROUNDS)]).median
    return {
        "step/floor": step / lowest,
        "script/step": seconds["published script"] / step,
        "TFLOP/s of the step": counter.get_total_flops() / 1e12 / step,
        "GB/s of a copy": moved / 1e9 / copy,
        "seconds": seconds,
        "seconds of the first call": first,
    }


def _stepping(made: Renderer, steps: int) -> Callable[[], object]:
    state, target = made.init(list(made.filters), 0)
    held = [state]

    def call() -> None:
        held[0], _ = run(made.step, made.weights, held[0], target, steps=steps)

    return call


def _seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(device: str) -> dict[str, Any]:
    """The batch size that the memory probe plans, and the peak that steps of it take: eager, compiled and captured."""
    model = fv.load_model(MODEL)
    make = functools.partial(fv.make_renderer, model, WIDE_LAYER, range(WIDTH), device=device)
    batch = make(compile="no").batch_size
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    peaks = {}
    for name, compile in (("eager", "no"), ("compiled", "yes"), ("captured", "cudagraphs")):
        made = make(compile=compile, batch_size=batch)
        state, target = made.init(list(range(batch)), 0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run(made.step, made.weights, state, target, steps=2)
        peaks[f"peak/free, {name}"] = torch.cuda.max_memory_allocated(device) / free
    return {"batch size": batch, **peaks}


def sweeps(device: str) -> dict[str, Any]:
    """Whole networks from loading the model to the last committed unit, with cold and with warm compiler caches."""
    result: dict[str, Any] = {}
    filters = None if device != "cpu" else 1
    options: dict[str, Any] = {"steps": 32} if device != "cpu" else {"steps": 1, "size": 64}
    for spec in SWEPT[: 2 if device != "cpu" else 1]:
        name = spec.partition(":")[2].partition("@")[0]
        for caches in ("cold", "warm") if device != "cpu" else ("cold",):
            torch._dynamo.reset()
            with inductor_config.patch(fx_graph_cache=caches == "warm"):
                parts, counts = run_sweep(lambda spec=spec: fv.load_model(spec), filters, device, **options)
            result[f"{name}, {caches}: seconds"] = parts.total
            result[f"{name}, {caches}"] = {**counts, **parts._asdict()}
    return result


def candidates(device: str) -> dict[str, Any]:
    """What a GPU has to decide on: the seconds of one way relative to those of another.

    A run with the random numbers of 16 steps drawn at once, against one whose steps draw their own; and sampling by
    indexing, against ``grid_sample``, whose gradient adds by atomics.
    """
    batch = BATCH if device != "cpu" else 4
    model = fv.load_model(MODEL)
    keys, target = fv.filter_keys(0, LAYER, range(batch), device=device), torch.arange(batch, device=device)
    resolved = resolve(model, LAYER, range(batch), RenderOptions(device=device), None)
    ascent = compose(resolved).ascent
    state = ascent.init(keys)
    images = torch.rand(batch, 3, *model.size, device=device)
    runs, samplings = {}, {}
    for ahead in (False, True):
        how = "cudagraphs" if device != "cpu" else "no"
        step = select_step(ascent, how, device=resolved.device, pixels=0, exported=True, ahead=ahead)
        runs[ahead] = _median(functools.partial(run, step, resolved.features.weights, state, target, steps=16), device)
    for deterministic in (False, True):
        transform = fv.named_transform("small", image=model.size, size=model.size, deterministic=deterministic)
        draws = torch.vmap(transform.draw)(keys)
        gradient = torch.func.grad(lambda x, t=transform, d=draws: torch.vmap(t.apply)(x, d).square().sum())
        with algorithms(resolved.device, deterministic=deterministic):
            samplings[deterministic] = _median(functools.partial(gradient, images), device)
    return {
        "draws ahead / draws in each step": runs[True] / runs[False],
        "sampling by indexing / grid_sample": samplings[True] / samplings[False],
    }


def fused_convolutions(device: str) -> dict[str, Any]:
    """cuDNN's kernel of convolution, bias and ReLU against three operations, over all convolutions of the model."""
    model = fv.load_model(MODEL)
    inputs: list[tuple[torch.Size, torch.nn.Conv2d]] = []

    def keep(convolution: Any, args: Any, _: Any) -> None:
        inputs.append((args[0].shape, convolution))

    convolutions = [module for module in model.module.modules() if isinstance(module, torch.nn.Conv2d)]
    handles = [convolution.register_forward_hook(keep) for convolution in convolutions]
    with torch.no_grad():
        model.module(torch.zeros(1, 3, *model.size))
    for handle in handles:
        handle.remove()
    cudnn_convolution_relu: Any = torch.cudnn_convolution_relu
    convolve: Any = torch.conv2d
    seconds, errors = {"fused": 0.0, "three": 0.0}, []
    for shape, conv in inputs:
        dtype, layout = torch.bfloat16, torch.channels_last
        x = torch.rand(BATCH, *shape[1:], device=device).to(dtype, memory_format=layout)
        kernel = conv.weight.detach().to(device, dtype, memory_format=layout)
        bias = torch.rand(len(kernel), device=device).to(dtype)
        settings = conv.stride, conv.padding, conv.dilation, conv.groups
        calls: dict[str, Callable[[], Tensor]] = {
            "fused": functools.partial(cudnn_convolution_relu, x, kernel, bias, *settings),
            "three": lambda x=x, k=kernel, b=bias, s=settings: convolve(x, k, b, *s).relu_(),
        }
        with algorithms(x.device, deterministic=False):
            values = {name: call().double() for name, call in calls.items()}
            for name, call in calls.items():
                seconds[name] += _median(call, device)
        errors.append(((values["fused"] - values["three"]).abs().max() / values["three"].abs().max()).item())
    return {"fused / three operations": seconds["fused"] / seconds["three"], "largest difference": max(errors)}


def _median(call: Callable[[], object], device: str) -> float:
    call()
    return timing([_seconds(call, device) for _ in range(_ROUNDS if device != "cpu" else 1)]).median


PARTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "correctness": correctness,
    "reruns": reruns,
    "host waits": host_waits,
    "speed": speed,
    "candidates": candidates,
    "fused convolutions": fused_convolutions,
    "memory": memory,
    "sweeps": sweeps,
}
_CUDA_ONLY = ("host waits", "fused convolutions", "memory")
