"""What a rendering records about how its images are shown: opacity and bands."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import featvis_func as fv
from featvis_func.models import Model
from featvis_func.rendering.api import render
from featvis_func.rendering.result import read_result
from featvis_func.types import Image

pytestmark = pytest.mark.usefixtures("cached_tracing")


def model_of(channels: int) -> Model:
    """A small CNN that takes any number of channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(channels)
        module = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU()).eval()
    return fv.load_model(module, size=16, mean=[0.0] * channels, std=[1.0] * channels)


def with_opacity(channels: int) -> Image:
    """An Image of the user's own with an opacity."""
    plain = fv.pixel(16, channels=channels + 1)
    return Image(plain.init, plain.decode)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_only_an_opacity_is_recorded_as_one(channels: int, tmp_path: Path) -> None:
    model = model_of(channels)
    plain = render(model, "0", [0], steps=1)
    assert "alpha" not in plain.config
    assert plain.grid().mode in ("L", "RGB")
    for image in ("alpha", with_opacity(channels)):
        result = render(model, "0", [0], steps=1, image=image)
        assert result.images.shape[1] == channels + 1
        assert result.config["alpha"] is True
        result.save(tmp_path)
        assert read_result(tmp_path).grid().mode == result.grid().mode == "RGBA"


def test_near_infrared_of_a_rendering_does_not_become_transparency() -> None:
    result = render(model_of(4), "0", [0], steps=1)
    shown = np.asarray(result.grid())[2:-2, 2:-2]
    expected = (result.images[0, :3] * 255).round().permute(1, 2, 0)
    np.testing.assert_array_equal(shown, expected.numpy())


def test_saliency_of_four_channels_becomes_their_opacity() -> None:
    result = render(model_of(4), "0", [0], steps=1, saliency=True).transparent()
    assert result.images.shape[1] == 5
    assert result.grid().mode == "RGBA"
    assert result.config["alpha"] is True


def test_bands_are_recorded_and_shown(tmp_path: Path) -> None:
    result = render(model_of(6), "0", [0], steps=1, bands=(3, 2, 1), snapshots=2)
    assert result.config["bands"] == [3, 2, 1]
    assert result.images.shape == (1, 6, 16, 16)
    result.save(tmp_path)
    read = read_result(tmp_path)
    assert torch.equal(read.images, result.images)
    expected = (result.images[0, [3, 2, 1]] * 255).round().permute(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(read.grid())[2:-2, 2:-2], expected.numpy())
    without = render(model_of(6), "0", [0], steps=1)
    assert torch.equal(without.images, result.images), "no image depends on what is shown of it"
    assert without.config["bands"] is None


@pytest.mark.parametrize(
    ("channels", "bands", "message"),
    [
        (6, (3, 2, 6), r"bands has channel 6, but the channels are 0 to 5; got \(3, 2, 6\)"),
        (1, (1,), "the channels are 0 only"),
        (6, (0, 1), r"bands must be 1 channel \(grey\) or 3"),
        (6, 3, "bands must be channel numbers such as"),
    ],
)
def test_bad_bands_raise_before_the_model_is_traced(
    channels: int, bands: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("traced")

    model = model_of(channels)
    monkeypatch.setattr("featvis_func.rendering.resolve.make_features", fail)
    with pytest.raises(ValueError, match=message):
        render(model, "0", [0], steps=1, bands=bands)


def test_an_opacity_is_no_band() -> None:
    with pytest.raises(ValueError, match="bands has channel 4, but the channels are 0 to 3"):
        render(model_of(4), "0", [0], steps=1, image="alpha", bands=(4,))


def test_bands_of_a_model_of_signals_raise(tiny: Model) -> None:
    with pytest.raises(ValueError, match=r"bands are channels of images and videos, got \(0,\) for signals"):
        render(tiny._replace(size=(20,)), "3", [0], steps=1, bands=(0,))
