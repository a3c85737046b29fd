"""Operations that the backbone's graph gets in place of others on the CPU: the same values, sooner."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

_aten = torch.ops.aten


def strided_stem(convolution: Any) -> tuple[Any, ...] | None:
    """:func:`strided_conv2d` for a strided convolution of at most 4 channels, which are those of an image."""
    (sh, sw), padding = convolution.stride, convolution.padding
    fits = convolution.kernel.shape[1] <= 4 and sh == sw > 1 and not isinstance(padding, str)
    if not fits or (convolution.dilation, convolution.groups) != ((1, 1), 1):
        return None
    return strided_conv2d, (sh, list(padding)), ()


def strided_conv2d(images: Tensor, kernel: Tensor, bias: Tensor | None, stride: int, padding: list[int]) -> Tensor:
    """``torch.nn.functional.conv2d`` of the few channels of an image, with its gradient by another road.

    torch's own gradient to three channels fills no vector register, and takes two to three times as long as the
    convolution. Here it is that of a convolution without stride of the channels of a block of ``stride x stride``
    pixels, on the same sums: of a 7 x 7 kernel with a stride of 2, 20 instead of 38 ms.

    Args:
        images: ``(n, c, h, w)``.
        kernel: ``(d, c, kh, kw)``.
        bias: ``(d,)`` or none.
        stride: both ways.
        padding: above and below, left and right.

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
        to_images, to_kernel, to_bias, *_ = ctx.needs_input_grad
        return (
            _gradient_to_images(gradient, kernel, images.shape, stride, padding) if to_images else None,
            conv2d_weight(images, kernel.shape, gradient, stride, padding) if to_kernel else None,
            gradient.sum((0, 2, 3)) if to_bias else None,
            None,
            None,
        )


def _gradient_to_images(gradient: Tensor, kernel: Tensor, shape: torch.Size, stride: int, padding: list[int]) -> Tensor:
    """Of a strided convolution: each pixel of the gradient to blocks of pixels has the channels of a whole block."""
    (d, c, *sides), (n, *_) = kernel.shape, gradient.shape
    blocks = [-(-side // stride) for side in sides]
    channels = c if c * stride**2 % 8 == 0 else 4  # the registers' width
    taps = F.pad(kernel, (0, blocks[1] * stride - sides[1], 0, blocks[0] * stride - sides[0], 0, channels - c))
    taps = taps.reshape(d, channels, blocks[0], stride, blocks[1], stride).permute(0, 3, 5, 1, 2, 4)
    deep = F.conv_transpose2d(gradient, taps.reshape(d, stride**2 * channels, *blocks))
    h, w = deep.shape[2:]
    flat = deep.permute(0, 2, 3, 1).reshape(n, h, w, stride, stride, channels)[..., :c]
    flat = flat.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h * stride, w * stride)
    # Back to the image's own sides: without its padding, and with the pixels that no kernel saw.
    over = [size - (pad + side) for size, pad, side in zip(flat.shape[2:], padding, shape[2:], strict=True)]
    return F.pad(flat, (-padding[1], -over[1], -padding[0], -over[0]))


def max_pool2d(
    images: Tensor,
    kernel_size: list[int],
    stride: list[int] | None = None,
    padding: tuple[int, ...] | list[int] = (0, 0),
    dilation: tuple[int, ...] | list[int] = (1, 1),
    ceil_mode: bool = False,
) -> Tensor:
    """``torch.nn.functional.max_pool2d``, kept whole where it is compiled.

    Inductor writes the pool and its gradient out as loops; on the CPU they took 55 of 250 ms of a SqueezeNet step,
    torch's own kernels 8.

    >>> max_pool2d(torch.arange(4.0).reshape(1, 1, 2, 2), [2, 2]).item()
    3.0
    """
    settings = (list(kernel_size), list(stride or kernel_size), list(padding), list(dilation), ceil_mode)
    if torch.compiler.is_compiling():
        return _MaxPool.apply(images, *settings)[0]
    return F.max_pool2d(images, *settings)


def replaces_operations() -> Mapping[Any, Callable[..., Tensor]]:
    """Operation of a traced graph -> the function of this module that replaces it."""
    return {_aten.max_pool2d.default: max_pool2d}


@torch.library.custom_op("featvis_func::max_pool2d", mutates_args=())
def _forward(
    images: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """Values and indices: an operation that a compiler does not look into."""
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
    """The gradient to the images."""
    return _aten.max_pool2d_with_indices_backward(
        gradient, images, kernel_size, stride, padding, dilation, ceil_mode, indices
    )


# Without values, as a compiler asks: shapes and memory layout are those of torch's own operations.
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
