"""Smoothed gradients of strided max pools: those of L2 pools, which go to all positive values of a window.

A max pool passes its gradient to one position of each window, and a strided pool to a few of a layer's positions: the
gradient is rugged, which shows as grain in the image. Pools of stride 1, as in Inception's branches, keep their own,
since other ways pass gradients to all positions beside them. Here the gradient of a window with values ``x``, largest
value ``y`` and gradient ``g`` is that of the root mean square of its positive values::

    gradient = g max(x, 0) / (n rms), where rms = sqrt(sum(max(x, 0)^2) / n), if y > 0; else the max pool's own

``n`` is the number of positions of a window. What the network computes stays the same. The images are smoother and have
more contrast, the activation rises as soon, and the class is more often among another network's first five
(``benchmarks/transfer.py``).

Source: L2 pools in place of max pools, as in Hénaff and Simoncelli, "Geodesics of learned representations", ICLR 2016.
Lucid v0.3.8 has, as options, the gradients of ``mean(x)`` and of ``mean(x^2) / mean(|x|)``
(``optvis/overrides/smoothed_maxpool_grad.py``). Of SqueezeNet's images made with the first another network recognises
no more than without, and likewise with shares ``max(x, 0) / sum(max(x, 0))`` of each window's gradient.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from featvis_func.backbone.hardware import Specialization

_aten = torch.ops.aten
_RECTIFIERS = (_aten.relu.default, _aten.relu_.default, _aten.relu6.default, _aten.sigmoid.default)
# Whose values are positive, or zero, if those of all arguments are.
_KEEP_SIGN = (
    *(_aten.cat.default, _aten.add.Tensor, _aten.avg_pool2d.default, _aten.split_with_sizes.default),
    operator.getitem,
)


def smoothed(
    values: Tensor,
    maxima: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    rectified: bool = False,
) -> Tensor:
    """Return the maxima of a pool, with a smoothed gradient.

    Args:
        values: ``(n, c, h, w)``, what is pooled.
        maxima: ``(n, c, h', w')``, of the pool.
        kernel_size, stride, padding, ceil_mode: the pool's.
        rectified: whether no value is below 0.

    Gradient: as described above; to the values where a maximum is above 0, to the maxima where it is not. Squares are
        those of float32: maxima below 1e-22 may count as 0, and those above 1e19 pass no gradient.
        Once differentiable; does not support ``vmap``.

    >>> x = torch.tensor([[[[4.0, 3.0], [-2.0, 0.0]]]], requires_grad=True)
    >>> y = smoothed(x, F.max_pool2d(x.detach(), 2), [2, 2], [2, 2], [0, 0], False)
    >>> y.item()
    4.0
    >>> torch.autograd.grad(y.sum(), x)[0]  # rms = 2.5
    tensor([[[[0.4000, 0.3000],
              [0.0000, 0.0000]]]])
    """
    # In a compiled torch.func.grad, a Function of its arguments alone would lose its backward pass: hence the
    # aliases, which unlike `view_as` keep the memory layout of a single image.
    return _Smoothed.apply(values[...], maxima[...], rectified, kernel_size, stride, padding, ceil_mode)


class _Smoothed(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, maxima: Tensor, rectified: bool, *pool: Any) -> Tensor:  # type: ignore[override]
        return maxima.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[override]
        values, _, ctx.rectified, *ctx.pool = inputs
        ctx.save_for_backward(values)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        (values,), pool = ctx.saved_tensors, ctx.pool
        dtype = gradient.dtype
        if dtype == torch.float16:  # whose range is too small for squares
            values, gradient = values.float(), gradient.float()
        # Not in place, which autograd would copy for.
        positive = values if ctx.rectified else values.clamp_min(0.0)
        squares = F.avg_pool2d(positive.square(), *pool)
        shared = squares > 0
        shares = torch.where(shared, gradient * squares.rsqrt(), 0.0)
        passed = _aten.avg_pool2d_backward(shares, positive, *pool, True, None)  # divides by n
        own = torch.where(shared, 0.0, gradient).to(dtype) if ctx.needs_input_grad[1] else None
        return (passed * positive).to(dtype), own, *(None,) * 5


def smooth_graph(graph: fx.Graph, hardware: Specialization) -> bool:
    """Smooth the gradients of a graph's strided max pools over images, in place; returns whether there are any.

    Args:
        graph: of :func:`~featvis_func.backbone.redirected_relu.redirect_graph`: where a redirected activation follows a
            pool, the gradient that it redirects takes the pool's own way.
        hardware: for what replaces the pools.
    """
    pools = (_aten.max_pool2d.default, hardware.replace_operation.get(_aten.max_pool2d.default))
    found = [node for node in graph.nodes if node.target in pools and _is_strided(node)]
    for pool in found:
        values = pool.all_input_nodes[0]
        users, rectified = list(pool.users), _is_rectified(values)
        with graph.inserting_before(pool):
            if rectified or all(user.target in _RECTIFIERS[:3] for user in users):
                pool.args = (graph.call_function(_aten.detach.default, (values,)), *pool.args[1:])
        with graph.inserting_after(pool):
            new = graph.call_function(smoothed, (values, pool, *_settings(pool), rectified))
        for user in users:
            user.replace_input_with(pool, new)
    return bool(found)


def _settings(pool: fx.Node) -> tuple[list[int], list[int], list[int], bool]:
    """Return the kernel size, stride, padding and ceil mode of a pool."""
    _, kernel, stride, padding, _, ceil_mode = _arguments(pool)
    return _pair(kernel), _pair(stride or kernel), _pair(padding), ceil_mode


def _is_strided(pool: fx.Node) -> bool:
    """Whether a pool moves by more than one position, and its windows have no gaps."""
    return max(_settings(pool)[1]) > 1 and _pair(_arguments(pool)[4]) == [1, 1]


def _arguments(pool: fx.Node) -> tuple[Any, ...]:
    defaults = (None, None, None, 0, 1, False)
    return (*pool.args, *defaults[len(pool.args) :])


def _pair(value: Any) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * 2 if len(numbers) == 1 else numbers


def _is_rectified(node: fx.Node) -> bool:
    """Whether a value is never negative, as far as the graph tells, and passes no gradient where it is zero."""
    if node.target in _RECTIFIERS:
        return True
    if node.target == smoothed:
        return _is_rectified(node.all_input_nodes[0])
    if node.target == _aten.add.Tensor and (len(node.all_input_nodes) < 2 or node.kwargs):
        return False  # a number is added, or a multiple
    return node.target in _KEEP_SIGN and all(map(_is_rectified, node.all_input_nodes))
