"""The traced graph, rewritten to do the same in less time."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from featvis_func.cpu import ops, winograd
from featvis_func.types import Weights

_aten = torch.ops.aten

# Of conv2d: images, kernel, bias, stride, padding, dilation, groups.
_CONV_DEFAULTS: tuple[Any, ...] = (None, None, None, (1, 1), (0, 0), (1, 1), 1)


def optimise(graph: fx.Graph, weights: Weights, held: dict[str, str], *, cpu: bool) -> None:
    """Rewrites a graph in place; its values and gradients change by rounding alone.

    Args:
        graph: of aten operations, without in-place ones, whose nodes tell shapes in ``meta["val"]``.
        weights: placeholder's name -> tensor; changed in place.
        held: placeholder's name -> name in the module; changed in place. Of those that come without weights, see
            :func:`~featvis_func.cpu.winograd.add_packed_weights`; they can be ``None``.
        cpu: whether it will run on one, where some rewrites were measured.
    """
    _fold_batch_norm(graph, weights, held)
    prune(graph)
    _rectify_late(graph)
    _rectify_in_place(graph)
    if cpu:
        _use_strided_stem(graph, weights)
        _merge_siblings(graph, weights, held)
        _use_winograd(graph, weights, held)
        _keep_pools_whole(graph)


def prune(graph: fx.Graph) -> None:
    """Removes what the layers do not depend on, and ties to one memory layout."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function":
            continue
        if "assert" in str(node.target) or "sym_constrain" in str(node.target):
            graph.erase_node(node)  # checks of the batch size, which torch.fx would keep
        elif node.target in (_aten.view.default, _aten._unsafe_view.default):
            node.target = _aten.reshape.default  # traced for one memory layout, run in another
    # Everything here is pure; torch.fx by itself would keep what could draw random numbers, such as attention.
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    for node in [n for n in graph.nodes if n.op == "placeholder" and not n.users]:
        if node.name != "images":
            graph.erase_node(node)


