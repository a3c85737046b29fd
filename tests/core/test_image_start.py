"""Starting from a picture, and parts that all filters share."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from featvis_func import random
from featvis_func.image import (
    alpha,
    cppn,
    fourier,
    fourier_canvas,
    from_image,
    laplacian_pyramid,
    magnitude_of,
    phase,
    pixel,
    pixel_canvas,
    pyramid_canvas,
    shared,
)
from featvis_func.tree import tree_leaves, tree_map
from featvis_func.types import Image

KEYS = torch.stack([random.key(seed) for seed in range(3)])


def random_picture(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """With some values at the very ends of the range."""
    picture = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return torch.where(picture < 0.1, 0.0, torch.where(picture > 0.9, 1.0, picture))


def own_phase(size: tuple[int, int], *, channels: int, **options: Any) -> Image:
    magnitude = magnitude_of(random_picture((channels, *size)), **options)
    return phase(size, channels=channels, magnitude=magnitude, contrast=None, **options)


def opacity(size: tuple[int, int], *, channels: int, **options: Any) -> Image:
    return alpha(size, channels=channels - 1, **options)


def aligned(size: tuple[int, int], *, channels: int, **options: Any) -> Image:
    return shared(fourier_canvas(size, channels=channels), pixel_canvas(size, channels=channels), **options)


ENCODING = [fourier, pixel, own_phase, laplacian_pyramid, opacity, aligned]


@pytest.mark.parametrize("factory", ENCODING)
@pytest.mark.parametrize("channels", [2, 3, 4, 13])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (6, 9), (9, 6), (1, 1), (1, 5), (4, 1), (2, 2)], ids=str)
def test_the_first_image_is_the_picture(factory: Callable[..., Image], size: tuple[int, int], channels: int) -> None:
    picture = random_picture((channels, *size))
    image = from_image(factory(size, channels=channels), picture)
    decoded = vmap(image.decode)(vmap(image.init)(KEYS))
    torch.testing.assert_close(decoded, picture.expand(3, *picture.shape), rtol=0, atol=1.1e-3)


@pytest.mark.parametrize("factory", [fourier, pixel, own_phase, laplacian_pyramid])
def test_a_grey_picture(factory: Callable[..., Image]) -> None:
    picture = random_picture((1, 5, 6))
    image = from_image(factory((5, 6), channels=1), picture)
    torch.testing.assert_close(image.decode(image.init(KEYS[0])), picture, rtol=0, atol=1.1e-3)


@pytest.mark.parametrize("factory", [fourier, pixel, own_phase, laplacian_pyramid])
@pytest.mark.parametrize("correlation", [None, [[1.0, 0.5], [-0.3, 2.0]]], ids=str)
def test_a_matrix_of_ones_own(factory: Callable[..., Image], correlation: Any) -> None:
    picture = random_picture((2, 5, 6))
    image = from_image(factory((5, 6), channels=2, correlation=correlation), picture)
    torch.testing.assert_close(image.decode(image.init(KEYS[0])), picture, rtol=0, atol=1.1e-3)


@pytest.mark.parametrize(
    "picture", [torch.zeros(3, 4, 4), torch.ones(3, 5, 5), torch.full((3, 4, 6), 0.5)], ids=["black", "white", "grey"]
)
@pytest.mark.parametrize("factory", [fourier, pixel, laplacian_pyramid])
def test_even_pictures(factory: Callable[..., Image], picture: Tensor) -> None:
    image = from_image(factory(tuple(picture.shape[1:])), picture)
    torch.testing.assert_close(image.decode(image.init(KEYS[0])), picture, rtol=0, atol=1.1e-3)


def test_symmetric_waves_keep_their_sign() -> None:
    """Twins of half a turn each: the difference of their angles must not be none."""
    y = torch.arange(8.0)
    wave = 0.5 - 0.3 * torch.cos(2 * torch.pi * 2 * y / 8)
    for picture in (wave[None, :, None].expand(1, 8, 6), wave[None, None, :].expand(1, 6, 8)):
        size = (picture.shape[1], picture.shape[2])
        image = phase(size, magnitude=magnitude_of(picture), contrast=None, channels=1)
        torch.testing.assert_close(image.decode(from_image(image, picture).init(KEYS[0])), picture, rtol=0, atol=1e-4)


def test_phases_of_a_picture_with_the_magnitude_of_others() -> None:
    """`encode` is there for them, too: the waves of the picture, in the magnitudes of the parameterisation."""
    picture, image = random_picture((1, 8, 8)).clamp(0.01, 0.99), phase(8, channels=1)
    assert image.encode is not None
    own, shown = (torch.fft.rfft2(torch.logit(p))[0] for p in (picture, image.decode(image.encode(picture))))
    turn = own / own.abs() / (shown / shown.abs())
    torch.testing.assert_close(turn, torch.ones_like(turn), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=re.escape("phase() needs the picture's own magnitude=magnitude_of(picture)")):
        from_image(image, picture)


def test_all_but_the_start_is_as_it_was() -> None:
    image = shared(fourier_canvas(4), pyramid_canvas(4, levels=2))
    begun = from_image(image, random_picture((3, 4, 4)))
    assert begun[1:] == image[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_start_has_the_dtype_of_the_picture_and_is_copied(dtype: torch.dtype) -> None:
    picture = random_picture((3, 4, 4), dtype)
    image = from_image(pixel(4), picture)
    before = image.init(KEYS[0]).clone()
    picture.zero_()
    assert image.init(KEYS[0]).dtype == dtype
    assert torch.equal(image.init(KEYS[0]), before)


@pytest.mark.parametrize("factory", ENCODING)
def test_noise_is_the_random_start_on_top(factory: Callable[..., Image]) -> None:
    picture, plain = random_picture((3, 6, 5)), factory((6, 5), channels=3)
    still, noisy = from_image(plain, picture), from_image(plain, picture, noise=0.25)
    first, second = (vmap(i.init)(KEYS) for i in (still, noisy))
    for a, b, drawn in zip(*(tree_leaves(p) for p in (first, second, vmap(plain.init)(KEYS))), strict=True):
        torch.testing.assert_close(b - a, 0.25 * drawn, rtol=1e-4, atol=1e-5)
    assert not torch.equal(*(noisy.decode(noisy.init(key)) for key in KEYS[:2]))


@pytest.mark.parametrize(
    ("image", "picture", "options", "message"),
    [
        (
            fourier(4),
            torch.zeros(3, 4, 5),
            {},
            "the picture has shape (3, 4, 5), the image (3, 4, 4); resize the picture",
        ),
        (fourier(4), torch.zeros(1, 4, 4), {}, "the picture has shape (1, 4, 4), the image (3, 4, 4)"),
        (alpha(4), torch.zeros(3, 4, 4), {}, "the picture has shape (3, 4, 4), the image (4, 4, 4)"),
        (fourier(4), torch.full((3, 4, 4), 255.0), {}, "must be in [0, 1], got 255 to 255; divide bytes by 255"),
        (fourier(4), torch.full((3, 4, 4), torch.nan), {}, "the picture must be in [0, 1], got nan to nan"),
        (fourier(4), torch.zeros(3, 4, 4, dtype=torch.uint8), {}, "must be float32 or float64 (c, h, w) in [0, 1]"),
        (fourier(4), "dog.png", {}, "must be float32 or float64 (c, h, w) in [0, 1], got str"),
        (cppn(4), torch.zeros(3, 4, 4), {}, "cannot start from a picture: it has no encode"),
        (fourier(4), torch.zeros(3, 4, 4), {"noise": -1.0}, "noise must be finite and at least 0, got -1.0"),
        (pixel(4, correlation=[[1.0] * 3] * 3), torch.rand(3, 4, 4), {}, "the colour correlation cannot be inverted"),
    ],
)
def test_errors(image: Image, picture: Any, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_image(image, picture, **options)


# --- shared -----------------------------------------------------------------------------------------------------------


def test_shared_is_a_sum_before_the_range() -> None:
    own, common = fourier_canvas((4, 6)), pyramid_canvas((4, 6), levels=2, first=1)
    image = shared(own, common, correlation=None)
    ours, theirs = own.init(random.key(1)), common.init(random.key(2))
    expected = torch.sigmoid(own.decode(ours) + common.decode(theirs))
    torch.testing.assert_close(image.decode((ours, theirs)), expected)


def test_shared_starts_equal_and_stays_so() -> None:
    image = shared(fourier_canvas(4), pyramid_canvas(4, levels=2))
    own, common = vmap(image.init)(KEYS)
    assert not torch.equal(own[0], own[1])
    assert all((leaf == 0).all() for leaf in common)
    updates = tree_map(
        lambda leaf: torch.randn(leaf.shape, generator=torch.Generator().manual_seed(leaf.numel())), (own, common)
    )
    assert image.share_params is not None
    mine, ours = image.share_params(updates)
    assert torch.equal(mine, updates[0])
    for leaf, update in zip(ours, updates[1], strict=True):
        torch.testing.assert_close(leaf, update.mean(0).expand_as(update))
        assert torch.equal(leaf[0], leaf[2])


def test_what_is_not_shared_has_nothing_to_couple() -> None:
    assert all(image.share_params is None for image in (fourier(4), pixel(4), phase(4), cppn(4), alpha(4)))


def test_canvases_of_different_shapes() -> None:
    message = "a shared canvas must have the shape of the own one, (3, 4, 4), got (1, 4, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        shared(fourier_canvas(4), pixel_canvas(4, channels=1))
