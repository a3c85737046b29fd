"""The default dtype of the process, which a user may have set, does not change what the library computes."""

from collections.abc import Iterator

import pytest
import torch

import featvis_func as fv
from featvis_func import transform as t
from featvis_func.models import Model
from featvis_func.rendering.options import IMAGES, OPTIMIZERS, TRANSFORMS

pytestmark = pytest.mark.usefixtures("cached_tracing")


@pytest.fixture(params=[torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def other_default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    yield request.param
    torch.set_default_dtype(torch.float32)


CASES = [
    *({"image": name} for name in IMAGES),
    *({"transforms": name} for name in TRANSFORMS),
    *({"optimizer": name} for name in OPTIMIZERS),
    {"transforms": t.chain(t.warp(t.jitter(2), t.pad(3), t.rotate(5), size=(20, 20)), t.gaussian_blur((0.5, 1.0)))},
    {
        "transforms": t.chain(t.warp(size=(20, 20)), t.color_jitter(brightness=0.1), t.normal_noise(0.1)),
        "saliency": True,
    },
    {"size": 13, "snapshots": 3, "tolerance": 0.01},
]


@pytest.mark.parametrize("options", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.slow
def test_images_do_not_depend_on_the_default_dtype(tiny: Model, options: dict, other_default: torch.dtype) -> None:
    expected = fv.render(tiny, "5", [0, 3], steps=3, **options)
    torch.set_default_dtype(other_default)
    actual = fv.render(tiny, "5", [0, 3], steps=3, **options)
    torch.set_default_dtype(torch.float32)
    for name in ("images", "scores", "activations", "history"):
        assert getattr(actual, name).dtype == torch.float32
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def test_videos_and_signals_too(video_model: Model, signal_model: Model, other_default: torch.dtype) -> None:
    for model in (video_model, signal_model):
        torch.set_default_dtype(torch.float32)
        expected = fv.render(model, "2", [1], steps=2)
        torch.set_default_dtype(other_default)
        assert torch.equal(fv.render(model, "2", [1], steps=2).images, expected.images)
