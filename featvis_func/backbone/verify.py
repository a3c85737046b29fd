"""Check that a truncated backbone computes what the module computes, as a graph and in another precision.

The reference is the module itself, run once with hooks on a few example images.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featvis_func.backbone.forward_pass import keeping_random_state
from featvis_func.backbone.hooks import Backbone, catch, wave
from featvis_func.backbone.layers import LayerRef
from featvis_func.models import Model
from featvis_func.types import Weights
from featvis_func.validation import first_line, warn_caller

# How much an exported graph may differ from the module, relative to the largest activation: in float32, and in units in
# the last place for less precise types.
_TOLERANCE = 1e-3
_ULPS = 16
# In bfloat16, whose rounding errors add up over the layers of a network.
_BFLOAT16_TOLERANCE = 0.1
# For the gradient, relative to its norm; looser, since rounding can switch a ReLU or a maximum.
_GRADIENT_TOLERANCE = 5e-2

PRECISIONS = ("auto", "float32", "bfloat16")
"""The precisions of a backbone. ``"auto"`` is bfloat16 for a float32 model on a device that has it in hardware (CUDA
from compute capability 8; CPUs with AMX or AVX-512 BF16), else the model's own dtype."""


def exact_float32() -> AbstractContextManager[None]:
    """Compute in float32 without TF32, which convolutions on CUDA use by default, for the time of the block.

    TF32 has 10 bits of mantissa: a graph whose batch norms are folded differs by up to 6% from one whose are not,
    although both are right.
    """
    return float32_precision("ieee")


@contextmanager
def float32_precision(name: str) -> Iterator[None]:
    """Compute in float32 in one of torch's ways, ``"ieee"`` or ``"tf32"``, for the time of the block."""
    backends: Any = torch.backends
    kinds = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = name
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


class Reference(NamedTuple):
    """What the module itself computes for some images; layers by their full names."""

    images: Tensor
    values: dict[str, Tensor]
    fewer: dict[str, Tensor]
    """The values of all images but the last, run without it."""
    gradient: Tensor
    """The gradient of a fixed mixture of all values with respect to the images."""
    random: bool
    """Whether the module has drawn random numbers."""


def reference_of(module: nn.Module, calls: Mapping[LayerRef, int], images: Tensor) -> Reference:
    """Run the module with hooks.

    Args:
        module: in evaluation mode.
        calls: layer -> how often one forward pass calls it.
        images: at least 2, different ones.

    Raises:
        ValueError: the module cannot be differentiated, or does not call a layer as often for fewer images.
    """

    def apply(images: Tensor) -> dict[str, Tensor]:
        with catch(module, calls, stop=True) as caught:
            module(images)
        return caught

    def run() -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        values, gradient = _in_autograd(apply, images)
        with torch.no_grad():
            return values, gradient, apply(images[:-1])

    try:
        (values, gradient, fewer), drew = keeping_random_state(run)
    except ValueError:
        raise
    except Exception as error:  # the forward pass alone has run before
        raise ValueError(f"{type(module).__name__} cannot be differentiated: {first_line(error)}") from error
    return Reference(images, values, fewer, gradient, drew)


