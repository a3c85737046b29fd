"""Copy the structure of a module, whatever its attributes hold, so that the user's module is never changed."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import MutableMapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from featvis_func.validation import first_line

# Values of these types never change, or stand for something outside of the module: both modules refer to the same.
_SHARED = (
    type(None), bool, int, float, complex, str, bytes, type, range, slice, BuiltinFunctionType, ModuleType, torch.dtype,
    torch.device, torch.layout, torch.memory_format, torch.Size, type(Ellipsis),
)  # fmt: skip
_MAPPINGS = (dict, OrderedDict, defaultdict)


def private_copy(
    module: nn.Module, device: torch.device | str | None = None, *, share_parameters: bool = False
) -> nn.Module:
    """Copy a module in evaluation mode, with its hooks.

    Wrappers of ``torch.compile`` and ``DataParallel``, of the module or of parts of it, are left out. What cannot be
    copied, such as a lock, a file or a scripted function, is shared. Tensors in attributes and containers are detached.

    Args:
        module: of the user; not changed.
        device: where the copy's tensors are. Default: where the module's are.
        share_parameters: whether the copy's parameters use the memory of the module's, unless they must move.
            Otherwise the copy keeps its values when the module is trained on.

    Returns:
        The copy. Its parameters and buffers have the names that :func:`layer_modules` gives their modules.

    Raises:
        ValueError: an attribute can be neither copied nor shared; the message names it.
    """
    copier = _Copier(share_parameters)
    new = copier.copy_module(module)
    moves = device is not None and any(_elsewhere(t, device) for t in copier.tensors)
    try:
        if moves:
            _move(copier, torch.device(device))  # type: ignore[arg-type]
    except Exception as error:
        raise ValueError(f"{type(module).__name__} cannot be moved to {device}: {first_line(error)}") from error
    return new.eval()


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    >>> unwrap(nn.DataParallel(nn.Linear(2, 2)))
    Linear(in_features=2, out_features=2, bias=True)
    """
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrap(module.module)
    modules = module.__dict__.get("_modules", {})  # Its `__getattr__` asks the inner module.
    inner = modules["_orig_mod"] if "_orig_mod" in modules else None  # noqa: SIM401 - that of a ScriptModule has no get
    return unwrap(inner) if isinstance(inner, nn.Module) else module


