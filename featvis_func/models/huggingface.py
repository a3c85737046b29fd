"""Vision models of transformers, from the Hugging Face hub or a folder."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from featvis_func.models.base import (
    DEFAULT_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Model,
    Request,
    digest,
    needed,
    place,
    same_random_weights,
)
from featvis_func.validation import first_line


class PixelValues(nn.Module):
    """A model of transformers as a function of images ``(n, c, h, w)`` alone.

    The model's own children, parameters and buffers are this module's, so that layers keep their names.

    Args:
        inner: what takes ``pixel_values=``.
        reverse: whether it takes the channels in the other order, blue before red.
    """

    def __init__(self, inner: nn.Module, *, reverse: bool = False) -> None:
        super().__init__()
        # Beside the registered children, not among them: no name gets a prefix. The rooms are the same objects, and so
        # are their copies, since a deep copy copies an object once.
        self.__dict__["inner"] = inner
        for room in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[room] = getattr(inner, room)
        self.reverse = reverse
        self.training = inner.training

    def forward(self, images: Tensor) -> Any:
        """What the model makes of images."""
        return self.__dict__["inner"](pixel_values=images.flip(1) if self.reverse else images)


class Preset(NamedTuple):
    """What an image processor does to an image in ``[0, 1]``, as far as a :class:`Model` says it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    reverse: bool


def from_transformers(request: Request) -> Model:
    """``ORG/NAME[@REVISION]`` or ``FOLDER``, either with ``@none``; see :func:`~featvis_func.load_model`.

    Raises:
        ValueError: transformers is missing, what is asked for cannot be fetched, needs code of its own, or takes no
            images.
    """
    transformers = needed("transformers", "huggingface", request.spec)
    folder, name, revision = place(request.rest)
    random = request.own_weights or revision == "none"
    where = str(folder or name)
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision not in ("", "none"):
        options["revision"] = revision
    try:
        config, module, missing = _created(transformers, where, options, random)
    except Exception as error:  # the hub, the network, files: each fails in its own way
        raise ValueError(_failure(request.spec, error)) from error
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        warnings.warn(f"the weights of {request.spec} lack {shown}, which are random now", stacklevel=5)
    inner, config = _vision(request.spec, module, config)
    preset = _preset(transformers, request.spec, where, options, getattr(config, "num_channels", 3))
    files = sorted(p for s in ("*.safetensors", "*.bin") for p in folder.glob(s)) if folder is not None else []
    commit = getattr(config, "_commit_hash", None) or revision
    weights = digest(files) if folder is not None else f"{name}@{commit}" if commit else name
    return Model(
        PixelValues(inner.float().eval(), reverse=preset.reverse).eval(),
        request.spec,
        preset.mean,
        preset.std,
        preset.size or _pair(getattr(config, "image_size", None)) or (DEFAULT_SIZE, DEFAULT_SIZE),
        (),
        "" if random else weights,
    )


def _created(transformers: Any, where: str, options: dict[str, Any], random: bool) -> tuple[Any, nn.Module, list[str]]:
    """A model's configuration, the model, and the names of what its weights lack."""
    with same_random_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about itself
        config = transformers.AutoConfig.from_pretrained(where, **options)
        if random:
            return config, transformers.AutoModel.from_config(config, trust_remote_code=False), []
        module, report = transformers.AutoModel.from_pretrained(
            where, config=config, output_loading_info=True, **options
        )
        return config, module, sorted(report["missing_keys"])


def _failure(spec: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"{spec} needs code of its own repository, which is never run; load it yourself, and give the module"
    return (
        f"could not load {spec} ({first_line(error)}); give a folder that save_pretrained wrote"
        f" ('transformers:./folder'); with '@none' its config.json is enough, and the weights are random"
    )


def _vision(spec: str, module: nn.Module, config: Any) -> tuple[nn.Module, Any]:
    """What takes images alone: the model, or its vision tower."""
    tower = getattr(module, "vision_model", None)
    for inner, its in ((module, config), (tower, getattr(config, "vision_config", config))):
        alone = getattr(inner, "main_input_name", "pixel_values") == "pixel_values"
        if isinstance(inner, nn.Module) and alone and "pixel_values" in inspect.signature(inner.forward).parameters:
            return inner, its
    raise ValueError(f"{spec} is a {type(module).__name__}, which takes no images alone")


def _preset(transformers: Any, spec: str, where: str, options: dict[str, Any], channels: int) -> Preset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            processor = transformers.AutoImageProcessor.from_pretrained(where, **options)
    except Exception as error:
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.0,) * channels, (1.0,) * channels)
        warnings.warn(
            f"{spec} comes without an image processor ({first_line(error)}): unless mean= and std= are given,"
            f" they are assumed to be {mean} and {std}",
            stacklevel=6,
        )
        return Preset(mean, std, None, False)
    return preset_of(processor, channels)


def preset_of(processor: Any, channels: int = 3) -> Preset:
    """The normalisation and the size that an image processor stands for.

    A processor rescales a pixel's byte ``b``, normalises it, or both:

        (factor * b - offset - mean) / std     with b = 255 x, and x in [0, 1] the image's value
        = (x - (mean + offset) / (255 factor)) / (std / (255 factor))

    Args:
        processor: with the attributes of ``transformers``' image processors.
        channels: of the model's images.

    >>> from types import SimpleNamespace
    >>> preset_of(SimpleNamespace(image_mean=[0.5], image_std=[0.25], size={"shortest_edge": 96}), 1)
    Preset(mean=(0.5,), std=(0.25,), size=(96, 96), reverse=False)
    """

    def says(name: str, default: Any) -> Any:
        value = getattr(processor, name, None)
        return default if value is None else value

    def numbers(name: str, default: float) -> list[float]:
        given = says(name, default) if says("do_normalize", True) else default
        values = [float(v) for v in given] if isinstance(given, list | tuple) else [float(given)]
        return values * channels if len(values) == 1 else values

    factor = 255 * float(says("rescale_factor", 1 / 255)) if says("do_rescale", True) else 255.0
    offset = 1.0 if says("rescale_offset", False) and says("do_rescale", True) else 0.0
    size = _pair(says("crop_size", None)) if says("do_center_crop", False) else None
    return Preset(
        tuple((mean + offset) / factor for mean in numbers("image_mean", 0.0)),
        tuple(std / factor for std in numbers("image_std", 1.0)),
        size or _pair(says("size", None)),
        bool(says("do_flip_channel_order", False)),
    )


def _pair(size: Any) -> tuple[int, int] | None:
    """``(h, w)`` from whatever form a configuration gives a size in; a side alone means a square."""
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
