"""Load a model by name, from a folder, from a user's module, or from a function of the user's that makes one."""

import operator
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featvis_func.models.base import LoadRequest, Model, file_digest, import_optional
from featvis_func.models.checks import check_differentiable, check_initialised, describe_object
from featvis_func.models.copying import unwrap
from featvis_func.models.factory import NoSuchModuleError, call_factory, parse_factory
from featvis_func.models.huggingface import from_transformers
from featvis_func.models.inputs import original, with_inputs
from featvis_func.models.normalisation import check_normalisation, with_normalisation
from featvis_func.models.own import from_module
from featvis_func.models.state_dict import load_weights
from featvis_func.models.timm import from_hub, from_timm
from featvis_func.models.torchvision import from_torchvision, torchvision_names
from featvis_func.validation import suggest

# The loader for each prefix of a model name.
_LOADERS: dict[str, Callable[[LoadRequest], Model]] = {
    "torchvision": from_torchvision,
    "timm": from_timm,
    "hf-hub": from_hub,
    "transformers": from_transformers,
}
_EXPECTED = (
    "'texturenet', 'torchvision:NAME[@WEIGHTS]', 'timm:NAME[@none]', 'hf-hub:ORG/NAME[@REVISION]'"
    " or 'transformers:ORG/NAME[@REVISION]', or your own 'package.module:function' or 'file.py:function'"
)


