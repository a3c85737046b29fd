"""Load vision models of transformers from the Hugging Face hub or a folder."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from featvis_func.models.base import (
    DEFAULT_SIZE,
    LoadRequest,
    Model,
    file_digest,
    import_optional,
    parse_source,
    seeded_init,
)
from featvis_func.models.inputs import IMAGE_INPUT, ImageInputs
from featvis_func.models.normalisation import default_normalisation, warn_assumed
from featvis_func.validation import first_line, warn_caller


class Preset(NamedTuple):
    """Preprocessing of an image in ``[0, 1]``, as far as a :class:`Model` can represent it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    """``(h, w)`` in pixels, if the image processor specifies it."""
    reverse: bool
    """Whether the order of the channels is reversed."""
    known: bool = True
    """Whether an image processor states it."""


def from_transformers(request: LoadRequest) -> Model:
    """Load ``transformers:ORG/NAME[@REVISION]`` or ``transformers:FOLDER``; see :func:`~featvis_func.load_model`.

    Raises:
        ValueError: If transformers is not installed, the model cannot be loaded or requires code from its repository,
            or it does not take images as its only input.
    """
    transformers = import_optional("transformers", "huggingface", request.spec)
    folder, name, revision = parse_source(request.source)
    random = request.skip_pretrained or revision == "none"
    location = str(folder or name)
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision not in ("", "none"):
        options["revision"] = revision
    try:
        config, module, missing = _create_module(transformers, location, options, random)
    except Exception as error:  # The hub, the network and files raise many types of exceptions.
        raise ValueError(_loading_error(request.spec, error)) from error
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        warn_caller(f"the weights of {request.spec} lack {shown}, which are initialised at random instead")
    vision_config = getattr(config, "vision_config", config)
    if request.whole:
        inner = module
    else:
        inner, vision_config = _select_vision_module(request.spec, module, config)
    preset = _load_preset(transformers, request, location, options, getattr(vision_config, "num_channels", 3))
    size = preset.size or _parse_size(getattr(vision_config, "image_size", None))
    files = sorted(p for s in ("*.safetensors", "*.bin") for p in folder.glob(s)) if folder is not None else []
    commit = getattr(config, "_commit_hash", None) or revision
    weights = file_digest(files) if folder is not None else f"{name}@{commit}" if commit else name
    assumed = [*(["size"] if size is None else []), *([] if preset.known else ["normalisation"])]
    return Model(
        ImageInputs(inner.float().eval(), {"pixel_values": IMAGE_INPUT}, reverse=preset.reverse).eval(),
        request.spec,
        preset.mean,
        preset.std,
        size or (DEFAULT_SIZE, DEFAULT_SIZE),
        (),
        "" if random else weights,
        tuple(assumed),
    )


def _create_module(
    transformers: Any, location: str, options: dict[str, Any], random: bool
) -> tuple[Any, nn.Module, list[str]]:
    """Return the configuration, the model, and the names of the parameters that its weights lack."""
    with seeded_init(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Deprecation warnings that concern transformers itself.
        config = transformers.AutoConfig.from_pretrained(location, **options)
        if random:
            return config, transformers.AutoModel.from_config(config, trust_remote_code=False), []
        module, report = transformers.AutoModel.from_pretrained(
            location, config=config, output_loading_info=True, **options
        )
        return config, module, sorted(report["missing_keys"])


def _loading_error(spec: str, error: Exception) -> str:
    """Return the message for an exception raised while loading a model."""
    if "trust_remote_code" in str(error):
        return (
            f"{spec} requires code from its repository, which is never run;"
            f" load the model yourself and pass the nn.Module"
        )
    return (
        f"could not load {spec} ({first_line(error)}); give a folder written by save_pretrained"
        f" ('transformers:./folder'); with '@none' a folder needs only config.json, and the weights are random"
    )


def _select_vision_module(spec: str, module: nn.Module, config: Any) -> tuple[nn.Module, Any]:
    """Return the model or its vision tower, whichever takes images as its only input, and its configuration."""
    tower = getattr(module, "vision_model", None)
    for candidate, its_config in ((module, config), (tower, getattr(config, "vision_config", config))):
        images_only = getattr(candidate, "main_input_name", "pixel_values") == "pixel_values"
        if (
            isinstance(candidate, nn.Module)
            and images_only
            and "pixel_values" in inspect.signature(candidate.forward).parameters
        ):
            return candidate, its_config
    raise ValueError(f"{spec} is a {type(module).__name__}, which does not take images as its only input")


def _load_preset(
    transformers: Any, request: LoadRequest, location: str, options: dict[str, Any], channels: int
) -> Preset:
    """Return the preset of the image processor; assume a default if there is none, and warn unless it is stated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            processor = transformers.AutoImageProcessor.from_pretrained(location, **options)
    except Exception as error:
        mean, std = default_normalisation(channels)
        if not request.normalised:
            warn_assumed(request.spec, mean, std, f"{request.spec} has no image processor ({first_line(error)})")
        return Preset(mean, std, None, False, known=False)
    return preset_of(processor, channels)


def preset_of(processor: Any, channels: int = 3) -> Preset:
    """Return the normalisation and the size of an image processor.

    A processor rescales the byte value ``b`` of a pixel, normalises it, or both:

        (factor * b - offset - mean) / std     with b = 255 x, where x in [0, 1] is the value of the image
        = (x - (mean + offset) / (255 factor)) / (std / (255 factor))

    Args:
        processor: an object with the attributes of a transformers image processor.
        channels: number of image channels.

    Returns:
        The equivalent :class:`Preset` for images in ``[0, 1]``.

    >>> from types import SimpleNamespace
    >>> preset_of(SimpleNamespace(image_mean=[0.5], image_std=[0.25], size={"shortest_edge": 96}), 1)
    Preset(mean=(0.5,), std=(0.25,), size=(96, 96), reverse=False, known=True)
    """

    def attribute(name: str, default: Any) -> Any:
        value = getattr(processor, name, None)
        return default if value is None else value

    def per_channel(name: str, default: float) -> list[float]:
        given = attribute(name, default) if attribute("do_normalize", True) else default
        values = [float(v) for v in given] if isinstance(given, list | tuple) else [float(given)]
        return values * channels if len(values) == 1 else values

    factor = 255 * float(attribute("rescale_factor", 1 / 255)) if attribute("do_rescale", True) else 255.0
    offset = 1.0 if attribute("rescale_offset", False) and attribute("do_rescale", True) else 0.0
    size = _parse_size(attribute("crop_size", None)) if attribute("do_center_crop", False) else None
    return Preset(
        tuple((mean + offset) / factor for mean in per_channel("image_mean", 0.0)),
        tuple(std / factor for std in per_channel("image_std", 1.0)),
        size or _parse_size(attribute("size", None)),
        bool(attribute("do_flip_channel_order", False)),
    )


def _parse_size(size: Any) -> tuple[int, int] | None:
    """Return ``(h, w)`` for any format of a size in a configuration, or ``None``; one side alone means a square."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if isinstance(size, list | tuple) and len(size) in (1, 2) and all(isinstance(side, int) for side in size):
        return int(size[0]), int(size[-1])

    def side(name: str) -> Any:
        return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)

    for names in (("height", "width"), ("shortest_edge",) * 2, ("max_height", "max_width"), ("longest_edge",) * 2):
        h, w = side(names[0]), side(names[1])
        if h and w:
            return int(h), int(w)
    return None
