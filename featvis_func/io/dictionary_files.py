"""Read the tensors of a file, and the names and settings stored with them, without running code from the file."""

import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from featvis_func.validation import first_line

SUFFIXES = (".safetensors", ".npy", ".pt", ".pth")

# Libraries whose saved objects are read as plain attributes, and the modules that such objects consist of.
_READ_AS_DATA = ("overcomplete.", "vit_prisma.", "torch.nn.modules.")
# Names under which checkpoints nest a state dict.
_WRAPPERS = ("state_dict", "model")
# Upper bound of the length of a header in bytes, so that a damaged file is not read as one line.
_MAX_HEADER = 1 << 20


class SavedObject:
    """An object in a pickle: the attributes of the original, and none of its code.

    A subclass stands for each class or function that the pickle names; ``path`` is the full name of the original.
    """

    path = ""

    def __new__(cls, *args: Any) -> "SavedObject":
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass


class FileContents(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    """By name; the name of a nested one is joined with dots, that of a file's only tensor may be empty."""
    root: Any = None
    """The saved object, of a file written by ``torch.save``."""
    header: dict[str, Any] | None = None
    """The line of JSON before the state dict, if there is one."""


def read_file(path: Path) -> FileContents:
    """Read a ``.safetensors``, ``.npy``, ``.pt`` or ``.pth`` file on the CPU.

    Raises:
        ValueError: If the file is damaged, has another suffix, holds no tensors, or is a pickle that needs code.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"dictionary {str(path)!r} must be a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    try:
        contents = _read(path)
    except _NeedsCodeError as error:
        raise ValueError(
            f"dictionary {str(path)!r} is a pickle that needs code ({error}), which is never run; save a state dict or"
            " the matrix alone"
        ) from error
    except Exception as error:  # Damaged files raise many types of exceptions.
        raise ValueError(f"dictionary {str(path)!r} cannot be read: {first_line(error)}") from error
    if not contents.tensors:
        raise ValueError(f"dictionary {str(path)!r} holds no tensors")
    return contents


def read_config(path: Path) -> dict[str, Any]:
    """Read the settings that a library writes beside its weights.

    Raises:
        ValueError: If the file is no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"settings {str(path)!r} cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"settings {str(path)!r} must be a JSON object, got a {type(config).__name__}")
    return config


class _NeedsCodeError(Exception):
    """A pickle names classes or functions of which nothing is known."""


def _read(path: Path) -> FileContents:
    if path.suffix == ".safetensors":
        return FileContents(safetensors.torch.load_file(path))
    if path.suffix == ".npy":
        return FileContents({"": _from_numpy(np.load(path, allow_pickle=False))})
    with path.open("rb") as file:
        header = None
        if file.peek(1)[:1] == b"{":
            header = json.loads(file.readline(_MAX_HEADER))
            root = _load_pickle(BytesIO(file.read()))
        else:
            root = _load_pickle(file)
    return FileContents(dict(_flatten(_unwrap(root))), root, header)


def _from_numpy(array: np.ndarray) -> Tensor:
    # torch knows neither the other byte order nor the types that it has no name for.
    if array.dtype.kind == "f" and (not array.dtype.isnative or array.dtype.itemsize > 8):
        array = array.astype(np.float64)
    return torch.from_numpy(array)


def _load_pickle(file: Any) -> Any:
    """Load what ``torch.save`` wrote; objects of known libraries become :class:`SavedObject`."""
    start = file.tell()
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # The older format, or a damaged file: torch.load decides.
        names = []
    unknown = [name for name in names if not name.startswith(_READ_AS_DATA)]
    if unknown:
        raise _NeedsCodeError(", ".join(sorted(unknown)[:3]))
    classes = [(type(name.rpartition(".")[2], (SavedObject,), {"path": name}), name) for name in names]
    file.seek(start)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(classes):  # pyright: ignore
            # torch.load warns about the pickle protocol of damaged files, for which the error is enough.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error):
            raise _NeedsCodeError(str(error).partition("Unsupported global: ")[2].split()[1]) from error
        raise


def _unwrap(root: Any) -> Any:
    """The state dict in a checkpoint, without the prefix of a parallel module."""
    for wrapper in _WRAPPERS:
        if isinstance(root, dict) and isinstance(root.get(wrapper), dict | SavedObject):
            root = root[wrapper]
    if isinstance(root, dict) and root and all(str(name).startswith("module.") for name in root):
        root = {name.removeprefix("module."): value for name, value in root.items()}
    return root


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, lists and modules, with their names joined with dots.

    >>> list(_flatten({"a": {"b": torch.ones(1)}, "c": [torch.zeros(1)], "k": 3}))
    [('a.b', tensor([1.])), ('c.0', tensor([0.]))]
    """
    if isinstance(value, Tensor):
        yield name, value
        return
    if isinstance(value, SavedObject):
        parts = (vars(value).get(kind) or {} for kind in ("_parameters", "_buffers", "_modules"))
        items = [item for part in parts for item in part.items()]
    elif isinstance(value, Mapping):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list | tuple) else []
    for key, part in items:
        yield from _flatten(part, f"{name}.{key}" if name else str(key))
