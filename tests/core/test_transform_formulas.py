"""Crops, flips, blur, noise, colours and backgrounds compared with torchvision and explicit formulas."""

import colorsys
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torchvision.ops import roi_align
from torchvision.transforms import functional as tv

from featvis_func import random
from featvis_func import transform as transforms
from featvis_func.rendering.presets import named_transform
from featvis_func.transform import (
    Affine,
    box_crop,
    chain,
    color_jitter,
    crop,
    crop_or_pad,
    flip,
    gaussian_blur,
    jitter,
    multiview,
    normal_noise,
    normalize,
    over_background,
    pad,
    roll,
    rotate,
    scale,
    uniform_noise,
    warp,
)
from featvis_func.transform import noise as noise_module
from featvis_func.types import Transform

KEY = random.key(0)


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def apply(transform: Transform, image: Tensor, seed: int = 0) -> Tensor:
    return transform.apply(image, transform.draw(random.key(seed)))


def fixed(step: Affine, *numbers: float) -> Affine:
    """Return the step with its uniform random numbers replaced by constants."""
    return step._replace(numbers=0, matrix=lambda u: step.matrix(torch.tensor(numbers)))


def draw_many(transform: Transform, count: int = 2000) -> Any:
    """Return the stacked draws of ``count`` keys."""
    return vmap(lambda n: transform.draw(random.fold_in(KEY, n)))(torch.arange(count))


