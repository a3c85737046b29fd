"""Build the algorithm from its parts."""

from typing import NamedTuple

from featvis_func import transform as transforms
from featvis_func.backbone.features import Features
from featvis_func.engine.ahead import draws_are_few
from featvis_func.engine.step import Ascent, make_ascent
from featvis_func.random import key
from featvis_func.rendering.input_size import KINDS, warn_if_stretched
from featvis_func.rendering.optimizers import optimizer_for
from featvis_func.rendering.options import RenderOptions
from featvis_func.rendering.presets import IMAGES, named_transform
from featvis_func.rendering.resolve import Resolved
from featvis_func.tree import tree_map
from featvis_func.types import Image, Transform


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
    draws_ahead: bool
    """Whether the random numbers of a step are so few that those of several steps are drawn at once."""
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
    draw = transform.draw(key(options.seed, device=device))
    shape = transform.apply(example, draw).shape
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
    alpha = channels > model.channels
    return Composed(ascent, image, tuple(sides), single_batch, transform, draws_are_few(draw), alpha)


def _smooths(options: RenderOptions, features: Features) -> bool:
    if options.smooth_pools == "auto":
        return options.optimizer == "default" and features.exported
    return options.smooth_pools == "yes"
