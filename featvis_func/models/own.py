"""User-provided modules: unwrap them, infer their input, and reject those without gradients."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from featvis_func.models.base import DEFAULT_SIZE, IMAGENET_MEAN, IMAGENET_STD, Model

# Packages that define quantised modules, or tensor subclasses for quantised weights.
_QUANTISED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.sparse.quantized",
    "torch.nn.quantized",
    "torchao",
    "bitsandbytes",
    "auto_gptq",
    "gptqmodel",
    "awq",
    "optimum.quanto",
)
# Float modules defined in these packages; they occur in models prepared for quantisation.
_FLOATS = ("FloatFunctional", "FXFloatFunctional")


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrap(module.module)
    inner = getattr(module, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else module


def from_module(module: nn.Module) -> Model:
    """Infer the input of a module from its first convolution, its ``image_size``, and the preset attached by timm."""
    convolution = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels = convolution.in_channels if convolution is not None and convolution.in_channels > 0 else 3
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.0,) * channels, (1.0,) * channels)
    preset = getattr(module, "pretrained_cfg", None)  # Set by timm.
    candidates: list[Any] = [
        getattr(module, "image_size", None),
        getattr(getattr(module, "config", None), "image_size", None),
    ]
    if isinstance(preset, dict):
        preset_mean, preset_std = preset.get("mean", ()), preset.get("std", ())
        if len(preset_mean) == len(preset_std) == channels:
            mean, std = tuple(preset_mean), tuple(preset_std)
        # The patch embedding holds the actual size of a timm transformer built for another size than the preset's.
        candidates.append(getattr(getattr(module, "patch_embed", None), "img_size", None))
        candidates.append(preset.get("input_size", ())[1:])
    sizes = (_parse_size(candidate) for candidate in candidates)
    size = next((size for size in sizes if size is not None), (DEFAULT_SIZE, DEFAULT_SIZE))
    return Model(module, type(module).__name__, mean, std, size)


def _parse_size(size: object) -> tuple[int, int] | None:
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    return None


def check_differentiable(model: Model) -> None:
    """Raise ValueError if a module is scripted, traced or quantised.

    >>> check_differentiable(Model(nn.Linear(2, 2), "one", (0.0,), (1.0,), (2, 2)))
    """
    for path, child in model.module.named_modules():
        layer = f"layer {path!r} of {model.name}" if path else model.name
        if isinstance(child, torch.jit.ScriptModule):
            raise ValueError(
                f"{layer} is scripted or traced, so its layers cannot be accessed;"
                f" give the nn.Module that it was made from"
            )
        if (reason := next(_quantisation_reasons(child), None)) is not None:
            raise ValueError(
                f"{layer} is quantised ({reason}), and quantised weights have no gradient;"
                f" give the float model that it was made from"
            )


def _quantisation_reasons(module: nn.Module) -> Iterator[str]:
    """Yield the reasons why a module is considered quantised, apart from its children."""
    if _is_defined_in(type(module), _QUANTISED) and type(module).__name__ not in _FLOATS:
        yield f"{type(module).__module__}.{type(module).__qualname__}"
    for name, value in module._parameters.items():
        if value is not None and (_is_quantised(value) or not (value.is_floating_point() or value.is_complex())):
            yield f"its {name} is {_type_name(value)}"
    for name, value in module._buffers.items():
        # Integer buffers of other names are indices, masks and counters.
        integer = value is not None and not (value.is_floating_point() or value.is_complex())
        if value is not None and (_is_quantised(value) or (integer and name in ("weight", "qweight", "weight_packed"))):
            yield f"its {name} is {_type_name(value)}"
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            target = getattr(node.target, "__name__", str(node.target))
            if node.op.startswith("call_f") and "quantize" in target and "fake_quantize" not in target:
                yield f"its graph calls {target}"


def _is_quantised(value: Tensor) -> bool:
    is_float8 = value.is_floating_point() and value.element_size() == 1
    return value.is_quantized or is_float8 or _is_defined_in(type(value), _QUANTISED)


def _type_name(value: Tensor) -> str:
    name = type(value).__name__
    return str(value.dtype) if name in ("Tensor", "Parameter") else f"a {name}"


def _is_defined_in(cls: type, packages: Sequence[str]) -> bool:
    return any(cls.__module__ == name or cls.__module__.startswith(f"{name}.") for name in packages)
