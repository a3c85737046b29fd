"""What every benchmark needs: fair timing, the machine's description, and a table beside the JSON."""

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

RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    iqr: float
    """Between the quartiles."""
    samples: list[float]


class Case(NamedTuple):
    """A model and the layer that is measured in it."""

    name: str
    model: fv.Model
    layer: str
    trained: bool


def interleave(calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Times several functions in turn, round by round, so that whatever else the machine does meets all of them.

    Each round has an order of its own, from seed 0, so that none always runs behind the same other one.

    Args:
        calls: name -> what is timed.
        rounds: timed calls of each, at least 2.
        warmup: untimed calls of each, first.

    Raises:
        ValueError: fewer than 2 rounds.
    """
    if rounds < 2:
        raise ValueError(f"an interquartile range needs at least 2 rounds, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffler = list(calls), random.Random(0)
    for number in range(warmup + rounds):
        shuffler.shuffle(order)
        for name in order:
            _wait()
            start = time.perf_counter()
            calls[name]()
            _wait()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: timing(samples) for name, samples in seconds.items()}


def timing(samples: Sequence[float]) -> Timing:
    """Median and interquartile range of at least 2 samples."""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(statistics.median(samples), high - low, list(samples))


def cases(names: Sequence[str], device: str) -> list[Case]:
    """The models of the timings; SqueezeNet trained where its weights are there, the others with random weights."""
    layers = {
        "googlenet": "inception4c.branch4.1.conv",
        "resnet18": "layer3.1.conv2",
        "squeezenet1_0": "features.9.expand3x3",
        "vit_b_16": "encoder.layers.encoder_layer_5.mlp",
    }
    found = []
    for name in names:
        model = fv.load_model(f"torchvision:{name}@none")
        trained = load_squeezenet() if name == "squeezenet1_0" else None
        module: nn.Module = trained or model.module
        found.append(Case(name, model._replace(module=module.to(device)), layers[name], trained is not None))
    return found


def machine(device: str) -> dict[str, Any]:
    """Where and with what something was measured."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_after": os.getloadavg()[0],  # of the last minute; the benchmark's own is in it
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def peak_memory(device: str) -> float:
    """Bytes: the most that torch has held on a CUDA device, or this process in main memory, so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        # Not getrusage's: on Linux a process inherits that from the one that started it.
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def report(
    name: str, device: str, data: Mapping[str, Any], table: Sequence[Sequence[object]], *, measured_here: bool = True
) -> None:
    """Prints a table (first row: headings) and writes the data to ``results/NAME-DEVICE.json``.

    With them go the machine, and this process's peak memory if what was measured ran in it.
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
    whole = {"machine": machine(device), "seed": 0, **peak, **data}
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def sheet(images: Tensor, *, rows: int) -> PIL.Image.Image:
    """Images ``(n, c, h, w)`` on one sheet, as many in each row."""
    count = len(images)
    blank = torch.zeros(count)
    everything = fv.Result(
        images=images.cpu(),
        activations=blank,
        scores=blank,
        best_step=blank.long(),
        filters=tuple(range(count)),
        status=("ok",) * count,
        history=blank[None],
        steps=blank.long(),
    )
    return everything.grid(columns=count // rows)


def _processor() -> str:
    """The processor's name; platform.processor() is empty on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
