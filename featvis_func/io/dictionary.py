"""Read a dictionary of directions, such as that of a sparse autoencoder, from a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featvis_func.io.dictionary_files import SUFFIXES, read_file
from featvis_func.io.dictionary_formats import WEIGHTS_FILE, read_layout
from featvis_func.io.dictionary_parts import Parts, owned
from featvis_func.validation import check_int, first_line, suggest, warn_caller

# How many names of tensors or files an error lists.
_MAX_LISTED = 12


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Directions in the space of a layer's channels, and the encoder that was trained with them.

    With an encoder, the pre-activation of member ``i`` is ``encoder[i] . (x - center) + encoder_bias[i]`` for the
    normalised activations ``x`` of one position, where a missing ``center`` or ``encoder_bias`` counts as zero. What
    the library scales, such as by the norms of the decoder's rows, is contained in these tensors. All tensors are
    float32, finite, contiguous and on the CPU.
    """

    directions: Tensor
    """``(n, d)``: member ``i`` in row ``i``; for a sparse autoencoder the decoder's rows. Rows may be all zero, as
    those of dead members are; not all of them are."""
    encoder: Tensor | None = None
    """``(n, d)``: the encoder's weight for member ``i`` in row ``i``; ``None`` if there is none, or if the library
    changes the activations before encoding in another way than by ``normalize`` and ``center``."""
    encoder_bias: Tensor | None = None
    """``(n,)``."""
    center: Tensor | None = None
    """``(d,)``: subtracted from the activations before encoding; ``None``: nothing is."""
    threshold: Tensor | None = None
    """``(n,)``: of JumpReLU, which keeps positive pre-activations above it."""
    activation: str = "none"
    """What the library applies to the pre-activations: ``"none"``, ``"relu"``, ``"topk"`` or ``"jumprelu"``."""
    k: int | None = None
    """How many members of a position TopK keeps."""
    normalize: str = "none"
    """What is done to the activations of a position before ``center`` is subtracted: ``"none"``, ``"layer_norm"`` or
    ``"constant_norm_rescale"``; see :func:`~featvis_func.objective.sae`."""
    names: tuple[str, ...] | None = None
    """Of the members, where there is a file of names; empty for a member without one."""
    format: str = ""
    """``"safetensors"``, ``"npy"``, ``"torch"``, or the library whose layout the file has: ``"SAELens"``,
    ``"Overcomplete"``, ``"ViT-Prisma"`` or ``"saev"``."""
    source: str = ""
    """The path as given and, where it has one, the name of the tensor of the directions, joined with a colon."""


def read_dictionary(
    path: str | Path, tensor: str | None = None, *, width: int | None = None, layer: str | None = None
) -> Dictionary:
    """Read a dictionary of directions. Code from the file is never run.

    Args:
        path: one of

            * a ``.safetensors``, ``.npy``, ``.pt`` or ``.pth`` file with a matrix ``(n, d)`` of floating-point numbers
              whose rows are the members; ``(d,)`` is one member. The latter two may nest it in dicts;
            * a folder written by SAELens (``cfg.json`` and ``sae_weights.safetensors``), or the weights in it. Of
              ``architecture`` ``standard``, ``topk``, ``jumprelu``, ``batchtopk``, ``matryoshka_batchtopk`` or
              ``gated``, which equals JumpReLU with other thresholds;
            * a module of Overcomplete, saved whole or as a state dict, or a dictionary of its NMF and related methods.
              A state dict does not tell how the dictionary is normalised, for which the default of the library
              (unit length) is taken, nor whether it is a TopK: ``activation`` is then ``"relu"``;
            * a ``.pt`` file of ViT-Prisma, or a state dict with its ``config.json`` in the same folder;
            * a ``.pt`` file of saev, which starts with a line of JSON.

            Names of the members are read from ``STEM.names.txt``, ``STEM.names.json``, ``names.txt`` or ``names.json``
            in the same folder, where ``STEM`` is the file's name without its suffix.
        tensor: the name of the matrix. It is then read as it is, whatever else the file holds. Default: the only
            matrix of the file, or what the library's layout defines.
        width: number of channels ``d`` of the layer, against which the orientation is checked.
        layer: the layer's name, for messages.

    Returns:
        The directions and, for a sparse autoencoder, its encoder. A warning says so if the encoder is left out.

    Raises:
        ValueError: If the file is missing, damaged or needs code to load; there is no such tensor, or a choice of
            several; the directions are not ``(n, width)``; there are none, or all are zero; a number is NaN or
            infinite, or no floating-point number; a library's file lacks a tensor or has settings that are not
            supported; or the number of names differs from that of the members.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(torch.eye(3)[:2], f"{folder}/axes.pt")
    ...     dictionary = read_dictionary(f"{folder}/axes.pt", width=3)
    >>> dictionary.directions
    tensor([[1., 0., 0.],
            [0., 1., 0.]])
    """
    file = _find_file(Path(path).expanduser(), path)
    contents = read_file(file)

    def warn(message: str) -> None:
        warn_caller(f"dictionary {str(path)!r}: {message}")

    try:
        parts = read_layout(contents, file, warn) if tensor is None else None
        recognised = parts is not None
        if parts is None:
            parts = _plain(contents.tensors, tensor, file.suffix)
    except ValueError as error:
        raise ValueError(f"dictionary {str(path)!r}: {error}") from error
    del contents  # The tensors of the file, of which there are copies by now.
    source = f"{path}:{parts.name}" if parts.name else str(path)
    _check_shape(parts.directions, source, width, layer, recognised)
    for name in ("directions", "encoder", "encoder_bias", "center", "threshold"):
        _check_finite(name, getattr(parts, name), source)
    if not bool(parts.directions.any()):
        raise ValueError(f"dictionary {source!r} has only zeros in all of its {len(parts.directions)} rows")
    names = _names_beside(file, len(parts.directions))
    return Dictionary(*parts[2:], names=names, format=parts.format, source=source)


