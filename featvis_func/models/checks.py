"""Reject what is not a module that can be rendered: other objects, modules without values, without gradients."""

import inspect
import itertools
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, jit, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

# Packages that define quantised modules, or tensor subclasses for quantised weights.
_QUANTISED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.sparse.quantized",
    "torch.nn.quantized",
    "torchao",
    "bitsandbytes",
    "auto_gptq",
    "gptqmodel",
    "awq",
    "optimum.quanto",
)
# Float modules defined in these packages; they occur in models prepared for quantisation.
_FLOATS = ("FloatFunctional", "FXFloatFunctional")


def describe_object(given: Any) -> str:
    """Say what was given in place of a model, and what to do, in one line.

    >>> import torch
    >>> describe_object({"0.weight": torch.zeros(2)})
    "a state dict, which holds 1 tensor but no architecture: build the module, call its load_state_dict, and give the
    module; or give the name of the architecture and the file, load_model(name, weights='file.pth')"
    >>> describe_object(nn.Linear), describe_object(7)
    ('the class Linear: give an instance, Linear(...)', '7 (an int)')
    """
    if isinstance(given, Mapping):
        nested = (given, *(value for value in given.values() if isinstance(value, Mapping)))
        count = max(sum(isinstance(value, Tensor) for value in mapping.values()) for mapping in nested)
        if count:
            kind = "a state dict" if any(isinstance(v, Tensor) for v in given.values()) else "a checkpoint"
            return (
                f"{kind}, which holds {count} tensor{'s' * (count > 1)} but no architecture: build the module, call its"
                f" load_state_dict, and give the module; or give the name of the architecture and the file,"
                f" load_model(name, weights='file.pth')"
            )
    if inspect.isclass(given):
        return f"the class {given.__name__}: give an instance, {given.__name__}(...)"
    kind = type(given).__name__
    if isinstance(given, Tensor):
        return f"a {kind} of shape {tuple(given.shape)}"
    try:
        text = " ".join(reprlib.repr(given).split())
    except Exception:  # The user's own __repr__ may raise any.
        return f"a {kind}"
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({'an' if kind[0] in 'aeiou' else 'a'} {kind})"


def check_initialised(module: nn.Module, name: str) -> None:
    """Raise ValueError if a module has parameters or buffers without values.

    >>> check_initialised(nn.Sequential(nn.LazyLinear(2)), "net")
    Traceback (most recent call last):
        ...
    ValueError: parameter '0.weight' of net is not initialised (its layer is a LazyLinear): call the module once on a
    batch of images before, as in net(torch.zeros(1, 3, 224, 224))
    """
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    for path, tensor in tensors:
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            layer = type(module.get_submodule(path.rpartition(".")[0])).__name__
            raise ValueError(
                f"{kind} {path!r} of {name} is not initialised (its layer is a {layer}): call the module once on a"
                f" batch of images before, as in net(torch.zeros(1, 3, 224, 224))"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{kind} {path!r} of {name} is on the meta device and has no values: build the module on a real device,"
                f" or give it values before: net.to_empty(device='cpu'), then net.load_state_dict(...)"
            )


def check_differentiable(module: nn.Module, name: str) -> None:
    """Raise ValueError if a module is scripted, traced or quantised.

    >>> check_differentiable(nn.Linear(2, 2), "one")
    """
    for path, child in module.named_modules():
        layer = f"layer {path!r} of {name}" if path else name
        if isinstance(child, jit.ScriptModule):
            raise ValueError(
                f"{layer} is scripted or traced, so its layers cannot be accessed;"
                f" give the nn.Module that it was made from"
            )
        if (reason := next(_quantisation_reasons(child), None)) is not None:
            raise ValueError(
                f"{layer} is quantised ({reason}), and quantised weights have no gradient;"
                f" give the float model that it was made from"
            )


def _quantisation_reasons(module: nn.Module) -> Iterator[str]:
    """Yield the reasons why a module is considered quantised, apart from its children."""
    if _is_defined_in(type(module), _QUANTISED) and type(module).__name__ not in _FLOATS:
        yield f"{type(module).__module__}.{type(module).__qualname__}"
    for name, value in module._parameters.items():
        if value is not None and (_is_quantised(value) or not (value.is_floating_point() or value.is_complex())):
            yield f"its {name} is {_type_name(value)}"
    for name, value in module._buffers.items():
        # Integer buffers of other names are indices, masks and counters.
        integer = value is not None and not (value.is_floating_point() or value.is_complex())
        if value is not None and (_is_quantised(value) or (integer and name in ("weight", "qweight", "weight_packed"))):
            yield f"its {name} is {_type_name(value)}"
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            target = getattr(node.target, "__name__", str(node.target))
            if node.op.startswith("call_f") and "quantize" in target and "fake_quantize" not in target:
                yield f"its graph calls {target}"


def _is_quantised(value: Tensor) -> bool:
    is_float8 = value.is_floating_point() and value.element_size() == 1
    return value.is_quantized or is_float8 or _is_defined_in(type(value), _QUANTISED)


def _type_name(value: Tensor) -> str:
    name = type(value).__name__
    return str(value.dtype) if name in ("Tensor", "Parameter") else f"a {name}"


def _is_defined_in(cls: type, packages: Sequence[str]) -> bool:
    return any(cls.__module__ == name or cls.__module__.startswith(f"{name}.") for name in packages)
