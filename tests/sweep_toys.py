"""Sweeps with a substitute for the renderer, run in this process or in child processes that kill themselves."""

import functools
import json
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from featvis_func.io.atomic import remove_abandoned
from featvis_func.rendering.result import Result
from featvis_func.sweep.launchers import Rank, run_units
from featvis_func.sweep.layout import Run, start_folder
from featvis_func.sweep.plan import LayerPlan
from featvis_func.sweep.validate import Status, read_status
from featvis_func.sweep.worker import Worker

STEPS = 5
HANG_SECONDS = 300
"""Time after which a test counts as hanging. No test depends on it otherwise."""
# The fork server is a process that has imported torch and has no other threads: its children start in milliseconds. The
# process of pytest itself cannot be forked safely, because it has threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "featvis_func.sweep.api", "tests.toys", "tests.sweep_toys"])


def toy_run(layers: dict[str, int] | None = None, *, unit_size: int = 2, **config: Any) -> Run:
    """Return a run from the names of layers and their numbers of filters."""
    layers = {"block1.conv": 5, "head": 4} if layers is None else layers
    plans = [LayerPlan(name, (count, 3, 3), tuple(range(count)), 2, unit_size) for name, count in layers.items()]
    known = {"model": "toy", "image_dtype": "uint8", "layers": dict(layers), "render": {"seed": 7, "steps": STEPS}}
    return Run({**known, **config}, tuple(plans))


def toy_result(layer: str, filters: Sequence[int], seed: int, *, side: int = 8, noise: float = 0.0) -> Result:
    """Return random results that depend only on the layer, the filter and the seed."""
    generators = [torch.Generator().manual_seed(zlib.crc32(f"{layer} {f} {seed}".encode())) for f in filters]

    def numbers(*shape: int) -> torch.Tensor:
        return torch.stack([torch.rand(*shape, generator=generator) for generator in generators])

    history = numbers(STEPS)
    return Result(
        images=(numbers(3, side, side) + noise).clamp(0, 1),
        activations=numbers(3, 3),
        scores=history.max(1).values + noise,
        best_step=history.argmax(1),
        filters=tuple(filters),
        status=tuple("dead" if f % 7 == 3 else "ok" for f in filters),
        history=history.T,
        steps=torch.full((len(filters),), STEPS),
    )


# For Toy, which never changes its results: the tests of failing disks render the same few units many times.
_cached_result = functools.lru_cache(maxsize=16)(toy_result)


@dataclass
class Toy:
    """Substitute for the function that makes the renderer of each layer."""

    log: Path | None = None
    """File that gets one line for each unit whose rendering begins."""
    side: int = 8
    """Height and width of the images."""
    jitter: bool = False
    """Whether each process adds noise of its own, as different machines do by rounding."""
    broken: tuple[int, ...] = ()
    """Filters whose rendering fails."""
    begin: Callable[[], None] | None = None
    """Function that is called when the rendering of a unit begins."""

    def __call__(self, plan: LayerPlan) -> Callable[..., Result]:
        def render(filters: Sequence[int], /, *, seed: int | None = None) -> Result:
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(f"{plan.layer} {filters[0]}\n")
            if self.begin is not None:
                self.begin()
            if not set(self.broken).isdisjoint(filters):
                raise RuntimeError("these cannot be rendered\nfor a long reason")
            noise = os.getpid() % 97 / 97 if self.jitter else 0.0
            return _cached_result(plan.layer, tuple(filters), 7 if seed is None else seed, side=self.side, noise=noise)

        return render

    def rendered(self) -> list[str]:
        """Return the lines of the log so far."""
        return self.log.read_text().splitlines() if self.log is not None and self.log.exists() else []


def fill(path: Path, run: Run, toy: Toy, rank: Rank = Rank(), *, backwards: bool = False) -> Status:  # noqa: B008
    """Do what :func:`featvis_func.sweep.sweep` does, with the substitute."""
    folder = start_folder(path, run)
    remove_abandoned(folder.path)
    worker = Worker(folder, toy, seed=run.config["render"]["seed"])
    if backwards:
        for unit in reversed(folder.run.units):
            worker(unit)
    else:
        run_units(folder, worker, rank, progress=False)
    return read_status(folder)


def start(work: Callable[..., None], *arguments: Any) -> tuple[ForkServerProcess, Connection]:
    """Run a function of a test module in a child process, and wait until it calls :func:`ready`.

    Returns:
        The process, and the connection whose other end the function gets as its first argument.
    """
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    assert receive(ours) == "ready"
    return process, ours


def receive(connection: Connection) -> Any:
    """Return what a child process sends next."""
    assert connection.poll(HANG_SECONDS), "a child process hangs"
    return connection.recv()


def join(process: ForkServerProcess, connection: Connection) -> int:
    """Wait for the end of a child process, and return its exit code."""
    process.join(HANG_SECONDS)
    code = process.exitcode
    assert code is not None, "a child process hangs"
    connection.close()
    process.close()
    return code


def ready(connection: Connection) -> None:
    """Tell the parent that this child process has started."""
    torch.set_num_threads(1)
    connection.send("ready")


def kill_self() -> None:
    """End this process as SIGKILL does from outside: at once, without any clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt:
    """Kill this process at the n-th event, so that the state of the disk does not depend on the speed of the machine.

    The events are the calls that change the state of a folder: a unit begins; half of a temporary file is written; all
    of it is written, but not yet renamed; a file has been renamed. Between these calls, a kill at any time leaves the
    same files. ``os.fsync`` itself is skipped: killing a process, unlike a power cut, does not lose what was written.
    """

    def __init__(self, number: int) -> None:
        self._left = number
        self._temporary: set[int] = set()

    def event(self) -> None:
        """Count an event; does not return from the n-th."""
        self._left -= 1
        if self._left == 0:
            kill_self()

    def install(self) -> None:
        """Count the calls of this process from now on."""
        open_handle, write = os.open, os.write

        def counted_open(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            handle = open_handle(path, flags, *arguments, **options)
            (self._temporary.add if flags & os.O_EXCL else self._temporary.discard)(handle)
            return handle

        def counted_write(handle: int, data: Any) -> int:
            if handle in self._temporary:
                if self._left == 1:
                    write(handle, bytes(data)[: len(data) // 2])
                self.event()
            return write(handle, data)

        os.open, os.write, os.fsync = counted_open, counted_write, lambda handle: self.event()


def fill_in_child(
    connection: Connection, path: Path, run: Run, toy: Toy, rank: Rank, backwards: bool, kill_at: int | None
) -> None:
    """Call :func:`fill` in a child process when it is told to, and kill the process at an event."""
    ready(connection)
    receive(connection)
    if kill_at is not None:
        kill = KillAt(kill_at)
        kill.install()
        toy.begin = kill.event
    fill(path, run, toy, rank, backwards=backwards)


def content(path: Path) -> dict[str, Any]:
    """Return all files of a sweep's folder except logs and damaged files, without times and hosts.

    JSON files of units are parsed, without the entries ``written`` and ``seal``; all other files are bytes.
    """
    files: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if not file.is_file() or name.startswith(("events/", "damaged/")):
            continue
        files[name] = file.read_bytes()
        if file.suffix == ".json" and name != "run.json":
            value = json.loads(files[name])
            files[name] = {key: value[key] for key in value if key not in ("written", "seal")}
    return files