def load_model(
    model: "str | nn.Module | Model",
    *,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    value_range: tuple[float, float] | None = None,
    size: int | tuple[int, ...] | None = None,
    inputs: Any = None,
) -> Model:
    """Load a model together with the input it expects.

    What a model takes is read from its preset, its image processor or the module itself. Whatever is not known is named
    in :attr:`Model.assumed`, and an assumed normalisation comes with a warning.

    Args:
        model: one of

            * ``"texturenet"``: the small network shipped with this package;
            * ``"torchvision:NAME"``: a torchvision model with its default weights; ``"torchvision:NAME@WEIGHTS"`` with
              the named weights, such as ``IMAGENET1K_V2``; ``"torchvision:NAME@none"`` with random weights, which are
              the same on every call. Optical flow models, which compare two images, are given one image as both unless
              ``inputs`` says otherwise, and a warning says so; video models take at least 16 frames;
            * ``"timm:NAME"``: a timm model, optionally with a tag as in ``"timm:resnet50.a1_in1k"``;
              ``"timm:NAME@none"`` with random weights; ``"timm:./folder"``: a folder written by
              ``timm.models.save_for_hf``;
            * ``"hf-hub:ORG/NAME[@REVISION]"``: a timm model on the Hugging Face hub;
            * ``"transformers:ORG/NAME[@REVISION]"``: the ``AutoModel`` of a vision model on the hub, or the vision
              tower of a vision-language model (with ``inputs``: all of it); ``"transformers:./folder"``: a folder
              written by ``save_pretrained``; with ``@none`` the same architecture with random weights. Code from a
              repository is never run;
            * ``"package.module:function"`` or ``"path/to/file.py:function"``: the module or :class:`Model` that a
              function of yours returns, called without arguments. Only this form imports code of yours. Random numbers
              that it draws on the CPU are the same on every call. A file's folder is put on the import path;
            * an ``nn.Module``;
            * a :class:`Model`.
        weights: path of a state dict to load instead of the pretrained weights, ``.safetensors`` or ``.pth``/``.pt``
            (with ``weights_only=True``). Only with a model name.
        mean, std: input normalisation, one number per channel: the module receives ``(image - mean) / std`` for an
            image in ``[0, 1]``. Default: from the preset of the weights or from the image processor. For an
            ``nn.Module``: from the preset attached by timm; 0 and 1 if the module itself holds a mean and a standard
            deviation that it normalises with; otherwise ImageNet's for 3 channels, and 0 and 1 for other numbers of
            channels, are assumed. If only one of the two is given, the other is the preset's; without a preset it is
            assumed, with a warning.
        value_range: the values ``(lo, hi)`` that the module takes for black and white, if these are not 0 and 1.
            ``mean`` and ``std``, if given, are in the same units: ``value_range=(0, 255), mean=(123.68, 116.78,
            103.94), std=(1, 1, 1)``. Without them nothing else is subtracted or divided by: ``value_range=(-1, 1)``.
        size: input size. An integer is the side of a square image in pixels, or the length of a signal; otherwise
            ``(h, w)``, ``(t, h, w)`` for videos of ``t`` frames, or ``(t,)``. Default: from the preset; for an
            ``nn.Module`` its ``image_size`` attribute, otherwise ``(224, 224)``, ``(16, 112, 112)`` or ``(1024,)`` is
            assumed. timm models with a fixed input size are built for this size, with their position embeddings
            resampled.
        inputs: for a module that takes more than images. Either a structure in which ``fv.IMAGE_INPUT`` stands for the
            images ``(n, c, h, w)``, a tensor is the input for one image and is repeated along a new first axis, and
            anything else is passed as it is: a tuple (or list) of positional arguments, whose last of several entries
            may be a dict of keyword arguments, or a dict of keyword arguments. (A tuple of one dict is one positional
            argument, and ``(..., {"key": value}, {})`` ends with a positional dict.) Or a function that turns the
            images into the arguments: a tuple, a dict, or anything else for the only argument.

    Returns:
        A :class:`Model`. An ``nn.Module`` is kept as it is, including its training mode; with ``inputs`` it is wrapped,
        and its layers keep their names. The number of channels of an ``nn.Module`` is the first that a convolution of
        its takes, in the order of registration, with which a forward pass of a private copy works.

    Raises:
        ValueError: If the model or the weights are unknown, a download fails, a file is missing, damaged or of another
            architecture, an optional package is not installed, the lengths of ``mean`` and ``std`` differ, ``size`` is
            below 1 or has another number of axes, ``inputs`` does not fit, or the module is quantised, scripted, traced
            or has parameters without values.

    >>> load_model("texturenet").name
    'texturenet'
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3))
    >>> load_model(net, value_range=(-1, 1), size=28)[2:5]
    ((0.5,), (0.5,), (28, 28))
    """
    stated = check_normalisation(mean, std, value_range)
    stated_size = None if size is None else _check_size(size)

    def of_module(module: nn.Module, name: str) -> Model:
        _check_module(module, name)
        return from_module(
            module, name, inputs=inputs, channels=stated.channels, size=stated_size, normalised=stated.any
        )

    if not isinstance(model, str | nn.Module | Model):
        raise ValueError(f"expected a model name, an nn.Module or a Model, got {describe_object(model)}")
    if weights is not None and not isinstance(model, str):
        raise ValueError(
            f"weights= requires a model name, got a {type(model).__name__};"
            f" load the weights into your module before the call"
        )
    if isinstance(model, Model):
        loaded = model
    elif isinstance(model, nn.Module):
        loaded = of_module(unwrap(model), type(unwrap(model)).__name__)
    else:
        sides = (stated_size, stated_size) if isinstance(stated_size, int) else stated_size
        request = LoadRequest(
            model,
            model.partition(":")[2],
            skip_pretrained=weights is not None,
            size=(sides[0], sides[1]) if sides is not None and len(sides) == 2 else None,
            normalised=stated.any,
            whole=inputs is not None,
        )
        loaded = by_name(request, of_module)
    _check_module(loaded.module, loaded.name)
    if weights is not None:
        load_weights(original(loaded.module), weights)
        loaded = loaded._replace(weights=file_digest([Path(weights)]))
    if inputs is not None:
        assumed = tuple(name for name in loaded.assumed if name != "inputs")
        loaded = loaded._replace(module=with_inputs(loaded.module, inputs), assumed=assumed)
    if stated_size is not None:
        loaded = _with_size(loaded, stated_size)
    given = {"normalisation": stated.any, "size": size is not None}
    loaded = loaded._replace(stated=tuple(name for name, new in given.items() if new or name in loaded.stated))
    return with_normalisation(loaded, stated)