class TestCrop:
    @pytest.mark.parametrize(("left", "top"), [(0, 0), (6, 5), (2, 3)])
    def test_is_a_slice_at_the_same_scale(self, left: int, top: int) -> None:
        image = noise(2, 9, 12)
        window = image[:, top : top + 4, left : left + 6]
        result = apply(warp(fixed(crop((4, 6)), left / 6, top / 5), size=(4, 6)), image)
        torch.testing.assert_close(result, window, rtol=0, atol=1e-6)

    def test_windows_are_uniform_inside_the_image(self) -> None:
        h, w, rows, columns = 30, 40, 10, 16
        matrices = draw_many(warp(crop((rows, columns)), size=(rows, columns)))
        sides = torch.tensor([1.0, w, h])
        for axis, side, size in ((0, w, columns), (1, h, rows)):
            start = (matrices[:, axis, 2:] * sides).sum(1) + (side - size) / 2
            assert -1e-4 < start.min() < 0.05
            assert side - size - 0.05 < start.max() < side - size + 1e-4
            # 5 standard errors of the mean of a uniform number.
            assert abs(start.mean() - (side - size) / 2) < 5 * (side - size) / math.sqrt(12 * 2000)
        correlation = torch.corrcoef(torch.stack([matrices[:, 0, 3], matrices[:, 1, 4]]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(2000)

    def test_composes_with_other_steps(self) -> None:
        image = noise(2, 10, 10)
        window, rotation = fixed(crop(4), 0.5, 1.0), rotate(choices=[90])
        crop_first = apply(warp(window, rotation, size=(4, 4)), image)
        rotation_first = apply(warp(rotation, window, size=(4, 4)), image)
        torch.testing.assert_close(crop_first, image[:, 6:, 3:7].rot90(1, (1, 2)), rtol=0, atol=1e-5)
        torch.testing.assert_close(rotation_first, image.rot90(1, (1, 2))[:, 6:, 3:7], rtol=0, atol=1e-5)
        inner = apply(warp(window, fixed(crop(2), 1.0, 0.5), size=(2, 2)), image)
        # The position of the inner crop is a fraction of the image as well.
        torch.testing.assert_close(inner, image[:, 7:9, 8:10], rtol=0, atol=1e-5)

    def test_pad_after_crop_enlarges_the_window(self) -> None:
        image = noise(1, 8, 8)
        result = apply(warp(fixed(crop(4), 0.5, 0.5), pad(1), size=(6, 6), padding=0.0), image)
        # The window is a frame rather than a mask, so a larger frame shows more of the image.
        torch.testing.assert_close(result, image[:, 1:7, 1:7], rtol=0, atol=1e-6)


class TestCropOrPad:
    @pytest.mark.parametrize("size", [(4, 6), (8, 2), (12, 14), (4, 14), (8, 10)], ids=str)
    def test_matches_torchvision_center_crop(self, size: tuple[int, int]) -> None:
        image = noise(2, 8, 10)
        result = apply(warp(crop_or_pad(size), size=size, padding=0.0), image)
        torch.testing.assert_close(result, tv.center_crop(image, list(size)), rtol=0, atol=1e-6)

    def test_pads_with_the_padding_value_of_warp(self) -> None:
        result = apply(warp(crop_or_pad(6), size=(6, 6), padding=0.25), torch.ones(1, 2, 2))
        torch.testing.assert_close(result, F.pad(torch.ones(1, 2, 2), (2, 2, 2, 2), value=0.25))

    def test_an_odd_difference_samples_between_pixels(self) -> None:
        image = noise(1, 4, 5)
        result = apply(warp(crop_or_pad((4, 4)), size=(4, 4)), image)
        torch.testing.assert_close(result, (image[:, :, 1:] + image[:, :, :-1]) / 2)


class TestBoxCrop:
    @pytest.mark.parametrize("numbers", [(0.3, 0.2, 0.9), (0.9, 0.6, 0.1), (0.0, 0.0, 1.0)], ids=str)
    def test_matches_roi_align_with_one_sample(self, numbers: tuple[float, float, float]) -> None:
        image = noise(2, 20, 30, dtype=torch.float32)
        result = apply(warp(fixed(box_crop(0.2, 0.5, normal=None, centre_sd=None), *numbers), size=(8, 9)), image)
        side, x, y = 0.2 + 0.3 * numbers[0], *numbers[1:]
        left, top = x * (1 - side) * 30, y * (1 - side) * 20
        box = torch.tensor([[0.0, left, top, left + side * 30, top + side * 20]])
        expected = roi_align(image[None], box, (8, 9), sampling_ratio=1, aligned=True)[0]
        inside = slice(1, -1)  # torchvision repeats the border
        torch.testing.assert_close(result[:, inside, inside], expected[:, inside, inside], rtol=0, atol=1e-4)

    def test_default_sides_and_centres_match_maco(self) -> None:
        matrices = draw_many(warp(box_crop(), size=(8, 8)), 4000)
        sides = matrices[:, 0, 0] * 0.25
        centres = torch.cat([matrices[:, 0, 3], matrices[:, 1, 4]])
        assert sides.min().item() == pytest.approx(0.05, abs=1e-6)
        assert sides.max() < 1
        assert ((sides - 0.05).abs() < 1e-6).float().mean().item() == pytest.approx(0.0228, abs=0.012)  # P(z < -2)
        assert sides.median().item() == pytest.approx(0.25, abs=5 * 1.25 * 0.1 / math.sqrt(4000))
        assert (sides < 0.35).float().mean().item() == pytest.approx(0.8413, abs=0.03)
        assert centres.mean().abs() < 5 * 0.15 / math.sqrt(8000)
        assert centres.std().item() == pytest.approx(0.15, rel=5 / math.sqrt(16000))
        table = torch.stack([sides, matrices[:, 0, 3], matrices[:, 1, 4]])
        assert (torch.corrcoef(table) - torch.eye(3)).abs().max() < 5 / math.sqrt(4000)
        assert torch.equal(matrices[:, 0, 0], matrices[:, 1, 1])  # the aspect ratio is kept

    def test_uniform_boxes_fit_inside(self) -> None:
        matrices = draw_many(warp(box_crop(0.2, 0.6, normal=None, centre_sd=None), size=(8, 8)))
        sides = matrices[:, 0, 0] * 0.4
        assert 0.2 - 1e-6 < sides.min() < 0.21
        assert 0.59 < sides.max() < 0.6 + 1e-6
        for centre in (matrices[:, 0, 3], matrices[:, 1, 4]):
            extent = centre.abs() + sides / 2
            assert 0.495 < extent.max() < 0.5 + 1e-6

    def test_small_box_of_a_large_image_is_not_downsampled(self) -> None:
        """A box as large as the output is copied exactly, although the full image would be downsampled."""
        image = noise(1, 64, 64)
        box = box_crop(0.25, 0.25, normal=None, centre_sd=0.0)
        torch.testing.assert_close(apply(warp(box, size=(16, 16)), image), image[:, 24:40, 24:40], rtol=0, atol=1e-6)

    def test_large_box_is_downsampled_with_a_filter(self) -> None:
        image = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).double()[None]
        box = box_crop(1.0, 1.0, normal=None, centre_sd=0.0)
        assert (apply(warp(box, size=(16, 16)), image) - 0.5).abs()[:, 1:-1, 1:-1].max() < 0.02


class TestFlip:
    @pytest.mark.parametrize("numbers", [(0.2, 0.2), (0.2, 0.8), (0.8, 0.2), (0.8, 0.8)], ids=str)
    def test_mirrors_exactly(self, numbers: tuple[float, float]) -> None:
        image = noise(2, 6, 7)
        axes = [axis for axis, u in ((-1, numbers[0]), (-2, numbers[1])) if u < 0.5]
        result = apply(warp(fixed(flip(vertical=True), *numbers), size=(6, 7)), image)
        torch.testing.assert_close(result, image.flip(axes))

    @pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
    def test_probability_applies_to_each_direction_independently(self, probability: float) -> None:
        matrices = draw_many(warp(flip(vertical=True, probability=probability), size=(4, 4)))
        flipped = torch.stack([matrices[:, 0, 0] < 0, matrices[:, 1, 1] < 0]).double()
        tolerance = 5 * math.sqrt(probability * (1 - probability) / 2000) + 1e-9
        assert (flipped.mean(1) - probability).abs().max() < tolerance
        both = (flipped[0] * flipped[1]).mean()
        assert abs(both - probability**2) < tolerance

    def test_of_one_direction(self) -> None:
        image = noise(1, 4, 4)
        torch.testing.assert_close(apply(warp(flip(probability=1.0), size=(4, 4)), image), image.flip(-1))
        vertical_flip = warp(flip(horizontal=False, vertical=True, probability=1.0), size=(4, 4))
        torch.testing.assert_close(apply(vertical_flip, image), image.flip(-2))


def test_affine_steps_call_grid_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sample = F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda *args, **options: calls.append(1) or sample(*args, **options))
    steps = (pad(2), jitter(2), scale(), rotate(9), flip(), crop(12), box_crop(), crop_or_pad(10))
    assert apply(warp(*steps, size=(8, 8)), noise(3, 16, 16)).shape == (3, 8, 8)
    apply(multiview(warp(*steps, size=(8, 8)), 5), noise(3, 16, 16))
    assert len(calls) == 2


