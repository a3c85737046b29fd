"""Objectives about another image: to match its activations, its style, or to overdraw what a layer sees in it.

The other image comes as its activations, from :func:`~featvis_func.activations_of`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Literal

import torch
from torch import Tensor

from featvis_func.objective.base import PICTURE, Objective, features_last, gram
from featvis_func.objective.directions import dot_cosine
from featvis_func.objective.expression import Call, call
from featvis_func.types import Activations, Target
from featvis_func.validation import check_name

Loss = Literal["l1", "l2"]

# Under a root, where the gradient at zero would not be finite.
_EPS = 1e-12


def activation_difference(reference: Mapping[str, Tensor], *, loss: Loss = "l1") -> Objective:
    """How far a layer is from what it was for another image: ``mean |x - r|`` or ``mean (x - r)^2``.

    Positive, and so a penalty where the image shall come near: subtract it. Over several layers it is their sum.

    Args:
        reference: layer -> that layer's activations for the other image, of the same shape.
        loss: ``"l1"`` or ``"l2"``.

    Raises:
        ValueError: no layer, another loss; when called, activations of another shape.

    Source: Lucid, ``optvis/objectives.py`` (``activation_difference``).

    >>> activation_difference({"a": torch.zeros(2, 2, 2)})({"a": torch.ones(2, 2, 2)}, torch.tensor(0))
    tensor(1.)
    """
    power = _power(loss)
    return _sum_over(
        call("activation_difference", dict(reference), loss=None if loss == "l1" else loss),
        reference,
        lambda layer, x, r: features_last((x - r).abs() ** power).mean(-1),
    )


def inversion(reference: Mapping[str, Tensor]) -> Objective:
    """How well a layer is matched: ``-|x - r|^2 / |r|^2``, 0 at best.

    Args: as for :func:`activation_difference`.

    Source: Mahendran and Vedaldi (2015), eq. 2, without its prior on the image.

    >>> inversion({"a": torch.ones(2, 2, 2)})({"a": torch.zeros(2, 2, 2)}, torch.tensor(0))
    tensor(-1.)
    """

    def shown(layer: str, x: Tensor, r: Tensor) -> Tensor:
        return -features_last((x - r).square()).mean(-1) / r.square().mean().clamp_min(torch.finfo(r.dtype).tiny)

    return _sum_over(call("inversion", dict(reference)), reference, shown)


def caricature(reference: Mapping[str, Tensor], *, power: float = 1.0) -> Objective:
    """What a layer sees in an image, overdrawn: ``mean_p x_p . r_p max(0.1, cos(x_p, r_p))^power`` over positions.

    Args:
        reference: as for :func:`activation_difference`.
        power: of the cosine, at least 0: 0 wants length alone, more wants direction.

    Raises:
        ValueError: a power below 0; and as for :func:`activation_difference`.

    Source: Olah et al., "Activation Atlas" (2019) and Lucid's caricature notebook.

    >>> caricature({"a": torch.ones(2, 1, 1)})({"a": torch.ones(2, 1, 1)}, torch.tensor(0)).round()
    tensor(2.)
    """
    if not 0 <= power < math.inf:
        raise ValueError(f"the power of the cosine must be finite and at least 0, got {power}")

    def shown(layer: str, x: Tensor, r: Tensor) -> Tensor:
        return dot_cosine(features_last(x), features_last(r), power)

    expression = call("caricature", dict(reference), power=None if power == 1.0 else power)
    return _sum_over(expression, reference, shown)


def departure(layer: str, picture: Tensor) -> Objective:
    """How far a layer is from what it makes of a picture under the same view: ``|x - r| / |r|``, over all positions.

    Positive, and so a penalty: subtract it, for an image that stays near the picture where the layer looks. Unlike
    :func:`activation_difference`, shift and turn of the view do not count.

    Args:
        layer: the layer's name.
        picture: float ``(c, h, w)`` in ``[0, 1]``, of the images' size.

    Raises:
        ValueError: a picture of another form.

    Gradient: finite where both are equal, too.

    Source: Hamblin et al., "Feature Accentuation" (2024), and faccent's ``l2_compare``; relative, so that a weight
    means the same in any layer.

    >>> goal = departure("a", torch.rand(3, 8, 8))
    >>> goal({"a": torch.ones(2), "<picture>a": torch.ones(2) / 2}, torch.tensor(0))
    tensor(1.)
    """
    if picture.ndim != 3 or not picture.is_floating_point():
        raise ValueError(
            f"expected a picture (c, h, w) of floats in [0, 1], got {tuple(picture.shape)} {picture.dtype}"
        )

    def activation_map(activations: Activations, target: Target) -> Tensor:
        apart = activations[layer] - activations[PICTURE + layer]
        return features_last(apart).square().mean(-1).clamp_min(_EPS).sqrt()

    def score(activations: Activations, target: Target) -> Tensor:
        x, r = activations[layer], activations[PICTURE + layer]
        return ((x - r).square().mean() + _EPS).sqrt() / (r.square().mean() + _EPS).sqrt()

    expression = call("departure", layer, picture.detach())
    return Objective(
        score, activation_map, (layer,), (), str(expression), picture=picture.detach(), expression=expression
    )


def style(reference: Mapping[str, Tensor], *, loss: Loss = "l1") -> Objective:
    """How well a layer's correlations are matched, wherever they are: ``-mean |G(x) - G(r)|``, 0 at best.

    ``G(x)_ij = mean_p x_ip x_jp`` is the Gram matrix of the channels.

    Args: as for :func:`activation_difference`.

    Raises:
        ValueError: as for :func:`activation_difference`; the other image may have other positions here.

    Source: Gatys et al. (2015), eq. 3; the mean over positions as in Lucid.

    >>> style({"a": torch.ones(2, 3, 3)})({"a": torch.zeros(2, 2, 2)}, torch.tensor(0))
    tensor(-1.)
    """
    power = _power(loss)

    def one(layer: str, r: Tensor) -> Objective:
        reference_gram = gram(r)

        def score(activations: Activations, target: Target) -> Tensor:
            x = activations[layer]
            own_gram = gram(x)
            if own_gram.shape != reference_gram.shape:
                raise ValueError(
                    f"the style has {len(reference_gram)} channels of layer {layer!r}, which has {len(own_gram)}"
                )
            return -((own_gram - reference_gram.to(x)).abs() ** power).mean()

        def activation_map(activations: Activations, target: Target) -> Tensor:
            return features_last(activations[layer]).square().mean(-1)

        return Objective(score, activation_map, (layer,), (), "")

    parts = [one(layer, r.detach().clone()) for layer, r in _references(reference).items()]
    expression = call("style", dict(reference), loss=None if loss == "l1" else loss)
    return replace(reduce(add, parts), name=str(expression), expression=expression)


def _sum_over(
    expression: Call, reference: Mapping[str, Tensor], shown: Callable[[str, Tensor, Tensor], Tensor]
) -> Objective:
    """The sum over layers of the mean of a map of positions."""

    def one(layer: str, r: Tensor) -> Objective:
        def activation_map(activations: Activations, target: Target) -> Tensor:
            x = activations[layer]
            if x.shape != r.shape:
                raise ValueError(f"the reference has {tuple(r.shape)} of layer {layer!r}, which has {tuple(x.shape)}")
            return shown(layer, x, r.to(x))

        return Objective(lambda a, t: activation_map(a, t).mean(), activation_map, (layer,), (), "")

    total = reduce(add, [one(layer, r.detach().clone()) for layer, r in _references(reference).items()])
    return replace(total, name=str(expression), expression=expression)


def _references(reference: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not reference:
        raise ValueError("the reference has no layer")
    return reference


def _power(loss: str) -> int:
    check_name("loss", loss, ("l1", "l2"))
    return 1 if loss == "l1" else 2
