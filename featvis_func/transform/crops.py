"""Geometric steps that show a part of the image: a window of its pixels, or a share of it."""

import math

import torch
from torch import Tensor

from featvis_func.transform.affine import Affine, matrix_of


def crop(size: int | tuple[int, int]) -> Affine:
    """Shows a window of ``size`` pixels, at a place drawn uniformly inside the image.

    Nothing is enlarged where the view is as large: ``warp(crop((128, 128)), size=(128, 128))`` shows 128 pixels of the
    image as 128. The window's place is no whole number of pixels; the image is sampled between them.

    Args:
        size: of the window, ``h = w`` or ``(h, w)``, in pixels of the image.

    Raises:
        ValueError: no whole pixels; at the image, a window larger than the frame that it is cut from.

    >>> crop((2, 4)).matrix(torch.tensor([0.5, 1.0]))
    tensor([[ 1.0000,  0.0000, -0.0000,  0.0000,  0.0000],
            [ 0.0000,  1.0000, -1.0000,  0.0000,  0.5000],
            [ 0.0000,  0.0000,  1.0000,  0.0000,  0.0000]])
    """
    rows, columns = _sides("crop", size)

    def matrix(u: Tensor) -> Tensor:
        at = u - 0.5  # of what the image is larger than the window
        one, zero = torch.ones_like(at[0]), torch.zeros_like(at[0])
        return matrix_of((one, zero, at[0] * -columns, at[0], zero), (zero, one, at[1] * -rows, zero, at[1]))

    def frame(h: float, w: float) -> tuple[float, float]:
        if rows > h or columns > w:
            raise ValueError(
                f"no crop of {rows} x {columns} pixels from {h:g} x {w:g}; crop_or_pad fills what is lacking"
            )
        return rows, columns

    return Affine(2, matrix, frame=frame)


def crop_or_pad(size: int | tuple[int, int]) -> Affine:
    """Shows exactly ``size`` pixels about the centre; where the image has fewer, the padding of :func:`warp`.

    Where the sides differ by an odd number, the centre lies between two pixels and the image is sampled there.

    Args:
        size: ``h = w`` or ``(h, w)``, in pixels of the image.

    Raises:
        ValueError: no whole pixels.

    >>> crop_or_pad(64).frame(100, 50)
    (64, 64)
    """
    sides = _sides("crop_or_pad", size)
    return Affine(0, lambda u: torch.eye(3, device=u.device), frame=lambda h, w: sides)


def box_crop(
    low: float = 0.05,
    high: float = 1.0,
    *,
    normal: tuple[float, float] | None = (0.25, 0.1),
    centre_sd: float | None = 0.15,
) -> Affine:
    """Shows a random box, a small copy of the frame, enlarged to the whole of it.

    Its sides are ``s`` times the frame's, with ``s ~ N(mean, sd)`` clamped to ``[low, high]``, or ``s ~ U(low, high)``.
    Its centre is normal about the image's, and boxes may reach beyond the border; or uniform where they fit inside.

    What :func:`warp` filters down first is judged by the mean of ``s``: boxes that are larger skip pixels.

    Args:
        low, high: bounds of the sides, in shares of the frame's, above 0 and at most 1.
        normal: mean and standard deviation of the sides; ``None``: they are uniform between the bounds.
        centre_sd: standard deviation of the centre, in shares of the image's sides; ``None``: uniform inside.

    Raises:
        ValueError: bounds outside of ``(0, 1]`` or reversed, a mean outside of them, a negative deviation.

    Source: MACO (Fel et al., "Unlocking feature visualization for deeper networks with magnitude constrained
    optimization", NeurIPS 2023): sides N(0.25, 0.1). The clamp and the centre are those of its code,
    ``xplique/features_visualizations/maco.py``. Deviation: no step is told how far the run is, so that the mean does
    not fall with the steps as it can there. Horama's boxes are ``box_crop(0.2, 0.25, normal=None)``.

    >>> step = box_crop(0.2, 0.4, normal=None, centre_sd=None)
    >>> [round(side, 3) for side in step.frame(100, 200)]
    [30.0, 60.0]
    >>> step.matrix(torch.tensor([0.5, 0.5, 1.0]))
    tensor([[1.0000, 0.0000, 0.0000, 0.0000, 0.0000],
            [0.0000, 1.0000, 0.0000, 0.0000, 0.3500],
            [0.0000, 0.0000, 1.0000, 0.0000, 0.0000]])
    """
    if not 0 < low <= high <= 1:
        raise ValueError(f"box_crop: expected 0 < low <= high <= 1, in shares of the image, got {low} and {high}")
    mean, sd = ((low + high) / 2, 0.0) if normal is None else normal
    if not (low <= mean <= high and 0 <= sd < math.inf):
        raise ValueError(f"box_crop: expected a mean in [{low}, {high}] and a deviation of at least 0, got {normal}")
    if centre_sd is not None and not 0 <= centre_sd < math.inf:
        raise ValueError(f"box_crop: centre_sd must be finite and at least 0, got {centre_sd}")

    def matrix(u: Tensor) -> Tensor:
        drawn = u[0] * (high - low) + low if normal is None else mean + sd * _normal(u[0], u[1])[0]
        side = drawn.clamp(low, high)
        x, y = u[-2], u[-1]
        if centre_sd is None:
            x, y = (x - 0.5) * (1.0 - side), (y - 0.5) * (1.0 - side)
        else:
            x, y = (centre_sd * z for z in _normal(x, y))
        zoom, zero = side / mean, torch.zeros_like(side)
        return matrix_of((zoom, zero, zero, x, zero), (zero, zoom, zero, zero, y))

    return Affine(3 if normal is None else 4, matrix, frame=lambda h, w: (h * mean, w * mean))


def _normal(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two normal numbers of two uniform ones in ``[0, 1)``, by Box and Muller."""
    radius, angle = torch.sqrt(-2.0 * torch.log1p(-u)), 2.0 * math.pi * v
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _sides(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"{name}: the size must be whole pixels, at least 1, or (h, w) of such, got {size}")
    return sides
