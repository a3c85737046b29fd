"""The result of a rendering: tensors, an image grid and files."""

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
from featvis_func.validation import check_int, first_line

_GAP = 2  # White pixels between the images of a grid.
_RESULT = "result.safetensors"
_TENSORS = ("images", "activations", "scores", "best_step", "history", "steps")
_OPTIONAL_TENSORS = ("saliency", "snapshots")
# Tensors and configuration entries that earlier versions wrote under another name -> the present name.
_EARLIER_NAMES = {"transparency": "saliency", "views": "transforms", "slots": "batch_size_used"}


@dataclass(frozen=True, eq=False)
class Result:
    """One image per filter, with its activations, scores and configuration.

    All tensors are on the CPU. ``n`` is the number of filters; the "best step" of a filter is the one with its highest
    score.
    """

    images: Tensor
    """float32 ``(n, c, h, w)`` in ``[0, 1]``: the image at the best step, before the random transform."""
    activations: Tensor
    """float32 ``(n, h', w')``, ``(n, t)`` or ``(n,)``: the filter's activation map at the best step, for the
    transformed image."""
    scores: Tensor
    """float32 ``(n,)``: the objective at the best step; ``-inf`` if it was never finite."""
    best_step: Tensor
    """int64 ``(n,)``: index of the best step, from 0; ``-1`` if the score was never finite."""
    filters: tuple[int, ...]
    """Filter numbers."""
    status: tuple[str, ...]
    """Per filter: ``"ok"``; ``"dead"`` if no step had a gradient; ``"nonfinite"`` if the score or the gradient of a
    step was not finite. Such a step is skipped, and the image is the best of the others."""
    history: Tensor
    """float32 ``(steps, n)``: the objective at each step, for the transformed image; NaN after a filter's last step."""
    steps: Tensor
    """int64 ``(n,)``: number of steps that each filter took."""
    config: dict[str, Any] = field(default_factory=dict)
    """What the images depend on, as JSON holds it."""
    saliency: Tensor | None = None
    """float32 ``(n, h, w)``, if requested: magnitude of the score's gradient at each pixel, summed over all steps."""
    snapshots: Tensor | None = None
    """uint8 ``(n, k, c, h, w)``, if requested: the images after the numbers of steps that
    :func:`~featvis_func.snapshot_steps` returns. The last image of a filter that was stopped early is repeated."""

    def __repr__(self) -> str:
        odd = {s: self.status.count(s) for s in sorted(set(self.status)) if s != "ok"}
        n, c, h, w = self.images.shape
        return f"Result({n} images {c} x {h} x {w}, mean score {self.scores.mean():.4g}{f', {odd}' if odd else ''})"

    def grid(self, *, columns: int | None = None) -> PIL.Image.Image:
        """Arrange all images in a grid on white, in order, row by row.

        Args:
            columns: images per row, at least 1. Default: the nearest to a square grid.

        Returns:
            A PIL image. Images with a number of channels other than 1, 3 or 4 are shown as their channels side by side,
            in grey.

        Raises:
            ValueError: ``columns`` is below 1.
        """
        tiles = [np.asarray(picture(image)) for image in self.images]
        columns = math.ceil(math.sqrt(len(tiles))) if columns is None else check_int("columns", columns, 1)
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
        """Add the saliency to the images as an opacity channel: opaque where the objective depended on the pixels.

        The saliency map is smoothed over 1/32 of the image side and divided by its percentile.

        Args:
            percentile: of the map's values, in ``(0, 100]``; the image is opaque where the map is at least that high.

        Returns:
            The same result with RGBA images ``(n, 4, h, w)`` (in general: with one channel more).

        Raises:
            ValueError: rendered without ``saliency=True``, or a percentile out of range.

        Source: Fel et al., MACO (arXiv 2306.06805), section 4, which calls the map "transparency". Deviation: the
        map is smoothed, because single pixels of it are noisy.
        """
        if self.saliency is None:
            raise ValueError("this result has no saliency; render with saliency=True")
        if not 0 < percentile <= 100:
            raise ValueError(f"the percentile must be above 0 and at most 100, got {percentile}")
        h, w = self.saliency.shape[1:]
        radius = max(h, w) // 64
        padded = F.pad(self.saliency[:, None], (radius,) * 4, mode="replicate")
        smooth = F.avg_pool2d(padded, 2 * radius + 1, stride=1).flatten(1)
        level = torch.quantile(smooth, percentile / 100, dim=1, keepdim=True).clamp_min(torch.finfo(smooth.dtype).tiny)
        opacity = (smooth / level).clamp(0, 1).reshape(-1, 1, h, w)
        return replace(self, images=torch.cat([self.images, opacity], dim=1))

    def animate(self, path: str | Path, filter: int, *, seconds: float = 2.0, hold: float = 1.0) -> Path:
        """Write the snapshots of one filter as an animation. The file appears complete or not at all.

        Args:
            path: a ``.gif`` or ``.webp`` file in an existing folder.
            filter: number of the filter.
            seconds, hold: as for :func:`~featvis_func.animate`.

        Returns:
            The path.

        Raises:
            ValueError: rendered without snapshots, a filter that the result does not have, another suffix, or a file
                that cannot be written.
        """
        if self.snapshots is None:
            raise ValueError("this result has no snapshots; render with snapshots=, for example snapshots=9")
        if filter not in self.filters:
            raise ValueError(f"this result has no filter {filter}; it has {ranges(tuple(sorted(self.filters)))}")
        return animate(self.snapshots[self.filters.index(filter)], path, seconds=seconds, hold=hold)

    def _repr_png_(self) -> bytes:
        return _png(self.grid())

    def save(self, out: str | Path) -> list[Path]:
        """Write ``grid.png``, one PNG per filter, ``result.safetensors`` and, last, ``run.json``.

        With snapshots, also write one animated WebP per filter. Each file appears complete or not at all, and equal
        results give equal bytes. Images and animations that the folder's previous ``run.json`` lists are removed.

        Args:
            out: a folder; created if it does not exist.

        Returns:
            The files written.

        Raises:
            ValueError: the folder cannot be created or written to.
        """
        optional = [name for name in _OPTIONAL_TENSORS if getattr(self, name) is not None]
        tensors = {name: getattr(self, name).contiguous() for name in (*_TENSORS, *optional)}
        animations: dict[str, bytes] = {}
        if self.snapshots is not None:
            names = _image_names(self.filters, "webp")
            animations = {name: animation_bytes(frames) for name, frames in zip(names, self.snapshots, strict=True)}
        files = {
            "grid.png": _png(self.grid()),
            **{name: _png(picture(image)) for name, image in zip(_image_names(self.filters), self.images, strict=True)},
            **animations,
            _RESULT: safetensors.torch.save(
                {**tensors, "filters": torch.tensor(self.filters)},
                {"run": json.dumps(self.summary(), sort_keys=True)},
            ),
            "run.json": (json.dumps(self.summary(), indent=1, sort_keys=True) + "\n").encode(),
        }
        folder = writable_folder(out)
        stale = _listed_images(folder / "run.json") - files.keys()
        written = [_write(folder / name, data) for name, data in files.items()]
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        return written

    def summary(self) -> dict[str, Any]:
        """Summarise configuration, versions and scores as JSON holds them; a score that is not finite is ``null``."""
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
    """Read a result that :meth:`Result.save` has written, also by an earlier version of this package.

    Raises:
        ValueError: the folder has no ``result.safetensors``, the file is damaged, or it holds tensors that this version
            does not know.

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
            names: list[str] = file.keys()
            tensors = {_EARLIER_NAMES.get(name, name): file.get_tensor(name) for name in names}
        filters = tuple(tensors.pop("filters").tolist())
        status = tuple(entry["status"] for entry in summary["filters"])
        recorded: dict[str, Any] = summary["config"]
        config = {_EARLIER_NAMES.get(name, name): value for name, value in recorded.items()}
    except OSError as error:
        raise ValueError(f"{str(folder)!r} has no {_RESULT} of a rendering that can be read") from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {first_line(error)}") from error
    missing = sorted(set(_TENSORS).difference(tensors))
    if missing:
        raise ValueError(f"{str(path)!r} is damaged: it lacks {', '.join(missing)}")
    unknown = sorted(set(tensors).difference(_TENSORS, _OPTIONAL_TENSORS))
    if unknown:
        raise ValueError(
            f"{str(path)!r} holds {', '.join(unknown)}, which this version does not know; expected"
            f" {', '.join((*_TENSORS, *_OPTIONAL_TENSORS))}"
        )
    return Result(filters=filters, status=status, config=config, **tensors)


def _image_names(filters: Sequence[int], suffix: str = "png") -> list[str]:
    digits = max(4, *(len(str(number)) for number in filters))
    return [f"filter-{number:0{digits}d}.{suffix}" for number in filters]


def _listed_images(run: Path) -> set[str]:
    """The names of the images and animations that belong to a ``run.json``; none if it cannot be read."""
    try:
        summary = json.loads(run.read_text())
        filters = [int(entry["filter"]) for entry in summary["filters"]]
        suffixes = ("png", "webp") if "snapshots" in summary else ("png",)
        return {name for suffix in suffixes for name in _image_names(filters, suffix)}
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


def _png(image: PIL.Image.Image) -> bytes:
    data = BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def _write(path: Path, data: bytes) -> Path:
    """Write a file, completely or not at all."""
    try:
        write_file(path, data)
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return path
