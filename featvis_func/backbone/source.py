"""A model, copied, run and traced once, from which the backbones of any of its layers are cut."""

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featvis_func.backbone.calls import check_constant_calls, count_calls
from featvis_func.backbone.export import Traced, UnknownOperationError, trace, why_not_exported
from featvis_func.backbone.hooks import Backbone, example_images, float_outputs, hook_backbone
from featvis_func.backbone.layers import LayerRef, parse_layer
from featvis_func.backbone.truncate import release, truncate
from featvis_func.backbone.user_hooks import changing_hooks, detach, user_hooks
from featvis_func.backbone.verify import Reference, compare, find_mismatch, reference_of, reference_of_graph
from featvis_func.models import Model
from featvis_func.models.copying import private_copy
from featvis_func.types import Weights
from featvis_func.validation import first_line, warn_caller


class Source(NamedTuple):
    """A private copy of a model and its trace. Make one with :func:`make_source`."""

    model: Model
    module: nn.Module
    refs: dict[str, LayerRef]
    """Requested layer name -> layer."""
    calls: Mapping[LayerRef, int]
    """Layer -> at which call of its module it is caught; without the operations inside of modules."""
    channels_last: bool
    reference: Reference
    """Of all layers but the operations inside of modules."""
    traced: Traced | None
    """``None`` where ``torch.export`` could not trace the module."""
    problem: str = ""
    """Why it could not."""

    def close(self) -> None:
        """Free what the trace holds."""
        if self.traced is not None:
            release(self.traced)


class Cut(NamedTuple):
    """A backbone that computes no further than the last of some layers."""

    backbone: Backbone
    exported: bool
    """False for the hook fallback."""
    reference: Reference
    """What the module computes, for the layers of the backbone and maybe others."""


def make_source(
    model: Model, layers: Sequence[str], device: torch.device | str | None, *, partial: bool = False
) -> Source:
    """Copy a model, run it with hooks, and trace it up to the last of some layers.

    Args:
        model, layers, device: as for :func:`~featvis_func.make_features`.
        partial: whether backbones with some of the layers will be cut.

    Raises:
        ValueError: as :func:`~featvis_func.make_features` does.
    """
    refs = {name: parse_layer(model.module, name) for name in layers}
    if not refs:
        raise ValueError("no layers were requested: the list is empty")
    module = private_copy(model.module, device).requires_grad_(False)
    images = example_images(model, module)
    distinct = list(dict.fromkeys(ref._replace(axes=None) for ref in refs.values()))
    operations = [ref for ref in distinct if ref.operation]
    hooked = [ref for ref in distinct if not ref.operation]
    if operations:  # they are found in the graph of the whole model
        hooked += [ref for ref in float_outputs(model, module, images) if ref not in hooked]
    calls, channels_last = count_calls(model, module, hooked, images)
    reference = _reference(module, calls, images)
    traced, problem = None, ""
    try:
        traced = trace(module, calls, images, operations)
    except UnknownOperationError:
        raise
    except Exception as error:
        # torch.export fails in as many ways as there are models; every failure means the hook fallback.
        problem = why_not_exported(error)
    if traced is not None and (partial or operations):
        problem = _find_mismatch_as_traced(traced, reference)
        if problem:
            release(traced)
            traced = None
    return Source(model, module, refs, calls, channels_last, reference, traced, problem)


def _find_mismatch_as_traced(traced: Traced, reference: Reference) -> str:
    """Describe how the graph, as it was traced, differs from the module.

    If it does not, it takes the module's place in :func:`cut`: no hook can catch an operation inside of a module, and
    the reference's gradient is that of all its layers.
    """
    try:
        plain = truncate(traced, traced.layers, optimize=False)
        return find_mismatch(_only(plain, reference.values), reference)
    except Exception as error:  # whatever torch.func cannot differentiate
        return why_not_exported(error)


