"""The result of a rendering: tensors, an image grid and files."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import PIL.Image
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from featvis_func.io.animation import animation_bytes, moving_of, write_moving
from featvis_func.io.display import display_of
from featvis_func.io.filter_spec import ranges
from featvis_func.io.pil import arrange, picture
from featvis_func.rendering.files import image_names, listed_images, png_bytes, writable_folder, write
from featvis_func.rendering.saliency import opacity_of
from featvis_func.validation import check_int, first_line

_GAP, _PLOT_GAP = 2, 14  # White pixels between the pictures of a grid, and between plots, which are white themselves.
_KINDS = {3: "signals", 4: "images", 5: "videos"}  # By the number of axes.
_RESULT = "result.safetensors"
_TENSORS = ("images", "activations", "scores", "best_step", "history", "steps")
_OPTIONAL_TENSORS = ("saliency", "snapshots", "vectors")
# Tensors and configuration entries that earlier versions wrote under another name -> the present name.
_EARLIER_NAMES = {"transparency": "saliency", "views": "transforms", "slots": "batch_size_used"}


@dataclass(frozen=True, eq=False)
class Result:
    """One image per filter, with its activations, scores and configuration.

    All tensors are on the CPU. ``n`` is the number of filters. What is shown of a filter is its "best step", the one
    with the highest score; with the default optimizer the average of the run, evaluated once more after the last step.
    """

    images: Tensor
    """float32 ``(n, c, h, w)`` in ``[0, 1]``: the image, before the random transform. Videos are
    ``(n, c, t, h, w)``, signals ``(n, c, t)``. A channel beyond those of the model is an opacity, and
    ``config["alpha"]`` is then true."""
    activations: Tensor
    """float32 ``(n, *positions)``, with 0 to 3 axes of positions, such as ``(n, h', w')``: the filter's activation map,
    for the transformed image."""
    scores: Tensor
    """float32 ``(n,)``: the objective, for the transformed image; ``-inf`` if it was never finite."""
    best_step: Tensor
    """int64 ``(n,)``: index of the best step, from 0, or the number of steps for an average; ``-1`` if the score was
    never finite."""
    filters: tuple[int, ...]
    """Filter numbers."""
    status: tuple[str, ...]
    """Per filter: ``"ok"``; ``"dead"`` if no step had a gradient; ``"nonfinite"`` if the score or the gradient of a
    step was not finite (such a step is skipped, and the image is that of the others); ``"flat"`` if the score never
    rose above that of step 0, in more than one step. Units that were never trained do so, and others if the steps are
    too few and too large."""
    history: Tensor
    """float32 ``(steps, n)``: the objective at each step, for the transformed image; NaN after a filter's last step."""
    steps: Tensor
    """int64 ``(n,)``: number of steps that each filter took."""
    config: dict[str, Any] = field(default_factory=dict)
    """What the images depend on, as JSON holds it."""
    saliency: Tensor | None = None
    """float32 ``(n, h, w)`` (in general: the positions of the images), if requested: magnitude of the score's gradient
    at each pixel, summed over all steps."""
    snapshots: Tensor | None = None
    """uint8 ``(n, k, c, h, w)`` (in general: the shape of the images), if requested: the images after the numbers of
    steps that :func:`~featvis_func.snapshot_steps` returns. The last image of a filter that was stopped early is
    repeated."""
    vectors: Tensor | None = None
    """float32 ``(n, d)``: the direction of each filter in the space of channels, if the objective is a family of
    directions."""

    def __repr__(self) -> str:
        odd = {s: self.status.count(s) for s in sorted(set(self.status)) if s != "ok"}
        kind, (n, *shape) = _KINDS.get(self.images.ndim, "images"), self.images.shape
        size = " x ".join(map(str, shape))
        return f"Result({n} {kind} {size}, mean score {self.scores.mean():.4g}{f', {odd}' if odd else ''})"

    def pictures(self, *, bands: Sequence[int] | None = None) -> list[PIL.Image.Image]:
        """Draw each filter's image as a still picture.

        An image of 1 channel is grey, of 3 RGB, of 2 channels side by side in grey; of more channels the first three
        are shown as red, green and blue. A video is a strip of up to 8 of its frames, a signal a plot with one line per
        channel.

        Args:
            bands: one channel, shown as grey, or three, shown as red, green and blue, numbered from 0. Default: those
                that the images were rendered with.

        Returns:
            One PIL image per filter, with an opacity if the images have one.

        Raises:
            ValueError: bands that the images do not have, or bands for signals.

        >>> six = Result(torch.rand(1, 6, 4, 5), *torch.zeros(3, 1), (0,), ("ok",), *torch.zeros(2, 1, 1))
        >>> six.pictures(bands=(3, 2, 1))[0].mode, six.pictures(bands=[5])[0].mode
        ('RGB', 'L')
        """
        display = display_of(self.config, bands)
        return [picture(image, display) for image in self.images]

    def grid(self, *, columns: int | None = None, bands: Sequence[int] | None = None) -> PIL.Image.Image:
        """Arrange the pictures of all filters in a grid on white, in order, row by row.

        Args:
            columns: pictures per row, at least 1. Default: the nearest to a square grid.
            bands: as for :meth:`pictures`.

        Returns:
            A PIL image.

        Raises:
            ValueError: ``columns`` is below 1, or as for :meth:`pictures`.
        """
        columns = None if columns is None else check_int("columns", columns, 1)
        gap = _PLOT_GAP if self.images.ndim == 3 else _GAP
        return arrange(self.pictures(bands=bands), columns, square=self.images.ndim == 4, gap=gap)

    def transparent(self, *, percentile: float = 90.0) -> "Result":
        """Add the saliency to the images as an opacity channel: opaque where the objective depended on the pixels.

        The saliency map is smoothed over 1/32 of the image side and divided by its percentile.

        Args:
            percentile: of the map's values, in ``(0, 100]``; the image is opaque where the map is at least that high.

        Returns:
            The same result with RGBA images ``(n, 4, h, w)`` (in general: with one channel more). An opacity that the
            images have already is multiplied with this one.

        Raises:
            ValueError: rendered without ``saliency=True``, or a percentile out of range.

        Source: Fel et al., MACO (arXiv 2306.06805), section 4, which calls the map "transparency". Deviation: the
        map is smoothed, because single pixels of it are noisy.
        """
        if self.saliency is None:
            raise ValueError("this result has no saliency; render with saliency=True")
        if not 0 < percentile <= 100:
            raise ValueError(f"the percentile must be above 0 and at most 100, got {percentile}")
        opacity = opacity_of(self.saliency, percentile)[:, None]
        images = self.images
        if display_of(self.config).alpha:
            images, opacity = images[:, :-1], images[:, -1:] * opacity
        return replace(self, images=torch.cat([images, opacity], dim=1), config={**self.config, "alpha": True})

    def animate(
        self, path: str | Path, filter: int, *, seconds: float | None = None, hold: float | None = None
    ) -> Path:
        """Write the snapshots of one filter, or its video, as an animation. The file appears complete or not at all.

        Args:
            path: a ``.gif`` or ``.webp`` file in an existing folder.
            filter: number of the filter.
            seconds, hold: as for :func:`~featvis_func.animate`. Default: 2 s and 1 s for snapshots; 8 frames per second
                and 0 for videos.

        Returns:
            The path.

        Raises:
            ValueError: images or signals rendered without snapshots, a filter that the result does not have, another
                suffix, or a file that cannot be written.
        """
        if filter not in self.filters:
            raise ValueError(f"this result has no filter {filter}; it has {ranges(tuple(sorted(self.filters)))}")
        row = self.filters.index(filter)
        snapshots = None if self.snapshots is None else self.snapshots[row]
        moving = moving_of(self.images[row], snapshots, display_of(self.config))
        if moving is None:
            raise ValueError("this result has no snapshots; render with snapshots=, for example snapshots=9")
        return write_moving(path, moving, seconds, hold)

    def _repr_png_(self) -> bytes:
        return png_bytes(self.grid())

    def save(self, out: str | Path, *, bands: Sequence[int] | None = None) -> list[Path]:
        """Write ``grid.png``, one PNG per filter, ``result.safetensors`` and, last, ``run.json``.

        With snapshots, also write one animated WebP per filter; for videos one that plays the video. The pictures are
        those of :meth:`pictures`, the tensors hold all channels. Each file appears complete or not at all, and equal
        results give equal bytes. Images and animations that the folder's previous ``run.json`` lists are removed.

        Args:
            out: a folder; created if it does not exist.
            bands: as for :meth:`pictures`; recorded, so that a gallery shows the same.

        Returns:
            The files written.

        Raises:
            ValueError: the folder cannot be created or written to, or as for :meth:`pictures`.
        """
        if bands is not None:
            chosen = display_of(self.config, bands).bands
            return replace(self, config={**self.config, "bands": list(chosen or ())}).save(out)
        optional = [name for name in _OPTIONAL_TENSORS if getattr(self, name) is not None]
        tensors = {name: getattr(self, name).contiguous() for name in (*_TENSORS, *optional)}
        pictures, display = self.pictures(), display_of(self.config)
        snapshots = [None] * len(self.filters) if self.snapshots is None else self.snapshots
        animations: dict[str, bytes] = {}
        for name, image, frames in zip(image_names(self.filters, "webp"), self.images, snapshots, strict=True):
            if (moving := moving_of(image, frames, display)) is not None:
                animations[name] = animation_bytes(**moving._asdict())
        files = {
            "grid.png": png_bytes(self.grid()),
            **{name: png_bytes(image) for name, image in zip(image_names(self.filters), pictures, strict=True)},
            **animations,
            _RESULT: safetensors.torch.save(
                {**tensors, "filters": torch.tensor(self.filters)},
                {"run": json.dumps(self.summary(), sort_keys=True)},
            ),
            "run.json": (json.dumps(self.summary(), indent=1, sort_keys=True) + "\n").encode(),
        }
        folder = writable_folder(out)
        stale = listed_images(folder / "run.json") - files.keys()
        written = [write(folder / name, data) for name, data in files.items()]
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
            **({"frames": self.images.shape[2]} if self.images.ndim == 5 else {}),
        }


def select_filters(result: Result, rows: Sequence[int]) -> Result:
    """The results of some of the filters, by their places in ``result.filters``."""
    index = torch.tensor(list(rows))

    def take(values: Tensor | None, axis: int = 0) -> Any:
        return None if values is None else values.index_select(axis, index.to(values.device))

    return replace(
        result,
        **{name: take(getattr(result, name)) for name in ("images", "activations", "scores", "best_step", "steps")},
        **{name: take(getattr(result, name)) for name in _OPTIONAL_TENSORS},
        filters=tuple(result.filters[row] for row in rows),
        status=tuple(result.status[row] for row in rows),
        history=take(result.history, 1),
    )


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
    if tensors["images"].shape[1] == len(config.get("mean") or ()) + 1:
        config["alpha"] = True  # which earlier versions did not record
    return Result(filters=filters, status=status, config=config, **tensors)
