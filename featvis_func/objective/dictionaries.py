"""Families of directions in the space of channels: the rows of a matrix, and the features of a sparse autoencoder.

>>> directions("layer3", torch.eye(4)) - 0.5 * directions("layer2", torch.ones(4, 8))
directions('layer3', <matrix>) - 0.5 * directions('layer2', <matrix>)
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from featvis_func.constants import device_constant
from featvis_func.objective.base import Objective, features_last, resolve_position
from featvis_func.objective.directions import SIMILARITIES, Similarity, check_width, from_dots, similarity_to
from featvis_func.objective.expression import call
from featvis_func.objective.families import Rows, family
from featvis_func.objective.units import Position
from featvis_func.types import Activations
from featvis_func.validation import check_float, check_int, check_name

ACTIVATIONS = ("none", "relu", "jumprelu", "topk")
"""What :func:`sae` applies to a feature's pre-activation."""
NORMALIZE = ("none", "layer_norm", "constant_norm_rescale")
"""What :func:`sae` does to activations first."""


def directions(
    layer: str,
    matrix: Tensor | Sequence[Sequence[float]],
    *,
    similarity: Similarity = "dot",
    power: float = 2.0,
    position: Position | None = None,
    names: Sequence[str] | None = None,
) -> Objective:
    """Maximise the similarity to each row of a matrix, such as a dictionary, probes, or principal components.

    Args:
        layer: the layer's name.
        matrix: ``(n, d)``: a direction in each row, with one number per channel of the layer.
        similarity, power: as for :func:`direction`.
        position: ``None``: the mean over all positions; or one of them, as for :func:`neuron`, such as the number of a
            token (0 is the class token of most vision transformers).
        names: of the directions.

    Raises:
        ValueError: a matrix that is empty, not finite or zero, an unknown similarity, ``power`` below 0, or another
            number of names; when called, if the rows are not as long as the layer has channels.

    >>> objective = directions("a", [[1.0, 0.0], [0.0, 2.0]])
    >>> objective({"a": torch.arange(8.0).reshape(2, 2, 2)}, torch.tensor(1))
    tensor(11.)
    """
    rows = _check_rows("directions", matrix)
    check_name("similarity", similarity, SIMILARITIES)
    check_float("directions: power", power, 0)
    on_device = device_constant(rows)

    def activation_map(activations: Activations, row: Rows) -> Tensor:
        return similarity_to(layer, features_last(activations[layer]), row["matrix"], similarity, power)

    def all_scores(activations: Activations) -> Tensor:
        values = features_last(activations[layer])
        check_width(layer, values.shape[-1], rows.shape[1])
        matrix = on_device(values)
        shown = _shown(layer, values, position)
        if similarity == "dot":
            return matrix @ shown.mean(0)
        return from_dots(shown @ matrix.T, shown[:, None], matrix, similarity, power).mean(0)

    expression = call(
        "directions",
        layer,
        rows,
        similarity=None if similarity == "dot" else similarity,
        power=power if similarity == "dot_cosine" else None,
        position=position,
    )
    return family(
        f"directions:{layer}",
        layer,
        {"matrix": rows},
        lambda a, row: _mean_or_at(layer, activation_map(a, row), position),
        activation_map,
        names=names,
        vectors="matrix",
        all_scores=all_scores,
        expression=expression,
    )


