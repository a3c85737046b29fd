"""The files of one filter: its pictures and its page."""

from typing import Any, NamedTuple

from featvis_func.dataset import Examples
from featvis_func.engine.snapshots import snapshot_steps
from featvis_func.gallery import images as pictures
from featvis_func.gallery import pages
from featvis_func.gallery import top_examples as photographs
from featvis_func.gallery.curve import curve, settled_step
from featvis_func.gallery.manifest import Row, key_of
from featvis_func.gallery.reproduce import recipe
from featvis_func.gallery.source import Section
from featvis_func.io.animation import animation_bytes
from featvis_func.sweep import Entry


class Making(NamedTuple):
    """What the files of all filters depend on."""

    title: str
    config: dict[str, Any]
    moving: str
    examples: Examples | None

    @property
    def key(self) -> str:
        """Another one for other files."""
        return key_of(self.title, self.config, self.moving, None if self.examples is None else self.examples.key)


class OneFilter(NamedTuple):
    """The files of one filter."""

    row: Row
    files: dict[str, bytes]
    """By their paths in the layer's folder, ``{}`` for the filter's number."""
    size: tuple[int, int]
    thumb: tuple[int, int]


def make_filter(making: Making, section: Section, entry: Entry, before: int | None, after: int | None) -> OneFilter:
    """The pictures and the page of one filter.

    Args:
        making: what all filters have in common.
        section: the layer.
        entry: the filter.
        before, after: the numbers of its neighbours, which the page leads to.
    """
    score = None if not abs(entry.score) < float("inf") else entry.score
    row = Row(entry.filter, score, entry.best_step, entry.steps, entry.status, settled_step(entry.history))
    shown = pictures.image_files(entry.image)
    files = {"images/{}.webp": shown.whole, "thumbs/{}.webp": shown.thumb}
    activity = pictures.activation_map(entry.activation)
    if activity is not None:
        files["maps/{}.webp"] = activity.data
    film = None
    if entry.snapshots is not None:
        sheet = pictures.film(entry.snapshots)
        files["films/{}.webp"] = sheet.data
        files[f"films/{{}}-moving.{making.moving}"] = animation_bytes(entry.snapshots, making.moving)
        given = making.config.get("render", making.config)
        steps = snapshot_steps(given.get("steps", len(entry.history)), sheet.frames)
        film = {**sheet._asdict(), "steps": steps, "kind": making.moving}
    crops = None if making.examples is None else photographs.sheet(making.examples, section.name, entry.filter)
    if crops is not None:
        files["examples/{}.webp"] = crops.data
    page = pages.filter_page(
        making.title,
        section,
        row,
        pixels=tuple(entry.image.shape[-2:]),
        size=shown.size,
        map=activity,
        film=film,
        curve=curve(entry.history),
        seed=entry.seed,
        before=before,
        after=after,
        examples=crops,
        recipe=recipe(making.config, section.name, entry.filter, entry.seed, filters=section.filters),
    )
    files["{}.html"] = page.encode()
    return OneFilter(row, files, shown.size, shown.thumb_size)
