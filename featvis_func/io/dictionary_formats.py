"""The layouts in which libraries of sparse autoencoders save their weights.

Each library defines which axis of a matrix is which, so that nothing is inferred from sizes: an encoder ``W_enc`` is
``(d, n)``, everything else ``(n, d)``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featvis_func.io.dictionary_files import FileContents, read_config
from featvis_func.io.dictionary_overcomplete import read_overcomplete
from featvis_func.io.dictionary_parts import Parts, Warn, matrix, number, take

WEIGHTS_FILE = "sae_weights.safetensors"  # of SAELens
_SAELENS_CONFIG, _PRISMA_CONFIG = "cfg.json", "config.json"

_NORMALIZE = ("layer_norm", "constant_norm_rescale")

# What the architectures of SAELens apply to the pre-activations of one position.
_SAELENS_ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "gated": "gated",
}


def read_layout(contents: FileContents, file: Path, warn: Warn) -> Parts | None:
    """Read the weights of a library.

    Args:
        contents: of the file.
        file: its path, beside which two libraries write their settings.
        warn: called with a warning if an encoder is left out.

    Returns:
        The weights, or ``None`` if the file has no known layout.

    Raises:
        ValueError: If a tensor is missing or has another shape than the layout defines, or the settings are not
            supported.
    """
    state, root = contents.tensors, contents.root
    if contents.header is not None:
        return _read_saev(state, contents.header)
    if {"W_enc", "W_dec"} <= state.keys():
        config = root.get("cfg") if isinstance(root, dict) else None
        if isinstance(config, dict) or hasattr(config, "__dict__"):
            return _read_prisma(state, config if isinstance(config, dict) else vars(config), warn)
        if (settings := file.with_name(_SAELENS_CONFIG)).is_file() and file.suffix == ".safetensors":
            return _read_saelens(state, read_config(settings), warn)
        if (settings := file.with_name(_PRISMA_CONFIG)).is_file() and file.suffix != ".safetensors":
            return _read_prisma(state, read_config(settings), warn)
        return None
    if file.name == WEIGHTS_FILE and file.with_name(_SAELENS_CONFIG).is_file():
        raise ValueError(f"the weights of SAELens must have W_enc and W_dec; the file has {', '.join(state)}")
    return read_overcomplete(contents, warn)


def _count(value: Any, name: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _linear(
    library: str,
    state: Mapping[str, Tensor],
    *,
    d: int | None,
    centred: bool,
    activation: str,
    k: int | None = None,
    by_norm: bool = False,
) -> Parts:
    """A decoder and a linear encoder, as SAELens, ViT-Prisma and saev name them.

    Args:
        library: its name.
        state: tensors by name.
        d: number of channels according to the settings, if they state it.
        centred: whether the decoder's bias is subtracted from the activations.
        activation: as in :class:`Parts`, or ``"gated"``.
        k: of TopK.
        by_norm: whether the pre-activations are multiplied by the norms of the decoder's rows, which are then unit.
    """
    directions = matrix(state, "W_dec", d)
    n, d = directions.shape
    encoder = take(state, "W_enc", d, n, transpose=True)
    center = take(state, "b_dec", d) if centred else None
    if activation == "gated":
        # relu(e^r Wx + b_mag) where Wx + b_gate > 0 is JumpReLU of e^r Wx + b_mag, as both paths share W.
        gain = take(state, "r_mag", n).exp_()
        bias = take(state, "b_mag", n)
        threshold = bias - gain * take(state, "b_gate", n)
        return Parts(library, "W_dec", directions, encoder.mul_(gain[:, None]), bias, center, threshold, "jumprelu")
    bias = take(state, "b_enc", n)
    if by_norm:
        norms = directions.norm(dim=1).clamp_min_(1e-8)
        directions.div_(norms[:, None])
        encoder.mul_(norms[:, None])
        bias.mul_(norms)
    return Parts(library, "W_dec", directions, encoder, bias, center, None, activation, k)


def _read_saelens(state: Mapping[str, Tensor], config: dict[str, Any], warn: Warn) -> Parts:
    """Source: ``sae_lens/saes`` and ``sae_lens/loading/pretrained_sae_loaders.py``, SAELens 6.54.12."""
    library = "SAELens"
    architecture = str(config.get("architecture", "standard"))
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))  # before version 6
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if architecture == "standard" and function == "topk":
        architecture = "topk"
    if architecture not in _SAELENS_ACTIVATIONS or (function != "relu" and architecture != "topk"):
        raise ValueError(
            f"architecture {architecture!r} with activation {function!r} is not supported; expected"
            f" {', '.join(_SAELENS_ACTIVATIONS)} with relu (tensor='W_dec' reads the decoder alone)"
        )
    activation = _SAELENS_ACTIVATIONS[architecture]
    parts = _linear(
        library,
        state,
        d=config.get("d_in"),
        centred=config.get("apply_b_dec_to_input", True),
        activation=activation,
        k=_count(k, "k") if activation == "topk" else None,
        by_norm=architecture.endswith("topk") and bool(config.get("rescale_acts_by_decoder_norm")),
    )
    n = len(parts.directions)
    if architecture == "jumprelu":
        log = "threshold" not in state and "log_threshold" in state
        threshold = take(state, "log_threshold" if log else "threshold", n)
        parts = parts._replace(threshold=threshold.exp_() if log else threshold)
    elif architecture.endswith("batchtopk"):
        parts = parts._replace(threshold=torch.full((n,), number(state, "topk_threshold")))
    if "scaling_factor" in state and not bool((state["scaling_factor"] == 1).all()):
        if not config.get("finetuning_scaling_factor"):
            raise ValueError("there is a scaling_factor, but finetuning_scaling_factor is not set")
        parts.directions.mul_(take(state, "scaling_factor", n)[:, None])
    return _normalised(parts, config.get("normalize_activations"), warn)


def _normalised(parts: Parts, normalize: Any, warn: Warn) -> Parts:
    """The parts, with what SAELens and ViT-Prisma alike do to the activations first."""
    if normalize in _NORMALIZE:
        return parts._replace(normalize=normalize)
    if normalize not in (None, False, "none"):
        return parts.without_encoder(f"normalize_activations={normalize!r} changes the activations before it", warn)
    return parts


def _read_prisma(state: Mapping[str, Tensor], config: Mapping[str, Any], warn: Warn) -> Parts:
    """Source: ``vit_prisma/sae/sae.py`` of ViT-Prisma 2.0.0. A setting that is missing has the library's default."""
    library = "ViT-Prisma"
    architecture = "transcoder" if config.get("is_transcoder") else config.get("architecture", "standard")
    function = config.get("activation_fn_str", "topk")
    if (architecture, function) not in (("standard", "relu"), ("standard", "topk"), ("gated", "relu")):
        raise ValueError(
            f"architecture {architecture!r} with activation {function!r} is not supported; expected standard"
            " with relu or topk, or gated with relu (tensor='W_dec' reads the decoder alone)"
        )
    activation = "gated" if architecture == "gated" else function
    k = (config.get("activation_fn_kwargs") or {}).get("k")
    k = _count(k, "activation_fn_kwargs['k']") if function == "topk" else None
    parts = _linear(library, state, d=config.get("d_in"), centred=True, activation=activation, k=k)
    normalize = config.get("normalize_activations", "layer_norm")
    return parts._replace(normalize=normalize) if normalize in _NORMALIZE else parts  # any other does nothing there