def test_deterministic_sampling_matches_grid_sample_for_crops() -> None:
    image = noise(3, 20, 24)
    fast, deterministic = (
        warp(jitter(2), crop(12), rotate(9), box_crop(), flip(), size=(8, 9), deterministic=flag)
        for flag in (False, True)
    )
    for seed in range(3):
        torch.testing.assert_close(apply(deterministic, image, seed), apply(fast, image, seed), rtol=0, atol=1e-12)


class TestMultiview:
    def test_applies_the_transform_once_per_key(self) -> None:
        transform, image = chain(warp(jitter(3), rotate(9), size=(7, 8)), normal_noise(0.1)), noise(3, 9, 9)
        result = apply(multiview(transform, 4), image)
        expected = torch.stack([transform.apply(image, transform.draw(key)) for key in random.split(KEY, 4)])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
        assert len(result.flatten(1).unique(dim=0)) == 4

    def test_following_noise_is_independent_for_each_view(self) -> None:
        mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
        views_of_image = multiview(warp(size=(30, 30)), 3)
        transform = chain(views_of_image, normal_noise(0.1), uniform_noise(0.1), normalize(mean, std))
        result = apply(transform, torch.full((3, 30, 30), 0.5))
        assert result.shape == (3, 3, 30, 30)
        added = result * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None] - 0.5
        correlation = torch.corrcoef(added.flatten(1)) - torch.eye(3)
        assert correlation.abs().max() < 5 / math.sqrt(2700)
        assert added.std().item() == pytest.approx(math.sqrt(0.01 + 0.01 / 3), rel=0.05)

    def test_gradient_is_the_sum_over_views(self) -> None:
        transform, image, weights = warp(jitter(3), size=(6, 6)), noise(2, 8, 8), noise(3, 2, 6, 6)
        draws = multiview(transform, 3).draw(KEY)
        total = torch.func.grad(lambda x: (multiview(transform, 3).apply(x, draws) * weights).sum())(image)
        per_view = [
            torch.func.grad(lambda x, d=d, k=k: (transform.apply(x, d) * k).sum())(image)
            for d, k in zip(draws, weights, strict=True)
        ]
        torch.testing.assert_close(total, sum(per_view), rtol=0, atol=1e-12)

    def test_of_a_transform_without_randomness(self) -> None:
        image = noise(1, 2, 2)
        result = apply(multiview(normalize([0.5], [0.5]), 3), image)
        torch.testing.assert_close(result, ((image - 0.5) / 0.5).expand(3, 1, 2, 2))


