"""Redirected gradients: pass gradients through activations that block them, so that dead units can be optimised.

Where a ReLU is off at every position that an image's score depends on, no gradient reaches the image: it stays grey. A
redirected ReLU passes on the part of the gradient that moves its input towards the region where it rises. For one
image, ``y = f(x)``, the gradient ``g`` with respect to ``y`` of a score that is MAXIMISED, and the region ``R`` where
``f`` rises::

    pushed = g where x lies below R and g > 0, or above R and g < 0; else 0
    gradient = pushed, if g = 0 at every x in R and pushed != 0 anywhere; else f'(x) g

``R`` is ``x > 0`` for ReLU and ``0 < x < 6`` for ReLU6. GELU, SiLU, Mish and hardswish have a minimum a little below
zero, and decrease from 0 at minus infinity to it; ``R`` lies above the minimum. Below it their own gradient does not
help, however large it is: to raise the value it moves the input further away from ``R``. Leaky ReLU, ELU and other
functions that rise everywhere block no gradient.

Only the activations behind the last convolution or matrix product before a layer's output are redirected: there a
filter depends on its own channel alone, which can be off everywhere. Before it, all channels would have to be off.

Source: ``redirected_relu_grad`` and ``redirected_relu6_grad`` of Lucid v0.3.8, ``misc/redirected_relu_grad.py``, which
apply the rule for ReLU and ReLU6 to each image of the batch and each operation. Deviations: Lucid redirects all
activations of the network, which makes a step clearly slower and differs only where a complete layer is off, in its
first 17 steps; here the score is maximised, where Lucid minimises a loss; ``x = 0`` (and 6) counts as off, as in
torch's own gradient, where Lucid lets it pass; whether a gradient passes is decided by its largest entry, where Lucid
takes the Euclidean norm, which underflows; a ReLU before a max pool is moved behind it (see ``graph_passes.py``), so
that the gradient goes to the position closest to ``R``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_aten = torch.ops.aten

_FORWARD: dict[str, Callable[..., Tensor]] = {
    "relu": lambda x, lower, upper: F.relu(x),
    "hardtanh": F.hardtanh,
    "hardsigmoid": lambda x, lower, upper: F.hardsigmoid(x),
    "hardswish": lambda x, lower, upper: F.hardswish(x),
    "gelu": lambda x, lower, upper: F.gelu(x),
    "gelu_tanh": lambda x, lower, upper: F.gelu(x, approximate="tanh"),
    "silu": lambda x, lower, upper: F.silu(x),
    "mish": lambda x, lower, upper: F.mish(x),
}
# (gradient, input, lower, upper) -> gradient; for ReLU with its output, which the backward pass keeps anyway.
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "relu": lambda g, y, lower, upper: _aten.threshold_backward(g, y, 0),
    "hardtanh": _aten.hardtanh_backward,
    "hardsigmoid": lambda g, x, lower, upper: _aten.hardsigmoid_backward(g, x),
    "hardswish": lambda g, x, lower, upper: _aten.hardswish_backward(g, x),
    "gelu": lambda g, x, lower, upper: _aten.gelu_backward(g, x),
    "gelu_tanh": lambda g, x, lower, upper: _aten.gelu_backward(g, x, approximate="tanh"),
    "silu": lambda g, x, lower, upper: _aten.silu_backward(g, x),
    "mish": lambda g, x, lower, upper: _aten.mish_backward(g, x),
}
# Activations whose gradient is zero outside of R; that of the others has the wrong sign there.
_FLAT = ("relu", "hardtanh", "hardsigmoid")

# R as an open interval; for the smooth functions it begins where f' = 0.
_RISES: dict[str, tuple[float, float | None]] = {
    "relu": (0.0, None),
    "hardsigmoid": (-3.0, 3.0),
    "hardswish": (-1.5, None),
    "gelu": (-0.7517915, None),
    "gelu_tanh": (-0.7524614, None),
    "silu": (-1.2784645, None),
    "mish": (-1.1924312, None),
}
_KINDS = {
    _aten.relu.default: "relu",
    _aten.relu_.default: "relu",
    _aten.relu6.default: "hardtanh",
    _aten.hardtanh.default: "hardtanh",
    _aten.hardsigmoid.default: "hardsigmoid",
    _aten.hardswish.default: "hardswish",
    _aten.gelu.default: "gelu",
    _aten.silu.default: "silu",
    _aten.mish.default: "mish",
}

# Operations of the graph that mix all channels.
_DENSE = {
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.convolution.default),
    *(_aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.bmm.default, _aten.matmul.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
    _aten.scaled_dot_product_attention.default,
}


def redirected(values: Tensor, redirect: Tensor, kind: str, lower: float, upper: float | None) -> Tensor:
    """Apply an activation whose gradient is redirected for some images.

    Args:
        values: ``(n, ...)``.
        redirect: float ``(n,)``: 1 for images whose gradient may be redirected, else 0.
        kind: a key of the tables above.
        lower, upper: the interval in which it rises; ``None``: unbounded.

    Gradient: to ``values`` as described above; to ``redirect`` 1 for each image whose gradient was redirected, else 0.
        Once differentiable; does not support ``vmap``.

    >>> x = torch.tensor([[-1.0, -2.0], [-1.0, 3.0], [-1.0, -2.0]], requires_grad=True)
    >>> redirect = torch.tensor([1.0, 1.0, 0.0], requires_grad=True)
    >>> y = redirected(x, redirect, "relu", 0.0, None)
    >>> gradient, changed = torch.autograd.grad((y * torch.tensor([0.5, -0.5])).sum(), (x, redirect))
    >>> gradient
    tensor([[ 0.5000,  0.0000],
            [ 0.0000, -0.5000],
            [ 0.0000,  0.0000]])
    >>> changed
    tensor([1., 0., 0.])
    """
    # In a compiled torch.func.grad, a Function of its arguments alone would lose its backward pass: hence the alias,
    # which unlike `view_as` keeps the memory layout of a single image.
    return _Redirected.apply(values[...], redirect, kind, lower, upper)


class _Redirected(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, redirect: Tensor, kind: str, lower: float, upper: float | None) -> Tensor:  # type: ignore[override]
        return _FORWARD[kind](values, lower, upper)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[override]
        values, redirect, *ctx.settings = inputs
        ctx.save_for_backward(output if ctx.settings[0] == "relu" else values, redirect)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        (saved, redirect), (kind, lower, upper) = ctx.saved_tensors, ctx.settings
        own = _BACKWARD[kind](gradient, saved, lower, upper)
        passed = own if kind in _FLAT else torch.where(saved > lower, gradient, 0.0)
        increase = gradient.clamp_min(0.0)
        # Where f rises the gradient is zero, if `pushed` is used at all.
        pushed = increase if upper is None else torch.where(saved <= lower, increase, gradient.clamp_max(0.0))
        changed = (redirect > 0) & ~_any(passed) & _any(pushed)
        result = torch.where(changed.reshape(-1, *(1,) * (gradient.ndim - 1)), pushed, own)
        return result, changed.to(redirect.dtype), None, None, None


def _any(gradient: Tensor) -> Tensor:
    """Whether any entry of each image's gradient is not zero; NaN is not zero."""
    return torch.linalg.vector_norm(gradient, torch.inf, dim=tuple(range(1, gradient.ndim))) != 0


