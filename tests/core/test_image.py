"""Image parameterisations compared with numpy formulas, and the range of their values."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.func import grad

from featvis_func import random
from featvis_func.color import correlation_matrix
from featvis_func.image import (
    alpha,
    cppn,
    fourier,
    fourier_canvas,
    image_size,
    laplacian_pyramid,
    phase,
    pixel,
    pyramid_canvas,
    shared,
)
from featvis_func.tree import tree_leaves, tree_map
from featvis_func.types import Image


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-x))


def numpy_fourier(
    spectrum: NDArray[np.float64], size: tuple[int, int], *, decay: float, matrix: NDArray[np.float64]
) -> NDArray[np.float64]:
    h, w = size
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :]
    frequency = np.maximum(np.hypot(fx, fy), 1.0 / max(h, w))
    complex_spectrum = (spectrum[..., 0] + 1j * spectrum[..., 1]) / frequency**decay
    # Transform one axis after the other, as numpy defines irfft2.
    rows = np.fft.ifft(complex_spectrum, axis=-2, norm="ortho")
    pixels = np.fft.irfft(rows, n=w, axis=-1, norm="ortho") / 4.0
    return sigmoid(np.einsum("ij,jhw->ihw", matrix, pixels))


def color_matrix(channels: int) -> NDArray[np.float64]:
    matrix = correlation_matrix(channels)
    return np.eye(channels) if matrix is None else matrix.double().numpy()


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (6, 9), (9, 6), (1, 1), (1, 5), (4, 1)], ids=str)
def test_fourier_matches_numpy(size: tuple[int, int], channels: int, decay: float) -> None:
    spectrum = np.random.default_rng(0).standard_normal((channels, size[0], size[1] // 2 + 1, 2))
    expected = numpy_fourier(spectrum, size, decay=decay, matrix=color_matrix(channels))
    image = fourier(size, channels=channels, decay=decay)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        decoded = image.decode(torch.from_numpy(spectrum).to(dtype))
        assert decoded.shape == (channels, *size)
        np.testing.assert_allclose(decoded.double().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixel_matches_numpy(channels: int) -> None:
    pixels = np.random.default_rng(0).standard_normal((channels, 5, 4))
    expected = sigmoid(np.einsum("ij,jhw->ihw", color_matrix(channels), pixels))
    decoded = pixel((5, 4), channels=channels).decode(torch.from_numpy(pixels))
    np.testing.assert_allclose(decoded.numpy(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("factory", [fourier, pixel])
def test_custom_correlation_matrix_is_applied(factory: Callable[..., Image]) -> None:
    """A permutation matrix permutes the channels of the image."""
    plain = factory(6, channels=2, correlation=None)
    swapped = factory(6, channels=2, correlation=[[0.0, 1.0], [1.0, 0.0]])
    params = 30 * plain.init(random.key(0))
    torch.testing.assert_close(swapped.decode(params), plain.decode(params).flip(0))
    assert not torch.allclose(plain.decode(params)[0], plain.decode(params)[1])


def test_fourier_coefficient_decodes_to_a_cosine() -> None:
    """Entry (2, 1) of the spectrum is a wave with 2 vertical cycles and 1 horizontal cycle."""
    spectrum = torch.zeros(1, 8, 5, 2)
    spectrum[0, 2, 1, 0] = 3.0
    logits = torch.logit(fourier(8, channels=1).decode(spectrum))[0]
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    amplitude = 2 * 3.0 / 8 / math.hypot(2 / 8, 1 / 8) / 4
    expected = amplitude * torch.cos(2 * math.pi * (2 * y + x) / 8)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def shared_image(size: tuple[int, int], *, channels: int) -> Image:
    return shared(fourier_canvas(size, channels=channels), pyramid_canvas(size, channels=channels, levels=2, first=1))


FACTORIES = [fourier, pixel, phase, laplacian_pyramid, cppn, alpha, shared_image]


@pytest.mark.slow
@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("size", [(6, 6), (5, 7)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("magnitude", [0.0, 1.0, 1e6, -1e6, 1e30])
def test_image_and_gradient_are_finite_for_any_parameters(
    factory: Callable[..., Image], size: tuple[int, int], channels: int, magnitude: float
) -> None:
    """Decoded values stay in [0, 1], and gradients stay finite, so that no step produces non-finite parameters."""
    image = factory(size, channels=channels)
    start = tree_map(torch.Tensor.detach, image.init(random.key(0)))
    scaled = tree_map(lambda leaf: magnitude * leaf / leaf.abs().max().clamp_min(1e-30), start)
    for params in (scaled, tree_map(lambda leaf: torch.full_like(leaf, magnitude), start)):
        weights = torch.linspace(-1.0, 1.0, steps=math.prod(size)).reshape(size)

        def brightness(params: Any, weights: torch.Tensor = weights) -> tuple[torch.Tensor, torch.Tensor]:
            decoded = image.decode(params)
            return (weights * decoded).sum(), decoded

        gradient, decoded = grad(brightness, has_aux=True)(params)
        assert decoded.isfinite().all()
        assert decoded.min() >= 0
        assert decoded.max() <= 1
        assert all(leaf.isfinite().all() for leaf in tree_leaves(gradient))


@pytest.mark.parametrize("factory", [fourier, pixel])
@pytest.mark.parametrize("channels", [1, 3])
def test_initial_parameters_have_the_given_sd_and_decode_to_grey(factory: Callable[..., Image], channels: int) -> None:
    image = factory(64, channels=channels, sd=0.02)
    params = image.init(random.key(1))
    assert params.mean().abs().item() < 5 * 0.02 / math.sqrt(params.numel())
    assert params.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * params.numel()))
    decoded = image.decode(params)
    assert (decoded - 0.5).abs().max().item() < 0.1
    assert decoded.std().item() > 1e-4


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (1, 1)], ids=str)
def test_parameter_shapes(size: tuple[int, int]) -> None:
    h, w = size
    assert fourier(size, channels=2).init(random.key(0)).shape == (2, h, w // 2 + 1, 2)
    assert pixel(size, channels=2).init(random.key(0)).shape == (2, h, w)


def test_initial_channels_differ() -> None:
    params = fourier(8).init(random.key(0))
    assert not torch.equal(params[0], params[1])
    assert not torch.equal(params[..., 0], params[..., 1])


@pytest.mark.parametrize(("size", "expected"), [(5, (5, 5)), ((3, 4), (3, 4)), ((1, 1), (1, 1))])
def test_image_size_returns_height_and_width(size: Any, expected: tuple[int, int]) -> None:
    assert image_size(size) == expected


@pytest.mark.parametrize("factory", [fourier, pixel, phase, laplacian_pyramid, cppn])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, r"image size must .*, got 0$"),
        ({"size": (4, -1)}, r"image size must .*, got \(4, -1\)$"),
        ({"size": 4, "channels": 0}, "channels must be at least 1, got 0"),
        ({"size": 4, "correlation": [[1.0]]}, r"must be a finite 3 x 3 matrix, got shape \(1, 1\)"),
        ({"size": 4, "channels": 1, "correlation": "imagenet"}, r"must be a finite 1 x 1 matrix, got shape \(3, 3\)"),
    ],
)
def test_invalid_arguments_raise_value_error(
    factory: Callable[..., Image], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        factory(**arguments)


def test_correlation_matrix_is_copied() -> None:
    matrix = torch.eye(2)
    image = pixel(2, channels=2, correlation=matrix)
    params = 100 * image.init(random.key(0))
    before = image.decode(params)
    matrix.mul_(-1)
    assert torch.equal(image.decode(params), before)