def sae(
    layer: str,
    encoder: Tensor | Sequence[Sequence[float]],
    bias: Tensor | None = None,
    *,
    center: Tensor | None = None,
    normalize: Literal["none", "layer_norm", "constant_norm_rescale"] = "none",
    activation: Literal["none", "relu", "jumprelu", "topk"] = "none",
    threshold: Tensor | float | None = None,
    k: int | None = None,
    position: Position | None = None,
    names: Sequence[str] | None = None,
) -> Objective:
    """Maximise each feature of a sparse autoencoder, by its encoder: ``f(w_i . (x - c) + b_i)``.

    Args:
        layer: the layer's name; ``x`` are its activations at a position.
        encoder: ``(n, d)``: the encoder's weight ``w``, a feature in each row.
        bias: ``(n,)``: the encoder's bias ``b``.
        center: ``(d,)``: what is subtracted from the activations first, such as the decoder's bias.
        normalize: what is done to the activations ``x`` of a position before that: ``"layer_norm"``:
            ``(x - mean(x)) / (std(x) + 1e-5)``, with the unbiased standard deviation over the channels;
            ``"constant_norm_rescale"``: ``x sqrt(d) / |x|``; as SAELens and ViT-Prisma define them.
        activation: ``f``. ``"none"``: the pre-activation itself, which has a gradient also where the feature is not
            active. ``"relu"``: its positive part. ``"jumprelu"``: its positive part where it is above the feature's
            threshold, else 0. ``"topk"``: its positive part where it is among the ``k`` largest of all features at the
            position, else 0.
        threshold: ``(n,)`` or a number, for ``"jumprelu"``.
        k: number of features that are active at a position, for ``"topk"``.
        position, names: as for :func:`directions`.

    Raises:
        ValueError: as for :func:`directions`; tensors that do not fit the encoder; a ``threshold`` or ``k`` that is
            missing, or given for another activation.

    >>> objective = sae("a", torch.eye(2), torch.tensor([0.0, 1.0]), activation="topk", k=1)
    >>> [float(objective({"a": torch.tensor([3.0, 1.0])}, torch.tensor(i))) for i in (0, 1)]
    [3.0, 0.0]
    """
    weight = _check_rows("sae", encoder)
    count, width = weight.shape
    check_name("activation", activation, ACTIVATIONS)
    check_name("normalize", normalize, NORMALIZE)
    for name, value, owner in (("threshold", threshold, "jumprelu"), ("k", k, "topk")):
        if (value is None) == (activation == owner):
            raise ValueError(f"sae: activation {activation!r} {'needs' if value is None else 'takes no'} {name}")
    if k is not None and check_int("sae: k", k, 1) > count:
        raise ValueError(f"sae: k must be at most the number of features, {count}, got {k}")
    offsets = _vector("bias", torch.zeros(count) if bias is None else bias, count, weight)
    middle = _vector("center", torch.zeros(width) if center is None else center, width, weight)
    rows = {"encoder": weight, "bias": offsets}
    if threshold is not None:
        limits = torch.as_tensor(threshold)
        rows["threshold"] = _vector("threshold", limits.expand(count) if limits.ndim == 0 else limits, count, weight)
    if k is not None:
        rows["feature"] = torch.arange(count)
    center_on, weight_on, bias_on = device_constant(middle), device_constant(weight), device_constant(offsets)

    def centered(activations: Activations) -> Tensor:
        values = features_last(activations[layer])
        check_width(layer, values.shape[-1], width)
        if normalize == "layer_norm":
            values = values - values.mean(-1, keepdim=True)
            values = values / (values.std(-1, keepdim=True) + 1e-5)
        elif normalize == "constant_norm_rescale":
            values = values * (width**0.5 / values.norm(dim=-1, keepdim=True))
        return values if center is None else values - center_on(values)

    def all_features(values: Tensor) -> Tensor:
        return values @ weight_on(values).T + bias_on(values)

    def only_largest(features: Tensor) -> Tensor:
        least = features.topk(k or 1, -1).values[..., -1:]
        return torch.where(features >= least, features.relu(), 0.0)

    def activate(features: Tensor, thresholds: Tensor | None) -> Tensor:
        """Apply any activation but TopK, which depends on all features."""
        if thresholds is not None:
            return torch.where(features > thresholds, features.relu(), 0.0)
        return features.relu() if activation == "relu" else features

    def activation_map(activations: Activations, row: Rows) -> Tensor:
        values = centered(activations)
        if activation == "topk":
            return only_largest(all_features(values)).index_select(-1, row["feature"].reshape(1)).squeeze(-1)
        return activate((values * row["encoder"]).sum(-1) + row["bias"], row.get("threshold"))

    def all_scores(activations: Activations) -> Tensor:
        features = all_features(_shown(layer, centered(activations), position))
        if activation == "topk":
            return only_largest(features).mean(0)
        return activate(features, rows["threshold"].to(features) if "threshold" in rows else None).mean(0)

    expression = call(
        "sae",
        layer,
        weight,
        None if bias is None else offsets,
        center=None if center is None else middle,
        normalize=None if normalize == "none" else normalize,
        activation=None if activation == "none" else activation,
        threshold=rows.get("threshold"),
        k=k,
        position=position,
    )
    return family(
        f"sae:{layer}",
        layer,
        rows,
        lambda a, row: _mean_or_at(layer, activation_map(a, row), position),
        activation_map,
        names=names,
        vectors="encoder",
        all_scores=all_scores,
        expression=expression,
    )


def _check_rows(function: str, matrix: Tensor | Sequence[Sequence[float]]) -> Tensor:
    """A copy of a matrix whose rows are directions, checked."""
    rows = torch.as_tensor(matrix).detach().clone()
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    if rows.ndim != 2 or not rows.numel():
        raise ValueError(f"{function}: expected a matrix (n, d) with a direction in each row, got {tuple(rows.shape)}")
    broken = (~rows.isfinite()).any(1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"{function}: {len(broken)} of {len(rows)} directions have numbers that are not finite, the first is"
            f" {broken[0]}"
        )
    zero = (~rows.any(1)).nonzero().flatten().tolist()
    if len(zero) == len(rows):
        raise ValueError(f"{function}: all {len(rows)} directions are zero")
    if zero:
        warnings.warn(
            f"{function}: {len(zero)} of {len(rows)} directions are zero and have no image, the first is {zero[0]}",
            stacklevel=3,
        )
    return rows


def _vector(name: str, value: Tensor, length: int, like: Tensor) -> Tensor:
    """A copy of a vector of the encoder, checked."""
    values = torch.as_tensor(value).detach().to(like, copy=True)
    if values.shape != (length,) or not bool(values.isfinite().all()):
        raise ValueError(
            f"sae: {name} must be {length} finite numbers, for an encoder of {tuple(like.shape)}, got"
            f" {tuple(values.shape)}"
        )
    return values


def _shown(layer: str, values: Tensor, position: Position | None) -> Tensor:
    """The activations that count, ``(positions, d)``: of all positions, or of one."""
    if position is not None:
        values = values[resolve_position(layer, values.shape[:-1], position)]
    return values.reshape(-1, values.shape[-1])


def _mean_or_at(layer: str, values: Tensor, position: Position | None) -> Tensor:
    """The mean of a map, or its value at a position."""
    return values.mean() if position is None else values[resolve_position(layer, values.shape, position)]
