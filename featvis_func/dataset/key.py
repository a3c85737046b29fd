"""What examples depend on, so that those of an earlier run can be told to be still right."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from featvis_func.backbone.layers import parse_layer
from featvis_func.io.atomic import whole_path
from featvis_func.io.image_files import find_pictures
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
    """What :func:`~featvis_func.top_examples` of these arguments depends on, without the search.

    Args: as for :func:`~featvis_func.top_examples`.

    Returns:
        A value as JSON takes it: the model by its tensors and its input, the files by name, size and time of
        modification, the layers by their full names. See :meth:`~featvis_func.Examples.covers`.

    Raises:
        ValueError: an unknown model or layer, or no pictures.
    """
    found = load_model(model)
    return key_of(found, layer_axes(found, layers), listed(images), count=count, precision=precision)


def key_of(
    model: Model, axes: Mapping[str, str | None], files: Sequence[Path], *, count: int, precision: str
) -> dict[str, Any]:
    """The key, from layers and files that were found."""
    listing = hashlib.sha256()
    for path in files:
        try:
            about = path.stat()
            listing.update(os.fsencode(path) + f"\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
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


def listed(images: str | Path | Iterable[str | Path]) -> list[Path]:
    """Picture files by their whole paths, each once, in order; see :func:`~featvis_func.io.image_files.find_pictures`."""
    return sorted({whole_path(path) for path in find_pictures(images)})


def layer_axes(model: Model, layers: str | Sequence[str]) -> dict[str, str | None]:
    """Layers by their full names, with the axes that their names state.

    Raises:
        ValueError: no layers, an unknown one, or one with two statements of its axes.

    >>> layer_axes(load_model("texturenet"), ["1.conv@chw", "head"])
    {'block1.conv': 'chw', 'head': None}
    """
    found: dict[str, str | None] = {}
    for name in [layers] if isinstance(layers, str) else layers:
        site = parse_layer(model.module, name)
        if found.setdefault(site.path, site.axes) != site.axes:
            raise ValueError(f"layer {site.path!r} is asked for with other axes by {name!r}")
    if not found:
        raise ValueError("no layers were asked for")
    return found
