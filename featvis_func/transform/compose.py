"""Compositions of transforms."""

import torch
from torch import Tensor
from torch.func import vmap

from featvis_func.random import split
from featvis_func.tree import tree_leaves
from featvis_func.types import Draw, Key, Transform
from featvis_func.validation import check_int


def chain(*transforms: Transform) -> Transform:
    """Apply transforms in order, each with an independent key.

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
    """Produce several independently transformed copies (views) of one image: ``(c, h, w)`` -> ``(v, c, h', w')``.

    Transforms that follow in a :func:`chain` receive all views: noise and backgrounds are independent for each view,
    while :func:`color_jitter`, :func:`gaussian_blur` and :func:`roll` use one draw for all of them. Inside of
    ``multiview`` every transform is drawn for each view.

    Args:
        transform: the transform that produces one view.
        count: number of views, at least 1.

    Returns:
        A :class:`Transform` whose draw is ``count`` stacked draws of ``transform``.

    Raises:
        ValueError: if ``count`` is below 1.

    >>> from featvis_func.transform import jitter, warp
    >>> views = multiview(warp(jitter(8), size=(32, 32)), 4)
    >>> views.apply(torch.rand(3, 64, 64), views.draw(torch.tensor([0, 1]))).shape
    torch.Size([4, 3, 32, 32])
    """
    count = check_int("multiview: count", count, 1)

    def draw(key: Key) -> Draw:
        return vmap(transform.draw)(torch.stack(split(key, count)))

    def apply(image: Tensor, draws: Draw) -> Tensor:
        if not tree_leaves(draws):  # without random numbers there is no axis to map over
            view = transform.apply(image, draws)
            return view.expand(count, *view.shape)
        return vmap(transform.apply, (None, 0))(image, draws)

    return Transform(draw, apply)
