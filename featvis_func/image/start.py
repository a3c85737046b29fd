"""Images that start from a picture."""

import math

import torch
from torch import Tensor

from featvis_func.image.base import MARGIN
from featvis_func.random import key as make_key
from featvis_func.tree import tree_map
from featvis_func.types import Image, Key, Params

# How far the decoded start may be from the picture: what the margin moves, and rounding.
_TOLERANCE = MARGIN + 1e-4


def from_image(image: Image, picture: Tensor, *, noise: float = 0.0) -> Image:
    """The same parameterisation, starting from a picture.

    ``init(key) = encode(picture) + noise * image.init(key)``, so that the first image is the picture to 0.0011; values
    closer to 0 or 1 than 2**-10 are moved to that distance, since the sigmoid reaches neither.

    Args:
        image: any that encodes; :func:`cppn` does not. For :func:`phase` give it the picture's own magnitudes, by
            :func:`magnitude_of`.
        picture: float32 or float64 ``(c, h, w)`` in ``[0, 1]``, of the image's shape.
        noise: times the parameterisation's random start that are added, at least 0; 0: all filters start alike.

    Returns:
        An :class:`Image` whose ``init`` alone is another. Its parameters have the picture's dtype.

    Raises:
        ValueError: a picture of another shape, dtype or range, a parameterisation that cannot encode or cannot show it,
            or negative noise.

    >>> from featvis_func.image import fourier
    >>> picture = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    >>> image = from_image(fourier((5, 4)), picture)
    >>> torch.allclose(image.decode(image.init(torch.tensor([0, 1]))), picture, atol=2e-3)
    True
    """
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be finite and at least 0, got {noise}")
    if image.encode is None:
        raise ValueError("this parameterisation cannot start from a picture: it has no encode (as a cppn has none)")
    what = picture.dtype if isinstance(picture, Tensor) else type(picture).__name__
    if what not in (torch.float32, torch.float64):
        raise ValueError(f"a picture to start from must be float32 or float64 (c, h, w) in [0, 1], got {what}")
    shape = tuple(image.decode(image.init(make_key(0, device=picture.device))).shape)
    if tuple(picture.shape) != shape:
        raise ValueError(
            f"the picture has shape {tuple(picture.shape)}, the image {shape}; resize the picture (as by"
            " torch.nn.functional.interpolate(picture[None], size=(h, w), mode='bilinear', antialias=True)[0]),"
            " or make the image for its size and channels"
        )
    if not bool(((picture >= 0) & (picture <= 1)).all()):
        raise ValueError(
            f"the picture must be in [0, 1], got {picture.min().item():g} to {picture.max().item():g};"
            " divide bytes by 255"
        )
    picture = picture.detach().clone()
    try:
        start = image.encode(picture)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError("the colour correlation cannot be inverted, and so no picture be encoded") from error
    error = (image.decode(start) - picture).abs().max().item()
    if not error <= _TOLERANCE:
        raise ValueError(
            f"this parameterisation cannot show the picture: it comes out different by up to {error:.2g}; phase() needs"
            " the picture's own magnitude=magnitude_of(picture) and contrast=None; part of a canvas holds only a part"
        )

    def init(key: Key) -> Params:
        begun = tree_map(lambda leaf: leaf.to(key.device), start)
        if not noise:
            return begun
        return tree_map(lambda leaf, drawn: leaf + noise * drawn.to(leaf), begun, image.init(key))

    return image._replace(init=init)
