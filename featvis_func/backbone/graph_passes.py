"""Passes over a traced graph that make it run faster, with the same values and gradients up to rounding."""

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from featvis_func.backbone.hardware import Convolution, Specialization
from featvis_func.types import Weights

_aten = torch.ops.aten


class _ConvNode(NamedTuple):
    """A ``conv2d`` node of a graph and its arguments."""

    node: fx.Node
    images: fx.Node
    kernel: fx.Node
    bias: fx.Node | None
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int


def optimize(graph: fx.Graph, weights: Weights, names: dict[str, str], special: Specialization) -> None:
    """Rewrite a graph in place; its values and gradients change by rounding only.

    Args:
        graph: of functional aten operations, with the traced shapes in ``meta["val"]`` of its nodes.
        weights: placeholder's name -> tensor; changed in place.
        names: placeholder's name -> name in the module; changed in place. Names without a tensor in ``weights`` belong
            to packed weights, which may be ``None``.
        special: the faster code of the device that will run the graph.
    """
    _fold_batch_norm(graph, weights, names)
    prune(graph)
    _move_relu_behind_pool(graph)
    _use_in_place_relu(graph)
    _merge_siblings(graph, weights, names)
    _replace_convolutions(graph, weights, names, special)
    for node in graph.nodes:
        node.target = special.replace_operation.get(node.target, node.target)