class TestBlur:
    @pytest.mark.parametrize(("sigma", "radius", "size"), [(0.7, None, (9, 12)), (1.5, 2, (3, 8)), (2.0, None, (8, 7))])
    def test_matches_torchvision(self, sigma: float, radius: int | None, size: tuple[int, int]) -> None:
        image = noise(3, *size)
        kernel_radius = math.ceil(3 * sigma) if radius is None else radius
        expected = tv.gaussian_blur(image, [2 * kernel_radius + 1, 2 * kernel_radius + 1], [sigma, sigma])
        result = apply(gaussian_blur(sigma, radius=radius), image)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("size", [(1, 1), (2, 9), (5, 3)], ids=str)
    def test_preserves_a_constant(self, size: tuple[int, int]) -> None:
        """Also if the kernel is much wider than the image."""
        image = torch.full((2, *size), 0.7, dtype=torch.float64)
        torch.testing.assert_close(apply(gaussian_blur((3.0, 9.0)), image), image)

    def test_sigma_is_uniform_and_differs_under_vmap(self) -> None:
        sigmas = draw_many(gaussian_blur((0.5, 2.0)))
        assert 0.5 <= sigmas.min() < 0.51
        assert 1.99 < sigmas.max() <= 2.0
        point = torch.zeros(1, 15, 15)
        point[:, 7, 7] = 1.0
        separate = [gaussian_blur(sigma, radius=6).apply(point, torch.tensor(sigma)) for sigma in (0.5, 1.0, 2.0)]
        batched = vmap(gaussian_blur((0.5, 2.0)).apply, (None, 0))(point, torch.tensor([0.5, 1.0, 2.0]))
        torch.testing.assert_close(batched, torch.stack(separate))
        assert batched[0].max() > batched[1].max() > batched[2].max()


