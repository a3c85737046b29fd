"""Snapshots: images of a filter at several steps of its run."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from featvis_func.io.pil import to_uint8
from featvis_func.tree import tree_map
from featvis_func.validation import check_int


def snapshot_steps(steps: int, count: int) -> tuple[int, ...]:
    """Return after how many steps each snapshot of a run is taken: evenly spaced, rounded to whole steps.

    Args:
        steps: number of steps of the run, at least 1.
        count: number of snapshots, in ``[0, steps + 1]``.

    Returns:
        Increasing numbers from 0 to ``steps``; for a single snapshot ``steps``.

    Raises:
        ValueError: if ``steps`` is below 1 or ``count`` out of range.

    >>> snapshot_steps(32, 5), snapshot_steps(10, 4), snapshot_steps(32, 1)
    ((0, 8, 16, 24, 32), (0, 3, 7, 10), (32,))
    """
    check_int("steps", steps, 1)
    if not 0 <= count <= steps + 1:
        raise ValueError(f"snapshots must be in [0, {steps + 1}] for steps={steps}, got {count}")
    if count < 2:
        return (steps,) * count
    return tuple(round(i * steps / (count - 1)) for i in range(count))


def take_snapshots(decode: Callable[[Any], Tensor], state: Any, rows: Sequence[int]) -> Tensor:
    """Decode the current images of some filters.

    Args:
        decode: the state of some filters -> their images ``(n, c, h, w)`` in ``[0, 1]``.
        state: of a batch, a pytree: every leaf has the leading axis ``n``.
        rows: the rows of the batch to decode.

    Returns:
        uint8 ``(len(rows), c, h, w)``, or of videos or signals, on the CPU.

    >>> import torch
    >>> take_snapshots(torch.sigmoid, torch.zeros(5, 3, 2, 2), [4, 1]).shape
    torch.Size([2, 3, 2, 2])
    """
    return to_uint8(decode(tree_map(lambda leaf: leaf[list(rows)], state))).cpu()