def _read_saev(state: Mapping[str, Tensor], header: Mapping[str, Any]) -> Parts:
    """Source: ``saev/nn.py`` of saev 0.1.0, and ``saev/nn/modeling.py`` at commit 3d73f1f (schemas 1 to 5)."""
    library = "saev"
    old = "schema" not in header
    config = header if old else header.get("cfg")
    if not isinstance(config, Mapping):
        raise ValueError("the first line has no settings 'cfg'")
    choice = config.get("activation")
    if isinstance(choice, Mapping):
        name, options = choice.get("cls"), choice.get("params") or {}
    else:  # The class of the settings says it in the first form of schema 1.
        name, options = "Relu" if old else header.get("cls"), config
    activation = {"Relu": "relu", "TopK": "topk", "BatchTopK": "jumprelu"}.get(str(name))
    if activation is None:
        raise ValueError(f"activation {name!r} is not supported; expected Relu, TopK or BatchTopK")
    parts = _linear(
        library,
        state,
        d=config.get("d_model", config.get("d_vit")),
        centred=old,  # Later versions do not subtract the decoder's bias.
        activation=activation,
        k=_count(options.get("top_k", 32), "top_k") if activation == "topk" else None,
    )
    if activation == "jumprelu":
        threshold = number(state, "activation.threshold")
        parts = parts._replace(threshold=torch.full((len(parts.directions),), threshold))
    return parts
