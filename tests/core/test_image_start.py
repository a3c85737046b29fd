"""Initialisation from a given image, and parameters shared by all filters."""

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
    """Return a random image in which some values are exactly 0 or 1."""
    picture = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return torch.where(picture < 0.1, 0.0, torch.where(picture > 0.9, 1.0, picture))


def phase_of_picture(size: tuple[int, int], *, channels: int, **options: Any) -> Image:
    magnitude = magnitude_of(random_picture((channels, *size)), **options)
    return phase(size, channels=channels, magnitude=magnitude, contrast=None, **options)


def alpha_image(size: tuple[int, int], *, channels: int, **options: Any) -> Image:
    return alpha(size, channels=channels - 1, **options)


def shared_image(size: tuple[int, int], *, channels: int, **options: Any) -> Image:
    return shared(fourier_canvas(size, channels=channels), pixel_canvas(size, channels=channels), **options)


ENCODABLE = [fourier, pixel, phase_of_picture, laplacian_pyramid, alpha_image, shared_image]


@pytest.mark.parametrize("factory", ENCODABLE)
@pytest.mark.parametrize("channels", [2, 3, 4, 13])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (6, 9), (9, 6), (1, 1), (1, 5), (4, 1), (2, 2)], ids=str)
def test_initial_image_is_the_picture(factory: Callable[..., Image], size: tuple[int, int], channels: int) -> None:
    picture = random_picture((channels, *size))
    image = from_image(factory(size, channels=channels), picture)
    decoded = vmap(image.decode)(vmap(image.init)(KEYS))
    torch.testing.assert_close(decoded, picture.expand(3, *picture.shape), rtol=0, atol=1.1e-3)


@pytest.mark.parametrize("factory", [fourier, pixel, phase_of_picture, laplacian_pyramid])
def test_initial_image_is_a_single_channel_picture(factory: Callable[..., Image]) -> None:
    picture = random_picture((1, 5, 6))
    image = from_image(factory((5, 6), channels=1), picture)
    torch.testing.assert_close(image.decode(image.init(KEYS[0])), picture, rtol=0, atol=1.1e-3)


@pytest.mark.parametrize("factory", [fourier, pixel, phase_of_picture, laplacian_pyramid])
@pytest.mark.parametrize("correlation", [None, [[1.0, 0.5], [-0.3, 2.0]]], ids=str)
def test_initial_image_is_the_picture_with_a_custom_correlation(
    factory: Callable[..., Image], correlation: Any
) -> None:
    picture = random_picture((2, 5, 6))
    image = from_image(factory((5, 6), channels=2, correlation=correlation), picture)
    torch.testing.assert_close(image.decode(image.init(KEYS[0])), picture, rtol=0, atol=1.1e-3)


@pytest.mark.parametrize(
    "picture", [torch.zeros(3, 4, 4), torch.ones(3, 5, 5), torch.full((3, 4, 6), 0.5)], ids=["black", "white", "grey"]
)
@pytest.mark.parametrize("factory", [fourier, pixel, laplacian_pyramid])
def test_initial_image_is_a_constant_picture(factory: Callable[..., Image], picture: Tensor) -> None:
    image = from_image(factory(tuple(picture.shape[1:])), picture)
    torch.testing.assert_close(image.decode(image.init(KEYS[0])), picture, rtol=0, atol=1.1e-3)


def test_phase_encodes_the_sign_of_symmetric_waves() -> None:
    """Both entries of a conjugate pair have the angle pi, so storing both would decode to a difference of 0."""
    y = torch.arange(8.0)
    wave = 0.5 - 0.3 * torch.cos(2 * torch.pi * 2 * y / 8)
    for picture in (wave[None, :, None].expand(1, 8, 6), wave[None, None, :].expand(1, 6, 8)):
        size = (picture.shape[1], picture.shape[2])
        image = phase(size, magnitude=magnitude_of(picture), contrast=None, channels=1)
        torch.testing.assert_close(image.decode(from_image(image, picture).init(KEYS[0])), picture, rtol=0, atol=1e-4)


def test_phase_encodes_only_the_phases_if_magnitudes_differ() -> None:
    """`encode` keeps the phases of the picture, and `from_image` reports that the magnitudes do not match."""
    picture, image = random_picture((1, 8, 8)).clamp(0.01, 0.99), phase(8, channels=1)
    assert image.encode is not None
    expected, encoded = (torch.fft.rfft2(torch.logit(p))[0] for p in (picture, image.decode(image.encode(picture))))
    rotation = expected / expected.abs() / (encoded / encoded.abs())
    torch.testing.assert_close(rotation, torch.ones_like(rotation), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=re.escape("phase() needs magnitude=magnitude_of(picture)")):
        from_image(image, picture)


