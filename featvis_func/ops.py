"""Operations that the backbone's graph gets in place of others on the CPU: the same values, sooner."""

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


def space_to_depth(images: Tensor, block: int, padding: list[int], channels: int) -> Tensor:
    """Pads, then turns each block of pixels into one pixel of more channels.

    Args:
        images: ``(n, c, h, w)``.
        block: pixels on a side, which the padded sides are multiples of.
        padding: left, right, top, bottom; a negative one crops.
        channels: at least ``c``; the further ones are zero.

    Returns:
        ``(n, block * block * channels, h', w')`` in the channels_last layout.

    >>> space_to_depth(torch.ones(1, 3, 4, 4), 2, [0, 2, 0, 2], 4).shape
    torch.Size([1, 16, 3, 3])
    """
    padded = F.pad(images, (*padding, 0, channels - images.shape[1]))
    n, c, h, w = padded.shape
    blocks = padded.reshape(n, c, h // block, block, w // block, block).permute(0, 2, 4, 3, 5, 1)
    return blocks.reshape(n, h // block, w // block, block * block * c).permute(0, 3, 1, 2)


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
