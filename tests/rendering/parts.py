"""An ascent together with its parts, for tests that call a step themselves."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import featvis_func as fv
from featvis_func import objective as objectives
from featvis_func import transform as transforms
from featvis_func.backbone.features import Features, make_features
from featvis_func.engine.run import Step
from featvis_func.engine.step import Ascent, filter_keys, make_ascent
from featvis_func.models import Model
from featvis_func.objective import Objective
from featvis_func.rendering.optimizers import default_optimizer
from featvis_func.tree import tree_leaves
from featvis_func.types import Image, Optimizer, State, Transform


class Parts(NamedTuple):
    """An ascent and what it is made of."""

    features: Features
    image: Image
    transform: Transform
    objective: Objective
    optimizer: Optimizer
    ascent: Ascent

    @property
    def step(self) -> Step:
        return self.ascent.step

    def start(self, filters: Sequence[int], seed: int = 0) -> tuple[State, Tensor]:
        """The state of some filters before the first step, and their targets."""
        layer = self.features.paths[self.objective.layers[0]]
        return self.ascent.init(filter_keys(seed, layer, filters)), torch.tensor(filters)


def parts_of(
    model: Model,
    objective: str | Objective,
    *,
    size: tuple[int, int] = (18, 21),
    optimizer: Optimizer | None = None,
    transform: str = "default",
) -> Parts:
    """Compose an ascent as ``render`` does by default, without redirected gradients."""
    objective = objectives.channel(objective) if isinstance(objective, str) else objective
    features = make_features(model, objective.layers)
    image = fv.fourier(size, channels=model.channels)
    whole = transforms.chain(
        fv.named_transform(transform, image=size, size=model.size, std=model.std),
        transforms.normalize(model.mean, model.std),
    )
    optimizer = default_optimizer(128, groups=image.groups) if optimizer is None else optimizer
    ascent = make_ascent(features, image, whole, objective, optimizer)
    return Parts(features, image, whole, objective, optimizer, ascent)


def equal_trees(a: Any, b: Any) -> bool:
    """Whether all tensors of two pytrees are equal, bit by bit."""
    leaves, others = tree_leaves(a), tree_leaves(b)
    return len(leaves) == len(others) and all(torch.equal(x, y) for x, y in zip(leaves, others, strict=True))
