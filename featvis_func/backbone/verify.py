"""Whether what was made of a module is still that module: cut to some layers, as a graph, and in another precision.

The module itself says what is right, once, on a few example images.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featvis_func.backbone.hooks import Backbone, catch, wave
from featvis_func.backbone.layers import LayerRef
from featvis_func.models import Model
from featvis_func.types import Weights
from featvis_func.validation import first_line

# An exported graph must agree with the module to this, relative to the largest activation: in float32, and in units of
# the last place for types that are coarser than that.
_TOLERANCE = 1e-3
_ULPS = 16
# In bfloat16, whose 8 bits add up over the layers of a network.
_BFLOAT16_TOLERANCE = 0.1
# Its gradient, relative to the gradient's norm; looser, since rounding can tip a rectifier or a maximum.
_GRADIENT_TOLERANCE = 5e-2

PRECISIONS = ("auto", "float32", "bfloat16")
"""What a backbone can compute in: ``"auto"`` is bfloat16 for a float32 model on a device that has it in hardware (CUDA
from compute capability 8; CPUs with AMX or AVX-512 BF16), else the model's own type."""


class Reference(NamedTuple):
    """What the module itself makes of some images; the layers by their full names."""

    images: Tensor
    values: dict[str, Tensor]
    fewer: dict[str, Tensor]
    """The values of all images but the last, alone."""
    gradient: Tensor
    """To the images, of a fixed mixture of all values."""


def reference_of(module: nn.Module, calls: Mapping[LayerRef, int], images: Tensor) -> Reference:
    """Runs the module through hooks.

    Args:
        module: in evaluation mode.
        calls: layer -> how often one forward pass calls it.
        images: at least 2, different ones.
    """

    def apply(images: Tensor) -> dict[str, Tensor]:
        with catch(module, calls, stop=True) as caught:
            module(images)
        return caught

    values, gradient = _values_and_gradient(apply, images)
    with torch.no_grad():
        fewer = apply(images[:-1])
    return Reference(images, values, fewer, gradient)


def check_outputs(model: Model, paths: dict[str, str], reference: Reference) -> None:
    """Raises ValueError if a layer's output has no channels; warns if it is not each image's own.

    Args:
        model: for its name.
        paths: layer name as asked for -> its full name.
        reference: from :func:`reference_of`.
    """
    count = len(reference.images)
    for name, path in paths.items():
        value, fewer = reference.values[path], reference.fewer[path]
        if value.shape[0] != count or fewer.shape[0] != count - 1:
            raise ValueError(
                f"layer {name!r} gives {tuple(value.shape)} for {count} images; expected one entry per image"
            )
        if not 1 <= value.ndim - 1 <= 3:
            raise ValueError(
                f"layer {name!r} gives {tuple(value.shape[1:]) or 'one number'} per image, which has no channels;"
                f" expected (c, h, w), (t, d) or (d,)"
            )
        if _difference({name: fewer}, {name: value[:-1]}):
            warnings.warn(
                f"layer {name!r} of {model.name} depends on the other images of its batch, or on chance: what one"
                f" filter gets is not its own alone, and not the same each time",
                stacklevel=5,
            )


def find_mismatch(core: Backbone, reference: Reference) -> str:
    """What a backbone does otherwise than the module, in values or gradient; empty if nothing."""
    values, gradient = _values_and_gradient(lambda images: core.apply(core.weights, images), reference.images)
    if wrong := _difference(values, reference.values):
        return wrong
    slope = reference.gradient
    error = (gradient - slope).double().norm() / slope.double().norm().clamp_min(1e-12)
    near = bool(error <= max(_GRADIENT_TOLERANCE, _tolerance(slope.dtype)))
    if bool(slope.isfinite().all()) and not near:
        return f"the graph has another gradient than the module, by {float(error):.2g}"
    return ""


def in_precision(model: Model, core: Backbone, precision: str, reference: Reference) -> tuple[torch.dtype, Weights]:
    """What to compute in, and the weights in it; ``"auto"`` stays with the module's own where another does not do.

    Args:
        model: for its name.
        core: a backbone in the module's own type.
        precision: one of :data:`PRECISIONS`.
        reference: from :func:`reference_of`.

    Raises:
        ValueError: the backbone does not run in the precision asked for, or gives other values.
    """
    own, dtype = reference.images.dtype, _dtype(precision, reference.images)
    if dtype == own:
        return own, core.weights
    weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in core.weights.items()}
    try:
        values, _ = _values_and_gradient(lambda images: core.apply(weights, images), reference.images.to(dtype))
        if wrong := _difference(values, reference.values, _BFLOAT16_TOLERANCE):
            raise ValueError(wrong)
    except Exception as error:  # a model fails in another type in as many ways as there are models
        if precision != "auto":
            raise ValueError(f"{model.name} does not run in {precision}: {first_line(error)}") from error
        return own, core.weights
    return dtype, weights


def _dtype(precision: str, example: Tensor) -> torch.dtype:
    """What to compute in, for a model that takes such an example."""
    if precision != "auto":
        return getattr(torch, precision)
    fast = False
    if example.device.type == "cuda":
        fast = torch.cuda.get_device_capability(example.device) >= (8, 0)
    elif example.device.type == "cpu":
        # Of torch's own, without a public name; a torch that has them no more computes in float32.
        asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        fast = any(getattr(torch.cpu, ask, bool)() for ask in asks)
    return torch.bfloat16 if fast and example.dtype == torch.float32 else example.dtype


def _values_and_gradient(
    apply: Callable[[Tensor], dict[str, Tensor]], images: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The layers' outputs, and the gradient to the images of a fixed mixture of all their values."""
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        values = apply(images)
        mixed = sum((wave(v.numel()).to(v).reshape(v.shape) * v).sum() for v in values.values())
        gradient = torch.zeros_like(images)
        if isinstance(mixed, Tensor) and mixed.requires_grad:
            gradient = torch.autograd.grad(mixed, images, allow_unused=True, materialize_grads=True)[0]
    return {path: value.detach() for path, value in values.items()}, gradient.detach()


def _tolerance(dtype: torch.dtype) -> float:
    return max(_TOLERANCE, _ULPS * torch.finfo(dtype).eps)


def _difference(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 0.0) -> str:
    """What is wrong with some layers' values, beyond rounding and the tolerance; empty if nothing is."""
    for path, expected in truth.items():
        same = found[path].isfinite() == expected.isfinite()
        error = torch.where(expected.isfinite(), found[path].double() - expected.double(), 0.0).abs().max()
        largest = torch.where(expected.isfinite(), expected.double(), 0.0).abs().max().clamp_min(1e-12)
        if not bool(same.all() & (error <= max(tolerance, _tolerance(expected.dtype)) * largest)):
            return f"the values of layer {path!r} differ by {float(error / largest):.2g}"
    return ""
