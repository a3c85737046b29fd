"""Objectives that compare an image with a reference image: to match its activations or style, or to exaggerate them.

The reference image is given by its activations, from :func:`~featvis_func.activations_of`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Literal

import torch
from torch import Tensor

from featvis_func.constants import device_constant
from featvis_func.objective.base import PICTURE, Objective, features_last, gram
from featvis_func.objective.directions import dot_cosine
from featvis_func.objective.expression import Call, call
from featvis_func.types import Activations, Target
from featvis_func.validation import check_float, check_name

Loss = Literal["l1", "l2"]

# Added under a square root, whose gradient at zero is not finite.
_EPS = 1e-12


def activation_difference(reference: Mapping[str, Tensor], *, loss: Loss = "l1") -> Objective:
    """Maximise the difference to the activations of a reference image: ``mean |x - r|`` or ``mean (x - r)^2``.

    The value is positive: subtract it to match the reference. For several layers the values are added.

    Args:
        reference: layer name -> that layer's activations for the reference image, of the same shape.
        loss: ``"l1"`` or ``"l2"``.

    Raises:
        ValueError: if there is no layer or the loss is unknown; when called, if the shapes differ.

    Source: Lucid, ``optvis/objectives.py`` (``activation_difference``).

    >>> activation_difference({"a": torch.zeros(2, 2, 2)})({"a": torch.ones(2, 2, 2)}, torch.tensor(0))
    tensor(1.)
    """
    power = _exponent(loss)
    return _sum_over_layers(
        call("activation_difference", dict(reference), loss=None if loss == "l1" else loss),
        reference,
        lambda x, r: features_last((x - r).abs() ** power).mean(-1),
    )


def inversion(reference: Mapping[str, Tensor]) -> Objective:
    """Match the activations of a reference image: ``-|x - r|^2 / |r|^2``, at most 0.

    Args: as for :func:`activation_difference`.

    Source: Mahendran and Vedaldi (2015), eq. 2, without its image prior.

    >>> inversion({"a": torch.ones(2, 2, 2)})({"a": torch.zeros(2, 2, 2)}, torch.tensor(0))
    tensor(-1.)
    """

    def position_scores(x: Tensor, r: Tensor) -> Tensor:
        return -features_last((x - r).square()).mean(-1) / r.square().mean().clamp_min(torch.finfo(r.dtype).tiny)

    return _sum_over_layers(call("inversion", dict(reference)), reference, position_scores)


def caricature(reference: Mapping[str, Tensor], *, power: float = 1.0) -> Objective:
    """Exaggerate what a layer detects in a reference image: ``mean_p x_p . r_p max(0.1, cos(x_p, r_p))^power``.

    The mean is over the positions ``p``.

    Args:
        reference: as for :func:`activation_difference`.
        power: exponent of the cosine, at least 0: 0 rewards only the length of ``x_p`` along ``r_p``, a larger exponent
            also the agreement of the directions.

    Raises:
        ValueError: if ``power`` is below 0; and as for :func:`activation_difference`.

    Source: Olah et al., "Activation Atlas" (2019) and Lucid's caricature notebook.

    >>> caricature({"a": torch.ones(2, 1, 1)})({"a": torch.ones(2, 1, 1)}, torch.tensor(0)).round()
    tensor(2.)
    """
    check_float("caricature: power", power, 0)

    def position_scores(x: Tensor, r: Tensor) -> Tensor:
        return dot_cosine(features_last(x), features_last(r), power)

    expression = call("caricature", dict(reference), power=None if power == 1.0 else power)
    return _sum_over_layers(expression, reference, position_scores)


def departure(layer: str, picture: Tensor) -> Objective:
    """Maximise the relative distance to a picture's activations under the same random transform: ``|x - r| / |r|``.

    The norms are over all channels and positions. The value is positive: subtract it to keep the image near the
    picture in the features of the layer. Unlike in :func:`activation_difference`, image and picture are transformed
    alike, so that shifts and rotations do not contribute.

    Args:
        layer: the layer's name.
        picture: float ``(c, h, w)``, ``(c, t, h, w)`` or ``(c, t)`` in ``[0, 1]``, of the images' size.

    Raises:
        ValueError: if the picture does not have 2 to 4 axes, or is not floating point.

    Gradient: finite also where both activations are equal.

    Source: Hamblin et al., "Feature Accentuation" (2024), and faccent's ``l2_compare``; relative, so that a weight
    means the same in every layer.

    >>> objective = departure("a", torch.rand(3, 8, 8))
    >>> objective({"a": torch.ones(2), "<picture>a": torch.ones(2) / 2}, torch.tensor(0))
    tensor(1.)
    """
    if not 2 <= picture.ndim <= 4 or not picture.is_floating_point():
        raise ValueError(
            f"departure: picture must be (c, h, w), (c, t, h, w) or (c, t) of floats in [0, 1], got"
            f" {tuple(picture.shape)} {picture.dtype}"
        )

    def activation_map(activations: Activations, target: Target) -> Tensor:
        difference = activations[layer] - activations[PICTURE + layer]
        return features_last(difference).square().mean(-1).clamp_min(_EPS).sqrt()

    def score(activations: Activations, target: Target) -> Tensor:
        x, r = activations[layer], activations[PICTURE + layer]
        return ((x - r).square().mean() + _EPS).sqrt() / (r.square().mean() + _EPS).sqrt()

    expression = call("departure", layer, picture.detach())
    return Objective(
        score, activation_map, (layer,), (), str(expression), picture=picture.detach(), expression=expression
    )


def style(reference: Mapping[str, Tensor], *, loss: Loss = "l1") -> Objective:
    """Match the style of a reference image: ``-mean |G(x) - G(r)|``, or squared for ``"l2"``; at most 0.

    ``G(x)_ij = mean_p x_ip x_jp`` is the Gram matrix of the channels, which does not depend on their positions.

    Args: as for :func:`activation_difference`, except that the reference may have another number of positions.

    Raises:
        ValueError: as for :func:`activation_difference`; when called, if the number of channels differs.

    Source: Gatys et al. (2015), eq. 3; the mean over positions as in Lucid.

    >>> style({"a": torch.ones(2, 3, 3)})({"a": torch.zeros(2, 2, 2)}, torch.tensor(0))
    tensor(-1.)
    """
    power = _exponent(loss)

    def of_layer(layer: str, r: Tensor) -> Objective:
        reference_gram = gram(r)
        on_device = device_constant(reference_gram)

        def score(activations: Activations, target: Target) -> Tensor:
            x = activations[layer]
            own_gram = gram(x)
            if own_gram.shape != reference_gram.shape:
                raise ValueError(
                    f"style: the reference has {len(reference_gram)} channels in layer {layer!r}, the image has"
                    f" {len(own_gram)}"
                )
            return -((own_gram - on_device(x)).abs() ** power).mean()

        def activation_map(activations: Activations, target: Target) -> Tensor:
            return features_last(activations[layer]).square().mean(-1)

        return Objective(score, activation_map, (layer,), (), "")

    terms = [of_layer(layer, r.detach().clone()) for layer, r in _check_reference(reference).items()]
    expression = call("style", dict(reference), loss=None if loss == "l1" else loss)
    return replace(reduce(add, terms), name=str(expression), expression=expression)


def _sum_over_layers(
    expression: Call, reference: Mapping[str, Tensor], position_scores: Callable[[Tensor, Tensor], Tensor]
) -> Objective:
    """Make an objective that adds, over the layers, the mean of a map of positions.

    Args:
        expression: the call that makes the objective.
        reference: layer name -> activations of the reference image.
        position_scores: (activations of the image, of the reference) -> the map, without the axis of the channels.
    """

    def of_layer(layer: str, r: Tensor) -> Objective:
        on_device = device_constant(r)

        def activation_map(activations: Activations, target: Target) -> Tensor:
            x = activations[layer]
            if x.shape != r.shape:
                raise ValueError(
                    f"{expression.function}: the reference is {tuple(r.shape)} in layer {layer!r}, the image is"
                    f" {tuple(x.shape)}"
                )
            return position_scores(x, on_device(x))

        return Objective(lambda a, t: activation_map(a, t).mean(), activation_map, (layer,), (), "")

    total = reduce(add, [of_layer(layer, r.detach().clone()) for layer, r in _check_reference(reference).items()])
    return replace(total, name=str(expression), expression=expression)


def _check_reference(reference: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not reference:
        raise ValueError("the reference must have at least 1 layer, got none")
    return reference


def _exponent(loss: str) -> int:
    check_name("loss", loss, ("l1", "l2"))
    return 1 if loss == "l1" else 2
