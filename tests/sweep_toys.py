"""A sweep whose renderer is a stand-in, what runs it in processes of their own, and what damages its folder."""

import json
import multiprocessing
import os
import time
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
# A process that has imported torch, and nothing else to lose: its children start within milliseconds. It is not the
# one that pytest runs in, whose threads would not live on in a child.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "featvis_func.sweep.api"])


def toy_run(layers: dict[str, int] | None = None, *, unit_size: int = 2, **config: Any) -> Run:
    """What a sweep is for: layers by name, and how many filters each has."""
    layers = {"block1.conv": 5, "head": 4} if layers is None else layers
    plans = [LayerPlan(name, (count, 3, 3), tuple(range(count)), 2, unit_size) for name, count in layers.items()]
    known = {"model": "toy", "image_dtype": "uint8", "layers": dict(layers), "render": {"seed": 7, "steps": STEPS}}
    return Run({**known, **config}, tuple(plans))


def toy_result(layer: str, filters: Sequence[int], seed: int, *, side: int = 8, noise: float = 0.0) -> Result:
    """Random numbers that depend on the layer, the filter and the seed, and on nothing else."""
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


@dataclass
class Toy:
    """Makes the stand-in for each layer's renderer."""

    log: Path | None = None
    """A file with a line for each unit that was rendered."""
    side: int = 8
    jitter: bool = False
    """Whether each process has numbers of its own, as different machines do by rounding."""
    pause: float = 0.0
    """Seconds of each render."""
    broken: tuple[int, ...] = ()
    """Filters that cannot be rendered."""

    def __call__(self, plan: LayerPlan) -> Callable[..., Result]:
        def render(filters: Sequence[int], /, *, seed: int | None = None) -> Result:
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(f"{plan.layer} {filters[0]}\n")
            if self.pause:
                time.sleep(self.pause)
            if not set(self.broken).isdisjoint(filters):
                raise RuntimeError("these cannot be rendered\nfor a long reason")
            noise = os.getpid() % 97 / 97 if self.jitter else 0.0
            return toy_result(plan.layer, filters, 7 if seed is None else seed, side=self.side, noise=noise)

        return render

    def rendered(self) -> list[str]:
        """A line for each unit that was rendered, so far."""
        return self.log.read_text().splitlines() if self.log is not None and self.log.exists() else []


def fill(path: Path, run: Run, toy: Toy, rank: Rank = Rank(), *, backwards: bool = False) -> Status:  # noqa: B008
    """What :func:`featvis_func.sweep.sweep` does, with the stand-in."""
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
    """Runs a function of this module in a process of its own, up to where it says that it is ready.

    Returns:
        The process, and what the function, which is given the other end first, sends.
    """
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    assert ours.recv() == "ready"
    return process, ours


def join(process: ForkServerProcess, connection: Connection, *, code: int = 0) -> None:
    process.join()
    connection.close()
    assert process.exitcode == code
    process.close()


def ready(connection: Connection) -> None:
    torch.set_num_threads(1)
    connection.send("ready")


def filling(connection: Connection, path: Path, run: Run, toy: Toy, rank: Rank, backwards: bool, wait: bool) -> None:
    """:func:`fill`, in a process of its own; one that waits does nothing before it is told."""
    ready(connection)
    if wait:
        connection.recv()
    fill(path, run, toy, rank, backwards=backwards)


def content(path: Path) -> dict[str, Any]:
    """All that is in a sweep's folder but logs, what was set aside, and times and hosts."""
    found: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if not file.is_file() or name.startswith(("events/", "damaged/")):
            continue
        found[name] = file.read_bytes()
        if file.suffix == ".json" and name != "run.json":
            value = json.loads(found[name])
            found[name] = {key: value[key] for key in value if key not in ("written", "seal")}
    return found
