"""From the saliency of an image to its opacity."""

import torch
import torch.nn.functional as F
from torch import Tensor

_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d}


def opacity_of(saliency: Tensor, percentile: float) -> Tensor:
    """Smooth saliency maps over 1/32 of their longest side, and divide each by its percentile.

    Args:
        saliency: ``(n, *positions)``. Frames of a video are smoothed one by one.
        percentile: of a map's values, in ``(0, 100]``.

    Returns:
        Opacities ``(n, *positions)`` in ``[0, 1]``.

    >>> opacity_of(torch.tensor([[0.0, 1.0, 4.0]]), 50.0)
    tensor([[0., 1., 1.]])
    """
    axes = min(saliency.ndim - 1, 2)
    radius = max(saliency.shape[-axes:]) // 64
    maps = saliency.reshape(-1, 1, *saliency.shape[-axes:])
    padded = F.pad(maps, (radius,) * (2 * axes), mode="replicate")
    smooth = _POOL[axes](padded, 2 * radius + 1, stride=1).reshape(len(saliency), -1)
    # One by one, because torch limits the number of values of all maps together.
    level = torch.stack([torch.quantile(values, percentile / 100) for values in smooth])[:, None]
    return (smooth / level.clamp_min(torch.finfo(smooth.dtype).tiny)).clamp(0, 1).reshape(saliency.shape)
