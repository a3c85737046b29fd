"""Read the results of a sweep: one filter, one layer, or all."""

import operator
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from featvis_func.io.animation import moving_of, write_moving
from featvis_func.io.atomic import absolute_path
from featvis_func.io.display import display_of
from featvis_func.io.filter_spec import ranges
from featvis_func.objective import Objective, channel
from featvis_func.rendering.result import Result
from featvis_func.sweep.families import Members, read_members, read_objective
from featvis_func.sweep.layout import DamagedError, Folder, open_folder
from featvis_func.sweep.plan import LayerPlan, Unit, folder_of
from featvis_func.sweep.shard import STATUSES, Commit, read_commit
from featvis_func.sweep.validate import Status, failure_of, read_status
from featvis_func.validation import suggest


class Entry(NamedTuple):
    """One filter's visualisation."""

    layer: str
    filter: int
    image: Tensor
    """float32 ``(c, h, w)`` in ``[0, 1]``; videos are ``(c, t, h, w)``, signals ``(c, t)``."""
    activation: Tensor
    """float32 ``(*positions)``: the filter's activation map."""
    score: float
    history: Tensor
    """float32 ``(steps,)``: the score at each step; NaN after the last one."""
    best_step: int
    steps: int
    status: str
    seed: int
    snapshots: Tensor | None = None
    """uint8, ``k`` images, if the sweep keeps snapshots: see :attr:`Result.snapshots`."""


class Rendered(NamedTuple):
    """State of one unit of a sweep."""

    unit: Unit
    sha256: str | None
    """Checksum of its shard; ``None`` if the unit is not done or is damaged."""
    problem: str | None
    """Why the unit failed, or what is damaged."""