def check_outputs(model: Model, paths: dict[str, str], reference: Reference) -> None:
    """Raise ValueError if a layer's output has no channels; warn if it depends on the other images of the batch.

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
        if not 1 <= value.ndim - 1 <= 4:
            raise ValueError(
                f"layer {name!r} gives {tuple(value.shape[1:]) or 'one number'} per image, which has no channels;"
                f" expected (c, t, h, w), (c, h, w), (t, d) or (d,)"
            )
        if _difference({name: fewer}, {name: value[:-1]}):
            warn_caller(
                f"layer {name!r} of {model.name} depends on the other images of its batch or on random numbers: a"
                f" filter's image will depend on the filters rendered with it, and differ from run to run"
            )


def find_mismatch(core: Backbone, reference: Reference) -> str:
    """Describe how a backbone's values or gradient differ from the module's; empty if they agree.

    The backbone is differentiated by ``torch.func``, as in a step.
    """

    def run() -> tuple[dict[str, Tensor], Tensor]:
        if reference.random:
            torch.rand(())  # with the random numbers of the reference, the values could agree by chance
        return _in_torch_func(lambda images: core.apply(core.weights, images), reference.images)

    (values, gradient), _ = keeping_random_state(run)
    return _mismatch(values, gradient, reference)


def reference_of_graph(core: Backbone, reference: Reference) -> Reference:
    """Return a reference for the layers of a backbone that computes what the module computes: for two of its images.

    All of them have shown that it does.
    """
    images = reference.images[:2]

    def apply(images: Tensor) -> dict[str, Tensor]:
        return core.apply(core.weights, images)

    (values, gradient), _ = keeping_random_state(lambda: _in_torch_func(apply, images))
    with torch.no_grad():
        fewer = apply(images[:-1])
    return reference._replace(images=images, values=values, fewer=fewer, gradient=gradient)


def compare(module: nn.Module, calls: Mapping[LayerRef, int], reference: Reference) -> str:
    """Describe how the values or the gradient of a changed module differ from the reference; empty if they agree."""
    changed = reference_of(module, calls, reference.images)
    return _mismatch(changed.values, changed.gradient, reference)


def _mismatch(values: dict[str, Tensor], gradient: Tensor, reference: Reference) -> str:
    if difference := _difference(values, reference.values):
        return difference
    expected = reference.gradient
    error = (gradient - expected).double().norm() / expected.double().norm().clamp_min(1e-12)
    near = bool(error <= max(_GRADIENT_TOLERANCE, _tolerance(expected.dtype)))
    if bool(expected.isfinite().all()) and not near:
        return f"the gradient differs from the module's by {float(error):.2g} of its norm"
    return ""


def in_precision(model: Model, core: Backbone, precision: str, reference: Reference) -> tuple[torch.dtype, Weights]:
    """The dtype to compute in, and the weights in it; ``"auto"`` keeps the module's own dtype where bfloat16 fails.

    Args:
        model: for its name.
        core: a backbone in the module's own dtype.
        precision: one of :data:`PRECISIONS`.
        reference: from :func:`reference_of`.

    Raises:
        ValueError: the backbone does not run in the precision asked for, or its values differ too much.
    """
    own, dtype = reference.images.dtype, _dtype(precision, reference.images)
    if dtype == own:
        return own, core.weights
    weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in core.weights.items()}
    try:
        images = reference.images.to(dtype)
        (values, _), _ = keeping_random_state(lambda: _in_torch_func(lambda x: core.apply(weights, x), images))
        if difference := _difference(values, reference.values, _BFLOAT16_TOLERANCE):
            raise ValueError(difference)
    except Exception as error:  # whatever a model raises in a dtype that it was not written for
        if precision != "auto":
            raise ValueError(f"{model.name} does not run in {precision}: {first_line(error)}") from error
        kept = str(own).removeprefix("torch.")
        warn_caller(
            f"{model.name} runs in {kept}, slower than in bfloat16, in which it cannot: {first_line(error)};"
            f" precision={kept!r} says so without a warning"
        )
        return own, core.weights
    return dtype, weights


def _dtype(precision: str, example: Tensor) -> torch.dtype:
    """Return the dtype to compute in, for a model that takes images such as the example."""
    if precision != "auto":
        return getattr(torch, precision)
    fast = False
    if example.device.type == "cuda":
        fast = torch.cuda.get_device_capability(example.device) >= (8, 0)
    elif example.device.type == "cpu":
        # Private functions of torch; a version without them computes in float32.
        queries = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        fast = any(getattr(torch.cpu, query, bool)() for query in queries)
    return torch.bfloat16 if fast and example.dtype == torch.float32 else example.dtype


def _mixture(values: dict[str, Tensor]) -> Tensor:
    """A fixed mixture of all values of all layers."""
    return torch.stack([(wave(v.numel()).to(v).reshape(v.shape) * v).sum() for v in values.values()]).sum()


def _in_torch_func(apply: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the layers' outputs, and the gradient of their mixture to the images, by ``torch.func``."""

    def mixed(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        values = apply(images)
        return _mixture(values), values

    with torch.enable_grad():
        gradient, values = torch.func.grad(mixed, has_aux=True)(images)
    return {path: value.detach() for path, value in values.items()}, gradient.detach()


def _in_autograd(apply: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the layers' outputs, and the gradient of their mixture to the images, by ordinary autograd."""
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        values = apply(images)
        mixed = _mixture(values)
    gradient = torch.zeros_like(images)
    if mixed.requires_grad:
        try:
            (gradient,) = torch.autograd.grad(
                mixed, images, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        except RuntimeError:  # of a checkpoint that insists on `backward`
            mixed.backward()
            gradient = gradient if images.grad is None else images.grad
    return {path: value.detach() for path, value in values.items()}, gradient.detach()


def _tolerance(dtype: torch.dtype) -> float:
    return max(_TOLERANCE, _ULPS * torch.finfo(dtype).eps)


def _difference(values: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float = 0.0) -> str:
    """Describe how some layers' values differ beyond rounding and the tolerance; empty if they agree."""
    for path, expected in reference.items():
        same = values[path].isfinite() == expected.isfinite()
        error = torch.where(expected.isfinite(), values[path].double() - expected.double(), 0.0).abs().max()
        largest = torch.where(expected.isfinite(), expected.double(), 0.0).abs().max().clamp_min(1e-12)
        if not bool(same.all() & (error <= max(tolerance, _tolerance(expected.dtype)) * largest)):
            return f"the values of layer {path!r} differ by {float(error / largest):.2g}"
    return ""
