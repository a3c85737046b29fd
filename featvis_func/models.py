"""Models by name, from a file or from the user: an ``nn.Module`` with what it expects as input."""

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from featvis_func.messages import first_line, suggest
from featvis_func.weights import load_weights

# The statistics of ImageNet's training images, as all of torchvision's classification presets state them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_DEFAULT_SIZE = 224

# How torchvision's own builders construct these when given weights; a weights file was made with the same.
_PRETRAINED_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "aux_logits": True, "init_weights": False},
}


class Model(NamedTuple):
    """A module and the input that it expects. Make one with :func:`load_model`."""

    module: nn.Module
    """Never changed by this library: not its mode, hooks, flags, device, dtype or values."""
    name: str
    mean: tuple[float, ...]
    """Per channel: the module is given ``(image - mean) / std`` of an image in ``[0, 1]``."""
    std: tuple[float, ...]
    size: tuple[int, int]
    """``(h, w)`` of the input in pixels."""
    categories: tuple[str, ...] = ()
    """Names of the classes, where known."""
    weights: str = ""
    """Where the values come from, where known: torchvision's name, or a file's name and sha256."""

    @property
    def channels(self) -> int:
        """The number of image channels."""
        return len(self.mean)


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
            * an ``nn.Module``;
            * a :class:`Model`.
        weights: a state dict to load instead, ``.safetensors`` or ``.pth``/``.pt`` (tensors only: no code is run).
        mean, std: the input's normalisation, one number per channel. Default: what the weights' own preset says; for a
            bare module ImageNet's where it takes 3 channels, none (0 and 1) otherwise.
        size: ``h = w`` or ``(h, w)`` of the input. Default: the preset's; for a bare module its ``image_size``, or 224.

    Returns:
        A :class:`Model`. A module of the user's is kept as it is, also in training mode.

    Raises:
        ValueError: an unknown model or weights, weights that cannot be fetched, a file that is missing, damaged or of
            another architecture, or a normalisation of another length.

    >>> load_model("texturenet").name
    'texturenet'
    """
    if isinstance(model, Model):
        found = model
    elif isinstance(model, nn.Module):
        found = _bare(_unwrapped(model))
    elif not isinstance(model, str):
        raise ValueError(f"expected a model's name, an nn.Module or a Model, got {model!r}")
    else:
        found = _by_name(model, weights is not None)
    if weights is not None:
        if not isinstance(model, str):
            raise ValueError("weights= goes with a model's name; load them into your own module yourself")
        load_weights(found.module, weights)
        with open(weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found = found._replace(weights=f"{Path(weights).name} sha256:{digest}")
    if size is not None:
        found = found._replace(size=(size, size) if isinstance(size, int) else tuple(size))
    if min(found.size) < 1:
        raise ValueError(f"the model's input size must be at least 1 x 1 pixels, got {found.size}")
    return _normalised(found, mean, std)


def _by_name(name: str, own_weights: bool) -> Model:
    if name == "texturenet":
        from featvis_func import zoo

        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
            module = zoo.texturenet(pretrained=not own_weights)
        return Model(module, name, zoo.MEAN, zoo.STD, (zoo.SIZE, zoo.SIZE), tuple(zoo.CLASSES))
    if name.startswith("torchvision:"):
        return _torchvision(name, own_weights)
    known = _torchvision_names()
    if name in known:
        raise ValueError(f"unknown model {name!r}; did you mean 'torchvision:{name}'?")
    raise ValueError(
        f"unknown model {name!r}; expected 'texturenet' or 'torchvision:NAME[@WEIGHTS]'"
        + suggest(name, ["texturenet", *known])
    )


def _torchvision_names() -> list[str]:
    import torchvision.models

    return torchvision.models.list_models()


def _torchvision(spec: str, own_weights: bool) -> Model:
    import torchvision.models

    name, _, wanted = spec.removeprefix("torchvision:").partition("@")
    known = _torchvision_names()
    if name not in known:
        raise ValueError(f"torchvision has no model {name!r}{suggest(name, known)}")
    enum = torchvision.models.get_model_weights(name)
    if wanted == "none":
        weights = None
    elif "." in wanted:
        try:
            weights = torchvision.models.get_weight(wanted)
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"torchvision has no weights {wanted!r}; {name} has {_members(enum)}") from error
        if not isinstance(weights, enum):
            raise ValueError(f"weights {wanted!r} are not of {name}, which has {_members(enum)}")
    else:
        try:
            weights = enum[wanted or "DEFAULT"]
        except KeyError as error:
            raise ValueError(f"{name} has no weights {wanted!r}; it has {_members(enum)}") from error

    options = _PRETRAINED_OPTIONS.get(name, {})
    if own_weights or weights is None:
        if not own_weights and "init_weights" in options:
            options = {"init_weights": True}
        if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(name)).parameters:
            options = {**options, "weights_backbone": None}  # or it would be fetched
        # The same random weights at each call, with the caller's generator left alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = torchvision.models.get_model(name, weights=None, **options)
    else:
        try:
            with torch.random.fork_rng(devices=[]):
                module = torchvision.models.get_model(name, weights=weights)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"could not fetch the weights {weights} ({first_line(error)});"
                f" give a file of weights, or '@none' for random ones"
            ) from error
    module.eval()
    preset = weights or next(iter(enum), None)
    view: Any = preset.transforms() if preset is not None else None
    side = getattr(view, "crop_size", None) or [_DEFAULT_SIZE]
    return Model(
        module,
        spec,
        tuple(getattr(view, "mean", IMAGENET_MEAN)),
        tuple(getattr(view, "std", IMAGENET_STD)),
        (side[0], side[-1]),
        tuple(preset.meta.get("categories", ())) if preset is not None and weights is not None else (),
        str(weights or ""),
    )


def _members(enum: Any) -> str:
    return ", ".join(m.name for m in enum) or "none"


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, without the wrappers of torch.compile and DataParallel."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError("scripted modules have no layers to look into; give the module they were made from")
    if isinstance(module, nn.DataParallel):
        return _unwrapped(module.module)
    inner = getattr(module, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else module


def _bare(module: nn.Module) -> Model:
    convolution = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels = convolution.in_channels if convolution is not None and convolution.in_channels > 0 else 3
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.0,) * channels, (1.0,) * channels)
    side = getattr(module, "image_size", _DEFAULT_SIZE)
    pair = (side, side) if isinstance(side, int) else side
    known = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(s, int) for s in pair)
    size = (pair[0], pair[1]) if known else (_DEFAULT_SIZE, _DEFAULT_SIZE)
    return Model(module, type(module).__name__, mean, std, size)


def _normalised(model: Model, mean: Sequence[float] | None, std: Sequence[float] | None) -> Model:
    """The model with the user's own mean and std, checked."""
    count = len(next(values for values in (mean, std, model.mean) if values is not None))

    def chosen(own: Sequence[float] | None, old: tuple[float, ...], neutral: float) -> tuple[float, ...]:
        if own is not None:
            return tuple(float(value) for value in own)
        return old if len(old) == count else (neutral,) * count

    new_mean, new_std = chosen(mean, model.mean, 0.0), chosen(std, model.std, 1.0)
    if len(new_mean) != len(new_std) or not new_mean or not all(s > 0 for s in new_std):
        raise ValueError(
            f"the normalisation needs one mean and one std above 0 per channel, got mean {new_mean}, std {new_std}"
        )
    return model._replace(mean=new_mean, std=new_std)
