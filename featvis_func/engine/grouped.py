"""Batches of whole groups of images that depend on each other, such as the facets of one unit."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from featvis_func.engine.batching import RunResult, run_batched
from featvis_func.engine.memory import is_out_of_memory
from featvis_func.engine.run import Step
from featvis_func.tree import tree_map
from featvis_func.types import Weights


def run_groups(
    step: Step,
    weights: Weights,
    init: Callable[[Sequence[int]], Any],
    filters: Sequence[int],
    *,
    group: int,
    batch_size: int,
    others: Sequence[int] = (),
    progress: Callable[[int], object] = lambda _: None,
    **options: Any,
) -> RunResult:
    """Run groups of filters, as many groups at a time as fit into a batch. Every batch has the same size.

    Where memory runs out, the batch is halved, down to one group.

    Args:
        step, weights, init: as for :func:`~featvis_func.engine.batching.run_batched`.
        filters: whole groups, each of ``group`` successive numbers.
        group: filters in a group.
        batch_size: a multiple of ``group``.
        others: further whole groups, which fill a batch that would be smaller; their results are not returned.
        progress: called with the number of filter-steps that were taken.
        **options: the other arguments of :func:`~featvis_func.engine.batching.run_batched`, without ``tolerance``.

    Raises:
        torch.OutOfMemoryError: one group does not fit into memory.
    """
    results: list[RunResult] = []
    done = 0
    while done < len(filters):
        chosen = list(filters[done : done + batch_size])
        wanted = len(chosen)
        if wanted < batch_size:
            chosen += [f for f in (*others, *filters) if f not in chosen][: batch_size - wanted]

        def count(number: int, share: float = wanted / len(chosen)) -> None:
            progress(round(number * share))

        try:
            run = run_batched(
                step, weights, init, chosen, batch_size=len(chosen), single_batch=True, progress=count, **options
            )
        except (RuntimeError, MemoryError) as error:
            if batch_size == group or not is_out_of_memory(error):
                raise
        else:
            results.append(_first(run, wanted))
            done += wanted
            continue
        # Outside of the handler, where the error no longer refers to the tensors of the step.
        torch.cuda.empty_cache()
        smaller = max(group, batch_size // 2 // group * group)
        warnings.warn(f"out of memory with batch_size={batch_size}; going on with {smaller}", stacklevel=3)
        batch_size = smaller

    def join(name: str, axis: int = 0) -> Any:
        columns = [getattr(result, name) for result in results]
        return None if columns[0] is None else tree_map(lambda *parts: torch.cat(parts, axis), *columns)

    return RunResult(join("best"), join("info", 1), join("steps"), batch_size, join("saliency"), join("snapshots"))


def _first(run: RunResult, count: int) -> RunResult:
    """The results of the first filters."""

    def cut(column: Tensor) -> Tensor:
        return column[:count]

    return run._replace(
        best=tree_map(cut, run.best),
        info=tree_map(lambda column: column[:, :count], run.info),
        steps=cut(run.steps),
        saliency=None if run.saliency is None else cut(run.saliency),
        snapshots=None if run.snapshots is None else cut(run.snapshots),
    )
