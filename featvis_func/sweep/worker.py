"""What renders one unit and commits it. All engines run this."""

import errno
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from featvis_func.engine.device import is_out_of_memory
from featvis_func.models import Model
from featvis_func.objective import channel
from featvis_func.rendering.renderer import Renderer, make_renderer
from featvis_func.rendering.result import Result
from featvis_func.sweep.layout import Folder, log_event, set_aside
from featvis_func.sweep.plan import LayerPlan, Unit
from featvis_func.sweep.shard import Commit, commit, read_commit, record_failure
from featvis_func.validation import first_line

ATTEMPTS = 3
"""How often a unit is tried before it is left as failed."""

# The file system will say the same of every other unit: there is no use in going on.
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


class Render(Protocol):
    """What renders the filters of one layer: a :class:`~featvis_func.Renderer`, or what stands in for one."""

    def __call__(self, filters: Sequence[int], /, *, seed: int | None = None) -> Result: ...


class Done(NamedTuple):
    """What became of a unit."""

    unit: Unit
    outcome: str
    """``"rendered"``, ``"found"`` (it was done already) or ``"failed"``."""
    seconds: float
    error: str = ""


class Worker:
    """Renders units into a folder, one after another; keeps what one layer takes until the next one comes.

    Args:
        folder: where to.
        make: a layer's plan -> what renders its filters.
        seed: of the run.
    """

    def __init__(self, folder: Folder, make: Callable[[LayerPlan], Render], *, seed: int) -> None:
        self._folder = folder
        self._make = make
        self._seed = seed
        self._plans = {plan.layer: plan for plan in folder.run.plans}
        self._layer = ""
        self._render: Render | None = None

    def __call__(self, unit: Unit) -> Done:
        """Renders and commits a unit, unless it is done.

        Damaged files of it are set aside. A failure is tried again, and then recorded beside the others' results.

        Raises:
            OSError: the folder cannot be written, and will not be for other units.
        """
        start = time.monotonic()
        failure = ""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if self._found(unit) is not None:
                    return Done(unit, "found", time.monotonic() - start)
                result, seeds = self._rendered(unit)
                commit(self._folder, unit, result, seeds, seconds=time.monotonic() - start)
                return Done(unit, "rendered", time.monotonic() - start)
            except Exception as error:
                # Whatever a model, a compiler or a disk may raise: the other units shall have their turn.
                if isinstance(error, OSError) and error.errno in _HOPELESS:
                    raise
                failure = f"{type(error).__name__}: {first_line(error)}"
                self._forget()
                if is_out_of_memory(error):
                    torch.cuda.empty_cache()
                log_event(self._folder.path, "failure", unit=unit.name, attempt=attempt, error=failure)
        record_failure(self._folder, unit, failure, ATTEMPTS)
        return Done(unit, "failed", time.monotonic() - start, failure)

    def _found(self, unit: Unit) -> Commit | None:
        try:
            return read_commit(self._folder, unit)
        except ValueError as error:
            folder = self._folder
            shards = folder.sidecar(unit).parent.glob(f"{folder.sidecar(unit).stem}-*.safetensors")
            # The sidecar last: without it the unit counts as new, and its shard might be overwritten.
            moved = set_aside(folder.path, *shards, folder.sidecar(unit))
            log_event(folder.path, "damaged", unit=unit.name, error=str(error), moved=[p.name for p in moved])
            return None

    def _rendered(self, unit: Unit) -> tuple[Result, list[int]]:
        """A unit's result, in which filters whose numbers ran away have had a second chance with another seed."""
        render = self._renderer(unit.layer)
        result = render(unit.filters)
        seeds = [self._seed] * len(unit.filters)
        again = [row for row, status in enumerate(result.status) if status == "nonfinite"]
        if again:
            other = (self._seed + 1) % 2**64
            second = render([unit.filters[row] for row in again], seed=other)
            better = [i for i, status in enumerate(second.status) if status != "nonfinite"]
            rows = [again[i] for i in better]
            result = _merged(result, second, rows, better)
            for row in rows:
                seeds[row] = other
        slots = result.config.get("slots")
        if isinstance(render, Renderer) and slots is not None and slots < render.slots:
            self._render = render._replace(slots=slots)  # what the memory has room for
        return result, seeds

    def _renderer(self, layer: str) -> Render:
        if self._render is None or self._layer != layer:
            self._forget()  # before the next one is made: two may not fit into the memory
            self._render = self._make(self._plans[layer])
            self._layer = layer
        return self._render

    def _forget(self) -> None:
        self._render = None


def renderers(
    model: Model, config: dict[str, Any], *, device: torch.device | str | None = None
) -> Callable[[LayerPlan], Renderer]:
    """What makes the renderer of a layer, as a run's configuration says.

    Args:
        model: whose layers.
        config: of the run; its ``render`` are the options.
        device: where to compute; default: where the model is.
    """

    def make(plan: LayerPlan) -> Renderer:
        options = {**config["render"]}
        if options["size"] is not None:
            options["size"] = tuple(options["size"])
        return make_renderer(
            model, channel(plan.layer), plan.filters, batch_size=plan.batch_size, device=device, **options
        )

    return make


def pending(folder: Folder, units: Iterable[Unit]) -> list[Unit]:
    """The units that are not done, or whose files are not sound."""

    def done(unit: Unit) -> bool:
        try:
            return read_commit(folder, unit) is not None
        except ValueError:
            return False

    return [unit for unit in units if not done(unit)]


def _merged(result: Result, other: Result, rows: list[int], others: list[int]) -> Result:
    """A result in which some rows are those of another one."""

    def put(name: str, axis: int = 0) -> torch.Tensor:
        new = getattr(result, name).clone()
        source = getattr(other, name).index_select(axis, torch.tensor(others, dtype=torch.int64))
        return new.index_copy_(axis, torch.tensor(rows, dtype=torch.int64), source)

    status = list(result.status)
    for row, i in zip(rows, others, strict=True):
        status[row] = other.status[i]
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
