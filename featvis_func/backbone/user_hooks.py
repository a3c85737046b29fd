"""Hooks that the user attached to a module: those that change values are kept, those that only look are left out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from featvis_func.backbone.layers import tensors_in

_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Hook(NamedTuple):
    """Where a hook is attached."""

    owner: nn.Module
    table: str
    number: int


def user_hooks(module: nn.Module) -> list[Hook]:
    """List the hooks of a module and those inside it. Those of torch's own, as of ``weight_norm``, do not count."""
    return [
        Hook(child, table, number)
        for child in module.modules()
        for table in _TABLES
        for number, hook in getattr(child, table).items()
        if not _origin(hook).startswith("torch.nn.utils")
    ]


@contextmanager
def changing_hooks(hooks: list[Hook]) -> Iterator[set[Hook]]:
    """Collect the hooks that, within the block, return other values than they were given, or write to these."""
    changing: set[Hook] = set()
    originals = {hook: getattr(hook.owner, hook.table)[hook.number] for hook in hooks}

    def watch(hook: Hook, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(child: nn.Module, *given: Any) -> Any:
            before = _contents(given)
            result = original(child, *given)
            if not _same(before, _contents(given)) or (result is not None and not _returns_given(result, given)):
                changing.add(hook)
            return result

        return watched

    for hook, original in originals.items():
        getattr(hook.owner, hook.table)[hook.number] = watch(hook, original)
    try:
        yield changing
    finally:
        for hook, original in originals.items():
            getattr(hook.owner, hook.table)[hook.number] = original


def detach(hooks: list[Hook]) -> Callable[[], None]:
    """Remove hooks from a private copy of a module.

    Returns:
        A function that attaches all of them again, in the same order.
    """
    tables = {(id(hook.owner), hook.table): getattr(hook.owner, hook.table) for hook in hooks}
    before = {key: dict(table) for key, table in tables.items()}
    for hook in hooks:
        del tables[id(hook.owner), hook.table][hook.number]

    def attach() -> None:
        for key, table in tables.items():
            table.clear()
            table.update(before[key])

    return attach


def _origin(hook: Any) -> str:
    """The package that defines a hook, or the class whose method it is."""
    return getattr(hook, "__module__", None) or type(hook).__module__


def _contents(given: Any) -> list[tuple[Tensor, int]]:
    """The tensors in what a hook was given, and how often each has been written to."""
    return [(t, 0 if t.is_inference() else t._version) for t in tensors_in(given).values()]


def _same(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> bool:
    return len(before) == len(after) and all(t is u and v == w for (t, v), (u, w) in zip(before, after, strict=True))


def _returns_given(result: Any, given: tuple[Any, ...]) -> bool:
    """Whether a hook returned what it was given: the output, the arguments, or the gradients."""
    returned = list(tensors_in(result).values())
    expected = [list(tensors_in(value).values()) for value in (*given, given)]
    return any(value is result for value in given) or (
        bool(returned)
        and any(len(r) == len(returned) and all(a is b for a, b in zip(r, returned, strict=True)) for r in expected)
    )
