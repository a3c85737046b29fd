"""Pictures read by threads, ahead of what is computed with them, and never more than a few at a time."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.io.image_files import read_pixels

_MOST_THREADS = 8


class Batch(NamedTuple):
    """Pictures, in the order of the files."""

    pixels: Tensor
    """uint8 ``(n, c, h, w)``."""
    numbers: Tensor
    """int64 ``(n,)``: of their files."""
    sizes: Tensor
    """int64 ``(n, 2)``: height and width of the whole pictures."""


def batches(
    files: Sequence[Path],
    size: tuple[int, int],
    *,
    channels: int,
    batch_size: int,
    skipped: Callable[[Path, str], object],
    threads: int | None = None,
) -> Iterator[Batch]:
    """Reads files in batches.

    Args:
        files: pictures, as :func:`~featvis_func.io.image_files.find_pictures` lists them.
        size: ``(h, w)`` to which they are resized and cropped.
        channels: 1, 3 or 4.
        batch_size: pictures in each but the last, at least 1. No more than this is read ahead.
        skipped: called with each file that cannot be read, and why.
        threads: that read; default: one per processor, at most 8.
    """
    ahead: deque = deque()
    waiting = iter(enumerate(files))
    held: list[tuple[int, Tensor, tuple[int, int]]] = []
    pool = ThreadPoolExecutor(threads or min(_MOST_THREADS, os.cpu_count() or 1), "pictures")
    try:
        while True:
            while len(ahead) < batch_size and (following := next(waiting, None)) is not None:
                number, path = following
                ahead.append((number, path, pool.submit(read_pixels, path, size, channels=channels, quick=True)))
            if not ahead:
                break
            number, path, reading = ahead.popleft()
            try:
                held.append((number, *reading.result()))
            except ValueError as error:
                skipped(path, str(error))
            del reading
            if len(held) == batch_size:
                yield _batch(held)
                held = []
        if held:
            yield _batch(held)
    finally:
        pool.shutdown(cancel_futures=True)


def _batch(held: Sequence[tuple[int, Tensor, tuple[int, int]]]) -> Batch:
    numbers, pixels, sizes = zip(*held, strict=True)
    return Batch(torch.stack(pixels), torch.tensor(numbers), torch.tensor(sizes))
