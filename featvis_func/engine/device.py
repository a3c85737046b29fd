"""How a run uses its device: whether the step is compiled, how much memory it may fill, whether it can be repeated."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

from featvis_func.engine.step import Step, compile_step
from featvis_func.types import Info, State, Target, Weights
from featvis_func.validation import first_line

Begin: TypeAlias = Callable[[Sequence[int]], tuple[State, Target]]
"""filter numbers -> their state before the first step, and their targets."""

COMPILE = ("auto", "yes", "no", "cudagraphs")
"""What :func:`render` can be told of compiling."""

# On a CPU compiling takes some 50 s, and then saves some 25 to 120 ms of a step of 8 images of 224 x 224 pixels: from
# about this many pixels (filters x steps x h x w) on it pays.
_PAYS_ON_CPU = 5 * 10**8

# Filters at a time on a CPU: of 1 to 16, 8 took the least time per filter, or all but so (SqueezeNet, GoogLeNet,
# ResNet-18).
CPU_BATCH_SIZE = 8
_turn = threading.Lock()
# Of a device's free memory, what a batch is planned to fill; the rest is for what the plan does not see.
_FILL = 0.8
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")
# Beyond this a batch only waits for its slowest image.
_MAX_BATCH_SIZE = 256


def check_compile(wanted: bool | str) -> str:
    """One of :data:`COMPILE`, from what :func:`render` was given; raises ValueError where it is none."""
    word = ("yes" if wanted else "no") if isinstance(wanted, bool) else wanted
    if word not in COMPILE:
        raise ValueError(f"compile must be one of {', '.join(COMPILE)}, got {word!r}")
    return word


def check_device(name: str | torch.device) -> None:
    """Raises ValueError if there is no such device here."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # no such device; not compiled in; a plugin is missing
        raise ValueError(f"no device {str(name)!r} here: {first_line(error)}") from error


def select_step(
    step: Step, compile: str, *, device: torch.device, pixels: int, exported: bool, name: str = "the model"
) -> Step:
    """The step as it shall run.

    Args:
        step: from :func:`~featvis_func.make_step`.
        compile: one of :data:`COMPILE`.
        device: where it will run.
        pixels: of the whole run: filters x steps x h x w.
        exported: whether the backbone is a graph, without which there is nothing to compile.
        name: of the model, for the error.

    Returns:
        A step that compiles at its first call, or the one that was given.

    Raises:
        ValueError: an unknown word, or compiling was asked for and the backbone is no graph.
    """
    compile = check_compile(compile)
    if compile == "auto":
        pays = device.type == "cuda" or (device.type == "cpu" and pixels > _PAYS_ON_CPU)
        return _compiled(step, otherwise=step) if exported and pays else step
    if compile == "no":
        return step
    if not exported:
        raise ValueError(f"{name} cannot be exported, and so not compiled; use compile=False")
    return _compiled(step, cudagraphs=compile == "cudagraphs")


def probe_batch_size(
    step: Step,
    weights: Weights,
    begin: Begin,
    filters: Sequence[int],
    *,
    device: torch.device,
    most: int = _MAX_BATCH_SIZE,
) -> int:
    """How many filters at a time the memory of a CUDA device takes, from one step of 2 and one of 6 filters.

    Args:
        step, weights, begin: as for :func:`run_batched`; the step not compiled.
        filters: at least 1; any will do.
        device: a CUDA device.
        most: no more than this.

    Returns:
        At least 1; from 8 on a multiple of 8.
    """
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    peaks: list[float] = []
    for count in (2, 2, 6):  # the first one makes what all share
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            step(weights, *begin([filters[i % len(filters)] for i in range(count)]))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return max(1, count // 2)  # run_batched halves it again, if it must
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    return plan_batch_size(peaks[1], peaks[2], free, most=most)


def plan_batch_size(two: float, six: float, free: float, *, most: int = _MAX_BATCH_SIZE) -> int:
    """The batch that fills a memory, from the bytes that 2 and 6 filters take: a line through both.

    Args:
        two, six: peak bytes of a step of 2 and of 6 filters.
        free: bytes to fill; four fifths are planned with.
        most: no more than this.

    Returns:
        At least 1; from 8 on a multiple of 8.

    >>> plan_batch_size(3e8, 7e8, 10.2e9)
    80
    """
    each = max((six - two) / 4, 1.0)
    count = int(max(1.0, min(most, (_FILL * free - (two - 2 * each)) / each)))
    return count - count % 8 if count > 8 else count


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own, or one of its devices' and libraries'."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(s in str(error) for s in _OUT_OF_MEMORY)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """If wanted, torch's deterministic algorithms within the block, and its settings as they were after it.

    The settings are the process's: threads that want it take turns.
    """
    if not wanted:
        yield
        return
    with _turn, _deterministic():
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


def _compiled(step: Step, *, cudagraphs: bool = False, otherwise: Step | None = None) -> Step:
    """A step that compiles quietly, once for each width; where that fails, it says so and is another from then on."""
    current = compile_step(step, cudagraphs=cudagraphs)
    tried: set[int] = set()

    def call(weights: Weights, state: State, target: Target) -> tuple[State, Info]:
        nonlocal current
        width = len(state.step)
        if width in tried:
            return current(weights, state, target)
        try:
            with warnings.catch_warnings():
                # Inductor says so of every Fourier transform, which is torch's own either way.
                warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
                result = current(weights, state, target)
        except Exception as error:
            if otherwise is None or is_out_of_memory(error):
                raise
            warnings.warn(f"goes on without torch.compile, which failed: {first_line(error)}", stacklevel=2)
            current = otherwise
            result = current(weights, state, target)
        tried.add(width)
        return result

    return call
