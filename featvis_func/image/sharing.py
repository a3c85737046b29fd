"""Images with a component that all filters of a run share."""

import torch

from featvis_func.color import Correlation
from featvis_func.image.base import Canvas, value_range
from featvis_func.tree import tree_map
from featvis_func.types import Image, Key, Params


def shared(
    own: Canvas, common: Canvas, *, correlation: Correlation = "auto", device: torch.device | str | None = None
) -> Image:
    """Sum of a per-filter canvas and a canvas shared by all filters, so that their images have a common layout.

    ``sigmoid(matrix @ (x_own + x_common))`` per pixel. Each filter carries a copy of the common parameters. All copies
    start as zero, and ``share_params`` replaces their updates by the mean over the filters of the run, so that the
    copies stay equal.

    Args:
        own: canvas of each filter, for example a :func:`fourier_canvas`.
        common: canvas shared by all filters, of the same shape. Lucid shares the coarser levels of a pyramid,
            ``pyramid_canvas(size, first=1)``. ``fourier_canvas(size, below=0.05)`` shares the low frequencies, and
            ``fourier_canvas(size)`` a full second image.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: device of the matrix.

    Returns:
        An :class:`~featvis_func.Image` with parameters ``(own, common)``. ``encode`` writes the image into ``own`` and
        sets ``common`` to zero.

    Raises:
        ValueError: if the canvases have different shapes, or the correlation matrix has the wrong shape.

    Source: Mordvintsev et al., "Differentiable Image Parameterizations", Distill 2018, section "Aligned Feature
    Visualization Interpolation", and its notebook aligned_interpolation.ipynb: an ``fft_image`` per filter, and shared
    tensors at 1/2 to 1/16 of the resolution. Deviation: the shared parameters start as zero instead of at random.

    >>> from featvis_func.image import fourier_canvas, pyramid_canvas
    >>> image = shared(fourier_canvas(32), pyramid_canvas(32, first=1))
    >>> own, common = image.init(torch.tensor([0, 1]))
    >>> own.shape, [tuple(level.shape) for level in common]
    (torch.Size([3, 32, 17, 2]), [(3, 16, 16), (3, 8, 8), (3, 4, 4), (3, 2, 2)])
    """
    if own.shape != common.shape:
        raise ValueError(f"own and common must have the same shape, got {own.shape} and {common.shape}")
    values = value_range(own.shape, correlation, device)

    def init(key: Key) -> Params:
        return own.init(key), tree_map(torch.zeros_like, common.init(key))

    def decode(params: Params) -> torch.Tensor:
        return values.to_image(own.decode(params[0]) + common.decode(params[1]))

    def share_params(params: Params) -> Params:
        own_params, common_params = params
        return own_params, tree_map(lambda leaf: leaf.mean(0, keepdim=True).expand_as(leaf), common_params)

    def encode(picture: torch.Tensor) -> Params:
        pixels = values.to_canvas(picture)
        return own.encode(pixels), tree_map(torch.zeros_like, common.encode(pixels))

    return Image(init, decode, share_params, encode)
