"""Write results to an experiment log, in TensorBoard or Weights & Biases.

While a model is trained, the images of its filters can be followed beside the loss. The logger is called with each
result and the number of the training step; :func:`~featvis_func.render` leaves the module in training mode::

    with fv.tensorboard_logger("runs/first") as log:
        for step, (inputs, labels) in enumerate(batches):
            loss = cross_entropy(module(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 500 == 0:
                model = fv.load_model(module, size=96, mean=mean, std=std)
                log(fv.render(model, "layer3", range(8), steps=16, progress=False), step)

An existing writer or run, to which the loss is logged, can be given in place of the folder or project:
``tensorboard_logger(writer)``, ``wandb_logger(run)``. A logger closes only a writer or run that it has made itself.

Logged are one picture per filter, as :meth:`Result.pictures` draws it (a strip of frames for a video, a plot for a
signal), the grid, each filter's score over the training steps, a histogram of the scores, each
filter's objective over the steps of the rendering, its status, and the configuration. All names begin with
``prefix/layer``. A score that is not finite is left out of curves and histograms; the text shows it. ``FILTER`` in a
name below is the filter's number; for a member of a family that has a name, this follows, without characters that a
log gives a meaning, as in ``image/3_golden_retriever``.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import PIL.Image
import torch

from featvis_func.models.base import import_optional
from featvis_func.rendering.result import Result
from featvis_func.validation import check_int

_BINS = 30  # Of the histogram of the scores.
_LONGEST_NAME = 60  # In the names of images and curves; captions and tables have all of it.


@dataclass(frozen=True)
class Logger:
    """Logs results. Make one with :func:`tensorboard_logger` or :func:`wandb_logger`; a ``with`` block closes it."""

    write: Callable[[Result, int | None], None]
    close: Callable[[], None]
    """Close the writer or finish the run, if the logger has made it."""

    def __call__(self, result: Result, step: int | None = None) -> None:
        """Log a result.

        Args:
            result: as :func:`~featvis_func.render` returns it.
            step: number of the training step, from 0. ``None`` if no model is being trained.

        Raises:
            ValueError: not a result, or a step that is not an integer of at least 0.
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
    """Log results to TensorBoard.

    The names below ``prefix/layer`` are: the images ``image/FILTER`` and ``grid``; the scalars ``score/FILTER`` over
    the training steps and ``history/FILTER`` over the steps of the rendering (``history/STEP/FILTER`` for a result that
    is logged with a training step); the histogram ``scores``; and as text ``filters``, a table of scores and status,
    and ``config``. Members of a family have their name in the table, too.

    Args:
        where: a folder, created if it does not exist; or a ``SummaryWriter`` of torch, or an object with the same
            methods, which stays open.
        prefix: beginning of the names.

    Returns:
        A :class:`Logger`.

    Raises:
        ValueError: neither a folder nor a writer, or a folder where the package ``tensorboard`` is not installed.

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
        writer, close = where, _leave_open
    else:
        raise ValueError(f"expected a folder or a SummaryWriter, got {where!r}")

    def write(result: Result, step: int | None) -> None:
        root, scores, tags = _root(prefix, result), _finite_scores(result), _tags(result)

        def add_image(name: str, image: PIL.Image.Image) -> None:
            pixels = np.array(image)
            writer.add_image(f"{root}/{name}", pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

        for number, image in zip(result.filters, result.pictures(), strict=True):
            add_image(f"image/{tags[number]}", image)
        add_image("grid", result.grid())
        for number, score in scores.items():
            writer.add_scalar(f"{root}/score/{tags[number]}", score, step)
        if scores:
            values = np.array([*scores.values()])
            writer.add_histogram(f"{root}/scores", values, step, bins=_edges(values))
        folder = "history" if step is None else f"history/{step}"
        for number, curve in _curves(result).items():
            for render_step, value in curve.items():
                writer.add_scalar(f"{root}/{folder}/{tags[number]}", value, render_step)
        writer.add_text(f"{root}/filters", _table(result), step)
        text = json.dumps(result.config, indent=1, sort_keys=True)
        writer.add_text(f"{root}/config", "\n".join(f"    {line}" for line in text.splitlines()), step)

    return Logger(write, close)


def wandb_logger(where: Any, *, prefix: str = "featvis", **options: Any) -> Logger:
    """Log results to Weights & Biases.

    The names below ``prefix/layer`` are: ``images``, captioned with layer, filter, name, score and status; ``grid``;
    ``score/FILTER``; the histogram ``scores``; and ``history``, a chart of all filters over the steps of the rendering.
    The result's configuration is added to that of the run, as ``prefix/layer``.

    Args:
        where: the name of a project, in which a new run is started; or a run, which stays open. W&B accepts steps in
            increasing order only; other values may be logged at the same step, before or after the result.
        prefix: beginning of the names.
        **options: for a new run, those of ``wandb.init``, such as ``mode="offline"``.

    Returns:
        A :class:`Logger`.

    Raises:
        ValueError: neither a project nor a run, options for an existing run, or the package ``wandb`` is not installed.

    >>> wandb_logger(None)
    Traceback (most recent call last):
        ...
    ValueError: expected the name of a project or a run of W&B, got None
    """
    if not isinstance(where, str) and not (hasattr(where, "log") and hasattr(where, "config")):
        raise ValueError(f"expected the name of a project or a run of W&B, got {where!r}")
    if options and not isinstance(where, str):
        raise ValueError(f"options are for a new run, but an existing run was given; got {', '.join(options)}")
    wandb = import_optional("wandb", "wandb", "wandb_logger")
    if isinstance(where, str):
        # Always a new run, even if another one is active in this process.
        run = wandb.init(project=where, **{"reinit": "create_new", **options})
        close = run.finish
    else:
        run, close = where, _leave_open

    def write(result: Result, step: int | None) -> None:
        root, scores, curves = _root(prefix, result), _finite_scores(result), _curves(result)
        tags = _tags(result)
        captioned = zip(result.pictures(), _captions(result), strict=True)
        entry = {
            "images": [wandb.Image(image, caption=caption) for image, caption in captioned],
            "grid": wandb.Image(result.grid()),
            **{f"score/{tags[number]}": score for number, score in scores.items()},
            "history": wandb.plot.line_series(
                xs=[list(curve) for curve in curves.values()],
                ys=[list(curve.values()) for curve in curves.values()],
                keys=[tags[number] for number in curves],
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


def _leave_open() -> None:
    """Close nothing, since the writer or run belongs to the caller."""


def _root(prefix: str, result: Result) -> str:
    return "/".join(part for part in (prefix, result.config.get("layer", "")) if part)


def _finite_scores(result: Result) -> dict[int, float]:
    """Filter -> score, for the filters whose score is finite."""
    pairs = zip(result.filters, result.scores.tolist(), strict=True)
    return {number: score for number, score in pairs if np.isfinite(score)}


def _edges(scores: np.ndarray) -> np.ndarray:
    """The edges of the histogram's bins, which have a width above 0 even if all scores are equal."""
    low, high = scores.min(), scores.max()
    margin = max(abs(low) * 1e-3, 0.5) if low == high else 0.0
    return np.linspace(low - margin, high + margin, _BINS + 1)


