"""Incremental build of a gallery's folder: keep files that are up to date, write the others, remove stale ones."""

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

from featvis_func.gallery import neighbours
from featvis_func.gallery.filter_files import BuildOptions, make_filter_files
from featvis_func.gallery.manifest import (
    MANIFEST_NAME,
    BuiltPart,
    Row,
    content_key,
    read_manifest,
    write_manifest,
)
from featvis_func.gallery.pages import LayerPage
from featvis_func.gallery.source import Part, Section
from featvis_func.sweep import Entry
from featvis_func.validation import first_line

# How often the manifest is saved during a build. An interrupted build repeats at most this much work.
_MANIFEST_INTERVAL_SECONDS = 10.0
# Exceptions raised when the files of a part are damaged.
_UNREADABLE = (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError)

_T = TypeVar("_T")
_R = TypeVar("_R")
_SUBFOLDERS = ("images", "thumbs", "videos", "maps", "films", "examples", neighbours.FOLDER)


class SiteBuilder:
    """Writer of a gallery's folder.

    Args:
        folder: The gallery's folder, prepared by :func:`open_site`.
        previous: The parts that earlier builds wrote, by name.
    """

    def __init__(self, folder: Path, previous: dict[str, BuiltPart]) -> None:
        self._folder = folder
        self._previous = previous
        self._parts: dict[str, BuiltPart] = {}
        self._saved_at = time.monotonic()
        self._kept: dict[str, set[str]] = {}
        self.made = 0
        """Number of filters whose files this build wrote."""
        self.problems: list[str] = []
        """One message for each part that was left out."""

    def add_layer(
        self, section: Section, options: BuildOptions, pool: ThreadPoolExecutor, progress: Callable[[int], object]
    ) -> LayerPage:
        """Build all parts of a layer that are not up to date; call ``progress`` with the number of filters of each."""
        parts = []
        for part, before, after in _with_neighbours(section):
            built = self._build_part(section, part, options, before, after, pool)
            if built is not None:
                parts.append(built)
                self._parts[part.name] = built
                self.keep(section.folder, built.paths())
            progress(len(part.filters))
            if time.monotonic() - self._saved_at > _MANIFEST_INTERVAL_SECONDS:
                self._save_manifest()
        size, thumb = (parts[0].size, parts[0].thumb) if parts else ((1, 1), (1, 1))
        rows = tuple(row for built in parts for row in built.rows)
        map_size = next((built.map for built in parts if built.map is not None), None)
        has_video = any(f"videos/{{}}.{options.moving}" in built.files for built in parts)
        return LayerPage(
            section.name,
            section.folder,
            section.shape,
            len(section.filters),
            rows,
            size,
            thumb,
            map_size,
            options.moving if has_video else None,
            section.family,
        )

    def _build_part(
        self,
        section: Section,
        part: Part,
        options: BuildOptions,
        before: int | None,
        after: int | None,
        pool: ThreadPoolExecutor,
    ) -> BuiltPart | None:
        """Write the files of a part unless they are up to date; return ``None`` if there are no images or on damage."""
        if part.version is None:
            return None
        names = [section.name_of(number) for number in (*part.filters, before, after) if number is not None]
        family = None if section.family is None else (section.family.key, names)
        key = content_key(part.version, part.filters, before, after, section.name, family, options.key)
        folder = self._folder / "layers" / section.folder
        previous = self._previous.get(part.name)
        if previous is not None and previous.key == key and all(_is_nonempty(folder / p) for p in previous.paths()):
            return previous
        beside = dict(
            zip(part.filters, zip([before, *part.filters[:-1]], [*part.filters[1:], after], strict=True), strict=True)
        )
        rows: list[Row] = []
        built: BuiltPart | None = None
        try:
            results = _ordered_map(
                pool,
                lambda entry: make_filter_files(options, section, entry, *beside[entry.filter]),
                _read_entries(part),
            )
            for result in results:
                for path, data in result.files.items():
                    _write_if_changed(folder / path.format(result.row.number), data)
                rows.append(result.row)
                built = BuiltPart(key, (), result.size, result.thumb, result.map, tuple(result.files))
        except _UnreadableError as error:
            self.problems.append(f"{part.name}: cannot be read ({error})")
            return None
        self.made += len(rows)
        return None if built is None else built._replace(rows=tuple(rows))

    def add_neighbours(self, layer: LayerPage) -> None:
        """Write the nearest members of each member of a family of directions, unless the files are up to date."""
        family, numbers = layer.family, [row.number for row in layer.rows]
        if family is None or family.vectors is None or not numbers:
            return
        folder = self._folder / "layers" / layer.folder
        paths = {path for number in numbers if (path := neighbours.file_of(family, number)) is not None}
        key = neighbours.neighbours_key(family, numbers)
        self.keep(layer.folder, paths)
        if all(_first_line(folder / path) == neighbours.first_line_of(key) for path in paths):
            return
        for path, data in neighbours.neighbour_files(family, numbers, key):
            _write_if_changed(folder / path, data)

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the site unless it has this content already."""
        _write_if_changed(self._folder / name, data)

    def keep(self, folder: str, paths: Iterable[str]) -> None:
        """Exempt files of a layer from the removal in :meth:`finish`."""
        self._kept.setdefault(folder, set()).update(paths)

    def _save_manifest(self) -> None:
        """Save the parts built so far, together with those of earlier builds, which may still be up to date."""
        write_manifest(self._folder, {**self._previous, **self._parts})
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Save the manifest and remove files that belong to no filter any more."""
        write_manifest(self._folder, self._parts)
        for layer in _children(self._folder / "layers"):
            kept = self._kept.get(layer.name, set())
            for path in [*_children(layer), *(file for name in _SUBFOLDERS for file in _children(layer / name))]:
                if path.is_file() and path.relative_to(layer).as_posix() not in kept:
                    path.unlink(missing_ok=True)
            for path in (*(layer / name for name in _SUBFOLDERS), layer):
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()


