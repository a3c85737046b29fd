"""Continuous batching: a batch of fixed size in which the next filter takes the place of one that has ended.

Shapes never change, so that a step is compiled once however many filters there are, and no step is spent on a finished
image while others wait. Nothing here is random, and a filter's image does not depend on the others in the batch.
"""

import math
import operator
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from featvis_func.backbone.hardware import specialization
from featvis_func.engine.memory import InitFilters, is_out_of_memory
from featvis_func.engine.run import Step, run
from featvis_func.engine.snapshots import snapshot_steps, take_snapshots
from featvis_func.tree import tree_leaves, tree_map
from featvis_func.types import Best, Info, State, Target, Weights
from featvis_func.validation import check_float, check_int

T = TypeVar("T")
Finish: TypeAlias = Callable[[Weights, State, Target], State]


class RunResult(NamedTuple):
    """The results of a run, per filter, on the CPU (images: as they were taken) and in the requested order."""

    best: Best
    info: Info
    """Each ``(steps, n)``; NaN and False after the last step of a filter that was stopped."""
    steps: Tensor
    """int64 ``(n,)``: number of steps that each filter took."""
    batch_size: int
    """The batch size at the end of the run, which is less than the requested one if memory ran out."""
    saliency: Tensor | None = None
    """``(n, h, w)``, or ``(n, t, h, w)`` or ``(n, t)``: that of :class:`~featvis_func.State`, if it accumulates one."""
    snapshots: Tensor | None = None
    """uint8 ``(n, k, c, h, w)``, or of videos or signals, if requested; the last image of a filter that was stopped is
    repeated."""


class _FilterResult(NamedTuple):
    """The results of one filter."""

    best: Best
    info: Info
    saliency: Tensor | tuple[()]
    snapshots: Tensor
    """Empty if none are kept."""


class _Settings(NamedTuple):
    """What all passes over the filters have in common."""

    step: Step
    weights: Weights
    init: InitFilters
    """Takes indices into the list of filters instead of filter numbers."""
    steps: int
    tolerance: float | None
    patience: int
    progress: Callable[[int], object]
    snapshot_steps: tuple[int, ...]
    """Numbers of steps, the last one ``steps``, after which an image is kept if there is ``decode``."""
    decode: Callable[[State], Tensor] | None
    finish: Finish | None
    take_images: Callable[[Tensor], Tensor]


