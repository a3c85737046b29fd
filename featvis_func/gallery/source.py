"""What a gallery shows: the layers and filters of a sweep's folder, or of one result."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from featvis_func.backbone.layers import AXES
from featvis_func.rendering.result import Result, read_result
from featvis_func.sweep import Entry, Store, open_store
from featvis_func.sweep.plan import folder_of

_STATED = re.compile(rf"channel\((['\"]).*(?P<axes>@({'|'.join(AXES)}))\1\)")


class Part(NamedTuple):
    """Some filters of a layer, which are made, or found to be made already, together."""

    name: str
    filters: tuple[int, ...]
    """All that it shall have."""
    version: str | None
    """Another one for other images; ``None`` while there are none."""
    entries: Callable[[], Iterator[Entry]]


@dataclass(frozen=True)
class Section:
    """One layer."""

    name: str
    folder: str
    """A name for its files, on any file system."""
    shape: tuple[int, ...]
    """Of its output for one image; empty where not known."""
    parts: tuple[Part, ...]

    @functools.cached_property  # every filter's page asks for it
    def filters(self) -> tuple[int, ...]:
        """All that it shall have."""
        return tuple(number for part in self.parts for number in part.filters)


class Source(NamedTuple):
    """All that a gallery shows."""

    title: str
    config: dict[str, Any]
    sections: tuple[Section, ...]
    """In the model's order."""
    problems: tuple[str, ...]
    """What is missing because it is damaged or failed, and why."""


def source_of(store: Store | Result | str | Path) -> Source:
    """What a store or a result, or the folder of either, holds.

    Raises:
        ValueError: none of these, or a damaged one.
    """
    if isinstance(store, str | Path):
        store = read_result(store) if (Path(store) / "result.safetensors").exists() else open_store(store)
    if isinstance(store, Result):
        return _of_result(store)
    if not isinstance(store, Store):
        raise ValueError(f"expected a sweep's store, a Result, or the folder of either, got {type(store).__name__}")
    return _of_store(store)


def _of_store(store: Store) -> Source:
    sections, problems = [], []
    for layer in store.layers:
        parts = []
        for found in store.units(layer):
            if found.problem is not None:
                problems.append(f"{found.unit.name}: {found.problem}")
            parts.append(
                Part(found.unit.name, found.unit.filters, found.sha256, lambda unit=found.unit: store.entries(unit))
            )
        sections.append(Section(layer, folder_of(layer), store.shape(layer), tuple(parts)))
    return Source(str(store.config["model"]), store.config, tuple(sections), tuple(problems))


def _of_result(result: Result) -> Source:
    layer = str(result.config.get("layer", "layer"))
    stated = _STATED.fullmatch(str(result.config.get("objective", "")))
    if stated is not None and not layer.endswith(stated["axes"]):  # without them it may be another layer, or none
        layer += stated["axes"]
    digest = hashlib.sha256(repr((result.filters, result.status)).encode())
    for name in ("images", "activations", "scores", "best_step", "history", "steps", "snapshots"):
        tensor = getattr(result, name)
        if tensor is not None:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)

    def entries() -> Iterator[Entry]:
        seed = int(result.config.get("seed", 0))
        order = sorted(range(len(result.filters)), key=result.filters.__getitem__)
        for i in order:
            yield Entry(
                layer,
                result.filters[i],
                result.images[i],
                result.activations[i],
                float(result.scores[i]),
                result.history[:, i],
                int(result.best_step[i]),
                int(result.steps[i]),
                result.status[i],
                seed,
                None if result.snapshots is None else result.snapshots[i],
            )

    part = Part(folder_of(layer), tuple(sorted(result.filters)), digest.hexdigest(), entries)
    section = Section(layer, folder_of(layer), (), (part,))
    return Source(str(result.config.get("model", "model")), result.config, (section,), ())
