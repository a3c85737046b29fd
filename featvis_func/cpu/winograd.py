"""3 x 3 convolutions by Winograd's algorithm, with a quarter of the multiplications, for compiled code on the CPU.

An output tile of 4 x 4 pixels depends on an input tile of 6 x 6 and a kernel of 3 x 3. As polynomials, evaluated at six
points along each axis, both become 36 numbers per channel, and the convolution becomes 36 matrix products over
the channels: 36 multiplications per tile instead of 144. The transforms to the points and back are sums along one axis
and then the other. Inductor compiles them into vectorised loops, two small kernels for all sizes; in eager mode they
cost more than the algorithm saves.

Source: A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016: F(4 x 4, 3 x 3), with the
points 0, 1, -1, 2, -2 and infinity. Rounding error: some 1e-5 of the largest value in float32; that of a convolution
that adds its products one by one is 1e-6.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from featvis_func.cpu.ops import as_intermediate
from featvis_func.types import Weights

_TILE, _POINTS = 4, 6
# Evaluates a kernel's three values at the six points. The factors are chosen so that the other two transforms have
# integer coefficients.
_AT_POINTS = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))
_DENOMINATOR = 24
# Below these, memory traffic costs more than the multiplications saved: c d / (c + d) of a kernel, and the number of
# tiles of a batch.
_MIN_CHANNELS, _MIN_TILES = 30, 16
# The number of transformed values computed at a time: more takes more memory and is not faster.
_CHUNK = 2**23


def winograd_3x3(convolution: Any) -> tuple[Any, ...] | None:
    """Choose :func:`conv2d_3x3` and its packed weights for a convolution that it computes faster; else ``None``."""
    padding = convolution.padding
    if (
        not pays(convolution.kernel)
        or (convolution.stride, convolution.dilation, convolution.groups) != ((1, 1), (1, 1), 1)
        or isinstance(padding, str)
        or max(padding) > 2
    ):
        return None
    return conv2d_3x3, (list(padding),), tuple(PACKINGS)


def pays(kernel: Tensor) -> bool:
    """Whether :func:`conv2d_3x3` is faster than torch's convolution for a kernel ``(d, c, h, w)`` and a usual batch.

    >>> pays(torch.zeros(64, 64, 3, 3)), pays(torch.zeros(64, 3, 3, 3)), pays(torch.zeros(64, 64, 5, 5))
    (True, False, False)
    """
    d, c, *sides = kernel.shape
    return sides == [3, 3] and c * d >= _MIN_CHANNELS * (c + d) and kernel.dtype == torch.float32


def transform_kernel(kernel: Tensor) -> Tensor:
    """Evaluate a kernel ``(d, c, 3, 3)`` at the points: the transformed kernel, ``(36, c, d)``.

    >>> transform_kernel(torch.zeros(8, 4, 3, 3)).shape
    torch.Size([36, 4, 8])
    """
    points = torch.tensor(_AT_POINTS, dtype=torch.float64, device=kernel.device) / _DENOMINATOR
    transformed = torch.einsum("ia,dcab,jb->ijcd", points, kernel.double(), points)
    return transformed.flatten(0, 1).to(kernel.dtype).contiguous()


def flip_kernel(kernel: Tensor) -> Tensor:
    """Return the kernel whose convolution is the gradient: rotated by 180 degrees, input and output channels swapped.

    >>> flip_kernel(torch.arange(9.0).reshape(1, 1, 3, 3))[0, 0, 0]
    tensor([8., 7., 6.])
    """
    return kernel.flip(2, 3).transpose(0, 1)


PACKINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "transformed": transform_kernel,
    "flipped": lambda kernel: transform_kernel(flip_kernel(kernel)),
}
"""Name -> how to compute a packed weight of :func:`conv2d_3x3` from a kernel; together they have 8 times its size."""


def add_packed_weights(weights: Weights, names: Sequence[str]) -> Weights:
    """Return weights with the packed weights of some kernels added, as :func:`conv2d_3x3` takes them.

    Args:
        weights: name -> tensor.
        names: of packed weights: the kernel's name, a dot, and a key of :data:`PACKINGS`. Those of kernels that are not
            float32, or not on the CPU, are left out.

    >>> list(add_packed_weights({"conv.weight": torch.zeros(8, 4, 3, 3)}, ["conv.weight.transformed"]))
    ['conv.weight', 'conv.weight.transformed']
    """
    result = dict(weights)
    for name in names:
        kernel_name, _, form = name.rpartition(".")
        kernel = weights[kernel_name]
        if name not in weights and kernel.dtype == torch.float32 and kernel.device.type == "cpu":
            result[name] = PACKINGS[form](kernel)
    return result


def conv2d_3x3(
    images: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    padding: list[int],
    transformed: Tensor | None = None,
    flipped: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with a 3 x 3 kernel; by Winograd's algorithm in compiled code.

    torch's own convolution runs in eager mode, without both packed weights, for other dtypes than float32 and for fewer
    than 16 tiles.

    Args:
        images: ``(n, c, h, w)``.
        kernel: ``(d, c, 3, 3)``.
        bias: ``(d,)`` or ``None``.
        padding: vertical, horizontal; 0, 1 or 2.
        transformed: ``(36, c, d)``: the kernel after :func:`transform_kernel`.
        flipped: ``(36, d, c)``: the kernel after :func:`flip_kernel` and :func:`transform_kernel`.

    Gradient: to the images by the same algorithm; to kernel and bias as torch computes it; none to the packed weights.
        Compiled code does not support ``vmap``.

    >>> images, kernel = torch.rand(1, 4, 9, 9), torch.rand(8, 4, 3, 3)
    >>> conv2d_3x3(images, kernel, None, [1, 1], transform_kernel(kernel), transform_kernel(flip_kernel(kernel))).shape
    torch.Size([1, 8, 9, 9])
    """
    rows, columns = (_tiles(side, pad) for side, pad in zip(images.shape[2:], padding, strict=True))
    if (
        transformed is None
        or flipped is None
        or len(images) * rows * columns < _MIN_TILES
        or images.dtype != torch.float32
        or not torch.compiler.is_compiling()
    ):
        return F.conv2d(images, kernel, bias, padding=padding)
    values = _Winograd.apply(as_intermediate(images), as_intermediate(kernel), padding, transformed, flipped)
    return values if bias is None else values + bias[:, None, None]


