"""The model as a function: ``(weights, images) -> activations``, computed no further than the layers asked for.

The module is traced by ``torch.export`` up to the last of the layers, which gives a pure graph without hooks; it runs
eagerly, under ``torch.func`` and inside ``torch.compile(fullgraph=True)``. The user's module is never changed: the work
is done on a copy of its structure that shares its tensors.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call

from featvis_func.models import Model, suggest
from featvis_func.types import Weights

# An exported graph must agree with the module to this, relative to the largest activation.
_TOLERANCE = 1e-3
# A layer with at least this share of exact zeros is taken for rectified; a convolution has next to none.
_SILENT = 0.01


class Features(NamedTuple):
    """A truncated, frozen backbone. Make one with :func:`make_features`."""

    apply: Callable[[Weights, Tensor], dict[str, Tensor]]
    """(weights, images ``(n, c, h, w)`` as the module wants them) -> layer name as asked for -> ``(n, ...)``."""
    weights: Weights
    """The tensors that the layers depend on, detached; where nothing had to be rearranged, the module's own."""
    shapes: dict[str, tuple[int, ...]]
    """Layer name as asked for -> shape of its output for one image."""
    paths: dict[str, str]
    """Layer name as asked for -> its full name."""
    rectified: dict[str, bool]
    """Layer name as asked for -> whether its output is exactly zero in places, as behind a ReLU, so that a filter may
    have no gradient."""
    exported: bool
    """False: runs through a hook, because ``torch.export`` could not trace the module; such features do not compile."""


class Layer(NamedTuple):
    """One line of :func:`list_layers`."""

    name: str
    type: str
    shape: tuple[int, ...] | None
    """Of the output for one image; ``None`` where the module is not called or returns no tensor."""
    filters: int | None


class _Caught(Exception):  # noqa: N818 - a signal, not an error
    """All layers are caught; the rest of the forward pass is not needed."""


def make_features(
    model: Model, layers: Sequence[str], *, device: torch.device | str | None = None, verify: bool = True
) -> Features:
    """Truncates a model behind the last of some layers.

    A layer means its module's own output, in evaluation mode, at its last call; an in-place operation that follows does
    not count. Hooks that the user attached are neither run nor removed.

    Args:
        model: see :func:`~featvis_func.models.load_model`.
        layers: names from ``named_modules()``; a unique ending is enough.
        device: where to compute. Default: where the module is.
        verify: compare the truncated graph with the module once.

    Returns:
        A :class:`Features`. Where the module cannot be exported it goes through a hook and says so by a warning.

    Raises:
        ValueError: an unknown or ambiguous layer, one that the forward pass does not call, or one whose output has no
            channels; or a forward pass that fails on an image of the model's size.

    >>> from featvis_func.models import load_model
    >>> make_features(load_model("texturenet"), ["head"]).shapes["head"][0] >= 24
    True
    """
    paths = {name: resolve_layer(model.module, name) for name in layers}
    if not paths:
        raise ValueError("no layers were asked for")
    module = _private_copy(model.module, device)
    example = _example(model, module)
    calls = _count_calls(model, module, list(paths.values()), example)
    by_hook = _hook_features(module, calls)
    with torch.no_grad():
        truth = by_hook.apply(by_hook.weights, example)
    shapes = {name: tuple(truth[path].shape[1:]) for name, path in paths.items()}
    rectified = {name: bool((truth[path] == 0).double().mean() > _SILENT) for name, path in paths.items()}
    for name, shape in shapes.items():
        if not 1 <= len(shape) <= 3:
            raise ValueError(
                f"layer {name!r} gives {shape or 'one number'} per image, which has no channels;"
                f" expected (c, h, w), (t, d) or (d,)"
            )
    try:
        core = _export(module, calls, example)
        if verify:
            with torch.no_grad():
                _compare(core.apply(core.weights, example), truth)
    except Exception as error:
        # torch.export fails in as many ways as there are models; any of them means the other road.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"{model.name} runs through a hook, slower and without torch.compile: torch.export says: {reason[:200]}",
            stacklevel=2,
        )
        core = by_hook

    def apply(weights: Weights, images: Tensor) -> dict[str, Tensor]:
        found = core.apply(weights, images)
        return {name: found[path] for name, path in paths.items()}

    return Features(apply, core.weights, shapes, paths, rectified, core.exported)


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
    names = [n for n, _ in module.named_modules() if n]
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

    module = _private_copy(model.module, None)
    names = {m: n for n, m in module.named_modules(remove_duplicate=True) if n}
    shapes: dict[str, tuple[int, ...]] = {}

    def note(child: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim > 0:
            shapes[names[child]] = tuple(output.shape[1:])

    for child in names:
        child.register_forward_hook(note)
    _forward(model, module, _example(model, module)[:1])
    return [
        Layer(
            name,
            type(child).__name__,
            shape := shapes.get(name),
            shape[feature_axis(shape)] if shape is not None and 1 <= len(shape) <= 3 else None,
        )
        for child, name in names.items()
    ]


def _private_copy(module: nn.Module, device: torch.device | str | None) -> nn.Module:
    """The module's structure anew, in evaluation mode and without hooks; the tensors shared unless they must move."""
    own = {id(t): t for t in (*module.parameters(), *module.buffers())}
    for child in module.modules():
        own.update({id(v): v for v in vars(child).values() if isinstance(v, Tensor)})
    moves = device is not None and any(t.device != torch.device(device) for t in own.values())
    try:
        new = copy.deepcopy(module) if moves else copy.deepcopy(module, dict(own))
    except Exception as error:
        raise ValueError(f"the structure of {type(module).__name__} cannot be copied: {error}") from error
    for child in new.modules():
        child._forward_hooks.clear()
        child._backward_hooks.clear()
        child._backward_pre_hooks.clear()
        for number, hook in list(child._forward_pre_hooks.items()):
            # torch's own, such as weight_norm's, compute the module's weight.
            if not type(hook).__module__.startswith("torch.nn.utils"):
                del child._forward_pre_hooks[number]
    return (new.to(device) if moves else new).eval()


def _example(model: Model, module: nn.Module) -> Tensor:
    """Two different images, as the module wants them: noise, so that no two layers agree by chance."""
    some = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    # A fixed pattern instead of a generator: nothing global is touched.
    count = 2 * model.channels * model.size[0] * model.size[1]
    wave = torch.sin(torch.arange(count, dtype=torch.float64) ** 2 * 0.618034)
    images = wave.reshape(2, model.channels, *model.size)
    return images.to(device=some.device, dtype=some.dtype)


def _forward(model: Model, module: nn.Module, images: Tensor) -> None:
    """A whole forward pass for its side effects on hooks."""
    try:
        with torch.no_grad():
            module(images)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{model.name} fails on an image of {model.channels} x {model.size[0]} x {model.size[1]}: {reason}"
        ) from error


