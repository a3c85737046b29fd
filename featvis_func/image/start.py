"""Images that start from a given image."""

import torch
from torch import Tensor

from featvis_func.image.base import MARGIN
from featvis_func.random import key as make_key
from featvis_func.tree import tree_map
from featvis_func.types import Image, Key, Params
from featvis_func.validation import check_float

# Largest difference allowed between the decoded start and the picture: the clamping to MARGIN, and rounding.
_TOLERANCE = MARGIN + 1e-4


def from_image(image: Image, picture: Tensor, *, noise: float = 0.0) -> Image:
    """Return the same parameterisation, initialised from a given image.

    ``init(key) = encode(picture) + noise * image.init(key)``. With ``noise=0`` the decoded initial image equals
    ``picture`` to within 0.0011: values closer to 0 or 1 than ``2**-10`` are clamped to that distance, because the
    sigmoid reaches neither.

    Args:
        image: a parameterisation that has ``encode``; :func:`cppn` does not. :func:`phase` needs the magnitudes of the
            picture, see :func:`magnitude_of`.
        picture: float32 or float64 ``(c, h, w)`` in ``[0, 1]``, of the shape of the decoded image.
        noise: factor of the random initial parameters that are added, at least 0. With 0 all filters start from the
            same parameters.

    Returns:
        An :class:`Image` that differs from ``image`` in ``init`` only. Its parameters have the dtype of ``picture``.

    Raises:
        ValueError: if the picture has the wrong shape, dtype or range, if the parameterisation has no ``encode`` or
            cannot represent the picture, or if the noise is negative.

    >>> from featvis_func.image import fourier
    >>> picture = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    >>> image = from_image(fourier((5, 4)), picture)
    >>> torch.allclose(image.decode(image.init(torch.tensor([0, 1]))), picture, atol=2e-3)
    True
    """
    noise = check_float("noise", noise, 0)
    if image.encode is None:
        raise ValueError("this parameterisation cannot start from a picture, because it has no encode function")
    kind = picture.dtype if isinstance(picture, Tensor) else type(picture).__name__
    if kind not in (torch.float32, torch.float64):
        raise ValueError(f"the picture must be float32 or float64 (c, h, w) in [0, 1], got {kind}")
    shape = tuple(image.decode(image.init(make_key(0, device=picture.device))).shape)
    if tuple(picture.shape) != shape:
        raise ValueError(
            f"the picture has shape {tuple(picture.shape)}, the image {shape}; resize the picture, for"
            " example by torch.nn.functional.interpolate(picture[None], size=(h, w), mode='bilinear',"
            " antialias=True)[0], or create the image with the size and channels of the picture"
        )
    if not bool(((picture >= 0) & (picture <= 1)).all()):
        raise ValueError(
            f"the picture must be in [0, 1], got {picture.min().item():g} to {picture.max().item():g};"
            " divide 8-bit values by 255"
        )
    picture = picture.detach().clone()
    try:
        start = image.encode(picture)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError("the picture cannot be encoded, because the colour correlation matrix is singular") from error
    error = (image.decode(start) - picture).abs().max().item()
    if not error <= _TOLERANCE:
        raise ValueError(
            f"this parameterisation cannot represent the picture: the decoded image differs by up to {error:.2g};"
            " phase() needs magnitude=magnitude_of(picture) and contrast=None, and canvases must not be restricted"
            " to low frequencies or coarse levels"
        )

    def init(key: Key) -> Params:
        params = tree_map(lambda leaf: leaf.to(key.device), start)
        if not noise:
            return params
        return tree_map(lambda leaf, drawn: leaf + noise * drawn.to(leaf), params, image.init(key))

    return image._replace(init=init)
