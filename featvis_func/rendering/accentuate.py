"""Feature accentuation: what a filter sees in a photograph, made more of, with the photograph still there."""

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
from featvis_func.rendering.presets import IMAGES
from featvis_func.rendering.renderer import parse_objective
from featvis_func.rendering.result import Result
from featvis_func.types import Image
from featvis_func.validation import check_size

# The learning rate's numerator, over the number of steps: an eighth of what a rendering from noise takes, since the
# photograph's own spectrum is to be changed, not to be replaced.
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
    """Overdraws in a photograph what excites a filter, while a chosen layer still sees the photograph.

    Raises ``objective / s - strength |x - r| / |r|``: ``x`` are the activations of the layer ``near`` for the image and
    ``r`` those for the photograph under the same view; ``s``, the root mean square of the objective's layer for the
    photograph, makes both comparable. The image starts as the photograph.

    Args:
        model, objective, filters: as for :func:`~featvis_func.render`.
        picture: a file, or float ``(c, h, w)`` in ``[0, 1]``; brought to the images' size.
        near: the layer at which the image stays near the photograph. An early one keeps its outlines and textures, a
            late one its contents alone.
        strength: of that, at least 0; 0 lets it go.
        steps: of ascent; fewer stay nearer.
        size: pixels of the images. Default: the model's input size.
        lr: learning rate. Default: an eighth of what a rendering from noise takes, ``1 / steps``.
        image: a parameterisation that can start from a picture, by name or as an :class:`Image`.
        device, precision: as for :func:`~featvis_func.render`.
        **options: further ones of :func:`~featvis_func.render`.

    Returns:
        A :class:`Result` with :attr:`Result.saliency`: where the gradient was, the filter found something.

    Raises:
        ValueError: bad input, with what was given, what was expected and what exists.

    Source: Hamblin et al., "Feature Accentuation: Revealing 'What' Features Respond to in Natural Images" (2024).
    Deviations: the two parts are balanced by the activations' scale instead of by gradients at the start, where the
    distance has none; magnitudes change, too, unless ``image`` is a :func:`~featvis_func.phase`.

    >>> photograph = torch.rand(3, 40, 40)
    >>> accentuate("texturenet", "head:3", photograph, near="block1.conv", steps=2, size=32).images.shape
    torch.Size([1, 3, 32, 32])
    """
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength must be finite and at least 0, got {strength}")
    found = load_model(model)
    goal, chosen = parse_objective(objective, filters)
    h, w = check_size(found.size if size is None else size)
    start = read_image(picture, (h, w), channels=found.channels) if isinstance(picture, str | Path) else picture
    if start.ndim != 3 or start.shape[0] != found.channels or not start.is_floating_point():
        raise ValueError(
            f"expected a picture ({found.channels}, h, w) of floats in [0, 1], got {tuple(start.shape)} {start.dtype}"
        )
    start = F.interpolate(start[None].float(), size=(h, w), mode="bilinear", antialias=True)[0].clamp(0, 1)
    features = make_features(found, (*goal.layers, near), device=device, precision=precision)
    where = device_of(features, device)
    parameterisation = IMAGES[image]((h, w), channels=found.channels, device=where) if isinstance(image, str) else image
    seen = activations_of(found, goal.layers[:1], start, features=features)[goal.layers[0]]
    balance = 1.0 / float(seen.square().mean().sqrt().clamp_min(1e-6))
    return render(
        found,
        balance * goal - strength * departure(near, start.to(where)),
        chosen,
        steps=steps,
        size=(h, w),
        lr=_RATE / steps if lr is None and isinstance(options.get("optimizer", "default"), str) else lr,
        image=from_image(parameterisation, start),
        device=device,
        precision=precision,
        features=features,
        saliency=True,
        **options,
    )