class Store:
    """Results of a sweep, complete or not. Open one with :func:`open_store`; images are read on access.

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
        """Path of the sweep's folder."""
        return self._folder.path

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the run."""
        return self._folder.run.config

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names of the layers, in the model's order."""
        return tuple(self._plans)

    def filters(self, layer: str) -> tuple[int, ...]:
        """Return the filters of a layer that have been rendered, in ascending order.

        Raises:
            ValueError: The sweep has no such layer.
        """
        return tuple(f for unit in self._plan(layer).units if self._commit(unit) is not None for f in unit.filters)

    def shape(self, layer: str) -> tuple[int, ...]:
        """Return the shape of the layer's output for one image.

        Raises:
            ValueError: The sweep has no such layer.
        """
        return self._plan(layer).shape

    def members(self, layer: str) -> Members | None:
        """Return what is stored of a family's members, such as their names and directions; ``None`` for a layer.

        Raises:
            ValueError: The sweep has no such family.
            DamagedError: The family's file is missing or damaged.
        """
        self._plan(layer)
        return read_members(self._folder, layer)

    def objective(self, layer: str) -> Objective:
        """Return the objective of a family, made again from what the folder holds, or that of a layer's channels.

        Raises:
            ValueError: The sweep has no such family, or it is of the user's own, whose code is not recorded.
            DamagedError: The family's file is missing or damaged.
        """
        self._plan(layer)
        return read_objective(self._folder, layer) if layer in self.config.get("families", {}) else channel(layer)

    def units(self, layer: str) -> tuple[Rendered, ...]:
        """Return the units of a layer and the state of each, by the sidecars.

        Raises:
            ValueError: The sweep has no such layer.
        """
        return tuple(self._state(unit) for unit in self._plan(layer).units)

    def entries(self, unit: Unit) -> Iterator[Entry]:
        """Iterate over the filters of a unit; empty if the unit is not done."""
        commit = self._commit(unit)
        if commit is not None:
            yield from self._entries(commit, unit.filters)

    def __getitem__(self, which: tuple[str, int]) -> Entry:
        """Return one filter, by the full name of its layer and its number.

        Raises:
            ValueError: The sweep has no such filter, or has not rendered it yet.
        """
        if not isinstance(which, tuple) or len(which) != 2:
            raise ValueError(f"expected a layer and a filter number, as in store['conv', 3], got {which!r}")
        layer, number = which[0], operator.index(which[1])
        plan = self._plan(layer)
        unit = next((unit for unit in plan.units if number in unit.filters), None)
        if unit is None:
            raise ValueError(f"the sweep has no filter {number} of layer {layer!r}; it has {ranges(plan.filters)}")
        commit = self._commit(unit)
        if commit is None:
            raise ValueError(f"filter {number} of layer {layer!r} has not been rendered yet")
        return next(self._entries(commit, [number]))

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over all filters that have been rendered, in the order of the plan."""
        for plan in self._plans.values():
            for unit in plan.units:
                yield from self.entries(unit)

    def __len__(self) -> int:
        """Return the number of filters that have been rendered."""
        return sum(len(self.filters(layer)) for layer in self._plans)

    def layer(self, layer: str) -> Result:
        """Return all filters of a layer that have been rendered, as one :class:`Result`.

        Raises:
            ValueError: The sweep has no such layer, or has rendered none of its filters yet.
        """
        commits = [commit for unit in self._plan(layer).units if (commit := self._commit(unit)) is not None]
        if not commits:
            raise ValueError(f"no filter of layer {layer!r} has been rendered yet")
        parts: list[dict[str, Tensor]] = []
        for commit in commits:
            with self._open(commit) as shard:
                parts.append({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "seeds"}
        return Result(
            images=_to_float(tensors["images"]),
            activations=tensors["activations"],
            scores=tensors["scores"],
            best_step=tensors["best_step"],
            filters=tuple(tensors["filters"].tolist()),
            status=tuple(STATUSES[code] for code in tensors["status"].tolist()),
            history=tensors["history"].T.contiguous(),
            steps=tensors["steps"],
            config={**self.config, "layer": layer},
            snapshots=tensors.get("snapshots"),
        )

    def status(self) -> Status:
        """Return the progress of the sweep, by its sidecars."""
        return read_status(self._folder)

    def animate(
        self,
        layer: str,
        filter: int,
        path: str | Path,
        *,
        seconds: float | None = None,
        hold: float | None = None,
    ) -> Path:
        """Write one filter's snapshots, or its video, as an animation: see :meth:`Result.animate`.

        Raises:
            ValueError: The sweep has no such filter or nothing to play, or :func:`~featvis_func.animate` raises it.
        """
        entry = self[layer, filter]
        moving = moving_of(entry.image, entry.snapshots, display_of(self.config))
        if moving is None:
            raise ValueError("this sweep has no snapshots; sweep with snapshots=N to keep N images of each filter")
        return write_moving(path, moving, seconds, hold)

    def export(self, out: str | Path, *layers: str) -> list[Path]:
        """Write a folder of PNG files for each layer, as :meth:`Result.save <featvis_func.Result.save>` does.

        Args:
            out: Folder to write to; created if it does not exist.
            layers: Names of layers. Default: all layers with at least one rendered filter.

        Returns:
            Paths of the files.

        Raises:
            ValueError: A layer is unknown or has no rendered filter, or the folder cannot be written.
        """
        chosen = layers or [layer for layer in self.layers if self.filters(layer)]
        return [path for layer in chosen for path in self.layer(layer).save(Path(out) / folder_of(layer))]

    def _plan(self, layer: str) -> LayerPlan:
        if layer not in self._plans:
            raise ValueError(f"the sweep has no layer {layer!r}{suggest(layer, self.layers)}")
        return self._plans[layer]

    def _state(self, unit: Unit) -> Rendered:
        try:
            commit = self._cached_commit(unit)
        except DamagedError as error:
            return Rendered(unit, None, str(error))
        if commit is None:
            return Rendered(unit, None, failure_of(self._folder, unit))
        return Rendered(unit, commit.sha256, None)

    def _commit(self, unit: Unit) -> Commit | None:
        """Read a unit's sidecar; warn about a damaged unit and treat it as not done."""
        try:
            return self._cached_commit(unit)
        except DamagedError as error:
            warnings.warn(f"unit {unit.name!r} is left out: {error}; run the sweep again to repair it", stacklevel=4)
            return None

    def _cached_commit(self, unit: Unit) -> Commit | None:
        """Read a unit's sidecar once: a unit that is done does not change again."""
        if unit not in self._commits:
            commit = read_commit(self._folder, unit)
            if commit is None:
                return None
            self._commits[unit] = commit
        return self._commits[unit]

    def _open(self, commit: Commit) -> Any:
        """Open the shard, memory-mapped."""
        return safetensors.safe_open(self._folder.shard(commit.unit, commit.sha256), framework="pt")

    def _entries(self, commit: Commit, numbers: tuple[int, ...] | list[int]) -> Iterator[Entry]:
        records = {record["filter"]: (row, record) for row, record in enumerate(commit.records)}
        with self._open(commit) as shard:
            images, maps, history = (shard.get_slice(name) for name in ("images", "activations", "history"))
            snapshots = shard.get_slice("snapshots") if "snapshots" in shard.keys() else None  # noqa: SIM118
            for number in numbers:
                row, record = records[number]
                score = -torch.inf if record["score"] is None else record["score"]
                yield Entry(
                    commit.unit.layer,
                    number,
                    _to_float(images[row]),
                    maps[row],
                    score,
                    history[row],
                    record["best_step"],
                    record["steps"],
                    record["status"],
                    record["seed"],
                    None if snapshots is None else snapshots[row],
                )


def open_store(folder: str | Path) -> Store:
    """Open the folder of a :func:`~featvis_func.sweep.sweep`, which may still be running.

    Raises:
        DamagedError: Its ``run.json`` is damaged.
        ValueError: The path is not a sweep's folder.
    """
    return Store(open_folder(absolute_path(folder)))


def _to_float(image: Tensor) -> Tensor:
    """Convert stored images to float32 in ``[0, 1]``."""
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()
