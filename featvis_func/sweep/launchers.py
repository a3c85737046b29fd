"""Who renders which unit: this process, one process of many, or a cluster. The worker and the folder are the same."""

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from tqdm import tqdm

from featvis_func.sweep.layout import Folder, log_event
from featvis_func.sweep.plan import Unit
from featvis_func.sweep.validate import failure_of
from featvis_func.sweep.worker import Done, pending
from featvis_func.validation import check_name

MOST_FAILED = 0.05
"""The share of all units that may fail before a run gives up."""

# What tells a process its number and how many there are, and which of the machine's devices is its own.
_VARIABLES: dict[str, tuple[str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "array": ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", ""),
}
ENGINES = ("local", *_VARIABLES, "ray")
"""``local``: this process alone. ``torchrun``, ``srun``, ``array``: one of several, each with its share, by what the
launcher (SLURM, for the last two) has put into the environment. ``ray``: a Ray cluster."""

# How often a process looks for what the others have done: so often at most, and for one part of its time in so many.
_LOOK_SECONDS = 2.0
_LOOK_SHARE = 50


class Rank(NamedTuple):
    """One process among those that share a run."""

    number: int = 0
    of: int = 1
    device: int | None = None
    """Of its machine's devices, where the launcher says so."""


class TooManyFailedError(RuntimeError):
    """So many units failed that the rest would hardly do better."""


def rank_of(engine: str, environment: Mapping[str, str] = os.environ) -> Rank:
    """This process's place among those of the launcher.

    Args:
        engine: one of :data:`ENGINES`.
        environment: where the launcher has put it.

    Raises:
        ValueError: an unknown engine, or one whose variables are not set.

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
            f"the engine {engine} needs {error.args[0]} in the environment; its launcher sets it"
        ) from None
    except ValueError as error:
        raise ValueError(f"the engine {engine} needs whole numbers in {number} and {count}: {error}") from error
    if engine == "array" and rank.number >= rank.of:
        raise ValueError("the engine array needs an array without gaps, such as 0-15; submit it whole to do the rest")
    if not 0 <= rank.number < rank.of:
        raise ValueError(f"the engine {engine} has {number} {rank.number} out of {rank.of} processes")
    return rank


def run_units(folder: Folder, work: Callable[[Unit], Done], rank: Rank, *, progress: bool | None = None) -> None:
    """Renders this process's share of the units that are not done.

    Args:
        folder: of the run.
        work: a :class:`~featvis_func.sweep.worker.Worker`.
        rank: this process: of ``of`` processes, each takes every ``of``-th unit.
        progress: a bar for the whole run on the standard error, from rank 0. Default: if that is a terminal.

    Raises:
        TooManyFailedError: more than :data:`MOST_FAILED` of all units failed.
        OSError: the folder cannot be written.
    """
    units = folder.run.units
    mine = set(pending(folder, units[rank.number :: rank.of]))
    forget_failures(folder, mine)
    with watched(folder, rank, progress=progress) as report:
        for unit in units:
            if unit in mine:
                done = work(unit)
                report(done)
                if done.outcome == "failed":  # the others' failures count, too: of many processes none has 5% of all
                    failed = sum(folder.failure(unit).exists() for unit in units)
                    check_failures(failed, len(units), done.error)


@contextmanager
def watched(folder: Folder, rank: Rank, *, progress: bool | None) -> Iterator[Callable[[Done], None]]:
    """A progress bar for the whole run, and a line in the event log for each unit and for how the run ended."""
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
        """What this process and others have done since the last time."""
        new = {unit for unit in filters if unit not in seen and folder.sidecar(unit).exists()}
        seen.update(new)
        bar.update(sum(filters[unit] for unit in new))

    look()
    bar.initial = bar.n  # what was there already says nothing of the speed
    next_look = time.monotonic() + _LOOK_SECONDS

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
        began = time.monotonic()
        if began >= next_look:  # others may have been at work, too; of many units, that takes a while to see
            look()
            next_look = began + max(_LOOK_SECONDS, _LOOK_SHARE * (time.monotonic() - began))

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


def check_failures(failed: int, units: int, last: str) -> None:
    """Raises TooManyFailedError if too many units have failed; the last one's error stands for all."""
    if failed > MOST_FAILED * units:
        raise TooManyFailedError(
            f"{failed} of {units} units failed, which is more than {MOST_FAILED:.0%}; giving up. The last: {last}"
        )


def forget_failures(folder: Folder, units: Iterable[Unit]) -> None:
    """Units that are tried again have not failed, so far."""
    for unit in units:
        folder.failure(unit).unlink(missing_ok=True)


def wait_for_others(folder: Folder, units: Sequence[Unit]) -> None:
    """Waits until every unit is done or has failed.

    torchrun ends all processes when one of them ends with an error; one with failures to tell waits for the others.
    """
    waiting = list(units)
    while waiting:
        waiting = [u for u in pending(folder, waiting) if failure_of(folder, u) is None]
        if waiting:
            time.sleep(_LOOK_SECONDS)


def own_device(device: str | torch.device | None, rank: Rank) -> str | torch.device | None:
    """The device of a process: of several on one machine, each takes its own."""
    if rank.device is None or device is None:
        return device
    if torch.device(device) == torch.device("cuda") and torch.cuda.device_count() > 1:
        return f"cuda:{rank.device % torch.cuda.device_count()}"
    return device
