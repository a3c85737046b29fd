"""How a model's input is normalised: what presets and modules say, what is assumed and said, value ranges."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import Normalize, v2
from torchvision.transforms._presets import ImageClassification, ObjectDetection, OpticalFlow, VideoClassification

import featvis_func as fv
from featvis_func.models import IMAGENET_MEAN, IMAGENET_STD, Model, load_model
from featvis_func.models.normalisation import normalises_itself
from featvis_func.models.torchvision import Preset, read_transform
from tests.toys import make_tiny

HALF = (0.5, 0.5, 0.5)
ZERO, ONE = (0.0,) * 3, (1.0,) * 3


def quietly(make: Callable[[], Model]) -> Model:
    """Load a model, with warnings as errors, whatever the filters of the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make()


# --- presets of torchvision -----------------------------------------------------------------------------------------


def dimmed(image: Tensor) -> Tensor:
    return (image / 2 - 0.25) / 0.5


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (ImageClassification(crop_size=24, resize_size=28), Preset(IMAGENET_MEAN, IMAGENET_STD)),
        (
            ImageClassification(crop_size=24, resize_size=28, mean=(0.1, 0.2, 0.3)),
            Preset((0.1, 0.2, 0.3), IMAGENET_STD),
        ),
        (ObjectDetection(), Preset(ZERO, ONE)),
        (OpticalFlow(), Preset(HALF, HALF, 2)),
        (
            VideoClassification(crop_size=(24, 24), resize_size=(28,), mean=HALF, std=(0.1, 0.2, 0.3)),
            Preset(HALF, (0.1, 0.2, 0.3), video=True),
        ),
        (dimmed, Preset(HALF, ONE)),
        (lambda image: 255 * image, Preset(ZERO, (round(1 / 255, 6),) * 3)),
        (lambda image: image.clamp(0, 0.75), None),  # not linear
        (lambda image: 1 - image, None),  # a negative
        (lambda image: image[:1], None),
        (lambda: None, None),
    ],
)
def test_transforms_are_read_by_what_they_do(transform: Any, expected: Preset | None) -> None:
    assert read_transform(transform) == expected


def test_what_a_transform_does_counts_more_than_its_attributes() -> None:
    class Preprocessing(nn.Module):
        mean, std = HALF, HALF

        def forward(self, image: Tensor) -> Tensor:
            return image

    assert read_transform(Preprocessing()) == Preset(ZERO, ONE)
    assert read_transform(type("Stated", (), {"mean": HALF, "std": HALF})) == Preset(HALF, HALF)  # cannot be applied


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mean", "std", "size", "assumed"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", ZERO, ONE, (224, 224), ("size",)),
        ("retinanet_resnet50_fpn", ZERO, ONE, (224, 224), ("size",)),
        ("fcn_resnet50", IMAGENET_MEAN, IMAGENET_STD, (224, 224), ("size",)),
        ("r3d_18", (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989), (16, 112, 112), ()),
        ("s3d", (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989), (16, 224, 224), ()),
        ("mvit_v1_b", (0.45,) * 3, (0.225,) * 3, (16, 224, 224), ()),
        ("swin3d_t", IMAGENET_MEAN, IMAGENET_STD, (16, 224, 224), ()),
        ("efficientnet_v2_s", IMAGENET_MEAN, IMAGENET_STD, (384, 384), ()),
    ],
)
def test_all_kinds_of_torchvision_models_are_normalised_as_their_presets_say(
    name: str, mean: Any, std: Any, size: Any, assumed: Any
) -> None:
    model = quietly(lambda: load_model(f"torchvision:{name}@none"))
    assert (model.mean, model.std, model.size, model.assumed) == (mean, std, size, assumed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r3d_18", "mvit_v1_b", "s3d"])
def test_video_models_run_on_their_size(name: str) -> None:
    model = load_model(f"torchvision:{name}@none")
    with torch.no_grad():
        assert model.module(torch.zeros(1, model.channels, *model.size)).shape == (1, 400)


def test_torchvision_models_with_an_unknown_preset_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(weights), "transforms", property(lambda self: lambda: object()))
    with pytest.warns(UserWarning, match=r"torchvision:squeezenet1_1@none does not say how its input is normalised"):
        model = load_model("torchvision:squeezenet1_1@none")
    assert (model.mean, model.assumed) == (IMAGENET_MEAN, ("size", "normalisation"))
    stated = quietly(lambda: load_model("torchvision:squeezenet1_1@none", value_range=(0, 1), size=64))
    assert (stated.mean, stated.std, stated.assumed) == (ZERO, ONE, ())


# --- modules that normalise -----------------------------------------------------------------------------------------


