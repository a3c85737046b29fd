"""How far a sweep is, and whether its folder is whole."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from featvis_func.io.atomic import is_temporary, whole_path
from featvis_func.sweep.layout import RUN, Folder, open_folder, unsealed
from featvis_func.sweep.plan import Unit
from featvis_func.sweep.shard import read_commit


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
    opened = open_folder(whole_path(folder))
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
    return any(folder / name in path.parents for name in ("damaged", "events", "gallery"))


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
