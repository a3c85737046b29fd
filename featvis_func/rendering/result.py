"""What a render gives back, as tensors, as a picture and as files."""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from featvis_func.io.animation import animate, animation_bytes
from featvis_func.io.atomic import write_file
from featvis_func.io.filter_spec import ranges
from featvis_func.io.pil import picture
from featvis_func.validation import first_line

_GAP = 2  # white pixels between the images of a grid


@dataclass(frozen=True, eq=False)
class Result:
    """One image per filter, and how it came about. All tensors are on the CPU; ``n`` counts the filters."""

    images: Tensor
    """float32 ``(n, c, h, w)`` in ``[0, 1]``: the best seen, decoded, without the view."""
    activations: Tensor
    """float32 ``(n, h', w')``, ``(n, t)`` or ``(n,)``: that filter's map at that step, under that step's view."""
    scores: Tensor
    """float32 ``(n,)``: the objective at that step; ``-inf`` if it never was finite."""
    best_step: Tensor
    """int64 ``(n,)``, from 0; ``-1`` if the score never was finite."""
    filters: tuple[int, ...]
    status: tuple[str, ...]
    """``"ok"``; ``"dead"``: no step had a gradient; ``"nonfinite"``: some step's score or gradient was not finite (it
    was skipped, and the image is the best of the others)."""
    history: Tensor
    """float32 ``(steps, n)``: the objective at each step, under that step's view; NaN after a filter's last."""
    steps: Tensor
    """int64 ``(n,)``: how many steps each filter took."""
    config: dict[str, Any] = field(default_factory=dict)
    """What it takes to make it again."""
    saliency: Tensor | None = None
    """float32 ``(n, h, w)``, where asked for: over all steps, how much the score's gradient was at each pixel."""
    snapshots: Tensor | None = None
    """uint8 ``(n, k, c, h, w)``, where asked for: the images after so many steps as
    :func:`~featvis_func.snapshot_steps` says, from the start to the last; a filter that was stopped early
    stands still from there on."""

    def __repr__(self) -> str:
        odd = {s: self.status.count(s) for s in sorted(set(self.status)) if s != "ok"}
        n, c, h, w = self.images.shape
        return f"Result({n} images {c} x {h} x {w}, mean score {self.scores.mean():.4g}{f', {odd}' if odd else ''})"

    def grid(self, *, columns: int | None = None) -> PIL.Image.Image:
        """All images on one white sheet, in order, row by row.

        Args:
            columns: images in a row. Default: as square as can be.

        Returns:
            A PIL image. Channels that are no colours (other than 1, 3 or 4) stand side by side in grey.

        Raises:
            ValueError: ``columns`` is below 1.
        """
        tiles = [np.asarray(picture(image)) for image in self.images]
        columns = math.ceil(math.sqrt(len(tiles))) if columns is None else columns
        if columns < 1:
            raise ValueError(f"columns must be at least 1, got {columns}")
        columns = min(columns, len(tiles))
        rows = -(-len(tiles) // columns)
        h, w = tiles[0].shape[:2]
        shape = (rows * (h + _GAP) + _GAP, columns * (w + _GAP) + _GAP, *tiles[0].shape[2:])
        sheet = np.full(shape, 255, np.uint8)
        for i, tile in enumerate(tiles):
            y, x = (i // columns) * (h + _GAP) + _GAP, (i % columns) * (w + _GAP) + _GAP
            sheet[y : y + h, x : x + w] = tile
        return PIL.Image.fromarray(sheet)

    def transparent(self, *, percentile: float = 90.0) -> "Result":
        """The images with their saliency as a fourth channel: opaque where the run cared for the pixels.

        The map is smoothed over a 32nd of the image, and divided by its percentile.

        Args:
            percentile: of the map, in ``(0, 100]``; from there on the image is opaque.

        Returns:
            The same result with RGBA images ``(n, 4, h, w)`` (or one channel more than there were).

        Raises:
            ValueError: rendered without ``saliency=True``, or a percentile out of range.

        Source: Fel et al., MACO (arXiv 2306.06805), section 4; without its noise, by smoothing.
        """
        if self.saliency is None:
            raise ValueError("this result has no saliency; render with saliency=True")
        if not 0 < percentile <= 100:
            raise ValueError(f"the percentile must be above 0 and at most 100, got {percentile}")
        h, w = self.saliency.shape[1:]
        radius = max(h, w) // 64
        edged = F.pad(self.saliency[:, None], (radius,) * 4, mode="replicate")
        smooth = F.avg_pool2d(edged, 2 * radius + 1, stride=1).flatten(1)
        full = torch.quantile(smooth, percentile / 100, dim=1, keepdim=True).clamp_min(torch.finfo(smooth.dtype).tiny)
        opacity = (smooth / full).clamp(0, 1).reshape(-1, 1, h, w)
        return replace(self, images=torch.cat([self.images, opacity], dim=1))

    def animate(self, path: str | Path, filter: int, *, seconds: float = 2.0, hold: float = 1.0) -> Path:
        """Writes one filter's snapshots as an animation, whole or not at all.

        Args:
            path: a ``.gif`` or ``.webp`` in a folder that exists.
            filter: its number.
            seconds, hold: as for :func:`~featvis_func.animate`.

        Returns:
            The path.

        Raises:
            ValueError: rendered without snapshots, no such filter, another suffix, or a file that cannot be written.
        """
        if self.snapshots is None:
            raise ValueError("this result has no snapshots; render with snapshots=9, or as many as you like")
        if filter not in self.filters:
            raise ValueError(f"this result has no filter {filter}; it has {ranges(tuple(sorted(self.filters)))}")
        return animate(self.snapshots[self.filters.index(filter)], path, seconds=seconds, hold=hold)

    def _repr_png_(self) -> bytes:
        return _png(self.grid())

    def save(self, out: str | Path) -> list[Path]:
        """Writes ``grid.png``, one PNG per filter, ``result.safetensors`` and ``run.json`` (last).

        With snapshots, also one animation per filter, as WebP.

        Each file appears whole or not at all; equal results are equal bytes. Images and animations that an earlier run
        left in the folder, by its ``run.json``, are removed.

        Args:
            out: a folder, made if it is not there.

        Returns:
            The files written.

        Raises:
            ValueError: the folder cannot be made or written.
        """
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        if self.saliency is not None:
            tensors["saliency"] = self.saliency.contiguous()
        films: dict[str, bytes] = {}
        if self.snapshots is not None:
            tensors["snapshots"] = self.snapshots.contiguous()
            names = _image_names(self.filters, "webp")
            films = {name: animation_bytes(own) for name, own in zip(names, self.snapshots, strict=True)}
        files = {
            "grid.png": _png(self.grid()),
            **{name: _png(picture(image)) for name, image in zip(_image_names(self.filters), self.images, strict=True)},
            **films,
            _RESULT: safetensors.torch.save(
                {**tensors, "filters": torch.tensor(self.filters)},
                {"run": json.dumps(self.summary(), sort_keys=True)},
            ),
            "run.json": (json.dumps(self.summary(), indent=1, sort_keys=True) + "\n").encode(),
        }
        folder = writable_folder(out)
        stale = _images_of(folder / "run.json") - files.keys()
        written = [_write(folder / name, data) for name, data in files.items()]
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        return written

    def summary(self) -> dict[str, Any]:
        """Configuration, versions and scores, as JSON takes them (a score that is not finite as ``null``)."""
        return {
            "config": self.config,
            "versions": {name: metadata.version(name) for name in ("featvis-func", "torch", "torchvision", "numpy")},
            "filters": [
                {
                    "filter": number,
                    "score": score if math.isfinite(score) else None,
                    "best_step": best_step,
                    "steps": steps,
                    "status": status,
                }
                for number, score, best_step, steps, status in zip(
                    *(self.filters, self.scores.tolist(), self.best_step.tolist(), self.steps.tolist(), self.status),
                    strict=True,
                )
            ],
            **({} if self.snapshots is None else {"snapshots": self.snapshots.shape[1]}),
        }


def read_result(folder: str | Path) -> Result:
    """Reads what :meth:`Result.save` has written.

    Raises:
        ValueError: the folder has no ``result.safetensors``, or a damaged one.

    >>> from featvis_func import render
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> _ = render("texturenet", "head", [3, 5], steps=2, size=32).save(folder)
    >>> read_result(folder).filters
    (3, 5)
    """
    path = Path(folder) / _RESULT
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            summary = json.loads((file.metadata() or {})["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        filters = tuple(tensors.pop("filters").tolist())
        status = tuple(entry["status"] for entry in summary["filters"])
        return Result(filters=filters, status=status, config=summary["config"], **tensors)
    except OSError as error:
        raise ValueError(f"{str(folder)!r} has no {_RESULT} of a rendering that can be read") from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {first_line(error)}") from error


_RESULT = "result.safetensors"
_TENSORS = ("images", "activations", "scores", "best_step", "history", "steps")


def _image_names(filters: Sequence[int], suffix: str = "png") -> list[str]:
    digits = max(4, *(len(str(number)) for number in filters))
    return [f"filter-{number:0{digits}d}.{suffix}" for number in filters]


def _images_of(run: Path) -> set[str]:
    """The names of the images and animations that a run.json speaks of; none if it cannot be read."""
    try:
        summary = json.loads(run.read_text())
        filters = [int(entry["filter"]) for entry in summary["filters"]]
        suffixes = ("png", "webp") if "snapshots" in summary else ("png",)
        return {name for suffix in suffixes for name in _image_names(filters, suffix)}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def writable_folder(out: str | Path) -> Path:
    """Makes a folder and tries it.

    Raises:
        ValueError: it cannot be made, or written in.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to the folder {str(out)!r}: {error.strerror or error}") from error
    return folder


def _png(image: PIL.Image.Image) -> bytes:
    data = BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def _write(path: Path, data: bytes) -> Path:
    """Writes a file whole or not at all."""
    try:
        write_file(path, data)
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return path
