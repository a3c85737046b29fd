"""A step as a CUDA graph: captured once, then replayed in one launch, without work for the host."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from featvis_func.engine.memory import is_out_of_memory
from featvis_func.engine.run import RepeatableStep, Step, repeat_step
from featvis_func.tree import tree_leaves, tree_map, tree_structure
from featvis_func.types import Info, State, Target, Weights
from featvis_func.validation import first_line

Recorder: TypeAlias = Callable[[Callable[[], Any], Callable[[], Info], torch.device], tuple[Callable[[], object], Info]]
"""(warm-up, function to record, device) -> (a function that repeats what was recorded, in the same memory; the
report that it writes)."""

# Steps before a capture: the first ones create plans, handles and workspaces, and choose algorithms, which a capture
# cannot do. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
_WARMUP_STEPS = 2


class _Captured(NamedTuple):
    """A recorded step, and the memory that it works in."""

    weights: Weights
    """Read where they are."""
    state: State
    """Replaced by each replay."""
    target: Target
    info: Info
    """Of the last replay."""
    replay: Callable[[], object]


class CapturedStep(RepeatableStep):
    """A step that is captured as a CUDA graph at its first call, and replayed after it.

    It is a pure function as the step is. The graph reads the weights where they are and keeps a state of its own, which
    each replay updates in place; :meth:`repeat` copies a state into it and out of it once for all its steps, a call for
    its one step. Other weights, shapes or devices are captured anew, and replace what was captured before. Settings of
    torch, such as deterministic algorithms, are those of the capture.

    A step that waits for the device cannot be captured, and a graph may read memory that others have written since: the
    first replay is compared with the step. Where either fails there is a warning, and the step runs as it is.

    Args:
        step: of an :class:`~featvis_func.engine.step.Ascent`, compiled or not.
        record: what records a function; by default a CUDA graph does.
    """

    def __init__(self, step: Step, record: Recorder | None = None) -> None:
        self._step = step
        self._record = record or record_graph
        self._captured: _Captured | None = None
        self._refused = False

    def repeat(
        self,
        weights: Weights,
        state: State,
        target: Target,
        *,
        steps: int,
        callback: Callable[[Info], object] | None = None,
    ) -> tuple[State, list[Info]]:
        """Take several steps, see :func:`~featvis_func.engine.run.repeat_step`."""
        captured = self._captured_for(weights, state, target)
        if captured is None:
            return repeat_step(self._step, weights, state, target, steps=steps, callback=callback)
        tree_map(Tensor.copy_, (captured.state, captured.target), (state, target))
        infos = []
        for _ in range(steps):
            captured.replay()
            infos.append(Info(*map(torch.clone, captured.info)))
            if callback is not None:
                callback(infos[-1])
        return tree_map(torch.clone, captured.state), infos

    def _captured_for(self, weights: Weights, state: State, target: Target) -> _Captured | None:
        """What is captured for these arguments; ``None`` if the step cannot be captured."""
        known = self._captured
        if known is not None and _serves(known, weights, state, target):
            return known
        del known
        self._captured = None  # before the next capture: the memory may not hold two
        if not self._refused:
            try:
                self._captured = _capture(self._step, self._record, weights, state, target)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self._refused = True
                warnings.warn(
                    f"going on without a CUDA graph, since the step cannot be captured: {first_line(error)}",
                    stacklevel=2,
                )
        return self._captured


def _serves(captured: _Captured, weights: Weights, state: State, target: Target) -> bool:
    def form(*trees: Any) -> Any:
        return tree_structure(trees), [(leaf.shape, leaf.dtype, leaf.device) for leaf in tree_leaves(trees)]

    same = weights.keys() == captured.weights.keys() and all(w is captured.weights[name] for name, w in weights.items())
    return same and form(state, target) == form(captured.state, captured.target)


def _capture(step: Step, record: Recorder, weights: Weights, state: State, target: Target) -> _Captured:
    own_state, own_target = tree_map(torch.clone, (state, target))
    own_leaves = tree_leaves(own_state)
    own_memory = {leaf.untyped_storage().data_ptr() for leaf in (*own_leaves, *tree_leaves(own_target))}

    def detached(new: Tensor) -> Tensor:
        """``new``, in memory that the update does not change."""
        return new.clone() if new.untyped_storage().data_ptr() in own_memory else new

    def advance() -> Info:
        new, info = step(weights, own_state, own_target)
        info = tree_map(detached, info)
        changed = [(own, value) for own, value in zip(own_leaves, tree_leaves(new), strict=True) if value is not own]
        for own, value in [(own, detached(value)) for own, value in changed]:
            own.copy_(value)
        return info

    replay, info = record(lambda: step(weights, state, target), advance, state.step.device)
    captured = _Captured(dict(weights), own_state, own_target, info, replay)
    _check_replay(captured, step, state, target)
    return captured


def _check_replay(captured: _Captured, step: Step, state: State, target: Target) -> None:
    """Raise RuntimeError if a replay does something else than the step, beyond rounding, which optimizers amplify."""
    expected, report = step(captured.weights, state, target)
    tree_map(Tensor.copy_, (captured.state, captured.target), (state, target))
    captured.replay()
    other_scores = _distance(captured.info.score, report.score) > 0.05 * float(report.score.double().norm())
    change = _distance(state.params, expected.params)
    if other_scores or _distance(captured.state.params, expected.params) > 0.5 * change:
        raise RuntimeError("a replay of it gave other values")


def _distance(one: Any, other: Any) -> float:
    """The Euclidean distance of two pytrees of tensors."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in pairs))


def record_graph(
    warm_up: Callable[[], Any], function: Callable[[], Info], device: torch.device
) -> tuple[Callable[[], object], Info]:
    """Record a function as a CUDA graph, see :data:`Recorder`.

    Raises:
        RuntimeError: the function waits for the device, or does something else that cannot be captured.
    """
    # A capture that fails leaves its stream the current one.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            warm_up()
            # Here an operation that waits raises an error; within a capture it would also break the capture.
            with _forbidden_waits():
                for _ in range(_WARMUP_STEPS - 1):
                    warm_up()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread, such as one that writes files, may use the device meanwhile.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
            info = function()
        return graph.replay, info


@contextmanager
def _forbidden_waits() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
