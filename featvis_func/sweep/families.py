"""The families of objectives of a sweep: what is asked for, and the file in the folder that holds their members."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from featvis_func.io.atomic import make_folder, write_file
from featvis_func.models import Model
from featvis_func.objective import Family, Objective
from featvis_func.objective.expression import call
from featvis_func.objective.rebuild import from_code
from featvis_func.rendering.record import describe_code, describe_members, label_of, member_tensors
from featvis_func.rendering.spec import Selection, is_spec, parse_spec
from featvis_func.sweep.layout import DamagedError, Folder
from featvis_func.sweep.plan import folder_of

Requested = str | Objective | Selection
"""A layer's name, a pattern, or an objective in one line of text; or an objective; or some members of one."""


class Members(NamedTuple):
    """What a sweep's folder holds of the members of a family."""

    names: tuple[str, ...] | None
    tensors: dict[str, Tensor]
    """What the variables of the family's code stand for; the rows of a family of the user's own."""
    vectors: str | None
    """The tensor among these that holds each member's direction in the space of channels."""
    copies: int
    """Images of each member: image ``i`` is one of member ``i // copies``."""


def split_request(
    model: Model, layers: Requested | Iterable[Requested] | Mapping[str, Requested]
) -> tuple[str | list[str], dict[str, Selection]]:
    """Divide what a sweep is asked for into layers and families.

    Returns:
        The names and patterns of layers, or ``"all"``; and label -> family.

    Raises:
        ValueError: an objective that cannot be read, another kind of object, or two families with one label.
    """
    if isinstance(layers, str) and not is_spec(layers, model):
        return layers, {}
    labels: list[str | None] | None = None
    if isinstance(layers, Mapping):
        labels, layers = [str(label) for label in layers], list(layers.values())
    single = isinstance(layers, str | Objective | Selection) or not isinstance(layers, Iterable)
    names: list[Any] = []
    families: dict[str, Selection] = {}
    requested: list[Any] = [layers] if single else list(layers)  # type: ignore[list-item]
    for request, label in zip(requested, labels or [None] * len(requested), strict=True):
        if isinstance(request, str) and is_spec(request, model):
            request = parse_spec(request, model)
        if isinstance(request, Objective):
            request = Selection(request)
        if not isinstance(request, Selection):
            names.append(request)
            continue
        if not request.objective.layers:
            raise ValueError(f"{request.objective} reads no layer of the model; add an objective that does")
        label = label or request.label or label_of(request.objective)
        if label in families:
            raise ValueError(f"two families are called {label!r}; give them as a dictionary from labels to objectives")
        families[label] = request
    return names, families


def is_layer(objective: Objective) -> bool:
    """Whether an objective stands for the channels of a layer.

    >>> from featvis_func.objective import channel
    >>> is_layer(channel("conv")), is_layer(channel("conv", 3))
    (True, False)
    """
    return objective.family is None and objective.expression == call("channel", *objective.layers)


def describe_families(families: Mapping[str, Objective]) -> dict[str, dict[str, Any]]:
    """What a sweep's configuration records of its families, by label."""
    described: dict[str, dict[str, Any]] = {}
    for label, objective in families.items():
        described[label] = {**describe_code(objective), **describe_members(objective)}
        data = member_file(objective)
        if data is not None:
            digest = hashlib.sha256(data).hexdigest()
            described[label] |= {"file": f"members/{folder_of(label)}-{digest[:12]}.safetensors", "sha256": digest}
    return json.loads(json.dumps(described))  # as it is read back


def member_file(objective: Objective) -> bytes | None:
    """A family's names and tensors as a safetensors file; ``None`` where it has none. Equal families, equal bytes."""
    family = objective.family or Family("", {})
    tensors = member_tensors(objective)
    if not tensors and family.names is None:
        return None
    directions = None if family.vectors is None else family.rows[family.vectors]
    vectors = next((name for name, values in tensors.items() if values is directions), None)
    data: dict[str, Tensor] = {}
    same: dict[str, str] = {}  # variables of equal tensors, which are stored once
    for name, values in tensors.items():
        twin = next((n for n, other in data.items() if _equal(values, other)), None)
        if twin is None:
            data[name] = values.detach().to("cpu", copy=True).contiguous()
        else:
            same[name] = twin
    about = {"names": family.names, "vectors": vectors, "copies": family.copies, "same": same}
    return safetensors.torch.save(data, {"featvis": json.dumps(about)})


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.detach().cpu(), other)


def write_members(folder: Folder, families: Mapping[str, Objective]) -> None:
    """Write the file of each family into a sweep's folder, unless it is there.

    Raises:
        OSError: the folder cannot be written to.
    """
    for label, objective in families.items():
        path = member_path(folder, label)
        if path is None or is_sound(folder, label):
            continue
        data = member_file(objective)
        assert data is not None
        make_folder(path.parent)
        write_file(path, data)


def member_path(folder: Folder, label: str) -> Path | None:
    """Where a family's file is; ``None`` where it has none, or where the label is that of a layer."""
    name = folder.run.config.get("families", {}).get(label, {}).get("file")
    return None if name is None else folder.path / name


def read_objective(folder: Folder, label: str) -> Objective:
    """Make a family's objective again from what the folder records.

    Raises:
        ValueError: a family of the user's own, whose code is not recorded.
        DamagedError: the family's file is missing or damaged.
    """
    record = folder.run.config["families"][label]
    members = read_members(folder, label)
    objective = from_code(record["objective_code"] or {}, {} if members is None else members.tensors)
    if members is not None and objective.family is not None:
        objective = replace(objective, family=objective.family._replace(label=label, names=members.names))
    return objective


def is_sound(folder: Folder, label: str) -> bool:
    """Whether a family's file is complete."""
    path = member_path(folder, label)
    if path is None:
        return True
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return False
    return digest == folder.run.config["families"][label]["sha256"]


def read_members(folder: Folder, label: str) -> Members | None:
    """Read a family's file, memory-mapped; ``None`` where there is none.

    Raises:
        DamagedError: the file is missing or damaged.
    """
    path = member_path(folder, label)
    if path is None:
        return None
    if not is_sound(folder, label):
        raise DamagedError(f"{path.name} is missing or damaged; run the sweep again to write it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["featvis"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors |= {name: tensors[twin] for name, twin in about["same"].items()}
        names = None if about["names"] is None else tuple(about["names"])
        return Members(names, tensors, about["vectors"], about["copies"])
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise DamagedError(f"{path.name} is missing or damaged; run the sweep again to write it") from error
