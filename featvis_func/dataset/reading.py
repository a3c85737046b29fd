"""Read batches of images in threads, with a bounded number of images in memory."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.io.image_files import read_pixels

_MAX_THREADS = 8


class Batch(NamedTuple):
    """A batch of images, in the order of their files."""

    pixels: Tensor
    """uint8 ``(n, c, h, w)``."""
    numbers: Tensor
    """int64 ``(n,)``: indices into the list of files."""
    sizes: Tensor
    """int64 ``(n, 2)``: height and width of the images before resizing and cropping."""


def read_batches(
    files: Sequence[Path],
    size: tuple[int, int],
    *,
    channels: int,
    batch_size: int,
    on_error: Callable[[Path, str], object],
    threads: int | None = None,
) -> Iterator[Batch]:
    """Read image files in batches.

    Args:
        files: image files, as returned by :func:`~featvis_func.io.image_files.find_images`.
        size: ``(h, w)`` in pixels to which the images are resized and cropped.
        channels: 1, 3 or 4.
        batch_size: number of images per batch, at least 1; the last batch may be smaller. At most this many images are
            read ahead.
        on_error: called with the path and the error message of each file that cannot be read.
        threads: number of threads. Default: one per processor, at most 8.

    Yields:
        Batches of the readable images, in the order of ``files``.
    """
    pending: deque = deque()
    unread = iter(enumerate(files))
    images: list[tuple[int, Tensor, tuple[int, int]]] = []
    pool = ThreadPoolExecutor(threads or min(_MAX_THREADS, os.cpu_count() or 1), "image-reader")
    try:
        while True:
            while len(pending) < batch_size and (following := next(unread, None)) is not None:
                number, path = following
                pending.append((number, path, pool.submit(read_pixels, path, size, channels=channels, quick=True)))
            if not pending:
                break
            number, path, future = pending.popleft()
            try:
                images.append((number, *future.result()))
            except ValueError as error:
                on_error(path, str(error))
            del future  # It keeps a reference to the pixels.
            if len(images) == batch_size:
                yield _collate(images)
                images = []
        if images:
            yield _collate(images)
    finally:
        pool.shutdown(cancel_futures=True)


def _collate(images: Sequence[tuple[int, Tensor, tuple[int, int]]]) -> Batch:
    numbers, pixels, sizes = zip(*images, strict=True)
    return Batch(torch.stack(pixels), torch.tensor(numbers), torch.tensor(sizes))
