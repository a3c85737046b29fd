"""Worker that renders units and commits them; all engines use it."""

import errno
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from featvis_func.engine.device import begin_copy
from featvis_func.engine.memory import is_out_of_memory
from featvis_func.rendering.renderer import Renderer
from featvis_func.rendering.result import Result
from featvis_func.sweep.layout import DamagedError, Folder, log_event, set_aside
from featvis_func.sweep.plan import LayerPlan, Unit
from featvis_func.sweep.renderers import LayerRenderers
from featvis_func.sweep.shard import Commit, commit, pack, read_commit, record_failure, stored_images
from featvis_func.validation import first_line

T = TypeVar("T")

ATTEMPTS = 3
"""Number of attempts to render a unit before it is recorded as failed."""

# Errors of the file system that every other unit would meet too: the run ends at once.
_FATAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


class Render(Protocol):
    """Callable that renders filters of one layer: a :class:`~featvis_func.Renderer`, or a substitute in tests."""

    def __call__(self, filters: Sequence[int], /, *, seed: int | None = None) -> Result: ...


class Done(NamedTuple):
    """What a worker did with a unit."""

    unit: Unit
    outcome: str
    """``"rendered"``, ``"found"`` (done before), ``"failed"``, or ``"refused"``: its layer cannot be rendered."""
    seconds: float
    error: str = ""
    """Type and message of the last error of a failed unit."""


