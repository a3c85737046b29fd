"""Write one unit into a sweep's folder, and read whether it is done."""

import contextlib
import hashlib
import os
import platform
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from featvis_func.io.atomic import make_folder, write_file
from featvis_func.io.pil import to_uint8
from featvis_func.rendering.result import Result
from featvis_func.sweep.layout import FORMAT, DamagedError, Folder, now, sealed, to_json, unsealed, versions
from featvis_func.sweep.plan import Unit

STATUSES = ("ok", "dead", "nonfinite", "flat")
"""Status of a filter by its code in a shard, from 0. New ones are appended, so that old codes keep their meaning."""
DTYPES = {"uint8": torch.uint8, "float16": torch.float16}
"""Types in which images can be stored."""


class Commit(NamedTuple):
    """Content of the sidecar of a unit that is done."""

    unit: Unit
    size: int
    sha256: str
    modified: int
    """Modification time of the shard, in nanoseconds."""
    records: tuple[dict[str, Any], ...]
    """One dictionary per filter: its number, score, best step, number of steps, status and seed."""


def stored_images(images: Tensor, dtype: str) -> Tensor:
    """Convert images, on their device, to the type in which they are stored; as they are if they have it.

    Args:
        images: Float in ``[0, 1]``, or of the stored type.
        dtype: A name of :data:`DTYPES`.

    >>> stored_images(torch.tensor([-0.1, 0.5, 1.0]), "uint8").tolist()
    [0, 128, 255]
    """
    if images.dtype == torch.uint8:
        return images
    return to_uint8(images) if dtype == "uint8" else images.clamp(0, 1).to(DTYPES[dtype])


def pack(folder: Folder, unit: Unit, result: Result, seeds: list[int]) -> bytes:
    """Serialise a unit to the bytes of a safetensors file; equal results give equal bytes.

    Args:
        folder: The sweep's folder.
        unit: The unit.
        result: Results of the unit's filters, in the unit's order; the images may be :func:`stored_images`.
        seeds: Seed of each filter.
    """
    config = folder.run.hash
    tensors = {
        "images": stored_images(result.images, folder.run.config["image_dtype"]).cpu(),
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
    metadata = {"format": FORMAT, "layer": unit.layer, "config": config, "status": STATUSES}
    # A single key, because safetensors does not keep the order of several.
    return safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, {"featvis": to_json(metadata).decode()}
    )


def commit(
    folder: Folder, unit: Unit, result: Result, seeds: list[int], *, seconds: float, packed: bytes | None = None
) -> Commit:
    """Write the shard of a unit, then its sidecar, which marks the unit as done.

    Args:
        folder: The sweep's folder.
        unit: The unit.
        result: Results of the unit's filters, in the unit's order.
        seeds: Seed of each filter.
        seconds: Time that rendering took; recorded in the sidecar.
        packed: What :func:`pack` returns for the unit. Default: it is called.

    Raises:
        OSError: A file could not be written; the unit is then not done, unless only the last step failed.
    """
    data = pack(folder, unit, result, seeds) if packed is None else packed
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
    written = Commit(unit, len(data), sha256, path.stat().st_mtime_ns, records)
    value = {
        "format": FORMAT,
        "config": folder.run.hash,
        "layer": unit.layer,
        "records": list(records),
        "size": written.size,
        "sha256": written.sha256,
        "versions": versions(),
        "written": {"host": platform.node(), "at": now(), "seconds": round(seconds, 3), "modified": written.modified},
    }
    write_file(folder.sidecar(unit), sealed(value))
    folder.failure(unit).unlink(missing_ok=True)
    return written


def read_commit(folder: Folder, unit: Unit, *, thorough: bool = False) -> Commit | None:
    """Read the sidecar of a unit and check the shard that it names.

    Args:
        folder: The sweep's folder.
        unit: The unit.
        thorough: Verify the checksum of the shard in any case. By default it is verified only if the shard's
            modification time differs from the recorded one.

    Returns:
        The content of the sidecar, or ``None`` if there is no sidecar: the unit is not done.

    Raises:
        DamagedError: The sidecar or the shard is damaged, the shard is missing, or the sidecar belongs to another run
            or another unit.
    """
    sidecar = folder.sidecar(unit)
    try:
        value = unsealed(sidecar)
    except FileNotFoundError:
        return None
    if value.get("config") != folder.run.hash or value.get("format") != FORMAT:
        raise DamagedError(f"{sidecar.name} belongs to another run")
    records = tuple(value["records"])
    if value["layer"] != unit.layer or tuple(r["filter"] for r in records) != unit.filters:
        raise DamagedError(f"{sidecar.name} describes other filters than its name says")
    recorded = Commit(unit, value["size"], value["sha256"], value["written"]["modified"], records)
    shard = folder.shard(unit, recorded.sha256)
    try:
        state = shard.stat()
    except FileNotFoundError as error:
        raise DamagedError(f"{shard.name} is missing, but its sidecar exists") from error
    if state.st_size != recorded.size:
        raise DamagedError(f"{shard.name} is damaged: it has {state.st_size} bytes instead of {recorded.size}")
    if thorough or state.st_mtime_ns != recorded.modified:
        with shard.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != recorded.sha256:
            with contextlib.suppress(OSError):
                os.utime(shard)  # a changed time makes the next sweep, which is not thorough, verify the checksum too
            raise DamagedError(f"{shard.name} is damaged: its checksum does not match the sidecar")
    return recorded


def record_failure(folder: Folder, unit: Unit, error: str, attempts: int, *, refused: bool = False) -> None:
    """Record why a unit could not be rendered, and whether this is because its layer cannot be."""
    path = folder.failure(unit)
    make_folder(path.parent)
    value = {"format": FORMAT, "layer": unit.layer, "filters": list(unit.filters), "error": error}
    value["refused"] = refused
    write_file(path, sealed({**value, "attempts": attempts, "host": platform.node(), "at": now()}))
