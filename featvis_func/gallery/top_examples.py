"""The photographs that excite the filters of a gallery most: searched once, kept beside its pages."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import torch
from torch import nn

from featvis_func.dataset import Examples, examples_key, top_examples
from featvis_func.gallery.images import webp
from featvis_func.gallery.manifest import short
from featvis_func.gallery.reproduce import weights_file
from featvis_func.gallery.source import Source
from featvis_func.models import Model, fingerprint, load_model

_FILE = "examples.safetensors"
_CROP, _GAP, _QUALITY = 112, 4, 82


class Sheet(NamedTuple):
    """A filter's photographs, three in a row."""

    data: bytes
    size: tuple[int, int]
    """``(w, h)`` in pixels."""
    names: list[tuple[str, str]]
    """Of each photograph, and its score."""


def find_examples(
    source: Source,
    site: Path,
    images: str | Path | Iterable[str | Path],
    *,
    model: str | nn.Module | Model | None,
    device: torch.device | str | None,
    progress: bool | None,
) -> Examples:
    """The examples of all layers; those of an earlier build, where they still hold.

    Args:
        source: whose layers.
        site: the gallery's folder, in which they are kept.
        images: a folder, or files.
        model: whose layers they are; ``None``: the one that the source names.
        device: where to search; default: where the model is.
        progress: as for :func:`~featvis_func.build_gallery`.

    Raises:
        ValueError: no pictures, or another model than the source's.
    """
    found = _model_of(source) if model is None else load_model(model)
    expected = source.config.get("fingerprint")
    other = _other_file(source, found) if expected is None else fingerprint(found.module) != expected
    if other:
        raise ValueError(f"{found.name} is another model than the one that was rendered: other layers or other weights")
    layers = [section.name for section in source.sections]
    images = [Path(file) for file in images] if not isinstance(images, str | Path) else images
    try:
        kept = Examples.load(site / _FILE)
    except ValueError:
        kept = None
    if kept is not None and kept.covers(examples_key(found, layers, images)):
        return kept
    examples = top_examples(found, layers, images, device=device, progress=progress)
    examples.save(site / _FILE)
    return examples


def sheet(examples: Examples, layer: str, number: int) -> Sheet | None:
    """The crops of one filter's photographs on one sheet, the most exciting one first; ``None`` where there are none.

    Raises:
        ValueError: a photograph is there no more.
    """
    found = examples.of(layer, number)
    if not found:
        return None
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    step = _CROP + _GAP
    whole = PIL.Image.new("RGB", (columns * step - _GAP, rows * step - _GAP), (127, 127, 127))
    for i, crop in enumerate(examples.crops(found, _CROP)):
        x, y = i % columns * step + (_CROP - crop.width) // 2, i // columns * step + (_CROP - crop.height) // 2
        whole.paste(crop.convert("RGB"), (x, y))
    # A file's name may be no text; where its bytes are none, a page shows a question mark.
    names = [(Path(example.path).name.encode(errors="replace").decode(), short(example.score)) for example in found]
    return Sheet(webp(whole, _QUALITY), whole.size, names)


def _other_file(source: Source, model: Model) -> bool:
    """Whether a rendering, which has no fingerprint, took its weights from another file than the model has."""
    was, now = (str(weights).partition(" sha256:")[2] for weights in (source.config.get("weights", ""), model.weights))
    if not now and model.name != source.config.get("model"):
        return False  # a module of the user's, who may have loaded the file
    return bool(was) and was != now


def _model_of(source: Source) -> Model:
    name = str(source.config.get("model", ""))
    file = weights_file(source.config)
    if file is not None and not Path(file).is_file():
        raise ValueError(
            f"{name} was rendered with the weights {file}, which are not here: give the model, or its file"
        )
    try:
        return load_model(name, weights=file)
    except ValueError as error:
        raise ValueError(f"the photographs need the model, give it: {error}") from error
