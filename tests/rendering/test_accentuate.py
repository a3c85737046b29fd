"""Accentuation: it starts from a picture, stays near it at a chosen layer, and returns the saliency."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import featvis_func as fv
from featvis_func.image import fourier
from featvis_func.io.image_files import read_image
from featvis_func.io.pil import picture as as_picture
from featvis_func.rendering.activations import activations_of
from tests.toys import load_toy

# The photograph has another aspect ratio than the model's input.
pytestmark = [
    pytest.mark.usefixtures("cached_tracing"),
    pytest.mark.filterwarnings("ignore:images of .* are stretched"),
]


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """Smooth coloured stripes and a disc, 48 x 64."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1.3, 1.3, 64), indexing="ij")
    disc = torch.sigmoid(20 * (0.5 - (x**2 + y**2).sqrt()))
    stripes = 0.5 + 0.3 * torch.sin(9 * x + torch.tensor([0.0, 1.0, 2.0])[:, None, None])
    return 0.8 * stripes * (1 - disc) + 0.9 * disc * torch.tensor([0.9, 0.4, 0.2])[:, None, None]


def accentuated(photograph: Tensor | str | Path, **options: Any) -> fv.Result:
    settings = {"near": "block2.conv", "steps": 12, "size": (48, 64), **options}
    return fv.accentuate("texturenet", "block4.conv:3-4", photograph, **settings)


@pytest.mark.slow
def test_activation_rises_and_strength_keeps_the_near_layer(photograph: Tensor) -> None:
    model = fv.load_model("texturenet")
    free, restrained = accentuated(photograph, strength=0.0), accentuated(photograph, strength=2.0)
    layers = ["block4.conv", "block2.conv"]
    before = activations_of(model, layers, photograph)

    def gain(result: fv.Result, row: int) -> float:
        after = activations_of(model, layers, result.images[row])
        return float((after["block4.conv"] - before["block4.conv"])[result.filters[row]].mean())

    def distance(result: fv.Result, row: int) -> float:
        after = activations_of(model, layers, result.images[row])["block2.conv"]
        return float((after - before["block2.conv"]).norm() / before["block2.conv"].norm())

    for row in (0, 1):
        assert gain(free, row) > gain(restrained, row) > 0
        assert distance(restrained, row) < 0.7 * distance(free, row)


@pytest.mark.slow
def test_first_image_of_every_filter_is_the_picture(photograph: Tensor) -> None:
    result = accentuated(photograph, steps=1)
    torch.testing.assert_close(result.images, photograph.expand(2, -1, -1, -1), rtol=0, atol=2e-3)
    assert result.filters == (3, 4)
    assert "departure('block2.conv', <picture>)" in result.config["objective"]


@pytest.mark.slow
def test_picture_file_is_cropped_to_the_size(photograph: Tensor, tmp_path: Path) -> None:
    as_picture(photograph).save(tmp_path / "photograph.png")
    from_file = accentuated(tmp_path / "photograph.png", steps=1)
    torch.testing.assert_close(from_file.images[0], photograph, rtol=0, atol=5e-3)
    square = read_image(tmp_path / "photograph.png", 48)
    torch.testing.assert_close(square, photograph[:, :, 8:56], rtol=0, atol=5e-3)
    assert read_image(tmp_path / "photograph.png", 12, channels=1).shape == (1, 12, 12)


@pytest.mark.slow
def test_saliency_becomes_the_opacity(photograph: Tensor, tmp_path: Path) -> None:
    result = accentuated(photograph, steps=4)
    assert result.saliency is not None
    with_opacity = result.transparent()
    assert with_opacity.images.shape == (2, 4, 48, 64)
    assert torch.equal(with_opacity.images[:, :3], result.images)
    opacity = with_opacity.images[:, 3]
    assert 0.0 <= float(opacity.min()) < 0.9
    assert torch.isclose((opacity == 1.0).float().mean(), torch.tensor(0.1), atol=0.03)
    with_opacity.save(tmp_path)
    assert np.asarray(PIL.Image.open(tmp_path / "filter-0003.png")).shape == (48, 64, 4)
    with pytest.raises(ValueError, match="no saliency; render with saliency=True"):
        fv.render("texturenet", "head:3", steps=1, size=16).transparent()
    with pytest.raises(ValueError, match="percentile must be above 0"):
        result.transparent(percentile=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"near": "block9.conv"}, "no layer 'block9.conv'"),
        ({"strength": -1.0}, "strength must be finite and at least 0, got -1"),
        ({"image": "cppn"}, "cannot start from a picture"),
        ({"image": "oil"}, "unknown image 'oil'; expected one of fourier, pixel"),
        ({"image": fourier(16)}, r"the picture has shape \(3, 48, 64\), the image \(3, 16, 16\)"),
        ({"photograph": torch.rand(1, 48, 64)}, r"expected a picture \(3, h, w\) of floats .*got \(1, 48, 64\)"),
        ({"photograph": "missing.png"}, "missing.png cannot be read as an image"),
    ],
)
def test_bad_input_raises(photograph: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accentuated(**{"photograph": photograph, **options})


def test_accentuate_a_model_without_weights() -> None:
    module = torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.ReLU())
    model = load_toy(module, size=8)
    result = fv.accentuate(model, "1:2", torch.rand(3, 8, 8), near="0", steps=2)
    assert result.filters == (2,)
    assert {*result.status} <= {"ok", "flat"}  # the photograph may be the best of two steps
