"""Cache keys of top examples, which tell whether saved examples are still valid."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from featvis_func.backbone.layers import parse_layer
from featvis_func.dataset.families import chosen_members, copies_of
from featvis_func.io.atomic import absolute_path
from featvis_func.io.image_files import find_images
from featvis_func.models import Model, fingerprint, load_model
from featvis_func.objective import Objective
from featvis_func.objective.expression import tensors_of, to_code
from featvis_func.rendering.record import describe_code, describe_tensors, label_of, member_tensors
from featvis_func.rendering.spec import Selection

FORMAT = 1

Requested: TypeAlias = str | Objective | Selection
"""A layer's name, a family of objectives, or some members of one."""


def examples_key(
    model: str | nn.Module | Model,
    layers: Requested | Iterable[Requested] | Mapping[str, Requested],
    images: str | Path | Iterable[str | Path],
    *,
    count: int = 9,
    precision: str = "float32",
) -> dict[str, Any]:
    """Compute the cache key of :func:`~featvis_func.top_examples` for the same arguments, without the search.

    Args: as for :func:`~featvis_func.top_examples`.

    Returns:
        A JSON-serialisable dictionary: the model's tensors, structure and input; the files' names, sizes and
        modification times; the full names of the layers; the code of the families and the hashes of their tensors;
        ``count`` and ``precision``. Pass it to :meth:`~featvis_func.Examples.covers`.

    Raises:
        ValueError: If the model or a layer is unknown, or there are no image files.
    """
    loaded = load_model(model)
    return make_key(loaded, requests_of(loaded, layers), list_files(images), count=count, precision=precision)


def make_key(
    model: Model, requests: Mapping[str, str | Selection | None], files: Sequence[Path], *, count: int, precision: str
) -> dict[str, Any]:
    """Compute the key from the results of :func:`requests_of` and :func:`list_files`."""
    listing = hashlib.sha256()
    for path in files:
        try:
            status = path.stat()
            listing.update(os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:
            listing.update(os.fsencode(path) + b"\0missing\n")
    families = {label: _describe(value) for label, value in requests.items() if isinstance(value, Selection)}
    return {
        "format": FORMAT,
        "model": {
            "fingerprint": fingerprint(model.module),
            "size": [int(side) for side in model.size],
            "mean": list(model.mean),
            "std": list(model.std),
        },
        "files": listing.hexdigest(),
        "count": count,
        "precision": precision,
        "layers": {name: axes for name, axes in requests.items() if not isinstance(axes, Selection)},
        **({"families": families} if families else {}),
    }


def _describe(selection: Selection) -> dict[str, Any]:
    """What the examples of a family depend on, as JSON holds it."""
    objective, filters = selection.objective, selection.filters
    code = to_code(objective.expression_or_name)
    record = {
        **describe_code(objective),
        "layers": objective.layers,
        "tensors": describe_tensors(member_tensors(objective)),
        "members": None if filters is None else chosen_members(objective, filters),
        "copies": copies_of(objective),
        # Nothing tells whether code of the user's own has changed.
        "comparable": code.values.keys() <= tensors_of(objective.expression_or_name).keys(),
    }
    return json.loads(json.dumps(record))  # as it is read back


def list_files(images: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return the sorted absolute paths of image files; see :func:`~featvis_func.io.image_files.find_images`."""
    return sorted({absolute_path(path) for path in find_images(images)})


def requests_of(
    model: Model, layers: Requested | Iterable[Requested] | Mapping[str, Requested]
) -> dict[str, str | Selection | None]:
    """Map the full names of layers to the axes stated after ``@``, or to ``None``; and the labels of families to them.

    Raises:
        ValueError: If nothing is given, a layer is unknown or is given twice with different axes, an objective reads no
            layer or refers to a picture, or two requests have one label.

    >>> requests_of(load_model("texturenet"), ["1.conv@chw", "head"])
    {'block1.conv': 'chw', 'head': None}
    """
    if isinstance(layers, str | Objective | Selection):
        layers = [layers]
    labels = [str(label) for label in layers] if isinstance(layers, Mapping) else None
    given: list[Any] = list(layers.values() if isinstance(layers, Mapping) else layers)
    requests: dict[str, str | Selection | None] = {}
    for label, request in zip(labels or [None] * len(given), given, strict=True):
        if isinstance(request, Objective | Selection):
            selection = Selection(request) if isinstance(request, Objective) else request
            check_searchable(selection.objective)
            label = label or selection.label or label_of(selection.objective)
            if label in requests:
                raise ValueError(f"two requests are called {label!r}; give them as a dictionary with other labels")
            requests[label] = selection
            continue
        if not isinstance(request, str):
            raise ValueError(f"expected the name of a layer or an Objective, got {request!r}")
        layer = parse_layer(model.module, request)
        known = requests.setdefault(layer.path, layer.axes)
        if isinstance(known, Selection):
            raise ValueError(f"a layer and a family are both called {layer.path!r}; give the family another label")
        if known != layer.axes:
            stated = [value or "default" for value in (known, layer.axes)]
            raise ValueError(f"layer {layer.path!r} is given with different axes: {' and '.join(stated)}")
    if not requests:
        raise ValueError("no layers were given")
    return requests


def check_searchable(objective: Objective) -> None:
    """Check that photographs have a score of an objective.

    Raises:
        ValueError: It reads no layer of the model, or compares the image with a picture of its size.
    """
    if not objective.layers:
        raise ValueError(f"{objective} reads no layer of the model; add an objective that does")
    if objective.picture is not None:
        raise ValueError(f"{objective} compares images with a picture of their size, which photographs do not have")
