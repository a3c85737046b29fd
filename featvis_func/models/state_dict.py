"""Load a state dict from a file into a module."""

import re
import warnings
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from featvis_func.validation import first_line

# Entries that do not affect evaluation, so that a file may lack them.
_OPTIONAL = re.compile(r"^(aux|AuxLogits)|num_batches_tracked$")


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a state dict from a file into a module, in place.

    Args:
        module: the module to load the weights into.
        path: a ``.safetensors`` file, or a ``.pth`` or ``.pt`` file that contains only tensors. The latter may nest the
            state dict under ``state_dict`` or ``model``; a ``module.`` prefix of all names is removed.

    Raises:
        ValueError: If the file is missing, damaged or has another suffix, or if its names or shapes do not match the
            module. The module is unchanged then.
    """
    state = _read_state_dict(Path(path))
    expected = module.state_dict()
    mismatches = [
        *(f"no {name}" for name in expected if name not in state and not _OPTIONAL.search(name)),
        *(f"unknown {name}" for name in state if name not in expected),
        *(
            f"{name} is {tuple(state[name].shape)} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if name in state and state[name].shape != value.shape
        ),
    ]
    if mismatches:
        more = f", and {len(mismatches) - 3} more" if len(mismatches) > 3 else ""
        raise ValueError(
            f"weights {str(path)!r} are not of this architecture ({type(module).__name__}):"
            f" {', '.join(mismatches[:3])}{more}"
        )
    module.load_state_dict(state, strict=False)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a flat state dict from a file, on the CPU."""
    if not path.is_file():
        raise ValueError(f"no weights file {str(path)!r}")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"weights {str(path)!r} must be a .safetensors, .pth or .pt file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            # torch.load warns about the pickle protocol of damaged files, for which the error below is enough.
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged files raise many types of exceptions.
        raise ValueError(f"weights {str(path)!r} cannot be read: {first_line(error)}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(k, str) for k in state)
        or not all(isinstance(v, Tensor) for v in state.values())
    ):
        raise ValueError(f"weights {str(path)!r} hold no state dict of tensors")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state
