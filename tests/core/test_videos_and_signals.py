"""Parameterisations, transforms and objectives of videos ``(c, t, h, w)`` and signals ``(c, t)``, against formulas."""

import math
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featvis_func import image as images
from featvis_func import objective as o
from featvis_func import random
from featvis_func import transform as t
from featvis_func.color import correlate, correlation_matrix, decorrelate
from featvis_func.image.spectral import power_law
from featvis_func.objective import IMAGE
from featvis_func.rendering.options import TRANSFORMS
from featvis_func.rendering.presets import SIGNAL_TRANSFORMS, named_transform
from featvis_func.types import Image, Transform

SIZES = [(4, 6, 5), (3, 5, 4), (5, 4, 7), (1, 2, 1), (9,), (8,), (1,)]
by_size = pytest.mark.parametrize("size", SIZES, ids=str)
TARGET = torch.tensor(1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def applied(transform: Transform, image: Tensor, seed: int = 0) -> Tensor:
    return transform.apply(image, transform.draw(random.key(seed)))


def frequency(size: tuple[int, ...]) -> np.ndarray:
    """The length of each entry's frequency vector, entry by entry."""
    half = (*size[:-1], size[-1] // 2 + 1)
    values = np.zeros(half)
    for index in product(*map(range, half)):
        values[index] = math.hypot(*(min(k, n - k) / n for k, n in zip(index, size, strict=True)))
    return values


# --- parameterisations ----------------------------------------------------------------------------------------------


@by_size
@pytest.mark.parametrize("decay", [None, 0.7])
def test_fourier_is_a_spectrum_over_all_axes(size: tuple[int, ...], decay: float | None) -> None:
    exponent = {1: 0.5, 3: 1.5}[len(size)] if decay is None else decay
    f = np.maximum(frequency(size), 1 / max(size))
    spectrum = noise(2, *f.shape, 2).numpy()
    x = (spectrum[..., 0] + 1j * spectrum[..., 1]) / f**exponent
    for axis in range(1, len(size)):  # one axis after the other, as numpy defines irfftn
        x = np.fft.ifft(x, axis=axis, norm="ortho")
    x = np.fft.irfft(x, n=size[-1], axis=-1, norm="ortho") / 4
    image = images.fourier(size, channels=2, decay=decay)
    decoded = image.decode(torch.from_numpy(spectrum))
    np.testing.assert_allclose(decoded.numpy(), 1 / (1 + np.exp(-x)), rtol=0, atol=1e-6)
    assert image.init(random.key(0)).shape == spectrum.shape


@pytest.mark.parametrize("size", [(512,), (64, 64), (64, 64, 64)], ids=str)
def test_all_octaves_of_the_default_spectrum_have_the_same_power(size: tuple[int, ...]) -> None:
    f, power = torch.from_numpy(frequency(size)), power_law(size, len(size) / 2).double() ** 2
    octaves = [power[(f >= low) & (f < 2 * low)].sum().item() for low in (1 / 16, 1 / 8, 1 / 4)]
    assert max(octaves) / min(octaves) < 1.15


def test_below_removes_high_frequencies_of_time_and_space() -> None:
    canvas = images.fourier_canvas((8, 6, 6), channels=1, below=0.2)
    spectrum = torch.fft.rfftn(canvas.decode(noise(1, 8, 6, 4, 2)), dim=(1, 2, 3)).abs()[0]
    removed = torch.from_numpy(frequency((8, 6, 6))) >= 0.2
    assert spectrum[removed].max() < 1e-9 < 1e-4 < spectrum[~removed].min()


@by_size
def test_pixels_are_the_parameters(size: tuple[int, ...]) -> None:
    values = noise(2, *size)
    torch.testing.assert_close(images.pixel(size, channels=2).decode(values), torch.sigmoid(values))


@by_size
def test_phase_keeps_the_magnitudes_for_all_phases(size: tuple[int, ...]) -> None:
    f = np.maximum(frequency(size), 1 / max(size))
    real = np.ones_like(f, dtype=bool)  # entries that are their own conjugates, whose magnitude is at most r
    for index in product(*map(range, f.shape)):
        real[index] = all(2 * k % n == 0 for k, n in zip(index, size, strict=True))
    image = images.phase(size, channels=2)
    for seed in range(2):
        x = torch.logit(image.decode(image.init(random.key(seed)).double())).numpy()
        ratio = np.abs(np.fft.rfftn(x, axes=range(1, x.ndim))) * f ** (0.6 * len(size))
        if not real.all():
            level = ratio[:, ~real].max()
            np.testing.assert_allclose(ratio[:, ~real], level, rtol=1e-4)
            assert (ratio[:, real] <= level * (1 + 1e-4)).all()
    full = torch.logit(image.decode(torch.zeros_like(image.init(random.key(0))).double()))
    assert full.square().mean().sqrt().item() == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize(("size", "mode"), [((8, 6, 7), "trilinear"), ((12,), "linear")])
def test_pyramid_is_the_sum_of_resized_levels(size: tuple[int, ...], mode: str) -> None:
    image = images.laplacian_pyramid(size, channels=2, levels=3)
    params = tuple(100 * leaf.double() for leaf in image.init(random.key(0)))
    assert [tuple(leaf.shape[1:]) for leaf in params] == [tuple(max(1, s // 2**n) for s in size) for n in range(3)]
    levels = [F.interpolate(leaf[None], size=size, mode=mode, align_corners=False)[0] for leaf in params]
    torch.testing.assert_close(image.decode(params), torch.sigmoid(torch.stack(levels).sum(0) / 2))


@pytest.mark.parametrize("size", [(3, 4, 5), (6,)], ids=str)
def test_cppn_is_a_network_of_the_coordinates(size: tuple[int, ...]) -> None:
    image = images.cppn(size, channels=2, hidden=3, layers=1)
    (weight, bias), (last, last_bias) = (tuple(leaf.double() for leaf in pair) for pair in image.init(random.key(0)))
    assert weight.shape == (3, len(size))
    decoded = image.decode(((weight, bias), (last, last_bias)))
    unit = 2 * math.sqrt(3) / max(size)
    for index in product(*map(range, size)):
        # The last axis comes first: x, y, t.
        at = torch.tensor([(i + 0.5 - n / 2) * unit for i, n in zip(index, size, strict=True)][::-1]).double()
        a = torch.atan((weight @ at + bias) / 64)
        z = torch.cat([a / 0.67, (a * a - 0.45) / 0.396])
        expected = torch.sigmoid((last @ z + last_bias) / 64)
        torch.testing.assert_close(decoded[(slice(None), *index)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 6, 4), (11,)], ids=str)
@pytest.mark.parametrize("name", ["fourier", "pixel", "phase", "pyramid", "shared"])
def test_image_starts_from_a_given_video_or_signal(size: tuple[int, ...], name: str) -> None:
    picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    made: dict[str, Callable[[], Image]] = {
        "fourier": lambda: images.fourier(size),
        "pixel": lambda: images.pixel(size),
        "phase": lambda: images.phase(size, magnitude=images.magnitude_of(picture), contrast=None),
        "pyramid": lambda: images.laplacian_pyramid(size, levels=2),
        "shared": lambda: images.shared(images.fourier_canvas(size), images.pyramid_canvas(size, levels=1, first=1)),
    }
    image = images.from_image(made[name](), picture)
    torch.testing.assert_close(image.decode(image.init(random.key(3))), picture, rtol=0, atol=2e-3)


def test_colours_of_a_video_are_correlated_pixel_by_pixel() -> None:
    matrix = correlation_matrix(3)
    assert matrix is not None
    video = noise(3, 2, 4, 5)
    frames = torch.stack([correlate(frame, matrix) for frame in video.unbind(1)], dim=1)
    torch.testing.assert_close(correlate(video, matrix), frames)
    torch.testing.assert_close(decorrelate(correlate(video, matrix), matrix), video, rtol=0, atol=1e-5)
    values = images.pixel((2, 4, 5)).decode(video)
    torch.testing.assert_close(values, torch.sigmoid(correlate(video, matrix)))


def test_channels_of_a_signal_are_no_colours() -> None:
    values = noise(3, 7)
    torch.testing.assert_close(images.pixel((7,)).decode(values), torch.sigmoid(values))
    stated = images.pixel((7,), correlation="imagenet").decode(values)
    torch.testing.assert_close(stated, torch.sigmoid(correlate(values, correlation_matrix(3))))


def test_alpha_of_a_video_is_not_correlated_with_the_colours() -> None:
    image = images.alpha((3, 4, 5))
    params = 100 * image.init(random.key(0))
    decoded = image.decode(params)
    torch.testing.assert_close(decoded[:-1], images.fourier((3, 4, 5)).decode(params[:-1]))
    torch.testing.assert_close(decoded[-1:], images.fourier((3, 4, 5), channels=1).decode(params[-1:]))
    with pytest.raises(ValueError, match="alpha is for images and videos; a signal can be fourier, pixel, phase, "):
        images.alpha((9,))


# --- transforms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(9, 9), (9, 7), (6, 11), (1, 3), (4, 1)])
def test_time_is_sampled_linearly_and_its_ends_are_repeated(count: int, size: int) -> None:
    values = noise(2, count)
    transform = t.warp_time(size=size, shift=3.0, scale=(0.5, 2.0))
    for offset, factor in ((0.0, 1.0), (1.25, 1.0), (-2.5, 0.6), (0.5, 1.9)):
        drawn = torch.tensor([offset, factor])
        centres = (np.arange(size) + 0.5 - size / 2) * count / (size * factor) + count / 2 + offset
        expected = np.stack([np.interp(centres, np.arange(count) + 0.5, row) for row in values.numpy()])
        if count / size <= 1.5:
            np.testing.assert_allclose(transform.apply(values, drawn).numpy(), expected, rtol=0, atol=1e-6)


def test_draws_in_time_are_uniform_within_their_bounds() -> None:
    transform = t.warp_time(size=4, shift=3.0, scale=(0.5, 2.0))
    draws = torch.stack([transform.draw(random.key(seed)) for seed in range(200)])
    for column, (low, high) in zip(draws.unbind(1), ((-3.0, 3.0), (0.5, 2.0)), strict=True):
        assert low <= column.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < column.max() < high


@pytest.mark.parametrize("axis", [-1, -3])
def test_time_without_shift_and_scale_is_exactly_the_input(axis: int) -> None:
    values = noise(3, 16, 4, 5).movedim(1, axis)
    assert torch.equal(applied(t.warp_time(size=16, axis=axis), values), values)


def test_many_samples_are_averaged_before_they_are_resampled() -> None:
    fast = torch.arange(64.0).remainder(2)[None]  # alternates between 0 and 1
    short = applied(t.warp_time(size=8), fast)
    torch.testing.assert_close(short[:, 1:-1], torch.full((1, 6), 0.5), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "warp_time: size must be at least 1, got 0"),
        ({"shift": -1.0}, "warp_time: shift must be finite and at least 0, got -1.0"),
        ({"scale": (0.0, 1.0)}, "warp_time: scale must be bounds with 0 < low <= high, got (0.0, 1.0)"),
        ({"scale": (2.0, 1.0)}, "warp_time: scale must be bounds with 0 < low <= high, got (2.0, 1.0)"),
        ({"axis": 1}, "warp_time: axis must be counted from the last, such as -1 for signals, got 1"),
    ],
)
def test_warp_time_rejects_invalid_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        t.warp_time(**{"size": 4, **options})


FRAME_TRANSFORMS: dict[str, Transform] = {
    "warp": t.warp(t.jitter(3), t.rotate(20), size=(6, 5)),
    "deterministic warp": t.warp(t.jitter(3), t.scale(0.5, 2), size=(6, 5), deterministic=True),
    "colours and blur": t.chain(t.color_jitter(brightness=0.3, hue=0.2), t.gaussian_blur((0.5, 1.0)), t.roll(2)),
    "copies": t.multiview(t.warp(t.crop(3), size=(3, 4)), 2),
    "no random numbers": t.normalize((0.1, 0.2, 0.3), (0.5, 0.5, 2.0)),
}


@pytest.mark.parametrize("name", FRAME_TRANSFORMS)
def test_per_frame_transforms_all_frames_alike(name: str) -> None:
    transform = FRAME_TRANSFORMS[name]
    video = torch.sigmoid(noise(3, 4, 8, 7))
    drawn = transform.draw(random.key(5))
    expected = torch.stack([transform.apply(frame, drawn) for frame in video.unbind(1)], dim=-3)
    torch.testing.assert_close(t.per_frame(transform).apply(video, drawn), expected)


def test_per_frame_needs_frames() -> None:
    with pytest.raises(ValueError, match=r"per_frame expected a video \(c, t, h, w\), got \(3, 8, 7\)"):
        applied(t.per_frame(t.roll(1)), noise(3, 8, 7))


@pytest.mark.parametrize(
    ("transform", "shape", "message"),
    [
        (
            t.warp(size=(4, 4)),
            (3, 2, 8, 7),
            "warp expected an image (c, h, w), got (3, 2, 8, 7); per_frame applies",
        ),
        (t.warp(size=(4, 4)), (3, 9), "warp expected an image (c, h, w), got (3, 9)"),
        (
            t.gaussian_blur(1.0),
            (3, 9),
            "gaussian_blur expected images (..., c, h, w), got (3, 9); signals have",
        ),
        (t.roll(1), (3, 9), "roll expected images (..., c, h, w), got (3, 9)"),
        (t.color_jitter(contrast=0.1), (3, 9), "color_jitter expected images (..., c, h, w), got (3, 9)"),
        (t.over_background(), (3, 9), "over_background expected images (..., c, h, w), got (3, 9)"),
    ],
)
def test_transforms_of_images_refuse_what_is_none(transform: Transform, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        applied(transform, noise(*shape))


@pytest.mark.parametrize(("sides", "shape"), [(1, (2, 5)), (1, (4, 2, 5)), (3, (2, 4, 3, 5)), (3, (6, 2, 4, 3, 5))])
def test_normalize_finds_the_channels_before_the_sides(sides: int, shape: tuple[int, ...]) -> None:
    values = noise(*shape)
    axis = len(shape) - sides - 1
    expected = torch.stack(
        [(part - m) / s for part, m, s in zip(values.unbind(axis), (0.1, 0.2), (0.5, 2.0), strict=True)], dim=axis
    )
    torch.testing.assert_close(applied(t.normalize((0.1, 0.2), (0.5, 2.0), sides=sides), values), expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 4, 5), "normalize expected an image with 2 channels, got (3, 4, 5)"), ((3, 2, 4, 5), "2 channels, got 3")],
)
def test_normalize_refuses_other_channels(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        applied(t.normalize((0.1, 0.2), (0.5, 2.0), sides=3), noise(*shape))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_named_transform_moves_all_frames_of_a_video_alike(name: str) -> None:
    """A video of equal frames stays one, but for the noise that each value has of its own."""
    still = torch.sigmoid(noise(3, 1, 20, 20)).expand(-1, 6, -1, -1)
    shown = applied(named_transform(name, image=(6, 20, 20), size=(4, 16, 18)), still)
    assert shown.shape == ((8, 3, 4, 16, 18) if name == "maco" else (3, 4, 16, 18))
    shown = shown[0] if name == "maco" else shown
    difference = (shown - shown[:, :1]).abs().max().item()
    assert 0.05 < difference < 0.6 if name in ("default", "maco") else difference < 1e-9
    other = applied(named_transform(name, image=(6, 20, 20), size=(4, 16, 18)), still, 1)
    assert name == "none" or not torch.equal(other[0] if name == "maco" else other, shown)


@pytest.mark.parametrize("name", ["small", "lucid"])
def test_named_transform_shifts_a_video_by_less_than_a_frame(name: str) -> None:
    """A video of grey frames, each brighter than the last by 0.1, in the middle of the frame."""
    rising = (0.1 * torch.arange(8.0))[None, :, None, None].expand(1, 8, 40, 40)
    transform = named_transform(name, image=(8, 40, 40), size=(8, 40, 40))
    shifts = []
    for seed in range(30):
        centre = applied(transform, rising, seed)[0, :, 20, 20]
        change = (centre[1:-1] - rising[0, 1:-1, 0, 0]) / 0.1
        torch.testing.assert_close(change, change[:1].expand(6), rtol=0, atol=1e-4)
        shifts.append(change[0].item())
    assert -1 <= min(shifts) < -0.5 < 0.5 < max(shifts) <= 1


def test_named_transforms_of_signals() -> None:
    signal = noise(2, 224)
    assert torch.equal(applied(named_transform("none", image=(224,), size=(224,)), signal), signal)
    transform = named_transform("default", image=(224,), size=(100,))
    assert applied(transform, signal).shape == (2, 100)
    draws = torch.stack([transform.draw(random.key(seed)) for seed in range(200)])
    assert 11.5 < draws[:, 0].abs().max() <= 12
    assert 0.95 <= draws[:, 1].min() < draws[:, 1].max() <= 1.05
    for name in set(TRANSFORMS) - set(SIGNAL_TRANSFORMS):
        message = f"transforms={name!r} is for images and videos; signals have default, none"
        with pytest.raises(ValueError, match=re.escape(message)):
            named_transform(name, image=(8,), size=(8,))


@pytest.mark.parametrize(("image", "size"), [((8, 8), (4, 8, 8)), ((8,), (8, 8)), ((), ()), ((1, 2, 3, 4),) * 2])
def test_named_transform_needs_as_many_sides_in_as_out(image: tuple[int, ...], size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"both of as many sides, got {image} and {size}")):
        named_transform("default", image=image, size=size)


