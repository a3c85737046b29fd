"""The members of a family of directions that are nearest to each member, by the cosine of their directions.

Which members these are depends on all that are rendered. They are therefore not in the pages, but in files of their own
that the pages' scripts read, a few hundred members in each.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from featvis_func.gallery.families import GalleryFamily
from featvis_func.gallery.manifest import content_key

COUNT = 8
"""Neighbours of each member."""
CHUNK = 512
"""Members in each file."""
FOLDER = "neighbours"
_BLOCK_ELEMENTS = 1 << 23  # of the cosines that are in memory at a time


def file_of(family: GalleryFamily | None, number: int) -> str | None:
    """Path in the layer's folder of the file with the neighbours of an image; ``None`` if it has no direction."""
    if family is None or family.vectors is None:
        return None
    return f"{FOLDER}/{number // family.copies // CHUNK}.js"


def neighbours_key(family: GalleryFamily, numbers: Sequence[int]) -> str:
    """Hash of all that the neighbours among some images depend on."""
    assert family.vectors is not None
    digest = hashlib.sha256(family.vectors.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
    return content_key(digest, tuple(family.vectors.shape), family.copies, family.rows, tuple(numbers), COUNT, CHUNK)


def neighbour_files(family: GalleryFamily, numbers: Sequence[int], key: str) -> Iterator[tuple[str, bytes]]:
    """Find the members nearest to each member among those that are rendered, and write them as scripts.

    Args:
        family: with directions.
        numbers: of the images that are rendered, in increasing order.
        key: from :func:`neighbours_key`, which the first line of each file holds.

    Yields:
        Paths in the layer's folder, and contents. Each file maps a member to pairs: the first image of a neighbour, and
        the cosine.
    """
    first: dict[int, int] = {}
    for number in numbers:
        first.setdefault(number // family.copies, number)
    members = list(first)
    assert family.vectors is not None
    rows = torch.tensor([family.rows[m] for m in members] if family.rows else members)
    found: dict[int, list[list[float]]] = {}
    for position, pairs in enumerate(nearest(family.vectors[rows], COUNT)):
        found[members[position]] = [[first[members[i]], round(cosine, 3)] for i, cosine in pairs]
        chunk = members[position] // CHUNK
        if position + 1 == len(members) or members[position + 1] // CHUNK != chunk:
            text = json.dumps(found, separators=(",", ":"))
            yield f"{FOLDER}/{chunk}.js", f"{first_line_of(key)}\nfeatvis.neighbours = {text};\n".encode()
            found = {}


def first_line_of(key: str) -> str:
    """The first line of files that are up to date."""
    return f"// {key}"


def nearest(vectors: Tensor, count: int) -> Iterator[list[tuple[int, float]]]:
    """Find the rows of a matrix that are nearest to each row, by the cosine.

    The memory is bounded: cosines are computed for a block of rows at a time. A row of zeros has no neighbours and is
    none.

    Args:
        vectors: ``(n, d)``.
        count: of neighbours, at most.

    Yields:
        For each row, pairs of row number and cosine, the highest cosine first.

    >>> list(nearest(torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]]), 2))
    [[(2, 0.6000...)], [], [(0, 0.6000...)]]
    """
    largest = vectors.abs().amax(1, keepdim=True)
    zero = (largest == 0).squeeze(1)
    unit = normalize((vectors / largest.masked_fill(largest == 0, 1)).float(), dim=1)
    total = len(unit)
    block = max(1, _BLOCK_ELEMENTS // max(1, total))
    for begin in range(0, total, block):
        cosines = unit[begin : begin + block] @ unit.T
        cosines[:, zero] = -torch.inf
        cosines[zero[begin : begin + block]] = -torch.inf
        cosines.diagonal(begin).fill_(-torch.inf)
        values, indices = cosines.topk(min(count, total), 1)
        for row, others in zip(values.tolist(), indices.tolist(), strict=True):
            yield [(i, cosine) for i, cosine in zip(others, row, strict=True) if cosine >= -2]
