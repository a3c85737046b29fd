"""Images on their way: at which steps of a run they are kept, and how."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.func import vmap

from featvis_func.io.pil import to_uint8
from featvis_func.tree import tree_map
from featvis_func.types import Params


def snapshot_steps(steps: int, count: int) -> tuple[int, ...]:
    """After how many steps each snapshot of a run is taken: evenly spaced, to whole steps.

    Args:
        steps: of the run, at least 1.
        count: of snapshots, from 0 (none) to ``steps + 1``.

    Returns:
        Rising numbers from 0, the start, to ``steps``, the end; of one snapshot, the end.

    Raises:
        ValueError: fewer than 1 step, or a count out of range.

    >>> snapshot_steps(32, 5), snapshot_steps(10, 4), snapshot_steps(32, 1)
    ((0, 8, 16, 24, 32), (0, 3, 7, 10), (32,))
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= count <= steps + 1:
        raise ValueError(f"snapshots must be 0 to {steps + 1}, as {steps} steps have so many images, got {count}")
    if count < 2:
        return (steps,) * count
    return tuple(round(i * steps / (count - 1)) for i in range(count))


def take_snapshots(decode: Callable[[Params], Tensor], params: Params, rows: Sequence[int]) -> Tensor:
    """The images that some filters have come to.

    Args:
        decode: one filter's parameters -> its image ``(c, h, w)`` in ``[0, 1]``.
        params: of a batch: every leaf has the leading axis ``n``.
        rows: of the batch; only these are decoded.

    Returns:
        uint8 ``(len(rows), c, h, w)``, on the CPU.

    >>> import torch
    >>> take_snapshots(torch.sigmoid, torch.zeros(5, 3, 2, 2), [4, 1]).shape
    torch.Size([2, 3, 2, 2])
    """
    some = tree_map(lambda leaf: leaf[list(rows)], params)
    return to_uint8(vmap(decode)(some)).cpu()
