"""Weights from a file into a module, with one clear error for each way in which that can fail."""

import re
import warnings
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from featvis_func.validation import first_line

# Parameters that evaluation never touches, so that a file may lack them.
_OPTIONAL = re.compile(r"^(aux|AuxLogits)|num_batches_tracked$")


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Loads a state dict from a file into a module.

    Args:
        module: what the weights go into.
        path: ``.safetensors``, or ``.pth``/``.pt`` holding tensors (bare, or under ``state_dict`` or ``model``; a
            ``module.`` before every name is dropped).

    Raises:
        ValueError: the file is missing, damaged, of another kind, or of another architecture.
    """
    found = _read_weights(Path(path))
    expected = module.state_dict()
    problems = [
        *(f"no {name}" for name in expected if name not in found and not _OPTIONAL.search(name)),
        *(f"unknown {name}" for name in found if name not in expected),
        *(
            f"{name} is {tuple(found[name].shape)} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if name in found and found[name].shape != value.shape
        ),
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"weights {str(path)!r} are not of this architecture ({type(module).__name__}):"
            f" {', '.join(problems[:3])}{more}"
        )
    module.load_state_dict(found, strict=False)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """A flat state dict from a file, on the CPU."""
    if not path.is_file():
        raise ValueError(f"no weights file {str(path)!r}")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"weights {str(path)!r} must be a .safetensors, .pth or .pt file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol; the error says enough
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in any way there is
        raise ValueError(f"weights {str(path)!r} cannot be read: {first_line(error)}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(k, str) for k in found)
        or not all(isinstance(v, Tensor) for v in found.values())
    ):
        raise ValueError(f"weights {str(path)!r} hold no state dict of tensors")
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return found