class Worker:
    """Render units into a folder. The renderer of a layer is kept until a unit of another layer comes.

    Args:
        folder: The sweep's folder.
        make: Function that makes the renderer of a layer from its plan.
        seed: Seed of the run.
        background: Whether :meth:`run` commits in a thread of its own, while the next units are rendered. That saves
            time where another device renders; on a CPU the thread takes a processor from the steps.
    """

    def __init__(
        self, folder: Folder, make: Callable[[LayerPlan], Render], *, seed: int, background: bool = False
    ) -> None:
        self._folder = folder
        self._make = make
        self._seed = seed
        self._background = background
        self._plans = {plan.layer: plan for plan in folder.run.plans}
        self._layer = ""
        self._render: Render | None = None
        self._refused: dict[str, str] = {}  # layer -> why it cannot be rendered

    def run(self, units: Sequence[Unit]) -> Generator[Done, None, None]:
        """Render and commit units as :meth:`__call__` does, and yield each once it is committed, in their order.

        Units whose layers share a step are rendered together, as many as fit into a batch.
        """
        committing: list[tuple[Unit, Future[float]]] = []
        with ThreadPoolExecutor(1, thread_name_prefix="commit") as committer:
            for batch in self._batches(units):
                start, error = time.monotonic(), None
                found: list[Unit] = []
                rendered: list[tuple[Unit, Result, list[int], Callable[[], bytes]]] = []
                try:
                    found = [unit for unit in batch if self._read_commit(unit) is not None]
                    results = self._render_together([unit for unit in batch if unit not in found])
                    rendered = [(*result, self._packing(*result)) for result in results]
                except Exception as raised:
                    error = raised
                yield from self._settle(committing)
                committing = []
                seconds = (time.monotonic() - start) / len(batch)
                failure = self._log_failure([unit for unit in batch if unit not in found], 1, error) if error else ""
                done = {unit for unit, *_ in rendered}
                for unit in batch:
                    if unit in found:
                        yield Done(unit, "found", seconds)
                    elif unit not in done:  # refused, or failed
                        yield self(unit, attempts=1 if failure else 0, failure=failure)
                submit = committer.submit if self._background else _run_now
                committing = [
                    (unit, submit(self._commit, seconds, unit, result, seeds, packing))
                    for unit, result, seeds, packing in rendered
                ]
                if not self._background:
                    yield from self._settle(committing)
                    committing = []
            yield from self._settle(committing)

    def _packing(self, unit: Unit, result: Result, seeds: list[int]) -> Callable[[], bytes]:
        """A function that packs a unit.

        Images on the CPU are packed at once: in the thread that commits, torch would start a second set of threads.
        Others begin to leave their device, and are packed when they have arrived, while the next batch is rendered.
        """
        if result.images.device.type == "cpu":
            packed = pack(self._folder, unit, result, seeds)
            return lambda: packed
        images, wait = begin_copy(stored_images(result.images, self._folder.run.config["image_dtype"]))

        def pack_arrived() -> bytes:
            wait()
            return pack(self._folder, unit, replace(result, images=images), seeds)

        return pack_arrived

    def _commit(
        self, seconds: float, unit: Unit, result: Result, seeds: list[int], packing: Callable[[], bytes]
    ) -> float:
        start = time.monotonic()
        commit(self._folder, unit, result, seeds, seconds=seconds, packed=packing())
        return seconds + time.monotonic() - start

    def _settle(self, committing: Sequence[tuple[Unit, Future[float]]]) -> Iterator[Done]:
        """Wait for commits; what could not be committed is rendered again."""
        for unit, future in committing:
            try:
                seconds = future.result()
            except Exception as error:
                yield self(unit, attempts=1, failure=self._log_failure([unit], 1, error))
            else:
                yield Done(unit, "rendered", seconds)

    def __call__(self, unit: Unit, *, attempts: int = 0, failure: str = "") -> Done:
        """Render and commit a unit, unless it is done.

        A layer whose renderer cannot be made, because the model or the layer does not allow it, is tried once.
        Damaged files of the unit are moved into ``damaged/``. If rendering fails :data:`ATTEMPTS` times, the error is
        recorded in the folder and returned.

        Args:
            unit: The unit.
            attempts: Number of attempts that have failed before.
            failure: The last error of these.

        Raises:
            OSError: The folder cannot be written, for a reason that applies to the other units too.
        """
        start = time.monotonic()
        for attempt in range(attempts + 1, ATTEMPTS + 1):
            try:
                if self._read_commit(unit) is not None:
                    return Done(unit, "found", time.monotonic() - start)
                rendered = self._render_together([unit])
                if not rendered:
                    return self._refuse(unit, time.monotonic() - start)
                commit(self._folder, *rendered[0], seconds=time.monotonic() - start)
                return Done(unit, "rendered", time.monotonic() - start)
            except Exception as error:
                failure = self._log_failure([unit], attempt, error)
        record_failure(self._folder, unit, failure, ATTEMPTS)
        return Done(unit, "failed", time.monotonic() - start, failure)

    def _log_failure(self, units: Sequence[Unit], attempt: int, error: Exception) -> str:
        """Log an error, prepare for the next attempt, and return the error's type and message.

        Models, compilers and disks raise errors of any type; the other units can still be rendered. Errors of the file
        system that every unit would meet are raised.
        """
        if isinstance(error, OSError) and error.errno in _FATAL_ERRNOS:
            raise error
        failure = f"{type(error).__name__}: {first_line(error)}"
        self._drop_renderer()
        if is_out_of_memory(error):
            torch.cuda.empty_cache()
        for unit in units:
            log_event(self._folder.path, "failure", unit=unit.name, attempt=attempt, error=failure)
        return failure

    def _batches(self, units: Sequence[Unit]) -> Iterator[list[Unit]]:
        """The units, those together that can be rendered together."""
        if isinstance(self._make, LayerRenderers):
            return self._make.batches(units)
        return ([unit] for unit in units)

    def _render_together(self, units: Sequence[Unit]) -> list[tuple[Unit, Result, list[int]]]:
        """Render units; filters with a non-finite result are rendered once more, with the next seed.

        Returns:
            Each unit, its result, and the seed of each of its filters; nothing if the layer cannot be rendered.
        """
        if len(units) > 1 and isinstance(self._make, LayerRenderers):
            self._drop_renderer()  # of a single layer: the memory may not hold two
            results = self._make.render_together(units)
            renders: list[Render] = [self._make(self._plans[unit.layer]) for unit in units]
        else:
            results, renders = [], []
            for unit in units:
                render = self._renderer(unit.layer)
                if render is None:
                    return []
                results.append(render(unit.filters))
                renders.append(render)
        return [
            (unit, *self._replace_nonfinite(unit, result, render))
            for unit, result, render in zip(units, results, renders, strict=True)
        ]

    def _refuse(self, unit: Unit, seconds: float) -> Done:
        reason = self._refused[unit.layer]
        log_event(self._folder.path, "failure", unit=unit.name, attempt=1, error=reason)
        record_failure(self._folder, unit, reason, 1, refused=True)
        return Done(unit, "refused", seconds, reason)

    def _read_commit(self, unit: Unit) -> Commit | None:
        """Read the sidecar of a unit; move the files of a damaged unit aside and return ``None``."""
        try:
            return read_commit(self._folder, unit)
        except DamagedError as error:
            folder = self._folder
            shards = folder.sidecar(unit).parent.glob(f"{folder.sidecar(unit).stem}-*.safetensors")
            # The sidecar last: without it the unit counts as new, and a damaged shard could be overwritten.
            moved = set_aside(folder.path, *shards, folder.sidecar(unit))
            log_event(folder.path, "damaged", unit=unit.name, error=str(error), moved=[p.name for p in moved])
            return None

    def _replace_nonfinite(self, unit: Unit, result: Result, render: Render) -> tuple[Result, list[int]]:
        """Render the filters with a non-finite result once more; returns the seed of each filter, too."""
        seeds = [self._seed] * len(unit.filters)
        nonfinite = [row for row, status in enumerate(result.status) if status == "nonfinite"]
        group = render.group if isinstance(render, Renderer) else 1  # of filters that depend on each other
        nonfinite = sorted({i for row in nonfinite for i in range(row - row % group, row - row % group + group)})
        if nonfinite:
            next_seed = (self._seed + 1) % 2**64
            second = render([unit.filters[row] for row in nonfinite], seed=next_seed)
            source_rows = [i for i, status in enumerate(second.status) if status != "nonfinite"]
            rows = [nonfinite[i] for i in source_rows]
            result = _replace_rows(result, rows, second, source_rows)
            for row in rows:
                seeds[row] = next_seed
        used = result.config.get("batch_size_used")
        if isinstance(render, Renderer) and used is not None and used < render.batch_size:
            self._render = render._replace(batch_size=used)  # the batch size that fitted into memory
        return result, seeds

    def _renderer(self, layer: str) -> Render | None:
        """The renderer of a layer; ``None`` if the layer cannot be rendered."""
        if layer not in self._refused and (self._render is None or self._layer != layer):
            self._drop_renderer()  # before the next one is made: the memory may not hold two
            try:
                self._render = self._make(self._plans[layer])
                self._layer = layer
            except ValueError as error:
                self._refused[layer] = first_line(error)
        return None if layer in self._refused else self._render

    def _drop_renderer(self) -> None:
        self._render = None