def cut(source: Source, names: Sequence[str], *, verify: bool = True) -> Cut:
    """Truncate a model behind the last of some layers: as a graph, or where no graph computes the same, with hooks.

    Args:
        source: from :func:`make_source`.
        names: the names that it was made with; with ``partial`` also some of them.
        verify: whether to compare the graph with the module.

    Raises:
        ValueError: as :func:`~featvis_func.make_features` does.
    """
    refs = list(dict.fromkeys(source.refs[name]._replace(axes=None) for name in names))
    operations = [ref for ref in refs if ref.operation]
    calls = {ref: number for ref, number in source.calls.items() if ref in refs}
    problem = source.problem
    if source.traced is not None:
        try:
            found, dropped, problem = _cut_graph(source, source.traced, [ref.path for ref in refs], verify)
        except Exception as error:  # whatever torch.func cannot differentiate
            problem = why_not_exported(error)
        else:
            if not problem:
                if dropped:
                    warn_caller(
                        f"{source.model.name} runs as it was traced, slower, without folded batch norms and the other"
                        f" changes of its graph: with them {dropped}"
                    )
                return found
    if operations:
        raise ValueError(
            f"layer {operations[0].path!r} is an operation inside of a module, which can only be reached in a model"
            f" that can be exported: {problem}"
        )
    reference = source.reference
    if len(calls) < len(reference.values):
        reference = reference_of(source.module, calls, reference.images)
    check_constant_calls(source.model, source.module, calls, reference.images)
    warn_caller(
        f"{source.model.name} runs with a forward hook, slower and without torch.compile, since it could not be"
        f" exported: {problem}"
    )
    return Cut(_hook_fallback(source.model, source.module, calls, reference), False, reference)


def _cut_graph(source: Source, traced: Traced, paths: list[str], verify: bool) -> tuple[Cut, str, str]:
    """A cut of the graph, why its optimised form was dropped, and how it differs from the module; or empty strings."""
    reference, plain = source.reference, None
    if set(paths) != set(reference.values):
        plain = truncate(traced, paths, optimize=False)
        reference = reference_of_graph(plain, reference)
    core = truncate(traced, paths)
    mismatch, dropped = find_mismatch(core, reference) if verify else "", ""
    if mismatch:
        # In very deep networks the rounding of the graph passes can switch ReLUs: use the graph as traced.
        dropped, core = mismatch, truncate(traced, paths, optimize=False) if plain is None else plain
        mismatch = find_mismatch(core, reference)
    return Cut(core, True, reference), dropped, mismatch


def _reference(module: nn.Module, calls: Mapping[LayerRef, int], images: Tensor) -> Reference:
    """Run a private copy of the module, and remove those of the user's hooks that change nothing."""
    hooks = user_hooks(module)
    with changing_hooks(hooks) as changing:
        reference = reference_of(module, calls, images)
    idle = [hook for hook in hooks if hook not in changing]
    if idle:
        attach = detach(idle)
        if compare(module, calls, reference):
            attach()  # a hook changes something else than what it is given, such as a weight
    return reference


def _only(core: Backbone, paths: Container[str]) -> Backbone:
    """The same backbone with some of its layers."""

    def apply(weights: Weights, images: Tensor) -> dict[str, Tensor]:
        return {path: value for path, value in core.apply(weights, images).items() if path in paths}

    return core._replace(apply=apply)


def _hook_fallback(model: Model, module: nn.Module, calls: Mapping[LayerRef, int], reference: Reference) -> Backbone:
    """Return the hook fallback, checked by the same means as a graph.

    Raises:
        ValueError: the module cannot be differentiated.
    """
    errors = []
    for accumulate in (False, True):
        core = hook_backbone(module, calls, accumulate=accumulate)
        try:
            mismatch = find_mismatch(core, reference)
        except Exception as error:  # whatever a module's backward pass raises
            errors.append(error)
            continue
        if mismatch and not reference.random:
            warn_caller(f"{model.name} does not repeat itself: {mismatch} in a second run")
        return core
    raise ValueError(f"{model.name} cannot be differentiated: {first_line(errors[0])}") from errors[0]
