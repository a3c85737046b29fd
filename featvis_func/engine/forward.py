"""From images to scores for a batch of filters: random transforms, one run of the backbone, the objective."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

import torch
from torch import Tensor
from torch.func import vmap

from featvis_func.backbone.features import Features, device_of
from featvis_func.objective import IMAGE, PICTURE, Objective
from featvis_func.types import Draw, Target, Transform, Weights

Forward: TypeAlias = Callable[[Tensor, Tensor, Weights, Draw, Target], tuple[Tensor, Tensor]]
"""(images ``(n, c, h, w)``, or videos or signals, redirect mask float ``(n,)``: 1 for a filter whose gradients may be
redirected, weights, draws, targets) -> scores ``(n,)``, activation maps."""


def make_forward(
    features: Features, transform: Transform, objective: Objective, *, redirect: int = 0, smooth_pools: bool = False
) -> Forward:
    """Compose transform, backbone and objective.

    Args: as for :func:`featvis_func.make_ascent`.

    Raises:
        ValueError: the features lack a layer of the objective, or cannot redirect or smooth gradients.
    """
    check_layers(objective, features)
    plain, redirected = features.apply, features.redirected
    special = redirected if redirect else None
    if smooth_pools and features.smoothed is not None:
        special = features.smoothed
    picture = None if objective.picture is None else objective.picture.to(device_of(features))
    if redirect and redirected is None:
        raise ValueError(
            f"redirect={redirect}: the model runs with a forward hook, where no gradient can be redirected"
        )
    if smooth_pools and not features.exported:
        raise ValueError("smooth_pools: the model runs with a forward hook, where no gradient can be smoothed")

    def forward(
        images: Tensor, redirect_mask: Tensor, weights: Weights, draws: Draw, target: Target
    ) -> tuple[Tensor, Tensor]:
        def backbone(batch: Tensor) -> dict[str, Tensor]:
            if special is None:
                return plain(weights, batch)
            copies = len(batch) // len(redirect_mask)
            return special(weights, batch, redirect_mask[:, None].expand(-1, copies).reshape(-1))

        transformed = vmap(transform.apply)(images, draws)
        several = transformed.ndim > images.ndim  # copies (n, v, c, h, w) of images (n, c, h, w)
        activations = _activations(backbone, transformed, images.dtype, several=several)
        if picture is not None:
            shown = vmap(transform.apply, (None, 0))(picture.to(images), draws)
            reference = _activations(lambda batch: plain(weights, batch), shown, images.dtype, several=several)
            activations |= {PICTURE + name: values for name, values in reference.items()}
        return _scores(objective, activations, images, target, several=several)

    return forward


def check_layers(objective: Objective, features: Features) -> None:
    """Raise ValueError if the features lack a layer of the objective."""
    missing = [name for name in objective.layers if name not in features.shapes]
    if missing:
        raise ValueError(f"the features lack layer {missing[0]!r} of the objective; they have {list(features.shapes)}")


def check_shapes(objective: Objective, shapes: Mapping[str, Sequence[int]]) -> None:
    """Call an objective on activations of zeros, so that one that does not fit its layers is refused before any step.

    Args:
        objective: any; one that also reads what is not a layer is passed over.
        shapes: layer -> shape of its output for one image.

    Raises:
        ValueError: of the objective, such as for directions of another width than the layer.
    """
    if not all(name in shapes for name in objective.layers) or objective.picture is not None:
        return
    zeros = {name: torch.zeros(tuple(shapes[name])) for name in objective.layers}
    # It may read the image itself, or hold tensors on another device: then the first step tells.
    with torch.no_grad(), suppress(KeyError, RuntimeError):
        for function in (objective.activation_map, objective.score):
            function(zeros, torch.tensor(0))


def _activations(
    backbone: Callable[[Tensor], dict[str, Tensor]], images: Tensor, dtype: torch.dtype, *, several: bool
) -> dict[str, Tensor]:
    """The layers' activations ``(n, [v,] ...)`` for transformed images ``(n, [v,] c, h, w)``."""
    outputs = backbone(images.flatten(0, 1) if several else images)
    return {name: (a.unflatten(0, images.shape[:2]) if several else a).to(dtype) for name, a in outputs.items()}


def _scores(
    objective: Objective, activations: Mapping[str, Tensor], images: Tensor, target: Target, *, several: bool
) -> tuple[Tensor, Tensor]:
    """Scores and activation maps; of several transformed copies the mean score, and the first one's map."""
    inputs = {**activations, IMAGE: images}
    first = {**{name: a[:, 0] for name, a in activations.items()}, IMAGE: images} if several else inputs
    maps = vmap(objective.activation_map)(first, target)
    score, batch_score = objective.score, objective.batch_score
    if several:
        over_copies = {**dict.fromkeys(activations, 0), IMAGE: None}
        scores = vmap(lambda a, t: vmap(score, (over_copies, None))(a, t).mean(0))(inputs, target)
    else:
        scores = vmap(score)(inputs, target)
    if batch_score is None:
        return scores, maps
    if several:
        over_copies = {**dict.fromkeys(activations, 1), IMAGE: None}
        return scores + vmap(batch_score, (over_copies, None))(inputs, target).mean(0), maps
    return scores + batch_score(inputs, target), maps
