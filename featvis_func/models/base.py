"""What a model is, and what the roads to one share."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from featvis_func.validation import first_line

# The statistics of ImageNet's training images, as all of torchvision's classification presets state them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_SIZE = 224


class Model(NamedTuple):
    """A module and the input that it expects. Make one with :func:`~featvis_func.load_model`."""

    module: nn.Module
    """Never changed by this library: not its mode, hooks, flags, device, dtype or values."""
    name: str
    mean: tuple[float, ...]
    """Per channel: the module is given ``(image - mean) / std`` of an image in ``[0, 1]``."""
    std: tuple[float, ...]
    size: tuple[int, int]
    """``(h, w)`` of the input in pixels."""
    categories: tuple[str, ...] = ()
    """Names of the classes, where known."""
    weights: str = ""
    """Where the values come from, where known: the library's name for them, or a file's name and sha256."""

    @property
    def channels(self) -> int:
        """The number of image channels."""
        return len(self.mean)


class Request(NamedTuple):
    """What is asked of the road that a name leads to."""

    spec: str
    """As the user wrote it, which is the model's name."""
    rest: str
    """The part behind the first colon."""
    own_weights: bool
    """A file of weights follows, so that none need be fetched."""
    size: tuple[int, int] | None
    """``(h, w)`` that the user wants, for models that are built for one size."""


def needed(package: str, extra: str, spec: str) -> Any:
    """Imports a package that not everybody has installed.

    Raises:
        ValueError: it is missing, with what to install; or it does not import.
    """
    try:
        return import_module(package)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            why = f"the package {package}, which is not installed"
        else:
            why = f"the package {package}, which does not import ({first_line(error)})"
        raise ValueError(f"{spec!r} needs {why}: pip install 'featvis-func[{extra}]'") from error


@contextmanager
def same_random_weights() -> Iterator[None]:
    """What is drawn in the block is the same each time, and the caller's generator left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def place(rest: str) -> tuple[Path | None, str, str]:
    """The folder that a name means, if it means one; the name; and what follows its last ``@``.

    Raises:
        ValueError: it reads like a path, and there is no such folder.

    >>> place("google/vit-base-patch16-224@main")
    (None, 'google/vit-base-patch16-224', 'main')
    """
    name, at, behind = rest, "", ""
    if not rest:
        return None, "", ""
    if not Path(rest).expanduser().is_dir():  # whose own name may hold an @
        name, at, behind = rest.rpartition("@")
    if not at:
        name, behind = rest, ""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, name, behind
    if name.startswith((".", "~", os.sep)):
        raise ValueError(f"no folder {name!r}")
    return None, name, behind


def digest(files: Sequence[Path]) -> str:
    """What tells weights from others: the first file's name and its sha256; of several files, one over all theirs."""
    if not files:
        return ""
    sums = []
    for path in files:
        with open(path, "rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    whole = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
    return f"{files[0].name} sha256:{whole}"


def normalised(model: Model, mean: Sequence[float] | None, std: Sequence[float] | None) -> Model:
    """The model with the user's own mean and std, checked."""
    count = len(next(values for values in (mean, std, model.mean) if values is not None))

    def chosen(own: Sequence[float] | None, old: tuple[float, ...], neutral: float) -> tuple[float, ...]:
        if own is not None:
            return tuple(float(value) for value in own)
        return old if len(old) == count else (neutral,) * count

    new_mean, new_std = chosen(mean, model.mean, 0.0), chosen(std, model.std, 1.0)
    if len(new_mean) != len(new_std) or not new_mean or not all(s > 0 for s in new_std):
        raise ValueError(
            f"the normalisation needs one mean and one std above 0 per channel, got mean {new_mean}, std {new_std}"
        )
    return model._replace(mean=new_mean, std=new_std)


def fingerprint(module: nn.Module) -> str:
    """sha256 of a module's structure and of all its tensors; what its code does, it cannot tell.

    >>> fingerprint(nn.Linear(2, 2)) == fingerprint(nn.Linear(2, 2))
    False
    """
    digest = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", repr(module)).encode())
    values = {
        **{f"{name}.{key}": v for name, child in module.named_modules() for key, v in vars(child).items()},
        **dict(module.named_buffers()),  # those too that are not saved
        **module.state_dict(),
    }
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
