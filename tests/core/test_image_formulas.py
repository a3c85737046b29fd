"""Phases, pyramids, networks and opacity against plain formulas."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from featvis_func import random
from featvis_func.color import correlation_matrix
from featvis_func.image import (
    alpha,
    cppn,
    fourier,
    fourier_canvas,
    laplacian_pyramid,
    phase,
    pyramid_canvas,
)
from featvis_func.types import Image

Array = NDArray[np.float64]
SIZES = [(8, 8), (7, 7), (6, 9), (9, 6), (1, 1), (1, 5), (4, 1), (2, 2)]


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def own_matrix(channels: int) -> Array:
    matrix = correlation_matrix(channels)
    return np.eye(channels) if matrix is None else matrix.double().numpy()


def logits(image: Image, params: Any) -> Array:
    return torch.logit(image.decode(params)).numpy()


# --- phase ------------------------------------------------------------------------------------------------------------


def plain_waves(phi: Array, r: Array, size: tuple[int, int]) -> Array:
    """The sum of all waves, each entry of the whole spectrum by itself."""
    h, w = size
    whole = np.zeros((len(phi), h, w), complex)
    for k in range(h):
        for m in range(w):
            twin_k, twin_m = -k % h, -m % w
            if (k, m) == (twin_k, twin_m):
                whole[:, k, m] = r[:, k, m] * np.cos(phi[:, k, m])
            elif m == twin_m:
                whole[:, k, m] = r[:, k, m] * np.exp(1j * (phi[:, k, m] - phi[:, twin_k, m]))
            elif m <= w // 2:
                whole[:, k, m] = r[:, k, m] * np.exp(1j * phi[:, k, m])
            else:
                whole[:, k, m] = r[:, twin_k, twin_m] * np.exp(-1j * phi[:, twin_k, twin_m])
    pixels = np.fft.ifft2(whole, norm="ortho")
    np.testing.assert_allclose(pixels.imag, 0, atol=1e-12)
    return pixels.real


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_phase_equals_the_sum_of_its_waves(size: tuple[int, int], channels: int) -> None:
    h, w = size
    rng = np.random.default_rng(0)
    phi = rng.uniform(-9, 9, (channels, h, w // 2 + 1))
    r = rng.uniform(0.1, 1, (channels, h, w // 2 + 1))
    twins = r[:, -np.arange(h)]
    r = (r + twins) / 2  # waves that a column has twice have one magnitude
    expected = sigmoid(np.einsum("ij,jhw->ihw", own_matrix(channels), plain_waves(phi, r, size)))
    image = phase(size, channels=channels, magnitude=torch.from_numpy(r), contrast=None)
    decoded = image.decode(torch.from_numpy(phi))
    assert decoded.shape == (channels, h, w)
    np.testing.assert_allclose(decoded.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 5)], ids=str)
def test_the_spectrum_is_the_power_law_whatever_the_phases(size: tuple[int, int], decay: float) -> None:
    h, w = size
    image = phase(size, channels=2, decay=decay)
    for seed in range(2):
        params = image.init(random.key(seed)).double()
        found = np.abs(np.fft.rfft2(logits(image, params)))
        f = np.maximum(np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :]), 1 / max(h, w))
        ratio = found * f**decay
        real = (-np.arange(h) % h == np.arange(h))[:, None] & (2 * np.arange(w // 2 + 1) % w == 0)[None, :]
        np.testing.assert_allclose(ratio[:, ~real], ratio[0, 1, 1], rtol=1e-5)
        assert (ratio[:, real] <= ratio[0, 1, 1] * (1 + 1e-5)).all()


@pytest.mark.parametrize("contrast", [0.5, 2.0])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (1, 6)], ids=str)
def test_contrast_is_the_root_mean_square(size: tuple[int, int], contrast: float) -> None:
    """Of waves that all have their whole magnitude."""
    image = phase(size, channels=2, contrast=contrast)
    pixels = logits(image, torch.zeros_like(image.init(random.key(0))).double())
    assert math.sqrt((pixels**2).mean()) == pytest.approx(contrast, rel=1e-5)
    steep = phase(size, channels=2, contrast=contrast, magnitude=torch.rand(size[0], size[1] // 2 + 1) + 0.1)
    assert math.sqrt((logits(steep, steep.init(random.key(0)).double() * 0) ** 2).mean()) == pytest.approx(
        contrast, rel=0.2 if min(size) > 1 else 1e-5
    )


def test_first_phases_are_uniform_and_the_mean_is_grey() -> None:
    turns = phase(32).init(random.key(0)) / (2 * math.pi)
    assert turns.abs().max().item() <= 0.5 + 1e-6
    assert turns.std().item() == pytest.approx(12**-0.5, rel=0.05)
    assert abs(turns.mean().item()) < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"magnitude": torch.ones(4, 4)}, "must have shape (3, 4, 3) or (4, 3), got (4, 4); measure it at size=(4, 4)"),
        ({"magnitude": -torch.ones(4, 3)}, "magnitudes must be finite and at least 0, and some above 0"),
        ({"magnitude": torch.zeros(4, 3)}, "magnitudes must be finite and at least 0, and some above 0"),
        ({"magnitude": torch.full((4, 3), math.nan)}, "magnitudes must be finite"),
        ({"contrast": 0.0}, "the contrast must be finite and above 0, or None, got 0.0"),
        ({"contrast": math.inf}, "the contrast must be finite and above 0, or None, got inf"),
    ],
)
def test_errors_of_phase(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        phase(4, **arguments)


# --- pyramid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "levels"), [((8, 8), 4), ((7, 9), 3), ((12, 5), 4), ((1, 1), 1), ((1, 6), 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pyramid_is_a_sum_of_bilinear_resizings(size: tuple[int, int], levels: int, channels: int) -> None:
    image = laplacian_pyramid(size, channels=channels, levels=levels)
    params = tuple(300 * leaf.double() for leaf in image.init(random.key(0)))
    h, w = size
    assert [leaf.shape[1:] for leaf in params] == [(max(1, h // 2**n), max(1, w // 2**n)) for n in range(levels)]
    total = sum(F.interpolate(leaf[None], size=size, mode="bilinear", align_corners=False)[0] for leaf in params)
    assert isinstance(total, torch.Tensor)
    expected = sigmoid(np.einsum("ij,jhw->ihw", own_matrix(channels), total.numpy() / 2))
    np.testing.assert_allclose(image.decode(params).numpy(), expected, rtol=0, atol=1e-6)


def test_levels_by_default_are_lucids_or_what_fits() -> None:
    assert [len(laplacian_pyramid(size).init(random.key(0))) for size in (224, 8, 7, 2, 1)] == [4, 4, 3, 2, 1]


@pytest.mark.parametrize(("levels", "first"), [(0, 0), (5, 0), (1, -1), (4, 1), (1, 4)])
def test_a_pyramid_ends_at_one_pixel(levels: int, first: int) -> None:
    message = (
        f"8 x 3 pixels has levels 0 to 3, each half as large as the one before; got levels={levels} from first={first}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        pyramid_canvas((8, 3), levels=levels, first=first)


# --- cppn -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["composite", "unbiased"])
@pytest.mark.parametrize(("size", "channels"), [((5, 5), 3), ((3, 6), 1), ((4, 1), 4)])
def test_cppn_equals_its_network(size: tuple[int, int], channels: int, activation: str) -> None:
    image = cppn(size, channels=channels, hidden=3, layers=2, activation=activation)
    rng = np.random.default_rng(0)
    shapes = [((3, 2), (3,)), ((3, 6), (3,)), ((channels, 6), (channels,))]
    params = tuple((rng.standard_normal(weight), rng.standard_normal(bias)) for weight, bias in shapes)
    assert [(w.shape, b.shape) for w, b in image.init(random.key(0))] == shapes
    mean, deviation = {"composite": (0.0, 0.6), "unbiased": (0.45, 0.396)}[activation]
    expected = np.zeros((channels, *size))
    unit = 2 * math.sqrt(3) / max(size)
    for i in range(size[0]):
        for j in range(size[1]):
            z = np.array([(j - (size[1] - 1) / 2) * unit, (i - (size[0] - 1) / 2) * unit])
            for weight, bias in params[:-1]:
                a = np.arctan(weight @ z + bias)
                z = np.concatenate([a / 0.67, (a**2 - mean) / deviation])
            expected[:, i, j] = sigmoid(own_matrix(channels) @ (params[-1][0] @ z + params[-1][1]))
    scaled = tuple(tuple(torch.from_numpy(leaf * 64) for leaf in pair) for pair in params)
    np.testing.assert_allclose(image.decode(scaled).numpy(), expected, rtol=0, atol=1e-6)


def test_cppn_starts_from_weights_of_its_own() -> None:
    image = cppn(16, channels=2)
    first, second = image.init(random.key(0)), image.init(random.key(1))
    assert len(first) == 9
    assert not torch.equal(first[3][0], second[3][0])
    assert torch.stack([pair[0] for pair in first[1:8]]).std().item() / 64 == pytest.approx(48**-0.5, rel=0.05)
    assert torch.stack([pair[1] for pair in first[:8]]).std().item() / 64 == pytest.approx(0.1, rel=0.15)
    assert 0.02 < image.decode(first).std().item() < 0.3


def test_cppn_takes_a_function() -> None:
    image = cppn(4, channels=1, hidden=2, layers=2, activation=torch.sin)
    assert [tuple(weight.shape) for weight, _ in image.init(random.key(0))] == [(2, 2), (2, 2), (1, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, "a cppn needs at least 1 hidden unit and 1 layer, got hidden=0 and layers=8"),
        ({"layers": 0}, "a cppn needs at least 1 hidden unit and 1 layer, got hidden=24 and layers=0"),
        ({"activation": "relu"}, "unknown activation 'relu'; expected one of composite, unbiased or a function"),
    ],
)
def test_errors_of_cppn(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        cppn(4, **arguments)


# --- opacity, low frequencies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_opacity_stands_apart_from_the_colours(channels: int) -> None:
    image = alpha((5, 6), channels=channels)
    params = 100 * image.init(random.key(0))
    decoded = image.decode(params)
    assert decoded.shape == (channels + 1, 5, 6)
    torch.testing.assert_close(decoded[:-1], fourier((5, 6), channels=channels).decode(params[:-1]))
    torch.testing.assert_close(decoded[-1:], fourier((5, 6), channels=1).decode(params[-1:]))
    assert (image.decode(image.init(random.key(0)))[-1] - 0.5).abs().max() < 0.1


def test_low_frequencies_alone() -> None:
    canvas, whole = fourier_canvas((8, 6), channels=1, below=0.3), fourier_canvas((8, 6), channels=1)
    params = canvas.init(random.key(0)).double()
    f = np.hypot(np.fft.fftfreq(8)[:, None], np.fft.rfftfreq(6)[None, :])
    found, every = (np.fft.rfft2(c.decode(params).numpy())[0] for c in (canvas, whole))
    np.testing.assert_allclose(found, np.where(f < 0.3, every, 0), atol=1e-9)
    assert np.abs(every[f >= 0.3]).min() > 1e-4
    with pytest.raises(ValueError, match="below must be a frequency above 0, in cycles per pixel, got 0"):
        fourier_canvas(8, below=0)


@pytest.mark.parametrize("factory", [fourier, phase, laplacian_pyramid, cppn])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_any_number_of_channels(factory: Any, channels: int) -> None:
    image = factory((6, 5), channels=channels)
    assert image.decode(image.init(random.key(0))).shape == (channels, 6, 5)
