"""Feature accentuation: amplify in a photograph what excites a filter, and keep the photograph recognisable."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featvis_func.backbone.features import device_of, make_features
from featvis_func.image import from_image
from featvis_func.io.image_files import read_image
from featvis_func.models import Model, load_model
from featvis_func.objective import Objective, departure
from featvis_func.rendering.activations import activations_of
from featvis_func.rendering.api import render
from featvis_func.rendering.input_size import KINDS, image_size, with_input_size
from featvis_func.rendering.presets import IMAGES
from featvis_func.rendering.resolve import parse_objective
from featvis_func.rendering.result import Result
from featvis_func.types import Image
from featvis_func.validation import check_float, check_name, check_sides

# The learning rate is this over the number of steps: an eighth of that of a rendering from noise, because the spectrum
# of the photograph is changed and not replaced.
_RATE = 1.0


def accentuate(
    model: str | nn.Module | Model,
    objective: str | Objective,
    picture: str | Path | Tensor,
    filters: Iterable[int] | int | None = None,
    *,
    near: str,
    strength: float = 1.0,
    steps: int = 64,
    size: int | tuple[int, int] | None = None,
    lr: float | None = None,
    image: str | Image = "fourier",
    device: torch.device | str | None = None,
    precision: str = "auto",
    **options: Any,
) -> Result:
    """Amplify in a photograph what excites a filter, and keep a chosen layer's activations near the photograph's.

    Maximises ``objective / s - strength |x - r| / |r|``, where ``x`` are the activations of the layer ``near`` for the
    image, ``r`` those for the photograph under the same random transform, and ``s`` is the root mean square of the
    activations of the objective's layer for the photograph, which makes both terms comparable. The image starts as the
    photograph.

    Args:
        model, objective, filters: as for :func:`~featvis_func.render`; the model takes images ``(c, h, w)``.
        picture: a file, or a float tensor ``(c, h, w)`` in ``[0, 1]``; it is resized to the size of the images, a file
            after it has been cropped to their aspect ratio.
        near: the layer whose activations stay near those for the photograph. An early layer keeps outlines and
            textures, a late one only the content.
        strength: weight of the distance, at least 0; 0 leaves the image free.
        steps: number of gradient ascent steps; with fewer, the image stays nearer to the photograph.
        size: image size in pixels, one number for a square or ``(h, w)``; as for :func:`~featvis_func.render` also the
            input size, where it is not known. Default: the model's input size.
        lr: learning rate. Default: ``1 / steps``, an eighth of that of a rendering from noise; an optimizer of your own
            has a learning rate of its own.
        image: a parameterisation that can start from a picture, by name or as an :class:`Image`.
        device, precision: as for :func:`~featvis_func.render`.
        **options: further options of :func:`~featvis_func.render`; here ``transforms`` is ``"small"`` by default, and
            ``optimizer`` ``"activation"``.

    Returns:
        A :class:`Result` with :attr:`Result.saliency`, which shows where in the photograph the objective depended on
        the pixels.

    Raises:
        ValueError: bad input, with what was given, what was expected and what exists.
        TypeError: an unknown option.

    Source: Hamblin et al., "Feature Accentuation: Revealing 'What' Features Respond to in Natural Images" (2024).
    Deviations: the two terms are balanced by the scale of the activations instead of by their gradients at the start,
    where the gradient of the distance is zero; magnitudes of the spectrum change, too, unless ``image`` is a
    :func:`~featvis_func.phase`.

    >>> photograph = torch.rand(3, 40, 40)
    >>> accentuate("texturenet", "head:3", photograph, near="block1.conv", steps=2, size=32).images.shape
    torch.Size([1, 3, 32, 32])
    """
    check_float("strength", strength, 0)
    size = None if size is None else check_sides(size)
    model = load_model(model)
    if len(model.size) != 2:
        kind = KINDS[len(model.size)]
        raise ValueError(
            f"accentuate is for photographs and models of images (c, h, w); {model.name} takes {kind.plural} (c,"
            f" {kind.axes})"
        )
    model = with_input_size(model, size, stacklevel=3)
    objective, filters = parse_objective(objective, filters, model)
    h, w = image_size(size, model)
    start = read_image(picture, (h, w), channels=model.channels) if isinstance(picture, str | Path) else picture
    if start.ndim != 3 or start.shape[0] != model.channels or not start.is_floating_point():
        raise ValueError(
            f"expected a picture ({model.channels}, h, w) of floats in [0, 1], got {tuple(start.shape)} {start.dtype}"
        )
    start = F.interpolate(start[None].float(), size=(h, w), mode="bilinear", antialias=True)[0].clamp(0, 1)
    features = make_features(model, (*objective.layers, near), device=device, precision=precision)
    compute_device = device_of(features, device)
    if isinstance(image, str):
        check_name("image", image, IMAGES)
        image = IMAGES[image]((h, w), channels=model.channels, device=compute_device)
    # Wide transforms and a pull back to the start serve an image that begins grey: here they would hide what changes.
    if "transforms" not in options and options.get("views") is None:
        options["transforms"] = "small"
    options.setdefault("optimizer", "activation")
    activations = activations_of(model, objective.layers[:1], start, features=features)[objective.layers[0]]
    balance = 1.0 / float(activations.square().mean().sqrt().clamp_min(1e-6))
    return render(
        model,
        balance * objective - strength * departure(near, start.to(compute_device)),
        filters,
        steps=steps,
        size=(h, w),
        lr=_RATE / steps if lr is None and isinstance(options["optimizer"], str) else lr,
        image=from_image(image, start),
        device=device,
        precision=precision,
        features=features,
        saliency=True,
        **options,
    )
