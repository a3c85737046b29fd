"""The pages of a gallery, from their templates. Everything that is put in is escaped."""

import json
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2

from featvis_func.gallery.manifest import Row, short
from featvis_func.gallery.reproduce import about
from featvis_func.gallery.source import Section, Source

PAGE = 500
"""The most thumbnails on a page; `grid.js` has the same number."""
_SAMPLES = 16
_MOST_PROBLEMS = 20


class LayerPage(NamedTuple):
    """What the pages know of a layer."""

    name: str
    folder: str
    shape: tuple[int, ...]
    planned: int
    rows: tuple[Row, ...]
    size: tuple[int, int]
    thumb: tuple[int, int]
    maps: bool

    @property
    def url(self) -> str:
        """Its folder as a part of a URL."""
        return quote(self.folder, safe="")

    @property
    def dead(self) -> int:
        """How many of its filters are dead."""
        return sum(row.status == "dead" for row in self.rows)

    @property
    def samples(self) -> list[Row]:
        """Some filters, evenly spread over those that are not dead."""
        rows = [row for row in self.rows if row.status != "dead"] or list(self.rows)
        count = min(_SAMPLES, len(rows))
        return [rows[i * len(rows) // count] for i in range(count)]


def model_page(source: Source, layers: Sequence[LayerPage], problems: Sequence[str]) -> str:
    """The first page: all layers, with samples of each."""
    return _render(
        "model.html",
        page="model",
        root="",
        model=source.title,
        about=about(source.config),
        layers=layers,
        count=sum(len(layer.rows) for layer in layers),
        planned=sum(layer.planned for layer in layers),
        dead=sum(layer.dead for layer in layers),
        problems=problems[:_MOST_PROBLEMS],
        problem_count=len(problems),
    )


def layer_files(model: str, layers: Sequence[LayerPage], index: int) -> dict[str, str]:
    """The pages of one layer with its filters in rising order, and what the scripts know of it, by the files' names."""
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


def filter_page(model: str, layer: Section, row: Row, **rest: Any) -> str:
    """The page of one filter."""
    return _render("filter.html", page="filter", root="../../", model=model, layer=layer, row=row, **rest)


def compare_page(model: str) -> str:
    """The page on which pinned filters stand side by side."""
    return _render("compare.html", page="compare", root="", model=model)


def _layer_data(layer: LayerPage) -> str:
    """What the scripts know of a layer."""
    value = {"filters": layer.rows, "size": layer.size, "thumb": layer.thumb, "maps": layer.maps}
    return f"(featvis.layers ||= {{}})[{_json(layer.folder)}] = {_json(value)};\n"


def site_data(layers: Sequence[LayerPage]) -> str:
    """What the scripts know of all layers."""
    value = [{"name": l.name, "folder": l.folder, "filters": [row.number for row in l.rows]} for l in layers]  # noqa: E741
    return f"featvis.site = {_json({'layers': value})};\n"


def assets() -> dict[str, bytes]:
    """The files that all pages use, by name."""
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
    environment.globals |= {"version": metadata.version("featvis-func"), "short": short}
    return environment
