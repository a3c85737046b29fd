"""Worker that renders units and commits them; all engines use it."""

import errno
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch

from featvis_func.engine.device import is_out_of_memory
from featvis_func.rendering.renderer import Renderer
from featvis_func.rendering.result import Result
from featvis_func.sweep.layout import DamagedError, Folder, log_event, set_aside
from featvis_func.sweep.plan import LayerPlan, Unit
from featvis_func.sweep.shard import Commit, commit, read_commit, record_failure
from featvis_func.validation import first_line

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
    """Render units into a folder, one at a time. The renderer of a layer is kept until a unit of another layer comes.

    Args:
        folder: The sweep's folder.
        make: Function that makes the renderer of a layer from its plan.
        seed: Seed of the run.
    """

    def __init__(self, folder: Folder, make: Callable[[LayerPlan], Render], *, seed: int) -> None:
        self._folder = folder
        self._make = make
        self._seed = seed
        self._plans = {plan.layer: plan for plan in folder.run.plans}
        self._layer = ""
        self._render: Render | None = None
        self._refused: dict[str, str] = {}  # layer -> why it cannot be rendered

    def __call__(self, unit: Unit) -> Done:
        """Render and commit a unit, unless it is done.

        A layer whose renderer cannot be made, because the model or the layer does not allow it, is tried once.
        Damaged files of the unit are moved into ``damaged/``. If rendering fails :data:`ATTEMPTS` times, the error is
        recorded in the folder and returned.

        Raises:
            OSError: The folder cannot be written, for a reason that applies to the other units too.
        """
        start = time.monotonic()
        failure = ""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if self._read_commit(unit) is not None:
                    return Done(unit, "found", time.monotonic() - start)
                render = self._renderer(unit.layer)
                if render is None:
                    return self._refuse(unit, time.monotonic() - start)
                result, seeds = self._render_unit(unit, render)
                commit(self._folder, unit, result, seeds, seconds=time.monotonic() - start)
                return Done(unit, "rendered", time.monotonic() - start)
            except Exception as error:
                # Models, compilers and disks raise errors of any type; the other units can still be rendered.
                if isinstance(error, OSError) and error.errno in _FATAL_ERRNOS:
                    raise
                failure = f"{type(error).__name__}: {first_line(error)}"
                self._drop_renderer()
                if is_out_of_memory(error):
                    torch.cuda.empty_cache()
                log_event(self._folder.path, "failure", unit=unit.name, attempt=attempt, error=failure)
        record_failure(self._folder, unit, failure, ATTEMPTS)
        return Done(unit, "failed", time.monotonic() - start, failure)

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

    def _render_unit(self, unit: Unit, render: Render) -> tuple[Result, list[int]]:
        """Render a unit; filters with a non-finite result are rendered once more, with the next seed.

        Returns:
            The result of the unit, and the seed of each of its filters.
        """
        result = render(unit.filters)
        seeds = [self._seed] * len(unit.filters)
        nonfinite = [row for row, status in enumerate(result.status) if status == "nonfinite"]
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
        values = getattr(source, name).index_select(axis, torch.tensor(source_rows, dtype=torch.int64))
        return new.index_copy_(axis, torch.tensor(rows, dtype=torch.int64), values)

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
