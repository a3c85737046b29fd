"""Building blocks of the parameterisations: image shapes, canvases, and the map from a canvas to the valid range."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from featvis_func.color import Correlation, correlate, correlation_matrix, decorrelate
from featvis_func.constants import device_constant
from featvis_func.types import Image, Key, Params
from featvis_func.validation import check_int, check_size

# Encoding clamps images to [MARGIN, 1 - MARGIN]: the sigmoid never reaches 0 or 1, and its gradient vanishes near them.
MARGIN = 2.0**-10


class Canvas(NamedTuple):
    """An unbounded image in decorrelated colour, linear in its parameters.

    Canvases of equal shape can be added before :func:`bounded` maps the sum into the valid range. Decoded
    :class:`~featvis_func.Image` values cannot be added, because the sum would leave that range.
    """

    shape: tuple[int, ...]
    """``(c, h, w)``, ``(c, t, h, w)`` or ``(c, t)`` of the decoded canvas."""
    init: Callable[[Key], Params]
    """key -> parameters."""
    decode: Callable[[Params], Tensor]
    """parameters -> float of this shape, unbounded."""
    encode: Callable[[Tensor], Params]
    """An unbounded image of this shape -> parameters. Components that the canvas cannot represent are dropped."""
    groups: Params | None = None
    """As of an :class:`~featvis_func.Image`."""


Size: TypeAlias = int | tuple[int, ...]
"""One number for a square, ``(h, w)``, ``(t, h, w)`` for a video or ``(t,)`` for a signal."""


def image_shape(size: Size, channels: int) -> tuple[int, ...]:
    """Validate an image size and a channel count, and return the image shape.

    Args:
        size: as for :func:`~featvis_func.validation.check_size`.
        channels: at least 1.

    Returns:
        ``(c, h, w)``, ``(c, t, h, w)`` or ``(c, t)``.

    Raises:
        ValueError: if a side or the channel count is below 1.

    >>> image_shape(64, 3), image_shape((1000,), 1)
    ((3, 64, 64), (1, 1000))
    """
    sides = check_size(size)
    return check_int("channels", channels, 1), *sides


class ValueRange(NamedTuple):
    """An invertible map from an unbounded canvas in decorrelated colour to an image in ``[0, 1]``."""

    to_image: Callable[[Tensor], Tensor]
    """``sigmoid(matrix @ x)`` per pixel."""
    to_canvas: Callable[[Tensor], Tensor]
    """The inverse of ``to_image``, applied to values clamped to ``[MARGIN, 1 - MARGIN]``; see :data:`MARGIN`."""


def value_range(shape: tuple[int, ...], correlation: Correlation, device: torch.device | str | None) -> ValueRange:
    """Return the map between a canvas and the valid range of an image.

    Args:
        shape: of the image, as :func:`image_shape` returns it.
        correlation: see :func:`~featvis_func.color.correlation_matrix`. The channels of a signal are no colours:
            ``"auto"`` is the identity for them, also if there are 3.
        device: device of the matrix.

    Raises:
        ValueError: if the correlation matrix has the wrong shape.

    >>> values = value_range((1, 1, 1), None, None)
    >>> round(values.to_canvas(values.to_image(torch.full((1, 1, 1), 2.0))).item(), 4)
    2.0
    """
    is_signal = len(shape) == 2
    if is_signal and isinstance(correlation, str) and correlation == "auto":
        correlation = None
    colors = correlation_matrix(shape[0], correlation, device=device)
    matrix = None if colors is None else device_constant(colors)

    def to_image(pixels: Tensor) -> Tensor:
        return torch.sigmoid(pixels if matrix is None else correlate(pixels, matrix(pixels)))

    def to_canvas(picture: Tensor) -> Tensor:
        return decorrelate(torch.logit(picture.clamp(MARGIN, 1.0 - MARGIN)), colors)

    return ValueRange(to_image, to_canvas)


def bounded(canvas: Canvas, *, correlation: Correlation = "auto", device: torch.device | str | None = None) -> Image:
    """Map a canvas into the valid range: ``sigmoid(matrix @ x)`` per pixel.

    Args:
        canvas: for example a :func:`~featvis_func.image.fourier_canvas`.
        correlation: see :func:`~featvis_func.color.correlation_matrix`; ``"auto"`` is the identity for signals.
        device: device of the matrix; it is copied once to each other one.

    Returns:
        An :class:`~featvis_func.Image` with the parameters of the canvas.

    Raises:
        ValueError: if the correlation matrix has the wrong shape.

    >>> from featvis_func.image import pixel_canvas
    >>> bounded(pixel_canvas(1, channels=1)).decode(torch.zeros(1, 1, 1))
    tensor([[[0.5000]]])
    """
    values = value_range(canvas.shape, correlation, device)
    return Image(
        canvas.init,
        lambda params: values.to_image(canvas.decode(params)),
        encode=lambda picture: canvas.encode(values.to_canvas(picture)),
        groups=canvas.groups,
    )
