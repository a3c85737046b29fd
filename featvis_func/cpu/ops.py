"""Operations with torch's values and gradients that run faster than torch's own in a backbone on the CPU."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

_aten = torch.ops.aten


def as_intermediate(tensor: Tensor) -> Tensor:
    """Return an alias of a tensor, to be passed to an ``autograd.Function`` in code that is compiled.

    In ``torch.compile(torch.func.grad(f))``, torch.compile takes the arguments of ``f`` for tensors without gradients,
    though not what is computed from them. A Function of arguments alone would be inlined, without its backward pass:
    the gradient would be that of its forward pass, which is another one where an input is used in the backward pass
    only (seen with torch 2.14). The compiler removes the alias.

    The alias keeps the strides. ``view_as`` computes them anew, and along a batch of one image it gives one at which
    torch no longer sees that channels come last: the rest of the network would run in the slower memory layout.
    """
    return tensor[...]


def strided_stem(convolution: Any) -> tuple[Any, ...] | None:
    """Choose :func:`strided_conv2d` for a strided convolution of at most 4 channels, as in an image; else ``None``."""
    (sh, sw), padding = convolution.stride, convolution.padding
    fits = convolution.kernel.shape[1] <= 4 and sh == sw > 1 and not isinstance(padding, str)
    if not fits or (convolution.dilation, convolution.groups) != ((1, 1), 1):
        return None
    return strided_conv2d, (sh, list(padding)), ()


def strided_conv2d(images: Tensor, kernel: Tensor, bias: Tensor | None, stride: int, padding: list[int]) -> Tensor:
    """``torch.nn.functional.conv2d`` for images of few channels, with a faster gradient to the images.

    torch's own gradient to three channels fills no vector register, and takes two to three times as long as the
    convolution. Here it is computed as the gradient of a convolution without stride, whose channels are those of a
    block of ``stride x stride`` pixels; the products and sums are the same. For a 7 x 7 kernel with a stride of 2 this
    takes 20 instead of 38 ms.

    Args:
        images: ``(n, c, h, w)``.
        kernel: ``(d, c, kh, kw)``.
        bias: ``(d,)`` or ``None``.
        stride: along both axes.
        padding: vertical, horizontal.

    >>> images, kernel = torch.rand(1, 3, 9, 9), torch.rand(4, 3, 3, 3)
    >>> strided_conv2d(images, kernel, None, 2, [1, 1]).shape
    torch.Size([1, 4, 5, 5])
    """
    return _StridedConv.apply(images, kernel, bias, stride, padding)


class _StridedConv(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, kernel: Tensor, bias: Tensor | None, stride: int, padding: list[int]) -> Tensor:  # type: ignore[override]
        return F.conv2d(images, kernel, bias, stride, padding)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[override]
        images, kernel, _, *ctx.settings = inputs
        ctx.save_for_backward(images, kernel)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        images, kernel = ctx.saved_tensors
        stride, padding = ctx.settings
        images_need_grad, kernel_needs_grad, bias_needs_grad, *_ = ctx.needs_input_grad
        return (
            _gradient_to_images(gradient, kernel, images.shape, stride, padding) if images_need_grad else None,
            conv2d_weight(images, kernel.shape, gradient, stride, padding) if kernel_needs_grad else None,
            gradient.sum((0, 2, 3)) if bias_needs_grad else None,
            None,
            None,
        )


def _gradient_to_images(gradient: Tensor, kernel: Tensor, shape: torch.Size, stride: int, padding: list[int]) -> Tensor:
    """Compute the gradient of a strided convolution, with the pixels of each ``stride x stride`` block as channels."""
    (d, c, *sides), (n, *_) = kernel.shape, gradient.shape
    blocks = [-(-side // stride) for side in sides]
    channels = c if c * stride**2 % 8 == 0 else 4  # fills vector registers of 8 numbers
    padded = F.pad(kernel, (0, blocks[1] * stride - sides[1], 0, blocks[0] * stride - sides[0], 0, channels - c))
    padded = padded.reshape(d, channels, blocks[0], stride, blocks[1], stride).permute(0, 3, 5, 1, 2, 4)
    by_block = F.conv_transpose2d(gradient, padded.reshape(d, stride**2 * channels, *blocks))
    h, w = by_block.shape[2:]
    by_pixel = by_block.permute(0, 2, 3, 1).reshape(n, h, w, stride, stride, channels)[..., :c]
    by_pixel = by_pixel.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h * stride, w * stride)
    # Crop to the image: remove its padding, and add zeros for the pixels that no kernel position covers.
    excess = [size - (pad + side) for size, pad, side in zip(by_pixel.shape[2:], padding, shape[2:], strict=True)]
    return F.pad(by_pixel, (-padding[1], -excess[1], -padding[0], -excess[0]))


def max_pool2d(
    images: Tensor,
    kernel_size: list[int],
    stride: list[int] | None = None,
    padding: tuple[int, ...] | list[int] = (0, 0),
    dilation: tuple[int, ...] | list[int] = (1, 1),
    ceil_mode: bool = False,
) -> Tensor:
    """``torch.nn.functional.max_pool2d`` that runs as torch's own kernel in compiled code.

    Inductor turns the pool and its gradient into loops, which took 55 of the 250 ms of a SqueezeNet step on the CPU;
    torch's own kernels take 8 ms.

    >>> max_pool2d(torch.arange(4.0).reshape(1, 1, 2, 2), [2, 2]).item()
    3.0
    """
    settings = (list(kernel_size), list(stride or kernel_size), list(padding), list(dilation), ceil_mode)
    if torch.compiler.is_compiling():
        images = as_intermediate(images)
        if not images.requires_grad:  # of a Function of such a tensor, torch.compile cannot trace the gradient
            return _forward(images, *settings)[0]
        return _MaxPool.apply(images, *settings)[0]
    return F.max_pool2d(images, *settings)


REPLACED_OPERATIONS: Mapping[Any, Callable[..., Tensor]] = {_aten.max_pool2d.default: max_pool2d}
"""Operation of a traced graph -> the function of this module that replaces it."""


@torch.library.custom_op("featvis_func::max_pool2d", mutates_args=())
def _forward(
    images: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """Compute the maxima and their indices, in an operation that a compiler does not decompose."""
    return _aten.max_pool2d_with_indices(images, kernel_size, stride, padding, dilation, ceil_mode)


@torch.library.custom_op("featvis_func::max_pool2d_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    images: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Compute the gradient to the images."""
    return _aten.max_pool2d_with_indices_backward(
        gradient, images, kernel_size, stride, padding, dilation, ceil_mode, indices
    )


# Shapes and memory layouts, which a compiler asks for, are those of torch's own operations.
_forward.register_fake(_aten.max_pool2d_with_indices)
_backward.register_fake(_aten.max_pool2d_with_indices_backward)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(images: Tensor, *settings: object) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return _forward(images, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[override]
        images, *ctx.settings = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(images, output[1])

    @staticmethod
    def backward(ctx, gradient, _):  # type: ignore[override]
        images, indices = ctx.saved_tensors
        return _backward(gradient, images, *ctx.settings, indices), *(None,) * len(ctx.settings)
