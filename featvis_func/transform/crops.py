"""Random crops, as affine steps: windows of a fixed size in pixels, or of a fraction of the image."""

import math

import torch
from torch import Tensor

from featvis_func.transform.affine import Affine, matrix_of
from featvis_func.validation import check_float, check_sides


def crop(size: int | tuple[int, int]) -> Affine:
    """Crop a window of ``size`` pixels at a position that is uniform inside the image.

    The window is not resized if the output of :func:`warp` has the same size: ``warp(crop(128), size=(128, 128))``.
    Positions are not rounded to whole pixels; the image is interpolated.

    Args:
        size: size of the window in image pixels, ``h = w`` or ``(h, w)``.

    Raises:
        ValueError: if the size is not a positive integer or a pair of such; when applied, if the window is larger than
            the frame it is cropped from.

    >>> crop((2, 4)).matrix(torch.tensor([0.5, 1.0]))
    tensor([[ 1.0000,  0.0000, -0.0000,  0.0000,  0.0000],
            [ 0.0000,  1.0000, -1.0000,  0.0000,  0.5000],
            [ 0.0000,  0.0000,  1.0000,  0.0000,  0.0000]])
    """
    rows, columns = check_sides(size)

    def matrix(u: Tensor) -> Tensor:
        x, y = (u - 0.5).unbind()  # position, as a fraction of image size minus window size
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        return matrix_of((one, zero, x * -columns, x, zero), (zero, one, y * -rows, zero, y))

    def frame(h: float, w: float) -> tuple[float, float]:
        if rows > h or columns > w:
            raise ValueError(
                f"crop of {rows} x {columns} pixels is larger than the frame of {h:g} x {w:g}; crop_or_pad would pad it"
            )
        return rows, columns

    return Affine(2, matrix, frame=frame)


def crop_or_pad(size: int | tuple[int, int]) -> Affine:
    """Crop or pad to ``size`` pixels about the centre, with the padding value of :func:`warp`.

    If image and window sizes differ by an odd number, the image is sampled halfway between pixels.

    Args:
        size: size of the window in image pixels, ``h = w`` or ``(h, w)``.

    Raises:
        ValueError: if the size is not a positive integer or a pair of such.

    >>> crop_or_pad(64).frame(100, 50)
    (64, 64)
    """
    sides = check_sides(size)
    return Affine(0, lambda u: torch.eye(3, dtype=u.dtype, device=u.device), frame=lambda h, w: sides)


def box_crop(
    low: float = 0.05,
    high: float = 1.0,
    *,
    normal: tuple[float, float] | None = (0.25, 0.1),
    centre_sd: float | None = 0.15,
) -> Affine:
    """Crop a random box with the aspect ratio of the frame, resized to the output of :func:`warp`.

    The sides of the box are ``s`` times those of the frame, with ``s ~ N(mean, sd)`` clamped to ``[low, high]``, or
    ``s ~ U(low, high)``. Its centre is normal about the image centre, so that boxes may extend beyond the border, or
    uniform over the positions inside the image (or, for larger boxes, over those that hold the image).

    :func:`warp` chooses its antialiasing filter for the mean of ``s``, so larger boxes are subsampled.

    Args:
        low, high: bounds of ``s``, above 0. A box with ``s`` above 1 holds the whole image, and padding around it.
        normal: mean and standard deviation of ``s``. ``None``: uniform between the bounds.
        centre_sd: standard deviation of the centre, in fractions of the image sides. ``None``: uniform inside.

    Raises:
        ValueError: if the bounds are not above 0 or reversed, the mean is outside of the bounds, or a
            standard deviation is negative.

    Source: MACO (Fel et al., "Unlocking feature visualization for deeper networks with magnitude constrained
    optimization", NeurIPS 2023): sides N(0.25, 0.1). The clamp and the centre follow its code,
    ``xplique/features_visualizations/maco.py``. Deviation: the mean is constant, because transforms do not receive the
    step; there it can decrease over the steps. Horama's boxes are ``box_crop(0.2, 0.25, normal=None)``.

    >>> step = box_crop(0.2, 0.4, normal=None, centre_sd=None)
    >>> [round(side, 3) for side in step.frame(100, 200)]
    [30.0, 60.0]
    >>> step.matrix(torch.tensor([0.5, 0.5, 1.0]))
    tensor([[1.0000, 0.0000, 0.0000, 0.0000, 0.0000],
            [0.0000, 1.0000, 0.0000, 0.0000, 0.3500],
            [0.0000, 0.0000, 1.0000, 0.0000, 0.0000]])
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"box_crop: bounds must satisfy 0 < low <= high, got low={low} and high={high}")
    mean, sd = ((low + high) / 2, 0.0) if normal is None else normal
    if not (low <= mean <= high and 0 <= sd < math.inf):
        raise ValueError(f"box_crop: normal must be (mean in [{low}, {high}], sd >= 0), got {normal}")
    if centre_sd is not None:
        centre_sd = check_float("box_crop: centre_sd", centre_sd, 0)

    def matrix(u: Tensor) -> Tensor:
        side = u[0] * (high - low) + low if normal is None else mean + sd * _box_muller(u[0], u[1])[0]
        side = side.clamp(low, high)
        x, y = u[-2], u[-1]
        if centre_sd is None:
            x, y = (x - 0.5) * (1.0 - side), (y - 0.5) * (1.0 - side)
        else:
            x, y = (centre_sd * z for z in _box_muller(x, y))
        zoom, zero = side / mean, torch.zeros_like(side)
        return matrix_of((zoom, zero, zero, x, zero), (zero, zoom, zero, zero, y))

    return Affine(3 if normal is None else 4, matrix, frame=lambda h, w: (h * mean, w * mean))


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return two normal numbers from two uniform ones in ``[0, 1)``, by the Box-Muller transform."""
    radius, angle = torch.sqrt(-2.0 * torch.log1p(-u)), 2.0 * math.pi * v
    return radius * torch.cos(angle), radius * torch.sin(angle)
