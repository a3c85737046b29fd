"""Random transforms compared with independent geometry: roll, rot90, numpy matrices and a bilinear sampler."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from featvis_func import random
from featvis_func.rendering.options import TRANSFORMS
from featvis_func.rendering.presets import named_transform
from featvis_func.transform import Affine, chain, jitter, normalize, pad, rotate, scale, warp
from featvis_func.tree import tree_leaves
from featvis_func.types import Transform


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def apply(transform: Transform, image: Tensor, seed: int = 0) -> Tensor:
    return transform.apply(image, transform.draw(random.key(seed)))


def shift(x: float, y: float) -> Affine:
    """Return a deterministic step that samples ``x`` pixels to the right and ``y`` pixels below."""
    return Affine(0, lambda u: torch.tensor([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]]))


def draw_many(transform: Transform, count: int = 2000) -> Tensor:
    """Return the matrices of ``count`` keys."""
    return vmap(lambda n: transform.draw(random.fold_in(random.key(0), n)))(torch.arange(count))


def sample_bilinear(
    image: NDArray[np.float64], matrix: NDArray[np.float64], size: tuple[int, int], *, grow: float, padding: float
) -> NDArray[np.float64]:
    """Interpolate between the four neighbours of each sampled position, in a loop over the output pixels."""
    h, w = image.shape
    result = np.empty(size)
    for row in range(size[0]):
        for column in range(size[1]):
            x = (column + 0.5 - size[1] / 2) * (w + grow) / size[1]
            y = (row + 0.5 - size[0] / 2) * (h + grow) / size[0]
            source_x, source_y, _ = matrix @ np.array([x, y, 1.0])
            left, top = source_x + w / 2 - 0.5, source_y + h / 2 - 0.5
            i, j = math.floor(top), math.floor(left)
            value = 0.0
            for k, weight_y in ((i, 1 - (top - i)), (i + 1, top - i)):
                for m, weight_x in ((j, 1 - (left - j)), (j + 1, left - j)):
                    inside = 0 <= k < h and 0 <= m < w
                    value += weight_y * weight_x * (image[k, m] if inside else padding)
            result[row, column] = value
    return result


@pytest.mark.parametrize("padding", [0.5, 0.0])
@pytest.mark.parametrize("size", [(9, 11), (10, 12), (14, 11)], ids=str)
@pytest.mark.parametrize(
    "steps",
    [
        (jitter(3),),
        (scale(0.6, 1.5),),
        (rotate(50),),
        (pad(2), jitter(2), scale(0.8, 1.2), rotate(30), jitter(1)),
        (pad(-1), rotate(20)),
    ],
    ids=["jitter", "scale", "rotate", "all", "crop"],
)
def test_warp_matches_a_bilinear_sampler(steps: tuple[Affine, ...], size: tuple[int, int], padding: float) -> None:
    transform = warp(*steps, size=size, padding=padding)
    image = noise(2, 9, 11)
    for seed in range(3):
        matrix = transform.draw(random.key(seed))
        result = transform.apply(image, matrix)
        for channel in range(2):
            expected = sample_bilinear(
                image[channel].numpy(),
                matrix.double().numpy(),
                size,
                grow=sum(step.grow for step in steps),
                padding=padding,
            )
            np.testing.assert_allclose(result[channel].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (4, 1, 1)], ids=str)
def test_warp_without_steps_is_the_identity(shape: tuple[int, int, int]) -> None:
    image = noise(*shape)
    torch.testing.assert_close(apply(warp(size=shape[1:]), image), image)


def test_warp_without_steps_resizes_like_interpolate() -> None:
    image = noise(1, 6, 7)
    expected = torch.nn.functional.interpolate(image[None], size=(12, 9), mode="bilinear", align_corners=False)[0]
    result = apply(warp(size=(12, 9), padding=0.0), image)
    # interpolate repeats the border where warp pads, so only the interior is equal.
    torch.testing.assert_close(result[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1])


def test_warp_maps_a_pixel_by_the_inverse_matrix() -> None:
    """The matrix maps output to input positions, so the input pixel p appears at ``inverse(matrix) @ p``."""
    transform = warp(rotate(choices=[90]), shift(1, -2), size=(11, 11), padding=0.0)
    matrix = transform.draw(random.key(0))
    image = torch.zeros(1, 11, 11)
    image[0, 3, 6] = 1.0
    x, y, _ = torch.linalg.solve(matrix, torch.tensor([6.0 - 5, 3.0 - 5, 1.0])).round().int().tolist()
    result = transform.apply(image, matrix)
    assert result[0, y + 5, x + 5].item() == pytest.approx(1.0, abs=1e-5)
    assert result.sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (0, -3), (-1, 2)])
def test_integer_shift_is_a_roll_with_padding(dx: int, dy: int) -> None:
    """Sampling further to the right moves the image to the left, and padding enters at the right."""
    image = noise(2, 9, 10)
    result = apply(warp(shift(dx, dy), size=(9, 10)), image)
    rolled = image.roll((-dy, -dx), (1, 2))
    torch.testing.assert_close(result[:, 3:-3, 3:-3], rolled[:, 3:-3, 3:-3])
    rows = slice(-dy, None) if dy > 0 else slice(0, -dy)
    columns = slice(-dx, None) if dx > 0 else slice(0, -dx)
    torch.testing.assert_close(result[:, rows, :], torch.full_like(result[:, rows, :], 0.5))
    torch.testing.assert_close(result[:, :, columns], torch.full_like(result[:, :, columns], 0.5))


def test_jitter_matrix_is_a_shift() -> None:
    step = jitter(8)
    for u, expected in (((0.0, 0.5), (-8.0, 0.0)), ((0.75, 0.25), (4.0, -4.0))):
        assert torch.equal(step.matrix(torch.tensor(u)), shift(*expected).matrix(torch.empty(0)))


@pytest.mark.parametrize(("degrees", "quarter_turns"), [(90, 1), (-90, -1), (180, 2)])
@pytest.mark.parametrize("size", [6, 7])
def test_rotate_is_counter_clockwise_like_rot90(degrees: float, quarter_turns: int, size: int) -> None:
    image = noise(2, size, size)
    result = apply(warp(rotate(choices=[degrees]), size=(size, size)), image)
    torch.testing.assert_close(result, image.rot90(quarter_turns, (1, 2)), rtol=0, atol=1e-5)


def test_scale_enlarges_the_central_region() -> None:
    image = noise(1, 12, 12)
    middle = image[:, 2:10, 2:10]
    enlarged = torch.nn.functional.interpolate(middle[None], size=(16, 16), mode="bilinear", align_corners=False)[0]
    result = apply(warp(scale(1.5, 1.5), size=(16, 16)), image)
    torch.testing.assert_close(result[:, 1:-1, 1:-1], enlarged[:, 1:-1, 1:-1], rtol=0, atol=1e-5)
    doubled = apply(warp(scale(2, 2), size=(12, 12)), image)
    enlarged = torch.nn.functional.interpolate(
        image[None, :, 3:9, 3:9], size=(12, 12), mode="bilinear", align_corners=False
    )[0]
    torch.testing.assert_close(doubled[:, 1:-1, 1:-1], enlarged[:, 1:-1, 1:-1])


@pytest.mark.parametrize("padding", [0.5, 0.0, 0.25])
def test_pad_matches_torch_pad(padding: float) -> None:
    image = noise(2, 6, 8)
    result = apply(warp(pad(3), size=(12, 14), padding=padding), image)
    expected = torch.nn.functional.pad(image, (3, 3, 3, 3), value=padding)
    torch.testing.assert_close(result, expected)


def test_negative_pad_crops() -> None:
    image = noise(2, 9, 8)
    torch.testing.assert_close(apply(warp(pad(-2), size=(5, 4)), image), image[:, 2:-2, 2:-2])


def test_pads_add_up_in_any_order() -> None:
    image = noise(1, 8, 8)
    together = apply(warp(pad(2), shift(1, 0), pad(-1), size=(10, 10)), image)
    torch.testing.assert_close(together, apply(warp(shift(1, 0), pad(1), size=(10, 10)), image))


def test_steps_apply_to_the_image_in_order() -> None:
    image = noise(1, 9, 9)
    rotation, translation = rotate(choices=[90]), shift(2, 0)

    def rotated(x: Tensor) -> Tensor:
        return x.rot90(1, (1, 2))

    def translated(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, 2:], torch.full_like(x[:, :, :2], 0.5)], 2)

    rotation_first = apply(warp(rotation, translation, size=(9, 9)), image)
    translation_first = apply(warp(translation, rotation, size=(9, 9)), image)
    torch.testing.assert_close(rotation_first, translated(rotated(image)), rtol=0, atol=1e-5)
    torch.testing.assert_close(translation_first, rotated(translated(image)), rtol=0, atol=1e-5)
    assert not torch.allclose(rotation_first, translation_first, atol=0.1)


def test_warp_draws_the_product_of_the_step_matrices() -> None:
    steps = (jitter(2), scale(0.5, 2), rotate(40))
    key = random.key(8)
    numbers = random.uniform(key, (4,))
    parts = [step.matrix(u) for step, u in zip(steps, numbers.split([2, 1, 1]), strict=True)]
    expected = (parts[0].double() @ parts[1].double() @ parts[2].double()).float()
    torch.testing.assert_close(warp(*steps, size=(4, 4)).draw(key), expected)


@pytest.mark.parametrize("preset", TRANSFORMS)
@pytest.mark.parametrize(("image", "size"), [((9, 14), (9, 14)), ((12, 12), (7, 20)), ((40, 30), (8, 9))], ids=str)
def test_deterministic_sampling_matches_grid_sample(preset: str, image: tuple[int, int], size: tuple[int, int]) -> None:
    image = (max(image[0], 40), max(image[1], 40)) if preset in ("lucid", "published") else image
    pixels, weights = noise(3, *image), noise(3, *size)
    fast, deterministic = (
        named_transform(preset, image=image, size=size, deterministic=flag) for flag in (False, True)
    )

    def weighted_sum(transform: Transform, pixels: Tensor, seed: int) -> Tensor:
        return (apply(transform, pixels, seed) * weights).sum()

    for seed in range(3):
        torch.testing.assert_close(apply(deterministic, pixels, seed), apply(fast, pixels, seed), rtol=0, atol=1e-12)
        gradients = [
            torch.func.grad(weighted_sum, argnums=1)(transform, pixels, seed) for transform in (fast, deterministic)
        ]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)
        assert gradients[0].abs().max() > 0


def test_no_gradient_flows_to_the_matrix() -> None:
    matrix = torch.eye(3, requires_grad=True)
    image = noise(1, 4, 4).requires_grad_()
    warp(size=(4, 4)).apply(image, matrix).sum().backward()
    assert matrix.grad is None
    assert image.grad is not None


class TestDownsampling:
    """Images much larger than the output are filtered before they are sampled."""

    def test_preserves_a_constant(self) -> None:
        image = torch.full((2, 32, 40), 0.8)
        torch.testing.assert_close(apply(warp(size=(8, 10)), image)[:, 1:-1, 1:-1], torch.full((2, 6, 8), 0.8))

    @pytest.mark.parametrize("dim", [1, 2])
    def test_of_a_linear_ramp_is_the_mean_of_each_block(self, dim: int) -> None:
        ramp = torch.linspace(0, 1, 32, dtype=torch.float64)
        image = ramp[None, :, None].expand(1, 32, 32) if dim == 1 else ramp[None, None, :].expand(1, 32, 32)
        result = apply(warp(size=(8, 8)), image)
        blocks = torch.nn.functional.avg_pool2d(image[None], 4)[0]
        torch.testing.assert_close(result[:, 1:-1, 1:-1], blocks[:, 1:-1, 1:-1], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("factor", [2, 4])
    def test_does_not_alias_a_checkerboard(self, factor: int) -> None:
        side = 8 * factor
        image = ((torch.arange(side)[:, None] + torch.arange(side)) % 2).double()[None]
        for step in (shift(0, 0), shift(1, 0), shift(0.5, 0.5)):
            result = apply(warp(step, size=(8, 8)), image)
            assert (result[:, 1:-1, 1:-1] - 0.5).abs().max().item() < 0.02

    def test_matches_antialiased_interpolate(self) -> None:
        image = noise(2, 32, 24)
        expected = torch.nn.functional.interpolate(
            image[None], size=(8, 6), mode="bilinear", antialias=True, align_corners=False
        )[0]
        torch.testing.assert_close(apply(warp(size=(8, 6)), image), expected, rtol=0, atol=1e-6)

    def test_every_pixel_receives_a_gradient(self) -> None:
        image = noise(1, 30, 31).requires_grad_()
        apply(warp(size=(5, 4)), image).sum().backward()
        assert image.grad is not None
        assert (image.grad > 0).all()

    @pytest.mark.parametrize("size", [(16, 8), (8, 16)], ids=str)
    def test_of_one_axis_leaves_the_other_unchanged(self, size: tuple[int, int]) -> None:
        image = noise(1, 16, 16)
        expected = torch.nn.functional.interpolate(
            image[None], size=size, mode="bilinear", antialias=True, align_corners=False
        )[0]
        torch.testing.assert_close(apply(warp(size=size), image), expected, rtol=0, atol=1e-6)


def mean_gradient(transform: Transform, size: tuple[int, int], draws: int) -> Tensor:
    """Return the mean absolute gradient with respect to each pixel, over several draws: ``(h, w)``."""
    total = torch.zeros(size)
    for seed in range(draws):
        image = torch.full((1, *size), 0.7, requires_grad=True)
        apply(transform, image, seed).sum().backward()
        assert image.grad is not None
        total += image.grad[0].abs()
    return total / draws


def test_published_transform_crops_to_the_central_region() -> None:
    """196 of 224 pixels are visible. Rotations and shifts reach slightly further, but rarely to the border."""
    weight = mean_gradient(named_transform("published", image=(224, 224), size=(224, 224)), (224, 224), 40)
    exact = mean_gradient(warp(scale(256 / 224, 256 / 224), size=(224, 224)), (224, 224), 1)
    assert exact[:13].max() == exact[-13:].max() == exact[:, :13].max() == exact[:, -13:].max() == 0
    assert exact[15:-15, 15:-15].min() > 0
    assert weight[40:-40, 40:-40].min() > 0.9
    border = torch.cat([weight[0], weight[-1], weight[:, 0], weight[:, -1]])
    assert border.mean() < 0.1 * weight[112, 112]


def test_default_transform_covers_the_full_image() -> None:
    weight = mean_gradient(named_transform("default", image=(56, 56), size=(56, 56)), (56, 56), 60)
    assert weight.min() > 0
    border = torch.cat([weight[0], weight[-1], weight[:, 0], weight[:, -1]])
    assert border.mean() > 0.3 * weight[28, 28]


def test_transform_none_only_resizes() -> None:
    image = noise(3, 6, 8)
    torch.testing.assert_close(apply(named_transform("none", image=(6, 8), size=(6, 8)), image), image)


def decompose(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return factor, degrees and shift of similarity matrices."""
    factor = 1.0 / torch.linalg.det(matrices[:, :2, :2].double()).sqrt()
    degrees = torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]).double())
    return factor, degrees, matrices[:, :2, 2]


