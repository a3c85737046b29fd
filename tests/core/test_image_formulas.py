"""The phase, pyramid, network and alpha parameterisations compared with explicit formulas."""

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


def color_matrix(channels: int) -> Array:
    matrix = correlation_matrix(channels)
    return np.eye(channels) if matrix is None else matrix.double().numpy()


def logits(image: Image, params: Any) -> Array:
    return torch.logit(image.decode(params)).numpy()


# --- phase ------------------------------------------------------------------------------------------------------------


def sum_of_waves(phi: Array, r: Array, size: tuple[int, int]) -> Array:
    """Fill the full complex spectrum entry by entry, and transform it."""
    h, w = size
    spectrum = np.zeros((len(phi), h, w), complex)
    for k in range(h):
        for m in range(w):
            conjugate_k, conjugate_m = -k % h, -m % w
            if (k, m) == (conjugate_k, conjugate_m):
                spectrum[:, k, m] = r[:, k, m] * np.cos(phi[:, k, m])
            elif m == conjugate_m:
                spectrum[:, k, m] = r[:, k, m] * np.exp(1j * (phi[:, k, m] - phi[:, conjugate_k, m]))
            elif m <= w // 2:
                spectrum[:, k, m] = r[:, k, m] * np.exp(1j * phi[:, k, m])
            else:
                spectrum[:, k, m] = r[:, conjugate_k, conjugate_m] * np.exp(-1j * phi[:, conjugate_k, conjugate_m])
    pixels = np.fft.ifft2(spectrum, norm="ortho")
    np.testing.assert_allclose(pixels.imag, 0, atol=1e-12)
    return pixels.real


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_phase_matches_the_sum_of_its_waves(size: tuple[int, int], channels: int) -> None:
    h, w = size
    rng = np.random.default_rng(0)
    phi = rng.uniform(-9, 9, (channels, h, w // 2 + 1))
    r = rng.uniform(0.1, 1, (channels, h, w // 2 + 1))
    r = (r + r[:, -np.arange(h)]) / 2  # both entries of a conjugate pair have the same magnitude
    expected = sigmoid(np.einsum("ij,jhw->ihw", color_matrix(channels), sum_of_waves(phi, r, size)))
    image = phase(size, channels=channels, magnitude=torch.from_numpy(r), contrast=None)
    decoded = image.decode(torch.from_numpy(phi))
    assert decoded.shape == (channels, h, w)
    np.testing.assert_allclose(decoded.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 5)], ids=str)
def test_phase_magnitudes_follow_the_power_law_for_all_phases(size: tuple[int, int], decay: float) -> None:
    h, w = size
    image = phase(size, channels=2, decay=decay)
    for seed in range(2):
        params = image.init(random.key(seed)).double()
        magnitudes = np.abs(np.fft.rfft2(logits(image, params)))
        f = np.maximum(np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :]), 1 / max(h, w))
        ratio = magnitudes * f**decay
        self_conjugate = (-np.arange(h) % h == np.arange(h))[:, None] & (2 * np.arange(w // 2 + 1) % w == 0)[None, :]
        np.testing.assert_allclose(ratio[:, ~self_conjugate], ratio[0, 1, 1], rtol=1e-5)
        assert (ratio[:, self_conjugate] <= ratio[0, 1, 1] * (1 + 1e-5)).all()


@pytest.mark.parametrize("contrast", [0.5, 2.0])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (1, 6)], ids=str)
def test_phase_contrast_is_the_root_mean_square(size: tuple[int, int], contrast: float) -> None:
    """With zero phases every entry has its full magnitude."""
    image = phase(size, channels=2, contrast=contrast)
    pixels = logits(image, torch.zeros_like(image.init(random.key(0))).double())
    assert math.sqrt((pixels**2).mean()) == pytest.approx(contrast, rel=1e-5)
    custom = phase(size, channels=2, contrast=contrast, magnitude=torch.rand(size[0], size[1] // 2 + 1) + 0.1)
    assert math.sqrt((logits(custom, custom.init(random.key(0)).double() * 0) ** 2).mean()) == pytest.approx(
        contrast, rel=0.2 if min(size) > 1 else 1e-5
    )


def test_initial_phases_are_uniform() -> None:
    phases = phase(32).init(random.key(0)) / (2 * math.pi)  # in turns
    assert phases.abs().max().item() <= 0.5 + 1e-6
    assert phases.std().item() == pytest.approx(12**-0.5, rel=0.05)
    assert abs(phases.mean().item()) < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"magnitude": torch.ones(4, 4)}, "must have shape (3, 4, 3) or (4, 3), got (4, 4); measure it at size=(4, 4)"),
        ({"magnitude": -torch.ones(4, 3)}, "at least 0 and not zero everywhere, got values from -1 to -1"),
        ({"magnitude": torch.zeros(4, 3)}, "at least 0 and not zero everywhere, got values from 0 to 0"),
        ({"magnitude": torch.full((4, 3), math.nan)}, "magnitude must be finite"),
        ({"contrast": 0.0}, "contrast must be finite and above 0, got 0.0"),
        ({"contrast": math.inf}, "contrast must be finite and above 0, got inf"),
    ],
)
def test_phase_rejects_invalid_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        phase(4, **arguments)