def read_names(path: str | Path, count: int | None = None) -> tuple[str, ...]:
    """Read names of the members of a dictionary.

    Args:
        path: a ``.txt`` file with a name on each line, or a ``.json`` file with a list of names or an object of names
            by number, such as ``{"12": "dog"}``. Members without a name get an empty one.
        count: how many members there are. Default: as many as there are names, or one more than the largest number.

    Raises:
        ValueError: If the file is missing, has another suffix or contents, or another number of names than ``count``.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "names.json").write_text('{"1": "dog"}')
    ...     read_names(f"{folder}/names.json", count=3)
    ('', 'dog', '')
    """
    file = Path(path).expanduser()
    if file.suffix not in (".txt", ".json"):
        raise ValueError(f"names {str(path)!r} must be a .txt or .json file")
    if not file.is_file():
        raise ValueError(f"no file of names {str(path)!r}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        names = text.splitlines() if file.suffix == ".txt" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"names {str(path)!r} cannot be read: {first_line(error)}") from error
    if isinstance(names, dict):
        names = _by_number(names, path, count)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names {str(path)!r} must be a list of names, or an object of names by number")
    if count is not None and len(names) != count:
        raise ValueError(f"names {str(path)!r} has {len(names)} names, but the dictionary has {count} members")
    return tuple(name.strip() for name in names)


def _by_number(names: dict[str, Any], path: str | Path, count: int | None) -> list[Any]:
    """Names by number as a list."""
    for number in names:
        if not number.isdecimal():
            raise ValueError(f"names {str(path)!r} must be numbered from 0, got {number!r}")
    numbers = {int(number): name for number, name in names.items()}
    count = max(numbers, default=-1) + 1 if count is None else check_int("count", count, 0)
    if numbers and max(numbers) >= count:
        raise ValueError(f"names {str(path)!r} names member {max(numbers)}, but the dictionary has {count} members")
    return [numbers.get(number, "") for number in range(count)]


def _names_beside(file: Path, count: int) -> tuple[str, ...] | None:
    for name in (f"{file.stem}.names.txt", f"{file.stem}.names.json", "names.txt", "names.json"):
        if (file.parent / name).is_file():
            return read_names(file.parent / name, count)
    return None


def _find_file(path: Path, given: str | Path) -> Path:
    """The file to read: the path itself, or the one of a folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"no dictionary {str(given)!r}: expected a file, or a folder with one")
    # ViT-Prisma writes how often the members are active beside each checkpoint; SAELens likewise.
    ignored = ("_log_feature_sparsity.pt", "sparsity.safetensors")
    files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES and not f.name.endswith(ignored))
    weights = path / WEIGHTS_FILE
    if weights in files:
        return weights
    if len(files) != 1:
        exist = f"several: {_listed([f.name for f in files])}; give the path of one" if files else "none"
        raise ValueError(
            f"folder {str(given)!r} must hold one {', '.join(SUFFIXES)} file or {WEIGHTS_FILE}, has {exist}"
        )
    return files[0]


def _plain(tensors: Mapping[str, Tensor], tensor: str | None, suffix: str) -> Parts:
    """One matrix of a file, its rows as they are."""
    if tensor is None:
        fitting = [name for name, value in tensors.items() if value.ndim == 2] or list(tensors)
        if len(fitting) > 1:
            shapes = _listed([f"{name} {tuple(value.shape)}" for name, value in tensors.items()])
            raise ValueError(f"which tensor holds the directions is not clear; name one with tensor=: {shapes}")
        (tensor,) = fitting
    elif tensor not in tensors:
        exist = _listed([name for name in tensors if name])
        known = f"expected one of {exist}{suggest(tensor, list(tensors))}" if exist else "its only tensor has no name"
        raise ValueError(f"there is no tensor {tensor!r}; {known}")
    value = tensors[tensor]
    if value.ndim not in (1, 2) or 0 in value.shape:
        raise ValueError(f"{tensor or 'the tensor'} must be a matrix (n, d) of directions, got {tuple(value.shape)}")
    kind = {".safetensors": "safetensors", ".npy": "npy"}.get(suffix, "torch")
    return Parts(kind, tensor, owned(value if value.ndim == 2 else value[None], tensor or "the tensor"))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def _check_shape(directions: Tensor, source: str, width: int | None, layer: str | None, recognised: bool) -> None:
    """Check that there are directions, and that they have a number for each channel."""
    n, d = directions.shape
    if width is None or d == check_int("width", width, 1):
        return
    channels = f"layer {layer!r} has {width} channels" if layer is not None else f"the layer has {width} channels"
    message = (
        f"dictionary {source!r} is ({n}, {d}), {n} directions of {d} numbers, but {channels}: expected (n, {width})"
    )
    if n == width and not recognised:
        message += f"; its members are columns: save the transpose ({d}, {n}), `matrix.T.contiguous()`"
    raise ValueError(message)


def _check_finite(name: str, value: Tensor | None, source: str) -> None:
    if value is None:
        return
    # Unlike isfinite, the extremes of rows need no memory of the size of a matrix.
    low, high = torch.aminmax(value.reshape(len(value), -1), dim=1)
    bad = ~(low.isfinite() & high.isfinite())
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        of = f" of {name.replace('_', ' ')}" if name != "directions" else ""
        raise ValueError(
            f"dictionary {source!r} has NaN or infinite numbers in {int(bad.sum())} of {len(value)} rows{of}, the first"
            f" of which is row {first}"
        )
