"""A sweep's folder, read: one filter, one layer, all of them."""

import operator
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from featvis_func.io.animation import animate
from featvis_func.io.atomic import whole_path
from featvis_func.io.filter_spec import ranges
from featvis_func.rendering.result import Result
from featvis_func.sweep.layout import Folder, open_folder
from featvis_func.sweep.plan import LayerPlan, Unit, folder_of
from featvis_func.sweep.shard import STATUSES, Commit, read_commit
from featvis_func.sweep.validate import Status, failure_of, read_status
from featvis_func.validation import suggest


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
    snapshots: Tensor | None = None
    """uint8 ``(k, c, h, w)``, of a sweep that kept some: see :attr:`Result.snapshots`."""


class Rendered(NamedTuple):
    """A unit of a sweep, and whether it is done."""

    unit: Unit
    sha256: str | None
    """Of its shard; ``None`` where it is not done, or not sound."""
    problem: str | None
    """Why it failed, or what of it is damaged."""


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

    def shape(self, layer: str) -> tuple[int, ...]:
        """Of the layer's output for one image.

        Raises:
            ValueError: the sweep has no such layer.
        """
        return self._plan(layer).shape

    def units(self, layer: str) -> tuple[Rendered, ...]:
        """What a layer was cut into, and how far each is, by the sidecars.

        Raises:
            ValueError: the sweep has no such layer.
        """
        return tuple(self._rendered(unit) for unit in self._plan(layer).units)

    def entries(self, unit: Unit) -> Iterator[Entry]:
        """The filters of a unit; none where it is not done."""
        commit = self._commit(unit)
        if commit is not None:
            yield from self._entries(commit, unit.filters)

    def __getitem__(self, which: tuple[str, int]) -> Entry:
        """One filter, by the full name of its layer and its number.

        Raises:
            ValueError: the sweep has no such filter, or has not rendered it yet.
        """
        if not isinstance(which, tuple) or len(which) != 2:
            raise ValueError(f"expected a layer and the number of a filter, as in store['conv', 3], got {which!r}")
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
        """All filters that have been rendered, in the order of the plan."""
        for plan in self._plans.values():
            for unit in plan.units:
                yield from self.entries(unit)

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
            snapshots=whole.get("snapshots"),
        )

    def status(self) -> Status:
        """How far the sweep is, by its sidecars."""
        return read_status(self._folder)

    def animate(self, layer: str, filter: int, path: str | Path, *, seconds: float = 2.0, hold: float = 1.0) -> Path:
        """Writes one filter's snapshots as an animation: see :meth:`Result.animate`.

        Raises:
            ValueError: the sweep has no such filter or no snapshots, or as :func:`~featvis_func.animate`.
        """
        frames = self[layer, filter].snapshots
        if frames is None:
            raise ValueError("this sweep has no snapshots; sweep with snapshots=9, or as many as you like")
        return animate(frames, path, seconds=seconds, hold=hold)

    def export(self, out: str | Path, *layers: str) -> list[Path]:
        """Writes a folder of PNGs for each layer, as :meth:`Result.save <featvis_func.Result.save>` does.

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

    def _rendered(self, unit: Unit) -> Rendered:
        try:
            commit = self._sound_commit(unit)
        except ValueError as error:
            return Rendered(unit, None, str(error))
        if commit is None:
            return Rendered(unit, None, failure_of(self._folder, unit))
        return Rendered(unit, commit.sha256, None)

    def _commit(self, unit: Unit) -> Commit | None:
        """A unit's sidecar. A damaged unit is as one that is not done."""
        try:
            return self._sound_commit(unit)
        except ValueError as error:
            warnings.warn(f"left out: {error}; the next start of the sweep mends it", stacklevel=4)
            return None

    def _sound_commit(self, unit: Unit) -> Commit | None:
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
            films = shard.get_slice("snapshots") if "snapshots" in shard.keys() else None  # noqa: SIM118
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
                    None if films is None else films[row],
                )


def open_store(folder: str | Path) -> Store:
    """Opens what :func:`~featvis_func.sweep.sweep` has written, also while it is still writing.

    Raises:
        ValueError: it is no such folder, or its ``run.json`` is damaged.
    """
    return Store(open_folder(whole_path(folder)))


def _decoded(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()
