"""How a run uses its device: compiled, captured or neither, deterministic algorithms, copies that nobody waits for."""

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from featvis_func.engine.ahead import AheadStep
from featvis_func.engine.capture import CapturedStep
from featvis_func.engine.memory import is_out_of_memory
from featvis_func.engine.run import Step
from featvis_func.engine.step import Ascent, compile_step
from featvis_func.types import Info, State, Target, Weights
from featvis_func.validation import first_line

# Compiling pays from about this many pixels (filters x steps x h x w). On a CPU it takes some 40 s and then saves 1 to
# 3 ms for each image of 224 x 224 pixels and step, in bfloat16; of TextureNet's smaller ones nothing. On CUDA nothing
# was measured: of a step of 256 such images, which moves 49 GB, it saves a third, 7 ms at 2.5 TB/s; what it saves the
# host, a captured step saves as well.
_COMPILE_PAYS = {"cpu": 10**9, "cuda": 10**11}

# Filters at a time on a CPU. Of 4, 8, 16 and 32 images of 224 x 224 pixels, an eager step of 16 took as long per image
# as one of 8 (SqueezeNet), 3% less (ResNet-18, MobileNet-v2) or 6% (GoogLeNet), of TextureNet's smaller ones 14% less;
# 32 took at most 5% less again. Compiled steps keep 8, which pads less, and larger images because of their memory.
CPU_BATCH_SIZE = 16
SMALL_CPU_BATCH_SIZE = 8
_LARGE = 2**16  # pixels of an image, of a video times frames
# Filters at a time on an accelerator where memory does not decide: with deterministic algorithms, since the rounding
# depends on the batch size, and in a unit of a sweep.
FIXED_BATCH_SIZE = 64
_deterministic_lock = threading.Lock()


def default_batch_size(device: torch.device, size: Sequence[int], *, compiled: bool = False) -> int:
    """Filters at a time where neither the user nor memory decides.

    Args:
        device: where they are rendered.
        size: ``(h, w)`` of the model's input, ``(t, h, w)`` or ``(t,)``.
        compiled: whether the step is compiled.

    >>> cpu = torch.device("cpu")
    >>> default_batch_size(cpu, (224, 224)), default_batch_size(cpu, (384, 384))
    (16, 8)
    """
    if device.type != "cpu":
        return FIXED_BATCH_SIZE
    return SMALL_CPU_BATCH_SIZE if compiled or math.prod(size) > _LARGE else CPU_BATCH_SIZE


def fit_batch_size(
    batch_size: int, filters: int, device: torch.device, *, group: int = 1, compiled: bool = False
) -> int:
    """The batch size for some filters: no larger than they need, but large enough for the usual rounding.

    Of an eager step on a CPU it is such that the last batch is nearly full, since an empty row takes as long as any.

    On a CPU, convolutions divide a batch among the threads. Where there are fewer images than threads, they divide the
    images, too, and sum in another order; a single image also takes other kernels. Ascent amplifies the difference. Of
    two networks, with 1 to 8 threads, batches of 2 or more images, and of at least as many as threads, had equal bits.
    A compiled step rounds in its own way in every size.

    Args:
        batch_size: largest.
        filters: number of filters.
        device: where they are rendered.
        group: filters that depend on each other, of which the batch has whole groups, as ``batch_size`` has.
        compiled: whether the step is compiled.

    >>> fit_batch_size(16, 100, torch.device("cpu")), fit_batch_size(1, 100, torch.device("cpu"))
    (15, 1)
    """
    needed = filters
    if device.type == "cpu" and compiled:
        needed = max(SMALL_CPU_BATCH_SIZE, filters)
    elif device.type == "cpu":
        batches = math.ceil(max(filters, 1) / batch_size)
        needed = max(2, min(SMALL_CPU_BATCH_SIZE, torch.get_num_threads()), math.ceil(filters / batches))
    return math.ceil(min(batch_size, needed) / group) * group


