"""What parameterisations are made of: sizes, canvases, and the way between a canvas and the valid range."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.color import Correlation, correlate, correlation_matrix, decorrelate
from featvis_func.types import Image, Key, Params
from featvis_func.validation import check_size

# Of a picture that is encoded, values closer to 0 or 1 are moved to this distance: the sigmoid reaches neither, and has
# hardly a gradient near them.
MARGIN = 2.0**-10


class Canvas(NamedTuple):
    """A picture before its colours and its range: unbounded, in decorrelated colour, and linear in its parameters.

    Pictures of equal shape can be added before :func:`bounded` maps their sum into the range, which those of an
    :class:`~featvis_func.Image` cannot.
    """

    shape: tuple[int, int, int]
    """``(c, h, w)`` of the picture."""
    init: Callable[[Key], Params]
    """key -> parameters."""
    decode: Callable[[Params], Tensor]
    """parameters -> ``(c, h, w)`` float, unbounded."""
    encode: Callable[[Tensor], Params]
    """``(c, h, w)`` unbounded -> parameters; what the canvas cannot hold is left out."""


def image_shape(size: int | tuple[int, int], channels: int) -> tuple[int, int, int]:
    """Checks and completes the shape of an image.

    Args:
        size: as for :func:`~featvis_func.validation.check_size`.
        channels: at least 1.

    Returns:
        ``(c, h, w)``.

    Raises:
        ValueError: a side or the channels are below 1.

    >>> image_shape(64, 3)
    (3, 64, 64)
    """
    h, w = check_size(size)
    if channels < 1:
        raise ValueError(f"an image needs at least 1 channel, got {channels}")
    return channels, h, w


class Range(NamedTuple):
    """The way from decorrelated, unbounded colour to channels in ``[0, 1]``, and back."""

    enter: Callable[[Tensor], Tensor]
    """``sigmoid(matrix @ x)`` per pixel."""
    leave: Callable[[Tensor], Tensor]
    """Its inverse, of values moved away from 0 and 1 by :data:`MARGIN`."""


def value_range(channels: int, correlation: Correlation, device: torch.device | str | None) -> Range:
    """The range of a parameterisation's values.

    Args:
        channels: of the image.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: where the matrix lives.

    Raises:
        ValueError: a correlation of another shape.

    >>> values = value_range(1, None, None)
    >>> round(values.leave(values.enter(torch.full((1, 1, 1), 2.0))).item(), 4)
    2.0
    """
    matrix = correlation_matrix(channels, correlation, device=device)

    def leave(picture: Tensor) -> Tensor:
        return decorrelate(torch.logit(picture.clamp(MARGIN, 1.0 - MARGIN)), matrix)

    return Range(lambda pixels: torch.sigmoid(correlate(pixels, matrix)), leave)


def bounded(canvas: Canvas, *, correlation: Correlation = "auto", device: torch.device | str | None = None) -> Image:
    """The image of a canvas: ``sigmoid(matrix @ x)`` per pixel.

    Args:
        canvas: such as a :func:`~featvis_func.image.fourier_canvas`.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: where the matrix lives; decoding elsewhere is right but copies it.

    Returns:
        An :class:`~featvis_func.Image` with the canvas's parameters.

    Raises:
        ValueError: a correlation of another shape.

    >>> from featvis_func.image import pixel_canvas
    >>> bounded(pixel_canvas(1, channels=1)).decode(torch.zeros(1, 1, 1))
    tensor([[[0.5000]]])
    """
    values = value_range(canvas.shape[0], correlation, device)
    return Image(
        canvas.init,
        lambda params: values.enter(canvas.decode(params)),
        encode=lambda picture: canvas.encode(values.leave(picture)),
    )
