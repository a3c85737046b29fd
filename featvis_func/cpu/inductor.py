"""Inductor as this library's steps want it: what is known of its inside stands here, and nowhere else."""

import inspect
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor


def compile_graph(graph: Any, inputs: Sequence[Any], *, settings: dict[str, Any]) -> Any:
    """A backend of ``torch.compile``: Inductor, which on the CPU leaves ``grid_sample`` to torch.

    Written out it makes a dozen passes over the pixels there, which take 15 to 20 of 360 ms of a GoogLeNet step longer.
    Nor does it arrange the images' three channels like the many of a backbone, which arranges them by itself: that
    would cost one or two hundredths.

    Args:
        graph, inputs: as ``torch.compile`` gives them.
        settings: Inductor's options.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.lowering import make_fallback

    # Otherwise Inductor inlines up to a hundred operations of the random generator into each other: 100 instead of 25 s.
    settings = {"realize_opcount_threshold": 10, **settings}
    # Before, as in torch 2.11, an operation that has a rule was always written out.
    chooses = "get_decomp_fn" in inspect.signature(make_fallback).parameters
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    if on_cpu and any(map(_is_arranged, tensors)):
        settings = {"layout_optimization": False, **settings}
    return compile_fx(graph, inputs, config_patches=settings, decompositions=_Rules() if chooses and on_cpu else None)


def _is_arranged(tensor: Tensor) -> bool:
    """Whether it is a kernel in the layout that a backbone's graph puts them in."""
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


class _Rules(dict[Any, Any]):
    """How Inductor writes operations out, but for ``grid_sample``."""

    def __init__(self) -> None:
        from torch._inductor.decomposition import select_decomp_table

        super().__init__(select_decomp_table())
        self.pop(torch.ops.aten.grid_sampler_2d.default, None)

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()  # for the key of Inductor's cache, into which the rules' own functions cannot go
