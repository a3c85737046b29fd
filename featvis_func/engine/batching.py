"""Many filters through one batch of fixed width: a filter that has finished gives its slot to the next one waiting.

Shapes never change, so that a step is compiled once however many filters there are, and no step is spent on a finished
image while others wait. Nothing here is random, and nothing that a filter gets depends on the other slots.
"""

import functools
import math
import operator
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.cpu.malloc import kept_memory
from featvis_func.engine.device import Begin, is_out_of_memory
from featvis_func.engine.snapshots import snapshot_steps, take_snapshots
from featvis_func.engine.step import Step, run, select_rows
from featvis_func.tree import tree_map
from featvis_func.types import Best, Info, Params, State, Weights


class RunResult(NamedTuple):
    """What came of each filter, on the CPU, in the order asked for."""

    best: Best
    info: Info
    """Each ``(steps, n)``; NaN and False from where a filter was stopped."""
    steps: Tensor
    """int64 ``(n,)``: how many each took."""
    slots: int
    """How many were at a time, in the end."""
    saliency: Tensor | None = None
    """``(n, h, w)``: of :class:`~featvis_func.State`, where that has it."""
    snapshots: Tensor | None = None
    """uint8 ``(n, k, c, h, w)``, where asked for; of a filter that was stopped, the last is repeated."""


class _Found(NamedTuple):
    """What came of one filter."""

    best: Best
    info: Info
    saliency: Tensor | tuple[()]
    snapshots: Tensor
    """Empty where none are kept."""


class _Plan(NamedTuple):
    """What all passes have in common."""

    step: Step
    weights: Weights
    begin: Begin
    """Of indices into the list of filters, not of their numbers."""
    steps: int
    tolerance: float | None
    patience: int
    progress: Callable[[int], object]
    moments: tuple[int, ...]
    """Counts of steps, ``steps`` the last, at which a filter's image is kept, if there is ``decode``."""
    decode: Callable[[Params], Tensor] | None


def run_batched(
    step: Step,
    weights: Weights,
    begin: Begin,
    filters: Sequence[int],
    *,
    steps: int,
    slots: int = 8,
    pad: bool = False,
    tolerance: float | None = None,
    patience: int = 8,
    together: bool = False,
    progress: Callable[[int], object] = lambda _: None,
    snapshots: int = 0,
    decode: Callable[[Params], Tensor] | None = None,
) -> RunResult:
    """Runs every filter to its end, ``slots`` at a time.

    Where the memory does not suffice, half as many go on at a time: what was running starts anew, to the same images.
    On the CPU it runs under :func:`~featvis_func.kept_memory`.

    Args:
        step: from :func:`~featvis_func.make_step`, compiled or not.
        weights: of the backbone.
        begin: filter numbers -> their state before the first step, and their targets.
        filters: any number of them, at least 1.
        steps: the most that a filter gets, at least 1.
        slots: filters at a time, at least 1.
        pad: whether the batch has that width where there are fewer filters, too: for a step compiled for it.
        tolerance: a filter stops once its best score has risen by no more than this share of itself over its last
            ``patience`` steps (a filter that has had no gradient yet goes on). ``None``: all take all steps.
        patience: steps between two looks at a filter, at least 1; the first that can stop it comes after twice that.
        together: whether the filters depend on each other, so that all must be in one batch, come what may.
        progress: called with the number of filter-steps done, or saved; with a negative one where filters begin anew,
            so that the sum comes to ``steps`` for each.
        snapshots: images of each filter to keep over its run, see :func:`~featvis_func.snapshot_steps`.
        decode: one filter's parameters -> its image; needed for these.

    Raises:
        ValueError: a number outside of these, filters that belong together in several batches or with a tolerance, or
            snapshots without ``decode``.
        torch.OutOfMemoryError: one filter alone does not fit, or those that belong together.
    """
    for name, value in (("filters", len(filters)), ("steps", steps), ("slots", slots), ("patience", patience)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_tolerance(tolerance)
    if together and (slots != len(filters) or tolerance is not None):
        raise ValueError(
            f"{len(filters)} filters that belong together need as many slots, got {slots}, and no tolerance"
        )
    moments = snapshot_steps(steps, snapshots)
    if moments and decode is None:
        raise ValueError(f"{snapshots} snapshots were asked for, but no decode= that makes the images")
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        progress(number)

    plan = _Plan(
        step,
        weights,
        lambda some: begin([filters[i] for i in some]),
        steps,
        tolerance,
        patience,
        count,
        moments or (steps,),
        decode if moments else None,
    )
    found: dict[int, _Found] = {}
    on_cpu = all(weight.device.type == "cpu" for weight in weights.values())
    slots = slots if pad else min(slots, len(filters))
    rest = list(range(len(filters)))
    while rest:
        try:
            with kept_memory(on_cpu):
                found.update(_pass(plan, rest, slots))
        except (RuntimeError, MemoryError) as error:
            if slots == 1 or together or not is_out_of_memory(error):
                raise
        rest = [i for i in rest if i not in found]
        if rest:
            # Outside of the handler, where the error no longer holds on to the tensors of the step.
            torch.cuda.empty_cache()
            warnings.warn(f"out of memory with {slots} filters at a time; going on with {slots // 2}", stacklevel=3)
            slots //= 2
            count(steps * len(found) - done)
    bests, infos, maps, films = zip(*(found[i] for i in range(len(filters))), strict=True)
    taken = torch.tensor([len(info.score) for info in infos])
    padded = [tree_map(lambda column: _padded(column, steps), info) for info in infos]
    return RunResult(
        Best(*(torch.stack(leaves) for leaves in zip(*bests, strict=True))),
        Info(*(torch.stack(columns, dim=1) for columns in zip(*padded, strict=True))),
        taken,
        slots,
        torch.stack(maps) if isinstance(maps[0], Tensor) else None,
        torch.stack(films) if moments else None,
    )


def check_tolerance(tolerance: float | None) -> None:
    """Raises ValueError if a tolerance is not one of :func:`run_batched`."""
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"the tolerance must be finite and at least 0, got {tolerance}")


