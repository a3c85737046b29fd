"""User-provided modules: find out what input they take."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from featvis_func.models.base import Model
from featvis_func.models.channels import ASSUMED_SIZES, Candidate, candidates, find_input
from featvis_func.models.inputs import ImageInputs, check_takes_one
from featvis_func.models.normalisation import default_normalisation, normalises_itself, warn_assumed


def from_module(
    module: nn.Module,
    name: str,
    *,
    inputs: Any = None,
    channels: int | None = None,
    size: int | tuple[int, ...] | None = None,
    normalised: bool = False,
) -> Model:
    """Infer the input of a module: what it states, what a forward pass tells, or else what is assumed.

    Args:
        module: not changed.
        name: of the model.
        inputs: as for :func:`~featvis_func.load_model`.
        channels: number of channels, if the user states it.
        size: input size, if the user states it.
        normalised: whether the user states the normalisation.

    Returns:
        A model with the module, or with its wrapper if there are ``inputs``. Its ``assumed`` names what is not known;
        a warning is issued for the normalisation.

    Raises:
        ValueError: If the module needs other arguments than images, and there are no ``inputs``.
    """
    if inputs is None:
        check_takes_one(module)
    called = module if inputs is None else ImageInputs(module, inputs)
    preset = getattr(module, "pretrained_cfg", None)  # Set by timm.
    preset = preset if isinstance(preset, dict) else {}
    sizes = {**_declared_sizes(module, preset), **_stated_sizes(size)}
    axes = len(size) if isinstance(size, tuple) else 2 if preset else None
    stated = _channels_of_preset(module, preset) if channels is None else channels
    found = candidates(called, axes, stated)
    default = Candidate(axes or (found[0].axes if found else 2), 3 if stated is None else stated)
    possible = list(dict.fromkeys([*found, default]))
    if (len(found) == 1 and inputs is None) or (len(possible) == 1 and stated is not None):
        chosen, certain = possible[0], True
    else:
        chosen, certain = find_input(called, possible, {**ASSUMED_SIZES, **sizes})
    assumed = [
        *(["size"] if chosen.axes not in sizes else []),
        *(["channels"] if not certain and stated is None else []),
    ]
    mean, std = tuple(preset.get("mean", ())), tuple(preset.get("std", ()))
    if not len(mean) == len(std) == chosen.channels:
        if normalises_itself(module, chosen.channels):
            mean, std = (0.0,) * chosen.channels, (1.0,) * chosen.channels
        else:
            mean, std = default_normalisation(chosen.channels)
            assumed.append("normalisation")
            if not normalised:
                warn_assumed(name, mean, std)
    return Model(called, name, mean, std, {**ASSUMED_SIZES, **sizes}[chosen.axes], assumed=tuple(assumed))


def _channels_of_preset(module: nn.Module, preset: dict[str, Any]) -> int | None:
    """Return the channels of the first convolution, which timm's preset names."""
    for name, child in module.named_modules():
        if name and name == preset.get("first_conv"):
            return getattr(child, "in_channels", None)
    return None


def _stated_sizes(size: int | tuple[int, ...] | None) -> dict[int, tuple[int, ...]]:
    """Return the size that the user states, by its number of axes; one number is the side of a square, or a length."""
    if isinstance(size, int):
        return {1: (size,), 2: (size, size)}
    return {} if size is None else {len(size): size}


def _declared_sizes(module: nn.Module, preset: dict[str, Any]) -> dict[int, tuple[int, ...]]:
    """Return the input size that a module states by its attributes, its configuration, or the preset of timm."""
    config = getattr(module, "config", None)
    sizes = (_parse_size(candidate) for candidate in _declarations(module, config, preset))
    size = next((size for size in sizes if size is not None), None)
    if size is None:
        return {}
    frames = getattr(module, "num_frames", None) or getattr(config, "num_frames", None)
    return {2: size, **({3: (frames, *size)} if isinstance(frames, int) else {})}


def _declarations(module: nn.Module, config: Any, preset: dict[str, Any]) -> Iterator[Any]:
    yield getattr(module, "image_size", None)
    yield getattr(config, "image_size", None)
    if preset:
        # The patch embedding holds the actual size of a timm transformer built for another size than the preset's.
        yield getattr(getattr(module, "patch_embed", None), "img_size", None)
        yield preset.get("input_size", ())[1:]


def _parse_size(size: object) -> tuple[int, int] | None:
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    return None