def by_name(request: LoadRequest, of_module: Callable[[nn.Module, str], Model]) -> Model:
    """Load a model by name.

    Args:
        request: its ``spec`` is a model name as for :func:`load_model`.
        of_module: ``(module, name) -> model``, for the module that a function of the user's returns.

    Raises:
        ValueError: If the model is unknown or cannot be loaded.
    """
    name = request.spec
    prefix, colon, _ = name.partition(":")
    if colon and prefix in _LOADERS:
        return _LOADERS[prefix](request)
    if name == "texturenet":
        from featvis_func import zoo

        with torch.random.fork_rng(devices=[]):  # The initial values are random, though they are overwritten.
            module = zoo.texturenet(pretrained=not request.skip_pretrained)
        return Model(module, name, zoo.MEAN, zoo.STD, (zoo.SIZE, zoo.SIZE), tuple(zoo.CLASSES))
    known = torchvision_names()
    if name in known:
        raise ValueError(f"unknown model {name!r}; did you mean 'torchvision:{name}'?")
    if not colon and name and find_spec("timm") is not None and import_optional("timm", "timm", name).is_model(name):
        raise ValueError(f"unknown model {name!r}; did you mean 'timm:{name}'?")
    factory = parse_factory(name)
    if factory is None:
        raise ValueError(f"unknown model {name!r}; expected {_EXPECTED}" + suggest(name, ["texturenet", *known]))
    try:
        made = call_factory(factory)
    except NoSuchModuleError as error:
        raise ValueError(
            f"unknown model {name!r}; expected {_EXPECTED} ({error}){suggest(prefix, list(_LOADERS))}"
        ) from error
    return (made if isinstance(made, Model) else of_module(unwrap(made), name))._replace(name=name)


def names_code(name: str) -> bool:
    """Return whether loading a model imports code of the user's.

    >>> names_code("nets:make"), names_code("timm:resnet18")
    (True, False)
    """
    return parse_factory(name) is not None and name.partition(":")[0] not in _LOADERS


def without_code(name: str) -> str:
    """Return the name of a model that comes from a file, not from the user.

    Raises:
        ValueError: If loading it would import code.
    """
    if names_code(name):
        raise ValueError(
            f"the model {name} is made by code, which is imported only where the user names it: give the model again"
            f" (--model {name})"
        )
    return name


def _check_module(module: nn.Module, name: str) -> None:
    check_initialised(module, name)
    check_differentiable(module, name)


def _check_size(size: Any) -> int | tuple[int, ...]:
    """Return an input size as whole numbers: one, or one for each axis."""
    several = isinstance(size, tuple | list)
    axes = list(size) if several else [size]
    try:
        numbers = [operator.index(number) for number in axes if not isinstance(number, bool)]
    except TypeError:
        numbers = []
    if len(numbers) != len(axes) or not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise ValueError(
            f"input size must be whole numbers, at least 1: one number, (h, w), (t, h, w) or (t,), got {size!r}"
        )
    return tuple(numbers) if several else numbers[0]


def _with_size(model: Model, size: int | tuple[int, ...]) -> Model:
    """Replace the input size of a model."""
    axes: int = len(model.size)
    if isinstance(size, int) and axes < 3:
        size = (size,) * axes
    if isinstance(size, int) or len(size) != axes:
        expected = {1: "signals of size (t,)", 2: "images of size (h, w)", 3: "videos of size (t, h, w)"}[axes]
        raise ValueError(f"{model.name} takes {expected}, got the input size {size}")
    return model._replace(size=size, assumed=tuple(name for name in model.assumed if name != "size"))
