"""Trace a module with ``torch.export`` into a pure graph that returns some of its layers."""

import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from featvis_func.backbone.graph_passes import prune
from featvis_func.backbone.hooks import catch
from featvis_func.backbone.layers import LayerRef
from featvis_func.types import Weights
from featvis_func.validation import first_line, suggest

_aten = torch.ops.aten


class _LayerOutputs(nn.Module):
    """The module that is exported: a forward pass that returns the outputs of the layers.

    It runs to the end, because torch.export cannot handle an exception that ends the forward pass early. Once in-place
    operations are gone from the graph, everything that follows the layers is dead code.
    """

    def __init__(self, module: nn.Module, calls: Mapping[LayerRef, int]) -> None:
        super().__init__()
        self.module = module
        self.calls = calls
        self.training = False  # not `eval()`, since parts of the module may be in training mode

    def forward(self, images: Tensor) -> list[Tensor]:
        with catch(self.module, self.calls, stop=False) as caught:
            self.module(images)
        return [caught[ref.path] for ref in self.calls]


class Traced(NamedTuple):
    """A module's forward pass as a graph that returns the outputs of some layers. Make one with :func:`trace`."""

    root: nn.Module
    """The module that holds everything else that the graph refers to."""
    graph: fx.Graph
    weights: Weights
    """Placeholder's name -> tensor."""
    names: dict[str, str]
    """Placeholder's name -> name in the module."""
    layers: tuple[str, ...]
    """Full names, in the order of the graph's outputs."""
    device_type: str
    operations: tuple[LayerRef, ...] = ()
    """The last of the layers: operations inside of modules."""


