"""Files of one filter: its images and its page."""

from typing import Any, NamedTuple

from featvis_func.dataset import Examples
from featvis_func.engine.snapshots import snapshot_steps
from featvis_func.gallery import pages
from featvis_func.gallery.curve import convergence_step, curve
from featvis_func.gallery.images import activation_map, encode_image, encode_video, snapshot_sheet
from featvis_func.gallery.manifest import Row, content_key
from featvis_func.gallery.neighbours import file_of
from featvis_func.gallery.reproduce import reproduce
from featvis_func.gallery.source import Section
from featvis_func.gallery.top_examples import example_sheet
from featvis_func.io.animation import animation_bytes, snapshot_display
from featvis_func.io.display import Display
from featvis_func.sweep import Entry


class BuildOptions(NamedTuple):
    """Inputs that the files of every filter depend on."""

    title: str
    """Title of the site: the model's name."""
    config: dict[str, Any]
    """Configuration of the sweep or of the result."""
    moving: str
    """Format of the animations, ``"webp"`` or ``"gif"``."""
    examples: Examples | None
    """Photographs that excite each filter most, if any were searched."""
    display: Display = Display()
    """How the channels of the images are shown."""

    @property
    def key(self) -> str:
        """Hash of all fields; a change of it rebuilds every filter."""
        examples = None if self.examples is None else self.examples.key
        return content_key(self.title, self.config, self.moving, examples, self.display)


class FilterFiles(NamedTuple):
    """Contents of the files of one filter."""

    row: Row
    files: dict[str, bytes]
    """File contents by path in the layer's folder; ``{}`` in a path stands for the filter's number."""
    size: tuple[int, int]
    """``(w, h)`` of the image in pixels."""
    thumb: tuple[int, int]
    """``(w, h)`` of the thumbnail in pixels."""
    map: tuple[int, int] | None
    """``(w, h)`` of the activation map in pixels, as displayed."""


def make_filter_files(
    options: BuildOptions, section: Section, entry: Entry, before: int | None, after: int | None
) -> FilterFiles:
    """Make the images and the page of one filter.

    Args:
        options: Inputs shared by all filters.
        section: The layer.
        entry: The filter.
        before: Number of the previous filter, which the page links to, if any.
        after: Number of the next filter, which the page links to, if any.
    """
    score = None if not abs(entry.score) < float("inf") else entry.score
    converged, name = convergence_step(entry.history), section.name_of(entry.filter)
    row = Row(entry.filter, score, entry.best_step, entry.steps, entry.status, converged, name)
    image = encode_image(entry.image, options.display)
    files = {"images/{}.webp": image.full, "thumbs/{}.webp": image.thumb}
    video = encode_video(entry.image, options.moving, options.display)
    if video is not None:
        files[f"videos/{{}}.{options.moving}"] = video.moving
        files["videos/{}-strip.webp"] = video.strip
    activation = activation_map(entry.activation, entry.image, options.display)
    if activation is not None:
        files["maps/{}.webp"] = activation.data
    snapshots = None
    if entry.snapshots is not None:
        display = snapshot_display(entry.image, entry.snapshots, options.display)
        sheet = snapshot_sheet(entry.snapshots, display)
        files["films/{}.webp"] = sheet.data
        moving = animation_bytes(entry.snapshots, options.moving, display=display)
        files[f"films/{{}}-moving.{options.moving}"] = moving
        render_config = options.config.get("render", options.config)
        steps = snapshot_steps(render_config.get("steps", len(entry.history)), sheet.frames)
        snapshots = {**sheet._asdict(), "steps": steps, "format": options.moving}
    examples = None if options.examples is None else example_sheet(options.examples, section.name, entry.filter)
    if examples is not None:
        files["examples/{}.webp"] = examples.data
    page = pages.filter_page(
        options.title,
        section,
        row,
        image=image,
        is_signal=entry.image.ndim == 2,
        video=video,
        moving=options.moving,
        map=activation,
        snapshots=snapshots,
        curve=curve(entry.history),
        seed=entry.seed,
        before=(before, None if before is None else section.name_of(before)),
        after=(after, None if after is None else section.name_of(after)),
        neighbours=file_of(section.family, entry.filter),
        examples=examples,
        reproduction=reproduce(options.config, section.name, entry.filter, entry.seed, filters=section.filters),
    )
    files["{}.html"] = page.encode()
    return FilterFiles(row, files, image.size, image.thumb_size, None if activation is None else activation.size)
