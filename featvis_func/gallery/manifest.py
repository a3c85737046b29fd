"""Manifest of a gallery: the file that marks a folder as a gallery and records which parts are built."""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from featvis_func.io.atomic import write_file

FORMAT = 1
MANIFEST_NAME = "gallery.json"


class Row(NamedTuple):
    """Facts about one filter that the pages of its layer show. The order of the fields is that of ``data.js``."""

    number: int
    score: float | None
    """``None`` if no step had a finite score."""
    best_step: int
    steps: int
    status: str
    converged_step: int
    """The step of convergence or -1, see :func:`~featvis_func.gallery.curve.convergence_step`."""
    name: str = ""
    """Name of the member of a family; empty if it has none."""

    @property
    def score_text(self) -> str:
        """The score, formatted for display."""
        return "none" if self.score is None else format_number(self.score)


def format_number(value: float) -> str:
    """Format a number with four significant digits. ``formatNumber`` in ``tools.js`` does the same.

    >>> format_number(10063.2), format_number(0.5), format_number(-1234567890.0)
    ('10060', '0.5', '-1.235e+09')
    """
    text = f"{value:.4g}"
    return f"{float(text):.0f}" if 1e4 <= abs(float(text)) < 1e7 else text


class BuiltPart(NamedTuple):
    """A part of a gallery, usually one unit of a sweep, whose files are written."""

    key: str
    """Hash of everything that the files depend on."""
    rows: tuple[Row, ...]
    size: tuple[int, int]
    """``(w, h)`` of the images in pixels, as displayed."""
    thumb: tuple[int, int]
    """``(w, h)`` of the thumbnails in pixels."""
    map: tuple[int, int] | None
    """``(w, h)`` of the activation maps in pixels, as displayed; ``None`` if the layer has none."""
    files: tuple[str, ...]
    """Paths of each filter's files in the layer's folder; ``{}`` stands for the filter's number."""

    def paths(self) -> Iterator[str]:
        """Iterate over the paths of all files in the layer's folder."""
        return (path.format(row.number) for row in self.rows for path in self.files)


def read_manifest(folder: Path) -> dict[str, BuiltPart] | None:
    """Read which parts of a gallery are built.

    Returns:
        The parts by name, or ``None`` if the folder has no manifest. A manifest that is damaged, or written by another
        version of the gallery's code, counts as one without parts, so that everything is rebuilt.
    """
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
        if manifest["program"] != program_hash():
            return {}
        return {
            name: BuiltPart(
                part["key"],
                tuple(Row(*row) for row in part["rows"]),
                tuple(part["size"]),
                tuple(part["thumb"]),
                None if part["map"] is None else tuple(part["map"]),
                tuple(part["files"]),
            )
            for name, part in manifest["parts"].items()
        }
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_manifest(folder: Path, parts: dict[str, BuiltPart]) -> None:
    """Record which parts of a gallery are built.

    Raises:
        OSError: If the file cannot be written.
    """
    manifest = {
        "format": FORMAT,
        "program": program_hash(),
        "parts": {name: part._asdict() for name, part in parts.items()},
    }
    write_file(folder / MANIFEST_NAME, json.dumps(manifest, separators=(",", ":"), sort_keys=True).encode())


def content_key(*values: Any) -> str:
    """Return a short hash of values; those that JSON cannot represent are converted with ``str``."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def program_hash() -> str:
    """Return a hash of the gallery's code, templates and assets; a change of it rebuilds every gallery."""
    digest = hashlib.sha256(f"{FORMAT} {metadata.version('featvis-func')}".encode())
    root = Path(__file__).parent
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".html", ".css", ".js")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
