"""Inductor with the settings that make a step fast on the CPU. Only this module relies on Inductor's internals."""

import inspect
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

GRID_SAMPLE = torch.ops.aten.grid_sampler_2d.default


def compile_graph(graph: Any, inputs: Sequence[Any], *, settings: dict[str, Any]) -> Any:
    """A backend of ``torch.compile``: Inductor, which calls torch's own ``grid_sample`` instead of decomposing it.

    Decomposed, ``grid_sample`` makes a dozen passes over the pixels, which add 15 to 20 ms to the 360 ms of a GoogLeNet
    step. Where the graph holds a backbone, whose kernels are in channels-last layout already, Inductor's own layout
    optimisation is off: it would convert the three channels of the images too, which costs 1 to 2 % of a step.

    Args:
        graph, inputs: as ``torch.compile`` passes them; all tensors are on the CPU.
        settings: options of Inductor; they take precedence over those set here.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.lowering import lowerings, make_fallback

    # By default Inductor inlines up to a hundred operations of the random generator into one another, and compiles for
    # 100 s instead of 25 s.
    settings = {"realize_opcount_threshold": 10, **settings}
    if any(_is_channels_last(value) for value in inputs if isinstance(value, Tensor)):
        settings = {"layout_optimization": False, **settings}
    # torch 2.11 decomposes every operation that has a decomposition, whatever table it is given.
    has_choice = "get_decomp_fn" in inspect.signature(make_fallback).parameters
    if has_choice and GRID_SAMPLE not in lowerings:
        # Otherwise Inductor does so itself while it compiles, but fails where the environment has CI set, as on most
        # continuous integration services.
        make_fallback(GRID_SAMPLE, warn=False, override_decomp=True)
    return compile_fx(graph, inputs, config_patches=settings, decompositions=_Decompositions() if has_choice else None)


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is a kernel in the memory layout that the backbone stores kernels in."""
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


class _Decompositions(dict[Any, Any]):
    """Inductor's table of decompositions without ``grid_sample``."""

    def __init__(self) -> None:
        from torch._inductor.decomposition import select_decomp_table

        super().__init__(select_decomp_table())
        self.pop(GRID_SAMPLE, None)

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        # For the key of Inductor's cache: the functions in the table cannot be pickled.
        return type(self), ()
