"""Transforms of transforms."""

import torch
from torch import Tensor
from torch.func import vmap

from featvis_func.random import split
from featvis_func.tree import tree_leaves
from featvis_func.types import Draw, Key, Transform


def chain(*transforms: Transform) -> Transform:
    """Applies transforms in order, each with its own randomness.

    >>> from featvis_func.transform import normalize
    >>> t = chain(normalize([0.5], [1.0]), normalize([0.5], [1.0]))
    >>> t.apply(torch.ones(1, 1, 1), t.draw(torch.tensor([0, 1]))).item()
    0.0
    """

    def draw(key: Key) -> Draw:
        return tuple(t.draw(k) for t, k in zip(transforms, split(key, len(transforms)), strict=True))

    def apply(image: Tensor, draws: Draw) -> Tensor:
        for t, d in zip(transforms, draws, strict=True):
            image = t.apply(image, d)
        return image

    return Transform(draw, apply)


def multiview(transform: Transform, count: int) -> Transform:
    """Shows one image in several independent views at once: ``(c, h, w)`` -> ``(v, c, h', w')``.

    What follows in a :func:`chain` sees all views: noise and backgrounds are drawn for each, while one draw of
    :func:`color_jitter`, :func:`gaussian_blur` or :func:`roll` goes for all of them; inside of ``multiview`` every view
    has its own.

    Args:
        transform: what makes one view.
        count: views, at least 1.

    Returns:
        A :class:`Transform` whose draw is ``count`` draws of ``transform``, stacked.

    Raises:
        ValueError: fewer than 1 view.

    >>> from featvis_func.transform import jitter, warp
    >>> views = multiview(warp(jitter(8), size=(32, 32)), 4)
    >>> views.apply(torch.rand(3, 64, 64), views.draw(torch.tensor([0, 1]))).shape
    torch.Size([4, 3, 32, 32])
    """
    if count < 1:
        raise ValueError(f"multiview shows at least 1 view, got {count}")

    def draw(key: Key) -> Draw:
        return vmap(transform.draw)(torch.stack(split(key, count)))

    def apply(image: Tensor, draws: Draw) -> Tensor:
        if not tree_leaves(draws):  # nothing random: nothing to map over
            view = transform.apply(image, draws)
            return view.expand(count, *view.shape)
        return vmap(transform.apply, (None, 0))(image, draws)

    return Transform(draw, apply)
