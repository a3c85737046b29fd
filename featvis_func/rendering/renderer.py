"""A renderer of one layer's filters, made once for any number of renderings."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from featvis_func.engine.batching import Finish, run_batched
from featvis_func.engine.device import algorithms
from featvis_func.engine.grouped import run_groups
from featvis_func.engine.run import Step
from featvis_func.objective import Family
from featvis_func.rendering.options import RenderOptions
from featvis_func.rendering.record import make_result
from featvis_func.rendering.resolve import check_groups
from featvis_func.rendering.result import Result
from featvis_func.types import State, Target, Weights
from featvis_func.validation import check_filters, check_seed


def float_images(images: Tensor) -> Tensor:
    """Images as a :class:`~featvis_func.Result` holds them."""
    return images.cpu().float()


class Renderer(NamedTuple):
    """Renders the filters of one layer. Make one with :func:`featvis_func.make_renderer`."""

    filters: tuple[int, ...]
    """All filters that it was made for."""
    batch_size: int
    """Filters at a time: every batch has this size, so that the step is compiled once."""
    config: dict[str, Any]
    """What its images depend on, as JSON holds it."""
    options: RenderOptions
    step: Step
    weights: Weights
    init: Callable[[Sequence[int], int], tuple[State, Target]]
    """(filter numbers, seed) -> their state before the first step, and their targets."""
    device: torch.device
    single_batch: bool = False
    """Whether the filters depend on each other, by the objective or by parameters that they share."""
    decode: Callable[[State], Tensor] | None = None
    """The state of filters -> their images, for snapshots."""
    finish: Finish | None = None
    """To be called after the last step, see :class:`~featvis_func.engine.step.Ascent`."""
    group: int = 1
    """The number of successive filters that depend on each other, which are rendered in one batch."""
    family: Family | None = None
    """Of the objective, if its target picks a member of a family."""
    take_images: Callable[[Tensor], Tensor] = float_images
    """Images of filters that have ended, on the device -> those of the result."""

    def __call__(
        self,
        filters: Iterable[int] | int | None = None,
        *,
        seed: int | None = None,
        progress: bool | Callable[[int], object] | None = False,
    ) -> Result:
        """Render filters. Their images do not depend on which others are rendered, unless they need a single batch.

        Args:
            filters: among ``self.filters``; ``None``: all of them.
            seed: in ``[0, 2**64)``; default: the seed that the renderer was made with.
            progress: whether to show a progress bar on the standard error (``None``: if that is a terminal); or a
                function that is called with the number of steps taken, as by
                :func:`~featvis_func.engine.batching.run_batched`.

        Returns:
            A :class:`~featvis_func.Result`, on the CPU.

        Raises:
            ValueError: a filter that the renderer was not made for.

        >>> from featvis_func import make_renderer
        >>> renderer = make_renderer("texturenet", "head", steps=2, size=32)
        >>> renderer([3]).images.shape, renderer([5, 3]).filters
        (torch.Size([1, 3, 32, 32]), (5, 3))
        """
        numbers = list(self.filters) if filters is None else check_filters(filters)
        unknown = set(numbers).difference(self.filters)
        if unknown:
            raise ValueError(f"this renderer was not made for filter {min(unknown)}")
        start = self.config["seed"] if seed is None else check_seed(seed)
        options = self.options
        hidden = callable(progress) or (progress is not None and not progress)
        bar = tqdm(
            total=options.steps * len(numbers),
            desc=self.config["layer"],
            unit="step",
            leave=False,
            disable=hidden or (None if progress is None else False),
        )
        with bar, algorithms(self.device, deterministic=options.deterministic):
            run_all = run_batched
            batching: dict[str, Any] = {"batch_size": self.batch_size, "pad": True, "tolerance": options.tolerance}
            if self.single_batch:
                batching = {"batch_size": len(numbers), "single_batch": True}
            elif self.group > 1:
                check_groups(numbers, self.group, self.config["objective"])
                run_all = run_groups
                requested = set(numbers)
                others = [f for f in self.filters if f not in requested]
                batching = {"batch_size": self.batch_size, "group": self.group, "others": others}
            run = run_all(
                self.step,
                self.weights,
                lambda chosen: self.init(chosen, start),
                numbers,
                steps=options.steps,
                progress=progress if callable(progress) else bar.update,
                snapshots=options.snapshots,
                decode=self.decode,
                finish=self.finish,
                take_images=self.take_images,
                retain_memory=options.retain_memory,
                **batching,
            )
        config = {**self.config, "seed": start, "batch_size_used": run.batch_size}
        return make_result(run, numbers, config, self.family)