def redirect_graph(graph: fx.Graph) -> fx.Graph:
    """Copy a graph with one more argument, float ``(n,)``: 1 for images whose gradients may be redirected.

    Args:
        graph: with the traced values in its nodes' ``meta``; its last placeholder takes the images. Activations whose
            first axis is not that of the images are not changed. A node marked ``meta["merged"]`` replaces several
            activations, and is followed by a split: each of its parts is redirected separately.
    """
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    images = [node for node in copy.nodes if node.op == "placeholder"][-1]
    with copy.inserting_after(images):
        redirect = copy.placeholder("redirect")
    for node in _last_activations(copy):
        before = node.all_input_nodes[0]
        if node.meta.get("merged"):
            (split,) = node.users
            split.replace_input_with(node, before)
            parts = list(split.users)
        elif _is_per_image(node, images):
            parts = [node]
        else:
            continue
        for part in parts:
            users = list(part.users)
            with copy.inserting_after(part):
                source = before if part is node else part
                new = copy.call_function(redirected, (source, redirect, *_settings(node)))
            for user in users:
                user.replace_input_with(part, new)
        copy.erase_node(node)
    return copy


def _last_activations(graph: fx.Graph) -> list[fx.Node]:
    """Return the activations that are followed by no convolution or matrix product on some way to an output."""
    activations: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    pending = list(graph.output_node().all_input_nodes)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _KINDS:
            activations[node] = None
        elif node.target not in _DENSE and not node.meta.get("dense"):
            pending += node.all_input_nodes
    return list(activations)


def _settings(node: fx.Node) -> tuple[str, float, float | None]:
    """Return the kind and the interval of an activation, as :func:`redirected` takes them."""
    kind = _KINDS[node.target]  # type: ignore[index]
    if node.target == _aten.relu6.default:
        return kind, 0.0, 6.0
    if kind == "hardtanh":
        _, lower, upper = (*node.args, *(-1.0, 1.0)[len(node.args) - 1 :])
        return kind, float(lower), float(upper)  # type: ignore[arg-type]
    if node.kwargs.get("approximate") == "tanh":
        kind = "gelu_tanh"
    return kind, *_RISES[kind]


def _is_per_image(node: fx.Node, images: fx.Node) -> bool:
    """Whether the first axis is that of the images, whose size is symbolic in the trace."""
    shape, images_shape = (n.meta["val"].shape for n in (node, images))
    return len(shape) > 1 and str(shape[0]) == str(images_shape[0])
