"""Objectives on several images at once: images that differ, that are aligned, or that interpolate between objectives.

With :func:`diversity` and :func:`alignment` each image's score depends on the other images of the run, which are
therefore rendered in one batch, in the requested order.

>>> from featvis_func.objective.units import channel
>>> channel("conv", 3) - 10 * diversity("conv")
channel('conv', 3) - 10 * diversity('conv')
"""

import torch
from torch import Tensor
from torch.func import vmap

from featvis_func.objective.base import BatchScore, Objective, features_last, gram
from featvis_func.objective.expression import Call, call
from featvis_func.types import Activations, Target
from featvis_func.validation import check_float, check_int

# Added under a square root or to a denominator, so that the gradient is finite at zero.
_EPS = 1e-12
# Largest difference between the positions of two images in the run that are compared, as in Lucid.
_RADIUS = 4


def diversity(layer: str) -> Objective:
    """Compute the similarity in style to the other images: for image ``i`` the mean over ``j != i`` of
    ``cos(G(x_i), G(x_j))``.

    ``G(x)_ab = mean_p x_ap x_bp`` is the Gram matrix of the channels. The value is 0 for images without a common style
    and 1 for equal styles: subtract it to see the different features that one unit responds to.

    Args:
        layer: the layer's name.

    Gradient: that of the sum over all images. A single image has the value 0 and no gradient.

    Source: Olah et al., "Feature Visualization" (2017), and Lucid, ``optvis/objectives.py`` (``diversity``), which
    takes the sum over ``j``, so that the same weight has more effect in a larger batch.

    >>> activations = {"a": torch.eye(2).reshape(2, 2, 1, 1)}
    >>> diversity("a").batch_score(activations, torch.arange(2))
    tensor([0., 0.])
    """

    def batch_score(activations: Activations, target: Target) -> Tensor:
        cosines = style_cosines(activations[layer])
        return (cosines.sum(1) - cosines.diagonal()) / max(1, len(cosines) - 1)

    return _batch_objective(call("diversity", layer), layer, batch_score)


def style_cosines(activations: Tensor) -> Tensor:
    """Compute the cosines between the Gram matrices of ``n`` images' activations: ``(n, n)``."""
    grams = vmap(gram)(activations).flatten(1)
    unit = grams / (grams.square().sum(1, keepdim=True) + _EPS).sqrt()
    return unit @ unit.T


def alignment(layer: str, *, decay: float = 2.0) -> Objective:
    """Align each image with its neighbours in the run: ``-sum_j decay^-|i-j| d_ij / 2`` over ``0 < |i-j| <= 4``.

    ``d_ij = |x_i - x_j|^2 / (|x_i|^2 + |x_j|^2)`` is 0 for equal activations, 1 for orthogonal and 2 for opposite ones.
    The value is at most 0: add it, for example to :func:`interpolate`, where it keeps similar features at the same
    place in successive images.

    Args:
        layer: the layer's name.
        decay: factor by which the weight of a pair decreases with each position between them, at least 1.

    Raises:
        ValueError: if ``decay`` is below 1.

    Gradient: that of the sum over all images, in which each pair counts once.

    Source: Lucid, ``optvis/objectives.py`` (``alignment``), with the mean of ``(x_i - x_j)^2``; here relative, so that
    a weight means the same in every layer.

    >>> activations = {"a": torch.tensor([[0.0], [2.0]])}
    >>> alignment("a").batch_score(activations, torch.arange(2))
    tensor([-0.2500, -0.2500])
    """
    check_float("alignment: decay", decay, 1)

    def batch_score(activations: Activations, target: Target) -> Tensor:
        rows = activations[layer].flatten(1)
        index = torch.arange(len(rows), device=rows.device)
        gap = (index[:, None] - index).abs()
        pair_weight = torch.where((gap > 0) & (gap <= _RADIUS), decay ** -gap.to(rows.dtype), 0.0)
        energy = rows.square().sum(1)
        distance = (rows[:, None] - rows).square().sum(-1) / (energy[:, None] + energy + _EPS)
        return -0.5 * (pair_weight * distance).sum(1)

    return _batch_objective(call("alignment", layer, decay=None if decay == 2.0 else decay), layer, batch_score)


def interpolate(first: Objective, second: Objective, *, count: int) -> Objective:
    """Interpolate between two objectives in ``count`` images: ``(1 - w) first + w second``, ``w = i / (count - 1)``.

    Args:
        first, second: objectives that do not depend on the filter number.
        count: number of images, at least 2; as "filters" of the run they have the numbers ``0`` to ``count - 1``.

    Raises:
        ValueError: if one of the objectives depends on the filter number or on other images, or ``count`` is below 2.

    Source: Lucid, ``optvis/objectives.py`` (``channel_interpolate``); here for any two objectives.

    >>> from featvis_func.objective.units import channel
    >>> objective = interpolate(channel("a", 0), channel("a", 1), count=3)
    >>> [float(objective({"a": torch.tensor([2.0, 4.0])}, torch.tensor(i))) for i in range(3)]
    [2.0, 3.0, 4.0]
    """
    count = check_int("interpolate: count", count, 2)
    for objective in (first, second):
        if objective.targeted or objective.variants is not None or objective.batch_score is not None:
            raise ValueError(
                f"interpolate: expected objectives that depend on neither the filter number nor other images, got"
                f" {objective}"
            )

    def mix(a: Tensor, b: Tensor, target: Target) -> Tensor:
        weight = target.to(a.dtype) / (count - 1)
        return (1 - weight) * a + weight * b

    def activation_map(activations: Activations, target: Target) -> Tensor:
        a, b = first.activation_map(activations, target), second.activation_map(activations, target)
        return mix(a, b, target) if a.shape == b.shape else a

    expression = call("interpolate", first.expression_or_name, second.expression_or_name, count=count)
    return Objective(
        lambda a, t: mix(first.score(a, t), second.score(a, t), t),
        activation_map,
        tuple(dict.fromkeys(first.layers + second.layers)),
        (),
        str(expression),
        variants=count,
        expression=expression,
    )


def _batch_objective(expression: Call, layer: str, batch_score: BatchScore) -> Objective:
    """Make an objective from a term that depends on all images of a run; its score for a single image is zero."""

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
