"""What only a CPU gains from: Winograd's algorithm, a strided stem, pooling kept whole, rules for Inductor, and malloc.

:func:`featvis_func.backbone.hardware.specialization` is the one place that imports this folder. It knows nothing of the
rest of the library: it chooses operations by kernels and settings, and the backbone puts them into its graph.
"""

from typing import Any

from featvis_func.cpu.inductor import compile_graph
from featvis_func.cpu.malloc import kept_memory
from featvis_func.cpu.ops import replaces_operations, strided_stem
from featvis_func.cpu.winograd import add_packed_weights, winograd_3x3


def _replace_convolution(convolution: Any) -> Any:
    """The function that computes a convolution faster, its arguments and the names of its packed weights, or ``None``."""
    return strided_stem(convolution) or winograd_3x3(convolution)


# The fields of `featvis_func.backbone.hardware.Specialization`, in order.
SPECIALIZATION = (
    _replace_convolution,
    replaces_operations(),
    True,
    add_packed_weights,
    compile_graph,
    kept_memory,
)
