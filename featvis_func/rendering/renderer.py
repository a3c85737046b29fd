"""From a model, a layer and options to a renderer of the layer's filters, in three steps.

:func:`resolve` checks what was given and finds what it means, :func:`compose` builds the algorithm from its parts, and
:func:`plan` decides how it runs. :func:`make_renderer` is all three.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from featvis_func import transform as transforms
from featvis_func.backbone.features import Features, compiled_weights
from featvis_func.backbone.layers import AXES
from featvis_func.engine.batching import Finish, run_batched
from featvis_func.engine.capture import CapturedStep
from featvis_func.engine.device import algorithms, default_batch_size, fit_batch_size, select_step
from featvis_func.engine.grouped import run_groups
from featvis_func.engine.memory import MAX_BATCH_SIZE, probe_batch_size
from featvis_func.engine.step import Ascent, Step, filter_keys, make_ascent
from featvis_func.models import Model
from featvis_func.objective import Family, Objective
from featvis_func.random import key
from featvis_func.rendering.input_size import KINDS, warn_if_stretched
from featvis_func.rendering.optimizers import optimizer_for
from featvis_func.rendering.options import RenderOptions
from featvis_func.rendering.presets import IMAGES, named_transform
from featvis_func.rendering.record import make_config, make_result
from featvis_func.rendering.resolve import Resolved, check_groups, resolve
from featvis_func.rendering.result import Result
from featvis_func.tree import tree_map
from featvis_func.types import Image, State, Target, Transform, Weights
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


def make_renderer(
    model: str | nn.Module | Model,
    objective: str | Objective,
    filters: Iterable[int] | int | None = None,
    *,
    features: Features | None = None,
    **options: Any,
) -> Renderer:
    """Trace the model up to a layer and compose the step, once for any number of renderings.

    Args:
        model, objective, features: as for :func:`featvis_func.render`.
        filters: all that will be rendered, in one call or in several; from their number ``compile="auto"`` decides
            whether compiling pays.
        **options: as for :func:`featvis_func.render`.

    Raises:
        ValueError: bad input, with what was given, what was expected and what exists.
        TypeError: an unknown option.
    """
    checked = RenderOptions.of(options, function="make_renderer")
    resolved = resolve(model, objective, filters, checked, features)
    return plan(resolved, compose(resolved))


class Composed(NamedTuple):
    """The algorithm, made from its parts."""

    ascent: Ascent
    image: Image
    size: tuple[int, ...]
    """``(h, w)``, ``(t, h, w)`` or ``(t,)`` of the images."""
    single_batch: bool
    """Whether the filters depend on each other."""
    transform: Transform
    """From an image to the model's input, normalisation included."""
    alpha: bool = False
    """Whether the images have an opacity: a channel more than the model takes."""


def compose(resolved: Resolved) -> Composed:
    """Build parameterisation, transform and ascent.

    Raises:
        ValueError: parts that do not fit together, such as a transform to another size than the model's input.
    """
    model, objective, options, device = resolved.model, resolved.objective, resolved.options, resolved.device
    image = options.image
    if not isinstance(image, Image):
        image = IMAGES[str(image)](resolved.size, channels=model.channels, device=device)
    example = image.decode(image.init(key(options.seed, device=device)))
    axes, accepted = len(model.size), (model.channels, *model.size)
    if example.ndim != 1 + axes:
        raise ValueError(
            f"the image is {tuple(example.shape)}; {model.name} takes {KINDS[axes].plural} (c, {KINDS[axes].axes}) of"
            f" {accepted}"
        )
    channels, *sides = example.shape
    if channels != model.channels and (channels != model.channels + 1 or axes == 1):
        raise ValueError(f"the image has {channels} channels; {model.name} takes {model.channels}")
    transform = options.transforms
    if not isinstance(transform, Transform):
        transform = named_transform(
            transform, image=tuple(sides), size=model.size, deterministic=options.deterministic, std=model.std
        )
        if channels > model.channels:  # an opacity, which shows only over a background
            background = transforms.over_background()
            transform = transforms.chain(background if axes == 2 else transforms.per_frame(background), transform)
        if axes > 1:
            warn_if_stretched(tuple(sides), model)
    shape = transform.apply(example, transform.draw(key(options.seed, device=device))).shape
    if len(shape) > 2 + axes or shape[-1 - axes :] != accepted:
        raise ValueError(f"the transformed images must be {accepted}, which {model.name} takes, got {tuple(shape)}")
    if objective.picture is not None and objective.picture.shape != example.shape:
        raise ValueError(
            f"the picture of {objective} is {tuple(objective.picture.shape)}, the images are {tuple(example.shape)}"
        )
    transform = transforms.chain(transform, transforms.normalize(model.mean, model.std, sides=axes, device=device))
    groups = None if image.groups is None else tree_map(lambda label: label.to(device), image.groups)
    ascent = make_ascent(
        resolved.features,
        image,
        transform,
        objective,
        optimizer_for(options.optimizer, options.lr, options.steps, groups),
        redirect=options.redirect or 0,
        smooth_pools=_smooths(options, resolved.features),
        saliency=options.saliency,
    )
    depends = objective.batch_score is not None and objective.group == 1
    single_batch = depends or image.share_params is not None
    return Composed(ascent, image, tuple(sides), single_batch, transform, alpha=channels > model.channels)


