"""Modules of the user's own: what they were wrapped in, what they take, and those without a gradient."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from featvis_func.models.base import DEFAULT_SIZE, IMAGENET_MEAN, IMAGENET_STD, Model

# Where the classes of quantised modules, and of tensors that hold quantised weights, are defined.
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
# Defined beside them, in models that are made ready for it.
_FLOATS = ("FloatFunctional", "FXFloatFunctional")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, without the wrappers of torch.compile and DataParallel."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(module.module)
    inner = getattr(module, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else module


def bare(module: nn.Module) -> Model:
    """A module without a preset: its input is read off its first convolution, and off what its maker left on it."""
    convolution = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels = convolution.in_channels if convolution is not None and convolution.in_channels > 0 else 3
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.0,) * channels, (1.0,) * channels)
    preset = getattr(module, "pretrained_cfg", None)  # of timm
    sides: list[Any] = [
        getattr(module, "image_size", None),
        getattr(getattr(module, "config", None), "image_size", None),
    ]
    if isinstance(preset, dict):
        own_mean, own_std = preset.get("mean", ()), preset.get("std", ())
        if len(own_mean) == len(own_std) == channels:
            mean, std = tuple(own_mean), tuple(own_std)
        # Built for another size than the preset's, timm's transformers say so where they cut patches.
        sides += [getattr(getattr(module, "patch_embed", None), "img_size", None), preset.get("input_size", ())[1:]]
    size = next((pair for side in sides if (pair := _pair(side)) is not None), (DEFAULT_SIZE, DEFAULT_SIZE))
    return Model(module, type(module).__name__, mean, std, size)


def _pair(side: object) -> tuple[int, int] | None:
    if isinstance(side, int) and not isinstance(side, bool):
        return side, side
    if isinstance(side, Sequence) and len(side) == 2 and all(isinstance(s, int) for s in side):
        return side[0], side[1]
    return None


def check_differentiable(model: Model) -> None:
    """Refuses what would fail later, or give images that mean nothing.

    Raises:
        ValueError: some module is scripted, traced or quantised.

    >>> check_differentiable(Model(nn.Linear(2, 2), "one", (0.0,), (1.0,), (2, 2)))
    """
    for path, child in model.module.named_modules():
        which = f"layer {path!r} of {model.name}" if path else model.name
        if isinstance(child, torch.jit.ScriptModule):
            raise ValueError(
                f"{which} is scripted or traced, and so has no layers to look into;"
                f" give the nn.Module that it was made from"
            )
        if (kind := next(_quantised(child), None)) is not None:
            raise ValueError(
                f"{which} is quantised ({kind}), and what is rounded has no gradient;"
                f" give the float model that it was made from"
            )


def _quantised(module: nn.Module) -> Iterator[str]:
    """What shows that a module, its children aside, computes with rounded numbers."""
    if _of(type(module), _QUANTISED) and type(module).__name__ not in _FLOATS:
        yield f"{type(module).__module__}.{type(module).__qualname__}"
    for name, value in module._parameters.items():
        if value is not None and (_rounded(value) or not (value.is_floating_point() or value.is_complex())):
            yield f"its {name} is {_kind(value)}"
    for name, value in module._buffers.items():
        # Other integers are indices, masks and counts.
        integer = value is not None and not (value.is_floating_point() or value.is_complex())
        if value is not None and (_rounded(value) or (integer and name in ("weight", "qweight", "weight_packed"))):
            yield f"its {name} is {_kind(value)}"
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            target = getattr(node.target, "__name__", str(node.target))
            if node.op.startswith("call_f") and "quantize" in target and "fake_quantize" not in target:
                yield f"its graph calls {target}"


def _rounded(value: Tensor) -> bool:
    one_byte_float = value.is_floating_point() and value.element_size() == 1
    return value.is_quantized or one_byte_float or _of(type(value), _QUANTISED)


def _kind(value: Tensor) -> str:
    name = type(value).__name__
    return str(value.dtype) if name in ("Tensor", "Parameter") else f"a {name}"


def _of(kind: type, modules: Sequence[str]) -> bool:
    return any(kind.__module__ == name or kind.__module__.startswith(f"{name}.") for name in modules)