def layer_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Return all modules inside a module by their full names, without wrappers in the names or among the modules.

    A module with several names is listed under each. The root is listed under the empty name.

    >>> list(layer_modules(nn.Sequential(nn.DataParallel(nn.Sequential(nn.ReLU())))))
    ['', '0', '0.0']
    """
    found: dict[str, nn.Module] = {}

    def visit(child: nn.Module, name: str, above: tuple[int, ...]) -> None:
        child = unwrap(child)
        if id(child) in above:  # a module that contains itself
            return
        found[name] = child
        for key, inner in child._modules.items():
            if inner is not None:
                visit(inner, f"{name}.{key}" if name else key, (*above, id(child)))

    visit(module, "", ())
    return found


class _Copier:
    """Copies objects that refer to each other, each once."""

    def __init__(self, share_parameters: bool) -> None:
        self._share_parameters = share_parameters
        self._memo: dict[int, Any] = {}
        self._originals: list[Any] = []  # Kept alive, because their ids are the keys of the memo.
        self.tensors: list[Tensor] = []
        self.holders: list[tuple[Any, Any, Tensor]] = []
        """Where tensors are held: container, key and tensor."""

    def copy_module(self, module: nn.Module) -> nn.Module:
        """Copy a module and all modules inside it."""
        modules = layer_modules(module)
        new_ones = {id(child): (name, child) for name, child in modules.items() if id(child) not in self._memo}
        # First all modules and tensors, so that whatever refers to one of them refers to its copy.
        for _, child in new_ones.values():
            self._remember(child, object.__new__(type(child)))
        for _, child in new_ones.values():
            for table in (child._parameters, child._buffers):
                for tensor in table.values():
                    if tensor is not None:
                        self._copy(tensor)
        for path, child in new_ones.values():
            new = self._memo[id(child)]
            for name, value in vars(child).items():
                if name == "_compiled_call_impl":  # it would run the forward pass of the original
                    continue
                try:
                    new.__dict__[name] = self._copy(value)
                except Exception as error:
                    where = f"{path}.{name}" if path else name
                    raise ValueError(
                        f"attribute {where!r} of {type(module).__name__} cannot be copied: {first_line(error)}; remove"
                        f" it from the module, or give its class a __deepcopy__"
                    ) from error
            self._note_tensors(new.__dict__)
        return self._memo[id(unwrap(module))]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, _SHARED):
            return value
        if isinstance(value, nn.Module):
            value = unwrap(value)
        value = getattr(value, "_torchdynamo_orig_callable", value)  # a function inside `torch.compile`
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, FunctionType | torch.jit.ScriptModule):
            return value
        if isinstance(value, nn.Module):
            return self.copy_module(value)
        if isinstance(value, MethodType):
            return self._remember(value, MethodType(value.__func__, self._copy(value.__self__)))
        if isinstance(value, Tensor):
            return self._remember(value, self._copy_tensor(value))
        if isinstance(value, torch.Generator):
            return self._remember(value, torch.Generator(value.device).set_state(value.get_state()))
        if type(value) in _MAPPINGS:
            new = self._remember(value, copy.copy(value))
            new.clear()
            new.update((self._copy(key), self._copy(held)) for key, held in value.items())
            self._note_tensors(new)
            return new
        if type(value) is list:
            new = self._remember(value, [])
            new.extend(map(self._copy, value))
            self.holders += [(new, i, held) for i, held in enumerate(new) if isinstance(held, Tensor)]
            return new
        if type(value) in (tuple, set, frozenset):
            return self._remember(value, type(value)(map(self._copy, value)))
        return self._remember(value, self._copy_object(value))

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            if type(tensor) is not nn.Parameter:  # such as those of quantised and lazy modules
                new = copy.deepcopy(tensor) if not self._share_parameters else tensor
            else:
                shares = self._share_parameters and not tensor.is_inference()
                values = tensor.detach()
                new = nn.Parameter(values if shares else values.clone(), tensor.requires_grad)
        else:
            new = tensor.detach().clone()
        self.tensors.append(new)
        return new

    def _copy_object(self, value: Any) -> Any:
        """Copy an object as ``copy.deepcopy`` does; where that fails, copy its attributes, or share it."""
        attempt = _Attempt(self._memo)  # what a failed attempt has put into the table of copies is incomplete
        try:
            new = copy.deepcopy(value, attempt)  # type: ignore[arg-type]
            self._memo.update(attempt.new)
            return new
        except Exception:  # objects fail to be copied in as many ways as there are
            if not _is_plain_object(value):
                return value
        new = self._remember(value, object.__new__(type(value)))
        new.__dict__.update((name, self._copy(held)) for name, held in vars(value).items())
        self._note_tensors(new.__dict__)
        return new

    def _note_tensors(self, names: dict[Any, Any]) -> None:
        self.holders += [(names, name, value) for name, value in names.items() if isinstance(value, Tensor)]

    def _remember(self, value: Any, new: Any) -> Any:
        self._memo[id(value)] = new
        self._originals.append(value)
        return new


class _Attempt(MutableMapping[int, Any]):
    """The table of one call of ``copy.deepcopy``: entries of another table, and its own new ones."""

    def __init__(self, known: dict[int, Any]) -> None:
        self._known = known
        self.new: dict[int, Any] = {}

    def __getitem__(self, key: int) -> Any:
        return self.new[key] if key in self.new else self._known[key]

    def __setitem__(self, key: int, value: Any) -> None:
        self.new[key] = value

    def __delitem__(self, key: int) -> None:
        del self.new[key]

    def __iter__(self) -> Any:
        return iter({**self._known, **self.new})

    def __len__(self) -> int:
        return len({**self._known, **self.new})


def _is_plain_object(value: Any) -> bool:
    """Whether an object is no more than its attributes: of a Python class without methods that copy or finalise it."""
    kind = type(value)
    special = ("__deepcopy__", "__copy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
    return (
        hasattr(value, "__dict__")
        and not hasattr(kind, "__del__")
        and kind.__flags__ & (1 << 9) != 0  # defined in Python
        and kind.__new__ is object.__new__
        and all(getattr(kind, name, None) is getattr(object, name, None) for name in special)
    )


def _elsewhere(tensor: Tensor, device: torch.device | str) -> bool:
    """Whether a tensor is on another device; "cuda" means any CUDA device."""
    target = torch.device(device)
    return tensor.device.type != target.type or (target.index is not None and tensor.device.index != target.index)


def _move(copier: _Copier, device: torch.device) -> None:
    """Move the tensors of a copy in place, so that tensors that occur twice remain one."""
    moved: dict[int, Tensor] = {}
    for container, key, tensor in copier.holders:
        if id(tensor) not in moved:
            if isinstance(tensor, nn.Parameter) and type(tensor) is nn.Parameter:
                moved[id(tensor)] = nn.Parameter(tensor.detach().to(device), tensor.requires_grad)
            else:
                moved[id(tensor)] = tensor.detach().to(device).requires_grad_(tensor.requires_grad)
        container[key] = moved[id(tensor)]
