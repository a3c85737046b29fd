"""Load torchvision models by name."""

import inspect
import math
from typing import Any, NamedTuple

import torch

from featvis_func.models.base import DEFAULT_SIZE, LoadRequest, Model, seeded_init
from featvis_func.models.inputs import IMAGE_INPUT, ImageInputs
from featvis_func.models.normalisation import default_normalisation, warn_assumed
from featvis_func.validation import first_line, suggest, warn_caller

# Frames of a video, which suffice for all video models; most were trained with this many.
_FRAMES = 16

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
    transform: Any = preset.transforms() if preset is not None else None
    known = None if transform is None else read_transform(transform)
    assumed = list[str]()
    if known is None:
        known = Preset(*default_normalisation(3))
        assumed.append("normalisation")
        if not request.normalised:
            warn_assumed(request.spec, known.mean, known.std)
    crop_size = getattr(transform, "crop_size", None)
    if crop_size is None:
        assumed.insert(0, "size")
        crop_size = [DEFAULT_SIZE]
    size: tuple[int, ...] = (crop_size[0], crop_size[-1])
    if known.video and preset is not None:
        size = (max(_FRAMES, preset.meta.get("min_temporal_size", 1)), *size)
    if known.images > 1:
        module = ImageInputs(module, (IMAGE_INPUT,) * known.images)
        assumed.append("inputs")
        if not request.whole:
            warn_caller(
                f"{request.spec} takes {known.images} images, and is given one image as each of them (nothing moves);"
                f" to fix the second, state inputs=(fv.IMAGE_INPUT, second), normalised and ({known.channels}, h, w)"
            )
    return Model(
        module,
        request.spec,
        known.mean,
        known.std,
        size,
        tuple(preset.meta.get("categories", ())) if preset is not None and weights is not None else (),
        str(weights or ""),
        tuple(assumed),
    )


class Preset(NamedTuple):
    """What a preprocessing transform tells about the input of its model."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int = 1
    """How many images the model takes."""
    video: bool = False

    @property
    def channels(self) -> int:
        """The number of channels of an image."""
        return len(self.mean)


def read_transform(transform: Any, channels: int = 3) -> Preset | None:
    """Find out what a preprocessing transform does to values in ``[0, 1]``, by applying it to plain images.

    Args:
        transform: takes an image ``(c, h, w)``, or two of them, or a video ``(t, c, h, w)``; returns the same with the
            channels first.
        channels: number of channels.

    Returns:
        The normalisation. If the transform states the same by its ``mean`` and ``std``, these numbers exactly; also if
        it cannot be applied. ``None`` if there is no such normalisation.

    >>> from torchvision.transforms import Normalize
    >>> read_transform(Normalize([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    Preset(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), images=1, video=False)
    >>> read_transform(lambda first, second: (2 * first - 1, 2 * second - 1))
    Preset(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), images=2, video=False)
    """
    mean, std = tuple(getattr(transform, "mean", None) or ()), tuple(getattr(transform, "std", None) or ())
    stated = Preset(mean, std) if len(mean) == len(std) == channels else None
    sides = (channels, 32, 32)
    for images, shape in ((1, sides), (2, sides), (1, (2, *sides))):
        try:
            black, grey, white = (
                _channel_values(transform(*[torch.full(shape, value)] * images), channels) for value in (0.0, 0.5, 1.0)
            )
        except Exception:  # The transform takes another number of images, or videos.
            continue
        scale = [w - b for b, w in zip(black, white, strict=True)]
        linear = all(math.isclose(g, b + s / 2, abs_tol=1e-3) for g, b, s in zip(grey, black, scale, strict=True))
        if not linear or min(scale) <= 0:
            return None
        found = [tuple(round(-b / s, 6) + 0.0 for b, s in zip(black, scale, strict=True))]
        found.append(tuple(round(1 / s, 6) for s in scale))
        same = stated is not None and all(
            math.isclose(f, s, abs_tol=1e-4) for f, s in zip((*found[0], *found[1]), (*mean, *std), strict=True)
        )
        found = [mean, std] if same else found
        return Preset(found[0], found[1], images, video=len(shape) == 4)
    return stated


def _channel_values(output: Any, channels: int) -> list[float]:
    """Return the mean value of each channel of what a transform returns, which is one image or several equal ones.

    Raises:
        ValueError: If it is something else.
    """
    outputs = output if isinstance(output, tuple | list) else (output,)
    values = [value.double().flatten(1).mean(1).tolist() for value in outputs if value.shape[0] == channels]
    if len(values) < len(outputs) or any(other != values[0] for other in values):
        raise ValueError("not an image")
    return values[0]


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