class TestColorJitter:
    mid_range = 0.4 + 0.2 * noise(3, 5, 6)  # far enough from 0 and 1 that torchvision does not clamp

    @pytest.mark.parametrize("factor", [0.5, 1.0, 1.4])
    @pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
    def test_factors_match_torchvision(self, kind: str, factor: float) -> None:
        order = ("brightness", "contrast", "saturation")
        draw = torch.tensor([factor if kind == name else 1.0 for name in order] + [0.0])
        result = color_jitter(saturation=0.5).apply(self.mid_range, draw)
        expected = getattr(tv, f"adjust_{kind}")(self.mid_range, factor)
        # torchvision rounds the grey weights to 4 digits.
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-4)

    def test_brightness_comes_first_and_nothing_is_clamped(self) -> None:
        image = noise(3, 4, 4)
        result = color_jitter().apply(image, torch.tensor([2.0, 0.5, 1.0, 0.0]))
        grey = 2 * (0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]).mean()
        torch.testing.assert_close(result, grey + 0.5 * (2 * image - grey), rtol=0, atol=1e-6)
        assert color_jitter().apply(image, torch.tensor([2.0, 1.0, 1.0, 0.0])).max() > 1.5

    def test_brightness_and_contrast_work_with_one_channel(self) -> None:
        image = 0.4 + 0.2 * noise(1, 5, 6)
        result = color_jitter(contrast=0.5).apply(image, torch.tensor([1.0, 0.5, 1.0, 0.0]))
        torch.testing.assert_close(result, tv.adjust_contrast(image, 0.5))

    @pytest.mark.parametrize("turns", [-0.5, -0.2, 0.1, 0.25, 0.5])
    def test_hue_rotates_the_iq_plane(self, turns: float) -> None:
        """Compared with colorsys, whose YIQ constants have two digits."""
        result = color_jitter(hue=0.5).apply(self.mid_range, torch.tensor([1.0, 1.0, 1.0, turns]))
        for before, after in zip(self.mid_range.flatten(1).T.tolist(), result.flatten(1).T.tolist(), strict=True):
            y, i, q = colorsys.rgb_to_yiq(*before)
            rotated = complex(i, q) * complex(math.cos(2 * math.pi * turns), -math.sin(2 * math.pi * turns))
            assert colorsys.rgb_to_yiq(*after) == pytest.approx((y, rotated.real, rotated.imag), abs=0.01)

    def test_hue_of_a_third_turn_maps_red_to_green_to_blue(self) -> None:
        """The sign of the hue is that of torchvision."""
        red = torch.tensor([0.6, 0.4, 0.4])[:, None, None]
        third = torch.tensor([1.0, 1.0, 1.0, 1 / 3])
        jitter = color_jitter(hue=0.5)
        green = jitter.apply(red, third)
        assert green.argmax() == tv.adjust_hue(red, 1 / 3).argmax() == 1
        assert jitter.apply(green, third).argmax() == 2
        red_again = jitter.apply(jitter.apply(green, third), third)
        torch.testing.assert_close(red_again, red)
        torch.testing.assert_close(jitter.apply(torch.full((3, 2, 2), 0.3), third), torch.full((3, 2, 2), 0.3))

    def test_factors_are_uniform_between_their_bounds(self) -> None:
        draws = draw_many(color_jitter(brightness=0.4, contrast=1.5, saturation=(0.2, 0.3), hue=0.1))
        for column, (low, high) in zip(draws.T, ((0.6, 1.4), (0.0, 2.5), (0.2, 0.3), (-0.1, 0.1)), strict=True):
            assert low - 1e-6 <= column.min() < low + 0.01 * (high - low)
            assert high - 0.01 * (high - low) < column.max() <= high + 1e-6
        assert (torch.corrcoef(draws.T) - torch.eye(4)).abs().max() < 5 / math.sqrt(2000)
        identity = color_jitter()
        torch.testing.assert_close(apply(identity, self.mid_range), self.mid_range)


