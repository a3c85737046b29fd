"""Composition of affine steps into one matrix and one bilinear sampling."""

import torch
import torch.nn.functional as F
from torch import Tensor

from featvis_func.random import uniform
from featvis_func.transform.affine import Affine
from featvis_func.types import Key, Transform

# Bilinear sampling would skip pixels beyond this reduction, so the image is downsampled with a filter first.
_MAX_REDUCTION = 1.5


def warp(*steps: Affine, size: tuple[int, int], padding: float = 0.5, deterministic: bool = False) -> Transform:
    """Compose affine steps into one matrix and one bilinear sampling, at the input size of the model.

    Steps apply to the image in the given order. The visible frame (the image, enlarged by :func:`pad` and reduced by
    crops) fills the output. If the frame is more than 1.5 times larger than the output, the image is downsampled with
    an antialiasing filter first.

    Args:
        steps: any number of affine steps. Without steps the image is only resized.
        size: ``(h', w')`` of the output in pixels.
        padding: value outside of the image.
        deterministic: sample by four indexing operations instead of ``grid_sample``, whose backward pass is not
            deterministic on CUDA. Requires ``torch.use_deterministic_algorithms(True)``. Equal up to rounding; slower.

    Returns:
        A :class:`Transform` whose draw is the matrix: ``(3, 3)``, or ``(3, 5)`` if a step shifts by a fraction of the
        image sides, as crops do (see :class:`Affine`).

    Raises:
        ValueError: if an output side is below 1; when applied, if the steps crop more than the image has.

    Gradient: flows to the image, not to the matrix.

    >>> resize = warp(size=(2, 2), padding=0.0)
    >>> resize.apply(torch.ones(1, 2, 2), resize.draw(torch.tensor([0, 1])))
    tensor([[[1., 1.],
             [1., 1.]]])
    """
    out_h, out_w = size
    if out_h < 1 or out_w < 1:
        raise ValueError(f"warp: size must be at least 1 x 1 pixels, got {out_h} x {out_w}")

    def draw(key: Key) -> Tensor:
        numbers = uniform(key, (sum(step.numbers for step in steps),)).split([step.numbers for step in steps])
        matrix = torch.eye(3, device=key.device)
        for step, step_numbers in zip(steps, numbers, strict=True):
            matrix = _compose(matrix, step.matrix(step_numbers))
        return matrix

    def apply(image: Tensor, matrix: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        frame_h, frame_w = _frame(steps, h, w)
        image = downsample(downsample(image, -2, frame_h / out_h), -1, frame_w / out_w)
        matrix = matrix.detach().to(image.dtype)
        shift_x, shift_y = matrix[0, 2], matrix[1, 2]
        if matrix.shape[1] == 5:  # shifts in fractions of the image sides, which the draw does not know
            shift_x = shift_x + matrix[0, 3] * w + matrix[0, 4] * h
            shift_y = shift_y + matrix[1, 3] * w + matrix[1, 4] * h
        grid = _grid(matrix, (shift_x, shift_y), (h, w), (frame_h, frame_w), size)
        if deterministic:
            return _sample(image - padding, *grid.unbind(-1)) + padding
        sampled = F.grid_sample(
            (image - padding)[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False
        )
        return sampled[0] + padding

    return Transform(draw, apply)


def _frame(steps: tuple[Affine, ...], h: int, w: int) -> tuple[float, float]:
    """Return ``(h, w)`` of the visible frame, in image pixels."""
    frame: tuple[float, float] = (h, w)
    for step in steps:
        frame = (frame[0] + step.grow, frame[1] + step.grow) if step.frame is None else step.frame(*frame)
    if min(frame) <= 0:
        raise ValueError(f"warp: the steps crop {max(h - frame[0], w - frame[1]):g} pixels from an image of {h} x {w}")
    return frame


def _compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Return the matrix product ``outer @ inner`` of affine maps, each ``(3, 3)`` or ``(3, 5)``.

    Shifts in fractions of the image sides (the last two columns) are added; the outer map neither rotates nor scales
    them.
    """
    # Products are summed explicitly, because the rounding of a batched matmul may depend on the batch size.
    if outer.shape[1] == 3:
        return (outer[:, :, None] * inner[None, :, :]).sum(1)
    fractions = F.pad(outer[:, 3:], (3, 0))
    return F.pad((outer[:, :3, None] * inner[None, :, :]).sum(1), (0, 5 - inner.shape[1])) + fractions


def _grid(
    matrix: Tensor,
    shift: tuple[Tensor, Tensor],
    image: tuple[int, int],
    frame: tuple[float, float],
    size: tuple[int, int],
) -> Tensor:
    """Return the sampling grid in the normalised coordinates ``x, y`` of ``grid_sample``, from -1 to 1.

    Args:
        matrix: at least ``(2, 2)``.
        shift: x and y, each ``()``, in image pixels.
        image: ``(h, w)`` of the image.
        frame: ``(h, w)`` of the visible frame, in image pixels.
        size: ``(h', w')`` of the output.

    Returns:
        ``(h', w', 2)``.
    """
    x = _pixel_centres(size[1], matrix) * (frame[1] / size[1])
    y = _pixel_centres(size[0], matrix)[:, None] * (frame[0] / size[0])

    def normalised(row: Tensor, shift: Tensor, side: int) -> Tensor:
        return torch.addcmul((row[0] * x + shift) * (2.0 / side), row[1] * (2.0 / side), y)

    return torch.stack([normalised(matrix[0], shift[0], image[1]), normalised(matrix[1], shift[1], image[0])], dim=-1)


def _pixel_centres(count: int, like: Tensor) -> Tensor:
    """Return the pixel centres along a side, relative to its midpoint: ``(count,)``."""
    return torch.arange(count, device=like.device, dtype=like.dtype) + (0.5 - count / 2)


def downsample(image: Tensor, dim: int, reduction: float) -> Tensor:
    """Downsample one axis with a triangle filter (antialiased bilinear) if the reduction exceeds 1.5."""
    if reduction <= _MAX_REDUCTION:
        return image
    size = image.shape[dim]
    target = max(1, round(size / reduction))
    step = size / target
    source = torch.arange(size, device=image.device, dtype=image.dtype) + 0.5
    centre = (torch.arange(target, device=image.device, dtype=image.dtype) + 0.5) * step
    weight = (1.0 - (source - centre[:, None]).abs() / step).clamp_min(0.0)
    weight = weight / weight.sum(1, keepdim=True)
    return torch.einsum("...s,ts->...t", image.movedim(dim, -1), weight).movedim(-1, dim)


def _sample(image: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """Bilinear ``grid_sample`` with zeros outside, implemented by indexing.

    Unlike ``grid_sample``, indexing has a deterministic backward pass, under deterministic algorithms.

    Args:
        image: ``(c, h, w)``.
        column, row: ``(h', w')``, normalised coordinates x and y, from -1 to 1.

    Returns:
        ``(c, h', w')``.
    """
    h, w = image.shape[-2:]
    x, y = (column + 1.0) * (w / 2) - 0.5, (row + 1.0) * (h / 2) - 0.5
    left, top = torch.floor(x), torch.floor(y)
    pixels = image.flatten(1)
    total = torch.zeros_like(pixels[:, :1, None])
    for i, wy in ((top, 1.0 - (y - top)), (top + 1.0, y - top)):
        for j, wx in ((left, 1.0 - (x - left)), (left + 1.0, x - left)):
            inside = (i >= 0) & (i < h) & (j >= 0) & (j < w)
            index = i.clamp(0, h - 1).long() * w + j.clamp(0, w - 1).long()
            total = total + pixels[:, index] * torch.where(inside, wx * wy, 0.0)
    return total