def test_from_image_replaces_init_only() -> None:
    image = shared(fourier_canvas(4), pyramid_canvas(4, levels=2))
    from_picture = from_image(image, random_picture((3, 4, 4)))
    assert from_picture[1:] == image[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_from_image_copies_the_picture_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    picture = random_picture((3, 4, 4), dtype)
    image = from_image(pixel(4), picture)
    before = image.init(KEYS[0]).clone()
    picture.zero_()
    assert image.init(KEYS[0]).dtype == dtype
    assert torch.equal(image.init(KEYS[0]), before)


@pytest.mark.parametrize("factory", ENCODABLE)
def test_from_image_adds_scaled_random_parameters(factory: Callable[..., Image]) -> None:
    picture, plain = random_picture((3, 6, 5)), factory((6, 5), channels=3)
    exact, noisy = from_image(plain, picture), from_image(plain, picture, noise=0.25)
    first, second = (vmap(image.init)(KEYS) for image in (exact, noisy))
    for start, noisy_start, drawn in zip(
        *(tree_leaves(p) for p in (first, second, vmap(plain.init)(KEYS))), strict=True
    ):
        torch.testing.assert_close(noisy_start - start, 0.25 * drawn, rtol=1e-4, atol=1e-5)
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
        (fourier(4), torch.full((3, 4, 4), 255.0), {}, "must be in [0, 1], got 255 to 255; divide 8-bit values by 255"),
        (fourier(4), torch.full((3, 4, 4), torch.nan), {}, "the picture must be in [0, 1], got nan to nan"),
        (fourier(4), torch.zeros(3, 4, 4, dtype=torch.uint8), {}, "must be float32 or float64 (c, h, w) in [0, 1]"),
        (fourier(4), "dog.png", {}, "must be float32 or float64 (c, h, w) in [0, 1], got str"),
        (cppn(4), torch.zeros(3, 4, 4), {}, "cannot start from a picture, because it has no encode function"),
        (fourier(4), torch.zeros(3, 4, 4), {"noise": -1.0}, "noise must be finite and at least 0, got -1.0"),
        (
            pixel(4, correlation=[[1.0] * 3] * 3),
            torch.rand(3, 4, 4),
            {},
            "because the colour correlation matrix is singular",
        ),
    ],
)
def test_from_image_rejects_invalid_arguments(
    image: Image, picture: Any, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_image(image, picture, **options)


# --- shared -----------------------------------------------------------------------------------------------------------


def test_shared_adds_the_canvases_before_the_sigmoid() -> None:
    own, common = fourier_canvas((4, 6)), pyramid_canvas((4, 6), levels=2, first=1)
    image = shared(own, common, correlation=None)
    own_params, common_params = own.init(random.key(1)), common.init(random.key(2))
    expected = torch.sigmoid(own.decode(own_params) + common.decode(common_params))
    torch.testing.assert_close(image.decode((own_params, common_params)), expected)


def test_share_params_averages_the_common_parameters_only() -> None:
    image = shared(fourier_canvas(4), pyramid_canvas(4, levels=2))
    own, common = vmap(image.init)(KEYS)
    assert not torch.equal(own[0], own[1])
    assert all((leaf == 0).all() for leaf in common)
    updates = tree_map(
        lambda leaf: torch.randn(leaf.shape, generator=torch.Generator().manual_seed(leaf.numel())), (own, common)
    )
    assert image.share_params is not None
    own_updates, common_updates = image.share_params(updates)
    assert torch.equal(own_updates, updates[0])
    for leaf, update in zip(common_updates, updates[1], strict=True):
        torch.testing.assert_close(leaf, update.mean(0).expand_as(update))
        assert torch.equal(leaf[0], leaf[2])


def test_other_parameterisations_have_no_share_params() -> None:
    assert all(image.share_params is None for image in (fourier(4), pixel(4), phase(4), cppn(4), alpha(4)))


def test_shared_rejects_canvases_of_different_shapes() -> None:
    message = "own and common must have the same shape, got (3, 4, 4) and (1, 4, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        shared(fourier_canvas(4), pixel_canvas(4, channels=1))