def _smooths(options: RenderOptions, features: Features) -> bool:
    if options.smooth_pools == "auto":
        return options.optimizer == "default" and features.exported
    return options.smooth_pools == "yes"


def plan(
    resolved: Resolved, composed: Composed, keys: Callable[[Sequence[int], int], Tensor] | None = None
) -> Renderer:
    """Decide whether the step is compiled and how large the batches are.

    Args:
        resolved, composed: what to render, and how.
        keys: (filter numbers, seed) -> keys of the filters, int64 ``(n, 2)``. Default: :func:`filter_keys` of the
            objective's first layer.

    Raises:
        ValueError: compiling was requested for a model that cannot be exported, or a batch size or tolerance for
            filters that need a single batch.
    """
    options, features, device = resolved.options, resolved.features, resolved.device
    filters = resolved.filters
    step = select_step(
        composed.ascent.step,
        str(options.compile),
        device=device,
        pixels=len(filters) * options.steps * math.prod(composed.size),
        exported=features.exported,
        name=resolved.model.name,
    )
    eager = step is composed.ascent.step
    weights = features.weights if eager else compiled_weights(features)
    layer = features.paths[resolved.objective.layers[0]]

    def init(chosen: Sequence[int], seed: int) -> tuple[State, Target]:
        own = filter_keys(seed, layer, chosen, device=device) if keys is None else keys(chosen, seed)
        state = composed.ascent.init(own)
        return state, torch.tensor(list(chosen), dtype=torch.int64, device=device)

    batch_size = default_batch_size(device, resolved.model.size, compiled=not eager)
    if isinstance(options.batch_size, int):
        batch_size = options.batch_size
    if composed.single_batch:
        if options.tolerance is not None or (options.batch_size != "auto" and batch_size < len(filters)):
            raise ValueError(
                f"the {len(filters)} images of {resolved.objective} depend on each other: they need one batch and no"
                f" tolerance, got batch_size={options.batch_size}, tolerance={options.tolerance}"
            )
        batch_size = len(filters)
    elif options.batch_size == "auto" and device.type == "cuda" and not options.deterministic:
        batch_size = probe_batch_size(
            lambda: CapturedStep(composed.ascent.step) if isinstance(step, CapturedStep) else composed.ascent.step,
            features.weights,
            lambda chosen: init(chosen, options.seed),
            filters,
            device=device,
            most=min(MAX_BATCH_SIZE, len(filters)),
        )
    group = 1 if composed.single_batch else resolved.objective.group
    if group > 1:
        batch_size = _whole_groups(batch_size, group, options, resolved.objective)
    if not composed.single_batch:
        batch_size = fit_batch_size(batch_size, len(filters), device, group=group, compiled=not eager)
    floats = (w.dtype for w in features.weights.values() if w.is_floating_point())
    return Renderer(
        tuple(filters),
        batch_size,
        make_config(
            resolved.model,
            resolved.objective,
            options,
            layer=_with_axes(resolved.objective.layers[0], layer),
            size=composed.size,
            precision=str(next(floats, torch.float32)).removeprefix("torch."),
            device=device.type,
            alpha=composed.alpha,
        ),
        options,
        step,
        weights,
        init,
        device,
        composed.single_batch,
        composed.ascent.decode,
        composed.ascent.finish,
        group,
        resolved.objective.family,
    )


def _whole_groups(batch_size: int, group: int, options: RenderOptions, objective: Objective) -> int:
    """The batch size in whole groups of images that depend on each other."""
    if options.tolerance is not None or (options.batch_size != "auto" and batch_size < group):
        raise ValueError(
            f"the images of {objective} depend on each other in groups of {group}: they need at least that batch size"
            f" and no tolerance, got batch_size={options.batch_size}, tolerance={options.tolerance}"
        )
    return max(group, batch_size // group * group)


def _with_axes(requested: str, path: str) -> str:
    """A layer's full name, with its axes where the user states them."""
    name, at, axes = requested.rpartition("@")
    return f"{path}@{axes}" if name and at and axes in AXES and not path.endswith(f"@{axes}") else path
