"""A sweep's folder, read: one filter, one layer, all of them; and whether it is whole."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from featvis_func.files import is_temporary
from featvis_func.messages import suggest
from featvis_func.result import Result
from featvis_func.sweep.plan import LayerPlan, Unit, folder_of, ranges
from featvis_func.sweep.store import RUN, STATUSES, Commit, Folder, open_folder, read_commit, unsealed


class Entry(NamedTuple):
    """One filter's visualisation."""

    layer: str
    filter: int
    image: Tensor
    """float32 ``(c, h, w)`` in ``[0, 1]``."""
    activation: Tensor
    """float32: that filter's map, at the best step."""
    score: float
    history: Tensor
    """float32 ``(steps,)``; NaN after the last."""
    best_step: int
    steps: int
    status: str
    seed: int


class Status(NamedTuple):
    """How far a sweep is."""

    units: int
    done: int
    failed: dict[str, str]
    """Name of a unit that could not be rendered -> why."""
    filters: int
    filters_done: int
    damaged: dict[str, str]
    """Name of a unit whose files are not sound -> what is the matter."""
    odd: dict[str, int]
    """Statuses of filters other than ``"ok"`` -> how many."""

    @property
    def complete(self) -> bool:
        """Whether every unit is done."""
        return self.done == self.units


class Report(NamedTuple):
    """What :func:`validate` found."""

    status: Status
    orphans: tuple[str, ...]
    """Files that belong to no unit, by their paths in the folder."""
    spares: tuple[str, ...] = ()
    """Whole shards that the sidecars of their units do not name: of a process that was killed, or came second, and that
    rounds otherwise. They do no harm."""

    @property
    def sound(self) -> bool:
        """Complete, undamaged, and nothing else in the folder."""
        return self.status.complete and not self.status.damaged and not self.orphans


