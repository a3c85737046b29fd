"""From images to scores, for a batch of filters: views, the backbone once for all of them, the objective."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.func import vmap

from featvis_func.backbone.features import Features
from featvis_func.objective import IMAGE, PICTURE, Objective
from featvis_func.types import Draw, Target, Transform, Weights

Scoring: TypeAlias = Callable[[Tensor, Tensor, Weights, Draw, Target], tuple[Tensor, Tensor]]
"""(images ``(n, c, h, w)``, float ``(n,)``: 1 for a filter in its first steps, weights, draws, targets) -> scores
``(n,)``, maps."""


def make_scoring(features: Features, transform: Transform, objective: Objective, *, redirect: int = 0) -> Scoring:
    """Composes views, backbone and objective.

    Args: as for :func:`~featvis_func.make_step`.

    Raises:
        ValueError: the features lack a layer of the objective, or cannot redirect gradients.
    """
    check_layers(objective, features)
    redirected, plain = features.redirected, features.apply
    if redirect and redirected is None:
        raise ValueError(f"redirect={redirect}: the model runs through a hook, where no gradient can be redirected")

    def score(
        images: Tensor, redirect_mask: Tensor, weights: Weights, draws: Draw, target: Target
    ) -> tuple[Tensor, Tensor]:
        def backbone(views: Tensor) -> dict[str, Tensor]:
            if not redirect or redirected is None:
                return plain(weights, views)
            return redirected(
                weights, views, redirect_mask[:, None].expand(-1, len(views) // len(redirect_mask)).reshape(-1)
            )

        views = vmap(transform.apply)(images, draws)
        activations = _of_views(backbone, views, images.dtype)
        if objective.picture is not None:
            beside = vmap(transform.apply, (None, 0))(objective.picture.to(images), draws)
            seen = _of_views(lambda views: plain(weights, views), beside, images.dtype)
            activations |= {PICTURE + name: values for name, values in seen.items()}
        return _judged(objective, activations, images, target, several=views.ndim == 5)

    return score


def check_layers(objective: Objective, features: Features) -> None:
    """Raises ValueError if the features lack a layer of the objective."""
    missing = [name for name in objective.layers if name not in features.shapes]
    if missing:
        raise ValueError(f"the features lack layer {missing[0]!r} of the objective; they have {list(features.shapes)}")


def _of_views(backbone: Callable[[Tensor], dict[str, Tensor]], views: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the layers make of views ``(n, [v,] c, h, w)``: each ``(n, [v,] ...)``."""
    several = views.ndim == 5
    found = backbone(views.flatten(0, 1) if several else views)
    return {name: (a.unflatten(0, views.shape[:2]) if several else a).to(dtype) for name, a in found.items()}


def _judged(
    objective: Objective, activations: Mapping[str, Tensor], images: Tensor, target: Target, *, several: bool
) -> tuple[Tensor, Tensor]:
    """Scores and maps; of several views the mean score, and the first one's map."""
    seen = {**activations, IMAGE: images}
    first = {**{name: a[:, 0] for name, a in activations.items()}, IMAGE: images} if several else seen
    maps = vmap(objective.activation_map)(first, target)
    score, batch_score = objective.score, objective.batch_score
    if several:
        of_views = {**dict.fromkeys(activations, 0), IMAGE: None}
        of_filters = {**dict.fromkeys(activations, 1), IMAGE: None}
        scores = vmap(lambda a, t: vmap(score, (of_views, None))(a, t).mean(0))(seen, target)
        return scores if batch_score is None else scores + vmap(batch_score, (of_filters, None))(seen, target).mean(
            0
        ), maps
    scores = vmap(score)(seen, target)
    return scores if batch_score is None else scores + batch_score(seen, target), maps