def _pass(plan: _Plan, indices: Sequence[int], slots: int) -> Iterator[tuple[int, _Found]]:
    """Runs some of the filters, by their indices, and yields each as it ends."""
    steps, patience = plan.steps, plan.patience
    waiting = deque(indices)
    held = [waiting.popleft() for _ in range(min(slots, len(indices)))]
    held += held[-1:] * (slots - len(held))  # padding: the same filter again, whose outcome nobody asks for
    active = set(range(min(slots, len(indices))))
    parts: dict[int, list[Info]] = {held[slot]: [] for slot in active}
    films: dict[int, list[Tensor]] = {held[slot]: [] for slot in active}
    state, target = plan.begin(held)
    age = [0] * slots
    while active:
        due = [slot for slot in sorted(active) if age[slot] in plan.moments]
        for slot, image in zip(due, _images(plan, state, due), strict=True):
            films[held[slot]].append(image)
        # To the next moment at which a filter can end, or is looked at: the device is asked then, and not before.
        every = steps if plan.tolerance is None else patience
        length = min(
            min(every - age[slot] % every, next(moment for moment in plan.moments if moment > age[slot]) - age[slot])
            for slot in active
        )
        count = len(active)
        state, info = run(
            plan.step, plan.weights, state, target, steps=length, callback=lambda _, n=count: plan.progress(n)
        )
        info = tree_map(Tensor.cpu, info)
        ended = []
        for slot in sorted(active):
            age[slot] += length
            own = parts[held[slot]]
            own.append(Info(*(column[:, slot] for column in info)))
            if age[slot] == steps or (age[slot] % patience == 0 and _has_converged(own, plan.tolerance, patience)):
                ended.append(slot)
        if not ended:
            continue
        rows = torch.tensor(ended, device=state.step.device)
        kept = (state.best, state.saliency)
        best, maps = tree_map(lambda leaf, rows=rows: leaf[rows].cpu(), kept)
        lasts = _images(plan, state, ended)
        for row, slot in enumerate(ended):
            plan.progress(steps - age[slot])
            infos, film = parts.pop(held[slot]), films.pop(held[slot])
            film += [lasts[row]] * (len(plan.moments) - len(film))  # of one that was stopped, more than one
            its_best, its_map = tree_map(operator.itemgetter(row), (best, maps))
            its_info = Info(*map(torch.cat, zip(*infos, strict=True)))
            yield held[slot], _Found(its_best, its_info, its_map, torch.stack(film))
        active -= set(ended)
        refilled = ended[: len(waiting)]
        if refilled:
            for slot in refilled:
                held[slot], age[slot] = waiting.popleft(), 0
                parts[held[slot]], films[held[slot]] = [], []
            active |= set(refilled)
            fresh = plan.begin(held)
            mask = torch.zeros(slots, dtype=torch.bool)
            mask[refilled] = True
            mask = mask.to(state.step.device)
            state, target = tree_map(functools.partial(select_rows, mask), fresh, (state, target))


def _images(plan: _Plan, state: State, slots: Sequence[int]) -> Sequence[Tensor]:
    """What some slots show now, on the CPU; of each, nothing where no snapshots are kept."""
    if plan.decode is None or not slots:
        return [torch.empty(0)] * len(slots)
    return take_snapshots(plan.decode, state.params, slots).unbind()


def _has_converged(infos: Sequence[Info], tolerance: float | None, patience: int) -> bool:
    """Whether one filter's best score has stopped to rise over its last steps; without a tolerance none has."""
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
