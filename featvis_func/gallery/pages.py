"""Pages of a gallery, rendered from Jinja templates with autoescaping."""

import json
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2

from featvis_func.gallery.columns import Column
from featvis_func.gallery.families import GalleryFamily
from featvis_func.gallery.manifest import Row, format_number
from featvis_func.gallery.reproduce import describe
from featvis_func.gallery.source import Section, Source

PAGE = 500
"""Maximum number of thumbnails on a page; must equal ``PAGE`` in ``grid.js``."""
_SAMPLES = 16
_MAX_PROBLEMS = 20


class LayerPage(NamedTuple):
    """Data of a layer that its pages and the model's page show."""

    name: str
    folder: str
    shape: tuple[int, ...]
    """Shape of the layer's output for one image; empty if unknown."""
    planned: int
    """Number of filters that the sweep will render, including those that are not rendered yet."""
    rows: tuple[Row, ...]
    """Filters that are rendered, by increasing number."""
    size: tuple[int, int]
    """``(w, h)`` of the images in pixels."""
    thumb: tuple[int, int]
    """``(w, h)`` of the thumbnails in pixels."""
    map: tuple[int, int] | None
    """``(w, h)`` of the activation maps in pixels; ``None`` if the layer has none."""
    video: str | None
    """Format of the videos; ``None`` if the layer has none."""
    family: GalleryFamily | None = None
    """``None``: the filters are channels of the layer."""
    columns: tuple[Column, ...] = ()
    """Of the user's own."""

    @property
    def has_names(self) -> bool:
        """Whether the members of the family have names."""
        return any(row.name for row in self.rows)

    @property
    def url(self) -> str:
        """The folder's name, quoted for use in a URL."""
        return quote(self.folder, safe="")

    @property
    def dead(self) -> int:
        """Number of dead filters."""
        return sum(row.status == "dead" for row in self.rows)

    @property
    def flat(self) -> int:
        """Number of filters whose score never rose."""
        return sum(row.status == "flat" for row in self.rows)

    @property
    def samples(self) -> list[Row]:
        """At most 16 evenly spaced filters; dead and flat ones only if there are no others."""
        rows = [row for row in self.rows if row.status not in ("dead", "flat")] or list(self.rows)
        count = min(_SAMPLES, len(rows))
        return [rows[i * len(rows) // count] for i in range(count)]


def model_page(source: Source, layers: Sequence[LayerPage], problems: Sequence[str]) -> str:
    """Render the first page: all layers, with sample filters of each."""
    return _render(
        "model.html",
        page="model",
        root="",
        model=source.title,
        about=describe(source.config),
        layers=layers,
        families=sum(layer.family is not None for layer in layers),
        count=sum(len(layer.rows) for layer in layers),
        planned=sum(layer.planned for layer in layers),
        dead=sum(layer.dead for layer in layers),
        flat=sum(layer.flat for layer in layers),
        problems=problems[:_MAX_PROBLEMS],
        problem_count=len(problems),
    )


def layer_files(model: str, layers: Sequence[LayerPage], index: int) -> dict[str, str]:
    """Render the pages of one layer and its data for the scripts.

    Args:
        model: The model's name.
        layers: All layers, in the model's order.
        index: Position of the layer in ``layers``.

    Returns:
        File contents by file name: ``data.js``, ``index.html``, ``page-2.html``, and so on.
    """
    layer = layers[index]
    pages = max(1, -(-len(layer.rows) // PAGE))
    before = layers[index - 1] if index else None
    after = layers[index + 1] if index + 1 < len(layers) else None
    files = {"data.js": _layer_data(layer)}
    for number in range(1, pages + 1):
        rows = layer.rows[(number - 1) * PAGE : number * PAGE]
        files["index.html" if number == 1 else f"page-{number}.html"] = _render(
            "layer.html",
            page="layer",
            root="../../",
            model=model,
            layer=layer,
            rows=rows,
            number=number,
            pages=pages,
            before=before,
            after=after,
        )
    return files


def filter_page(model: str, layer: Section, row: Row, **context: Any) -> str:
    """Render the page of one filter; ``context`` holds the other variables of ``filter.html``."""
    return _render("filter.html", page="filter", root="../../", model=model, layer=layer, row=row, **context)


def compare_page(model: str) -> str:
    """Render the page that shows pinned filters side by side."""
    return _render("compare.html", page="compare", root="", model=model)


def _layer_data(layer: LayerPage) -> str:
    """Return a layer's data as a script."""
    data: dict[str, Any] = {
        # An empty name is left out.
        "filters": [row if row.name else row[:-1] for row in layer.rows],
        "size": layer.size,
        "thumb": layer.thumb,
        "map": layer.map,
        "video": layer.video,
    }
    if layer.family is not None:
        data["copies"] = layer.family.copies
    if layer.columns:
        data["columns"] = [
            {
                "name": column.name,
                "numeric": column.numeric,
                "values": [column.values.get(row.number) for row in layer.rows],
            }
            for column in layer.columns
        ]
    return f"(featvis.layers ||= {{}})[{_json(layer.folder)}] = {_json(data)};\n"


def site_data(layers: Sequence[LayerPage]) -> str:
    """Return the names, folders and filter numbers of all layers as a script."""
    data = [
        {"name": layer.name, "folder": layer.folder, "filters": [row.number for row in layer.rows]} for layer in layers
    ]
    return f"featvis.site = {_json({'layers': data})};\n"


def assets() -> dict[str, bytes]:
    """Read the style sheet and the scripts that all pages share, by file name."""
    return {path.name: path.read_bytes() for path in sorted((Path(__file__).parent / "assets").iterdir())}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _render(template: str, **context: Any) -> str:
    return _environment().get_template(template).render(**context)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.globals |= {"version": metadata.version("featvis-func"), "format_number": format_number}
    return environment