def test_published_magnitudes() -> None:
    """At 224 px: factors 0.95 to 1.05 (times 256 / 224), 5 degrees, shifts of 8 and 4 px."""
    factor, degrees, shifts = decompose(draw_many(named_transform("published", image=(224, 224), size=(224, 224))))
    base = 256 / 224
    assert base * 0.95 - 1e-5 < factor.min() < base * 0.955
    assert base * 1.045 < factor.max() < base * 1.05 + 1e-5
    assert 4.9 < degrees.max() < 5.001
    assert -5.001 < degrees.min() < -4.9
    # The second shift is rotated and scaled with the frame.
    assert 0.8 * 12 * base < shifts.abs().max() < 1.05 * 12 * base
    assert abs(shifts.mean().item()) < 0.5


def default_matrices(size: int, count: int = 400) -> Tensor:
    matrices, *_ = draw_many(named_transform("default", image=(size, size), size=(size, size)), count)
    return matrices


def test_default_magnitudes() -> None:
    """Boxes of 0.5 to 1.43 times the sides, 10 degrees, at any position that holds the image or is inside of it."""
    matrices = default_matrices(224)
    factor, degrees, _ = decompose(matrices)
    side = 0.965 / factor  # of the image's; the frame is that of the mean box
    assert 0.5 - 1e-5 < side.min() < 0.51
    assert 1.42 < side.max() < 1.43 + 1e-5
    assert 9.8 < degrees.max() < 10.001
    assert -10.001 < degrees.min() < -9.8
    position = matrices[:, :2, 3:].double().abs().sum(2)  # in fractions of the image's sides
    assert (position <= 0.5 * (1 - side).abs()[:, None] * 2**0.5 + 1e-4).all()
    assert position.max() > 0.22
    assert 0.95 * 24 < matrices[:, :2, 2].abs().max() <= 24