# --- objectives -----------------------------------------------------------------------------------------------------

MAPS = noise(3, 2, 4, 5)
VECTOR = noise(3, seed=1)


@pytest.mark.parametrize(
    ("objective", "score", "activation_map"),
    [
        (o.channel("a"), MAPS[1].mean(), MAPS[1]),
        (o.channel("a", 2), MAPS[2].mean(), MAPS[2]),
        (o.neuron("a"), MAPS[1, 1, 2, 2], MAPS[1]),
        (o.neuron("a", 0, position=(1, 3, 4)), MAPS[0, 1, 3, 4], MAPS[0]),
        (o.region("a", rows=(0.5, 1.0), columns=(0.0, 0.4)), MAPS[1, :, 2:, :2].mean(), MAPS[1]),
        (o.layer("a"), MAPS.mean(), MAPS.mean(0)),
        (o.direction("a", VECTOR), (VECTOR @ MAPS.flatten(1)).mean(), torch.einsum("c,cthw->thw", VECTOR, MAPS)),
        (
            o.direction_neuron("a", VECTOR, position=(0, 1, 2)),
            VECTOR @ MAPS[:, 0, 1, 2],
            torch.einsum("c,cthw->thw", VECTOR, MAPS),
        ),
        (o.activation_difference({"a": MAPS - 1}), torch.tensor(1.0).double(), torch.ones(2, 4, 5).double()),
        (o.inversion({"a": MAPS}), torch.tensor(0.0).double(), torch.zeros(2, 4, 5).double()),
    ],
    ids=str,
)
def test_objectives_on_the_maps_of_a_video(objective: o.Objective, score: Tensor, activation_map: Tensor) -> None:
    torch.testing.assert_close(objective({"a": MAPS}, TARGET), score)
    torch.testing.assert_close(objective.activation_map({"a": MAPS}, TARGET), activation_map, rtol=0, atol=1e-12)