class TestNoise:
    def test_normal_noise_is_normal(self) -> None:
        x = apply(normal_noise(0.5), torch.zeros(3, 150, 150, dtype=torch.float64)).flatten()
        count = len(x)
        assert abs(x.mean()) < 5 * 0.5 / math.sqrt(count)
        assert x.std().item() == pytest.approx(0.5, rel=5 / math.sqrt(2 * count))
        assert (x**4).mean().item() == pytest.approx(3 * 0.5**4, rel=0.1)
        for sigmas in (0.5, 1.0, 2.0):
            probability = math.erf(sigmas / math.sqrt(2))
            tolerance = 5 * math.sqrt(probability * (1 - probability) / count) + 1 / 256
            assert (x.abs() < 0.5 * sigmas).double().mean().item() == pytest.approx(probability, abs=tolerance)
        assert 3.5 * 0.5 < x.abs().max() < 4.4 * 0.5
        counts = torch.histc(torch.special.ndtr(x / 0.5), 64, 0, 1)
        assert counts.sum() == count
        assert (((counts - count / 64) ** 2) / (count / 64)).sum() < 113  # chi-square of 63, at 1e-4

    def test_uniform_noise_is_uniform(self) -> None:
        x = apply(uniform_noise(0.5), torch.ones(3, 150, 150, dtype=torch.float64)).flatten() - 1
        counts = torch.histc(x, 20, -0.5, 0.5)
        assert counts.sum() == len(x)
        expected = len(x) / 20
        assert (((counts - expected) ** 2) / expected).sum() < 52  # chi-square of 19, at 1e-4

    @pytest.mark.parametrize("make", [normal_noise, uniform_noise])
    def test_neighbours_are_independent(self, make: Callable[[float], Transform]) -> None:
        """Lags cover the quarters of a word, and the rows and channels of an image."""
        count = 3 * 120 * 120
        x = apply(make(1.0), torch.zeros(3, 120, 120)).flatten()
        for lag in (1, 2, 3, 4, 120, 120 * 120, count // 2):
            table = torch.stack([x[:-lag], x[lag:]])
            for power in (table, table**2):
                assert abs(torch.corrcoef(power)[0, 1]) < 5 / math.sqrt(count - lag)

    @pytest.mark.parametrize("make", [normal_noise, uniform_noise])
    def test_steps_and_filters_have_noise_of_their_own(self, make: Callable[[float], Transform]) -> None:
        transform, image = make(1.0), torch.zeros(3, 60, 60)
        keys = torch.stack(random.split(KEY, 40))
        drawn = torch.vmap(lambda key: transform.apply(image, transform.draw(key)))(keys)
        expected = torch.stack([transform.apply(image, transform.draw(key)) for key in keys])
        torch.testing.assert_close(drawn, expected, rtol=0, atol=0)
        correlation = torch.corrcoef(drawn.flatten(1)) - torch.eye(40)
        assert correlation.abs().max() < 5 / math.sqrt(image.numel())

    @pytest.mark.parametrize("make", [normal_noise, uniform_noise])
    @pytest.mark.parametrize("values", [5, 31, 32, 33, 200, 1000])
    def test_large_images_have_noise_in_windows(
        self, make: Callable[[float], Transform], values: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As if windows had at most 32 numbers."""
        monkeypatch.setattr(noise_module, "_MIN_OFFSETS", noise_module._LENGTH - 32)
        monkeypatch.setattr(noise_module, "_WINDOW", 32)
        transform, image = make(1.0), torch.zeros(1, 1, values)
        first, second = (apply(transform, image, seed).flatten() for seed in (0, 1))
        assert (first != 0).all()
        assert len(first.unique()) > 0.9 * values  # no window is repeated
        assert not torch.equal(first, second)
        assert not torch.equal(first[: values // 2], second[: values // 2])

    def test_noise_is_the_same_on_every_machine(self) -> None:
        """The numbers come from a generator whose stream is fixed, and from float64 quantiles."""
        expected = {
            normal_noise: [-1.68735981, 0.66728741, -0.12441750, -0.58986884],
            uniform_noise: [0.60417175, 0.96052551, 0.62165833, 0.95588684],
        }
        for make, numbers in expected.items():
            torch.testing.assert_close(apply(make(1.0), torch.zeros(1, 1, 4)).flatten(), torch.tensor(numbers))

    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 3, 5, 7)], ids=str)
    @pytest.mark.parametrize("make", [normal_noise, uniform_noise])
    def test_accepts_any_shape(self, make: Callable[[float], Transform], shape: tuple[int, ...]) -> None:
        image = noise(*shape)
        result = apply(make(0.1), image)
        assert result.shape == image.shape
        assert (result != image).all()
        assert torch.equal(apply(make(0.0), image), image)


class TestRoll:
    def test_matches_torch_roll(self) -> None:
        image = noise(2, 5, 6)
        for seed in range(20):
            shift = roll(9).draw(random.key(seed))
            assert torch.equal(roll(9).apply(image, shift), image.roll(tuple(shift.tolist()), (1, 2)))

    def test_all_shifts_are_equally_likely(self) -> None:
        shifts = draw_many(roll(2), 5000)
        assert shifts.dtype == torch.int64
        for column in shifts.T:
            counts = (column + 2).bincount()
            assert len(counts) == 5
            assert (counts - 1000).abs().max() < 5 * math.sqrt(5000 * 0.2 * 0.8)

    def test_vmapped_shifts_differ_and_the_gradient_is_rolled_back(self) -> None:
        images, weights = noise(3, 2, 5, 6), noise(3, 2, 5, 6).flip(0)
        shifts = torch.tensor([[0, 1], [-2, 0], [3, -4]])
        rolled = vmap(roll(4).apply)(images, shifts)
        gradient = torch.func.grad(lambda x: (vmap(roll(4).apply)(x, shifts) * weights).sum())(images)
        for i, (y, x) in enumerate(shifts.tolist()):
            assert torch.equal(rolled[i], images[i].roll((y, x), (1, 2)))
            assert torch.equal(gradient[i], weights[i].roll((-y, -x), (1, 2)))


class TestBackground:
    @pytest.mark.parametrize("kind", transforms.BACKGROUNDS)
    @pytest.mark.parametrize("channels", [1, 3])
    def test_shows_through_where_alpha_is_low(self, kind: str, channels: int) -> None:
        transform, colours, alpha = over_background(kind), noise(channels, 6, 7), noise(1, 6, 7)
        draw = transform.draw(KEY)
        backdrop = transform.apply(torch.cat([colours, torch.zeros(1, 6, 7)]), draw)
        result = transform.apply(torch.cat([colours, alpha]), draw)
        torch.testing.assert_close(result, colours * alpha + (1 - alpha) * backdrop, rtol=0, atol=1e-6)
        torch.testing.assert_close(transform.apply(torch.cat([colours, torch.ones(1, 6, 7)]), draw), colours)
        assert backdrop.min() >= 0
        assert backdrop.max() <= 1
        other = transform.apply(torch.cat([colours, torch.zeros(1, 6, 7)]), transform.draw(random.key(1)))
        assert (other != backdrop).any()

    @pytest.mark.parametrize("kind", transforms.BACKGROUNDS)
    def test_background_differs_for_each_view(self, kind: str) -> None:
        result = apply(chain(multiview(warp(size=(8, 8)), 3), over_background(kind)), torch.zeros(4, 8, 8))
        assert result.shape == (3, 3, 8, 8)
        assert len(result.flatten(1).unique(dim=0)) == 3

    @staticmethod
    def backdrop(kind: str, count: int, size: int) -> Tensor:
        """Return backgrounds without an image: ``(count, 3, size, size)``."""
        return apply(over_background(kind), torch.zeros(count, 4, size, size))

    def test_smooth_background_is_smooth_with_the_same_contrast_everywhere(self) -> None:
        x = torch.logit(self.backdrop("smooth", 200, 64).double())
        assert x.std().item() == pytest.approx(2.0, rel=0.1)
        per_pixel = x.std((0, 1))
        assert per_pixel.min() > 1.6
        assert per_pixel.max() < 2.4
        near = (x[..., 1:] * x[..., :-1]).mean() / (x**2).mean()
        far = (x[..., 32:] * x[..., :32]).mean() / (x**2).mean()
        assert near > 0.85
        assert abs(far) < 0.2
        channels = torch.corrcoef(x.movedim(1, 0).flatten(1)) - torch.eye(3)
        assert channels.abs().max() < 0.2

    def test_noise_background_is_uniform_and_color_background_is_constant(self) -> None:
        uniform, flat = self.backdrop("noise", 4, 40), self.backdrop("color", 200, 2)
        assert uniform.mean().item() == pytest.approx(0.5, abs=5 * 0.29 / math.sqrt(4 * 3 * 1600))
        assert uniform.std().item() == pytest.approx(12**-0.5, rel=0.03)
        assert (flat == flat[:, :, :1, :1]).all()
        assert flat.mean().item() == pytest.approx(0.5, abs=5 * 0.29 / math.sqrt(600))
        assert (torch.corrcoef(flat[:, :, 0, 0].T) - torch.eye(3)).abs().max() < 0.3


@pytest.mark.parametrize(("side", "mean"), [(40, 0.4), (20, 0.6), (160, 0.25)])
def test_maco_transform_is_eight_boxes_with_noise(side: int, mean: float) -> None:
    """The boxes are as wide as the model's input, within bounds."""
    image = noise(3, side, side)
    boxes = multiview(warp(box_crop(normal=(mean, 0.4 * mean)), size=(16, 16)), 8)
    transform = named_transform("maco", image=(side, side), size=(16, 16))
    shown = apply(transform, image, 3)
    assert shown.shape == (8, 3, 16, 16)
    assert torch.equal(shown, apply(chain(boxes, normal_noise(0.04), uniform_noise(0.02)), image, 3))
    added = apply(named_transform("maco", image=(8, 8), size=(64, 64)), torch.full((3, 8, 8), 0.5)) - 0.5
    assert added.std().item() == pytest.approx(math.sqrt(0.04**2 + 0.02**2 / 3), rel=0.05)
    assert (torch.corrcoef(added.flatten(1)) - torch.eye(8)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: crop(0), "got 0"),
        (lambda: crop((4, 2.5)), "got (4, 2.5)"),  # type: ignore[arg-type]
        (lambda: crop_or_pad((1, 2, 3)), "got (1, 2, 3)"),  # type: ignore[arg-type]
        (
            lambda: apply(warp(crop(7), size=(4, 4)), noise(1, 6, 9)),
            "crop of 7 x 7 pixels is larger than the frame of 6 x 9; crop_or_pad would pad it",
        ),
        (
            lambda: apply(warp(pad(-2), crop(4), size=(4, 4)), noise(1, 6, 9)),
            "crop of 4 x 4 pixels is larger than the frame of 2 x 5; crop_or_pad would pad it",
        ),
        (
            lambda: box_crop(0.0, 0.5),
            "box_crop: bounds must satisfy 0 < low <= high, got low=0.0 and high=0.5",
        ),
        (
            lambda: box_crop(0.5, 0.2),
            "box_crop: bounds must satisfy 0 < low <= high, got low=0.5 and high=0.2",
        ),
        (
            lambda: box_crop(0.5, 0.9),
            "box_crop: normal must be (mean in [0.5, 0.9], sd >= 0), got (0.25",
        ),
        (
            lambda: box_crop(normal=(0.5, -1.0)),
            "box_crop: normal must be (mean in [0.05, 1.0], sd >= 0), got (0.5, -1.0)",
        ),
        (lambda: box_crop(centre_sd=-0.1), "box_crop: centre_sd must be finite and at least 0, got -0.1"),
        (lambda: flip(probability=1.5), "flip: probability must be in [0, 1], got 1.5"),
        (lambda: multiview(chain(), 0), "multiview: count must be at least 1, got 0"),
        (
            lambda: gaussian_blur(0.0),
            "gaussian_blur: sigma must be above 0, or bounds with 0 < low <= high, got 0.0",
        ),
        (
            lambda: gaussian_blur((2.0, 1.0)),
            "gaussian_blur: sigma must be above 0, or bounds with 0 < low <= high, got (2.0, 1.0)",
        ),
        (lambda: gaussian_blur(1.0, radius=0), "gaussian_blur: radius must be at least 1, got 0"),
        (lambda: roll(-1), "roll: pixels must be at least 0, got -1"),
        (lambda: roll(1.5), "roll: pixels must be"),  # type: ignore[arg-type]
        (lambda: normal_noise(-0.1), "normal_noise: sd must be finite and at least 0, got -0.1"),
        (lambda: uniform_noise(math.nan), "uniform_noise: amount must be finite and at least 0, got nan"),
        (
            lambda: color_jitter(contrast=-0.1),
            "contrast must be a strength of at least 0 or increasing bounds in [0, inf], got -0.1",
        ),
        (lambda: color_jitter(hue=0.6), "hue must be a strength of at least 0 or increasing bounds in [-0.5, 0.5]"),
        (
            lambda: color_jitter(hue=-0.1),
            "hue must be a strength of at least 0 or increasing bounds in [-0.5, 0.5]",
        ),
        (lambda: color_jitter(saturation=(1.2, 0.8)), "color_jitter: saturation must be a strength of at least 0"),
        (
            lambda: apply(color_jitter(hue=0.1), noise(4, 2, 2)),
            "color_jitter: saturation and hue need 3 channels, got 4; only brightness and contrast work",
        ),
        (lambda: over_background("clouds"), "unknown background 'clouds'; expected one of smooth, noise, color"),
        (
            lambda: apply(over_background(), noise(1, 2, 2)),
            "over_background needs an image (..., c + 1, h, w) with c >= 1, got (1, 2, 2)",
        ),
    ],
)
def test_invalid_arguments_raise_value_error(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
