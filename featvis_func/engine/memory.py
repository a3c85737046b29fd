"""The batch size that a device's memory holds, and what says that it ran out."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from featvis_func.engine.step import Step
from featvis_func.types import State, Target, Weights

InitFilters: TypeAlias = Callable[[Sequence[int]], tuple[State, Target]]
"""filter numbers -> their state before the first step, and their targets."""

# The fraction of a device's free memory that a batch is planned to fill; the rest is for what the plan does not see.
_MEMORY_FRACTION = 0.8
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")
# A larger batch is no faster: it only waits for its slowest image.
_MAX_BATCH_SIZE = 256


def probe_batch_size(
    step: Step,
    weights: Weights,
    init: InitFilters,
    filters: Sequence[int],
    *,
    device: torch.device,
    most: int = _MAX_BATCH_SIZE,
) -> int:
    """Measure how many filters at a time the memory of a CUDA device holds, from steps of 2 and of 6 filters.

    Args:
        step, weights, init: as for :func:`~featvis_func.engine.batching.run_batched`; the step not compiled.
        filters: any filter numbers, at least 1.
        device: a CUDA device.
        most: upper bound.

    Returns:
        At least 1; from 8 on a multiple of 8.
    """
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    peaks: list[float] = []
    for count in (2, 2, 6):  # the first one allocates what all have in common
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            step(weights, *init([filters[i % len(filters)] for i in range(count)]))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return max(1, count // 2)  # run_batched halves it again if it must
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    return plan_batch_size(peaks[1], peaks[2], free, most=most)


def plan_batch_size(two: float, six: float, free: float, *, most: int = _MAX_BATCH_SIZE) -> int:
    """The batch size that fills a memory, by a line through the bytes that 2 and 6 filters take.

    Args:
        two, six: peak bytes of a step of 2 and of 6 filters.
        free: bytes to fill; four fifths of them are planned with.
        most: upper bound.

    Returns:
        At least 1; from 8 on a multiple of 8.

    >>> plan_batch_size(3e8, 7e8, 10.2e9)
    80
    """
    each = max((six - two) / 4, 1.0)
    count = int(max(1.0, min(most, (_MEMORY_FRACTION * free - (two - 2 * each)) / each)))
    return count - count % 8 if count > 8 else count


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own, or one of a device or library."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(s in str(error) for s in _OUT_OF_MEMORY)