def test_the_style_of_a_video_does_not_depend_on_the_order_of_positions() -> None:
    flat = MAPS.flatten(1)[:, torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    for other in (flat.reshape(3, 5, 2, 4), flat.reshape(3, 8, 5), flat.T):
        torch.testing.assert_close(o.style({"a": MAPS})({"a": other}, TARGET), torch.tensor(0.0).double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: o.neuron("a", position=(3, 4))({"a": MAPS}, TARGET), "no position (3, 4) in layer 'a', whose positio"),
        (lambda: o.neuron("a", position=(2, 0, 0))({"a": MAPS}, TARGET), "whose positions are (2, 4, 5)"),
        (lambda: o.neuron("a", position=1)({"a": MAPS}, TARGET), "whose positions are (2, 4, 5)"),
        (lambda: o.region("a")({"a": MAPS[:, 0, 0].T}, TARGET), "no rows and columns: its positions are (5,)"),
    ],
)
def test_positions_that_do_not_exist_raise_value_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def blurred(x: np.ndarray) -> np.ndarray:
    """A binomial filter along every axis but the first, position by position."""
    result = np.zeros_like(x)
    sides = x.shape[1:]
    for index in product(*map(range, sides)):
        for step in product((-1, 0, 1), repeat=len(sides)):
            near = tuple(min(max(i + s, 0), n - 1) for i, s, n in zip(index, step, sides, strict=True))
            weight = math.prod(0.5 if s == 0 else 0.25 for s in step)
            result[(slice(None), *index)] += weight * x[(slice(None), *near)]
    return result


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 3, 4), (2, 7), (2, 1)], ids=str)
def test_penalties_on_videos_and_signals(shape: tuple[int, ...]) -> None:
    x = torch.sigmoid(noise(*shape))
    values = x.numpy()
    variation = sum(np.abs(np.diff(values, axis=axis)).mean() for axis in range(1, len(shape)) if shape[axis] > 1)
    border = np.zeros(shape[1:], dtype=bool)
    border[..., :1] = border[..., -1:] = True
    if len(shape) > 2:
        border[..., :1, :] = border[..., -1:, :] = True
    complexity = (values - blurred(values)) ** 2 + 0.8 * (values - 0.5) ** 2
    expected = {
        o.total_variation(): variation,
        o.blur(): ((values - blurred(values)) ** 2 / 2).mean(),
        o.l1(0.3): np.abs(values - 0.3).mean(),
        o.l2(): math.sqrt(((values - 0.5) ** 2).mean() + 1e-12),
        o.opacity(): values[-1].mean(),
        o.boundary_complexity(1): complexity[:, border].mean(),
    }
    for objective, value in expected.items():
        assert objective({IMAGE: x}, TARGET).item() == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert objective.activation_map({IMAGE: x}, TARGET).shape == shape[1:]
