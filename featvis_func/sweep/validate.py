"""Progress of a sweep, and validation of its folder."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from featvis_func.io.atomic import absolute_path, is_temporary
from featvis_func.sweep.families import is_sound, member_path
from featvis_func.sweep.layout import RUN, DamagedError, Folder, open_folder, unsealed
from featvis_func.sweep.plan import Unit
from featvis_func.sweep.shard import read_commit


class Status(NamedTuple):
    """Progress of a sweep."""

    units: int
    """Number of units in the plan."""
    done: int
    """Number of units that are done."""
    failed: dict[str, str]
    """Name of each unit that could not be rendered -> the error."""
    filters: int
    filters_done: int
    damaged: dict[str, str]
    """Name of each unit with damaged or missing files -> what is wrong."""
    odd: dict[str, int]
    """Status other than ``"ok"`` -> number of filters that have it."""
    noun: str = "filters"
    """What is rendered: ``"filters"`` of layers, ``"members"`` of families, or ``"images"`` of both, or of facets."""

    @property
    def complete(self) -> bool:
        """Whether every unit is done."""
        return self.done == self.units


class Report(NamedTuple):
    """Result of :func:`validate`."""

    status: Status
    orphans: tuple[str, ...]
    """Files that belong to no unit, as paths relative to the folder."""
    spares: tuple[str, ...] = ()
    """Undamaged shards that the sidecar of their unit does not name. A process that was killed, or that rendered the
    same unit with other rounding, leaves them; they do no harm."""

    @property
    def sound(self) -> bool:
        """Whether the sweep is complete, nothing is damaged, and no file belongs to no unit."""
        return self.status.complete and not self.status.damaged and not self.orphans


def read_status(folder: Folder, *, thorough: bool = False) -> Status:
    """Determine the progress of a sweep from its sidecars.

    Args:
        folder: The sweep's folder.
        thorough: Verify the checksum of every shard.
    """
    damaged: dict[str, str] = {}
    failed: dict[str, str] = {}
    odd: dict[str, int] = {}
    done = filters_done = 0
    for unit in folder.run.units:
        try:
            commit = read_commit(folder, unit, thorough=thorough)
        except DamagedError as error:
            damaged[unit.name] = str(error)
            continue
        if commit is None:
            error = failure_of(folder, unit)
            if error is not None:
                failed[unit.name] = error
            continue
        done += 1
        filters_done += len(unit.filters)
        for record in commit.records:
            if record["status"] != "ok":
                odd[record["status"]] = odd.get(record["status"], 0) + 1
    filters = sum(len(plan.filters) for plan in folder.run.plans)
    return Status(len(folder.run.units), done, failed, filters, filters_done, damaged, odd, _noun(folder))


def _noun(folder: Folder) -> str:
    """What the sweep renders, see :class:`Status`."""
    families = folder.run.config.get("families", {})
    if not families:
        return "filters"
    only_members = families.keys() >= {plan.layer for plan in folder.run.plans}
    return "members" if only_members and all(family["group"] == 1 for family in families.values()) else "images"


def failure_of(folder: Folder, unit: Unit) -> str | None:
    """Return the recorded error of a unit that could not be rendered, or ``None`` if no error is recorded."""
    try:
        return str(unsealed(folder.failure(unit))["error"])
    except FileNotFoundError:
        return None
    except (DamagedError, KeyError) as error:
        return f"unknown: {error}"


def validate(folder: str | Path) -> Report:
    """Check a sweep's folder: verify every checksum, and look for missing files and for files that do not belong there.

    Raises:
        DamagedError: Its ``run.json`` is damaged.
        ValueError: The path is not a sweep's folder.
    """
    opened = open_folder(absolute_path(folder))
    status = read_status(opened, thorough=True)
    known: set[Path] = {opened.path / RUN}
    for label in opened.run.config.get("families", {}):
        path = member_path(opened, label)
        if path is not None:
            known.add(path)
            if not is_sound(opened, label):
                status.damaged[str(path.relative_to(opened.path))] = "its members are missing or damaged"
    for unit in opened.run.units:
        known |= {opened.sidecar(unit), opened.failure(unit)}
        if unit.name not in status.damaged:
            commit = read_commit(opened, unit)
            known |= {opened.shard(unit, commit.sha256)} if commit is not None else set()
    unknown = [p for p in opened.path.rglob("*") if p.is_file() and p not in known and not _is_extra(p, opened.path)]
    # Which of the shards of a damaged unit is the right one cannot be told: none of them counts as an orphan.
    unowned = [
        p
        for p in sorted(unknown)
        if is_temporary(p) or not any(_is_shard_of(p, opened.path, n) for n in status.damaged)
    ]
    sidecars = {opened.sidecar(unit) for unit in opened.run.units}
    spares = [p for p in unowned if _is_spare(p, sidecars)]
    orphans = [p for p in unowned if p not in spares]
    return Report(status, *(tuple(str(p.relative_to(opened.path)) for p in paths) for paths in (orphans, spares)))


def _is_extra(path: Path, folder: Path) -> bool:
    """Whether a file is in one of the folders that hold no units."""
    return any(folder / name in path.parents for name in ("damaged", "events", "gallery"))


def _is_spare(path: Path, sidecars: set[Path]) -> bool:
    """Whether a file is an undamaged shard, whose name holds its checksum, of a unit that has a sidecar."""
    unit, _, checksum = path.stem.rpartition("-")
    sidecar = path.with_name(f"{unit}.json")
    if path.suffix != ".safetensors" or sidecar not in sidecars or not sidecar.exists():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(checksum) and bool(checksum)


def _is_shard_of(path: Path, folder: Path, name: str) -> bool:
    """Whether the name of a file is that of a shard of the unit ``name``."""
    return str(path).startswith(str(folder / "units" / f"{name}-"))