class Store:
    """The results of a sweep, complete or not. Make one with :func:`open_store`; images are read when asked for.

    >>> from featvis_func.sweep import sweep
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> _ = sweep("texturenet", "head", [3, 5], out=folder, steps=2, size=32)
    >>> store = open_store(folder)
    >>> store["head", 5].image.shape, store.layer("head").filters
    (torch.Size([3, 32, 32]), (3, 5))
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._plans = {plan.layer: plan for plan in folder.run.plans}
        self._commits: dict[Unit, Commit] = {}

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {len(self._plans)} layers of {self.config['model']})"

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    @property
    def config(self) -> dict[str, Any]:
        """What was rendered, and how."""
        return self._folder.run.config

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names, in the model's order."""
        return tuple(self._plans)

    def filters(self, layer: str) -> tuple[int, ...]:
        """The filters of a layer that have been rendered, in rising order.

        Raises:
            ValueError: the sweep has no such layer.
        """
        return tuple(f for unit in self._plan(layer).units if self._commit(unit) is not None for f in unit.filters)

    def __getitem__(self, which: tuple[str, int]) -> Entry:
        """One filter, by the full name of its layer and its number.

        Raises:
            ValueError: the sweep has no such filter, or has not rendered it yet.
        """
        layer, number = which
        plan = self._plan(layer)
        unit = next((unit for unit in plan.units if number in unit.filters), None)
        if unit is None:
            raise ValueError(f"the sweep has no filter {number} of layer {layer!r}; it has {ranges(plan.filters)}")
        commit = self._commit(unit)
        if commit is None:
            raise ValueError(f"filter {number} of layer {layer!r} has not been rendered yet")
        return next(self._entries(commit, [number]))

    def __iter__(self) -> Iterator[Entry]:
        """All filters that have been rendered, in the order of the plan."""
        for plan in self._plans.values():
            for unit in plan.units:
                commit = self._commit(unit)
                if commit is not None:
                    yield from self._entries(commit, unit.filters)

    def __len__(self) -> int:
        """The number of filters that have been rendered."""
        return sum(len(self.filters(layer)) for layer in self._plans)

    def layer(self, layer: str) -> Result:
        """All filters of a layer that have been rendered, as tensors.

        Raises:
            ValueError: the sweep has no such layer, or nothing of it yet.
        """
        commits = [commit for unit in self._plan(layer).units if (commit := self._commit(unit)) is not None]
        if not commits:
            raise ValueError(f"nothing of layer {layer!r} has been rendered yet")
        parts: list[dict[str, Tensor]] = []
        for commit in commits:
            with self._open(commit) as shard:
                parts.append({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "seeds"}
        return Result(
            images=_decoded(whole["images"]),
            activations=whole["activations"],
            scores=whole["scores"],
            best_step=whole["best_step"],
            filters=tuple(whole["filters"].tolist()),
            status=tuple(STATUSES[code] for code in whole["status"].tolist()),
            history=whole["history"].T.contiguous(),
            steps=whole["steps"],
            config={**self.config, "layer": layer},
        )

    def status(self) -> Status:
        """How far the sweep is, by its sidecars."""
        return read_status(self._folder)

    def export(self, out: str | Path, *layers: str) -> list[Path]:
        """Writes a folder of PNGs for each layer, as :meth:`Result.save <featvis_func.result.Result.save>` does.

        Args:
            out: a folder, made if it is not there.
            layers: which; default: all of which something has been rendered.

        Returns:
            The files written.

        Raises:
            ValueError: an unknown layer, or a folder that cannot be written.
        """
        chosen = layers or [layer for layer in self.layers if self.filters(layer)]
        return [path for layer in chosen for path in self.layer(layer).save(Path(out) / folder_of(layer))]

    def _plan(self, layer: str) -> LayerPlan:
        if layer not in self._plans:
            raise ValueError(f"the sweep has no layer {layer!r}{suggest(layer, self.layers)}")
        return self._plans[layer]

    def _commit(self, unit: Unit) -> Commit | None:
        """A unit's sidecar; one that is there does not change any more."""
        if unit not in self._commits:
            commit = read_commit(self._folder, unit)
            if commit is None:
                return None
            self._commits[unit] = commit
        return self._commits[unit]

    def _open(self, commit: Commit) -> Any:
        """The shard, memory-mapped."""
        return safetensors.safe_open(self._folder.shard(commit.unit, commit.sha256), framework="pt")

    def _entries(self, commit: Commit, numbers: tuple[int, ...] | list[int]) -> Iterator[Entry]:
        records = {record["filter"]: (row, record) for row, record in enumerate(commit.records)}
        with self._open(commit) as shard:
            images, maps, history = (shard.get_slice(name) for name in ("images", "activations", "history"))
            for number in numbers:
                row, record = records[number]
                score = -torch.inf if record["score"] is None else record["score"]
                yield Entry(
                    commit.unit.layer,
                    number,
                    _decoded(images[row]),
                    maps[row],
                    score,
                    history[row],
                    record["best_step"],
                    record["steps"],
                    record["status"],
                    record["seed"],
                )


def open_store(folder: str | Path) -> Store:
    """Opens what :func:`~featvis_func.sweep.sweep` has written, also while it is still writing.

    Raises:
        ValueError: it is no such folder, or its ``run.json`` is damaged.
    """
    return Store(open_folder(Path(folder)))


def read_status(folder: Folder, *, thorough: bool = False) -> Status:
    """How far a sweep is, by its sidecars.

    Args:
        folder: which.
        thorough: read every shard whole, against its checksum.
    """
    damaged: dict[str, str] = {}
    failed: dict[str, str] = {}
    odd: dict[str, int] = {}
    done = filters_done = 0
    for unit in folder.run.units:
        try:
            commit = read_commit(folder, unit, thorough=thorough)
        except ValueError as error:
            damaged[unit.name] = str(error)
            continue
        if commit is None:
            why = failure_of(folder, unit)
            if why is not None:
                failed[unit.name] = why
            continue
        done += 1
        filters_done += len(unit.filters)
        for record in commit.records:
            if record["status"] != "ok":
                odd[record["status"]] = odd.get(record["status"], 0) + 1
    filters = sum(len(plan.filters) for plan in folder.run.plans)
    return Status(len(folder.run.units), done, failed, filters, filters_done, damaged, odd)


def failure_of(folder: Folder, unit: Unit) -> str | None:
    """Why a unit could not be rendered, where that is so."""
    try:
        return str(unsealed(folder.failure(unit))["error"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        return f"unknown: {error}"


def validate(folder: str | Path) -> Report:
    """Checks a sweep's folder: every checksum, that nothing is missing, that nothing is there which should not be.

    Raises:
        ValueError: it is no such folder, or its ``run.json`` is damaged.
    """
    opened = open_folder(Path(folder))
    status = read_status(opened, thorough=True)
    known: set[Path] = {opened.path / RUN}
    for unit in opened.run.units:
        known |= {opened.sidecar(unit), opened.failure(unit)}
        if unit.name not in status.damaged:
            commit = read_commit(opened, unit)
            known |= {opened.shard(unit, commit.sha256)} if commit is not None else set()
    unknown = [p for p in opened.path.rglob("*") if p.is_file() and p not in known and not _aside(p, opened.path)]
    orphans = [
        p for p in sorted(unknown) if is_temporary(p) or not any(_of_unit(p, opened.path, n) for n in status.damaged)
    ]
    sidecars = {opened.sidecar(unit) for unit in opened.run.units}
    spares = [p for p in orphans if _is_spare(p, sidecars)]
    strangers = [p for p in orphans if p not in spares]
    return Report(status, *(tuple(str(p.relative_to(opened.path)) for p in some) for some in (strangers, spares)))


def _aside(path: Path, folder: Path) -> bool:
    return any(folder / name in path.parents for name in ("damaged", "events"))


def _is_spare(path: Path, sidecars: set[Path]) -> bool:
    """Whether a file is a whole shard of a unit that is done with another one: its name says its own checksum."""
    unit, _, checksum = path.stem.rpartition("-")
    sidecar = path.with_name(f"{unit}.json")
    if path.suffix != ".safetensors" or sidecar not in sidecars or not sidecar.exists():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(checksum) and bool(checksum)


def _of_unit(path: Path, folder: Path, name: str) -> bool:
    return str(path).startswith(str(folder / "units" / f"{name}-"))


def _decoded(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()