def _curves(result: Result) -> dict[int, dict[int, float]]:
    """Filter -> step of the rendering -> the objective, for the steps where it is finite."""
    finite = torch.isfinite(result.history)
    return {
        number: {step: values[step] for step in mask.nonzero().flatten().tolist()}
        for number, values, mask in zip(result.filters, result.history.T.tolist(), finite.T, strict=True)
    }


def _names(result: Result) -> dict[int, str]:
    """Filter -> name on one line, for members of a family that have one."""
    names = {int(number): " ".join(str(name).split()) for number, name in result.config.get("names", {}).items()}
    return {number: name for number, name in names.items() if name}


def _tags(result: Result) -> dict[int, str]:
    """Filter -> its number and name, of letters, digits, ``-``, ``.`` and ``_`` only: others divide or end a tag."""
    tags = {number: str(number) for number in result.filters}
    for number, name in _names(result).items():
        safe = re.sub(r"[^\w.-]+", "_", name).strip("_")[:_LONGEST_NAME]
        tags[number] = f"{number}_{safe}" if safe else str(number)
    return tags


def _captions(result: Result) -> list[str]:
    layer, names = result.config.get("layer", ""), _names(result)
    return [
        f"{layer}:{number}, {f'{names[number]}, ' if number in names else ''}score {score:.4g}, {status}"
        for number, score, status in zip(result.filters, result.scores.tolist(), result.status, strict=True)
    ]


def _table(result: Result) -> str:
    """A table in Markdown with one row per filter, and a column of names if there are any."""
    columns = (result.filters, result.scores.tolist(), result.best_step.tolist(), result.steps.tolist(), result.status)
    names = _names(result)
    lines = ["| filter | score | best step | steps | status |", "|---:|---:|---:|---:|:---|"]
    for n, score, best, steps, s in zip(*columns, strict=True):
        lines.append(f"| {n} | {score:.4g} | {best} | {steps} | {s} |")
    if names:
        cells = [_escape(names.get(n, "")) for n in result.filters]
        lines = [f"{line} {cell} |" for line, cell in zip(lines, ["name", ":---", *cells], strict=True)]
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Escape the characters of a text that Markdown gives a meaning.

    >>> print(_escape("a|b <i> [c](d)"))
    a\\|b \\<i\\> \\[c\\](d)
    """
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", text)