def _count_calls(model: Model, module: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, int]:
    """How often one forward pass calls each layer, so that the last call is known."""
    calls = dict.fromkeys(paths, 0)
    kinds: dict[str, str] = {}

    def counter(path: str) -> Callable[..., None]:
        def count(child: nn.Module, args: Any, output: Any) -> None:
            calls[path] += 1
            if not isinstance(output, Tensor):
                kinds[path] = type(output).__name__

        return count

    handles = [module.get_submodule(path).register_forward_hook(counter(path)) for path in calls]
    try:
        _forward(model, module, images)
    finally:
        for handle in handles:
            handle.remove()
    for path, number in calls.items():
        if path in kinds:
            raise ValueError(f"layer {path!r} gives a {kinds[path]} instead of a tensor, which has no channels")
        if number == 0:
            raise ValueError(f"layer {path!r} is not called in the forward pass, so that it has no output")
    return calls


@contextmanager
def _catch(module: nn.Module, calls: dict[str, int], *, stop: bool) -> Iterator[dict[str, Tensor]]:
    """Catches the layers' outputs within the block; with ``stop`` the block ends once all are caught."""
    left = dict(calls)
    caught: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[..., None]:
        def catch(child: nn.Module, args: Any, output: Tensor) -> None:
            left[path] -= 1
            if left[path] == 0:
                # A copy: an in-place operation that follows would overwrite what was caught.
                caught[path] = output.clone()
                if stop and len(caught) == len(calls):
                    raise _Caught

        return catch

    handles = [module.get_submodule(path).register_forward_hook(hook(path)) for path in calls]
    try:
        yield caught
    except _Caught:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _hook_features(module: nn.Module, calls: dict[str, int]) -> Features:
    """The slow road, which every module can take: a forward pass that stops at the last layer."""

    def apply(weights: Weights, images: Tensor) -> dict[str, Tensor]:
        with _catch(module, calls, stop=True) as caught:
            functional_call(module, weights, (images,))
        return caught

    state = {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}
    return Features(apply, state, {}, {}, {}, False)


class _Probe(nn.Module):
    """What is exported: a forward pass that returns what was caught on the way.

    It runs to the end, because torch.export loses its place when an exception ends the pass; once in-place operations
    are gone from the graph, what follows the layers is dead code.
    """

    def __init__(self, module: nn.Module, calls: dict[str, int]) -> None:
        super().__init__()
        self.module = module
        self.calls = calls

    def forward(self, images: Tensor) -> list[Tensor]:
        with _catch(self.module, self.calls, stop=False) as caught:
            self.module(images)
        return [caught[path] for path in self.calls]


def _export(module: nn.Module, calls: dict[str, int], example: Tensor) -> Features:
    """The fast road: a pure graph whose placeholders are the weights that it needs, and the images."""
    probe = _Probe(module, calls).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export, about code that is not ours
        program = torch.export.export(probe, (example,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
        program = program.run_decompositions({})
    graph, signature = program.graph_module.graph, program.graph_signature
    held = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    values: dict[str, Any] = {**program.constants, **program.state_dict}
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function":
            continue
        if "assert" in str(node.target) or "sym_constrain" in str(node.target):
            graph.erase_node(node)  # checks of the batch size; pure, but not to torch.fx
        elif node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            # Traced for one memory layout, run in another.
            node.target = torch.ops.aten.reshape.default
    graph.eliminate_dead_code()
    names: list[str] = []
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if node.name not in held:
            continue
        if node.users:
            names.append(held[node.name])
        else:
            graph.erase_node(node)
    call = torch.fx.GraphModule(program.graph_module, graph)
    weights = {name: _arranged(values[name].detach()) for name in names}

    def apply(weights: Weights, images: Tensor) -> dict[str, Tensor]:
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return dict(zip(calls, call(*(weights[name] for name in names), images), strict=True))

    return Features(apply, weights, {}, {}, {}, True)


def _arranged(weight: Tensor) -> Tensor:
    """Kernels in the layout in which convolutions run fastest; the values are the same."""
    return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight


def _compare(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    for path, expected in truth.items():
        error = (found[path].double() - expected.double()).abs().max()
        largest = expected.double().abs().max().clamp_min(1e-12)
        if not bool(error <= _TOLERANCE * largest):
            raise ValueError(f"the truncated graph differs from layer {path!r} by {float(error / largest):.2g}")
