"""The :class:`Model` type, and helpers that all model loaders share."""

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

from featvis_func.models.inputs import original
from featvis_func.validation import first_line

# Statistics of the ImageNet training images, as given by all classification presets of torchvision.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_SIZE = 224


class Model(NamedTuple):
    """A module and the input it expects. Create one with :func:`~featvis_func.load_model`."""

    module: nn.Module
    """Never modified by this library: its mode, hooks, ``requires_grad`` flags, device, dtype and values are kept."""
    name: str
    mean: tuple[float, ...]
    """Mean per channel: the module receives ``(image - mean) / std`` for an image in ``[0, 1]``."""
    std: tuple[float, ...]
    """Standard deviation per channel."""
    size: tuple[int, ...]
    """Input size: ``(h, w)`` in pixels; ``(t, h, w)`` for videos of ``t`` frames; ``(t,)`` for signals."""
    categories: tuple[str, ...] = ()
    """Class names, if known."""
    weights: str = ""
    """Origin of the weights, if known: the name used by the library they come from, or a file name and its SHA-256."""
    assumed: tuple[str, ...] = ()
    """What is not known and was assumed instead, among ``"size"``, ``"channels"``, ``"normalisation"`` and
    ``"inputs"``."""
    stated: tuple[str, ...] = ()
    """What the caller stated, in place of a preset: ``"normalisation"``, ``"size"``."""

    @property
    def channels(self) -> int:
        """The number of image channels."""
        return len(self.mean)


class LoadRequest(NamedTuple):
    """Arguments of a model loader."""

    spec: str
    """The full model specification, such as ``"timm:resnet50@none"``. It becomes the name of the model."""
    source: str
    """The part of ``spec`` after the first colon."""
    skip_pretrained: bool
    """Whether to skip the pretrained weights, because a weights file is loaded afterwards."""
    size: tuple[int, int] | None = None
    """Requested input size ``(h, w)``, for architectures that are built for a fixed size."""
    normalised: bool = False
    """Whether the caller states the normalisation, so that none has to be assumed."""
    whole: bool = False
    """Whether the caller states the inputs, which are those of the whole model and not of a part that takes images."""


def device_for(model: Model, requested: torch.device | str | None) -> torch.device:
    """The device to compute on: the requested one, or where the model is.

    >>> device_for(Model(nn.ReLU(), "relu", (0.0,), (1.0,), (8, 8)), None)
    device(type='cpu')
    """
    if requested is not None:
        return torch.device(requested)
    return next((parameter.device for parameter in model.module.parameters()), torch.device("cpu"))


def import_optional(package: str, extra: str, feature: str) -> Any:
    """Import an optional dependency.

    Args:
        package: name of the module to import.
        extra: the extra of this package that installs it.
        feature: what requires the package; used in the error message.

    Returns:
        The imported module.

    Raises:
        ValueError: If the package is not installed or fails to import.
    """
    try:
        return import_module(package)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            reason = f"the package {package}, which is not installed"
        else:
            reason = f"the package {package}, which fails to import ({first_line(error)})"
        raise ValueError(f"{feature!r} needs {reason}: pip install 'featvis-func[{extra}]'") from error


@contextmanager
def seeded_init() -> Iterator[None]:
    """Seed the CPU generator with 0 inside the block, and restore its previous state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the CUDA devices as well, for good.
        yield


def parse_source(source: str) -> tuple[Path | None, str, str]:
    """Split a model source ``NAME[@REVISION]`` or ``FOLDER[@REVISION]``.

    Args:
        source: the part of a model specification after its prefix.

    Returns:
        The folder, or ``None`` if the name is not an existing folder; the name; and the text after the last ``@``,
        which is empty if there is none.

    Raises:
        ValueError: If the name starts like a path, but no such folder exists.

    >>> parse_source("google/vit-base-patch16-224@main")
    (None, 'google/vit-base-patch16-224', 'main')
    """
    if not source:
        return None, "", ""
    name, separator, revision = source, "", ""
    if not Path(source).expanduser().is_dir():  # The name of a folder may contain an @ itself.
        name, separator, revision = source.rpartition("@")
    if not separator:
        name, revision = source, ""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, name, revision
    if name.startswith((".", "~", os.sep)):
        raise ValueError(f"no folder {name!r}")
    return None, name, revision


def file_digest(files: Sequence[Path]) -> str:
    """Identify weights files by content.

    Args:
        files: files to hash, in order.

    Returns:
        ``"NAME sha256:HASH"``, where ``NAME`` is the name of the first file. ``HASH`` is the hash of a single file, or
        the hash of the concatenated hashes of several files. The empty string if there are no files.
    """
    if not files:
        return ""
    hashes = []
    for path in files:
        with open(path, "rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    combined = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return f"{files[0].name} sha256:{combined}"


def fingerprint(module: nn.Module) -> str:
    """Compute the SHA-256 of a module's structure and tensors.

    The hash covers ``repr(module)``, the state dict, non-persistent buffers and tensor attributes. It does not cover
    the code of ``forward``.

    >>> fingerprint(nn.Linear(2, 2)) == fingerprint(nn.Linear(2, 2))
    False
    """
    digest = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", repr(module)).encode())
    modules = dict(module.named_modules())
    if original(module) is not module:  # A wrapped module is no child of its wrapper.
        modules["(wrapped)"] = original(module)
    values = {
        **{f"{name}.{key}": v for name, child in modules.items() for key, v in vars(child).items()},
        **dict(module.named_buffers()),  # The state dict lacks non-persistent buffers.
        **module.state_dict(),
    }
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
