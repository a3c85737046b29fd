"""Conversion between decorrelated colour and image channels (RGB).

The channels of natural images are strongly correlated. Optimising in a decorrelated basis and mapping to RGB at the end
removes the saturated colour noise of optimising RGB directly (Olah, Mordvintsev and Schubert, "Feature Visualization",
Distill 2017).
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

# Square root (by SVD) of the colour covariance of ImageNet, one row per RGB channel, divided by its largest column
# norm. Source: lucid/optvis/param/color.py, tensorflow/lucid at v0.3.8.
IMAGENET_CORRELATION: tuple[tuple[float, ...], ...] = tuple(
    tuple(value / 0.4619524 for value in row) for row in ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
)

# Eigenvalues below this fraction of the largest one count as zero.
_MIN_RELATIVE_VARIANCE = 1e-10

Correlation: TypeAlias = Sequence[Sequence[float]] | Tensor | str | None
"""``"auto"``, ``"imagenet"``, ``None`` or a matrix: see :func:`correlation_matrix`."""


def correlation_matrix(
    channels: int, correlation: Correlation = "auto", *, device: torch.device | str | None = None
) -> Tensor | None:
    """Return the matrix from decorrelated colour to image channels.

    Args:
        channels: number of image channels.
        correlation: ``"auto"`` (that of ImageNet for 3 channels, otherwise the identity), ``"imagenet"``, ``None`` (the
            identity), or a matrix ``(channels, channels)`` with one row per channel. The parameterisations take
            ``"auto"`` as the identity for signals, whose channels are no colours.
        device: device of the matrix.

    Returns:
        float32 ``(channels, channels)``, or ``None`` for the identity.

    Raises:
        ValueError: if the matrix has the wrong shape or is not finite, or
            ``"imagenet"`` is given for other than 3 channels.

    >>> correlation_matrix(3).shape, correlation_matrix(1)
    (torch.Size([3, 3]), None)
    """
    if isinstance(correlation, str) and correlation == "auto":
        correlation = "imagenet" if channels == 3 else None
    if correlation is None:
        return None
    if isinstance(correlation, str):
        if correlation != "imagenet":
            raise ValueError(
                f"unknown colour correlation {correlation!r}; expected 'auto', 'imagenet', None or a matrix"
            )
        correlation = IMAGENET_CORRELATION
    matrix = torch.as_tensor(correlation, dtype=torch.float32, device=device).detach().clone()
    if matrix.shape != (channels, channels) or not bool(matrix.isfinite().all()):
        raise ValueError(
            f"the colour correlation of {channels} channels must be a finite {channels} x {channels} matrix,"
            f" got shape {tuple(matrix.shape)}"
        )
    return matrix


def correlation_of(covariance: Tensor) -> Tensor:
    """Return the matrix from decorrelated colour to image channels, for a given covariance of the channels.

    ``U @ sqrt(S)``, with the eigenvectors and eigenvalues ``covariance = U @ S @ U.T`` in decreasing order, divided by
    its largest column norm. Signs are chosen so that the entry of largest magnitude in each column is positive.

    Args:
        covariance: float ``(c, c)``, symmetric, not zero everywhere.

    Returns:
        ``(c, c)``, of the dtype of ``covariance``. Columns of directions without variance are zero.

    Source: ``color_correlation_svd_sqrt`` in lucid/optvis/param/color.py; the choice of signs is ours.

    >>> correlation_of(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    tensor([[0.0000, 0.5000],
            [1.0000, 0.0000]])
    """
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    # Rounding leaves small non-zero eigenvalues for directions without variance.
    values = torch.where(values > _MIN_RELATIVE_VARIANCE * values[0], values, 0.0)
    signs = torch.take_along_dim(vectors, vectors.abs().argmax(0, keepdim=True), 0).sign()
    return vectors * signs * torch.sqrt(values / values[0])


def correlate(image: Tensor, matrix: Tensor | None) -> Tensor:
    """Map decorrelated colour to image channels: ``y[i] = sum_j matrix[i, j] * x[j]`` per pixel.

    Args:
        image: float ``(c, h, w)``, or with any number of axes after the first.
        matrix: ``(c, c)``, or ``None`` for the identity.

    Returns:
        Of the same shape.

    >>> correlate(torch.ones(3, 1, 1), torch.eye(3)).flatten()
    tensor([1., 1., 1.])
    """
    if matrix is None:
        return image
    matrix = matrix.to(image)
    if torch.compiler.is_compiling():
        # Becomes part of the operations around it, where a product of matrices would read and write the image.
        return (matrix.reshape(*matrix.shape, *(1,) * (image.ndim - 1)) * image).sum(1)
    return torch.einsum("ij,j...->i...", matrix, image)


def decorrelate(image: Tensor, matrix: Tensor | None) -> Tensor:
    """Invert :func:`correlate`.

    Args:
        image: float ``(c, h, w)``, or with any number of axes after the first.
        matrix: ``(c, c)``, invertible, or ``None`` for the identity.

    Returns:
        Of the same shape.

    >>> x = torch.rand(3, 4, 5)
    >>> m = correlation_matrix(3)
    >>> torch.allclose(decorrelate(correlate(x, m), m), x, atol=1e-5)
    True
    """
    if matrix is None:
        return image
    inverse = torch.linalg.inv(matrix.to(device=image.device, dtype=torch.float64))
    return torch.einsum("ij,j...->i...", inverse.to(image.dtype), image)
