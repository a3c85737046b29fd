"""What the benchmarks share: interleaved timing, the measured models, a description of the machine, and reports."""

import json
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
import torchvision
from torch import Tensor, nn

import featvis_func as fv
from benchmarks.evaluate import load_squeezenet
from featvis_func.validation import check_int

RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """Seconds per call."""

    median: float
    iqr: float
    """Interquartile range; 0 for a single sample."""
    samples: list[float]


class Case(NamedTuple):
    """A model and the layer that is measured in it."""

    name: str
    model: fv.Model
    layer: str
    trained: bool


def interleave(calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Time several functions alternately, so that other load on the machine affects all of them alike.

    Each round calls every function once, in a random order (seed 0), so that no function always follows the same other
    one.

    Args:
        calls: name -> function to time.
        rounds: number of timed calls of each function, at least 1.
        warmup: number of untimed calls of each function before them.

    Raises:
        ValueError: fewer than 1 round.
    """
    check_int("rounds", rounds, 1)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffler = list(calls), random.Random(0)
    for number in range(warmup + rounds):
        shuffler.shuffle(order)
        for name in order:
            _synchronize()
            start = time.perf_counter()
            calls[name]()
            _synchronize()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: timing(samples) for name, samples in seconds.items()}


def timing(samples: Sequence[float]) -> Timing:
    """Return the median and the interquartile range of at least 1 sample."""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (0.0, 0.0, 0.0)
    return Timing(statistics.median(samples), high - low, list(samples))


def cases(names: Sequence[str], device: str) -> list[Case]:
    """Load the timed models: SqueezeNet with its trained weights if their file exists, all others with random weights.

    The speed of a step does not depend on the values of the weights.
    """
    layers = {
        "googlenet": "inception4c.branch4.1.conv",
        "resnet18": "layer3.1.conv2",
        "squeezenet1_0": "features.9.expand3x3",
        "vit_b_16": "encoder.layers.encoder_layer_5.mlp",
    }
    loaded = []
    for name in names:
        model = fv.load_model(f"torchvision:{name}@none")
        trained = load_squeezenet() if name == "squeezenet1_0" else None
        module: nn.Module = trained or model.module
        loaded.append(Case(name, model._replace(module=module.to(device)), layers[name], trained is not None))
    return loaded


def machine(device: str) -> dict[str, Any]:
    """Describe the machine and the versions that something was measured with."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_after": os.getloadavg()[0],  # average of the last minute, including the benchmark itself
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def peak_memory(device: str) -> float:
    """Return the largest number of bytes allocated so far: by torch on a CUDA device, or by this process on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        # Not getrusage: on Linux its value is inherited from the parent process.
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def report(
    name: str, device: str, data: Mapping[str, Any], table: Sequence[Sequence[object]], *, measured_here: bool = True
) -> None:
    """Print a table and write the data, with a description of the machine, to ``results/NAME-DEVICE.json``.

    Args:
        name: of the benchmark.
        device: that it ran on.
        data: what was measured, as JSON holds it.
        table: rows of cells; the first row holds the headings.
        measured_here: whether it ran in this process, whose peak memory is then part of the report.
    """
    rows = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in table]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"\n{name} on {device}")
    for row in rows:
        print(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device}.json"
    peak = {"peak_memory_mb": peak_memory(device) / 1e6} if measured_here else {}
    content = {"machine": machine(device), "seed": 0, **peak, **data}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def contact_sheet(images: Tensor, *, rows: int) -> PIL.Image.Image:
    """Arrange images ``(n, c, h, w)`` in a grid of ``rows`` rows of equal length."""
    count = len(images)
    blank = torch.zeros(count)
    result = fv.Result(
        images=images.cpu(),
        activations=blank,
        scores=blank,
        best_step=blank.long(),
        filters=tuple(range(count)),
        status=("ok",) * count,
        history=blank[None],
        steps=blank.long(),
    )
    return result.grid(columns=count // rows)


def _processor_name() -> str:
    """The processor's name; on Linux platform.processor() is empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
