"""A gallery's folder while it is built: what of it is there already, what is put in, and what goes."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import safetensors

from featvis_func.gallery.filter_files import Making, make_filter
from featvis_func.gallery.manifest import NAME, Made, Row, key_of, read_manifest, write_manifest
from featvis_func.gallery.pages import LayerPage
from featvis_func.gallery.source import Part, Section
from featvis_func.sweep import Entry
from featvis_func.validation import first_line

# What is made is noted so often: a build that is broken off has so much to do again.
_SECONDS_BETWEEN_NOTES = 10.0
# What a part whose files are damaged raises when it is read.
_UNREADABLE = (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError)

_T = TypeVar("_T")
_R = TypeVar("_R")
_INNER = ("images", "thumbs", "maps", "films", "examples")


class LayerRef:
    """A gallery's folder while it is built.

    Args:
        folder: of the gallery, from :func:`begin`.
        known: what of it was made before.
    """

    def __init__(self, folder: Path, known: dict[str, Made]) -> None:
        self._folder = folder
        self._known = known
        self._parts: dict[str, Made] = {}
        self._noted = time.monotonic()
        self._kept: dict[str, set[str]] = {}
        self.made = 0
        self.problems: list[str] = []

    def layer(
        self, section: Section, making: Making, pool: ThreadPoolExecutor, progress: Callable[[int], object]
    ) -> LayerPage:
        """All parts of a layer."""
        found = []
        for part, before, after in _with_neighbours(section):
            made = self._part(section, part, making, before, after, pool)
            if made is not None:
                found.append(made)
                self._parts[part.name] = made
                self.keep(section.folder, made.paths())
            progress(len(part.filters))
            if time.monotonic() - self._noted > _SECONDS_BETWEEN_NOTES:
                self.note()
        size, thumb = (found[0].size, found[0].thumb) if found else ((1, 1), (1, 1))
        rows = tuple(row for made in found for row in made.rows)
        maps = any("maps/{}.webp" in made.files for made in found)
        return LayerPage(section.name, section.folder, section.shape, len(section.filters), rows, size, thumb, maps)

    def _part(
        self,
        section: Section,
        part: Part,
        making: Making,
        before: int | None,
        after: int | None,
        pool: ThreadPoolExecutor,
    ) -> Made | None:
        if part.version is None:
            return None
        key = key_of(part.version, part.filters, before, after, section.name, making.key)
        folder = self._folder / "layers" / section.folder
        known = self._known.get(part.name)
        if known is not None and known.key == key and all(_is_there(folder / path) for path in known.paths()):
            return known
        beside = dict(
            zip(part.filters, zip([before, *part.filters[:-1]], [*part.filters[1:], after], strict=True), strict=True)
        )
        rows: list[Row] = []
        made: Made | None = None
        try:
            jobs = _in_order(
                pool, lambda entry: make_filter(making, section, entry, *beside[entry.filter]), _read(part)
            )
            for one in jobs:
                for path, data in one.files.items():
                    _put(folder / path.format(one.row.number), data)
                rows.append(one.row)
                made = Made(key, (), one.size, one.thumb, tuple(one.files))
        except _UnreadableError as error:
            self.problems.append(f"{part.name}: cannot be read ({error})")
            return None
        self.made += len(rows)
        return None if made is None else made._replace(rows=tuple(rows))

    def put(self, name: str, data: bytes) -> None:
        """Writes a file of the site, unless it is there already."""
        _put(self._folder / name, data)

    def keep(self, folder: str, paths: Iterable[str]) -> None:
        """Files of a layer that stay."""
        self._kept.setdefault(folder, set()).update(paths)

    def note(self) -> None:
        """Notes what is made by now; what was there before may still hold."""
        write_manifest(self._folder, {**self._known, **self._parts})
        self._noted = time.monotonic()

    def finish(self) -> None:
        """Notes what there is, and removes what belongs to no filter any more."""
        write_manifest(self._folder, self._parts)
        for layer in _entries(self._folder / "layers"):
            kept = self._kept.get(layer.name, set())
            for path in [*_entries(layer), *(inner for name in _INNER for inner in _entries(layer / name))]:
                if path.is_file() and path.relative_to(layer).as_posix() not in kept:
                    path.unlink(missing_ok=True)
            for path in (*(layer / name for name in _INNER), layer):
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()


def check_place(folder: Path) -> None:
    """Raises ValueError where a gallery would stand among other files."""
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file; a gallery needs a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / NAME).exists():
        raise ValueError(f"{str(folder)!r} is not empty, and no gallery (it has no {NAME}); give another folder")


def begin(folder: Path) -> dict[str, Made]:
    """Makes the folder a gallery's; returns what of it is made already."""
    check_place(folder)
    known = read_manifest(folder)
    if known is None:
        folder.mkdir(parents=True, exist_ok=True)
        known = {}
        write_manifest(folder, known)
    return known


def _with_neighbours(section: Section) -> Iterator[tuple[Part, int | None, int | None]]:
    """Each part, with the filters just before and after it of which there are images."""
    done = [part for part in section.parts if part.version is not None]
    before = {b.name: a.filters[-1] for a, b in pairwise(done)}
    after = {a.name: b.filters[0] for a, b in pairwise(done)}
    return ((part, before.get(part.name), after.get(part.name)) for part in section.parts)


class _UnreadableError(Exception):
    pass


def _read(part: Part) -> Iterator[Entry]:
    """The filters of a part. Raises _UnreadableError where its files are damaged."""
    entries = part.entries()
    while True:
        try:
            entry = next(entries)
        except StopIteration:
            return
        except _UNREADABLE as error:
            raise _UnreadableError(first_line(error)) from error
        yield entry


def _in_order(pool: ThreadPoolExecutor, function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """As ``map``, on a pool, with few items on their way."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 2 * processors():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _put(path: Path, data: bytes) -> None:
    """Writes a file whole, unless it is there already."""
    if path.exists() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by `files.write_file`, which waits for the disk: a page that a power cut takes is made again.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _is_there(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
