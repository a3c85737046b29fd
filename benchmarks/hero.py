"""The picture on the first screen of the README: a row of eight units of SqueezeNet, with the default options.

Needs SqueezeNet's weights (see ``benchmarks/evaluate.py``). The units were chosen by eye among the first 32 of the
layer.
"""

import PIL.Image
import torch.nn.functional as F
from torch import Tensor

import featvis_func as fv
from benchmarks.common import RESULTS
from benchmarks.evaluate import IMAGENET_MEAN, IMAGENET_STD, INPUT_SIZE, load_squeezenet
from featvis_func.io.pil import picture

LAYER = "features.12.expand3x3"
# Faces of dogs, wheels, heads of birds, shaggy animals, furry faces, domes, pointed ears, and rods with joints.
FILTERS = (16, 14, 6, 2, 30, 9, 1, 18)
SIDE, GAP = 174, 3  # pixels
_QUALITY = 88


def row(images: Tensor, *, side: int = SIDE, gap: int = GAP) -> PIL.Image.Image:
    """Arrange images ``(n, 3, h, w)`` in a row, resized to squares of ``side`` pixels with white gaps between them."""
    tiles = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
    sheet = PIL.Image.new("RGB", (len(tiles) * (side + gap) - gap, side), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(picture(tile), (i * (side + gap), 0))
    return sheet


def main(device: str, rounds: int) -> None:
    """Render the units and write ``results/pictures/hero.webp``. Nothing is timed: ``rounds`` has no effect."""
    module = load_squeezenet()
    if module is None:
        raise SystemExit("the picture needs SqueezeNet's weights: set FEATVIS_WEIGHTS to their file")
    model = fv.load_model(module, size=INPUT_SIZE, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    result = fv.render(model, LAYER, FILTERS, device=device, retain_memory=True, progress=None)
    path = RESULTS / "pictures" / "hero.webp"
    path.parent.mkdir(parents=True, exist_ok=True)
    row(result.images).save(path, quality=_QUALITY, method=6)
    print(f"{result}; written to {path} ({path.stat().st_size / 1e3:.0f} kB)")
