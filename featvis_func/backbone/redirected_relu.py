"""Gradients past activations that let none through, so that units which start dead come to life.

Where a rectifier is shut at every position that an image's score depends on, no gradient reaches the image, and it
stays grey. Redirected, such a rectifier passes on what pushes its input towards the part where it rises. For one image,
with ``y = f(x)``, ``g`` the gradient of a score that is to RISE with respect to ``y``, and ``R`` the part where ``f``
rises::

    pushed = g where x lies below R and g > 0, or above R and g < 0; else 0
    gradient = pushed, if g = 0 at every x in R and some of pushed is not 0; else f'(x) g, as ever

``R`` is ``x > 0`` for ReLU and ``0 < x < 6`` for ReLU6. GELU, SiLU, Mish and hardswish have a minimum a little below
zero, and fall, ever flatter, from 0 at minus infinity down to it; ``R`` is what lies above. Left of it their own
gradient is no way out, however large it is: to raise the value it pushes the input still further from where the unit
fires. Leaky ReLU, ELU and the like rise everywhere and are never shut.

Redirected are the activations behind the last convolution or product of matrices before a layer's output: there a
filter has but its own channel, which can be shut. Before it, every channel would have to be shut at once.

Source: ``redirected_relu_grad`` and ``redirected_relu6_grad`` of Lucid v0.3.8, ``misc/redirected_relu_grad.py``, which
gives the rule for these two, each image of the batch and each operation by itself. Deviations: Lucid does so with all
activations of the network, which makes a step take clearly longer, and a difference only where a whole
layer is off; it does so in 17 steps; the score rises, where Lucid's loss falls; ``x = 0`` (and 6) counts as shut, as in
torch's own gradient, where Lucid lets it through; whether something got through is asked of the entries, where Lucid
asks their Euclidean norm, which underflows; a ReLU before a maximum pool is taken behind it (see ``export.py``), so
that the push goes to the position nearest to firing.
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
# Of the gradient, and of the input; ReLU's of the output, of which one is held for the backward pass anyway.
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
# Where f does not rise its gradient is zero, and not merely of the wrong sign.
_FLAT = ("relu", "hardtanh", "hardsigmoid")

# The part where f rises, from above the first to below the second; the smooth ones' first is where f' = 0.
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

# What mixes all channels, as the graph has it.
_DENSE = {
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.convolution.default),
    *(_aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.bmm.default, _aten.matmul.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
    _aten.scaled_dot_product_attention.default,
}


def redirected(values: Tensor, redirect: Tensor, kind: str, lower: float, upper: float | None) -> Tensor:
    """An activation, of unchanged value, whose gradient is redirected for some images.

    Args:
        values: ``(n, ...)``.
        redirect: float ``(n,)``: for which images, 1 or 0.
        kind: a key of the tables above.
        lower, upper: the part where it rises; ``None``: without end.

    Gradient: of something that shall rise, see above; that to ``redirect`` is 1 for each image whose gradient is
        another one for that, else 0. Once differentiable; not under ``vmap``.

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
    return _Redirected.apply(values, redirect, kind, lower, upper)


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
        through = own if kind in _FLAT else torch.where(saved > lower, gradient, 0.0)
        up = gradient.clamp_min(0.0)
        # Where f rises there is no gradient, if it is shut.
        pushed = up if upper is None else torch.where(saved <= lower, up, gradient.clamp_max(0.0))
        changed = (redirect > 0) & ~_any(through) & _any(pushed)
        result = torch.where(changed.reshape(-1, *(1,) * (gradient.ndim - 1)), pushed, own)
        return result, changed.to(redirect.dtype), None, None, None


def _any(gradient: Tensor) -> Tensor:
    """Whether anything of each image's is not zero; NaN is not."""
    return torch.linalg.vector_norm(gradient, torch.inf, dim=tuple(range(1, gradient.ndim))) != 0


def redirect_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that takes one more argument, float ``(n,)``: 1 for images whose gradients are redirected.

    Args:
        graph: with the traced values in its nodes' ``meta``; its last placeholder takes the images. Activations whose
            first axis is not the images' stay as they are. A node marked ``meta["merged"]`` does the work of several
            before a split: each part decides for itself.
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
            shown = list(split.users)
        elif _is_of_images(node, images):
            shown = [node]
        else:
            continue
        for part in shown:
            users = list(part.users)
            with copy.inserting_after(part):
                source = before if part is node else part
                new = copy.call_function(redirected, (source, redirect, *_settings(node)))
            for user in users:
                user.replace_input_with(part, new)
        copy.erase_node(node)
    return copy


def _last_activations(graph: fx.Graph) -> list[fx.Node]:
    """Those from which an output is reached without a convolution or a product of matrices."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    ahead = list(graph.output_node().all_input_nodes)
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _KINDS:
            found[node] = None
        elif node.target not in _DENSE and not node.meta.get("dense"):
            ahead += node.all_input_nodes
    return list(found)


def _settings(node: fx.Node) -> tuple[str, float, float | None]:
    """Kind and bounds of an activation, as :func:`redirected` takes them."""
    kind = _KINDS[node.target]  # type: ignore[index]
    if node.target == _aten.relu6.default:
        return kind, 0.0, 6.0
    if kind == "hardtanh":
        _, lower, upper = (*node.args, *(-1.0, 1.0)[len(node.args) - 1 :])
        return kind, float(lower), float(upper)  # type: ignore[arg-type]
    if node.kwargs.get("approximate") == "tanh":
        kind = "gelu_tanh"
    return kind, *_RISES[kind]


def _is_of_images(node: fx.Node, images: fx.Node) -> bool:
    """Whether the first axis is that of the images, which the trace left open."""
    shape, open_shape = (n.meta["val"].shape for n in (node, images))
    return len(shape) > 1 and str(shape[0]) == str(open_shape[0])
