"""The activations of a model for an image, in the form that objectives compare with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from featvis_func.backbone.features import Features, device_of, make_features
from featvis_func.models import Model
from featvis_func.random import key
from featvis_func.rendering.input_size import KINDS, with_input_size
from featvis_func.rendering.presets import named_transform
from featvis_func.transform import chain, normalize


def activations_of(
    model: Model,
    layers: Sequence[str],
    image: Tensor,
    *,
    device: torch.device | str | None = None,
    features: Features | None = None,
) -> dict[str, Tensor]:
    """Compute a model's activations for an image, as :func:`~featvis_func.objective.inversion` takes them.

    Args:
        model: from :func:`~featvis_func.load_model`.
        layers: names of layers, or unique ends of names.
        image: float ``(c, h, w)`` in ``[0, 1]``, for a model of videos ``(c, t, h, w)``, of signals ``(c, t)``; resized
            to the model's input size, or to that for which the features were made.
        device: device to compute on. Default: where the model is.
        features: those of the model, from :func:`featvis_func.make_features`, whose layers include these. Default: made
            by this function, in float32.

    Returns:
        Requested layer name -> its activations ``(c, h, w)``, ``(c, t, h, w)``, ``(t, d)`` or ``(d,)``, float32,
        without a gradient.

    Raises:
        ValueError: an unknown layer, or an image of another shape or dtype.

    >>> from featvis_func.models import load_model
    >>> activations_of(load_model("texturenet"), ["head"], torch.rand(3, 50, 70))["head"].shape
    torch.Size([32])
    """
    model = with_input_size(model, None, features, stacklevel=3)
    sides = len(model.size)
    if image.ndim != 1 + sides or image.shape[0] != model.channels or not image.is_floating_point():
        raise ValueError(
            f"expected an image ({model.channels}, {KINDS[sides].axes}) of floats in [0, 1], got {tuple(image.shape)}"
            f" {image.dtype}"
        )
    if features is None:
        features = make_features(model, layers, device=device, precision="float32")
    device = device_of(features, image.device)
    resize = named_transform("none", image=tuple(image.shape[1:]), size=model.size)
    transform = chain(resize, normalize(model.mean, model.std, sides=sides, device=device))
    image = image.detach().to(device, torch.float32)
    with torch.no_grad():
        prepared = transform.apply(image, transform.draw(key(0, device=device)))
        outputs = features.apply(features.weights, prepared[None])
        return {name: outputs[name][0].float() for name in layers}
