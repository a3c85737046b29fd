"""Main memory that is freed and taken again at every step, and should not be fetched anew each time."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# The parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# What glibc has by itself once a process has freed a large piece: the largest thresholds that it goes up to, and its
# largest number of mappings.
_USUAL = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20))
# No mappings of their own for large pieces, and nothing handed back.
_KEPT = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))

_turn = threading.Lock()
_blocks = 0


@contextmanager
def kept_memory(wanted: bool = True) -> Iterator[None]:
    """Within the block the process keeps the main memory that it frees, for what it takes next.

    A step on the CPU takes and frees several hundred megabytes. glibc hands most of them back to the system, which has
    to fill them with zeros, page by page, when the next step asks again. The setting is the process's. After the last
    of several blocks, of whatever threads, it is what glibc itself goes up to in a process that frees large pieces, and
    what is free is handed back. It holds for the heap of the process's first thread: in other threads, and in a process
    that was once refused memory, glibc hands pieces of more than 64 MiB back as ever.

    Args:
        wanted: False: nothing is changed. Nor is it where the C library is another than glibc, or where the
            environment sets its allocator (``MALLOC_TRIM_THRESHOLD_`` and the like, ``GLIBC_TUNABLES``).

    >>> with kept_memory():
    ...     len(bytearray(2**20))
    1048576
    """
    global _blocks
    library = _glibc() if wanted else None
    if library is None:
        yield
        return
    with _turn:
        _blocks += 1
        if _blocks == 1:
            _set(library, _KEPT)
    try:
        yield
    finally:
        with _turn:
            _blocks -= 1
            if _blocks == 0:
                _set(library, _USUAL)
                library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc with the allocator at its own settings."""
    if any((name.startswith("MALLOC_") and name.endswith("_")) or name == "GLIBC_TUNABLES" for name in os.environ):
        return None
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):  # Windows; another library
        return None
    return ctypes.CDLL(None) if version else None


def _set(library: ctypes.CDLL, values: tuple[tuple[int, int], ...]) -> None:
    for parameter, value in values:
        library.mallopt(parameter, value)
