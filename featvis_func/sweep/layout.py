"""Layout of a sweep's folder: its paths, its configuration, its event log, and the handling of damaged files.

::

    run.json                                 configuration of the run and its hash; written once, by the first process
    units/LAYER/FIRST-LAST-SHA.safetensors   shard: images, activation maps, scores and history of one unit
    units/LAYER/FIRST-LAST.json              sidecar: checksum and size of the shard, and the scores; written last: a
                                             unit is done when its sidecar exists
    units/LAYER/FIRST-LAST.error.json        why a unit could not be rendered
    members/FAMILY-SHA.safetensors           what tells the members of a family apart: a matrix of directions, names
    damaged/...                              damaged files, moved out of the way
    events/HOST-PROCESS.jsonl                event log of each process
    gallery/...                              the static site, if one was built

Any number of processes may work on one folder. If two processes render the same unit, their shards normally have the
same bytes and therefore the same name. If rounding makes them differ, both shards exist and the sidecar names one.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from featvis_func.io.atomic import make_folder, move_file, write_file
from featvis_func.io.filter_spec import filter_numbers, ranges
from featvis_func.sweep.plan import LayerPlan, Unit

FORMAT = 2
RUN = "run.json"


class DamagedError(ValueError):
    """A file of a sweep is damaged, missing, or does not belong to the unit or the run whose name it has."""


@dataclass(frozen=True)
class Run:
    """The configuration and the plan of a sweep: the content of ``run.json``."""

    config: dict[str, Any]
    plans: tuple[LayerPlan, ...]

    @functools.cached_property  # read_commit compares it for every unit
    def hash(self) -> str:
        """SHA-256 of the configuration as sorted JSON."""
        return hashlib.sha256(to_json(self.config)).hexdigest()

    @functools.cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units, in the order of the plan."""
        return tuple(unit for plan in self.plans for unit in plan.units)


class Folder(NamedTuple):
    """A sweep's folder together with its run."""

    path: Path
    run: Run

    def shard(self, unit: Unit, sha256: str) -> Path:
        """Path of the unit's tensors; the name contains their checksum."""
        return self.path / "units" / f"{unit.name}-{sha256[:12]}.safetensors"

    def sidecar(self, unit: Unit) -> Path:
        """Path of the JSON file whose existence marks the unit as done."""
        return self.path / "units" / f"{unit.name}.json"

    def failure(self, unit: Unit) -> Path:
        """Path of the JSON file that records why the unit could not be rendered."""
        return self.path / "units" / f"{unit.name}.error.json"


