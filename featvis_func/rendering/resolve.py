"""What the arguments of a rendering mean: models, objectives, filters and options, all of them checked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from featvis_func import objective as objectives
from featvis_func.backbone.features import Features, device_of, make_features
from featvis_func.engine.forward import check_layers, check_shapes
from featvis_func.engine.snapshots import snapshot_steps
from featvis_func.io.display import check_shown
from featvis_func.io.filter_spec import split_layer
from featvis_func.models import Model, load_model
from featvis_func.models.copying import layer_modules
from featvis_func.objective import Objective
from featvis_func.rendering import presets
from featvis_func.rendering.input_size import image_size, with_input_size
from featvis_func.rendering.optimizers import REDIRECT, REDIRECTING, optimizer_for
from featvis_func.rendering.options import IMAGES, TRANSFORMS, RenderOptions
from featvis_func.rendering.presets import named_transform
from featvis_func.rendering.spec import is_spec, parse_spec
from featvis_func.types import Image, Transform
from featvis_func.validation import check_filters


class Resolved(NamedTuple):
    """What a rendering is about, all of it checked."""

    model: Model
    """With its input size: see :func:`~featvis_func.rendering.input_size.with_input_size`."""
    objective: Objective
    filters: list[int]
    features: Features
    options: RenderOptions
    """With ``redirect`` decided."""
    size: tuple[int, ...]
    """Requested for the images: ``(h, w)``, ``(t, h, w)`` or ``(t,)``."""
    device: torch.device


def resolve(
    model: str | nn.Module | Model,
    objective: str | Objective,
    filters: Iterable[int] | int | None,
    options: RenderOptions,
    features: Features | None = None,
) -> Resolved:
    """Find what the arguments of a rendering mean, and refuse what cannot be rendered.

    Whatever can be told without the model's graph is checked before the model is traced.

    Raises:
        ValueError: bad input, with what was given, what was expected and what exists.
    """
    if isinstance(model, str) and options.device is None and features is None and torch.cuda.is_available():
        options = replace(options, device="cuda")
    model = load_model(model)
    objective, filters = parse_objective(objective, filters, model)
    if not objective.layers:
        raise ValueError(f"{objective} reads no layer of the model; add an objective that does")
    check_own_parts(options)
    check_shown(options.bands, model.channels, len(model.size))
    numbers = None if filters is None else check_filters(filters)
    model = with_input_size(model, options.size, features)
    size = image_size(options.size, model)
    check_presets(options, model)
    if features is None:
        features = make_features(model, objective.layers, device=options.device, precision=options.precision)
    check_layers(objective, features)
    check_shapes(objective, features.shapes)
    if options.redirect is None:
        redirect = REDIRECT if options.optimizer in REDIRECTING and features.redirected is not None else 0
        options = replace(options, redirect=redirect)
    device = device_of(features, options.device)
    numbers = _check_filter_range(numbers, objective, features)
    return Resolved(model, objective, numbers, features, options, size, device)  # type: ignore[arg-type]


def check_own_parts(options: RenderOptions) -> None:
    """Check options whose values may be objects of the user's own, and those that must agree with each other.

    Raises:
        ValueError: neither a name nor an object of the right type, or more snapshots than there are images.
    """
    if not isinstance(options.transforms, str | Transform):
        raise ValueError(
            f"transforms must be one of {', '.join(TRANSFORMS)} or a Transform, got {options.transforms!r}"
        )
    if not isinstance(options.image, str | Image):
        raise ValueError(f"image must be one of {', '.join(IMAGES)} or an Image, got {options.image!r}")
    snapshot_steps(options.steps, options.snapshots)
    optimizer_for(options.optimizer, options.lr, options.steps)


def check_presets(options: RenderOptions, model: Model) -> None:
    """Check that what goes by name exists for models of videos and signals, too.

    Raises:
        ValueError: a transform or a parameterisation that the model's kind of images does not have.
    """
    pixel = (1,) * len(model.size)
    if isinstance(options.transforms, str):
        named_transform(options.transforms, image=pixel, size=pixel)
    if isinstance(options.image, str):
        presets.IMAGES[options.image](pixel, channels=model.channels)


def parse_objective(
    objective: str | Objective, filters: Iterable[int] | int | None, model: Model
) -> tuple[Objective, Iterable[int] | int | None]:
    """The objective and the filters that the arguments of :func:`featvis_func.render` mean."""
    if isinstance(objective, str) and is_spec(objective, model):
        selection = parse_spec(objective, model)
        if selection.filters is not None and filters is not None:
            raise ValueError(f"the filters are given twice: by {objective!r} and by filters=")
        return selection.objective, filters if selection.filters is None else selection.filters
    if isinstance(objective, str):
        layer, numbers, stated = split_layer(objective, layer_modules(model.module))
        if stated and filters is not None:
            raise ValueError(f"the filters are given twice: by {objective!r} and by filters=")
        return objectives.channel(layer), numbers if stated else filters
    if not isinstance(objective, Objective):
        raise ValueError(f"expected the name of a layer or an Objective, got {objective!r}")
    return objective, filters


def _check_filter_range(numbers: list[int] | None, objective: Objective, features: Features) -> list[int]:
    """The filter numbers, checked against the layers in which they select a channel; ``None`` means all."""
    widths = {n: features.shapes[n][objectives.feature_axis(features.shapes[n])] for n in objective.targeted}
    return select_members(objective, widths, numbers)


def select_members(objective: Objective, widths: Mapping[str, int], numbers: list[int] | None) -> list[int]:
    """The numbers of the images to render, checked.

    Args:
        objective: of these images.
        widths: layer in which the target selects a channel -> number of its channels.
        numbers: ``None`` means all.

    Raises:
        ValueError: numbers that the objective does not have, a part of a group, or a sum of families whose numbers of
            members differ.
    """
    group = objective.group
    counts = {*widths.values(), *(() if objective.variants is None else (objective.variants // group,))}
    if objective.family is not None and len(counts) > 1:
        raise ValueError(f"{objective} joins families of different numbers of members: {sorted(counts)}")
    if numbers is None:
        return list(range(min(widths.values()) * group if widths else objective.variants or 1))
    if objective.variants is not None and max(numbers) >= objective.variants:
        raise ValueError(f"{objective} describes images 0 to {objective.variants - 1}, got {max(numbers)}")
    for name, width in widths.items():
        outside = [f for f in numbers if not 0 <= f < width * group]
        if outside:
            last = width * group - 1
            what = f"layer {name!r} has filters" if group == 1 else f"{objective} describes images"
            raise ValueError(f"{what} 0 to {last}, got {outside[0]}")
    for number in (min(numbers), max(numbers)):
        if not 0 <= number < 2**32:
            raise ValueError(f"filter numbers must be in [0, 2**32), got {number}")
    check_groups(numbers, group, str(objective))
    return numbers


def check_groups(numbers: Sequence[int], group: int, objective: str) -> None:
    """Raise ValueError unless numbers are whole groups of images that depend on each other.

    >>> check_groups([3, 4, 5, 0, 1, 2], 3, "facets(channel('conv'), 3)")
    """
    for start in range(0, len(numbers), group):
        first = numbers[start] - numbers[start] % group
        if list(numbers[start : start + group]) != list(range(first, first + group)):
            raise ValueError(
                f"the images of {objective} come in groups of {group}, such as {first} to {first + group - 1}; got"
                f" {list(numbers[start : start + group])}"
            )
