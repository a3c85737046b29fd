"""Results as entries of an experiment's log, in TensorBoard or Weights & Biases.

While a model is trained, what its filters look for can be watched beside the loss. The logger is given each result with
the number of the training step; :func:`~featvis_func.render` leaves the module in training mode::

    with fv.tensorboard_logger("runs/first") as log:
        for step, (inputs, labels) in enumerate(batches):
            loss = cross_entropy(module(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 500 == 0:
                log(fv.render(fv.load_model(module, size=96), "layer3", range(8), steps=16, progress=False), step)

A writer or a run that is there already, with the loss in it, goes in the folder's place:
``tensorboard_logger(writer)``, ``wandb_logger(run)``. Whoever made it closes it: a logger closes only its own.

Of each result there are one image per filter, the grid, each filter's score over the training steps, a histogram of the
scores, each filter's objective over the steps of the rendering, its status, and the configuration. All names begin with
``prefix/layer``. A score that is not finite is left out of curves and histograms and stands in the text alone.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import PIL.Image
import torch

from featvis_func.io.pil import picture
from featvis_func.models.base import import_optional
from featvis_func.rendering.result import Result
from featvis_func.validation import check_int

_BINS = 30  # of a histogram of the scores


@dataclass(frozen=True)
class Logger:
    """Takes results. Make one with :func:`tensorboard_logger` or :func:`wandb_logger`; a ``with`` block closes it."""

    write: Callable[[Result, int | None], None]
    close: Callable[[], None]
    """Ends the writer or the run, if the logger made it."""

    def __call__(self, result: Result, step: int | None = None) -> None:
        """Logs a result.

        Args:
            result: of a rendering.
            step: of the training, from 0; ``None`` where nothing is trained.

        Raises:
            ValueError: no result, or a step that is no whole number from 0.
        """
        if not isinstance(result, Result):
            raise ValueError(f"expected a Result, as render returns it, got {result!r}")
        self.write(result, None if step is None else check_int("step", step, 0))

    def __enter__(self) -> "Logger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def tensorboard_logger(where: Any, *, prefix: str = "featvis") -> Logger:
    """Logs results to TensorBoard.

    Below ``prefix/layer`` there are the images ``image/FILTER`` and ``grid``, the scalars ``score/FILTER`` over the
    training steps and ``history/FILTER`` over the steps of the rendering (``history/STEP/FILTER`` of a result with a
    training step), the histogram ``scores``, and as text ``filters``, a table of scores and status, and ``config``.

    Args:
        where: a folder, made if it is not there; or a ``SummaryWriter``, torch's or one that is called alike, which
            stays open.
        prefix: what the names begin with.

    Returns:
        A :class:`Logger`.

    Raises:
        ValueError: neither a folder nor a writer, or a folder without the package ``tensorboard``.

    >>> from unittest.mock import Mock
    >>> from featvis_func.rendering.api import render
    >>> writer = Mock()
    >>> tensorboard_logger(writer)(render("texturenet", "head", [3], steps=2, size=32), step=500)
    >>> [call.args[0] for call in writer.add_image.call_args_list]
    ['featvis/head/image/3', 'featvis/head/grid']
    """
    if isinstance(where, str | Path):
        import_optional("tensorboard", "tensorboard", "tensorboard_logger")
        writer = import_optional("torch.utils.tensorboard", "tensorboard", "tensorboard_logger").SummaryWriter(
            str(where)
        )
        close = writer.close
    elif hasattr(where, "add_image"):
        writer, close = where, _leave
    else:
        raise ValueError(f"expected a folder or a SummaryWriter, got {where!r}")

    def write(result: Result, step: int | None) -> None:
        root, scores = _root(prefix, result), _scores(result)

        def show(name: str, image: PIL.Image.Image) -> None:
            pixels = np.array(image)
            writer.add_image(f"{root}/{name}", pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

        for number, image in zip(result.filters, result.images, strict=True):
            show(f"image/{number}", picture(image))
        show("grid", result.grid())
        for number, score in scores.items():
            writer.add_scalar(f"{root}/score/{number}", score, step)
        if scores:
            values = np.array([*scores.values()])
            writer.add_histogram(f"{root}/scores", values, step, bins=_edges(values))
        folder = "history" if step is None else f"history/{step}"
        for number, curve in _curves(result).items():
            for at, value in curve.items():
                writer.add_scalar(f"{root}/{folder}/{number}", value, at)
        writer.add_text(f"{root}/filters", _table(result), step)
        text = json.dumps(result.config, indent=1, sort_keys=True)
        writer.add_text(f"{root}/config", "\n".join(f"    {line}" for line in text.splitlines()), step)

    return Logger(write, close)


def wandb_logger(where: Any, *, prefix: str = "featvis", **options: Any) -> Logger:
    """Logs results to Weights & Biases.

    Below ``prefix/layer`` there are ``images``, each with its layer, filter, score and status beneath it, ``grid``,
    ``score/FILTER``, the histogram ``scores``, and ``history``, a chart of all filters over the steps of the rendering.
    The run's configuration gets the result's, as ``prefix/layer``.

    Args:
        where: the name of a project, in which a run is made; or a run, which stays open. W&B takes steps in rising
            order only; what else the run logs at the same step may come before or after.
        prefix: what the names begin with.
        **options: of a run that is made, as for ``wandb.init``, such as ``mode="offline"``.

    Returns:
        A :class:`Logger`.

    Raises:
        ValueError: neither a project nor a run, options for a run that is there, or the package ``wandb`` is missing.

    >>> wandb_logger(None)
    Traceback (most recent call last):
        ...
    ValueError: expected the name of a project or a run of W&B, got None
    """
    if not isinstance(where, str) and not (hasattr(where, "log") and hasattr(where, "config")):
        raise ValueError(f"expected the name of a project or a run of W&B, got {where!r}")
    if options and not isinstance(where, str):
        raise ValueError(f"the run is there already, and takes no options; got {', '.join(options)}")
    wandb = import_optional("wandb", "wandb", "wandb_logger")
    if isinstance(where, str):
        # A run of its own, though another may be under way in this process.
        run = wandb.init(project=where, **{"reinit": "create_new", **options})
        close = run.finish
    else:
        run, close = where, _leave

    def write(result: Result, step: int | None) -> None:
        root, scores, curves = _root(prefix, result), _scores(result), _curves(result)
        shown = zip(result.images, _captions(result), strict=True)
        entry = {
            "images": [wandb.Image(picture(image), caption=caption) for image, caption in shown],
            "grid": wandb.Image(result.grid()),
            **{f"score/{number}": score for number, score in scores.items()},
            "history": wandb.plot.line_series(
                xs=[list(curve) for curve in curves.values()],
                ys=[list(curve.values()) for curve in curves.values()],
                keys=[str(number) for number in curves],
                title=f"{root}/history",
                xname="step of the rendering",
            ),
        }
        if scores:
            values = np.array([*scores.values()])
            entry["scores"] = wandb.Histogram(np_histogram=np.histogram(values, bins=_edges(values)))
        run.config.update({root: result.config}, allow_val_change=True)
        run.log({f"{root}/{name}": value for name, value in entry.items()}, step=step)

    return Logger(write, close)


def _leave() -> None:
    """What a logger closes that opened nothing."""


def _root(prefix: str, result: Result) -> str:
    return "/".join(part for part in (prefix, result.config.get("layer", "")) if part)


def _scores(result: Result) -> dict[int, float]:
    """Filter -> score, where it is finite."""
    pairs = zip(result.filters, result.scores.tolist(), strict=True)
    return {number: score for number, score in pairs if np.isfinite(score)}


def _edges(scores: np.ndarray) -> np.ndarray:
    """Of the histogram's bins: apart even where all scores are one."""
    low, high = scores.min(), scores.max()
    margin = max(abs(low) * 1e-3, 0.5) if low == high else 0.0
    return np.linspace(low - margin, high + margin, _BINS + 1)


def _curves(result: Result) -> dict[int, dict[int, float]]:
    """Filter -> step of the rendering -> the objective, where it is finite."""
    finite = torch.isfinite(result.history)
    return {
        number: {at: values[at] for at in kept.nonzero().flatten().tolist()}
        for number, values, kept in zip(result.filters, result.history.T.tolist(), finite.T, strict=True)
    }


def _captions(result: Result) -> list[str]:
    layer = result.config.get("layer", "")
    return [
        f"{layer}:{number}, score {score:.4g}, {status}"
        for number, score, status in zip(result.filters, result.scores.tolist(), result.status, strict=True)
    ]


def _table(result: Result) -> str:
    """Markdown: a line per filter."""
    columns = (result.filters, result.scores.tolist(), result.best_step.tolist(), result.steps.tolist(), result.status)
    lines = [
        f"| {n} | {score:.4g} | {best} | {steps} | {s} |" for n, score, best, steps, s in zip(*columns, strict=True)
    ]
    return "\n".join(["| filter | score | best step | steps | status |", "|---:|---:|---:|---:|:---|", *lines])
