"""Objectives on several images at once: to differ, to resemble their neighbours, to lead from one unit to another.

:func:`diversity` and :func:`alignment` couple the images of a run, which are then rendered in one batch, in order.

>>> from featvis_func.objective.units import channel
>>> channel("conv", 3) - 10 * diversity("conv")
channel('conv', 3) - 10 * diversity('conv')
"""

import math

import torch
from torch import Tensor
from torch.func import vmap

from featvis_func.objective.base import BatchScore, Objective, features_last, gram
from featvis_func.objective.expression import Call, call
from featvis_func.types import Activations, Target

# Under a root, where the gradient at zero would not be finite.
_EPS = 1e-12
# Images further apart than this do not pull at each other, as in Lucid.
_REACH = 4


def diversity(layer: str) -> Objective:
    """How alike the styles of the images are: for image ``i`` the mean over ``j != i`` of ``cos(G(x_i), G(x_j))``.

    ``G(x)_ab = mean_p x_ap x_bp`` is the Gram matrix of the channels. 0 to 1, and so a penalty: subtract it, to see the
    several things that one unit responds to.

    Args:
        layer: the layer's name.

    Gradient: of the sum over all images; one image alone has the value 0 and no gradient.

    Source: Olah et al., "Feature Visualization" (2017), and Lucid, ``optvis/objectives.py`` (``diversity``), which sums
    over ``j``, so that there a weight means more in a larger batch.

    >>> activations = {"a": torch.eye(2).reshape(2, 2, 1, 1)}
    >>> diversity("a").batch_score(activations, torch.arange(2))
    tensor([0., 0.])
    """

    def batch_score(activations: Activations, target: Target) -> Tensor:
        grams = vmap(gram)(activations[layer]).flatten(1)
        unit = grams / (grams.square().sum(1, keepdim=True) + _EPS).sqrt()
        others = max(1, len(grams) - 1)
        alike = unit @ unit.T
        return (alike.sum(1) - alike.diagonal()) / others

    return _between_images(call("diversity", layer), layer, batch_score)


def alignment(layer: str, *, decay: float = 2.0) -> Objective:
    """How near an image is to its neighbours: ``-sum_j decay^-|i-j| d_ij / 2`` over ``0 < |i-j| <= 4``.

    ``d_ij = |x_i - x_j|^2 / (|x_i|^2 + |x_j|^2)``, from 0 for equal activations to 1 for unrelated and 2 for opposite
    ones. 0 at best: add it. It keeps like things in the same place along an :func:`interpolate`.

    Args:
        layer: the layer's name.
        decay: at least 1; how fast the pull falls with the distance in the row of images.

    Raises:
        ValueError: a decay below 1.

    Gradient: of the sum over all images, in which each pair counts once.

    Source: Lucid, ``optvis/objectives.py`` (``alignment``), with the mean of ``(x_i - x_j)^2``; here relative, so that
    a weight means the same in any layer.

    >>> activations = {"a": torch.tensor([[0.0], [2.0]])}
    >>> alignment("a").batch_score(activations, torch.arange(2))
    tensor([-0.2500, -0.2500])
    """
    if not 1 <= decay < math.inf:
        raise ValueError(f"the decay must be finite and at least 1, got {decay}")

    def batch_score(activations: Activations, target: Target) -> Tensor:
        rows = activations[layer].flatten(1)
        place = torch.arange(len(rows), device=rows.device)
        apart = (place[:, None] - place).abs()
        pull = torch.where((apart > 0) & (apart <= _REACH), decay ** -apart.to(rows.dtype), 0.0)
        energy = rows.square().sum(1)
        distance = (rows[:, None] - rows).square().sum(-1) / (energy[:, None] + energy + _EPS)
        return -0.5 * (pull * distance).sum(1)

    return _between_images(call("alignment", layer, decay=None if decay == 2.0 else decay), layer, batch_score)


def interpolate(first: Objective, second: Objective, *, count: int) -> Objective:
    """From one objective to another in ``count`` images: ``(1 - w) first + w second``, ``w = i / (count - 1)``.

    Args:
        first, second: objectives that name their own channels.
        count: images, at least 2; the run's "filters" are ``0 .. count - 1``.

    Raises:
        ValueError: an objective whose channel is the filter number of the run; fewer than 2 images.

    Source: Lucid, ``optvis/objectives.py`` (``channel_interpolate``), for any two objectives.

    >>> from featvis_func.objective.units import channel
    >>> goal = interpolate(channel("a", 0), channel("a", 1), count=3)
    >>> [float(goal({"a": torch.tensor([2.0, 4.0])}, torch.tensor(i))) for i in range(3)]
    [2.0, 3.0, 4.0]
    """
    if count < 2:
        raise ValueError(f"an interpolation needs at least 2 images, got {count}")
    for goal in (first, second):
        if goal.targeted or goal.variants is not None or goal.batch_score is not None:
            raise ValueError(f"{goal} does not name its own channel, or is about several images: no end to go to")

    def between(a: Tensor, b: Tensor, target: Target) -> Tensor:
        weight = target.to(a.dtype) / (count - 1)
        return (1 - weight) * a + weight * b

    def activation_map(activations: Activations, target: Target) -> Tensor:
        a, b = first.activation_map(activations, target), second.activation_map(activations, target)
        return between(a, b, target) if a.shape == b.shape else a

    expression = call("interpolate", first.expression_or_name, second.expression_or_name, count=count)
    return Objective(
        lambda a, t: between(first.score(a, t), second.score(a, t), t),
        activation_map,
        tuple(dict.fromkeys(first.layers + second.layers)),
        (),
        str(expression),
        variants=count,
        expression=expression,
    )


def _between_images(expression: Call, layer: str, batch_score: BatchScore) -> Objective:
    """An objective that is zero for a single image."""

    def activation_map(activations: Activations, target: Target) -> Tensor:
        return features_last(activations[layer]).square().mean(-1)

    return Objective(
        lambda a, t: a[layer].new_zeros(()),
        activation_map,
        (layer,),
        (),
        str(expression),
        batch_score,
        expression=expression,
    )
