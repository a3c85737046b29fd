"""The batch size that a device's memory holds, and what says that it ran out."""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from featvis_func.engine.run import Step, run
from featvis_func.types import State, Target, Weights

InitFilters: TypeAlias = Callable[[Sequence[int]], tuple[State, Target]]
"""filter numbers -> their state before the first step, and their targets."""

# The fraction of a device's free memory that a batch is planned to fill; the rest is for what the plan does not see.
_MEMORY_FRACTION = 0.8
# The fraction that may be reserved when a batch is tried.
_TRIED_FRACTION = 0.9
# By which a batch is reduced that did not fit when it was tried.
_SHRINK = 0.85
# In the second step a run also holds the state that it began with.
_PROBE_STEPS = 2
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")
# A larger batch is no faster: it only waits for its slowest image.
MAX_BATCH_SIZE = 256


def probe_batch_size(
    make_step: Callable[[], Step],
    weights: Weights,
    init: InitFilters,
    filters: Sequence[int],
    *,
    device: torch.device,
    most: int = MAX_BATCH_SIZE,
) -> int:
    """Find how many filters at a time the memory of a CUDA device holds.

    Steps of 2 and of 6 filters say where to begin; steps of that many are then tried, and of fewer where they take more
    than they may: small batches do not show how large ones fragment the memory.

    Args:
        make_step: returns the step, for each size anew, since a captured one keeps its memory. Not a compiled one,
            since each size would be compiled.
        weights, init: as for :func:`~featvis_func.engine.batching.run_batched`.
        filters: any filter numbers, at least 1.
        device: a CUDA device.
        most: upper bound.

    Returns:
        At least 1; from 8 on a multiple of 8, unless it is the upper bound.
    """
    before = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before

    def peaks(count: int) -> tuple[float, float]:
        """The most bytes that a batch allocates and reserves; infinite if there are not as many."""
        chosen = [filters[i % len(filters)] for i in range(count)]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step = make_step()
            state, target = init(chosen)
            ended = run(step, weights, state, target, steps=_PROBE_STEPS)
            state, target = init(chosen)  # others begin, while the results of these are still there
            del ended
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return math.inf, math.inf
        return torch.cuda.max_memory_allocated(device) - before, torch.cuda.max_memory_reserved(device) - before

    measured: list[float] = []
    for count in (2, 2, 6):  # the first one allocates what all have in common
        allocated, _ = peaks(count)
        if allocated == math.inf:
            return max(1, count // 2)  # run_batched halves it again if it must
        measured.append(allocated)
    count = plan_batch_size(measured[1], measured[2], free, most=most)
    while count > 6:
        _, reserved = peaks(count)
        if reserved <= _TRIED_FRACTION * free:
            break
        count = _round_down(count * (_SHRINK if reserved == math.inf else _TRIED_FRACTION * free / reserved))
    return count


def _round_down(count: float) -> int:
    return int(count) - int(count) % 8 if count > 8 else int(count)


def plan_batch_size(two: float, six: float, free: float, *, most: int = MAX_BATCH_SIZE) -> int:
    """The batch size that fills a memory, by a line through the bytes that 2 and 6 filters take.

    Args:
        two, six: peak bytes of a step of 2 and of 6 filters.
        free: bytes to fill; four fifths of them are planned with.
        most: upper bound.

    Returns:
        At least 1; from 8 on a multiple of 8, unless it is the upper bound.

    >>> plan_batch_size(3e8, 7e8, 10.2e9)
    80
    """
    each = max((six - two) / 4, 1.0)
    count = (_MEMORY_FRACTION * free - (two - 2 * each)) / each
    return most if count >= most else _round_down(max(1.0, count))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own, or one of a device or library."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(s in str(error) for s in _OUT_OF_MEMORY)
