"""Cache keys of top examples, which tell whether saved examples are still valid."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from featvis_func.backbone.layers import parse_layer
from featvis_func.io.atomic import absolute_path
from featvis_func.io.image_files import find_images
from featvis_func.models import Model, fingerprint, load_model

FORMAT = 1


def examples_key(
    model: str | nn.Module | Model,
    layers: str | Sequence[str],
    images: str | Path | Iterable[str | Path],
    *,
    count: int = 9,
    precision: str = "float32",
) -> dict[str, Any]:
    """Compute the cache key of :func:`~featvis_func.top_examples` for the same arguments, without the search.

    Args: as for :func:`~featvis_func.top_examples`.

    Returns:
        A JSON-serialisable dictionary: the model's tensors, structure and input; the files' names, sizes and
        modification times; the full names of the layers; ``count`` and ``precision``. Pass it to
        :meth:`~featvis_func.Examples.covers`.

    Raises:
        ValueError: If the model or a layer is unknown, or there are no image files.
    """
    loaded = load_model(model)
    return make_key(loaded, layer_axes(loaded, layers), list_files(images), count=count, precision=precision)


def make_key(
    model: Model, axes: Mapping[str, str | None], files: Sequence[Path], *, count: int, precision: str
) -> dict[str, Any]:
    """Compute the key from the results of :func:`layer_axes` and :func:`list_files`."""
    listing = hashlib.sha256()
    for path in files:
        try:
            status = path.stat()
            listing.update(os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:
            listing.update(os.fsencode(path) + b"\0missing\n")
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
        "layers": dict(axes),
    }


def list_files(images: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return the sorted absolute paths of image files; see :func:`~featvis_func.io.image_files.find_images`."""
    return sorted({absolute_path(path) for path in find_images(images)})


def layer_axes(model: Model, layers: str | Sequence[str]) -> dict[str, str | None]:
    """Map the full names of layers to the axes stated after ``@``, or to ``None``.

    Raises:
        ValueError: If no layers are given, a layer is unknown, or a layer is given twice with different axes.

    >>> layer_axes(load_model("texturenet"), ["1.conv@chw", "head"])
    {'block1.conv': 'chw', 'head': None}
    """
    axes: dict[str, str | None] = {}
    for name in [layers] if isinstance(layers, str) else layers:
        layer = parse_layer(model.module, name)
        if axes.setdefault(layer.path, layer.axes) != layer.axes:
            stated = [value or "default" for value in (axes[layer.path], layer.axes)]
            raise ValueError(f"layer {layer.path!r} is given with different axes: {' and '.join(stated)}")
    if not axes:
        raise ValueError("no layers were given")
    return axes
