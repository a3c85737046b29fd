"""Keep freed main memory in the process, so that the next step does not have to request it from the system again."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# The values that glibc adapts to in a process that has freed a large block: the maximum of its dynamic thresholds, and
# its default number of mappings.
_DEFAULTS = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20))
# Large blocks get no mappings of their own, and no memory is returned to the system.
_KEEP = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))

_lock = threading.Lock()
_active = 0
"""Number of ``with kept_memory()`` blocks that are running."""


@contextmanager
def kept_memory(wanted: bool = True) -> Iterator[None]:
    """Context manager in which the process keeps the main memory that it frees, for its next allocations.

    A step on the CPU allocates and frees several hundred megabytes. glibc returns most of them to the system, which
    has to fill them with zeros, page by page, when the next step allocates them again.

    The setting applies to the whole process. When the last of several blocks, of any threads, ends, the thresholds are
    set to the values that glibc adapts to by itself in a process that frees large blocks, and free memory is returned.
    Only the heap of the main thread is affected: in other threads, and in a process in which an allocation has failed
    once, glibc still returns blocks of more than 64 MiB.

    Args:
        wanted: whether to change anything. Nothing changes either where the C library is not glibc, or where the
            environment configures its allocator (``MALLOC_TRIM_THRESHOLD_`` and the like, ``GLIBC_TUNABLES``).

    >>> with kept_memory():
    ...     len(bytearray(2**20))
    1048576
    """
    global _active
    library = _glibc() if wanted else None
    if library is None:
        yield
        return
    with _lock:
        _active += 1
        if _active == 1:
            _configure(library, _KEEP)
    try:
        yield
    finally:
        with _lock:
            _active -= 1
            if _active == 0:
                _configure(library, _DEFAULTS)
                library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Load the C library if it is glibc and the environment does not configure its allocator."""
    if any((name.startswith("MALLOC_") and name.endswith("_")) or name == "GLIBC_TUNABLES" for name in os.environ):
        return None
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):  # Windows, or another C library
        return None
    return ctypes.CDLL(None) if version else None


def _configure(library: ctypes.CDLL, values: tuple[tuple[int, int], ...]) -> None:
    for parameter, value in values:
        library.mallopt(parameter, value)