def test_default_shifts_scale_with_the_image_width() -> None:
    small, large = (default_matrices(size, 50) for size in (56, 224))
    torch.testing.assert_close(4 * small[:, :2, 2], large[:, :2, 2])


@pytest.mark.parametrize(
    ("std", "expected"), [((0.2, 0.3), 0.05), ((0.5,), 0.1), ((1.0, 2.0, 3.0), 0.1), ((1 / 255,), 0.04)]
)
def test_default_noise_is_in_the_units_of_the_normalised_input(std: tuple[float, ...], expected: float) -> None:
    transform = named_transform("default", image=(64, 64), size=(64, 64), std=std)
    image = torch.full((3, 64, 64), 0.5)  # nothing but noise changes it: the padding is 0.5, too
    changed = transform.apply(image, transform.draw(random.key(0))) - image
    assert changed.std().item() == pytest.approx(expected, rel=0.03)


def test_lucid_draws_only_its_listed_values() -> None:
    factor, degrees, shifts = decompose(draw_many(named_transform("lucid", image=(128, 128), size=(224, 224)), 3000))
    sizes = torch.tensor([0.9 + 0.02 * i for i in range(11)], dtype=torch.float64)
    assert torch.equal((factor[:, None] - sizes).abs().argmin(1).unique(), torch.arange(11))
    assert (factor[:, None] - sizes).abs().min(1).values.max() < 1e-5
    angles = torch.arange(-10, 11, dtype=torch.float64)
    assert (degrees[:, None] - angles).abs().min(1).values.max() < 1e-3
    counts = (degrees.round().long() + 10).bincount(minlength=21)
    # 26 entries, 6 of them zero; 5 standard errors of a binomial count.
    for angle, count in zip(range(-10, 11), counts.tolist(), strict=True):
        probability = 6 / 26 if angle == 0 else 1 / 26
        assert abs(count - 3000 * probability) < 5 * math.sqrt(3000 * probability * (1 - probability))
    assert shifts.abs().max() < 4 + 2 * 1.4 / 0.9


