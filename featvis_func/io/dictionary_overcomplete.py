"""The dictionaries of Overcomplete (KempnerInstitute/overcomplete)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featvis_func.io.dictionary_files import FileContents, SavedObject
from featvis_func.io.dictionary_parts import Parts, Warn, matrix, number, take

_FORMAT = "Overcomplete"
_DEFAULT_NORMALISATION = "normalize_l2"
# Rows of a trained dictionary are as long as the last step left them; another normalisation differs by more.
_UNIT_TOLERANCE = 0.05


def read_overcomplete(contents: FileContents, warn: Warn) -> Parts | None:
    """Read a sparse autoencoder, a dictionary layer or the dictionary of an NMF, or return ``None`` for other files.

    Source: ``overcomplete/sae`` and ``overcomplete/optimization`` of Overcomplete 0.3.0, in evaluation mode.

    Raises:
        ValueError: If a tensor has another shape than the library defines.
    """
    state, module = contents.tensors, _module(contents.root)
    prefix = "dictionary." if any(name.startswith("dictionary.") for name in state) else ""
    layer = _part(module, "dictionary") if prefix else module
    archetypal = {f"{prefix}{name}" for name in ("C", "W", "Relax")} <= state.keys()
    if f"{prefix}_weights" not in state and not archetypal:
        # The codes' weights W of convex NMF and archetypal analysis are not needed: D = W A is saved.
        d_alone = "D" in state and state.keys() <= {"D", "W"} and (module is not None or "W" in state)
        return Parts(_FORMAT, "D", matrix(state, "D")) if d_alone else None
    if archetypal:
        name, directions = f"{prefix}C", _archetypal(state, prefix, _attribute(layer, "delta"))
    else:
        name, directions = f"{prefix}_weights", matrix(state, f"{prefix}_weights")
        directions = _normalised(directions, _attribute(layer, "normalization"), warn)
    if f"{prefix}multiplier" in state:
        directions *= math.exp(number(state, f"{prefix}multiplier"))
    parts = Parts(_FORMAT, name, directions)
    return _with_encoder(parts, state, module, warn) if prefix else parts


def _module(root: Any) -> SavedObject | None:
    """The saved module, which a checkpoint may nest."""
    values = (root, *root.values()) if isinstance(root, Mapping) else (root,)
    return next((v for v in values if isinstance(v, SavedObject) and v.path.startswith("overcomplete.")), None)


def _attribute(module: SavedObject | None, name: str) -> Any:
    return None if module is None else vars(module).get(name)


def _part(module: SavedObject | None, name: str) -> SavedObject | None:
    return (_attribute(module, "_modules") or {}).get(name)


def _archetypal(state: Mapping[str, Tensor], prefix: str, delta: float | None) -> Tensor:
    """Convex combinations of points, each moved by at most ``delta``, which a state dict does not hold."""
    points = matrix(state, f"{prefix}C")
    weights = matrix(state, f"{prefix}W", len(points)).relu_()
    weights /= weights.sum(1, keepdim=True) + 1e-8
    moves = take(state, f"{prefix}Relax", len(weights), points.shape[1])
    if delta is not None:
        moves *= (delta / moves.norm(dim=1, keepdim=True)).clamp_max_(1)
    return moves.addmm_(weights, points)


def _normalised(rows: Tensor, function: Any, warn: Warn) -> Tensor:
    """Rows as the dictionary layer scales them before each use; a state dict does not tell how."""
    name = _DEFAULT_NORMALISATION if function is None else getattr(function, "__name__", "")
    norms = rows.norm(p=1 if name.endswith("l1") else 2, dim=1, keepdim=True)
    if function is None and bool(((norms - 1).abs() > _UNIT_TOLERANCE).any()):
        warn(
            f"{_FORMAT}: the directions are scaled to unit length, the default of the library, because a state dict"
            " does not hold their normalisation; save the module to keep it"
        )
    if name == "normalize_identity":
        return rows
    if name not in ("normalize_l2", "normalize_l1", "normalize_max_l2", "normalize_max_l1"):
        raise ValueError(f"the normalisation {name!r} of the dictionary is not known")
    return rows.div_(norms.amax() if "max" in name else norms + 1e-8)


def _with_encoder(parts: Parts, state: Mapping[str, Tensor], module: SavedObject | None, warn: Warn) -> Parts:
    """Add the encoder, if it is linear, and what follows it."""
    kind = "" if module is None else type(module).__name__
    n, d = parts.directions.shape
    names = {name for name in state if name.startswith("encoder.")}
    own = {name for name in names if not name.startswith("encoder.tied_to.")}
    if not names or kind in ("MpSAE", "OMPSAE"):  # Matching pursuit compares with the directions.
        return parts
    if own <= {"encoder.final_block.0.weight", "encoder.final_block.0.bias"}:
        stem = "encoder.final_block.0."
    elif own <= {"encoder.weight", "encoder.bias"}:
        stem = "encoder."
    else:
        return parts.without_encoder("it is more than one linear layer", warn)
    if kind == "QSAE" or "Q" in state:
        return parts.without_encoder("its activations are quantised", warn)
    last = _attribute(_part(module, "encoder"), "_modules") or {}
    if "final_activation" in last and type(last["final_activation"]).__name__ != "ReLU":
        return parts.without_encoder(f"its activation is {type(last['final_activation']).__name__}, not ReLU", warn)
    tied = own != names
    encoder = parts.directions.clone() if tied else take(state, f"{stem}weight", n, d)
    bias = take(state, f"{stem}bias", n) if f"{stem}bias" in state else None
    parts = parts._replace(encoder=encoder, encoder_bias=bias, activation="relu")
    if "thresholds" in state:  # their logarithms
        return parts._replace(activation="jumprelu", threshold=_below(take(state, "thresholds", n).exp_()))
    if kind == "BatchTopKSAE":
        threshold = _attribute(module, "running_threshold")
        if threshold is None:
            raise ValueError("the BatchTopKSAE has no running threshold, because it was never trained")
        return parts._replace(activation="jumprelu", threshold=_below(torch.full((n,), float(threshold))))
    if kind.endswith("TopKSAE"):
        return parts._replace(activation="topk", k=_attribute(module, "top_k"))
    return parts


def _below(threshold: Tensor) -> Tensor:
    """The largest numbers below, as this library also keeps what equals the threshold."""
    return threshold.nextafter(torch.tensor(-torch.inf))
