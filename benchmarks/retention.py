"""Retention: how much of a unit's activation survives what does not change a picture for people?

Hidden units have no counterpart in another network, so that nothing can recognise their images. Instead the images are
damaged as photographs often are: JPEG of quality 50, a Gaussian blur of 1.5 px, half resolution and back, and four bits
a channel. Retention is the unit's activation afterwards, relative to that before; the mean of the four is compared with
the published script's images, and with that of the photographs which excite the same units most (scikit-image's, if
it is installed, or those of the folder FEATVIS_PHOTOGRAPHS).
"""

import io
import os
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

import featvis_func as fv
from benchmarks.common import RESULTS, contact_sheet, report
from benchmarks.evaluate import filter_means
from benchmarks.reference import reference
from benchmarks.transfer import NETWORKS, SCRIPT_STEPS, load, spectrum
from featvis_func.transform import gaussian_blur

LAYERS = {
    "squeezenet": ("features.4.expand3x3", "features.9.expand3x3", "features.12.expand1x1"),
    "lite0": ("blocks.2.1.conv_pwl", "blocks.4.1.conv_dw", "blocks.5.2.conv_dw"),
    "texturenet": ("block4.conv", "block6.conv"),
}
FILTERS = tuple(range(8))
CROPS = 6  # of each photograph, along its diagonal


class Row(NamedTuple):
    """Medians over the filters of a layer."""

    layer: str
    made_by: str
    activation: float
    jpeg: float
    blur: float
    half: float
    four_bits: float
    mean: float
    """Median of the mean of the four."""
    grain: float
    dead: int
    """Number of images whose activation is not above 0."""


def damages() -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> a function of images ``(n, 3, h, w)`` in ``[0, 1]``."""
    blur = gaussian_blur(1.5)

    def half(images: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        small = F.interpolate(images, (h // 2, w // 2), mode="bilinear", antialias=True)
        return F.interpolate(small, (h, w), mode="bilinear")

    return {
        "jpeg": lambda images: torch.stack([jpeg(image) for image in images]),
        "blur": lambda images: blur.apply(images, blur.draw(torch.tensor([0, 0]))),
        "half": half,
        "four_bits": lambda images: (images * 15).round() / 15,
    }


def jpeg(image: Tensor, *, quality: int = 50) -> Tensor:
    """Compress and decompress ``(3, h, w)`` in ``[0, 1]``."""
    picture = PIL.Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=quality)
    return torch.from_numpy(np.array(PIL.Image.open(buffer))).permute(2, 0, 1).float() / 255


def photographs(size: int) -> Tensor | None:
    """Square crops of photographs ``(n, 3, size, size)``; ``None`` if there are none."""
    folder = os.environ.get("FEATVIS_PHOTOGRAPHS")
    if folder:
        files = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        pictures = [np.array(PIL.Image.open(file).convert("RGB")) for file in files]
    elif find_spec("skimage") is not None:
        from skimage import data  # type: ignore[import-not-found]

        pictures = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    else:
        return None
    crops = []
    for picture in pictures:
        image = torch.from_numpy(picture[..., :3].copy()).permute(2, 0, 1)[None].float() / 255
        scale = 1.5 * size / min(image.shape[-2:])
        image = F.interpolate(image, scale_factor=scale, mode="bilinear", antialias=True).clamp(0, 1)[0]
        h, w = image.shape[-2:]
        for i in range(CROPS):
            top, left = (round((side - size) * i / (CROPS - 1)) for side in (h, w))
            crops.append(image[:, top : top + size, left : left + size])
    return torch.stack(crops)


def retention(model: fv.Model, layer: str, made_by: str, images: Tensor, filters: tuple[int, ...]) -> Row:
    """Score images, one per filter, before and after each damage."""

    def score(batch: Tensor) -> Tensor:
        return filter_means(batch, model.module, layer, filters, mean=model.mean, std=model.std)

    before = score(images)
    kept = {name: score(damage(images)) / before.clamp_min(1e-12) for name, damage in damages().items()}
    alive = before > 0
    medians = {name: statistics.median(values[alive].tolist() or [0.0]) for name, values in kept.items()}
    mean = torch.stack(list(kept.values())).mean(0)
    return Row(
        layer=layer,
        made_by=made_by,
        activation=before.median().item(),
        **medians,
        mean=statistics.median(mean[alive].tolist() or [0.0]),
        grain=spectrum(images)[0],
        dead=int((~alive).sum()),
    )


def best_photographs(model: fv.Model, layer: str, filters: tuple[int, ...]) -> Tensor | None:
    """The photograph that excites each filter most ``(n, 3, h, w)``, or ``None`` without photographs."""
    crops = photographs(model.size[0])
    if crops is None:
        return None
    scores = torch.stack(
        [filter_means(crops, model.module, layer, [f] * len(crops), mean=model.mean, std=model.std) for f in filters]
    )
    return crops[scores.argmax(1)]


def main(device: str, rounds: int) -> None:
    """Measure all layers, whose weights' files exist; ``rounds`` is ignored."""
    if device != "cpu":
        print("retention: measured on the CPU")
    loaded = {network.name: load(network, "cpu") for network in NETWORKS}
    loaded["texturenet"] = fv.load_model("texturenet")
    rows: list[Row] = []
    for name, layers in LAYERS.items():
        model = loaded[name]
        if model is None:
            print(f"retention: no weights of {name} (FEATVIS_WEIGHTS)")
            continue
        for layer in layers:
            script = reference(
                model.module,
                layer,
                FILTERS,
                steps=SCRIPT_STEPS,
                input_size=model.size[0],
                mean=model.mean,
                std=model.std,
            )
            made = {
                "published script": script.images,
                "default": fv.render(model, layer, filters=FILTERS).images,
                "photographs": best_photographs(model, layer, FILTERS),
            }
            new = [retention(model, layer, by, x, FILTERS) for by, x in made.items() if x is not None]
            rows += new
            print("\n".join(" ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row) for row in new))
            RESULTS.mkdir(exist_ok=True)
            sheet = contact_sheet(torch.cat([made["published script"], made["default"]]), rows=2)  # type: ignore[list-item]
            sheet.save(RESULTS / f"retention-{name}-{layer}.webp", quality=85)
    report("retention", "cpu", {"rows": [row._asdict() for row in rows]}, [Row._fields, *rows])
