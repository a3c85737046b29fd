"""Pictures of the documentation: one for each objective, parameterisation, transform and recipe, of SqueezeNet.

Needs its ImageNet weights (see ``benchmarks/evaluate.py``) and scikit-image, for its photograph of a cat.
"""

from collections.abc import Callable, Mapping
from importlib import import_module

import PIL.Image
import torch
from torch import Tensor

import featvis_func as fv
from benchmarks.common import RESULTS
from benchmarks.evaluate import IMAGENET_MEAN, IMAGENET_STD, load_squeezenet
from featvis_func import image as parameterisations
from featvis_func import objective as o
from featvis_func import transform as t
from featvis_func.io.pil import picture

SIZE = 128
UNIT, OTHER = 5, 27
MIDDLE, LATE, CLASSES = "features.7.expand3x3", "features.12.expand3x3", "classifier.1"
_QUALITY = 88


class Kit:
    """The model, traced once per set of layers, and the photograph that all pictures are made with."""

    def __init__(self) -> None:
        module = load_squeezenet()
        if module is None:
            raise SystemExit("the pictures need SqueezeNet's weights: set FEATVIS_WEIGHTS to their file")
        try:
            data = import_module("skimage.data")
        except ImportError as error:
            raise SystemExit("the pictures need scikit-image, for its photograph: pip install scikit-image") from error
        self.model = fv.load_model(module, size=SIZE, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        cat = torch.from_numpy(data.chelsea()).movedim(-1, 0).float() / 255
        square = cat[:, :, (cat.shape[2] - cat.shape[1]) // 2 :][:, :, : cat.shape[1]]
        self.cat = torch.nn.functional.interpolate(square[None], size=(SIZE, SIZE), mode="bilinear", antialias=True)[0]
        self.cat = self.cat.clamp(0, 1)
        self._features: dict[tuple[str, ...], fv.Features] = {}

    def features(self, layers: tuple[str, ...]) -> fv.Features:
        """Return the model truncated behind these layers."""
        if layers not in self._features:
            self._features[layers] = fv.make_features(self.model, layers)
        return self._features[layers]

    def activations(self, layer: str) -> dict[str, Tensor]:
        """Return the activations of a layer for the photograph."""
        return fv.activations_of(self.model, [layer], self.cat, features=self.features((layer,)))

    def render(self, objective: fv.Objective, filters: object = None, **options: object) -> Tensor:
        """Render images ``(n, c, h, w)``."""
        settings = {
            "steps": 48,
            "compile": False,
            "features": self.features(objective.layers),
            "retain_memory": True,
            **options,
        }
        return fv.render(self.model, objective, filters, **settings).images  # type: ignore[arg-type]

    def warp(self, *steps: t.Affine) -> fv.Transform:
        """Compose geometric transforms into one, to the model's input size."""
        return t.warp(*steps, size=(SIZE, SIZE))


Picture = Callable[[Kit], Tensor]


def of_unit(**options: object) -> Picture:
    """Picture of the unit, with other options."""
    return lambda kit: kit.render(fv.channel(LATE, UNIT), **options)


def with_transform(make: Callable[[Kit], fv.Transform]) -> Picture:
    """Picture of the unit, with another random transform."""
    return lambda kit: kit.render(fv.channel(LATE, UNIT), transforms=make(kit))


OBJECTIVES: Mapping[str, Picture] = {
    "channel": of_unit(),
    "neuron": lambda kit: kit.render(fv.neuron(LATE, UNIT)),
    "region": lambda kit: kit.render(o.region(LATE, UNIT, columns=(0.0, 0.5))),
    "logit": lambda kit: kit.render(o.logit(CLASSES, 985), steps=96),
    "layer": lambda kit: kit.render(fv.layer(LATE), transforms="small"),
    "deepdream": lambda kit: kit.render(
        o.deepdream(MIDDLE), image=parameterisations.from_image(fv.fourier(SIZE), kit.cat), lr=2 / 48
    ),
    "direction": lambda kit: kit.render(o.direction(LATE, _two_units(kit), similarity="dot_cosine")),
    "direction_neuron": lambda kit: kit.render(o.direction_neuron(LATE, _two_units(kit))),
    "channel_weights": lambda kit: kit.render(o.channel_weights(LATE, _two_units(kit) - 0.1)),
    "inversion": lambda kit: kit.render(
        o.inversion(kit.activations(MIDDLE)) - 0.2 * o.total_variation(), transforms="none", steps=192
    ),
    "activation_difference": lambda kit: kit.render(
        -o.activation_difference(kit.activations("features.3.expand3x3")), transforms="none", steps=192
    ),
    "caricature": lambda kit: kit.render(o.caricature(kit.activations(LATE)), steps=96),
    "style": lambda kit: kit.render(o.style(kit.activations("features.3.expand3x3")), steps=192),
    "departure": lambda kit: (
        fv.accentuate(kit.model, fv.channel(LATE, UNIT), kit.cat, near=MIDDLE, compile=False).images
    ),
    "total_variation": lambda kit: kit.render(fv.channel(LATE, UNIT) - 1500.0 * o.total_variation()),
    "l1": lambda kit: kit.render(fv.channel(LATE, UNIT) - 500.0 * o.l1()),
    "l2": lambda kit: kit.render(fv.channel(LATE, UNIT) - 500.0 * o.l2()),
    "blur": lambda kit: kit.render(fv.channel(LATE, UNIT) - 30000.0 * o.blur()),
    "boundary_complexity": lambda kit: kit.render(fv.channel(LATE, UNIT) - 1500.0 * o.boundary_complexity(16)),
}

IMAGES: Mapping[str, Picture] = {
    "fourier": of_unit(),
    "pixel": of_unit(image="pixel"),
    "phase": of_unit(image="phase"),
    "laplacian_pyramid": of_unit(image="laplacian_pyramid"),
    "cppn": of_unit(image="cppn", steps=192),
    "alpha": lambda kit: kit.render(fv.neuron(LATE, UNIT), image=parameterisations.alpha(SIZE), steps=96),
    "from_image": lambda kit: kit.render(
        fv.channel(LATE, UNIT), image=parameterisations.from_image(fv.fourier(SIZE), kit.cat), lr=2 / 48
    ),
}

TRANSFORMS: Mapping[str, Picture] = {
    "jitter": with_transform(lambda kit: kit.warp(t.jitter(8))),
    "scale": with_transform(lambda kit: kit.warp(t.scale(0.8, 1.2))),
    "rotate": with_transform(lambda kit: kit.warp(t.rotate(15))),
    "flip": with_transform(lambda kit: kit.warp(t.flip())),
    "pad": with_transform(lambda kit: kit.warp(t.pad(12), t.jitter(8))),
    "crop": with_transform(lambda kit: kit.warp(t.crop(96))),
    "crop_or_pad": with_transform(lambda kit: kit.warp(t.crop_or_pad(96))),
    "box_crop": with_transform(lambda kit: t.multiview(kit.warp(t.box_crop(0.4, 0.9, normal=None, centre_sd=None)), 4)),
    "gaussian_blur": with_transform(lambda kit: t.chain(kit.warp(t.jitter(4)), t.gaussian_blur((0.5, 2.0)))),
    "color_jitter": with_transform(
        lambda kit: t.chain(
            kit.warp(t.jitter(4)), t.color_jitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)
        )
    ),
    "normal_noise": with_transform(lambda kit: t.chain(kit.warp(t.jitter(4)), t.normal_noise(0.1))),
    "uniform_noise": with_transform(lambda kit: t.chain(kit.warp(t.jitter(4)), t.uniform_noise(0.2))),
    "roll": with_transform(lambda kit: t.roll(16)),
    "none": of_unit(transforms="none"),
}

RECIPES: Mapping[str, Picture] = {
    "diversity": lambda kit: kit.render(fv.channel(LATE, UNIT) - 1000.0 * o.diversity(LATE), range(4), steps=64),
    "interpolate": lambda kit: kit.render(
        o.interpolate(fv.channel(LATE, UNIT), fv.channel(LATE, OTHER), count=5) + 400.0 * o.alignment(MIDDLE),
        image=parameterisations.shared(
            parameterisations.fourier_canvas(SIZE), parameterisations.pyramid_canvas(SIZE, first=1)
        ),
        steps=64,
    ),
    "maco": lambda kit: kit.render(
        fv.channel(LATE),
        [UNIT, OTHER, 97, 200],
        image="phase",
        transforms=t.chain(
            t.multiview(kit.warp(t.box_crop(0.3, 0.9, normal=None, centre_sd=None)), 8),
            t.normal_noise(0.04),
            t.uniform_noise(0.02),
        ),
        steps=96,
    ),
    "accentuate": lambda kit: _accentuated(kit),
    "inversion": lambda kit: torch.cat(
        [kit.cat[None]]
        + [
            kit.render(o.inversion(kit.activations(layer)) - 0.2 * o.total_variation(), transforms="none", steps=192)
            for layer in ("features.3.expand3x3", MIDDLE, LATE)
        ]
    ),
}


def _accentuated(kit: Kit) -> Tensor:
    """The photograph, the accentuated photograph, and the same faded to white where saliency is low."""
    result = fv.accentuate(kit.model, fv.channel(LATE, UNIT), kit.cat, near=MIDDLE, compile=False)
    faded = result.transparent().images
    return torch.cat([kit.cat[None], result.images, faded[:, :3] * faded[:, 3:] + 1 - faded[:, 3:]])


def _two_units(kit: Kit) -> Tensor:
    """The sum of the unit vectors of two channels."""
    vector = torch.zeros(kit.features((LATE,)).shapes[LATE][0])
    vector[[UNIT, OTHER]] = 1.0
    return vector


def row(images: Tensor) -> PIL.Image.Image:
    """Arrange images ``(n, c, h, w)`` in a row, on a white background where they are transparent."""
    if images.shape[1] == 4:
        images = images[:, :3] * images[:, 3:] + (1 - images[:, 3:])
    return picture(torch.cat(list(images), dim=-1))


def main(device: str, rounds: int) -> None:
    """Render all pictures and write them to ``results/pictures``. Nothing is timed: ``rounds`` has no effect."""
    kit = Kit()
    folder = RESULTS / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, group in (("objective", OBJECTIVES), ("image", IMAGES), ("transform", TRANSFORMS), ("recipe", RECIPES)):
        for name, make in group.items():
            row(make(kit)).save(folder / f"{kind}-{name}.webp", quality=_QUALITY)
            print(f"{kind}-{name}", flush=True)
