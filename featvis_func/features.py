"""The model as a function: ``(weights, images) -> activations``, computed no further than the layers asked for.

The module is traced by ``torch.export`` up to the last of the layers, which gives a pure graph without hooks; it runs
eagerly, under ``torch.func`` and inside ``torch.compile(fullgraph=True)``. The user's module is never changed: the work
is done on a copy of its structure that shares its tensors.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featvis_func.capture import (
    Backbone,
    catch,
    count_calls,
    example_images,
    forward_once,
    hook_backbone,
    private_copy,
    wave,
)
from featvis_func.export import export_backbone
from featvis_func.messages import first_line, suggest
from featvis_func.models import Model
from featvis_func.types import Weights

# An exported graph must agree with the module to this, relative to the largest activation: in float32, and in units of
# the last place for types that are coarser than that.
_TOLERANCE = 1e-3
_ULPS = 16
# In bfloat16, whose 8 bits add up over the layers of a network.
_BFLOAT16_TOLERANCE = 0.1
# Its gradient, relative to the gradient's norm; looser, since rounding can tip a rectifier or a maximum.
_GRADIENT_TOLERANCE = 5e-2

# torch.export keeps its state in the process: two threads that trace at once disturb each other.
_tracing = threading.RLock()

PRECISIONS = ("auto", "float32", "bfloat16")
"""What :func:`make_features` can compute in: ``"auto"`` is bfloat16 for a float32 model on a device that has it in
hardware (CUDA from compute capability 8; CPUs with AMX or AVX-512 BF16), else the model's own type."""


class Features(NamedTuple):
    """A truncated, frozen backbone. Make one with :func:`make_features`."""

    apply: Callable[[Weights, Tensor], dict[str, Tensor]]
    """(weights, images ``(n, c, h, w)`` as the module wants them) -> layer name as asked for -> ``(n, ...)``."""
    weights: Weights
    """The tensors that the layers depend on, detached: the module's own, unless folded, rearranged or cast."""
    shapes: dict[str, tuple[int, ...]]
    """Layer name as asked for -> shape of its output for one image."""
    paths: dict[str, str]
    """Layer name as asked for -> its full name."""
    exported: bool
    """False: runs through a hook, because ``torch.export`` could not trace the module; such features do not compile."""


class Layer(NamedTuple):
    """One line of :func:`list_layers`."""

    name: str
    type: str
    shape: tuple[int, ...] | None
    """Of the output for one image; ``None`` where the module is not called or returns no tensor."""
    filters: int | None


