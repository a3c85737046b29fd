"""Convert tensors to uint8 and to PIL images."""

import PIL.Image
import torch
from einops import rearrange
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Convert values in ``[0, 1]`` to uint8, clamped and rounded to nearest.

    Args:
        images: float tensor of any shape.

    Returns:
        uint8 tensor of the same shape, on the same device.

    >>> to_uint8(torch.tensor([-0.1, 0.0, 0.5, 1.0])).tolist()
    [0, 0, 128, 255]
    """
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def picture(image: Tensor) -> PIL.Image.Image:
    """Convert an image tensor to a PIL image.

    Args:
        image: ``(c, h, w)``, float in ``[0, 1]`` or uint8. 1 channel is grey, 3 are RGB, 4 are RGBA; any other number
            is shown as grey images side by side.

    Returns:
        A PIL image of mode ``L``, ``RGB`` or ``RGBA``.

    >>> picture(torch.zeros(2, 4, 5)).size
    (10, 4)
    """
    values = (image if image.dtype == torch.uint8 else to_uint8(image)).cpu()
    if values.shape[0] in (3, 4):
        return PIL.Image.fromarray(rearrange(values, "c h w -> h w c").contiguous().numpy())
    return PIL.Image.fromarray(rearrange(values, "c h w -> h (c w)").contiguous().numpy())
