"""Distribution of units over processes: a single process, or one of several that a launcher started.

The Ray engine is in :mod:`featvis_func.sweep.ray_engine`. Workers and folders are the same for all engines.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from featvis_func.sweep.layout import DamagedError, Folder, log_event, unsealed
from featvis_func.sweep.plan import Unit
from featvis_func.sweep.validate import failure_of
from featvis_func.sweep.worker import Done, Worker, pending
from featvis_func.validation import check_name

MOST_FAILED = 0.05
"""Fraction of all units that may fail before a run gives up."""

# Environment variables with the rank, the number of processes, and the rank among the processes of one machine.
_VARIABLES: dict[str, tuple[str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "array": ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", ""),
}
ENGINES = ("local", *_VARIABLES, "ray")
"""``local``: this process renders all units. ``torchrun``, ``srun``, ``array``: each process renders its share, by the
rank that the launcher (SLURM for the last two) has set in the environment. ``ray``: a Ray cluster."""

# A process checks which units the others have done at most every _POLL_SECONDS, and spends at most 1 / _POLL_SHARE of
# its time on it.
_POLL_SECONDS = 2.0
_POLL_SHARE = 50


class Rank(NamedTuple):
    """Rank of a process among those that share a run."""

    number: int = 0
    of: int = 1
    """Number of processes."""
    device: int | None = None
    """Rank among the processes of one machine, if the launcher sets it."""


class TooManyFailedError(RuntimeError):
    """More than :data:`MOST_FAILED` of all units failed."""


def rank_of(engine: str, environment: Mapping[str, str] = os.environ) -> Rank:
    """Return the rank that the launcher has given to this process.

    Args:
        engine: One of :data:`ENGINES`.
        environment: Environment variables.

    Raises:
        ValueError: The engine is unknown, or its variables are missing or invalid.

    >>> rank_of("srun", {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"})
    Rank(number=3, of=8, device=1)
    """
    check_name("engine", engine, ENGINES)
    if engine not in _VARIABLES:
        return Rank()
    number, count, local = _VARIABLES[engine]
    try:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0")) if engine == "array" else 0
        step = max(1, int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))) if engine == "array" else 1
        rank = Rank(
            (int(environment[number]) - first) // step,
            int(environment[count]),
            int(environment[local]) if local in environment else None,
        )
    except KeyError as error:
        raise ValueError(
            f"engine {engine!r} needs the environment variable {error.args[0]}, which its launcher sets"
        ) from None
    except ValueError as error:
        raise ValueError(f"engine {engine!r} needs integers in {number} and {count}: {error}") from error
    if engine == "array" and rank.number >= rank.of:
        raise ValueError(
            f"engine 'array' needs a job array without gaps, such as 0-15, but task {rank.number} is not among"
            f" {rank.of}; submit the complete array again to render what is missing"
        )
    if not 0 <= rank.number < rank.of:
        raise ValueError(f"engine {engine!r} expects {number} in 0 to {rank.of - 1}, got {rank.number}")
    return rank


def share(folder: Folder, rank: Rank) -> tuple[Unit, ...]:
    """The units of one process: a block of consecutive ones, so that it needs few of the layers.

    >>> [(9 * number // 4, 9 * (number + 1) // 4) for number in range(4)]  # of 9 units among 4 processes
    [(0, 2), (2, 4), (4, 6), (6, 9)]
    """
    units = folder.run.units
    return units[len(units) * rank.number // rank.of : len(units) * (rank.number + 1) // rank.of]


def run_units(folder: Folder, work: Callable[[Unit], Done], rank: Rank, *, progress: bool | None = None) -> None:
    """Render those of this process's units that are not done.

    Args:
        folder: The sweep's folder.
        work: A :class:`~featvis_func.sweep.worker.Worker`, or a function of one unit.
        rank: Rank of this process.
        progress: Whether rank 0 shows a progress bar of the complete run on standard error. Default: if standard error
            is a terminal.

    Raises:
        TooManyFailedError: More than :data:`MOST_FAILED` of all units failed, not counting those of layers that cannot
            be rendered.
        OSError: The folder cannot be written.
    """
    units = folder.run.units
    mine = pending(folder, share(folder, rank))
    forget_failures(folder, mine)
    working = work.run(mine) if isinstance(work, Worker) else (work(unit) for unit in mine)
    with watched(folder, rank, progress=progress) as report, closing(working) as finished:
        for done in finished:
            report(done)
            if done.outcome == "failed":  # count the failures of all processes: the share of one may be below 5%
                failed = sum(has_failed(folder, unit) for unit in units)
                check_failures(failed, len(units), done.error)


@contextmanager
def watched(folder: Folder, rank: Rank, *, progress: bool | None) -> Iterator[Callable[[Done], None]]:
    """Show the progress of the complete run, and log its start, each unit and its end.

    Args:
        folder: The sweep's folder.
        rank: Rank of this process; only rank 0 shows the bar.
        progress: As for :func:`run_units`.

    Yields:
        Function to call with the :class:`~featvis_func.sweep.worker.Done` of each unit.
    """
    filters = {unit: len(unit.filters) for unit in folder.run.units}
    log_event(folder.path, "start", rank=rank.number, ranks=rank.of, host=platform.node(), units=len(filters))
    bar = tqdm(
        total=sum(filters.values()),
        desc=folder.path.name,
        unit="filter",
        disable=True if rank.number else (None if progress is None else not progress),
    )
    seen: set[Unit] = set()

    def look() -> None:
        """Add to the bar what this and other processes have done since the last call."""
        new = {unit for unit in filters if unit not in seen and folder.sidecar(unit).exists()}
        seen.update(new)
        bar.update(sum(filters[unit] for unit in new))

    look()
    bar.initial = bar.n  # units that were done before do not count for the speed
    next_look = time.monotonic() + _POLL_SECONDS

    def report(done: Done) -> None:
        nonlocal next_look
        fields = {"error": done.error} if done.error else {}
        log_event(
            folder.path, "unit", unit=done.unit.name, outcome=done.outcome, seconds=round(done.seconds, 3), **fields
        )
        if bar.disable:
            return
        if done.unit not in seen:
            seen.add(done.unit)
            bar.update(filters[done.unit])
        start = time.monotonic()
        if start >= next_look:  # looking for sidecars of other processes takes a while if there are many units
            look()
            next_look = start + max(_POLL_SECONDS, _POLL_SHARE * (time.monotonic() - start))

    ended = "interrupted"
    try:
        with bar:
            yield report
            if not bar.disable:
                look()
        ended = "end"
    except TooManyFailedError:
        ended = "gave up"
        raise
    finally:
        log_event(folder.path, ended, rank=rank.number)


def has_failed(folder: Folder, unit: Unit) -> bool:
    """Whether a unit has failed, though its layer can be rendered."""
    try:
        return not unsealed(folder.failure(unit)).get("refused", False)
    except FileNotFoundError:
        return False
    except DamagedError:
        return True


def check_failures(failed: int, units: int, last: str) -> None:
    """Raise TooManyFailedError if more than :data:`MOST_FAILED` of ``units`` failed; ``last`` is the last error."""
    if failed > MOST_FAILED * units:
        raise TooManyFailedError(
            f"{failed} of {units} units failed, which is more than {MOST_FAILED:.0%}; giving up. The last: {last}"
        )


def forget_failures(folder: Folder, units: Iterable[Unit]) -> None:
    """Delete the recorded errors of units that are about to be tried again."""
    for unit in units:
        folder.failure(unit).unlink(missing_ok=True)


def wait_for_others(folder: Folder, units: Sequence[Unit]) -> None:
    """Wait until every unit is done or has failed.

    torchrun stops all processes when one of them exits with an error. A process that will report failures therefore
    waits for the others before it exits.
    """
    waiting = list(units)
    while waiting:
        waiting = [u for u in pending(folder, waiting) if failure_of(folder, u) is None]
        if waiting:
            time.sleep(_POLL_SECONDS)


def own_device(device: str | torch.device | None, rank: Rank) -> str | torch.device | None:
    """Return the device of a process: several processes of one machine take different GPUs."""
    if rank.device is None or device is None:
        return device
    if torch.device(device) == torch.device("cuda") and torch.cuda.device_count() > 1:  # does not allocate
        return f"cuda:{rank.device % torch.cuda.device_count()}"
    return device


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context manager in which CUDA allocates on this device what names none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
