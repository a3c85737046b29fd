"""What a gallery's folder says of itself: that it is one, and what of it is made already."""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from featvis_func.io.atomic import write_file

FORMAT = 1
NAME = "gallery.json"


class Row(NamedTuple):
    """What the pages of a layer tell of each filter."""

    number: int
    score: float | None
    """``None``: it never was finite."""
    best: int
    steps: int
    status: str
    settled: int
    """The step at which the score had made most of its way, see :func:`~featvis_func.gallery.curve.settled_step`."""

    @property
    def said(self) -> str:
        """The score, for people."""
        return "none" if self.score is None else short(self.score)


def short(value: float) -> str:
    """A number to four digits, for people; the scripts write theirs alike.

    >>> short(10063.2), short(0.5), short(-1234567890.0)
    ('10060', '0.5', '-1.235e+09')
    """
    text = f"{value:.4g}"
    return f"{float(text):.0f}" if 1e4 <= abs(float(text)) < 1e7 else text


class Made(NamedTuple):
    """A part of a gallery that is made."""

    key: str
    """Of all that its files depend on."""
    rows: tuple[Row, ...]
    size: tuple[int, int]
    """``(w, h)`` of the images in pixels, as they are shown."""
    thumb: tuple[int, int]
    files: tuple[str, ...]
    """The paths of each filter's files in its layer's folder, with ``{}`` for its number."""

    def paths(self) -> Iterator[str]:
        """Of all files, in the layer's folder."""
        return (path.format(row.number) for row in self.rows for path in self.files)


def read_manifest(folder: Path) -> dict[str, Made] | None:
    """The parts that are made, by name; ``None`` where the folder is no gallery.

    A damaged manifest is as one that tells of nothing.
    """
    try:
        value = json.loads((folder / NAME).read_bytes())
        if value["program"] != program():
            return {}
        return {
            name: Made(
                made["key"],
                tuple(Row(*row) for row in made["rows"]),
                tuple(made["size"]),
                tuple(made["thumb"]),
                tuple(made["files"]),
            )
            for name, made in value["parts"].items()
        }
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_manifest(folder: Path, parts: dict[str, Made]) -> None:
    """Notes what is made. Raises OSError where that cannot be written."""
    value = {"format": FORMAT, "program": program(), "parts": {name: made._asdict() for name, made in parts.items()}}
    write_file(folder / NAME, json.dumps(value, separators=(",", ":"), sort_keys=True).encode())


def key_of(*parts: Any) -> str:
    """A short hash of what JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def program() -> str:
    """Of what makes the pages: another one makes all of them anew."""
    digest = hashlib.sha256(f"{FORMAT} {metadata.version('featvis-func')}".encode())
    here = Path(__file__).parent
    for path in sorted(p for p in here.rglob("*") if p.suffix in (".py", ".html", ".css", ".js")):
        digest.update(path.relative_to(here).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