def to_json(value: Any) -> bytes:
    """Serialise to sorted JSON: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sealed(value: Mapping[str, Any]) -> bytes:
    """Serialise to JSON with one key per line, and add the checksum of the other entries under ``"seal"``."""
    seal = hashlib.sha256(to_json(value)).hexdigest()
    return (json.dumps({**value, "seal": seal}, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def unsealed(path: Path) -> dict[str, Any]:
    """Read a file that :func:`sealed` serialised, and verify its checksum.

    Raises:
        FileNotFoundError: The file does not exist.
        DamagedError: The file is not such JSON, or its checksum does not match.
    """
    try:
        value = json.loads(path.read_bytes())
        seal = value.pop("seal")
        digest = hashlib.sha256(
            to_json(value)
        ).hexdigest()  # to_json rejects NaN, which damage can put in place of a number
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedError(f"{path.name} is damaged: {type(error).__name__}") from error
    if digest != seal:
        raise DamagedError(f"{path.name} is damaged: its checksum does not match its content")
    return value


def open_folder(path: Path) -> Folder:
    """Open the folder of a sweep that was started before.

    Raises:
        DamagedError: Its ``run.json`` is damaged.
        ValueError: The path is not a sweep's folder, or a version with another format wrote it.
    """
    try:
        value = unsealed(path / RUN)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{str(path)!r} is not the folder of a sweep: it has no {RUN}") from error
    if value.get("format") != FORMAT:
        raise ValueError(f"{str(path / RUN)!r} has format {value.get('format')!r}; this version reads {FORMAT}")
    plans = [
        LayerPlan(
            p["layer"], tuple(p["shape"]), tuple(filter_numbers(p["filters"]) or ()), p["batch_size"], p["unit_size"]
        )
        for p in value["plan"]
    ]
    return Folder(path, Run(value["config"], tuple(plans)))


def start_folder(path: Path, run: Run) -> Folder:
    """Create the folder of a sweep, or open it if it holds the same sweep. A damaged ``run.json`` is written again.

    Args:
        path: Path of the folder; created if it does not exist.
        run: Configuration and plan. If the folder exists, the plan stored there is used.

    Raises:
        ValueError: The folder holds a sweep with another configuration; the message lists the differences.
        OSError: The folder cannot be written.
    """
    if path.is_file():
        raise ValueError(f"{str(path)!r} is a file; a sweep needs a folder")
    make_folder(path)
    try:
        return _open_same(path, run) if (path / RUN).exists() else _create(path, run)
    except DamagedError:
        set_aside(path, path / RUN)
    return _create(path, run)


def _create(path: Path, run: Run) -> Folder:
    """Write ``run.json``, unless another process has written it first."""
    plan = [{**p._asdict(), "filters": ranges(p.filters)} for p in run.plans]
    value = {"format": FORMAT, "config": run.config, "hash": run.hash, "plan": plan, "versions": versions()}
    try:
        write_file(path / RUN, sealed(value), replace=False)
    except FileExistsError:
        return _open_same(path, run)
    return Folder(path, run)


def _open_same(path: Path, run: Run) -> Folder:
    """Open the folder and check that it has the configuration of ``run``."""
    folder = open_folder(path)
    if folder.run.config == run.config:
        return folder
    old, new = _flatten(folder.run.config), _flatten(run.config)
    pools = "render.smooth_pools"
    if pools not in old and new.get("render.optimizer") != "default" and new.get(pools) != "yes":
        new.pop(pools, None)  # of a version whose pools were never smoothed, as they are not here
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if not keys:  # An option that an earlier version did not have, at its default.
        return folder
    lines = "".join(
        f"\n  {key}: {_format_value(old.get(key))} in the folder, {_format_value(new.get(key))} requested"
        for key in keys
    )
    raise ValueError(f"{str(path)!r} holds a sweep with other options:{lines}\nUse another folder, or the same options")


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Replace each nested dictionary by entries ``"outer.inner"``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = _flatten(value) if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": entry for name, entry in inner.items()} if inner else {key: value}
    return flat


def _format_value(value: Any) -> str:
    """Return the JSON of a value, abbreviated to 200 characters."""
    text = to_json(value).decode()
    return text if len(text) <= 200 else f"{text[:90]} ... {text[-90:]}"


def set_aside(folder: Path, *paths: Path) -> list[Path]:
    """Move damaged files into ``damaged/`` and return their new paths; no file is deleted or replaced."""
    moved = []
    for path in paths:
        base = folder / "damaged" / path.relative_to(folder)
        make_folder(base.parent)
        for number in range(10_000):
            target = base.with_name(f"{base.name}.{number}")
            try:
                move_file(path, target)
            except FileExistsError:
                continue
            except FileNotFoundError:  # it never existed, or another process has moved it
                break
            moved.append(target)
            break
    return moved


def log_event(folder: Path, event: str, **fields: Any) -> None:
    """Append a line to this process's event log. A log that cannot be written does not stop the run."""
    line = to_json({"at": now(), "event": event, **fields}) + b"\n"
    name = f"{platform.node().split('.')[0] or 'host'}-{os.getpid()}.jsonl"
    with contextlib.suppress(OSError):
        make_folder(folder / "events")
        handle = os.open(folder / "events" / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that the images depend on."""
    return {name: metadata.version(name) for name in ("featvis-func", "torch", "torchvision", "numpy")}


def now() -> str:
    """Return the time in UTC, in ISO format, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
