"""The contents of a gallery: the layers and filters of a sweep's folder or of one result."""

import functools
import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from featvis_func.gallery.families import GalleryFamily, family_of_result, family_of_store
from featvis_func.objective import Objective
from featvis_func.objective.rebuild import from_code
from featvis_func.rendering.result import Result, read_result
from featvis_func.sweep import Entry, Store, open_store
from featvis_func.sweep.plan import folder_of


class Part(NamedTuple):
    """Some filters of a layer, whose pages are built together or are already there."""

    name: str
    filters: tuple[int, ...]
    """All filters of the part, rendered or not."""
    version: str | None
    """Identifies the images; ``None`` while there are none."""
    entries: Callable[[], Iterator[Entry]]


@dataclass(frozen=True)
class Section:
    """One layer, or a family of objectives, whose members are its filters."""

    name: str
    folder: str
    """A name for its files, valid on any file system."""
    shape: tuple[int, ...]
    """Shape of its output for one image; empty if unknown."""
    parts: tuple[Part, ...]
    objective: Callable[[], Objective] | None = None
    """Makes the objective again, if it is another than the channels of the layer; raises ValueError where what it
    depends on is not recorded."""
    family: GalleryFamily | None = None
    """``None``: the filters are channels of the layer."""

    @functools.cached_property  # every filter's page asks for it
    def filters(self) -> tuple[int, ...]:
        """All filters of the layer, rendered or not."""
        return tuple(number for part in self.parts for number in part.filters)

    def name_of(self, number: int) -> str:
        """The name of a member; empty if it has none."""
        return "" if self.family is None else self.family.name_of(number)


class Source(NamedTuple):
    """Everything that a gallery shows."""

    title: str
    config: dict[str, Any]
    sections: tuple[Section, ...]
    """In the model's order."""
    problems: tuple[str, ...]
    """What is missing because it is damaged or failed, with the reason."""


def source_of(store: Store | Result | str | Path) -> Source:
    """Read the contents of a store, a result, or the folder of either.

    Raises:
        ValueError: another kind of object, or a damaged folder.
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
        for stored in store.units(layer):
            unit = stored.unit
            if stored.problem is not None:
                problems.append(f"{unit.name}: {stored.problem}")
            parts.append(Part(unit.name, unit.filters, stored.sha256, lambda unit=unit: store.entries(unit)))
        family, problem = family_of_store(store, layer)
        if problem is not None:
            problems.append(problem)
        record = store.config.get("families", {}).get(layer)
        objective = None if record is None else functools.partial(_objective_of_store, store, layer)
        sections.append(Section(layer, folder_of(layer), store.shape(layer), tuple(parts), objective, family))
    return Source(str(store.config["model"]), store.config, tuple(sections), tuple(problems))


def _of_result(result: Result) -> Source:
    layer = str(result.config.get("layer", "layer"))
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
    code = result.config.get("objective_code")
    objective = None if code is None else functools.partial(_objective_of_result, code)
    section = Section(layer, folder_of(layer), (), (part,), objective, family_of_result(result))
    return Source(str(result.config.get("model", "model")), result.config, (section,), ())


def _objective_of_store(store: Store, label: str) -> Objective:
    record = store.config["families"][label]
    _check_recorded(record["objective_code"] or {}, record["tensors"])
    return store.objective(label)


def _objective_of_result(code: dict[str, Any]) -> Objective:
    _check_recorded(code, ())
    return from_code(code, {})


def _check_recorded(code: dict[str, Any], tensors: Collection[str]) -> None:
    """Raise ValueError if an objective depends on what is not recorded.

    Args:
        code: of the objective, see :class:`~featvis_func.objective.expression.Code`.
        tensors: names of those that are recorded.
    """
    missing = [meaning for name, meaning in code.get("values", {}).items() if name not in tensors]
    if missing:
        raise ValueError(f"the objective depends on {' and on '.join(missing)}, which is not recorded")