def _convolutions(graph: fx.Graph) -> Iterator[tuple[fx.Node, list[Any]]]:
    """The convolutions of batches of images, and the arguments of each, where one number for both axes stands twice."""
    for node in [n for n in graph.nodes if n.target == _aten.conv2d.default]:
        traced = node.meta.get("val")
        if traced is not None and traced.ndim == 4:
            *tensors, groups = (*node.args, *_CONV_DEFAULTS[len(node.args) :])
            settings = [s if isinstance(s, str) else [*s] * (2 // len(s)) for s in tensors[3:]]
            yield node, [*tensors[:3], *settings, groups]


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A new argument of the graph, under a name that no other has."""
    node = graph.placeholder(name)
    node.target = node.name
    return node


def _fold_batch_norm(graph: fx.Graph, weights: Weights, held: dict[str, str]) -> None:
    """Folds each batch norm that directly follows a convolution into that convolution, in float64."""
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
            held[bias.name] = f"{held[kernel.name]}.folded_bias"
        weights[bias.name] = shift.to(old.dtype)
        conv.args = (*conv.args[:2], bias, *conv.args[3:])
        for output in list(norm.users):  # getitem 0, the values; the statistics have no use in evaluation
            if output.args[1] == 0:
                output.replace_all_uses_with(conv)


def _rectify_late(graph: fx.Graph) -> None:
    """The maximum of rectified values is the rectified maximum, of which there are fewer; so for the gradients."""
    for pool in graph.nodes:
        relu = pool.args[0] if pool.target == _aten.max_pool2d.default else None
        if relu is not None and relu.target == _aten.relu.default and len(relu.users) == 1:
            pool.replace_input_with(relu, relu.args[0])
            pool.replace_all_uses_with(relu)
            pool.append(relu)
            relu.args = (pool,)
            relu.meta = dict(pool.meta)


def _rectify_in_place(graph: fx.Graph) -> None:
    """A ReLU overwrites what nobody else reads: one tensor less to write, and to hold until the backward pass."""
    fresh = (_aten.conv2d.default, _aten.add.Tensor, _aten.cat.default, _aten.max_pool2d.default)
    for node in graph.nodes:
        if node.target == _aten.relu.default and node.args[0].target in fresh and len(node.args[0].users) == 1:
            node.target = _aten.relu_.default


def _use_strided_stem(graph: fx.Graph, weights: Weights) -> None:
    """A strided convolution of the few channels of an image, as an operation whose gradient takes less time."""
    for node, (images, kernel, bias, stride, padding, dilation, groups) in _convolutions(graph):
        if (
            kernel.name in weights
            and weights[kernel.name].shape[1] <= 4
            and stride[0] == stride[1] > 1
            and not isinstance(padding, str)
            and [*dilation, groups] == [1] * 3
        ):
            node.target = ops.strided_conv2d
            node.args = (images, kernel, bias, stride[0], padding)


def _merge_siblings(graph: fx.Graph, weights: Weights, held: dict[str, str]) -> None:
    """Rectified 1 x 1 convolutions of one tensor, as one: it is read once, and its gradient written once."""
    siblings: dict[fx.Node, list[fx.Node]] = {}
    for node, (images, kernel, bias, *settings) in _convolutions(graph):
        relus = [user for user in node.users if user.target == _aten.relu_.default]
        if (
            bias is not None
            and all(n.name in weights and len(n.users) == 1 for n in (kernel, bias))
            and weights[kernel.name].shape[2:] == (1, 1)
            and settings == [[1, 1], [0, 0], [1, 1], 1]
            and len(relus) == len(node.users) == 1
        ):
            siblings.setdefault(images, []).append(node)
    for images, convs in siblings.items():
        if len(convs) == 1:
            continue
        _, *stacks = zip(*(conv.args[:3] for conv in convs), strict=True)
        widths = [len(weights[kernel.name]) for kernel in stacks[0]]
        for first, *others in stacks:
            weights[first.name] = torch.cat([weights[n.name] for n in (first, *others)])
            held[first.name] = "+".join(held[n.name] for n in (first, *others))
        with graph.inserting_before(convs[0]):
            whole = graph.call_function(_aten.conv2d.default, (images, stacks[0][0], stacks[1][0]))
            whole = graph.call_function(_aten.relu_.default, (whole,))
            whole.meta["merged"] = True  # for redirect_graph
            parts = graph.call_function(_aten.split_with_sizes.default, (whole, widths, 1))
            parts = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(convs))]
        for conv, part in zip(convs, parts, strict=True):
            (relu,) = conv.users
            relu.replace_all_uses_with(part)
            graph.erase_node(relu)
            graph.erase_node(conv)
        for unused in (n for stack in stacks for n in stack[1:]):
            graph.erase_node(unused)


def _use_winograd(graph: fx.Graph, weights: Weights, held: dict[str, str]) -> None:
    """3 x 3 convolutions of many channels, as an operation with fewer multiplications where it is compiled."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, (images, kernel, bias, stride, padding, dilation, groups) in _convolutions(graph):
        if (
            kernel.name not in weights
            or not winograd.pays(weights[kernel.name])
            or [*stride, *dilation, groups] != [1] * 5
            or isinstance(padding, str)
            or max(padding) > 2
        ):
            continue
        if kernel not in found:
            with graph.inserting_before(kernel):
                found[kernel] = [_placeholder(graph, f"{kernel.name}_{form}") for form in winograd.PACKINGS]
            for form, new in zip(winograd.PACKINGS, found[kernel], strict=True):
                held[new.name] = f"{held[kernel.name]}.{form}"
        node.target = winograd.conv2d_3x3
        node.args = (images, kernel, bias, padding, *found[kernel])


def _keep_pools_whole(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target == _aten.max_pool2d.default:
            node.target = ops.max_pool2d
