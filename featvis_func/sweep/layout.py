"""The folder that a sweep fills, what it is for, and what becomes of damaged files.

::

    run.json                                 what is rendered, and its hash; written once, by whoever comes first
    units/LAYER/FIRST-LAST-SHA.safetensors   images, activation maps, scores, history of some filters of one layer
    units/LAYER/FIRST-LAST.json              that one's checksum and size, and the scores; written last: with it the
                                             unit is done
    units/LAYER/FIRST-LAST.error.json        why a unit could not be rendered
    damaged/...                              files that were found damaged, set aside
    events/HOST-PROCESS.jsonl                what each process did, and when
    gallery/...                              the site to look through, where one was built

Any number of processes may work on one folder. A unit that is done twice has, as a rule, the same bytes and so the same
name; where rounding makes them differ, both shards are there, and the sidecar names one of them.
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

FORMAT = 1
RUN = "run.json"


@dataclass(frozen=True)
class Run:
    """What a folder is for: the content of ``run.json``."""

    config: dict[str, Any]
    plans: tuple[LayerPlan, ...]

    @functools.cached_property  # every unit that is read asks for it
    def hash(self) -> str:
        """Of the configuration: sha256 of its sorted JSON."""
        return hashlib.sha256(to_json(self.config)).hexdigest()

    @functools.cached_property
    def units(self) -> tuple[Unit, ...]:
        """All, in order."""
        return tuple(unit for plan in self.plans for unit in plan.units)


class Folder(NamedTuple):
    """A sweep's folder and what it is for."""

    path: Path
    run: Run

    def shard(self, unit: Unit, sha256: str) -> Path:
        """The tensors of a unit, by their checksum."""
        return self.path / "units" / f"{unit.name}-{sha256[:12]}.safetensors"

    def sidecar(self, unit: Unit) -> Path:
        """What says that the tensors are whole."""
        return self.path / "units" / f"{unit.name}.json"

    def failure(self, unit: Unit) -> Path:
        """What says that, and why, the unit could not be rendered."""
        return self.path / "units" / f"{unit.name}.error.json"


def to_json(value: Any) -> bytes:
    """Sorted JSON: equal values are equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sealed(value: Mapping[str, Any]) -> bytes:
    """JSON with its own checksum, one key a line."""
    seal = hashlib.sha256(to_json(value)).hexdigest()
    return (json.dumps({**value, "seal": seal}, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def unsealed(path: Path) -> dict[str, Any]:
    """Reads what :func:`sealed` made.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged.
    """
    try:
        value = json.loads(path.read_bytes())
        seal = value.pop("seal")
        digest = hashlib.sha256(to_json(value)).hexdigest()  # which refuses the NaN that damage may make of a number
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is damaged: {type(error).__name__}") from error
    if digest != seal:
        raise ValueError(f"{path.name} is damaged: its checksum is another")
    return value


def open_folder(path: Path) -> Folder:
    """The folder of a sweep that has begun.

    Raises:
        ValueError: there is none, its ``run.json`` is damaged, or another version wrote it.
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
    """Makes the folder of a sweep, or finds that of the same one.

    Args:
        path: of the folder; made if it is not there.
        run: what it shall be for. Of a sweep that has begun, its own units go on.

    Raises:
        ValueError: it holds another sweep; the message shows the difference.
        OSError: it cannot be written.
    """
    if path.is_file():
        raise ValueError(f"{str(path)!r} is a file; a sweep needs a folder")
    make_folder(path)
    try:
        return _same(open_folder(path), run) if (path / RUN).exists() else _new(path, run)
    except ValueError as error:
        if "is damaged" not in str(error):
            raise
    set_aside(path, path / RUN)
    return _new(path, run)


def _new(path: Path, run: Run) -> Folder:
    plan = [{**p._asdict(), "filters": ranges(p.filters)} for p in run.plans]
    value = {"format": FORMAT, "config": run.config, "hash": run.hash, "plan": plan, "versions": versions()}
    try:
        write_file(path / RUN, sealed(value), replace=False)
    except FileExistsError:  # another process was sooner
        return _same(open_folder(path), run)
    return Folder(path, run)


def _same(folder: Folder, run: Run) -> Folder:
    if folder.run.config == run.config:
        return folder
    old, new = _flat(folder.run.config), _flat(run.config)
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    lines = "".join(f"\n  {key}: {_shown(old.get(key))} there, {_shown(new.get(key))} asked for" for key in keys)
    raise ValueError(f"{str(folder.path)!r} holds another sweep:{lines}\nGive another folder, or the same options")


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without its inner levels."""
    inner = {f"{k}.{i}": v for k, own in config.items() if isinstance(own, dict) for i, v in own.items()}
    return {**{k: v for k, v in config.items() if not isinstance(v, dict)}, **inner}


def _shown(value: Any) -> str:
    text = to_json(value).decode()
    return text if len(text) <= 200 else f"{text[:90]} ... {text[-90:]}"


def set_aside(folder: Path, *paths: Path) -> list[Path]:
    """Moves damaged files out of the way, into ``damaged/``; nothing is deleted, and nothing there replaced."""
    moved = []
    for path in paths:
        place = folder / "damaged" / path.relative_to(folder)
        make_folder(place.parent)
        for number in range(10_000):
            target = place.with_name(f"{place.name}.{number}")
            try:
                move_file(path, target)
            except FileExistsError:
                continue
            except FileNotFoundError:  # not there, or another process was sooner
                break
            moved.append(target)
            break
    return moved


def log_event(folder: Path, event: str, **fields: Any) -> None:
    """Appends a line to this process's event log; no run ends because its log cannot be written."""
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
    """Of what the images depend on."""
    return {name: metadata.version(name) for name in ("featvis-func", "torch", "torchvision", "numpy")}


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
