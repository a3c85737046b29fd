"""Photographs that excite the filters of a gallery most. The search results are saved in the gallery's folder."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import nn

from featvis_func.dataset import Examples, check_searchable, examples_key, top_examples
from featvis_func.gallery.images import webp
from featvis_func.gallery.manifest import format_number
from featvis_func.gallery.reproduce import weights_file
from featvis_func.gallery.source import Source
from featvis_func.models import Model, fingerprint, load_model
from featvis_func.models.loading import without_code
from featvis_func.rendering.spec import Selection

_FILE = "examples.safetensors"
_CROP, _GAP, _QUALITY = 112, 4, 82


class ExampleSheet(NamedTuple):
    """The photographs of one filter in a single image, three in a row."""

    data: bytes
    size: tuple[int, int]
    """``(w, h)`` in pixels."""
    names: list[tuple[str, str]]
    """File name and formatted score of each photograph."""


class FoundExamples(NamedTuple):
    """The photographs of a gallery."""

    examples: Examples | None
    """``None`` if no layer has photographs."""
    problems: tuple[str, ...]
    """One message for each layer or family whose photographs are left out, with the reason."""


def find_examples(
    source: Source,
    site: Path,
    images: str | Path | Iterable[str | Path],
    *,
    model: str | nn.Module | Model | None,
    device: torch.device | str | None,
    progress: bool | None,
) -> FoundExamples:
    """Find the photographs that excite each filter most, using the saved results of an earlier build if still valid.

    Args:
        source: The layers and filters of the gallery.
        site: The gallery's folder, where the results are saved.
        images: A folder of photographs, or image files.
        model: The model that the layers belong to; ``None``: the model that ``source`` names.
        device: Device on which to search; ``None``: the model's device.
        progress: See :func:`~featvis_func.build_gallery`.

    Raises:
        ValueError: If there are no photographs, or if the model is not the one that was rendered.
    """
    model = _load_source_model(source) if model is None else _as_rendered(model, source.config)
    expected = source.config.get("fingerprint")
    differs = _weights_differ(source, model) if expected is None else fingerprint(model.module) != expected
    if differs:
        raise ValueError(f"{model.name} is not the model that was rendered: its layers or its weights differ")
    layers, problems = _requests(source)
    if not layers:
        return FoundExamples(None, problems)
    images = [Path(file) for file in images] if not isinstance(images, str | Path) else images
    try:
        saved = Examples.load(site / _FILE)
    except ValueError:
        saved = None
    if saved is not None and saved.covers(examples_key(model, layers, images)):
        return FoundExamples(saved, problems)
    examples = top_examples(model, layers, images, device=device, progress=progress)
    examples.save(site / _FILE)
    return FoundExamples(examples, problems)


def _requests(source: Source) -> tuple[dict[str, str | Selection], tuple[str, ...]]:
    """The layers, and the objectives with the members that are shown; and what cannot be searched, with the reason."""
    requests: dict[str, str | Selection] = {}
    problems = []
    for section in source.sections:
        if section.objective is None:
            requests[section.name] = section.name
            continue
        try:
            objective = section.objective()
            check_searchable(objective)
        except ValueError as error:
            problems.append(f"the photographs of {section.name}: {error}")
        else:
            requests[section.name] = Selection(objective, list(section.filters))
    return requests, tuple(problems)


def _as_rendered(model: str | nn.Module | Model, config: dict[str, Any]) -> Model:
    """Load a model; a module of the user's own takes the input that the rendering recorded."""
    if not isinstance(model, nn.Module) or not {"mean", "std", "input_size"} <= config.keys():
        return load_model(model)
    return load_model(model, mean=config["mean"], std=config["std"], size=tuple(config["input_size"]))


def example_sheet(examples: Examples, layer: str, number: int) -> ExampleSheet | None:
    """Combine the cropped photographs of one filter into one image, highest score first.

    Returns:
        The sheet, or ``None`` if the filter has no photographs, or those of the layer are left out.

    Raises:
        ValueError: If a photograph no longer exists.
    """
    photographs = examples.of(layer, number) if layer in examples else ()
    if not photographs:
        return None
    columns = min(3, len(photographs))
    rows = math.ceil(len(photographs) / columns)
    step = _CROP + _GAP
    sheet = PIL.Image.new("RGB", (columns * step - _GAP, rows * step - _GAP), (127, 127, 127))
    for i, crop in enumerate(examples.crops(photographs, _CROP)):
        x, y = i % columns * step + (_CROP - crop.width) // 2, i // columns * step + (_CROP - crop.height) // 2
        sheet.paste(crop.convert("RGB"), (x, y))
    # A file name may contain bytes that are not valid text; the page shows a question mark for each.
    names = [
        (Path(photograph.path).name.encode(errors="replace").decode(), format_number(photograph.score))
        for photograph in photographs
    ]
    return ExampleSheet(webp(sheet, _QUALITY), sheet.size, names)


def _weights_differ(source: Source, model: Model) -> bool:
    """Return whether a rendering without a fingerprint and a model took their weights from different files."""
    rendered, given = (
        str(weights).partition(" sha256:")[2] for weights in (source.config.get("weights", ""), model.weights)
    )
    if not given and model.name != source.config.get("model"):
        return False  # a user's own module, which may have loaded the same file
    return bool(rendered) and rendered != given


def _load_source_model(source: Source) -> Model:
    """Load the model that a source names.

    Raises:
        ValueError: If it cannot be loaded by name, or its weights file does not exist here.
    """
    name = str(source.config.get("model", ""))
    file = weights_file(source.config)
    if file is not None and not Path(file).is_file():
        raise ValueError(
            f"{name} was rendered with the weights file {file!r}, which does not exist;"
            " give the model or its weights file"
        )
    try:
        return load_model(without_code(name), weights=file)
    except ValueError as error:
        raise ValueError(f"searching the photographs needs the model; give it ({error})") from error