def check_device(name: str | torch.device) -> None:
    """Raise ValueError if this machine has no such device."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # no such device; not compiled in; a plugin is missing
        raise ValueError(f"no device {str(name)!r} on this machine: {first_line(error)}") from error


def compiling_pays(device: torch.device, pixels: int) -> bool:
    """Whether compiling a step saves more time than it takes.

    Args:
        device: where it will run.
        pixels: as for :func:`select_step`.
    """
    return pixels > _COMPILE_PAYS.get(device.type, math.inf)


def select_step(
    ascent: Ascent,
    compile: str,
    *,
    device: torch.device,
    pixels: int,
    exported: bool,
    ahead: bool = True,
    name: str = "the model",
) -> Step:
    """The step as it will run: as it is, compiled, or captured as a CUDA graph.

    Args:
        ascent: whose step it is.
        compile: ``"yes"``, ``"no"``, ``"cudagraphs"`` or ``"auto"``, see :func:`featvis_func.render`.
        device: where it will run.
        pixels: of the whole run: filters x steps x h x w, of videos x frames, of signals their samples.
        exported: whether the backbone is an exported graph; only such a step can be compiled.
        ahead: whether a step that is not to be compiled has its random numbers drawn for several steps at once.
        name: of the model, for the error message.

    Returns:
        A step that compiles, as a :class:`CompiledStep`, or is captured at its first call, or that runs as it is.

    Raises:
        ValueError: compiling was requested, and the backbone is not an exported graph.
    """

    def eager(wrap: Callable[[Step], Step] | None = None) -> Step:
        if ahead:
            return AheadStep(ascent, wrap)
        return ascent.step if wrap is None else wrap(ascent.step)

    if compile == "auto" and exported:
        if compiling_pays(device, pixels):
            return CompiledStep(ascent.step, fallback=ascent.step)
        compile = "cudagraphs" if device.type == "cuda" else "no"
    if compile in ("auto", "no"):
        return eager()
    if compile == "cudagraphs" and device.type == "cuda":
        return eager(CapturedStep)
    if not exported:
        raise ValueError(f"{name} cannot be exported and therefore not be compiled; use compile=False")
    return CompiledStep(ascent.step)


def begin_copy(values: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """Begin to copy a tensor to the CPU, without waiting for its device.

    Returns:
        The copy, and a function that returns when its values have arrived.
    """
    if values.device.type != "cuda":
        return values.cpu(), lambda: None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(values.device))
    return copy, event.synchronize


@contextmanager
def algorithms(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """Use torch's deterministic algorithms within the block, or the fastest ones; restore its settings after it.

    On CUDA the fastest convolutions are found by measuring each that there is once, since all steps have the same
    shapes. The settings are the process's: threads that need deterministic algorithms take turns.
    """
    if deterministic:
        with _deterministic_lock, _deterministic():
            yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


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


class CompiledStep:
    """A step that compiles without warnings, once per batch size.

    Args:
        step: of an :class:`~featvis_func.engine.step.Ascent`.
        fallback: what runs, after a warning, if compiling fails. ``None``: the error is raised.
    """

    def __init__(self, step: Step, *, fallback: Step | None = None) -> None:
        self._step = compile_step(step)
        self._fallback = fallback
        self._compiled_sizes: set[int] = set()

    def __call__(self, weights: Weights, state: State, target: Target) -> tuple[State, Info]:
        """Take one step."""
        size = len(state.step)
        if size in self._compiled_sizes:
            return self._step(weights, state, target)
        try:
            with warnings.catch_warnings():
                # Inductor warns at each Fourier transform, which it leaves to torch in any case.
                warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
                result = self._step(weights, state, target)
        except Exception as error:
            if self._fallback is None or is_out_of_memory(error):
                raise
            warnings.warn(f"going on without torch.compile, which failed: {first_line(error)}", stacklevel=2)
            self._step = self._fallback
            result = self._step(weights, state, target)
        self._compiled_sizes.add(size)
        return result