def check_place(folder: Path) -> None:
    """Check that a gallery can be built in a folder.

    Raises:
        ValueError: If the path is a file, or a folder with other files.
    """
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file; a gallery needs a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST_NAME).exists():
        raise ValueError(
            f"{str(folder)!r} is not empty and is not a gallery (it has no {MANIFEST_NAME}); choose another folder"
        )


def open_site(folder: Path) -> dict[str, BuiltPart]:
    """Mark a folder as a gallery, creating it if necessary, and return the parts that are built already, by name."""
    check_place(folder)
    parts = read_manifest(folder)
    if parts is None:
        folder.mkdir(parents=True, exist_ok=True)
        parts = {}
        write_manifest(folder, parts)
    return parts


def _with_neighbours(section: Section) -> Iterator[tuple[Part, int | None, int | None]]:
    """Yield each part with the numbers of the nearest rendered filters before and after it."""
    rendered = [part for part in section.parts if part.version is not None]
    before = {b.name: a.filters[-1] for a, b in pairwise(rendered)}
    after = {a.name: b.filters[0] for a, b in pairwise(rendered)}
    return ((part, before.get(part.name), after.get(part.name)) for part in section.parts)


class _UnreadableError(Exception):
    pass


def _read_entries(part: Part) -> Iterator[Entry]:
    """Yield the filters of a part.

    Raises:
        _UnreadableError: If its files are damaged.
    """
    entries = part.entries()
    while True:
        try:
            entry = next(entries)
        except StopIteration:
            return
        except _UNREADABLE as error:
            raise _UnreadableError(first_line(error)) from error
        yield entry


def _ordered_map(pool: ThreadPoolExecutor, function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """Like ``pool.map``, but with a bounded number of pending items, which bounds the memory."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > 2 * cpu_count():
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _write_if_changed(path: Path, data: bytes) -> None:
    """Write a file atomically unless it has this content already."""
    if path.exists() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `write_file`, which waits for the disk: a page lost in a power failure is built again.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _first_line(path: Path) -> str | None:
    """Return the first line of a file; ``None`` if there is no such file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline().rstrip("\n")
    except OSError:
        return None


def _is_nonempty(path: Path) -> bool:
    """Return whether a file exists and is not empty."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _children(folder: Path) -> list[Path]:
    """Return the sorted contents of a folder, which may not exist."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def cpu_count() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