def _run_now(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call a function as an executor does, but at once."""
    future = Future[T]()
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


def pending(folder: Folder, units: Iterable[Unit]) -> list[Unit]:
    """Return the units that are not done or whose files are damaged."""

    def is_done(unit: Unit) -> bool:
        try:
            return read_commit(folder, unit) is not None
        except DamagedError:
            return False

    return [unit for unit in units if not is_done(unit)]


def _replace_rows(result: Result, rows: list[int], source: Result, source_rows: list[int]) -> Result:
    """Return ``result`` with its ``rows`` replaced by the ``source_rows`` of ``source``."""

    def put(name: str, axis: int = 0) -> torch.Tensor:
        new = getattr(result, name).clone()
        index, source_index = (torch.tensor(r, dtype=torch.int64, device=new.device) for r in (rows, source_rows))
        return new.index_copy_(axis, index, getattr(source, name).index_select(axis, source_index))

    status = list(result.status)
    for row, source_row in zip(rows, source_rows, strict=True):
        status[row] = source.status[source_row]
    return Result(
        images=put("images"),
        activations=put("activations"),
        scores=put("scores"),
        best_step=put("best_step"),
        filters=result.filters,
        status=tuple(status),
        history=put("history", axis=1),
        steps=put("steps"),
        config=result.config,
        snapshots=None if result.snapshots is None else put("snapshots"),
    )
