"""Faster code for the CPU: Winograd convolutions, strided first convolutions, max pools, Inductor settings, malloc.

:func:`featvis_func.backbone.hardware.specialization` is the only place that imports this folder. The folder does not
depend on the rest of the library: it chooses functions by kernel and settings; the backbone puts them into its graph.
"""

from typing import Any

from featvis_func.cpu.inductor import compile_graph
from featvis_func.cpu.malloc import kept_memory
from featvis_func.cpu.ops import REPLACED_OPERATIONS, strided_stem
from featvis_func.cpu.winograd import add_packed_weights, winograd_3x3


def _replace_convolution(convolution: Any) -> Any:
    """Choose ``(function, arguments, packed)`` to compute a convolution faster; ``None`` leaves it as it is."""
    return strided_stem(convolution) or winograd_3x3(convolution)


# The fields of `featvis_func.backbone.hardware.Specialization`, in order.
SPECIALIZATION = (
    _replace_convolution,
    REPLACED_OPERATIONS,
    add_packed_weights,
    compile_graph,
    kept_memory,
)