def _tiles(side: int, pad: int) -> int:
    """Return the number of output tiles along an axis."""
    return -(-(side + 2 * pad - 2) // _TILE)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(images: Tensor, kernel: Tensor, padding: list[int], transformed: Tensor, flipped: Tensor) -> Tensor:  # type: ignore[override]
        margins, sides = [0, 0], []
        for side, pad in zip(reversed(images.shape[2:]), reversed(padding), strict=True):
            sides.append(side + 2 * pad - 2)
            margins += [pad, _tiles(side, pad) * _TILE + 2 - side - pad]  # up to a multiple of the tile
        padded = F.pad(images.permute(0, 2, 3, 1), margins).contiguous()
        return _convolve(padded, transformed)[:, : sides[1], : sides[0]].permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[override]
        images, kernel, ctx.padding, transformed, flipped = inputs
        ctx.save_for_backward(images, kernel, transformed, flipped)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        images, kernel, transformed, flipped = ctx.saved_tensors
        padding = [2 - pad for pad in ctx.padding]
        images_need_grad, kernel_needs_grad, *_ = ctx.needs_input_grad
        return (
            _Winograd.apply(gradient, flip_kernel(kernel), padding, flipped, transformed) if images_need_grad else None,
            conv2d_weight(images, kernel.shape, gradient, padding=ctx.padding) if kernel_needs_grad else None,
            None,
            None,
            None,
        )


@torch.library.custom_op("featvis_func::winograd", mutates_args=())
def _convolve(images: Tensor, transformed: Tensor) -> Tensor:
    """Convolve ``r x q`` tiles ``(n, 4 r + 2, 4 q + 2, c)`` with a transformed kernel into ``(n, 4 r, 4 q, d)``."""
    n, height, width, c = images.shape
    d, rows, columns = transformed.shape[2], height // _TILE, width // _TILE
    # As many rows of tiles at a time as fit into a chunk: all rows of several images, or some rows of one.
    count = max(1, _CHUNK // (_POINTS**2 * columns * max(c, d)))
    count, step = max(1, count // rows), min(count, rows)
    # Without recording views for autograd: otherwise torch.compile compiles the transforms again for each kind of view.
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)):
        if n <= count and rows <= step:
            return _convolve_chunk(images, transformed)
        result = images.new_empty(n, rows * _TILE, columns * _TILE, d)
        for i, row in itertools.product(range(0, n, count), range(0, rows, step)):
            chunk = images[i : i + count, row * _TILE : (row + step) * _TILE + 2]
            result[i : i + count, row * _TILE : (row + step) * _TILE] = _convolve_chunk(chunk, transformed)
        return result


def _convolve_chunk(images: Tensor, transformed: Tensor) -> Tensor:
    to_points, from_points = _transforms()
    n, height, width, c = images.shape
    d, columns = transformed.shape[2], width // _TILE
    x = to_points(images.reshape(n * height, width, c))
    x = to_points(x.view(_POINTS * n, height, columns * c))  # (vertical points, horizontal points, n, rows, columns, c)
    y = torch.bmm(x.view(_POINTS**2, -1, c), transformed)
    y = from_points(y.view(_POINTS, -1, columns * d))
    y = from_points(y.view(_POINTS, -1, d))
    return y.view(n, -1, columns * _TILE, d)


@_convolve.register_fake
def _(images: Tensor, transformed: Tensor) -> Tensor:
    n, height, width, _ = images.shape
    return images.new_empty(n, height // _TILE * _TILE, width // _TILE * _TILE, transformed.shape[2])


@functools.cache
def _transforms() -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the transforms to the points and from them along one axis, each compiled once for all sizes."""
    return torch.compile(_to_points, dynamic=True), torch.compile(_from_points, dynamic=True)


def _to_points(x: Tensor) -> Tensor:
    """Evaluate pixels ``(a, 4 t + 2, c)`` at the points, ``(6, a, t, c)``; tiles of six pixels overlap by two."""
    last = x.shape[1] - _POINTS + 1
    d0, d1, d2, d3, d4, d5 = (x[:, i : i + last : _TILE] for i in range(_POINTS))
    even, odd, even2, odd2 = d4 - 4 * d2, d3 - 4 * d1, d4 - d2, 2 * (d3 - d1)
    return torch.stack([4 * d0 - 5 * d2 + d4, even + odd, even - odd, even2 + odd2, even2 - odd2, 4 * d1 - 5 * d3 + d5])


def _from_points(y: Tensor) -> Tensor:
    """Interpolate values at the points, ``(6, b, c)``, to the four pixels of a tile, ``(b, 4, c)``."""
    y0, y1, y2, y3, y4, y5 = y
    even, odd, even2, odd2 = y1 + y2, y1 - y2, y3 + y4, y3 - y4
    return torch.stack([y0 + even + even2, odd + 2 * odd2, even + 4 * even2, odd + 8 * odd2 + y5], dim=1)
