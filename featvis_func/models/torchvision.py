"""Load torchvision models by name."""

import inspect
from typing import Any

import torch

from featvis_func.models.base import DEFAULT_SIZE, IMAGENET_MEAN, IMAGENET_STD, LoadRequest, Model, seeded_init
from featvis_func.validation import first_line, suggest

# Options that torchvision's builders set for pretrained weights; a weights file was saved from a model with the same.
_PRETRAINED_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "aux_logits": True, "init_weights": False},
}


def torchvision_names() -> list[str]:
    """List all torchvision models except the quantised ones."""
    import torchvision.models

    return [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]


def from_torchvision(request: LoadRequest) -> Model:
    """Load ``torchvision:NAME[@WEIGHTS]``; see :func:`~featvis_func.load_model`.

    Raises:
        ValueError: If the model or the weights are unknown, the model is quantised, or the download fails.
    """
    import torchvision.models

    name, _, weights_name = request.source.partition("@")
    known = torchvision_names()
    if name.startswith("quantized_") and name.removeprefix("quantized_") in known:
        raise ValueError(
            f"{request.spec!r} is quantised, and quantised weights have no gradient;"
            f" did you mean 'torchvision:{name.removeprefix('quantized_')}'?"
        )
    if name not in known:
        raise ValueError(f"torchvision has no model {name!r}{suggest(name, known)}")
    enum = torchvision.models.get_model_weights(name)
    weights = None if weights_name == "none" else _parse_weights(name, weights_name, enum)
    options = _PRETRAINED_OPTIONS.get(name, {})
    if request.skip_pretrained or weights is None:
        if not request.skip_pretrained and "init_weights" in options:
            options = {"init_weights": True}
        if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(name)).parameters:
            options = {**options, "weights_backbone": None}  # The default downloads pretrained weights.
        with seeded_init():
            module = torchvision.models.get_model(name, weights=None, **options)
    else:
        try:
            with torch.random.fork_rng(devices=[]):
                module = torchvision.models.get_model(name, weights=weights)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"could not fetch the weights {weights} ({first_line(error)});"
                f" give a weights file, or '@none' for random weights"
            ) from error
    module.eval()
    preset = weights or next(iter(enum), None)
    transforms: Any = preset.transforms() if preset is not None else None
    crop_size = getattr(transforms, "crop_size", None) or [DEFAULT_SIZE]
    return Model(
        module,
        request.spec,
        tuple(getattr(transforms, "mean", IMAGENET_MEAN)),
        tuple(getattr(transforms, "std", IMAGENET_STD)),
        (crop_size[0], crop_size[-1]),
        tuple(preset.meta.get("categories", ())) if preset is not None and weights is not None else (),
        str(weights or ""),
    )


def _parse_weights(name: str, weights_name: str, enum: Any) -> Any:
    """Return the member of a model's weights enum for ``MEMBER``, ``Enum.MEMBER`` or ``""`` (the default)."""
    import torchvision.models

    if "." not in weights_name:
        try:
            return enum[weights_name or "DEFAULT"]
        except KeyError as error:
            raise ValueError(f"{name} has no weights {weights_name!r}; it has {_member_names(enum)}") from error
    try:
        weights = torchvision.models.get_weight(weights_name)
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"torchvision has no weights {weights_name!r}; {name} has {_member_names(enum)}") from error
    if not isinstance(weights, enum):
        raise ValueError(f"weights {weights_name!r} are not for {name}, which has {_member_names(enum)}")
    return weights


def _member_names(enum: Any) -> str:
    return ", ".join(member.name for member in enum) or "none"
