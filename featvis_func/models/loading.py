"""The door: whatever stands for a model, as a :class:`Model`."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from featvis_func.models.base import Model, Request, digest, needed, normalised
from featvis_func.models.huggingface import from_transformers
from featvis_func.models.own import bare, check_differentiable, unwrapped
from featvis_func.models.state_dict import load_weights
from featvis_func.models.timm import from_hub, from_timm
from featvis_func.models.torchvision import from_torchvision, torchvision_names
from featvis_func.validation import suggest

_ROADS: dict[str, Callable[[Request], Model]] = {
    "torchvision": from_torchvision,
    "timm": from_timm,
    "hf-hub": from_hub,
    "transformers": from_transformers,
}
_EXPECTED = (
    "'texturenet', 'torchvision:NAME[@WEIGHTS]', 'timm:NAME[@none]', 'hf-hub:ORG/NAME[@REVISION]'"
    " or 'transformers:ORG/NAME[@REVISION]'"
)


def load_model(
    model: "str | nn.Module | Model",
    *,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | tuple[int, int] | None = None,
) -> Model:
    """Finds a model and the input that it expects.

    Args:
        model: one of

            * ``"texturenet"``: the small network that this package ships;
            * ``"torchvision:NAME"``: with torchvision's default weights; ``"torchvision:NAME@WEIGHTS"`` with the named
              ones, such as ``IMAGENET1K_V2``; ``"torchvision:NAME@none"`` with random ones, the same each time;
            * ``"timm:NAME"``, also with a tag as in ``"timm:resnet50.a1_in1k"``; ``"timm:NAME@none"`` with random
              weights; ``"timm:./folder"``: what ``timm.models.save_for_hf`` wrote;
            * ``"hf-hub:ORG/NAME[@REVISION]"``: a timm model on the Hugging Face hub;
            * ``"transformers:ORG/NAME[@REVISION]"``: the ``AutoModel`` of a vision model of the hub, or of a vision and
              text model its vision tower; ``"transformers:./folder"``: what ``save_pretrained`` wrote; with ``@none``
              the same architecture with random weights. Code that a repository brings along is never run;
            * an ``nn.Module``;
            * a :class:`Model`.
        weights: a state dict to load instead, ``.safetensors`` or ``.pth``/``.pt`` (tensors only: no code is run).
        mean, std: the input's normalisation, one number per channel. Default: what the weights' own preset or image
            processor says; for a bare module what timm attached to it, or ImageNet's where it takes 3 channels, none
            (0 and 1) otherwise.
        size: ``h = w`` or ``(h, w)`` of the input. Default: the preset's; for a bare module its ``image_size``, or 224.
            Of timm, models of a fixed input size are built for this one, their position embeddings resampled.

    Returns:
        A :class:`Model`. A module of the user's is kept as it is, also in training mode.

    Raises:
        ValueError: an unknown model or weights, weights that cannot be fetched, a file that is missing, damaged or of
            another architecture, a package that is not installed, a normalisation of another length, or a module that
            is quantised, scripted or traced.

    >>> load_model("texturenet").name
    'texturenet'
    """
    pair = (size, size) if isinstance(size, int) else None if size is None else (size[0], size[1])
    if pair is not None and min(pair) < 1:
        raise ValueError(f"the model's input size must be at least 1 x 1 pixels, got {pair}")
    if isinstance(model, Model):
        found = model
    elif isinstance(model, nn.Module):
        found = bare(unwrapped(model))
    elif not isinstance(model, str):
        raise ValueError(f"expected a model's name, an nn.Module or a Model, got {model!r}")
    else:
        found = by_name(model, own_weights=weights is not None, size=pair)
    check_differentiable(found)
    if weights is not None:
        if not isinstance(model, str):
            raise ValueError("weights= goes with a model's name; load them into your own module yourself")
        load_weights(found.module, weights)
        found = found._replace(weights=digest([Path(weights)]))
    return normalised(found if pair is None else found._replace(size=pair), mean, std)


def by_name(name: str, *, own_weights: bool = False, size: tuple[int, int] | None = None) -> Model:
    """The model that a name means; see :func:`load_model`.

    Raises:
        ValueError: nothing is called so.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind in _ROADS:
        return _ROADS[kind](Request(name, rest, own_weights, size))
    if name == "texturenet":
        from featvis_func import zoo

        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
            module = zoo.texturenet(pretrained=not own_weights)
        return Model(module, name, zoo.MEAN, zoo.STD, (zoo.SIZE, zoo.SIZE), tuple(zoo.CLASSES))
    known = torchvision_names()
    if name in known:
        raise ValueError(f"unknown model {name!r}; did you mean 'torchvision:{name}'?")
    if not colon and name and find_spec("timm") is not None and needed("timm", "timm", name).is_model(name):
        raise ValueError(f"unknown model {name!r}; did you mean 'timm:{name}'?")
    raise ValueError(f"unknown model {name!r}; expected {_EXPECTED}" + suggest(name, ["texturenet", *known]))
