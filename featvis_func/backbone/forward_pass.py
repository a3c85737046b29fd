"""Run a forward pass that leaves nothing behind in the process, for the hooks that it calls."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from featvis_func.models import Model
from featvis_func.validation import first_line

T = TypeVar("T")


def forward_once(
    model: Model, module: nn.Module, images: Tensor, *, reset: Callable[[], object] = lambda: None
) -> None:
    """Run a complete forward pass for the hooks that it calls.

    Args:
        model: for its name and size.
        module: to be run.
        images: ``(n, c, ...)``.
        reset: called before each pass, of which there may be two: see :func:`keeping_random_state`.

    Raises:
        ValueError: the module fails on these images.
    """

    def run() -> None:
        reset()
        with torch.no_grad(), without_checkpoints():
            module(images)

    try:
        keeping_random_state(run)
    except Exception as error:
        shape = " x ".join(map(str, images.shape[1:]))
        assumed = f" ({' and '.join(model.assumed)} assumed)" if model.assumed else ""
        raise ValueError(f"{model.name} fails on an image of {shape}{assumed}: {first_line(error)}") from error


class _RandomOperations(TorchDispatchMode):
    """Notes whether an operation of this thread draws from a global random generator."""

    drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = _random_states()
        output = func(*args, **(kwargs or {}))
        self.drew = self.drew or not _equal(before, _random_states())
        return output


def keeping_random_state(function: Callable[[], T]) -> tuple[T, bool]:
    """Call a function, and restore the global random generators if it has drawn from them.

    All threads share the generators, so that they are restored only if it was this function that has drawn: otherwise
    another thread would draw the same numbers again. Where the generators have changed, a second call tells, in which
    each operation is watched; the first call is not watched, because not every model runs that way.

    Args:
        function: takes no arguments, and may be called twice.

    Returns:
        What it returns, and whether it has drawn.
    """
    before = _random_states()
    result = function()
    if _equal(before, _random_states()):
        return result, False
    operations = _RandomOperations()
    try:
        with operations:
            result = function()
    except Exception:  # it cannot be watched
        operations.drew = True
    if operations.drew:
        torch.set_rng_state(before[0])
        for device, state in enumerate(before[1:]):
            torch.cuda.set_rng_state(state, device)
    return result, operations.drew


def _equal(states: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(states) == len(others) and all(map(torch.equal, states, others))


def _random_states() -> list[Tensor]:
    """Return the states of the global random generators: that of the CPU, then those of the CUDA devices."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else [])]


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Context manager in which this thread's reentrant checkpoints run their function as it is.

    They would run it without a gradient first, so that a layer inside had none.
    """
    _install_bypass()
    before = getattr(_bypass, "active", False)
    _bypass.active = True
    try:
        yield
    finally:
        _bypass.active = before


_bypass = threading.local()


def _install_bypass() -> None:
    """Wrap torch's reentrant checkpoint so that it does nothing in a thread within :func:`without_checkpoints`."""
    original = CheckpointFunction.apply
    if hasattr(original, "bypassed"):
        return

    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if getattr(_bypass, "active", False):
            return function(*args)
        return original(function, preserve_rng_state, *args)

    apply.bypassed = True  # type: ignore[attr-defined]
    CheckpointFunction.apply = apply