def make_features(
    model: Model,
    layers: Sequence[str],
    *,
    device: torch.device | str | None = None,
    precision: str = "auto",
    verify: bool = True,
) -> Features:
    """Truncates a model behind the last of some layers.

    A layer means its module's own output, in evaluation mode, at its last call; an in-place operation that follows does
    not count. Hooks that the user attached are neither run nor removed.

    Args:
        model: see :func:`~featvis_func.models.load_model`.
        layers: names from ``named_modules()``; a unique ending is enough.
        device: where to compute. Default: where the module is.
        precision: of the weights and the activations, one of :data:`PRECISIONS`.
        verify: compare the truncated graph with the module once.

    Returns:
        A :class:`Features`. Where the module cannot be exported it goes through a hook and says so by a warning.

    Raises:
        ValueError: an unknown precision, or one in which the model does not run or gives other values; an unknown or
            ambiguous layer, one that the forward pass does not call, or one whose output has no
            channels; or a forward pass that fails on an image of the model's size.

    >>> from featvis_func.models import load_model
    >>> make_features(load_model("texturenet"), ["head"]).shapes["head"][0] >= 24
    True
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    # What a forward pass draws, or records for gradients, stays in here.
    with _tracing, torch.inference_mode(False), torch.random.fork_rng():
        return _make_features(model, layers, device, precision, verify)


def _make_features(
    model: Model, layers: Sequence[str], device: torch.device | str | None, precision: str, verify: bool
) -> Features:
    paths = {name: resolve_layer(model.module, name) for name in layers}
    if not paths:
        raise ValueError("no layers were asked for")
    module = private_copy(model.module, device)
    example = example_images(model, module)
    calls = count_calls(model, module, list(paths.values()), example)
    plain = _plain(module, calls)
    truth, slope = _values_and_gradient(plain, example)
    with torch.no_grad():
        fewer = plain(example[:-1])
    for name, path in paths.items():
        _check_output(model, name, truth[path], fewer[path], len(example))
    shapes = {name: tuple(truth[path].shape[1:]) for name, path in paths.items()}
    exported = True
    try:
        core = export_backbone(module, calls, example)
        if verify:
            values, gradient = _values_and_gradient(lambda images: core.apply(core.weights, images), example)
            if wrong := _difference(values, truth):
                raise ValueError(wrong)
            error = (gradient - slope).double().norm() / slope.double().norm().clamp_min(1e-12)
            if bool(slope.isfinite().all()) and not bool(error <= max(_GRADIENT_TOLERANCE, _tolerance(example.dtype))):
                raise ValueError(f"the graph has another gradient than the module, by {float(error):.2g}")
    except Exception as error:
        # torch.export fails in as many ways as there are models; any of them means the other road.
        warnings.warn(
            f"{model.name} runs through a hook, slower and without torch.compile, since it could not be exported:"
            f" {type(error).__name__}: {first_line(error)}",
            stacklevel=4,
        )
        core, exported = hook_backbone(module, calls), False

    dtype, weights = _in_precision(model, core, precision, example, truth)

    def apply(weights: Weights, images: Tensor) -> dict[str, Tensor]:
        found = core.apply(weights, images.to(dtype))
        return {name: found[path] for name, path in paths.items()}

    return Features(apply, weights, shapes, paths, exported)


def resolve_layer(module: nn.Module, name: str) -> str:
    """The full name of a layer from a unique ending.

    Args:
        module: the model.
        name: a name from ``named_modules()``, or the end of exactly one. Whole components (``conv`` in ``a.conv``) go
            before parts of one (``4c.conv`` in ``inception4c.conv``).

    Returns:
        The full name.

    Raises:
        ValueError: no layer, or more than one, ends so; the message lists what exists.

    >>> resolve_layer(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh()), "0.0")
    '0.0'
    """
    names = [n for n, _ in module.named_modules(remove_duplicate=False) if n]
    if name in names:
        return name
    for matches in (
        [n for n in names if name and n.endswith("." + name)],
        [n for n in names if name and n.endswith(name)],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            shown = ", ".join(repr(n) for n in matches[:10]) + (", ..." if len(matches) > 10 else "")
            raise ValueError(f"layer {name!r} is ambiguous; it could be {shown}")
    hint = suggest(name, names) or f"; the layers are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    raise ValueError(f"no layer {name!r}{hint}")


def list_layers(model: Model) -> list[Layer]:
    """Every named module with its type, the shape of its output for one image, and its number of filters.

    >>> from featvis_func.models import load_model
    >>> list_layers(load_model("texturenet"))[-1].name
    'head'
    """
    from featvis_func.objective import feature_axis

    module = private_copy(model.module, None)
    names = {m: n for n, m in module.named_modules(remove_duplicate=True) if n}
    shapes: dict[str, tuple[int, ...]] = {}

    def note(child: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim > 0:
            shapes[names[child]] = tuple(output.shape[1:])

    for child in names:
        child.register_forward_hook(note)
    forward_once(model, module, example_images(model, module)[:1])
    return [
        Layer(
            name,
            type(child).__name__,
            shape := shapes.get(name),
            shape[feature_axis(shape)] if shape is not None and 1 <= len(shape) <= 3 else None,
        )
        for child, name in names.items()
    ]


def _plain(module: nn.Module, calls: dict[str, int]) -> Callable[[Tensor], dict[str, Tensor]]:
    def apply(images: Tensor) -> dict[str, Tensor]:
        with catch(module, calls, stop=True) as caught:
            module(images)
        return caught

    return apply


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


def _check_output(model: Model, name: str, value: Tensor, fewer: Tensor, count: int) -> None:
    """Holds one layer's output for some images against that for one image less."""
    if value.shape[0] != count or fewer.shape[0] != count - 1:
        raise ValueError(f"layer {name!r} gives {tuple(value.shape)} for {count} images; expected one entry per image")
    if not 1 <= value.ndim - 1 <= 3:
        raise ValueError(
            f"layer {name!r} gives {tuple(value.shape[1:]) or 'one number'} per image, which has no channels;"
            f" expected (c, h, w), (t, d) or (d,)"
        )
    if _difference({name: fewer}, {name: value[:-1]}):
        warnings.warn(
            f"layer {name!r} of {model.name} depends on the other images of its batch, or on chance: what one filter"
            f" gets is not its own alone, and not the same each time",
            stacklevel=5,
        )


def _in_precision(
    model: Model, core: Backbone, precision: str, example: Tensor, truth: dict[str, Tensor]
) -> tuple[torch.dtype, Weights]:
    """What to compute in, and the weights in it; ``"auto"`` stays with the module's own where another does not do."""
    own, dtype = example.dtype, _dtype(precision, example)
    if dtype == own:
        return own, core.weights
    weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in core.weights.items()}
    try:
        values, _ = _values_and_gradient(lambda images: core.apply(weights, images), example.to(dtype))
        if wrong := _difference(values, truth, _BFLOAT16_TOLERANCE):
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