# --- pyramid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "levels"), [((8, 8), 4), ((7, 9), 3), ((12, 5), 4), ((1, 1), 1), ((1, 6), 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pyramid_is_the_sum_of_bilinearly_resized_levels(size: tuple[int, int], levels: int, channels: int) -> None:
    image = laplacian_pyramid(size, channels=channels, levels=levels)
    params = tuple(300 * leaf.double() for leaf in image.init(random.key(0)))
    h, w = size
    assert [leaf.shape[1:] for leaf in params] == [(max(1, h // 2**n), max(1, w // 2**n)) for n in range(levels)]
    total = sum(F.interpolate(leaf[None], size=size, mode="bilinear", align_corners=False)[0] for leaf in params)
    assert isinstance(total, torch.Tensor)
    expected = sigmoid(np.einsum("ij,jhw->ihw", color_matrix(channels), total.numpy() / 2))
    np.testing.assert_allclose(image.decode(params).numpy(), expected, rtol=0, atol=1e-6)


def test_pyramid_has_four_levels_by_default_or_as_many_as_fit() -> None:
    assert [len(laplacian_pyramid(size).init(random.key(0))) for size in (224, 8, 7, 2, 1)] == [4, 4, 3, 2, 1]


@pytest.mark.parametrize(("levels", "first"), [(0, 0), (5, 0), (1, -1), (4, 1), (1, 4)])
def test_pyramid_rejects_levels_that_do_not_exist(levels: int, first: int) -> None:
    message = f"a pyramid of 8 x 3 pixels has the levels 0 to 3, got levels={levels} and first={first}"
    with pytest.raises(ValueError, match=re.escape(message)):
        pyramid_canvas((8, 3), levels=levels, first=first)


# --- cppn -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["composite", "unbiased"])
@pytest.mark.parametrize(("size", "channels"), [((5, 5), 3), ((3, 6), 1), ((4, 1), 4)])
def test_cppn_matches_the_network_formula(size: tuple[int, int], channels: int, activation: str) -> None:
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
            expected[:, i, j] = sigmoid(color_matrix(channels) @ (params[-1][0] @ z + params[-1][1]))
    scaled = tuple(tuple(torch.from_numpy(leaf * 64) for leaf in pair) for pair in params)
    np.testing.assert_allclose(image.decode(scaled).numpy(), expected, rtol=0, atol=1e-6)


def test_cppn_initial_weights_depend_on_the_key() -> None:
    image = cppn(16, channels=2)
    first, second = image.init(random.key(0)), image.init(random.key(1))
    assert len(first) == 9
    assert not torch.equal(first[3][0], second[3][0])
    assert torch.stack([pair[0] for pair in first[1:8]]).std().item() / 64 == pytest.approx(48**-0.5, rel=0.05)
    assert torch.stack([pair[1] for pair in first[:8]]).std().item() / 64 == pytest.approx(0.1, rel=0.15)
    assert 0.02 < image.decode(first).std().item() < 0.3


def test_cppn_accepts_an_activation_function() -> None:
    image = cppn(4, channels=1, hidden=2, layers=2, activation=torch.sin)
    assert [tuple(weight.shape) for weight, _ in image.init(random.key(0))] == [(2, 2), (2, 2), (1, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"activation": "relu"}, "unknown activation 'relu'; expected one of composite, unbiased or a function"),
    ],
)
def test_cppn_rejects_invalid_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        cppn(4, **arguments)


# --- alpha, low frequencies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_alpha_is_not_correlated_with_the_colours(channels: int) -> None:
    image = alpha((5, 6), channels=channels)
    params = 100 * image.init(random.key(0))
    decoded = image.decode(params)
    assert decoded.shape == (channels + 1, 5, 6)
    torch.testing.assert_close(decoded[:-1], fourier((5, 6), channels=channels).decode(params[:-1]))
    torch.testing.assert_close(decoded[-1:], fourier((5, 6), channels=1).decode(params[-1:]))
    assert (image.decode(image.init(random.key(0)))[-1] - 0.5).abs().max() < 0.1


def test_fourier_canvas_below_keeps_low_frequencies_only() -> None:
    low, full = fourier_canvas((8, 6), channels=1, below=0.3), fourier_canvas((8, 6), channels=1)
    params = low.init(random.key(0)).double()
    f = np.hypot(np.fft.fftfreq(8)[:, None], np.fft.rfftfreq(6)[None, :])
    low_spectrum, spectrum = (np.fft.rfft2(c.decode(params).numpy())[0] for c in (low, full))
    np.testing.assert_allclose(low_spectrum, np.where(f < 0.3, spectrum, 0), atol=1e-9)
    assert np.abs(spectrum[f >= 0.3]).min() > 1e-4
    with pytest.raises(ValueError, match="below must be above 0 cycles per pixel, got 0"):
        fourier_canvas(8, below=0)


@pytest.mark.parametrize("factory", [fourier, phase, laplacian_pyramid, cppn])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_decoded_image_has_the_given_number_of_channels(factory: Any, channels: int) -> None:
    image = factory((6, 5), channels=channels)
    assert image.decode(image.init(random.key(0))).shape == (channels, 6, 5)
