"""Captured steps: the same results as the step's own, from memory that each replay changes in place.

What stands in for a CUDA graph here runs the recorded function again and writes its report where the first one was.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import featvis_func as fv
from featvis_func.engine.ahead import AheadStep
from featvis_func.engine.batching import run_batched
from featvis_func.engine.capture import CapturedStep
from featvis_func.engine.run import run
from featvis_func.models import Model
from featvis_func.rendering.compose import compose
from featvis_func.rendering.options import RenderOptions
from featvis_func.rendering.resolve import resolve
from featvis_func.tree import tree_leaves, tree_map
from featvis_func.types import Info, State
from tests.engine.test_batching import Toy, toy_init

pytestmark = pytest.mark.usefixtures("cached_tracing")


class Recorder:
    """Counts captures and replays."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def __call__(
        self, warm_up: Callable[[], Any], function: Callable[[], Info], device: torch.device
    ) -> tuple[Callable[[], object], Info]:
        self.captures += 1
        warm_up()
        info = function()

        def replay() -> None:
            self.replays += 1
            tree_map(Tensor.copy_, info, function())

        return replay, info


def assert_equal(actual: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"optimizer {name}": {"optimizer": name} for name in ("activation", "adam", "nadam", "sgd")},
    **{f"image {name}": {"image": name} for name in ("pixel", "phase", "laplacian_pyramid", "cppn", "alpha")},
    "saliency": {"saliency": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_captured_step_is_equal_to_the_step_with_every_option(tiny: Model, name: str) -> None:
    made = fv.make_renderer(tiny, "5", range(3), compile=False, steps=4, **OPTIONS[name])
    state, target = made.init([0, 1, 2], 0)
    before = tree_map(torch.clone, state)
    ascent = compose(resolve(tiny, "5", range(3), RenderOptions(steps=4, **OPTIONS[name]), None)).ascent
    captured = AheadStep(ascent, lambda step: CapturedStep(step, Recorder()))
    first = run(captured, made.weights, state, target, steps=2)
    assert_equal(first, run(made.step, made.weights, state, target, steps=2))
    kept = tree_map(torch.clone, first)
    second = captured(made.weights, first[0], target)
    assert_equal(second, made.step(made.weights, first[0], target))
    assert_equal((state, first), (before, kept))


def test_step_is_captured_once_and_replayed_once_per_step() -> None:
    recorder = Recorder()
    step, weights = CapturedStep(Toy(), recorder), {"a": torch.zeros(2)}
    state, target = toy_init([3, 4])
    seen: list[Info] = []
    state, _ = run(step, weights, state, target, steps=5, callback=seen.append)
    run(step, dict(weights), *toy_init([5, 6]), steps=2)
    assert (recorder.captures, recorder.replays) == (1, 1 + 7)  # the first one is compared with the step
    assert [info.score.tolist() for info in seen] == [[0, 0], [1, 1], [2, 2], [3, 3], [3, 4]]


def test_other_shapes_and_other_weights_are_captured_anew() -> None:
    recorder = Recorder()
    step, weights = CapturedStep(Toy(), recorder), {"a": torch.zeros(2)}
    for filters, given in (([3], weights), ([3, 4], weights), ([3, 4], {"a": torch.zeros(2)}), ([3, 4], {})):
        assert_equal(step(given, *toy_init(filters)), Toy()(given, *toy_init(filters)))
    assert recorder.captures == 4


def test_weights_are_read_where_they_are() -> None:
    def step(weights: Any, state: State, target: Tensor) -> tuple[State, Info]:
        state, info = Toy()(weights, state, target)
        return state, info._replace(score=info.score + weights["a"])

    captured, weights = CapturedStep(step, Recorder()), {"a": torch.zeros(())}
    captured(weights, *toy_init([3]))
    weights["a"].fill_(7.0)
    assert captured(weights, *toy_init([3]))[1].score.tolist() == [7.0]


def test_leaves_of_a_state_may_change_places() -> None:
    def step(weights: Any, state: State, target: Tensor) -> tuple[State, Info]:
        score = state.best.score
        new = state._replace(params=score, best=state.best._replace(score=state.params), key=state.key)
        return new, Info(score, state.params, target > 0, target > 0)

    state, target = toy_init([3])
    results = [run(s, {}, state, target, steps=3) for s in (step, CapturedStep(step, Recorder()))]
    assert_equal(*results)


@pytest.mark.parametrize("tolerance", [None, 0.0])
def test_filters_take_the_place_of_others_in_captured_batches(tolerance: float | None) -> None:
    filters, options = [1, 9, 2, 7, 3], {"steps": 12, "batch_size": 2, "tolerance": tolerance, "patience": 2}
    recorder = Recorder()
    captured = run_batched(CapturedStep(Toy(), recorder), {}, toy_init, filters, **options)
    assert_equal(captured, run_batched(Toy(), {}, toy_init, filters, **options))
    assert recorder.captures == 1


def test_captured_batch_is_halved_where_memory_runs_out() -> None:
    recorder = Recorder()
    with pytest.warns(UserWarning, match="out of memory with batch_size=4; going on with 2"):
        result = run_batched(CapturedStep(Toy(2), recorder), {}, toy_init, [1, 2, 3, 4], steps=3, batch_size=4)
    assert_equal(result.info, run_batched(Toy(), {}, toy_init, [1, 2, 3, 4], steps=3).info)
    assert recorder.captures == 2


def other_scores(*args: Any) -> Any:
    """A recorder whose replays write other scores, as if memory had been reused."""
    replay, info = Recorder()(*args)
    return lambda: (replay(), info.score.mul_(1.5)), info


def no_update(*args: Any) -> Any:
    """A recorder whose replays leave the state as it is."""
    return (lambda: None), Recorder()(*args)[1]


@pytest.mark.parametrize("recorder", [other_scores, no_update])
def test_step_whose_replay_differs_runs_as_it_is_after_one_warning(tiny: Model, recorder: Any) -> None:
    made = fv.make_renderer(tiny, "5", range(3), compile=False, steps=4)
    state, target = made.init([0, 1, 2], 0)
    step = CapturedStep(made.step, recorder)
    with pytest.warns(UserWarning, match="the step cannot be captured: a replay of it gave other values$"):
        result = run(step, made.weights, state, target, steps=2)
    assert_equal(result, run(made.step, made.weights, state, target, steps=2))


def test_step_that_cannot_be_captured_runs_as_it_is_after_one_warning() -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    step = CapturedStep(Toy(), refuse)
    with pytest.warns(UserWarning, match="the step cannot be captured: called a synchronizing CUDA operation$"):
        result = run(step, {}, *toy_init([3]), steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step({}, *toy_init([3, 4]))
    assert_equal(result, run(Toy(), {}, *toy_init([3]), steps=3))