def run_batched(
    step: Step,
    weights: Weights,
    init: InitFilters,
    filters: Sequence[int],
    *,
    steps: int,
    batch_size: int = 8,
    pad: bool = False,
    tolerance: float | None = None,
    patience: int = 8,
    single_batch: bool = False,
    progress: Callable[[int], object] = lambda _: None,
    snapshots: int = 0,
    decode: Callable[[State], Tensor] | None = None,
    finish: Finish | None = None,
    take_images: Callable[[Tensor], Tensor] = Tensor.cpu,
    retain_memory: bool = False,
) -> RunResult:
    """Run every filter to its last step, ``batch_size`` at a time.

    Where memory runs out, the batch size is halved and the filters that were running start again, with the same images.

    Args:
        step: of an :class:`~featvis_func.engine.step.Ascent`, compiled or not.
        weights: of the backbone.
        init: filter numbers -> their state before the first step, and their targets.
        filters: any number of filter numbers, at least 1.
        steps: largest number of steps per filter, at least 1.
        batch_size: filters that run at the same time, at least 1.
        pad: whether the batch has this size even if there are fewer filters, for a step that is compiled for it.
        tolerance: stops a filter once its best score has risen by no more than this fraction of itself over its last
            ``patience`` steps (a filter that has had no gradient yet goes on). ``None``: every filter takes all steps.
        patience: number of steps between two checks of a filter, at least 1; the first check that can stop it comes
            after twice as many.
        single_batch: whether the filters depend on each other, so that all must run in one batch.
        progress: called with the number of filter-steps that were taken or saved; with a negative number where filters
            start again, so that the sum is ``steps`` for each filter.
        snapshots: number of images of each filter to keep over its run, see :func:`~featvis_func.snapshot_steps`.
        decode: of the :class:`~featvis_func.engine.step.Ascent`; needed for snapshots.
        finish: of the :class:`~featvis_func.engine.step.Ascent`.
        take_images: images of some filters that have ended, on their device -> those of the result.
        retain_memory: whether the process keeps, during the run, the memory that a step frees; see
            :func:`~featvis_func.kept_memory`. The setting is the process's; only CPUs gain from it.

    Raises:
        ValueError: a number out of range, filters that need a single batch with another batch size or a tolerance, or
            snapshots without ``decode``.
        torch.OutOfMemoryError: one filter alone does not fit into memory, or the filters that need a single batch.
    """
    for name, value in (
        ("number of filters", len(filters)),
        ("steps", steps),
        ("batch_size", batch_size),
        ("patience", patience),
    ):
        check_int(name, value, 1)
    if tolerance is not None:
        check_float("tolerance", tolerance, 0)
    if single_batch and (batch_size != len(filters) or tolerance is not None):
        raise ValueError(
            f"{len(filters)} filters that depend on each other need batch_size={len(filters)} and no tolerance, got"
            f" batch_size={batch_size}, tolerance={tolerance}"
        )
    kept_steps = snapshot_steps(steps, snapshots)
    if kept_steps and decode is None:
        raise ValueError(f"snapshots={snapshots} needs decode=, which makes the images")
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        progress(number)

    settings = _Settings(
        step,
        weights,
        lambda indices: init([filters[i] for i in indices]),
        steps,
        tolerance,
        patience,
        count,
        kept_steps or (steps,),
        decode if kept_steps else None,
        finish,
        take_images,
    )
    results: dict[int, _FilterResult] = {}
    batch_size = batch_size if pad else min(batch_size, len(filters))
    remaining = list(range(len(filters)))
    while remaining:
        try:
            with _retained_memory(weights) if retain_memory else nullcontext():
                results.update(_run_pass(settings, remaining, batch_size))
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or single_batch or not is_out_of_memory(error):
                raise
        remaining = [i for i in remaining if i not in results]
        if remaining:
            # Outside of the handler, where the error no longer refers to the tensors of the step.
            torch.cuda.empty_cache()
            warnings.warn(f"out of memory with batch_size={batch_size}; going on with {batch_size // 2}", stacklevel=3)
            batch_size //= 2
            count(steps * len(results) - done)
    bests, infos, saliencies, images = zip(*(results[i] for i in range(len(filters))), strict=True)
    padded = [tree_map(lambda column: _padded(column, steps), info) for info in infos]
    return RunResult(
        Best(*(torch.stack(leaves) for leaves in zip(*bests, strict=True))),
        Info(*(torch.stack(columns, dim=1) for columns in zip(*padded, strict=True))),
        torch.tensor([len(info.score) for info in infos]),
        batch_size,
        torch.stack(saliencies) if isinstance(saliencies[0], Tensor) else None,
        torch.stack(images) if kept_steps else None,
    )


def _retained_memory(weights: Weights) -> AbstractContextManager[None]:
    types = {weight.device.type for weight in weights.values()} or {"cpu"}
    return specialization(types.pop()).retain_memory() if len(types) == 1 else nullcontext()