def test_lucid_frame_is_the_padded_image_minus_the_jitter_crops() -> None:
    """A padding of 12 px on each side minus jitter crops of 8 and 4 px in total widens the frame by 12 px."""
    image = torch.ones(1, 64, 64)
    result = named_transform("lucid", image=(64, 64), size=(76, 76)).apply(image, torch.eye(3))
    torch.testing.assert_close(result, torch.nn.functional.pad(image, (6, 6, 6, 6), value=0.5))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11, 26])
def test_choices_are_picked_with_equal_probability(count: int) -> None:
    """The largest uniform number below 1 picks the last choice."""
    step = scale(choices=[1.0 + i for i in range(count)])
    for u, expected in ((0.0, 1.0), (1 - 2.0**-24, float(count)), (0.5, 1.0 + count // 2)):
        assert 1 / step.matrix(torch.tensor([u]))[0, 0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("preset", [name for name in TRANSFORMS if name != "none"])
def test_each_key_draws_a_different_transform(preset: str) -> None:
    draws = tree_leaves(draw_many(named_transform(preset, image=(64, 64), size=(64, 64)), 100))
    assert len(draws) == {"maco": 3, "default": 3}.get(preset, 1)
    assert all(len(draw.unique(dim=0)) == 100 for draw in draws)


def test_normalize_matches_the_formula() -> None:
    image = noise(2, 3, 4)
    expected = torch.stack([(image[0] - 0.25) / 0.5, (image[1] - 0.5) / 4.0])
    torch.testing.assert_close(apply(normalize((0.25, 0.5), (0.5, 4.0)), image), expected)


def test_chain_applies_in_order_with_independent_keys() -> None:
    first, second = warp(jitter(3), size=(7, 7)), warp(jitter(3), size=(6, 5))
    transform = chain(first, normalize((0.5,), (0.1,)), second)
    image = noise(1, 8, 8)
    draws = transform.draw(random.key(1))
    keys = random.split(random.key(1), 3)
    assert torch.equal(draws[0], first.draw(keys[0]))
    assert torch.equal(draws[2], second.draw(keys[2]))
    assert not torch.equal(draws[0], draws[2])
    expected = second.apply((first.apply(image, draws[0]) - 0.5) / 0.1, draws[2])
    torch.testing.assert_close(transform.apply(image, draws), expected, rtol=1e-6, atol=1e-6)


def test_empty_chain_is_the_identity() -> None:
    image = noise(1, 2, 2)
    assert apply(chain(), image) is image


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jitter(-1), "jitter: pixels must be finite and at least 0, got -1"),
        (lambda: jitter(math.nan), "jitter: pixels must be finite and at least 0, got nan"),
        (lambda: scale(0, 1), "scale: factors must be above 0, got (0, 1)"),
        (lambda: scale(1.2, 0.8), "scale: bounds must be finite with low <= high, got low=1.2 and high=0.8"),
        (lambda: scale(choices=[1.0, -1.0]), "scale: factors must be above 0, got (1.0, -1.0)"),
        (lambda: scale(choices=[]), "scale: choices must be finite and at least one, got ()"),
        (lambda: rotate(-5), "rotate: degrees must be finite and at least 0, got -5"),
        (lambda: rotate(choices=[]), "rotate: choices must be finite and at least one, got ()"),
        (lambda: warp(size=(0, 4)), "warp: size must be at least 1 x 1 pixels, got 0 x 4"),
        (
            lambda: apply(warp(pad(-3), size=(4, 4)), noise(1, 6, 9)),
            "warp: the steps crop 6 pixels from an image of 6 x 9",
        ),
        (lambda: normalize((0.5,), (0.5, 0.5)), "normalize needs one mean and one std above 0 per channel"),
        (lambda: normalize((0.5,), (0.0,)), "normalize needs one mean and one std above 0 per channel"),
        (
            lambda: apply(normalize((0.5,), (0.5,)), noise(3, 2, 2)),
            "normalize expected an image with 1 channels, got 3",
        ),
        (
            lambda: named_transform("lucent", image=(8, 8), size=(8, 8)),
            "'lucent'; expected one of default, small, published, lucid, maco, none",
        ),
    ],
)
def test_invalid_arguments_raise_value_error(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_default_changes_brightness_and_contrast() -> None:
    """On an image that its noise hardly changes: half of it dark, half bright."""
    transform = named_transform("default", image=(64, 64), size=(64, 64), std=(1e-9,))
    image = torch.full((3, 64, 64), 0.5)
    means, ranges = [], []
    for number in range(300):
        image[:, :, :32], image[:, :, 32:] = 0.3, 0.7
        shown = transform.apply(image, transform.draw(random.key(number)))
        means.append(shown.mean().item())
        ranges.append((shown.quantile(0.95) - shown.quantile(0.05)).item())
    assert min(means) < 0.36
    assert max(means) > 0.64
    assert max(ranges) / min(ranges) > 2.5
