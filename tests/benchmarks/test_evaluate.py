"""The evaluator computes its documented formula."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evaluate import (
    FIXED_TRANSFORMS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    evaluate,
    fixed_transform,
    load_squeezenet,
)
from featvis_func.models import Model
from tests.benchmarks.models import tiny_cnn


@pytest.mark.parametrize("inplace", [False, True])
def test_evaluator_matches_the_plain_formula(inplace: bool) -> None:
    model, filters = tiny_cnn(inplace=inplace), [1, 6]
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    images[0, 0] = 0.0  # a third of the first image is saturated, and 4% of the rest

    def by_hand(batch: Tensor) -> Tensor:
        with torch.no_grad():
            normalised = (batch - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
            maps = model[2](model[1](model[0](normalised)))
        return torch.stack([maps[i, channel].clamp(min=0).mean() for i, channel in enumerate(filters)])

    score = evaluate(images, model, "2", filters)
    torch.testing.assert_close(score.plain_per_filter, by_hand(images))
    assert score.plain == pytest.approx(by_hand(images).mean().item(), rel=1e-5)
    robust = sum((by_hand(fixed_transform(images, *values)) for values in FIXED_TRANSFORMS), torch.zeros(2)) / 8
    torch.testing.assert_close(score.robust_per_filter, robust)
    assert score.saturation_per_filter.tolist() == pytest.approx([1 / 3 + 2 / 3 * 0.04, 0.04], abs=0.003)
    assert not model[2]._forward_hooks


def test_evaluator_resizes_to_the_input_size() -> None:
    model = tiny_cnn()
    small = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    large = F.interpolate(small, (224, 224), mode="bilinear", antialias=True)
    assert evaluate(small, model, "2", [0]).plain == evaluate(large, model, "2", [0]).plain


def test_evaluator_scales_its_shifts_to_other_input_sizes(texturenet: Model) -> None:
    model, filters = texturenet.module, [1, 6]
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (texturenet.mean, texturenet.std))

    def by_hand(batch: Tensor) -> Tensor:
        with torch.no_grad():
            maps = model.get_submodule("block2.conv")(model.get_submodule("block1")((batch - mean) / std))
        return torch.stack([maps[i, channel].clamp(min=0).mean() for i, channel in enumerate(filters)])

    expected = {"input_size": 96, "mean": texturenet.mean, "std": texturenet.std}
    score = evaluate(images, model, "block2.conv", filters, **expected)
    torch.testing.assert_close(score.plain_per_filter, by_hand(images))
    scaled = [(degrees, scale, right * 96 / 224, down * 96 / 224) for degrees, scale, right, down in FIXED_TRANSFORMS]
    robust = sum((by_hand(fixed_transform(images, *values)) for values in scaled), torch.zeros(2)) / 8
    torch.testing.assert_close(score.robust_per_filter, robust)
    large = F.interpolate(images, (150, 150), mode="bilinear", antialias=True)
    small = F.interpolate(large, (96, 96), mode="bilinear", antialias=True)
    resized = (evaluate(i, model, "block2.conv", filters, **expected) for i in (large, small))
    assert len({score.plain for score in resized}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 0}, "input_size 0"),
        ({"mean": (0.5,) * 4}, "three numbers each"),
        ({"std": (1.0, -1.0, 1.0)}, "std above 0"),
    ],
)
def test_evaluator_rejects_an_invalid_input_size_or_normalisation(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(torch.zeros(1, 3, 224, 224), tiny_cnn(), "2", [0], **arguments)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("images", "layer", "message"),
    [
        (torch.full((1, 3, 224, 224), 1.1), "2", r"expected \[0, 1\]"),
        (torch.full((1, 3, 224, 224), float("nan")), "2", r"expected \[0, 1\]"),
        (torch.zeros(2, 3, 224, 224), "2", "one image per filter"),
        (torch.zeros(1, 1, 224, 224), "2", "one image per filter"),
        (torch.zeros(1, 3, 224, 224), "conv", "the model has"),
    ],
)
def test_evaluator_rejects_invalid_images_and_layers(images: Tensor, layer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(images, tiny_cnn(), layer, [0])


def test_fixed_transform_has_the_documented_directions() -> None:
    image = torch.full((1, 1, 41, 61), 0.5)
    image[0, 0, 20, 40] = 1.0  # 10 px to the right of the centre (20, 30)

    def peak(degrees: float, scale: float, right: float, down: float) -> tuple[int, int]:
        flat = int(fixed_transform(image, degrees, scale, right, down).argmax())
        return flat // 61, flat % 61

    assert peak(0, 1, 0, 0) == (20, 40)
    assert peak(0, 1, 3, 5) == (25, 43)
    assert peak(90, 1, 0, 0) == (10, 30)  # counter-clockwise: up
    assert peak(90, 1, 3, 5) == (15, 33)  # rotated first, then shifted
    assert peak(0, 2, 0, 0) == (20, 50)
    torch.testing.assert_close(fixed_transform(image, 0, 1, 0, 0), image)
    shifted = fixed_transform(torch.ones(1, 1, 20, 20), 0, 1, 4, 0)
    torch.testing.assert_close(shifted[..., :4], torch.full((1, 1, 20, 4), 0.5))


def test_load_squeezenet_returns_none_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_squeezenet(tmp_path) is None
    assert load_squeezenet(tmp_path / "weights.safetensors") is None
    monkeypatch.setenv("FEATVIS_WEIGHTS", str(tmp_path))
    assert load_squeezenet() is None
