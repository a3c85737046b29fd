"""Seconds and peak memory per filter: by the number of filters of a run, and by how many are rendered at a time.

Each measurement is a process of its own, because a process's peak memory only ever grows. Times are of the steps; the
trace before them is the same for any number of filters, and is left out.
"""

import multiprocessing
import signal
import time
import warnings
from typing import NamedTuple

import torch

import featvis_func as fv
from benchmarks.common import cases, peak_memory, report
from benchmarks.step import OurStep
from featvis_func.engine.device import CPU_BATCH_SIZE, is_out_of_memory

MODEL = "squeezenet1_0"
FILTERS = (1, 8, 32, 128)
SLOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Of the runs over many filters, at whose start the memory is fetched; and of those that look for the memory's end.
STEPS, FEW_STEPS = 16, 4
# Seconds after which a larger batch is not tried: only memory should end the table.
_LONGEST = 30.0


class Measurement(NamedTuple):
    """One run in a process of its own."""

    filters: int
    slots: int
    seconds_per_filter_step: float
    peak_mb: float
    """Of the whole process; on CUDA, of what torch holds there."""
    before_mb: float
    """Before the first step: interpreter, libraries, model."""


def child(filters: int, slots: int, steps: int, device: str) -> Measurement | None:
    """Runs some filters for a few steps; None where the memory does not suffice."""
    parts = OurStep(cases((MODEL,), device)[0], device)
    channels = parts.features.shapes[next(iter(parts.features.shapes))][0]

    def begin(chosen: object) -> tuple[fv.State, torch.Tensor]:
        numbers = [int(number) % channels for number in chosen]  # type: ignore[attr-defined]
        return parts.begin(numbers), torch.tensor(numbers, device=device)

    def run(count: int) -> None:
        width = min(slots, count)
        fv.run_batched(parts.step, parts.features.weights, begin, range(count), steps=steps, slots=width)

    before = peak_memory(device)
    try:
        run(min(filters, slots))  # warm-up
        start = time.perf_counter()
        run(filters)
        if device == "cuda":
            torch.cuda.synchronize()
    except (RuntimeError, MemoryError, UserWarning) as error:
        if is_out_of_memory(error) or isinstance(error, UserWarning):
            return None
        raise
    seconds = time.perf_counter() - start
    return Measurement(filters, slots, seconds / filters / steps, peak_memory(device) / 1e6, before / 1e6)


def _child(connection: object, filters: int, slots: int, steps: int, device: str) -> None:
    warnings.filterwarnings("error", message="out of memory")
    connection.send(child(filters, slots, steps, device))  # type: ignore[attr-defined]


def measure(filters: int, slots: int, steps: int, device: str) -> Measurement | None:
    """:func:`child` in a fresh process; None also where the system ended it for its memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, filters, slots, steps, device))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return None
        raise RuntimeError(f"the run of {filters} filters, {slots} at a time, failed; see above") from error
    finally:
        process.join()


def line(points: list[Measurement]) -> tuple[float, float, float]:
    """Least squares through (slots, peak): MB at no filter, MB per filter, and the largest deviation as a share."""
    count = len(points)
    xs, ys = [p.slots for p in points], [p.peak_mb for p in points]
    mx, my = sum(xs) / count, sum(ys) / count
    slope = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)
    start = my - slope * mx
    return start, slope, max(abs(start + slope * x - y) / y for x, y in zip(xs, ys, strict=True))


def main(device: str, rounds: int) -> None:
    """Prints and writes both tables. One run each: ``rounds`` has no effect."""
    slots = CPU_BATCH_SIZE if device == "cpu" else 64
    by_filters = [m for count in FILTERS if (m := measure(count, slots, STEPS, device))]
    by_slots: list[Measurement] = []
    for width in SLOTS:
        found = measure(width, width, FEW_STEPS, device)
        if found is None:
            print(f"{width} filters at a time do not fit")
            break
        by_slots.append(found)
        if found.seconds_per_filter_step * width * FEW_STEPS > _LONGEST:
            break
    start, slope, deviation = line([m for m in by_slots if m.slots >= 4])
    table: list[list[object]] = [[*Measurement._fields], *(list(m) for m in (*by_filters, *by_slots))]
    flat = [m.seconds_per_filter_step for m in by_filters if m.filters >= 8]
    summary = {
        "spread_from_8_filters_on": max(flat) / min(flat) - 1,
        "peak_mb_without_filters": start,
        "peak_mb_per_filter": slope,
        "largest_deviation_from_the_line": deviation,
    }
    data = {
        "model": MODEL,
        "steps": STEPS,
        "by_filters": [m._asdict() for m in by_filters],
        "by_slots": [m._asdict() for m in by_slots],
        **summary,
    }
    report("scaling", device, data, table, measured_here=False)
    print("  ".join(f"{name} {value:.3g}" for name, value in summary.items()))