def _run_pass(settings: _Settings, indices: Sequence[int], batch_size: int) -> Iterator[tuple[int, _FilterResult]]:
    """Run some of the filters, by their indices, and yield the results of each as it ends."""
    steps, patience = settings.steps, settings.patience
    waiting = deque(indices)
    rows = [waiting.popleft() for _ in range(min(batch_size, len(indices)))]  # the index in each row of the batch
    rows += rows[-1:] * (batch_size - len(rows))  # padding: the same filter again, whose results are not used
    active = set(range(min(batch_size, len(indices))))
    infos: dict[int, list[Info]] = {rows[row]: [] for row in active}
    images: dict[int, list[Tensor]] = {rows[row]: [] for row in active}
    state, target = settings.init(rows)
    age = [0] * batch_size
    while active:
        due = [row for row in sorted(active) if age[row] in settings.snapshot_steps]
        for row, image in zip(due, _images(settings, state, due), strict=True):
            images[rows[row]].append(image)
        # Up to the next step after which a filter can end or is looked at: the host waits for the device only then.
        every = steps if settings.tolerance is None else patience
        length = min(
            min(every - age[row] % every, next(s for s in settings.snapshot_steps if s > age[row]) - age[row])
            for row in active
        )
        count = len(active)
        state, info = run(
            settings.step,
            settings.weights,
            state,
            target,
            steps=length,
            callback=lambda _, number=count: settings.progress(number),
        )
        info = tree_map(Tensor.cpu, info)
        ended = []
        for row in sorted(active):
            age[row] += length
            own = infos[rows[row]]
            own.append(Info(*(column[:, row] for column in info)))
            if age[row] == steps or (age[row] % patience == 0 and _has_converged(own, settings.tolerance, patience)):
                ended.append(row)
        if not ended:
            continue
        best, saliency = _shown(settings, state, target, ended)
        last_images = _images(settings, state, ended)
        for i, row in enumerate(ended):
            settings.progress(steps - age[row])
            own_images = images.pop(rows[row])
            own_images += [last_images[i]] * (len(settings.snapshot_steps) - len(own_images))
            own_best, own_saliency = tree_map(operator.itemgetter(i), (best, saliency))
            own_info = Info(*map(torch.cat, zip(*infos.pop(rows[row]), strict=True)))
            yield rows[row], _FilterResult(own_best, own_info, own_saliency, torch.stack(own_images))
        active -= set(ended)
        refilled = ended[: len(waiting)]
        if refilled:
            for row in refilled:
                rows[row], age[row] = waiting.popleft(), 0
                infos[rows[row]], images[rows[row]] = [], []
            active |= set(refilled)
            fresh = settings.init([rows[row] for row in refilled])
            everything = len(refilled) == batch_size
            state, target = fresh if everything else _replace_rows((state, target), refilled, fresh)
            del fresh  # which would take memory during the next steps


def _shown(settings: _Settings, state: State, target: Target, rows: Sequence[int]) -> tuple[Best, Any]:
    """What is to be shown of rows that have ended, and their saliency."""
    # Of all rows, so that the rounding does not depend on which of them end together.
    finished = state if settings.finish is None else settings.finish(settings.weights, state, target)
    index = torch.tensor(rows, device=state.step.device)
    best, saliency = tree_map(lambda leaf: leaf[index], (finished.best, finished.saliency))
    images = settings.take_images(best.image)
    best, saliency = tree_map(Tensor.cpu, (best._replace(image=best.score), saliency))
    return best._replace(image=images), saliency


def _replace_rows(batch: T, rows: Sequence[int], new: T) -> T:
    """Put what begins into rows of a batch, a pytree."""
    index = torch.tensor(rows, device=tree_leaves(batch)[0].device)
    return tree_map(lambda old, fresh: old.index_copy(0, index, fresh), batch, new)


def _images(settings: _Settings, state: State, rows: Sequence[int]) -> Sequence[Tensor]:
    """The present images of some rows, on the CPU; empty tensors if no snapshots are kept."""
    if settings.decode is None or not rows:
        return [torch.empty(0, dtype=torch.float32)] * len(rows)
    return take_snapshots(settings.decode, state, rows).unbind()


def _has_converged(infos: Sequence[Info], tolerance: float | None, patience: int) -> bool:
    """Whether one filter's best score has stopped rising over its last steps."""
    if tolerance is None:
        return False
    score, finite, alive = (torch.cat([getattr(i, name) for i in infos]) for name in ("score", "finite", "alive"))
    if len(score) < 2 * patience or (bool(finite.all()) and not bool(alive.any())):
        return False
    best = torch.where(finite, score, -torch.inf).cummax(0).values
    before, now = float(best[-1 - patience]), float(best[-1])
    if before == -math.inf:
        return now == before
    return now <= before + tolerance * abs(before)


def _padded(column: Tensor, length: int) -> Tensor:
    rest = column.new_full((length - len(column),), torch.nan if column.is_floating_point() else False)
    return torch.cat([column, rest])
