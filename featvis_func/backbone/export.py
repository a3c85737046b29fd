"""The fast road: a module as a pure graph, traced by ``torch.export`` and cut behind the last of some layers."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from featvis_func.backbone.graph_passes import optimise, prune
from featvis_func.backbone.hooks import Backbone, catch
from featvis_func.backbone.layers import LayerRef
from featvis_func.backbone.redirected_relu import redirect_graph
from featvis_func.types import Weights


class _Probe(nn.Module):
    """What is exported: a forward pass that returns what was caught on the way.

    It runs to the end, because torch.export loses its place when an exception ends the pass; once in-place operations
    are gone from the graph, what follows the layers is dead code.
    """

    def __init__(self, module: nn.Module, calls: Mapping[LayerRef, int]) -> None:
        super().__init__()
        self.module = module
        self.calls = calls

    def forward(self, images: Tensor) -> list[Tensor]:
        with catch(self.module, self.calls, stop=False) as caught:
            self.module(images)
        return [caught[ref.path] for ref in self.calls]


class Traced(NamedTuple):
    """A module's forward pass as a graph that returns some layers' outputs. Make one with :func:`trace`."""

    root: nn.Module
    """What else the graph refers to."""
    graph: fx.Graph
    weights: Weights
    """Placeholder's name -> tensor."""
    held: dict[str, str]
    """Placeholder's name -> name in the module."""
    layers: tuple[str, ...]
    """Full names, in the order of the graph's outputs."""
    cpu: bool


def trace(module: nn.Module, calls: Mapping[LayerRef, int], example: Tensor) -> Traced:
    """Traces a module, up to the last of some layers, into a graph whose placeholders are its weights and the images.

    Args:
        module: in evaluation mode.
        calls: layer -> how often one forward pass calls it.
        example: images ``(n, c, h, w)``, ``n`` at least 2; the graph takes any number of them.

    Returns:
        What :func:`truncate` takes; it holds memory that only :func:`release` frees.

    Raises:
        Exception: of any kind, where torch.export cannot trace the module.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export, about code that is not ours
        program = torch.export.export(
            _Probe(module, calls).eval(), (example,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False
        )
        _drop_rest(program.graph_module)
        program = program.run_decompositions({})
    graph, signature = program.graph_module.graph, program.graph_signature
    if len(graph.output_node().args[0]) != len(calls):  # type: ignore[arg-type]
        raise ValueError("the forward pass writes to its input, or to what the module holds")
    held: dict[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    values: dict[str, Any] = {**program.constants, **program.state_dict}
    weights = {node: values[name].detach() for node, name in held.items()}
    names = {node: name.removeprefix("module.") for node, name in held.items()}
    prune(graph)
    paths = tuple(ref.path for ref in calls)
    return Traced(program.graph_module, graph, weights, names, paths, example.device.type == "cpu")


def _drop_rest(whole: fx.GraphModule) -> None:
    """Removes what runs after the layers: these are copies, on which nothing later can write, so it is not needed.

    Half of the time of tracing goes into making a graph pure; it is the time of this half that is saved.
    """
    graph = whole.graph
    *body, output = graph.nodes
    for node in reversed(body):
        if node.op == "placeholder" or node in output.all_input_nodes:
            break
        graph.erase_node(node)
    whole.recompile()


def truncate(traced: Traced, layers: Sequence[str], *, optimize: bool = True) -> Backbone:
    """A traced module as a function, computed no further than some of the layers that it was traced for.

    Args:
        traced: left as it is.
        layers: some of ``traced.layers``.
        optimize: whether to rewrite the graph to run faster, which changes its values by rounding.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    outputs = graph.graph_copy(traced.graph, copies)
    assert isinstance(outputs, tuple | list)
    graph.output(tuple(outputs[traced.layers.index(path)] for path in layers))
    weights = {new.name: traced.weights[old.name] for old, new in copies.items() if old.name in traced.weights}
    held = {new.name: traced.held[old.name] for old, new in copies.items() if old.name in traced.held}
    prune(graph)
    if optimize:
        optimise(graph, weights, held, cpu=traced.cpu)
    # In the order in which the graph takes them; under the module's own names, where they have one.
    taken = [node.name for node in graph.nodes if node.op == "placeholder" and node.name in held]
    names = [held[name] for name in taken]
    arranged = _arranged if optimize else Tensor.detach
    own = {name: arranged(weights[node]) for name, node in zip(names, taken, strict=True) if node in weights}

    def backbone(graph: fx.Graph) -> Callable[..., dict[str, Tensor]]:
        call = fx.GraphModule(traced.root, graph)
        _forget(graph)

        def apply(weights: Weights, images: Tensor, *redirect: Tensor) -> dict[str, Tensor]:
            if optimize and images.ndim == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            given = (weights[name] if name in own else weights.get(name) for name in names)
            return dict(zip(layers, call(*given, images, *redirect), strict=True))

        return apply

    redirected = backbone(redirect_graph(graph))  # of the graph as it is rewritten: both take the same weights
    return Backbone(backbone(graph), own, redirected, tuple(name for name in names if name not in own))


def release(traced: Traced) -> None:
    """Breaks the cycle that tracing leaves behind, which runs through C++ and which gc cannot see.

    The shape environment holds the traced inputs, whose symbolic sizes hold the shape environment.
    """
    for node in traced.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        environment = getattr(mode, "shape_env", None)
        if environment is not None:
            environment.tracked_fakes = None
            getattr(environment, "fake_tensor_cache", {}).clear()
    _forget(traced.graph)
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()  # keyed by the environment, too


def _forget(graph: fx.Graph) -> None:
    for node in graph.nodes:
        node.meta.clear()


def _arranged(weight: Tensor) -> Tensor:
    """Kernels in the layout in which convolutions run fastest; the values are the same."""
    return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight
