"""The best images of each filter so far, into which the scores of one batch after the other are merged."""

from typing import NamedTuple

import torch
from torch import Tensor


class Top(NamedTuple):
    """The best images of each filter so far: scores in descending order, equal scores in the order of the files."""

    scores: Tensor
    """``(F, k)``; missing entries are ``-inf``."""
    pictures: Tensor
    """int64 ``(F, k)``: indices into the list of files; missing entries are -1."""
    places: Tensor
    """int64 ``(F, k)``: flat index of the position responsible; missing entries are -1."""


def empty_top(filters: int, count: int, device: torch.device | str) -> Top:
    """Make the best of no images."""
    missing = torch.full((filters, count), -1, device=device)
    return Top(torch.full((filters, count), -torch.inf, dtype=torch.float32, device=device), missing, missing)


def keep_best(top: Top, scores: Tensor, places: Tensor, numbers: Tensor) -> Top:
    """Merge the scores of a batch into the best so far.

    Args:
        top: the best so far, for ``F`` filters.
        scores: ``(n, F)``, without NaN. Entries of ``-inf`` are never kept.
        places: int64 ``(n, F)``: flat indices of the positions responsible.
        numbers: int64 ``(n,)``: indices of the files, ascending and larger than all in ``top``.

    Returns:
        The best of both.

    >>> first = torch.tensor([[1.0], [3.0]]), torch.tensor([[5], [6]]), torch.tensor([0, 1])
    >>> then = torch.tensor([[3.0], [2.0]]), torch.tensor([[7], [8]]), torch.tensor([2, 3])
    >>> keep_best(keep_best(empty_top(1, 2, "cpu"), *first), *then)
    Top(scores=tensor([[3., 3.]]), pictures=tensor([[1, 2]]), places=tensor([[6, 7]]))
    """
    # After the first batches, few images improve on the best so far: sort only the filters that they do improve.
    rows = (scores > top.scores[:, -1]).any(0).nonzero()[:, 0]
    if not len(rows):
        return top
    new = Top(scores.T[rows], numbers.expand(len(rows), -1), places.T[rows])
    merged = Top(*(torch.cat([old[rows], own], dim=1) for old, own in zip(top, new, strict=True)))
    order = merged.scores.sort(dim=1, descending=True, stable=True).indices[:, : top.scores.shape[1]]
    return Top(*(old.index_copy(0, rows, both.gather(1, order)) for old, both in zip(top, merged, strict=True)))