class Holds(nn.Module):
    """A module with attributes."""

    def __init__(self, *, buffers: bool = False, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            self.register_buffer(name, value) if buffers else setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return x


PER_CHANNEL = torch.tensor([0.1, 0.2, 0.3])
NORMALISERS: dict[str, Callable[[], nn.Module]] = {
    "transforms.Normalize": lambda: Normalize(HALF, HALF),
    "torchvision's detectors": lambda: GeneralizedRCNNTransform(320, 320, list(HALF), list(HALF)),
    "v2.Normalize": lambda: v2.Normalize(list(HALF), list(HALF)),
    "buffers": lambda: Holds(buffers=True, mean=PER_CHANNEL.view(3, 1, 1), std=PER_CHANNEL.view(1, 3, 1, 1)),
    "tensors": lambda: Holds(pixel_mean=PER_CHANNEL, pixel_std=PER_CHANNEL),
    "lists": lambda: Holds(image_mean=list(HALF), image_std=HALF),
    "frozen parameters": lambda: Holds(
        mean=nn.Parameter(PER_CHANNEL, requires_grad=False), std=nn.Parameter(PER_CHANNEL, requires_grad=False)
    ),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "another number of channels": lambda: Holds(mean=[0.5], std=[0.5]),
    "numbers, as of a noise": lambda: Holds(mean=0.0, std=1.0),
    "half": lambda: Holds(mean=HALF),
    "two conventions": lambda: Holds(mean=HALF, image_std=HALF),
    "parameters that are trained": lambda: Holds(mean=nn.Parameter(PER_CHANNEL), std=nn.Parameter(PER_CHANNEL)),
    "a norm layer": lambda: nn.BatchNorm2d(3),
    "maps": lambda: Holds(mean=torch.zeros(3, 4), std=torch.ones(3, 4)),
    "methods": lambda: type("Distribution", (Holds,), {"mean": lambda self: 0, "std": lambda self: 1})(),
    "a property that fails": lambda: type("Lazy", (Holds,), {"mean": property(lambda self: 1 / 0)})(),
}


@pytest.mark.parametrize("kind", NORMALISERS)
@pytest.mark.parametrize("place", ["root", "deep inside"])
def test_modules_that_normalise_take_images_as_they_are(kind: str, place: str) -> None:
    module = NORMALISERS[kind]()
    if place == "root":
        module.add_module("net", make_tiny())
    else:
        module = nn.Sequential(nn.Sequential(module), make_tiny())
    model = quietly(lambda: load_model(module, size=20))
    assert (model.mean, model.std) == (ZERO, ONE)
    assert "normalisation" not in model.assumed


@pytest.mark.parametrize("kind", OTHERS)
def test_other_modules_do_not_normalise(kind: str) -> None:
    assert not normalises_itself(nn.Sequential(OTHERS[kind](), make_tiny()), 3)


# --- warnings -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        lambda: load_model(make_tiny()),
        lambda: fv.render(make_tiny(), "5", [0], steps=1, size=20, progress=False),
        lambda: fv.make_renderer(make_tiny(), "5", [0], steps=1, size=20),
        lambda: fv.top_examples(make_tiny(), "5", []),
    ],
    ids=["load_model", "render", "make_renderer", "top_examples"],
)
def test_an_assumed_normalisation_is_said_once_and_at_the_line_of_the_caller(call: Callable[[], Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(ValueError):  # there are no photographs
            call()
    caught = [w for w in caught if "normalised" in str(w.message)]
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, call.__code__.co_firstlineno)]


# --- value ranges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "reference"),
    [
        ({"value_range": (-1, 1)}, lambda x: 2 * x - 1),
        ({"value_range": (0, 255)}, lambda x: 255 * x),
        (
            {"value_range": (0, 255), "mean": (123.68, 116.78, 103.94), "std": (1, 1, 1)},
            lambda x: 255 * x - torch.tensor([123.68, 116.78, 103.94]).view(3, 1, 1),
        ),
        (
            {"value_range": (0, 255), "mean": (128, 127, 126)},
            lambda x: 255 * x - torch.tensor([128, 127, 126]).view(3, 1, 1),
        ),
        ({"value_range": (-2.0, 6.0), "std": (2, 4, 8)}, lambda x: (8 * x - 2) / torch.tensor([2, 4, 8]).view(3, 1, 1)),
        (
            {"value_range": (-1, 1), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
            lambda x: (
                (2 * x - 1 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
            ),
        ),
    ],
)
def test_value_range_is_folded_into_the_normalisation(given: Any, reference: Callable[[Tensor], Tensor]) -> None:
    model = quietly(lambda: load_model(make_tiny(), size=20, **given))
    assert model.assumed == ()
    image = torch.rand(3, 5, 5)
    normalised = (image - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1)
    torch.testing.assert_close(normalised, reference(image), rtol=1e-5, atol=1e-4)


def test_value_range_replaces_the_normalisation_of_a_preset() -> None:
    assert load_model("texturenet", value_range=(0, 1))[2:4] == (ZERO, ONE)


def test_value_range_counts_the_channels_of_the_module() -> None:
    model = quietly(lambda: load_model(nn.Sequential(nn.Conv2d(5, 4, 3)), value_range=(-1, 1), size=8))
    assert (model.mean, model.std) == ((0.5,) * 5, (0.5,) * 5)


def test_named_models_with_presets_assume_nothing(texturenet: Model) -> None:
    assert texturenet.assumed == ()
    assert quietly(lambda: load_model("torchvision:squeezenet1_1@none")).assumed == ()
