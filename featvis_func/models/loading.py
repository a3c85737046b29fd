"""Load a model by name, from a folder, or from a user's module."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from featvis_func.models.base import LoadRequest, Model, file_digest, import_optional, with_normalisation
from featvis_func.models.huggingface import from_transformers
from featvis_func.models.own import check_differentiable, from_module, unwrap
from featvis_func.models.state_dict import load_weights
from featvis_func.models.timm import from_hub, from_timm
from featvis_func.models.torchvision import from_torchvision, torchvision_names
from featvis_func.validation import check_size, suggest

# The loader for each prefix of a model name.
_LOADERS: dict[str, Callable[[LoadRequest], Model]] = {
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
    """Load a model together with the input it expects.

    Args:
        model: one of

            * ``"texturenet"``: the small network shipped with this package;
            * ``"torchvision:NAME"``: a torchvision model with its default weights; ``"torchvision:NAME@WEIGHTS"`` with
              the named weights, such as ``IMAGENET1K_V2``; ``"torchvision:NAME@none"`` with random weights, which are
              the same on every call;
            * ``"timm:NAME"``: a timm model, optionally with a tag as in ``"timm:resnet50.a1_in1k"``;
              ``"timm:NAME@none"`` with random weights; ``"timm:./folder"``: a folder written by
              ``timm.models.save_for_hf``;
            * ``"hf-hub:ORG/NAME[@REVISION]"``: a timm model on the Hugging Face hub;
            * ``"transformers:ORG/NAME[@REVISION]"``: the ``AutoModel`` of a vision model on the hub, or the vision
              tower of a vision-language model; ``"transformers:./folder"``: a folder written by ``save_pretrained``;
              with ``@none`` the same architecture with random weights. Code from a repository is never run;
            * an ``nn.Module``;
            * a :class:`Model`.
        weights: path of a state dict to load instead of the pretrained weights, ``.safetensors`` or ``.pth``/``.pt``
            (with ``weights_only=True``). Only with a model name.
        mean, std: input normalisation, one number per channel. Default: from the preset of the weights or from the
            image processor; for an ``nn.Module`` from the preset attached by timm, otherwise ImageNet's for 3 channels
            and no normalisation (0 and 1) for other numbers of channels.
        size: input size in pixels, an integer for a square or ``(h, w)``. Default: from the preset; for an
            ``nn.Module`` its ``image_size`` attribute, or 224. timm models with a fixed input size are built for this
            size, with their position embeddings resampled.

    Returns:
        A :class:`Model`. An ``nn.Module`` is kept as it is, including its training mode.

    Raises:
        ValueError: If the model or the weights are unknown, a download fails, a file is missing, damaged or of another
            architecture, an optional package is not installed, the lengths of ``mean`` and ``std`` differ, ``size`` is
            below 1, or the module is quantised, scripted or traced.

    >>> load_model("texturenet").name
    'texturenet'
    """
    input_size = None if size is None else check_size(size)
    if isinstance(model, Model):
        loaded = model
    elif isinstance(model, nn.Module):
        loaded = from_module(unwrap(model))
    elif not isinstance(model, str):
        raise ValueError(f"expected a model name, an nn.Module or a Model, got {model!r}")
    else:
        loaded = by_name(model, skip_pretrained=weights is not None, size=input_size)
    check_differentiable(loaded)
    if weights is not None:
        if not isinstance(model, str):
            raise ValueError(
                f"weights= requires a model name, got a {type(model).__name__};"
                f" load the weights into your module before the call"
            )
        load_weights(loaded.module, weights)
        loaded = loaded._replace(weights=file_digest([Path(weights)]))
    return with_normalisation(loaded if input_size is None else loaded._replace(size=input_size), mean, std)


def by_name(name: str, *, skip_pretrained: bool = False, size: tuple[int, int] | None = None) -> Model:
    """Load a model by name.

    Args:
        name: a model name as for :func:`load_model`.
        skip_pretrained: whether to leave the weights random, because others are loaded afterwards.
        size: input size ``(h, w)``; used only by architectures built for a fixed size.

    Raises:
        ValueError: If the model is unknown or cannot be loaded.
    """
    prefix, colon, source = name.partition(":")
    if colon and prefix in _LOADERS:
        return _LOADERS[prefix](LoadRequest(name, source, skip_pretrained, size))
    if name == "texturenet":
        from featvis_func import zoo

        with torch.random.fork_rng(devices=[]):  # The initial values are random, though they are overwritten.
            module = zoo.texturenet(pretrained=not skip_pretrained)
        return Model(module, name, zoo.MEAN, zoo.STD, (zoo.SIZE, zoo.SIZE), tuple(zoo.CLASSES))
    known = torchvision_names()
    if name in known:
        raise ValueError(f"unknown model {name!r}; did you mean 'torchvision:{name}'?")
    if not colon and name and find_spec("timm") is not None and import_optional("timm", "timm", name).is_model(name):
        raise ValueError(f"unknown model {name!r}; did you mean 'timm:{name}'?")
    raise ValueError(f"unknown model {name!r}; expected {_EXPECTED}" + suggest(name, ["texturenet", *known]))