def trace(
    module: nn.Module, calls: Mapping[LayerRef, int], example: Tensor, operations: Sequence[LayerRef] | None = ()
) -> Traced:
    """Trace a module, up to the last of some layers, into a graph whose placeholders are its weights and the images.

    Args:
        module: in evaluation mode.
        calls: layer -> at which call of its module it is caught.
        example: images ``(n, c, ...)``, ``n`` at least 2; the graph takes any number of them.
        operations: layers that are operations inside of modules, which the layers of ``calls`` must depend on;
            ``None``: all that there are.

    Returns:
        The input of :func:`~featvis_func.backbone.truncate.truncate`. It holds memory that only
        :func:`~featvis_func.backbone.truncate.release` frees.

    Raises:
        UnknownOperationError: the forward pass has no such operation.
        Exception: of any kind, where torch.export cannot trace the module.
    """
    with warnings.catch_warnings(), _isolated_from_other_threads():
        warnings.simplefilter("ignore")  # torch.export warns about code of its own and of the module
        program = torch.export.export(
            _LayerOutputs(module, calls), (example,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False
        )
        if operations is not None and not operations:
            _drop_rest(program.graph_module)
        program = program.run_decompositions({_aten.batch_norm.default: _batch_norm})
    graph, signature = program.graph_module.graph, program.graph_signature
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, tuple | list)
    if len(outputs) != len(calls):
        raise ValueError("the forward pass writes to its input or to the module's own tensors")
    paths, inside = tuple(ref.path for ref in calls), ()
    if operations is None or operations:
        found = _operations(graph)
        chosen = found if operations is None else {ref: _find_operation(ref, found) for ref in operations}
        graph.output_node().args = ((*outputs, *chosen.values()),)
        inside = tuple(chosen)
        paths += tuple(ref.path for ref in inside)
    names: dict[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    values: dict[str, Any] = {**program.constants, **program.state_dict}
    weights = {node: values[name].detach() for node, name in names.items()}
    names = {node: name.removeprefix("module.") for node, name in names.items()}
    prune(graph)
    return Traced(program.graph_module, graph, weights, names, paths, example.device.type, inside)


def why_not_exported(error: Exception) -> str:
    """Say in a few words why a module could not be traced, or its graph not be differentiated."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if error.__cause__ is not None:
        kinds |= {kind.__name__ for kind in type(error.__cause__).__mro__}
    text = str(error)
    if "GuardOnDataDependentSymNode" in kinds or "DataDependentOutputException" in kinds:
        return "its forward pass depends on values, such as by a branch, a loop or a selection of boxes"
    if "ConstraintViolationError" in kinds or getattr(getattr(error, "error_type", None), "name", "") == (
        "CONSTRAINT_VIOLATION"
    ):
        return "its forward pass depends on the number of images"
    if isinstance(error, MismatchError):
        return text
    return f"{type(error).__name__}: {first_line(error)}"


class MismatchError(Exception):
    """A graph computes something else than the module; the message says what."""


class UnknownOperationError(ValueError):
    """A layer's name selects an operation that the forward pass does not have."""


def _operations(graph: fx.Graph) -> dict[LayerRef, fx.Node]:
    """List the operations of a module's own forward pass that give one tensor of floats with an entry per image.

    Those inside of the modules of ``torch.nn`` are left out: there the module's output has a name.
    """
    by_name: dict[LayerRef, list[fx.Node]] = {}
    batch = next(node.meta["val"].shape[0] for node in reversed(graph.nodes) if _is_tensor(node))
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if node.op != "call_function" or not _is_tensor(node) or not stack:
            continue
        value, (module, kind) = node.meta["val"], stack[-1][:2]
        name = getattr(node.target, "_schema", None)
        label = str(kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
        if name is None or label.startswith("torch.nn.modules.") or name.name.split("::")[-1] in _COPIES:
            continue
        if value.is_floating_point() and value.ndim > 1 and str(value.shape[0]) == str(batch):
            # A second call of a module has a number behind its name.
            path = re.sub(r"@\d+", "", module).removeprefix("module").removeprefix(".")
            by_name.setdefault(LayerRef(path, operation=name.name.split("::")[-1]), []).append(node)
    return {
        ref if len(nodes) == 1 else ref._replace(call=number): node
        for ref, nodes in by_name.items()
        for number, node in enumerate(nodes, 1)
    }


# Operations that return what they are given.
_COPIES = ("alias", "clone", "detach", "detach_", "_to_copy", "lift_fresh_copy", "contiguous")


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) and node.meta["val"].ndim > 0


def _find_operation(ref: LayerRef, found: Mapping[LayerRef, fx.Node]) -> fx.Node:
    """The operation that a layer's name selects: of several of one name the last, if it states no number."""
    same = [node for known, node in found.items() if known._replace(call=None) == ref._replace(call=None)]
    number = len(same) if ref.call is None else ref.call
    if same and number <= len(same):
        return same[number - 1]
    near = [known.path for known in found if known.module == ref.module] or [known.path for known in found]
    hint = suggest(ref.path, near) or f"; there are {', '.join(near[:8])}{', ...' if len(near) > 8 else ''}"
    raise UnknownOperationError(f"the forward pass has no operation {ref.path!r}{hint if near else ''}")


def _batch_norm(
    images: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Batch norm as one operation that no backend replaces by its own, which the folding pass would not recognise."""
    if training or mean is None or var is None:
        return _aten._native_batch_norm_legit.no_stats(images, weight, bias, True, momentum, eps)[0]
    return _aten._native_batch_norm_legit_no_training.default(images, weight, bias, mean, var, momentum, eps)[0]


# While it traces, torch.export disables mkldnn, nnpack and cuDNN for the process, so that they do not replace
# operations by their own, and restores the state of the global random generator at the end. Another thread would
# meanwhile compute with other kernels, and draw the same random numbers again. Traces of this module do neither: the
# two functions of torch are wrapped, and the wrappers do nothing in a thread that traces here.
_tracing = threading.local()


def _skip_while_tracing(module: Any, name: str) -> None:
    """Wrap a function that returns a context manager so that it does nothing in a thread that traces here."""
    original = getattr(module, name, None)
    if original is None or hasattr(original, "skipped_while_tracing"):
        return

    def wrapper() -> AbstractContextManager[None]:
        return nullcontext() if getattr(_tracing, "active", False) else original()

    wrapper.skipped_while_tracing = True  # type: ignore[attr-defined]
    setattr(module, name, wrapper)


@contextmanager
def _isolated_from_other_threads() -> Iterator[None]:
    """Context manager in which this thread traces without changing process-wide state that other threads use."""
    import torch._functorch.aot_autograd
    import torch.export._trace

    _skip_while_tracing(torch.export._trace, "_ignore_backend_decomps")
    _skip_while_tracing(torch._functorch.aot_autograd, "preserve_rng_state")
    _tracing.active = True
    try:
        yield
    finally:
        _tracing.active = False


def _drop_rest(program: fx.GraphModule) -> None:
    """Remove what runs after the layers, which cannot change their outputs, because these are copies.

    Half of the time of tracing is spent on making the graph functional; this saves it for the rest of the network.
    """
    graph = program.graph
    *body, output = graph.nodes
    for node in reversed(body):
        if node.op == "placeholder" or node in output.all_input_nodes:
            break
        graph.erase_node(node)
    program.recompile()
