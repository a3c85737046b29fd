"""Build a gallery from a sweep's store or from a result. Rebuilds are incremental: unchanged files are kept."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from featvis_func.gallery import pages
from featvis_func.gallery.columns import read_columns
from featvis_func.gallery.filter_files import BuildOptions
from featvis_func.gallery.manifest import MANIFEST_NAME
from featvis_func.gallery.site import SiteBuilder, cpu_count, open_site
from featvis_func.gallery.source import source_of
from featvis_func.gallery.top_examples import find_examples
from featvis_func.io.animation import FORMATS
from featvis_func.io.atomic import absolute_path
from featvis_func.io.display import check_shown, display_of
from featvis_func.models import Model
from featvis_func.rendering.result import Result
from featvis_func.sweep import Store
from featvis_func.validation import check_name


class Gallery(NamedTuple):
    """Summary of a build, returned by :func:`build_gallery`."""

    path: Path
    """Path of the site's first page, ``index.html``."""
    layers: int
    """Number of layers in the gallery, and of families of objectives, which appear as layers do."""
    filters: int
    """Number of filters in the gallery, and of members of families."""
    made: int
    """Number of filters whose files this build wrote; the files of the others were up to date."""
    problems: tuple[str, ...]
    """One message for each unit of the sweep, for each layer's photographs, and for each family's names and directions
    that were left out, with the reason."""
    families: int = 0
    """Number of families of objectives among the layers."""


def build_gallery(
    store: Store | Result | str | Path,
    out: str | Path | None = None,
    *,
    images: str | Path | Iterable[str | Path] | None = None,
    model: str | nn.Module | Model | None = None,
    device: torch.device | str | None = None,
    moving: str = "webp",
    bands: Sequence[int] | None = None,
    columns: str | Path | None = None,
    progress: bool | None = False,
) -> Gallery:
    """Build a static website that shows every filter of a sweep or of a result.

    The site works from local files, without a server and without network access. Building again into the same folder
    updates it: files that are up to date are kept, changed filters are rebuilt, and files of filters that no longer
    exist are removed.

    Args:
        store: A sweep's folder (the sweep may still be running), a store from
            :func:`~featvis_func.sweep.open_store`, a result, or the folder of a saved result.
        out: The site's folder: a new or empty one, or an existing gallery. Default: ``gallery`` inside the given
            folder.
        images: A folder of photographs, or image files. Each filter's page then also shows the nine photographs that
            excite the filter most, cropped to its receptive field, and that of a member of a family those with the
            highest score of its objective (:func:`~featvis_func.top_examples`). They are left out where the objective
            depends on what is not recorded: on a function of your own, or in a result on tensors. The search results
            are saved in the site's folder and used again by later builds.
        model: The model that the layers belong to, used with ``images``. Default: the model that the store names.
        device: Device on which to search ``images``. Default: the model's device.
        moving: Format of videos, and of the animation of filters with snapshots, ``"webp"`` or ``"gif"``.
        bands: One channel, shown as grey, or three, shown as red, green and blue, numbered from 0. Default: those that
            the images were rendered with, see :func:`~featvis_func.render`.
        columns: A CSV file with a header and a row for each filter, by whose columns the pages of a layer can be
            sorted; the page of a filter shows its values. The column ``filter``, ``member``, ``number`` or ``name``, or
            else the first one, says which filter a row is of, by its number or by the name of a family's member. If
            the gallery has several layers, a column ``layer`` says which one. A later build without ``columns`` removes
            them.
        progress: Whether to show a progress bar on standard error; ``None`` shows it only on a terminal.

    Returns:
        The path of the first page, the number of layers and filters, and the units that were left out.

    Raises:
        ValueError: If ``store`` is not a sweep or a result, if its images do not have these bands, if the site's folder
            contains other files or cannot be written, if there are no photographs in ``images``, if ``model`` is not
            the model that was rendered, or if ``columns`` is no such file.

    >>> import tempfile
    >>> from featvis_func import render
    >>> gallery = build_gallery(render("texturenet", "head", [3, 5], steps=2, size=32), tempfile.mkdtemp())
    >>> gallery.filters, gallery.path.name
    (2, 'index.html')
    """
    check_name("moving", moving, FORMATS)
    source = source_of(store)
    display = display_of(source.config, bands)
    if bands is not None:
        if "mean" in source.config:
            check_shown(display.bands, len(source.config["mean"]), len(source.config.get("input_size", (1, 1))))
        source = source._replace(config={**source.config, "bands": list(display.bands or ())})
    folder = _output_folder(store, out)
    own_columns = {} if columns is None else read_columns(columns, source.sections)
    try:
        new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        had_manifest = (folder / MANIFEST_NAME).exists()
        previous_parts = open_site(folder)
        site = SiteBuilder(folder, previous_parts)
        examples, left_out = None, ()
        if images is not None:
            try:
                examples, left_out = find_examples(
                    source, folder, images, model=model, device=device, progress=progress
                )
            except ValueError:
                # Leave no trace of a gallery that was not built.
                if not had_manifest:
                    (folder / MANIFEST_NAME).unlink()
                for path in new_folders:
                    path.rmdir()
                raise
        options = BuildOptions(source.title, source.config, moving, examples, display)
        total = sum(len(section.filters) for section in source.sections)
        disable = None if progress is None else not progress
        with (
            tqdm(total=total, desc="gallery", unit="filter", leave=False, disable=disable) as bar,
            ThreadPoolExecutor(cpu_count()) as pool,
        ):
            layers = [site.add_layer(section, options, pool, bar.update) for section in source.sections]
        problems = (*source.problems, *left_out, *site.problems)
        for name, data in pages.assets().items():
            site.write(f"assets/{name}", data)
        site.write("assets/site.js", pages.site_data(layers).encode())
        layers = [layer._replace(columns=own_columns.get(layer.name, ())) for layer in layers]
        for index, layer in enumerate(layers):
            site.add_neighbours(layer)
            for name, text in pages.layer_files(source.title, layers, index).items():
                site.write(f"layers/{layer.folder}/{name}", text.encode())
                site.keep(layer.folder, [name])
        site.write("compare.html", pages.compare_page(source.title).encode())
        site.write("index.html", pages.model_page(source, layers, problems).encode())
        site.finish()
    except OSError as error:
        raise ValueError(f"cannot write the gallery {str(folder)!r}: {error.strerror or error}") from error
    count = sum(len(layer.rows) for layer in layers)
    families = sum(layer.family is not None for layer in layers)
    return Gallery(folder / "index.html", len(layers), count, site.made, problems, families)


def _output_folder(store: Store | Result | str | Path, out: str | Path | None) -> Path:
    """Return the absolute path of the site's folder.

    Raises:
        ValueError: If a result is given without ``out``, or if ``out`` is inside the sweep's folder but not inside its
            ``gallery`` folder.
    """
    if isinstance(store, Result):
        if out is None:
            raise ValueError("the gallery of a Result needs a folder: pass out=")
        return absolute_path(out)
    store_folder = absolute_path(store.path if isinstance(store, Store) else store)
    default = store_folder / "gallery"
    folder = default if out is None else absolute_path(out)
    ancestors = (folder.resolve(), *folder.resolve().parents)
    # `featvis validate` reports files in a sweep's folder that belong to no unit; `gallery` is the only exception.
    inside = store_folder.resolve() in ancestors[1:] and default.resolve() not in ancestors
    if inside and (store_folder / "units").is_dir():
        raise ValueError(
            f"{str(folder)!r} is inside the sweep's folder, where the gallery must be {str(default)!r} or inside it"
        )
    return folder
