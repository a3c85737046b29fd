"""Models of torchvision by name, with the weights that it publishes."""

import inspect
from typing import Any

import torch

from featvis_func.models.base import DEFAULT_SIZE, IMAGENET_MEAN, IMAGENET_STD, Model, Request, same_random_weights
from featvis_func.validation import first_line, suggest

# How torchvision's own builders construct these when given weights; a weights file was made with the same.
_PRETRAINED_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "aux_logits": True, "init_weights": False},
}


def torchvision_names() -> list[str]:
    """Every model that torchvision knows by name, but for the quantised ones."""
    import torchvision.models

    return [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]


def from_torchvision(request: Request) -> Model:
    """``NAME[@WEIGHTS]``; see :func:`~featvis_func.load_model`.

    Raises:
        ValueError: an unknown or quantised model, unknown weights, or weights that cannot be fetched.
    """
    import torchvision.models

    name, _, wanted = request.rest.partition("@")
    known = torchvision_names()
    if name.startswith("quantized_") and name.removeprefix("quantized_") in known:
        raise ValueError(
            f"{request.spec!r} is quantised, and what is rounded has no gradient;"
            f" did you mean 'torchvision:{name.removeprefix('quantized_')}'?"
        )
    if name not in known:
        raise ValueError(f"torchvision has no model {name!r}{suggest(name, known)}")
    enum = torchvision.models.get_model_weights(name)
    weights = None if wanted == "none" else _weights(name, wanted, enum)
    options = _PRETRAINED_OPTIONS.get(name, {})
    if request.own_weights or weights is None:
        if not request.own_weights and "init_weights" in options:
            options = {"init_weights": True}
        if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(name)).parameters:
            options = {**options, "weights_backbone": None}  # or it would be fetched
        with same_random_weights():
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
    side = getattr(view, "crop_size", None) or [DEFAULT_SIZE]
    return Model(
        module,
        request.spec,
        tuple(getattr(view, "mean", IMAGENET_MEAN)),
        tuple(getattr(view, "std", IMAGENET_STD)),
        (side[0], side[-1]),
        tuple(preset.meta.get("categories", ())) if preset is not None and weights is not None else (),
        str(weights or ""),
    )


def _weights(name: str, wanted: str, enum: Any) -> Any:
    """The member of a model's weights that is meant."""
    import torchvision.models

    if "." not in wanted:
        try:
            return enum[wanted or "DEFAULT"]
        except KeyError as error:
            raise ValueError(f"{name} has no weights {wanted!r}; it has {_members(enum)}") from error
    try:
        weights = torchvision.models.get_weight(wanted)
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"torchvision has no weights {wanted!r}; {name} has {_members(enum)}") from error
    if not isinstance(weights, enum):
        raise ValueError(f"weights {wanted!r} are not of {name}, which has {_members(enum)}")
    return weights


def _members(enum: Any) -> str:
    return ", ".join(m.name for m in enum) or "none"