def prune(graph: fx.Graph) -> None:
    """Remove dead code, run-time checks, and views, which would require one memory layout."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function":
            continue
        if "assert" in str(node.target) or "sym_constrain" in str(node.target):
            graph.erase_node(node)  # a check of the batch size, which is no dead code for torch.fx
        elif node.target in (_aten.view.default, _aten._unsafe_view.default):
            node.target = _aten.reshape.default  # the graph may run in another memory layout than it was traced in
    # Every operation is pure here; by default torch.fx keeps those that could draw random numbers, such as attention.
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    for node in [n for n in graph.nodes if n.op == "placeholder" and not n.users]:
        if node.name != "images":
            graph.erase_node(node)


def _convolutions(graph: fx.Graph) -> Iterator[_ConvNode]:
    """Iterate over the convolutions of batches of images."""
    defaults: tuple[Any, ...] = (None, None, None, (1, 1), (0, 0), (1, 1), 1)
    for node in [n for n in graph.nodes if n.target == _aten.conv2d.default]:
        traced = node.meta.get("val")
        if traced is not None and traced.ndim == 4:
            images, kernel, bias, *settings, groups = (*node.args, *defaults[len(node.args) :])
            stride, padding, dilation = (s if isinstance(s, str) else _pair(s) for s in settings)
            yield _ConvNode(node, images, kernel, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]


def _pair(sides: Any) -> tuple[int, int]:
    """Return a setting for both axes; a list of one applies to both."""
    return sides[0], sides[-1]


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """Add an argument to the graph, with a name that no other argument has."""
    node = graph.placeholder(name)
    node.target = node.name
    return node


def _fold_batch_norm(graph: fx.Graph, weights: Weights, names: dict[str, str]) -> None:
    """Fold each batch norm that directly follows a convolution into that convolution, in float64."""
    for norm in [n for n in graph.nodes if n.target == _aten._native_batch_norm_legit_no_training.default]:
        conv, gamma, beta, mean, var, _, eps = norm.args
        kernel, bias = (*conv.args, None)[1:3] if conv.target == _aten.conv2d.default else (None, None)
        if kernel is None or len(conv.users) > 1 or len(kernel.users) > 1 or (bias is not None and len(bias.users) > 1):
            continue
        if any(n is not None and n.name not in weights for n in (kernel, bias, gamma, beta, mean, var)):
            continue  # computed in the graph, as by weight_norm
        scale = 1 / torch.sqrt(weights[var.name].double() + eps)
        if gamma is not None:
            scale = scale * weights[gamma.name].double()
        shift = -weights[mean.name].double()
        if bias is not None:
            shift = shift + weights[bias.name].double()
        shift = shift * scale
        if beta is not None:
            shift = shift + weights[beta.name].double()
        old = weights[kernel.name]
        weights[kernel.name] = (old.double() * scale[:, None, None, None]).to(old.dtype)
        if bias is None:
            with graph.inserting_before(kernel):
                bias = _placeholder(graph, f"{kernel.name}_folded_bias")
            names[bias.name] = f"{names[kernel.name]}.folded_bias"
        weights[bias.name] = shift.to(old.dtype)
        conv.args = (*conv.args[:2], bias, *conv.args[3:])
        for output in list(norm.users):  # getitem 0: the values; the statistics are not used in evaluation mode
            if output.args[1] == 0:
                output.replace_all_uses_with(conv)


def _move_relu_behind_pool(graph: fx.Graph) -> None:
    """Move each ReLU that precedes a max pool behind it, where it has fewer values; result and gradient stay equal."""
    for pool in graph.nodes:
        relu = pool.args[0] if pool.target == _aten.max_pool2d.default else None
        if relu is not None and relu.target == _aten.relu.default and len(relu.users) == 1:
            pool.replace_input_with(relu, relu.args[0])
            pool.replace_all_uses_with(relu)
            pool.append(relu)
            relu.args = (pool,)
            relu.meta = dict(pool.meta)


def _use_in_place_relu(graph: fx.Graph) -> None:
    """Run each ReLU in place, if no other node reads its input: the backward pass keeps one tensor less."""
    fresh = (_aten.conv2d.default, _aten.add.Tensor, _aten.cat.default, _aten.max_pool2d.default)
    for node in graph.nodes:
        if node.target == _aten.relu.default and node.args[0].target in fresh and len(node.args[0].users) == 1:
            node.target = _aten.relu_.default


def _merge_siblings(graph: fx.Graph, weights: Weights, names: dict[str, str]) -> None:
    """Merge 1 x 1 convolutions of one tensor, each with a ReLU: the tensor is read once, its gradient written once."""
    siblings: dict[fx.Node, list[fx.Node]] = {}
    for conv in _convolutions(graph):
        users = list(conv.node.users)
        if (
            conv.bias is not None
            and all(n.name in weights and len(n.users) == 1 for n in (conv.kernel, conv.bias))
            and weights[conv.kernel.name].shape[2:] == (1, 1)
            and (conv.stride, conv.padding, conv.dilation, conv.groups) == ((1, 1), (0, 0), (1, 1), 1)
            and [user.target for user in users] == [_aten.relu_.default]
        ):
            siblings.setdefault(conv.images, []).append(conv.node)
    for images, convs in siblings.items():
        if len(convs) == 1:
            continue
        _, kernels, biases = zip(*(conv.args[:3] for conv in convs), strict=True)
        widths = [len(weights[kernel.name]) for kernel in kernels]
        for first, *others in (kernels, biases):
            weights[first.name] = torch.cat([weights[n.name] for n in (first, *others)])
            names[first.name] = "+".join(names[n.name] for n in (first, *others))
        with graph.inserting_before(convs[0]):
            merged = graph.call_function(_aten.conv2d.default, (images, kernels[0], biases[0]))
            merged = graph.call_function(_aten.relu_.default, (merged,))
            merged.meta["merged"] = True  # for redirect_graph
            parts = graph.call_function(_aten.split_with_sizes.default, (merged, widths, 1))
            parts = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(convs))]
        for conv, part in zip(convs, parts, strict=True):
            (relu,) = conv.users
            relu.replace_all_uses_with(part)
            graph.erase_node(relu)
            graph.erase_node(conv)
        for unused in (*kernels[1:], *biases[1:]):
            graph.erase_node(unused)


def _replace_convolutions(graph: fx.Graph, weights: Weights, names: dict[str, str], special: Specialization) -> None:
    """Replace the convolutions for which the device has a faster function."""
    packed: dict[fx.Node, list[fx.Node]] = {}
    for conv in _convolutions(graph):
        kernel = conv.kernel
        if kernel.name not in weights:
            continue  # computed in the graph, as by weight_norm
        choice = special.replace_convolution(
            Convolution(weights[kernel.name], conv.stride, conv.padding, conv.dilation, conv.groups)
        )
        if choice is None:
            continue
        function, arguments, forms = choice
        if kernel not in packed:
            with graph.inserting_before(kernel):
                packed[kernel] = [_placeholder(graph, f"{kernel.name}_{form}") for form in forms]
            for form, node in zip(forms, packed[kernel], strict=True):
                names[node.name] = f"{names[kernel.name]}.{form}"
        conv.node.target = function
        conv.node.args = (conv.images, kernel, conv.bias, *arguments, *packed[kernel])
        conv.node.meta["dense"] = True  # for redirect_graph
