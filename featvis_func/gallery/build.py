"""A gallery from a store or a result: what is made already stays, what has changed is made again."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from featvis_func.gallery import pages
from featvis_func.gallery.filter_files import Making
from featvis_func.gallery.manifest import NAME
from featvis_func.gallery.site import LayerRef, begin, processors
from featvis_func.gallery.source import source_of
from featvis_func.gallery.top_examples import find_examples
from featvis_func.io.animation import FORMATS
from featvis_func.io.atomic import whole_path
from featvis_func.models import Model
from featvis_func.rendering.result import Result
from featvis_func.sweep import Store
from featvis_func.validation import check_name


class Gallery(NamedTuple):
    """What :func:`build_gallery` made."""

    path: Path
    """The first page."""
    layers: int
    filters: int
    made: int
    """Filters whose files were made now; those of the others were there."""
    problems: tuple[str, ...]
    """What is left out, and why."""


def build_gallery(
    store: Store | Result | str | Path,
    out: str | Path | None = None,
    *,
    images: str | Path | Iterable[str | Path] | None = None,
    model: str | nn.Module | Model | None = None,
    device: torch.device | str | None = None,
    moving: str = "webp",
    progress: bool | None = False,
) -> Gallery:
    """Writes a static site that shows every filter of a sweep, or of a result.

    It needs no network and no server. What an earlier build left in the folder, and still holds, stays as it is; what
    has changed since is made again, and what is no more is removed.

    Args:
        store: a sweep's folder, also while it is being filled, or what :func:`~featvis_func.sweep.open_store` made of
            it; a result, or the folder where one was saved.
        out: the site's folder, new, empty or a gallery's. Default: ``gallery`` in the folder given.
        images: a folder of photographs, or files: beside each filter's image stand the nine that excite it most,
            cropped to what the unit sees (:func:`~featvis_func.top_examples`). What was found is kept in the
            site's folder, for the next build.
        model: of which the layers are, for ``images``; default: the one that the store names.
        device: where to search these; default: where the model is.
        moving: of filters with snapshots, what to export: ``"webp"`` or ``"gif"``.
        progress: whether to show a bar on the standard error; ``None``: if that is a terminal.

    Returns:
        Where the first page is, what there is and what is missing.

    Raises:
        ValueError: no such store, a folder that holds something else or cannot be written, no photographs, or another
            model than the store's.

    >>> import tempfile
    >>> from featvis_func import render
    >>> made = build_gallery(render("texturenet", "head", [3, 5], steps=2, size=32), tempfile.mkdtemp())
    >>> made.filters, made.path.name
    (2, 'index.html')
    """
    check_name("moving", moving, FORMATS)
    source = source_of(store)
    folder = _folder(store, out)
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        marked = (folder / NAME).exists()
        known = begin(folder)
        site = LayerRef(folder, known)
        examples = None
        if images is not None:
            try:
                examples = find_examples(source, folder, images, model=model, device=device, progress=progress)
            except ValueError:
                if not marked:
                    (folder / NAME).unlink()
                for path in new:
                    path.rmdir()
                raise
        making = Making(source.title, source.config, moving, examples)
        total = sum(len(section.filters) for section in source.sections)
        hidden = None if progress is None else not progress
        with (
            tqdm(total=total, desc="gallery", unit="filter", leave=False, disable=hidden) as bar,
            ThreadPoolExecutor(processors()) as pool,
        ):
            layers = [site.layer(section, making, pool, bar.update) for section in source.sections]
        problems = (*source.problems, *site.problems)
        for name, data in pages.assets().items():
            site.put(f"assets/{name}", data)
        site.put("assets/site.js", pages.site_data(layers).encode())
        for index, layer in enumerate(layers):
            for name, text in pages.layer_files(source.title, layers, index).items():
                site.put(f"layers/{layer.folder}/{name}", text.encode())
                site.keep(layer.folder, [name])
        site.put("compare.html", pages.compare_page(source.title).encode())
        site.put("index.html", pages.model_page(source, layers, problems).encode())
        site.finish()
    except OSError as error:
        raise ValueError(f"cannot write the gallery {str(folder)!r}: {error.strerror or error}") from error
    return Gallery(folder / "index.html", len(layers), sum(len(layer.rows) for layer in layers), site.made, problems)


def _folder(store: Store | Result | str | Path, out: str | Path | None) -> Path:
    if isinstance(store, Result):
        if out is None:
            raise ValueError("a result's gallery needs a folder: give out=")
        return whole_path(out)
    home = whole_path(store.path if isinstance(store, Store) else store)
    own = home / "gallery"
    folder = own if out is None else whole_path(out)
    above = (folder.resolve(), *folder.resolve().parents)
    # Elsewhere among a sweep's files it would be what belongs to no unit.
    if home.resolve() in above[1:] and own.resolve() not in above and (home / "units").is_dir():
        raise ValueError(f"{str(folder)!r} is inside of the sweep's folder, where a gallery can only be {str(own)!r}")
    return folder
