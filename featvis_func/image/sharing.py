"""Images of which a part is common to all filters of a run."""

import torch

from featvis_func.color import Correlation
from featvis_func.image.base import Canvas, value_range
from featvis_func.tree import tree_map
from featvis_func.types import Image, Key, Params


def shared(
    own: Canvas, common: Canvas, *, correlation: Correlation = "auto", device: torch.device | str | None = None
) -> Image:
    """One part of each filter's own and one common to all: neighbours among the pictures keep the same layout.

    ``sigmoid(matrix @ (x_own + x_common))`` per pixel. Each filter carries a copy of the common parameters; all copies
    start as zero, and ``share_params`` replaces what they gain by its mean over the filters of the run, so that they stay
    equal.

    Args:
        own: of each filter, such as a :func:`fourier_canvas`.
        common: of all filters, of the same shape. Lucid's choice are the coarser levels of a pyramid,
            ``pyramid_canvas(size, first=1)``; ``fourier_canvas(size, below=0.05)`` has the low frequencies, and
            ``fourier_canvas(size)`` a whole second image.
        correlation: see :func:`~featvis_func.color.correlation_matrix`.
        device: where the matrix lives.

    Returns:
        An :class:`~featvis_func.Image` with parameters ``(own, common)``. A picture to start from is encoded in
        the own part alone.

    Raises:
        ValueError: canvases of different shapes, or a correlation of another shape.

    Source: Mordvintsev et al., "Differentiable Image Parameterizations", Distill 2018, section "Aligned Feature
    Visualization Interpolation", and its notebook aligned_interpolation.ipynb: ``fft_image`` of each, and
    low-resolution tensors of all, 1/2 to 1/16 of the size. Deviation: these start as zero instead of at random.

    >>> from featvis_func.image import fourier_canvas, pyramid_canvas
    >>> image = shared(fourier_canvas(32), pyramid_canvas(32, first=1))
    >>> own, common = image.init(torch.tensor([0, 1]))
    >>> own.shape, [tuple(level.shape) for level in common]
    (torch.Size([3, 32, 17, 2]), [(3, 16, 16), (3, 8, 8), (3, 4, 4), (3, 2, 2)])
    """
    if own.shape != common.shape:
        raise ValueError(f"a shared canvas must have the shape of the own one, {own.shape}, got {common.shape}")
    values = value_range(own.shape[0], correlation, device)

    def init(key: Key) -> Params:
        return own.init(key), tree_map(torch.zeros_like, common.init(key))

    def share_params(params: Params) -> Params:
        mine, ours = params
        return mine, tree_map(lambda leaf: leaf.mean(0, keepdim=True).expand_as(leaf), ours)

    def encode(picture: torch.Tensor) -> Params:
        pixels = values.leave(picture)
        return own.encode(pixels), tree_map(torch.zeros_like, common.encode(pixels))

    return Image(
        init, lambda params: values.enter(own.decode(params[0]) + common.decode(params[1])), share_params, encode
    )
