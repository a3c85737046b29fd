"""One unit in a sweep's folder: how it is written, and when it counts as done."""

import contextlib
import hashlib
import os
import platform
from typing import Any, NamedTuple

import safetensors.torch
import torch

from featvis_func.io.atomic import make_folder, write_file
from featvis_func.io.pil import to_uint8
from featvis_func.rendering.result import Result
from featvis_func.sweep.layout import FORMAT, Folder, now, sealed, to_json, unsealed, versions
from featvis_func.sweep.plan import Unit

STATUSES = ("ok", "dead", "nonfinite")
"""The codes of a shard's ``status``, from 0."""
DTYPES = {"uint8": torch.uint8, "float16": torch.float16}
"""How images are stored."""


class Commit(NamedTuple):
    """A unit's sidecar, read and found whole."""

    unit: Unit
    size: int
    sha256: str
    modified: int
    """Of the shard, in nanoseconds."""
    records: tuple[dict[str, Any], ...]
    """One per filter: its number, score, best step, steps, status and seed."""


def pack(unit: Unit, result: Result, seeds: list[int], *, dtype: str, config: str) -> bytes:
    """A unit as the bytes of a safetensors file; equal results are equal bytes.

    Args:
        unit: whose filters the result has, in order.
        result: of the unit.
        seeds: of each filter.
        dtype: of the images, one of :data:`DTYPES`.
        config: hash of the run's configuration.
    """
    images = result.images.clamp(0, 1)
    tensors = {
        "images": to_uint8(images) if dtype == "uint8" else images.to(DTYPES[dtype]),
        "activations": result.activations.float(),
        "scores": result.scores.float(),
        "history": result.history.float().T,
        "best_step": result.best_step,
        "steps": result.steps,
        "status": torch.tensor([STATUSES.index(status) for status in result.status], dtype=torch.uint8),
        "filters": torch.tensor(unit.filters),
        "seeds": torch.tensor(seeds, dtype=torch.uint64),
    }
    if result.snapshots is not None:
        tensors["snapshots"] = result.snapshots
    about = {"format": FORMAT, "layer": unit.layer, "config": config, "status": STATUSES}
    # One key: safetensors keeps no order among several.
    return safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, {"featvis": to_json(about).decode()}
    )


def commit(folder: Folder, unit: Unit, result: Result, seeds: list[int], *, seconds: float) -> Commit:
    """Writes a unit: its shard, then its sidecar, with which it is done.

    Raises:
        OSError: nothing that counts was written.
    """
    data = pack(unit, result, seeds, dtype=folder.run.config["image_dtype"], config=folder.run.hash)
    sha256 = hashlib.sha256(data).hexdigest()
    path = folder.shard(unit, sha256)
    make_folder(path.parent)
    write_file(path, data)
    columns = zip(
        unit.filters, result.scores.tolist(), result.best_step.tolist(), result.steps.tolist(), result.status, seeds,
        strict=True,
    )  # fmt: skip
    records = tuple(
        {"filter": f, "score": s if abs(s) < float("inf") else None, "best_step": b, "steps": n, "status": w, "seed": d}
        for f, s, b, n, w, d in columns
    )
    done = Commit(unit, len(data), sha256, path.stat().st_mtime_ns, records)
    value = {
        "format": FORMAT,
        "config": folder.run.hash,
        "layer": unit.layer,
        "records": list(records),
        "size": done.size,
        "sha256": done.sha256,
        "versions": versions(),
        "written": {"host": platform.node(), "at": now(), "seconds": round(seconds, 3), "modified": done.modified},
    }
    write_file(folder.sidecar(unit), sealed(value))
    folder.failure(unit).unlink(missing_ok=True)
    return done


def read_commit(folder: Folder, unit: Unit, *, thorough: bool = False) -> Commit | None:
    """Whether a unit is done.

    Args:
        folder, unit: which.
        thorough: read the whole shard, and not only where its size or its time of modification are others than those
            noted.

    Returns:
        What its sidecar says; ``None`` where there is no sidecar.

    Raises:
        ValueError: one of the two files is damaged, missing or of another run.
    """
    sidecar = folder.sidecar(unit)
    try:
        value = unsealed(sidecar)
    except FileNotFoundError:
        return None
    if value.get("config") != folder.run.hash or value.get("format") != FORMAT:
        raise ValueError(f"{sidecar.name} belongs to another run")
    records = tuple(value["records"])
    if value["layer"] != unit.layer or tuple(r["filter"] for r in records) != unit.filters:
        raise ValueError(f"{sidecar.name} is of other filters than its name says")
    found = Commit(unit, value["size"], value["sha256"], value["written"]["modified"], records)
    shard = folder.shard(unit, found.sha256)
    try:
        state = shard.stat()
    except FileNotFoundError as error:
        raise ValueError(f"{shard.name} is missing, though its sidecar is there") from error
    if state.st_size != found.size:
        raise ValueError(f"{shard.name} is damaged: it has {state.st_size} bytes instead of {found.size}")
    if thorough or state.st_mtime_ns != found.modified:
        with shard.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != found.sha256:
            with contextlib.suppress(OSError):
                os.utime(shard)  # so that the next sweep, which goes by that time, finds it too
            raise ValueError(f"{shard.name} is damaged: its checksum is another")
    return found


def record_failure(folder: Folder, unit: Unit, error: str, attempts: int) -> None:
    """Notes that a unit could not be rendered, and why."""
    path = folder.failure(unit)
    make_folder(path.parent)
    value = {"format": FORMAT, "layer": unit.layer, "filters": list(unit.filters), "error": error}
    write_file(path, sealed({**value, "attempts": attempts, "host": platform.node(), "at": now()}))
