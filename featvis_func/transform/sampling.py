"""From an image to a view of it: one matrix, one bilinear sampling."""

import torch
import torch.nn.functional as F
from torch import Tensor

from featvis_func.random import uniform
from featvis_func.transform.affine import Affine
from featvis_func.types import Key, Transform

# Beyond this reduction bilinear sampling would skip pixels, and the image is filtered down first.
_MAX_REDUCTION = 1.5


def warp(*steps: Affine, size: tuple[int, int], padding: float = 0.5, deterministic: bool = False) -> Transform:
    """Composes geometric steps into ONE matrix and ONE bilinear sampling, at the model's input size.

    The first step acts on the image first. The frame (the image, widened and narrowed by :func:`pad` and the crops)
    fills the output. Frames more than 1.5 times larger than the output are filtered down first, so that no pixel is
    skipped.

    Args:
        steps: any number of geometric steps; none merely resizes.
        size: ``(h', w')`` of the output in pixels.
        padding: the value outside of the image.
        deterministic: sample by four indexings instead of ``grid_sample``, whose backward pass adds in no fixed order
            on CUDA; to be run under ``torch.use_deterministic_algorithms(True)``. Equal up to rounding; slower.

    Returns:
        A :class:`Transform` whose draw is the matrix: ``(3, 3)``, or ``(3, 5)`` where a step's shift is a share of the
        image's sides, as a crop's (see :class:`Affine`).

    Raises:
        ValueError: an output side below 1, or steps that crop the whole image away, or more than there is of it.

    Gradient: flows to the image, not to the matrix.

    >>> view = warp(size=(2, 2), padding=0.0)
    >>> view.apply(torch.ones(1, 2, 2), view.draw(torch.tensor([0, 1])))
    tensor([[[1., 1.],
             [1., 1.]]])
    """
    out_h, out_w = size
    if out_h < 1 or out_w < 1:
        raise ValueError(f"the view's size must be at least 1 x 1 pixels, got {out_h} x {out_w}")

    def draw(key: Key) -> Tensor:
        numbers = uniform(key, (sum(step.numbers for step in steps),)).split([step.numbers for step in steps])
        matrix = torch.eye(3, device=key.device)
        for step, own in zip(steps, numbers, strict=True):
            matrix = _compose(matrix, step.matrix(own))
        return matrix

    def apply(image: Tensor, matrix: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        frame_h, frame_w = _frame(steps, h, w)
        image = _reduce(_reduce(image, -2, frame_h / out_h), -1, frame_w / out_w)
        matrix = matrix.detach().to(image.dtype)
        across, down = matrix[0, 2], matrix[1, 2]
        if matrix.shape[1] == 5:  # shares of the image's sides, known only now
            across = across + matrix[0, 3] * w + matrix[0, 4] * h
            down = down + matrix[1, 3] * w + matrix[1, 4] * h
        grid = _grid(matrix, (across, down), (h, w), (frame_h, frame_w), size)
        if deterministic:
            return _sample(image - padding, *grid.unbind(-1)) + padding
        view = F.grid_sample(
            (image - padding)[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False
        )
        return view[0] + padding

    return Transform(draw, apply)


def _frame(steps: tuple[Affine, ...], h: int, w: int) -> tuple[float, float]:
    """Height and width of what is shown of an image, in its pixels."""
    frame: tuple[float, float] = (h, w)
    for step in steps:
        frame = (frame[0] + step.grow, frame[1] + step.grow) if step.frame is None else step.frame(*frame)
    if min(frame) <= 0:
        raise ValueError(f"the view's steps crop {max(h - frame[0], w - frame[1]):g} pixels from an image of {h} x {w}")
    return frame


def _compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The matrix that looks up by ``inner`` and then by ``outer``: each ``(3, 3)``, or ``(3, 5)`` with shares of the
    image's sides, which the outer step neither turns nor scales."""
    # Sums of products written out: a matrix product may round otherwise in another batch.
    if outer.shape[1] == 3:
        return (outer[:, :, None] * inner[None, :, :]).sum(1)
    shares = F.pad(outer[:, 3:], (3, 0))
    return F.pad((outer[:, :3, None] * inner[None, :, :]).sum(1), (0, 5 - inner.shape[1])) + shares


def _grid(
    matrix: Tensor,
    shift: tuple[Tensor, Tensor],
    image: tuple[int, int],
    frame: tuple[float, float],
    size: tuple[int, int],
) -> Tensor:
    """Where to look for each pixel of the output, across and down, in half sides of the image from its centre.

    Args:
        matrix: at least ``(2, 2)``.
        shift: two ``()``, in pixels of the image.
        image: its ``(h, w)``.
        frame: ``(h, w)`` of what is shown, in pixels of the image.
        size: ``(h', w')`` of the output.

    Returns:
        ``(h', w', 2)``.
    """
    x = _centred(size[1], matrix) * (frame[1] / size[1])
    y = _centred(size[0], matrix)[:, None] * (frame[0] / size[0])

    def half_sides(row: Tensor, shift: Tensor, side: int) -> Tensor:
        return torch.addcmul((row[0] * x + shift) * (2.0 / side), row[1] * (2.0 / side), y)

    return torch.stack([half_sides(matrix[0], shift[0], image[1]), half_sides(matrix[1], shift[1], image[0])], dim=-1)


def _centred(count: int, like: Tensor) -> Tensor:
    """Pixel centres along a side, from the middle: ``(count,)``."""
    return torch.arange(count, device=like.device, dtype=like.dtype) + (0.5 - count / 2)


def _reduce(image: Tensor, dim: int, reduction: float) -> Tensor:
    """Filters one side down by a triangle (antialiased bilinear), if it is reduced by more than 1.5."""
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
    """``grid_sample``, bilinear with zeros outside, by indexing.

    Of indexing torch has a backward pass that adds in a fixed order; it takes it under deterministic algorithms.

    Args:
        image: ``(c, h, w)``.
        column, row: ``(h', w')``, where to look, in half sides from the centre.

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
