"""Seconds and peak memory per filter, by the number of filters of a run and by the batch size.

Each measurement runs in a process of its own, because the peak memory of a process never decreases. Only the steps are
timed: tracing the model takes the same time for any number of filters.
"""

import multiprocessing
import signal
import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch

import featvis_func as fv
from benchmarks.common import cases, peak_memory, report
from benchmarks.step import LibraryStep
from featvis_func.engine.device import default_batch_size
from featvis_func.engine.memory import is_out_of_memory

MODEL = "squeezenet1_0"
FILTERS = (1, 8, 32, 128)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Steps of the runs by number of filters, and of the shorter ones by batch size.
STEPS, FEW_STEPS = 16, 4
# Once a run takes this many seconds, no larger batch is tried.
_LONGEST = 30.0


class Measurement(NamedTuple):
    """One run in a process of its own."""

    filters: int
    batch_size: int
    seconds_per_filter_step: float
    peak_mb: float
    """Of the whole process; on CUDA, allocated by torch on the device."""
    before_mb: float
    """Peak before the first step: interpreter, libraries, model."""


def child(filters: int, batch_size: int, steps: int, device: str) -> Measurement | None:
    """Run some filters for a few steps in this process; return ``None`` if memory runs out."""
    library = LibraryStep(cases((MODEL,), device)[0], device)
    channels = library.features.shapes[next(iter(library.features.shapes))][0]

    def init(chosen: Sequence[int]) -> tuple[fv.State, torch.Tensor]:
        numbers = [int(number) % channels for number in chosen]
        return library.init(numbers), torch.tensor(numbers, device=device)

    def run(count: int) -> None:
        fv.run_batched(
            library.step,
            library.features.weights,
            init,
            range(count),
            steps=steps,
            batch_size=min(batch_size, count),
            retain_memory=True,
        )

    before = peak_memory(device)
    try:
        run(min(filters, batch_size))  # warm-up
        start = time.perf_counter()
        run(filters)
        if device == "cuda":
            torch.cuda.synchronize()
    except (RuntimeError, MemoryError, UserWarning) as error:
        if is_out_of_memory(error) or isinstance(error, UserWarning):
            return None
        raise
    seconds = time.perf_counter() - start
    return Measurement(filters, batch_size, seconds / filters / steps, peak_memory(device) / 1e6, before / 1e6)


def _child(connection: object, filters: int, batch_size: int, steps: int, device: str) -> None:
    warnings.filterwarnings("error", message="out of memory")
    connection.send(child(filters, batch_size, steps, device))  # type: ignore[attr-defined]


def measure(filters: int, batch_size: int, steps: int, device: str) -> Measurement | None:
    """Run :func:`child` in a new process; return ``None`` also if the system killed it for its memory."""
    context = multiprocessing.get_context("spawn")
    connection, child_connection = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(child_connection, filters, batch_size, steps, device))
    process.start()
    child_connection.close()
    try:
        return connection.recv()
    except EOFError as error:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return None
        raise RuntimeError(f"the run of {filters} filters with batch_size={batch_size} failed; see above") from error
    finally:
        process.join()


def fit_line(points: list[Measurement]) -> tuple[float, float, float]:
    """Fit the peak memory by a line in the batch size, by least squares.

    Returns:
        MB at batch size 0, MB per filter, and the largest relative deviation of a point from the line.
    """
    count = len(points)
    xs, ys = [p.batch_size for p in points], [p.peak_mb for p in points]
    mean_x, mean_y = sum(xs) / count, sum(ys) / count
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    start = mean_y - slope * mean_x
    return start, slope, max(abs(start + slope * x - y) / y for x, y in zip(xs, ys, strict=True))


def main(device: str, rounds: int) -> None:
    """Print and write both tables. Each run is timed once: ``rounds`` has no effect."""
    batch_size = default_batch_size(torch.device(device), (224, 224))
    by_filters = [m for count in FILTERS if (m := measure(count, batch_size, STEPS, device))]
    by_batch_size: list[Measurement] = []
    for size in BATCH_SIZES:
        measurement = measure(size, size, FEW_STEPS, device)
        if measurement is None:
            print(f"a batch of {size} filters does not fit into memory")
            break
        by_batch_size.append(measurement)
        if measurement.seconds_per_filter_step * size * FEW_STEPS > _LONGEST:
            break
    start, slope, deviation = fit_line([m for m in by_batch_size if m.batch_size >= 4])
    table: list[list[object]] = [[*Measurement._fields], *(list(m) for m in (*by_filters, *by_batch_size))]
    seconds = [m.seconds_per_filter_step for m in by_filters if m.filters >= 8]
    summary = {
        "spread_from_8_filters_on": max(seconds) / min(seconds) - 1,
        "peak_mb_without_filters": start,
        "peak_mb_per_filter": slope,
        "largest_deviation_from_the_line": deviation,
    }
    data = {
        "model": MODEL,
        "steps": STEPS,
        "by_filters": [m._asdict() for m in by_filters],
        "by_batch_size": [m._asdict() for m in by_batch_size],
        **summary,
    }
    report("scaling", device, data, table, measured_here=False)
    print("  ".join(f"{name} {value:.3g}" for name, value in summary.items()))
