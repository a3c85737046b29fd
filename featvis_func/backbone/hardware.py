"""The faster code that a type of device has. The only module that imports :mod:`featvis_func.cpu`.

Without that folder, and without the branch in :func:`specialization` that imports it, the library works as before, with
the same results up to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from featvis_func.backbone.pooling import REPLACED
from featvis_func.types import Weights


class Convolution(NamedTuple):
    """A 2-D convolution of a traced graph, without its images."""

    kernel: Tensor
    """``(d, c / groups, kh, kw)``."""
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int


class Specialization(NamedTuple):
    """How a type of device runs a backbone, and the steps that use it."""

    replace_convolution: Callable[[Convolution], tuple[Callable[..., Tensor], tuple[Any, ...], tuple[str, ...]] | None]
    """A convolution -> ``(function, arguments, forms)``, to compute ``function(images, kernel, bias, *arguments,
    *packed)`` instead; ``packed`` are the packed weights ``"kernel.form"``, each a tensor or ``None``. ``None``: no
    faster function exists."""
    replace_operation: Mapping[Any, Callable[..., Any]]
    """Operation of a traced graph -> what replaces it, with the same arguments."""
    pack_weights: Callable[[Weights, Sequence[str]], Weights]
    """(weights, names ``"kernel.form"`` of packed weights) -> the weights with these packed weights added."""
    compile_graph: Callable[..., Any]
    """``(graph, inputs, settings=)``: a backend of ``torch.compile``."""
    retain_memory: Callable[[], AbstractContextManager[None]]
    """A context manager in which the process keeps the memory that a step frees, for the next step."""


def specialization(device_type: str) -> Specialization:
    """Return the specialization for a type of device.

    Args:
        device_type: such as ``"cpu"`` or ``"cuda"``.

    >>> specialization("cuda") is GENERIC
    True
    """
    if device_type == "cpu":
        from featvis_func import cpu

        return Specialization(*cpu.SPECIALIZATION)
    return GENERIC


def compile_graph(graph: Any, inputs: Sequence[Any], *, settings: dict[str, Any]) -> Any:
    """A backend of ``torch.compile``: Inductor with the settings of the device that the inputs are on.

    Args:
        graph, inputs: as ``torch.compile`` passes them.
        settings: options of Inductor; they take precedence over those of the device.
    """
    devices = {value.device.type for value in inputs if isinstance(value, Tensor)}
    device_type = devices.pop() if len(devices) == 1 else ""
    return specialization(device_type).compile_graph(graph, inputs, settings=settings)


def _inductor(graph: Any, inputs: Sequence[Any], *, settings: dict[str, Any]) -> Any:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches=settings)


GENERIC = Specialization(
    replace_convolution=lambda convolution: None,
    replace_operation=REPLACED,
    pack_weights=lambda weights, names: dict(weights),
    compile_graph=_inductor,
    retain_memory=nullcontext,
)
"""Runs on every device."""
