"""The files of a saved result: their names, and how they are written."""

import json
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import PIL.Image

from featvis_func.io.atomic import write_file


def image_names(filters: Sequence[int], suffix: str = "png") -> list[str]:
    """Name the files of filters, so that they sort by number.

    >>> image_names([7, 12])
    ['filter-0007.png', 'filter-0012.png']
    """
    digits = max(4, *(len(str(number)) for number in filters))
    return [f"filter-{number:0{digits}d}.{suffix}" for number in filters]


def listed_images(run: Path) -> set[str]:
    """The names of the images and animations that belong to a ``run.json``; none if it cannot be read."""
    try:
        summary = json.loads(run.read_text())
        filters = [int(entry["filter"]) for entry in summary["filters"]]
        suffixes = ("png", "webp") if "snapshots" in summary or "frames" in summary else ("png",)
        return {name for suffix in suffixes for name in image_names(filters, suffix)}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def writable_folder(out: str | Path) -> Path:
    """Create a folder, and check that files can be written into it.

    Returns:
        The folder.

    Raises:
        ValueError: it cannot be created or written to.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to the folder {str(out)!r}: {error.strerror or error}") from error
    return folder


def png_bytes(image: PIL.Image.Image) -> bytes:
    """Encode an image as PNG; equal images give equal bytes."""
    data = BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def write(path: Path, data: bytes) -> Path:
    """Write a file, completely or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        write_file(path, data)
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return path
