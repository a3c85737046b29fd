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

from featvis_func.capture import Backbone, count_calls, example_images, forward_once, hook_backbone, private_copy
from featvis_func.export import export_backbone
from featvis_func.messages import first_line, suggest
from featvis_func.models import Model
from featvis_func.objective import feature_axis
from featvis_func.random import key
from featvis_func.transform import chain, normalize, warp
from featvis_func.types import Weights
from featvis_func.verification import PRECISIONS, Reference, check_outputs, fault, in_precision, reference_of

# torch.export keeps its state in the process: two threads that trace at once disturb each other.
_tracing = threading.RLock()


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
    redirected: Callable[[Weights, Tensor, Tensor], dict[str, Tensor]] | None = None
    """(weights, images, float ``(n,)``) -> what ``apply`` gives; for images with 1 gradients are redirected past
    activations that let none through: see :mod:`featvis_func.redirect`. None where the module is not exported."""


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
        precision: of the weights and the activations, one of :data:`~featvis_func.verification.PRECISIONS`.
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
    images = example_images(model, module)
    calls = count_calls(model, module, list(paths.values()), images)
    reference = reference_of(module, calls, images)
    check_outputs(model, paths, reference)
    shapes = {name: tuple(reference.values[path].shape[1:]) for name, path in paths.items()}
    core, exported = _backbone(model, module, calls, reference, verify)
    dtype, weights = in_precision(model, core, precision, reference)

    def named(run: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        def apply(weights: Weights, images: Tensor, *redirect: Tensor) -> dict[str, Tensor]:
            found = run(weights, images.to(dtype), *redirect)
            return {name: found[path] for name, path in paths.items()}

        return apply

    redirected = None if core.redirected is None else named(core.redirected)
    return Features(named(core.apply), weights, shapes, paths, exported, redirected)


def _backbone(
    model: Model, module: nn.Module, calls: dict[str, int], reference: Reference, verify: bool
) -> tuple[Backbone, bool]:
    """The module as a graph, and True; where there is none that gives the same, through a hook, and False."""
    try:
        core = export_backbone(module, calls, reference.images)
        wrong = fault(core, reference) if verify else ""
        if not wrong:
            return core, True
    except Exception as error:
        # torch.export fails in as many ways as there are models; any of them means the other road.
        wrong = f"{type(error).__name__}: {first_line(error)}"
    warnings.warn(
        f"{model.name} runs through a hook, slower and without torch.compile, since it could not be exported: {wrong}",
        stacklevel=5,
    )
    return hook_backbone(module, calls), False


def activations_of(
    model: Model, layers: Sequence[str], image: Tensor, *, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """What some layers make of an image: the reference of :func:`~featvis_func.objective.inversion` and the like.

    Args:
        model: from :func:`~featvis_func.models.load_model`.
        layers: names of layers, or unique ends of names.
        image: float ``(c, h, w)`` in ``[0, 1]``; brought to the model's input size.
        device: where to compute. Default: where the model is.

    Returns:
        layer, by the name given -> its activations, without a gradient.

    Raises:
        ValueError: an unknown layer, or an image of another form.

    >>> from featvis_func.models import load_model
    >>> activations_of(load_model("texturenet"), ["head"], torch.rand(3, 50, 70))["head"].shape
    torch.Size([32])
    """
    if image.ndim != 3 or image.shape[0] != model.channels or not image.is_floating_point():
        raise ValueError(
            f"expected an image ({model.channels}, h, w) of floats in [0, 1], got {tuple(image.shape)} {image.dtype}"
        )
    features = make_features(model, layers, device=device, precision="float32")
    where = next((w.device for w in features.weights.values()), image.device)
    view = chain(warp(size=model.size), normalize(model.mean, model.std, device=where))
    image = image.detach().to(where, torch.float32)
    with torch.no_grad():
        seen = view.apply(image, view.draw(key(0, device=where)))
        return {name: values[0].float() for name, values in features.apply(features.weights, seen[None]).items()}


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
