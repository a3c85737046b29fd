"""Truncate a traced module: from its graph to a function that computes no further than some layers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from featvis_func.backbone.export import Traced
from featvis_func.backbone.graph_passes import optimize as optimize_graph
from featvis_func.backbone.graph_passes import prune
from featvis_func.backbone.hardware import specialization
from featvis_func.backbone.hooks import Backbone
from featvis_func.backbone.redirected_relu import redirect_graph
from featvis_func.backbone.smoothed_pools import smooth_graph
from featvis_func.types import Weights


def truncate(traced: Traced, layers: Sequence[str], *, optimize: bool = True) -> Backbone:
    """Turn a traced module into a function that computes no further than the last of some of its layers.

    Args:
        traced: from :func:`trace`; not changed.
        layers: some of ``traced.layers``.
        optimize: whether to run :func:`featvis_func.backbone.graph_passes.optimize`, which changes rounding.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    outputs = graph.graph_copy(traced.graph, copies)
    assert isinstance(outputs, tuple | list)
    graph.output(tuple(outputs[traced.layers.index(path)] for path in layers))
    tensors = {new.name: traced.weights[old.name] for old, new in copies.items() if old.name in traced.weights}
    names = {new.name: traced.names[old.name] for old, new in copies.items() if old.name in traced.names}
    prune(graph)
    if optimize:
        optimize_graph(graph, tensors, names, specialization(traced.device_type))
    # In the order of the graph's arguments.
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder" and node.name in names]
    arguments = [names[node] for node in placeholders]
    convert = _channels_last if optimize else Tensor.detach
    weights = {names[node]: convert(tensors[node]) for node in placeholders if node in tensors}

    def backbone(graph: fx.Graph) -> Callable[..., dict[str, Tensor]]:
        call = fx.GraphModule(traced.root, graph)
        _clear_meta(graph)

        def apply(given: Weights, images: Tensor, *redirect: Tensor) -> dict[str, Tensor]:
            if optimize and images.ndim == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            tensors = (given[name] if name in weights else given.get(name) for name in arguments)
            return dict(zip(layers, call(*tensors, images, *redirect), strict=True))

        return apply

    # Of the optimised graph: all of them take the same weights.
    redirected, smooth = redirect_graph(graph), redirect_graph(graph)
    smoothed = backbone(smooth) if smooth_graph(smooth, specialization(traced.device_type)) else None
    packed = tuple(name for name in arguments if name not in weights)
    return Backbone(backbone(graph), weights, backbone(redirected), packed, smoothed)


def release(traced: Traced) -> None:
    """Break the reference cycle that tracing leaves behind, which gc cannot see, because it runs through C++.

    The shape environment holds the traced inputs, whose symbolic sizes hold the shape environment. torch's caches of
    its methods hold it too; all threads share them, so that the environment is emptied, and not the caches.
    """
    environments: dict[int, ShapeEnv] = {}
    for node in traced.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        environment = getattr(mode, "shape_env", None)
        if environment is not None:
            environments[id(environment)] = environment
    _clear_meta(traced.graph)
    for environment in environments.values():
        vars(environment).clear()


def _clear_meta(graph: fx.Graph) -> None:
    for node in graph.nodes:
        node.meta.clear()


def _channels_last(weight: Tensor) -> Tensor:
    """Convert a kernel to the memory layout in which convolutions run fastest."""
    return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight
