"""Continuous batching: results for any batch size, convergence, snapshots, and what happens when memory runs out.

Most tests run a toy step that counts, so that the score, the image and the number of steps of each filter are known.
"""

import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import featvis_func as fv
from featvis_func.engine import batching
from featvis_func.engine import device as device_module
from featvis_func.engine import step as step_module
from featvis_func.engine.ahead import AheadStep
from featvis_func.engine.batching import RunResult, run_batched
from featvis_func.engine.capture import CapturedStep
from featvis_func.engine.device import CompiledStep, algorithms
from featvis_func.engine.memory import is_out_of_memory, plan_batch_size, probe_batch_size
from featvis_func.engine.step import Ascent
from featvis_func.models import Model
from featvis_func.rendering.api import render
from featvis_func.rendering.result import Result
from featvis_func.tree import tree_leaves
from featvis_func.types import Best, Info, State
from tests.toys import load_toy

pytestmark = pytest.mark.usefixtures("cached_tracing")

STEPS = 12


def toy_init(filters: Sequence[int]) -> tuple[State, Tensor]:
    """Make the state of a :class:`Toy`; a filter's number is its target."""
    count = len(filters)
    zeros = torch.zeros(count)
    best = Best(zeros - torch.inf, zeros[:, None, None, None], zeros, zeros.long() - 1)
    return State(zeros, (), torch.zeros(count, 2, dtype=torch.int64), zeros.long(), best), torch.tensor(list(filters))


class Toy:
    """A step whose score is the step's number, up to the filter's number; it records the batch sizes of its calls."""

    def __init__(self, max_batch_size: int = 1000) -> None:
        """Raise an out-of-memory error for batches of more than ``max_batch_size`` filters."""
        self.max_batch_size = max_batch_size
        self.batch_sizes: list[int] = []

    def __call__(self, weights: dict[str, Tensor], state: State, target: Tensor) -> tuple[State, Info]:
        self.batch_sizes.append(len(target))
        if len(target) > self.max_batch_size:
            raise torch.OutOfMemoryError("too many")
        score = torch.minimum(state.step, target).float()
        better = score > state.best.score
        best = Best(
            torch.where(better, score, state.best.score),
            torch.where(better[:, None, None, None], target[:, None, None, None].float(), state.best.image),
            torch.where(better, score, state.best.activation),
            torch.where(better, state.step, state.best.step),
        )
        alive = target > 0
        return state._replace(step=state.step + 1, best=best), Info(score, score, alive, torch.ones_like(alive))


def toy_run(filters: Sequence[int], toy: Toy | None = None, **options: Any) -> RunResult:
    return run_batched(toy or Toy(), {}, toy_init, filters, **{"steps": STEPS, **options})


def expected_history(filters: Sequence[int], steps: Sequence[int]) -> Tensor:
    """The scores of filters that took these numbers of steps: NaN after the last one."""
    history = torch.full((STEPS, len(filters)), torch.nan)
    for i, (number, count) in enumerate(zip(filters, steps, strict=True)):
        history[:count, i] = torch.arange(count).clamp_max(number)
    return history


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 50])
def test_every_filter_takes_all_steps_and_results_have_the_requested_order(batch_size: int) -> None:
    filters = [7, 1, 30, 4, 9]
    toy = Toy()
    result = toy_run(filters, toy, batch_size=batch_size)
    assert torch.equal(result.info.score, expected_history(filters, [STEPS] * 5))
    assert result.steps.tolist() == [STEPS] * 5
    assert result.best.score.tolist() == [7, 1, 11, 4, 9]
    assert result.best.step.tolist() == [7, 1, 11, 4, 9]
    assert result.best.image.flatten().tolist() == filters
    assert result.batch_size == min(batch_size, 5)
    assert set(toy.batch_sizes) == {min(batch_size, 5)}
    assert len(toy.batch_sizes) == STEPS * -(-5 // min(batch_size, 5))


# With patience=4 the score of a filter is compared after 8 and 12 steps with that 4 steps before. A filter whose score
# rises until step k stops at the first comparison without a rise; filter 0, which never has a gradient, does not stop.
STEPS_TO_CONVERGENCE = {0: 12, 1: 8, 3: 8, 4: 12, 7: 12, 30: 12}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
@pytest.mark.parametrize("filters", [[0, 1, 3, 4, 7, 30], [30, 3, 1, 0, 7, 4]], ids=str)
def test_converged_filter_is_replaced_by_the_next_one(filters: list[int], batch_size: int) -> None:
    toy = Toy()
    result = toy_run(filters, toy, batch_size=batch_size, tolerance=0.0, patience=4)
    steps = [STEPS_TO_CONVERGENCE[number] for number in filters]
    assert result.steps.tolist() == steps
    torch.testing.assert_close(result.info.score, expected_history(filters, steps), equal_nan=True)
    assert result.best.image.flatten().tolist() == filters
    assert not result.info.alive[8:, filters.index(1)].any()
    assert set(toy.batch_sizes) == {batch_size}
    # The next filter takes the first row that is free.
    row_steps = [0] * batch_size
    for count in steps:
        row_steps[row_steps.index(min(row_steps))] += count
    assert len(toy.batch_sizes) == max(row_steps)


def test_results_do_not_depend_on_the_batch_size_if_steps_is_no_multiple_of_patience() -> None:
    filters = [30, 1, 3, 4, 7, 1, 30, 3]
    reference = toy_run(filters, batch_size=1, tolerance=0.0, patience=5)
    for batch_size in (2, 3, 8):
        result = toy_run(filters, batch_size=batch_size, tolerance=0.0, patience=5)
        assert torch.equal(reference.steps, result.steps)
        torch.testing.assert_close(reference.info.score, result.info.score, equal_nan=True)
    assert set(reference.steps.tolist()) == {10, 12}


def test_tolerance_is_relative_to_the_score() -> None:
    # The scores are 11 after 12 steps and 7 after 8, a rise of 57 %.
    assert toy_run([30], tolerance=0.5, patience=4).steps.item() == 12
    # The scores are 5 after 6 steps and 3 after 4, a rise of 67 %.
    assert toy_run([30], tolerance=1.0, patience=2).steps.item() == 6


@pytest.mark.parametrize("max_batch_size", [1, 2, 3])
def test_out_of_memory_halves_the_batch_size_with_a_warning(max_batch_size: int) -> None:
    filters = list(range(1, 12))
    toy = Toy(max_batch_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = toy_run(filters, toy, batch_size=8)
    halvings = [(8, 4), (4, 2), (2, 1)][: 3 if max_batch_size == 1 else 2]
    messages = [f"out of memory with batch_size={a}; going on with {b}" for a, b in halvings]
    assert [str(warning.message) for warning in caught] == messages
    torch.testing.assert_close(result.info.score, expected_history(filters, [STEPS] * 11))
    assert toy.batch_sizes[-1] == result.batch_size == (2 if max_batch_size > 1 else 1)


class LaterOutOfMemory(Toy):
    """Holds four filters for the first ``STEPS + 3`` steps, and two after that."""

    def __call__(self, weights: dict[str, Tensor], state: State, target: Tensor) -> tuple[State, Info]:
        self.max_batch_size = 4 if len(self.batch_sizes) < STEPS + 3 else 2
        return super().__call__(weights, state, target)


def test_filters_that_ended_before_memory_ran_out_are_not_repeated() -> None:
    toy = LaterOutOfMemory()
    with pytest.warns(UserWarning, match="going on with 2"):
        result = toy_run(range(1, 9), toy, batch_size=4)
    assert result.best.image.flatten().tolist() == list(range(1, 9))
    assert toy.batch_sizes == [4] * (STEPS + 4) + [2] * 2 * STEPS


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), MemoryError(), RuntimeError("something else")])
def test_error_is_raised_at_batch_size_1_or_if_it_is_not_about_memory(error: Exception) -> None:
    batch_sizes: list[int] = []

    def step(weights: Any, state: State, target: Tensor) -> Any:
        batch_sizes.append(len(target))
        raise error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(type(error)):
            run_batched(step, {}, toy_init, [1, 2, 3], steps=1)
    assert batch_sizes == ([3, 1] if is_out_of_memory(error) else [3])


def test_out_of_memory_is_raised_if_the_filters_need_a_single_batch() -> None:
    toy = Toy(2)
    with pytest.raises(torch.OutOfMemoryError):
        toy_run([1, 2, 3], toy, batch_size=3, single_batch=True)
    assert toy.batch_sizes == [3]


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"batch_size": 3, "tolerance": 0.1}], ids=str)
def test_single_batch_refuses_another_batch_size_and_a_tolerance(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="3 filters that depend on each other need batch_size=3 and no tolerance"):
        toy_run([1, 2, 3], single_batch=True, **options)


def test_filter_does_not_converge_while_its_score_becomes_finite() -> None:
    class LateFinite(Toy):
        """Has no finite score before its fifth step."""

        def __call__(self, weights: dict[str, Tensor], state: State, target: Tensor) -> tuple[State, Info]:
            state, info = super().__call__(weights, state, target)
            finite = state.step > 4
            return state, info._replace(score=torch.where(finite, info.score, torch.nan), finite=finite)

    assert toy_run([30], LateFinite(), tolerance=0.0, patience=4).steps.item() == STEPS


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.0, "patience": 4, "batch_size": 2}], ids=str)
def test_progress_adds_up_to_all_steps(options: dict[str, Any]) -> None:
    progress: list[int] = []
    toy_run([1, 30, 3, 1, 7], progress=progress.append, **options)
    assert sum(progress) == 5 * STEPS


def test_progress_is_negative_where_filters_start_again() -> None:
    progress: list[int] = []
    with pytest.warns(UserWarning, match="going on with 2"):
        toy_run(range(1, 9), LaterOutOfMemory(), batch_size=4, progress=progress.append)
    assert [number for number in progress if number < 0] == [-4 * 3]
    assert sum(progress) == 8 * STEPS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"tolerance": -0.1}, "tolerance must be finite and at least 0, got -0.1"),
        ({"tolerance": float("nan")}, "tolerance must be finite and at least 0, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_run([1], **options)


def test_no_filters_are_refused() -> None:
    with pytest.raises(ValueError, match="number of filters must be at least 1, got 0"):
        toy_run([])


# --- snapshots ------------------------------------------------------------------------------------------------------


def counting_init(filters: Sequence[int]) -> tuple[State, Tensor]:
    """Make the state of a :class:`Counting`: the parameters are a filter's number and its number of steps."""
    state, target = toy_init(filters)
    return state._replace(params=torch.stack([target, torch.zeros_like(target)], dim=1).float()), target


class Counting(Toy):
    """A toy step that also counts the steps of each filter in its parameters."""

    def __call__(self, weights: dict[str, Tensor], state: State, target: Tensor) -> tuple[State, Info]:
        params = state.params + torch.tensor([0.0, 1.0])
        state, info = super().__call__(weights, state, target)
        return state._replace(params=params), info


def counting_run(filters: Sequence[int], toy: Toy | None = None, **options: Any) -> RunResult:
    def decode(state: State) -> Tensor:
        return state.params.reshape(-1, 2, 1, 1) / 255

    return run_batched(toy or Counting(), {}, counting_init, filters, **{"steps": STEPS, "decode": decode, **options})


def expected_snapshots(filters: Sequence[int], at_steps: Sequence[int], last_steps: Sequence[int]) -> Tensor:
    rows = [[[number, min(at, last)] for at in at_steps] for number, last in zip(filters, last_steps, strict=True)]
    return torch.tensor(rows, dtype=torch.uint8)[..., None, None]


@pytest.mark.parametrize("count", [1, 4, STEPS + 1])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("options", [{}, {"tolerance": 0.0, "patience": 4}, {"tolerance": 0.0, "patience": 5}], ids=str)
def test_snapshots_show_each_filter_at_its_own_steps(options: dict[str, Any], batch_size: int, count: int) -> None:
    filters = [7, 1, 30, 4, 9, 1, 3]
    plain = counting_run(filters, batch_size=batch_size, **options)
    assert plain.snapshots is None
    with_snapshots, without = Counting(), Counting()
    result = counting_run(filters, with_snapshots, batch_size=batch_size, pad=True, snapshots=count, **options)
    assert result.snapshots is not None
    assert result.snapshots.dtype == torch.uint8
    at_steps = fv.snapshot_steps(STEPS, count)
    assert torch.equal(result.snapshots, expected_snapshots(filters, at_steps, result.steps.tolist()))
    torch.testing.assert_close((result.best, result.info), (plain.best, plain.info), rtol=0, atol=0, equal_nan=True)
    counting_run(filters, without, batch_size=batch_size, pad=True, **options)
    assert with_snapshots.batch_sizes == without.batch_sizes, "snapshots must not take steps of their own"


def test_snapshots_are_complete_if_memory_runs_out_in_a_step() -> None:
    class CountingOutOfMemory(Counting, LaterOutOfMemory):
        pass

    with pytest.warns(UserWarning, match="going on with 2"):
        result = counting_run(range(1, 9), CountingOutOfMemory(), batch_size=4, snapshots=3)
    assert result.snapshots is not None
    assert torch.equal(result.snapshots, expected_snapshots(range(1, 9), (0, 6, 12), [STEPS] * 8))


def test_snapshots_are_complete_if_memory_runs_out_while_decoding() -> None:
    calls: list[Tensor] = []

    def decode(state: State) -> Tensor:
        calls.append(state.params)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("too many")
        return state.params.reshape(-1, 2, 1, 1) / 255

    with pytest.warns(UserWarning, match="going on with 1"):
        result = counting_run([5, 6, 7], batch_size=3, snapshots=3, decode=decode)
    assert result.snapshots is not None
    assert torch.equal(result.snapshots, expected_snapshots([5, 6, 7], (0, 6, 12), [STEPS] * 3))


def test_nothing_is_decoded_without_snapshots() -> None:
    def decode(state: State) -> Tensor:
        raise AssertionError("decode was called")

    assert counting_run([1, 2], decode=decode).snapshots is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snapshots": STEPS + 2}, r"snapshots must be in \[0, 13\] for steps=12, got 14"),
        ({"snapshots": -1}, r"snapshots must be in \[0, 13\] for steps=12, got -1"),
        ({"snapshots": 2, "decode": None}, "snapshots=2 needs decode="),
    ],
    ids=str,
)
def test_invalid_snapshots_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counting_run([1], **options)


@pytest.mark.parametrize("steps", [1, 2, 7, 32, 513])
def test_snapshot_steps_are_evenly_spaced_from_0_to_the_last_step(steps: int) -> None:
    for count in range(2, steps + 2):
        at_steps = fv.snapshot_steps(steps, count)
        assert (len(at_steps), at_steps[0], at_steps[-1]) == (count, 0, steps)
        gaps = {b - a for a, b in itertools.pairwise(at_steps)}
        assert gaps <= {steps // (count - 1), -(-steps // (count - 1))}
    assert fv.snapshot_steps(steps, 1) == (steps,)
    assert fv.snapshot_steps(steps, 0) == ()


# --- rendering ------------------------------------------------------------------------------------------------------


def assert_results_close(a: Result, b: Result) -> None:
    assert torch.equal(a.steps, b.steps)
    torch.testing.assert_close(a.history, b.history, rtol=1e-3, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(a.images, b.images, rtol=0, atol=0.02)


@pytest.mark.slow
def test_images_with_a_tolerance_do_not_depend_on_the_batch_size(tiny: Model) -> None:
    options: dict[str, Any] = {"steps": 40, "tolerance": 0.05, "transforms": "none", "optimizer": "published"}
    reference = render(tiny, "5", batch_size=6, **options)
    assert len(set(reference.steps.tolist())) > 1
    assert (reference.steps < 40).any()
    for batch_size in (1, 4):
        assert_results_close(render(tiny, "5", batch_size=batch_size, **options), reference)
    all_steps = render(tiny, "5", batch_size=6, **{**options, "tolerance": None})
    for i, steps in enumerate(reference.steps.tolist()):
        torch.testing.assert_close(all_steps.history[:steps, i], reference.history[:steps, i])
        assert reference.history[steps:, i].isnan().all()


@pytest.mark.slow
def test_images_are_the_same_if_memory_runs_out(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = render(tiny, "5", steps=4)
    real_run = batching.run

    def run_two_at_most(step: Any, weights: Any, state: State, target: Tensor, **options: Any) -> Any:
        if len(target) > 2:
            raise torch.OutOfMemoryError("too many")
        return real_run(step, weights, state, target, **options)

    monkeypatch.setattr(batching, "run", run_two_at_most)
    with pytest.warns(UserWarning, match="going on with 3"), pytest.warns(UserWarning, match="going on with 1"):
        assert_results_close(render(tiny, "5", steps=4), reference)


@pytest.mark.parametrize("tolerance", [None, 0.0])
def test_nothing_of_filters_that_ended_is_kept_on_the_device_during_the_next_steps(tolerance: float | None) -> None:
    made: list[weakref.ref[Tensor]] = []

    def init(filters: Sequence[int]) -> tuple[State, Tensor]:
        state, target = toy_init(filters)
        if made:  # the first one is held by what runs
            made.append(weakref.ref(state.params))
        return state, target

    def finish(_: Any, state: State, __: Any) -> State:
        made.append(weakref.ref(state.best.image))
        finished = state._replace(best=state.best._replace(image=state.best.image + 1))
        made.append(weakref.ref(finished.best.image))
        return finished

    class Watching(Toy):
        def __call__(self, weights: Any, state: State, target: Tensor) -> tuple[State, Info]:
            own = {id(leaf) for leaf in tree_leaves(state)}
            assert all(ref() is None or id(ref()) in own for ref in made)
            made.clear()
            made.append(weakref.ref(torch.zeros(1)))
            return super().__call__(weights, state, target)

    options: dict[str, Any] = {"steps": 6, "batch_size": 2, "tolerance": tolerance, "patience": 2, "finish": finish}
    run_batched(Watching(), {}, init, [1, 9, 2, 7, 3], **options)


# --- device ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("two", "six", "free", "batch_size"),
    [
        (300.0, 700.0, 10_200.0, 80),  # 100 + 100 n bytes in 8160
        (300.0, 700.0, 1_000.0, 7),
        (300.0, 700.0, 10.0, 1),
        (300.0, 300.0, 1e12, 256),
        (300.0, 700.0, 1e12, 256),
    ],
)
def test_plan_batch_size_fills_four_fifths_of_the_memory(two: float, six: float, free: float, batch_size: int) -> None:
    assert plan_batch_size(two, six, free) == batch_size


@pytest.fixture
def memory_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Toy, float], None]:
    """A function that makes a toy's batches take 100 bytes, and 100 more for each filter, of 10,200 that are free."""

    def memory_of(toy: Toy, reserved_share: float) -> None:
        taken = lambda: 100 + 100 * toy.batch_sizes[-1]  # noqa: E731
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (9_000, 20_000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1_300)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 100 + taken())
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 100 + reserved_share * taken())

    return memory_of


def tried(toy: Toy) -> list[int]:
    """The batch sizes that a toy ran with, each for two steps."""
    assert toy.batch_sizes[::2] == toy.batch_sizes[1::2]
    return toy.batch_sizes[::2]


def test_probe_batch_size_plans_by_2_and_6_filters_and_tries_what_it_planned(memory_of: Any) -> None:
    device = torch.device("cuda")
    for most, expected in ((256, 80), (24, 24), (17, 17)):
        toy = Toy()
        memory_of(toy, 1.1)
        assert probe_batch_size(lambda toy=toy: toy, {}, toy_init, [1], device=device, most=most) == expected
        assert tried(toy) == [2, 2, 6, expected]


def test_probe_batch_size_shrinks_what_takes_more_than_was_planned(memory_of: Any) -> None:
    toy = Toy()
    memory_of(toy, 1.5)  # 9,180 of 10,200 hold 6,120 bytes of tensors
    assert probe_batch_size(lambda: toy, {}, toy_init, [1], device=torch.device("cuda")) == 56
    assert tried(toy) == [2, 2, 6, 80, 56]


def test_probe_batch_size_shrinks_what_does_not_fit(memory_of: Any) -> None:
    toy = Toy(max_batch_size=70)
    memory_of(toy, 1.0)
    assert probe_batch_size(lambda: toy, {}, toy_init, [1], device=torch.device("cuda")) == 64
    assert probe_batch_size(lambda: Toy(1), {}, toy_init, [1], device=torch.device("cuda")) == 1


def test_is_out_of_memory_recognises_the_errors_of_torch_and_of_python() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)


def test_deterministic_algorithms_restores_all_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = torch.utils.deterministic

    def current() -> tuple[bool, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            settings.fill_uninitialized_memory,
            torch.backends.cudnn.benchmark,
        )

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(settings, "fill_uninitialized_memory", True)
    before = current()
    with algorithms(torch.device("cpu"), deterministic=True):
        assert current() == (True, False, False, False)
    assert current() == before
    with pytest.raises(ValueError, match="finite"), algorithms(torch.device("cpu"), deterministic=True):
        toy_run([1], tolerance=-1.0)
    assert current() == before
    with algorithms(torch.device("cpu"), deterministic=False):
        assert current() == before


def test_deterministic_algorithms_restores_warn_only() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with algorithms(torch.device("cpu"), deterministic=True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_rendering_is_repeatable_and_restores_the_settings(tiny: Model) -> None:
    plain = render(tiny, "5", [0, 4], steps=3)
    first, second = (render(tiny, "5", [0, 4], steps=3, deterministic=True) for _ in range(2))
    assert not torch.are_deterministic_algorithms_enabled()
    torch.testing.assert_close(first.history, plain.history, rtol=1e-3, atol=1e-4)
    assert torch.equal(first.images, second.images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_deterministic_rendering_on_cuda_is_bit_equal(tiny: Model) -> None:
    options: dict[str, Any] = {"steps": 4, "device": "cuda", "deterministic": True}
    first, second = (render(tiny, "5", compile=False, **options) for _ in range(2))
    assert torch.equal(first.images, second.images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_steps_on_cuda_do_not_synchronize(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    real_run = batching.run

    def run_without_synchronizing(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real_run(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(batching, "run", run_without_synchronizing)
    render(tiny, "5", steps=4, device="cuda")


# --- compiling ------------------------------------------------------------------------------------------------------


def selected_step(
    compile: str, *, pixels: int = 1, exported: bool = True, device: str = "cpu", ahead: bool = False
) -> Any:
    none: Any = None
    ascent = Ascent(none, Toy(), none, none, none, none)
    return device_module.select_step(
        ascent, compile, device=torch.device(device), pixels=pixels, exported=exported, ahead=ahead, name="Net"
    )


@pytest.mark.parametrize(("given", "eager", "compiled", "on_cuda"), [
    ((8, 1), 2, 8, 1), ((8, 5), 5, 8, 5), ((8, 100), 8, 8, 8), ((1, 5), 1, 1, 1), ((100, 6), 6, 8, 6),
    ((16, 17), 9, 16, 16), ((16, 20), 10, 16, 16), ((16, 49), 13, 16, 16), ((3, 4), 2, 3, 3),
])  # fmt: skip
def test_batches_are_as_large_as_the_filters_and_the_rounding_need(
    given: tuple[int, int], eager: int, compiled: int, on_cuda: int, one_thread: None
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert device_module.fit_batch_size(*given, cpu) == eager
    assert device_module.fit_batch_size(*given, cpu, compiled=True) == compiled
    assert device_module.fit_batch_size(*given, cuda, compiled=True) == on_cuda


def test_select_step_compiles_automatically_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(device_module, "compile_step", compiled.append)
    assert isinstance(selected_step("auto"), Toy)
    assert isinstance(selected_step("no", pixels=10**12), Toy)
    assert isinstance(selected_step("auto", pixels=10**12, exported=False), Toy)
    assert isinstance(selected_step("cudagraphs", device="cuda"), CapturedStep)
    assert isinstance(selected_step("cudagraphs", device="cuda", exported=False), CapturedStep)
    assert isinstance(selected_step("auto", device="cuda", pixels=10**9), CapturedStep)  # which costs next to nothing
    assert isinstance(selected_step("auto", device="cuda", exported=False), Toy)
    assert isinstance(selected_step("no", ahead=True), AheadStep)
    assert isinstance(selected_step("cudagraphs", device="cuda", ahead=True), AheadStep)
    assert compiled == []
    for ahead in (False, True):
        assert isinstance(selected_step("auto", pixels=10**12, ahead=ahead), CompiledStep)
        selected_step("auto", device="cuda", pixels=10**12, ahead=ahead)
        selected_step("yes", ahead=ahead)
        selected_step("cudagraphs", ahead=ahead)
    assert len(compiled) == 8
    with pytest.raises(ValueError, match="Net cannot be exported and therefore not be compiled; use compile=False"):
        selected_step("yes", exported=False)


def test_select_step_falls_back_to_the_eager_step_if_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(device_module, "compile_step", lambda *_, **__: broken)
    step = selected_step("auto", pixels=10**12)
    state, target = toy_init([3])
    with pytest.warns(UserWarning, match="going on without torch.compile, which failed: no compiler here$"):
        after, _ = step({}, state, target)
    step({}, after, target)
    step({}, *toy_init([3, 4]))
    with pytest.raises(RuntimeError, match="no compiler here"):
        selected_step("yes")({}, state, target)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_step_is_compiled_once_for_all_filters_of_a_layer(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    # What Inductor makes of a step is tested elsewhere.
    monkeypatch.setattr(step_module, "compile_graph", lambda graph, *_, **__: graph)
    counters = torch._dynamo.utils.counters
    counters.clear()
    options: dict[str, Any] = {"steps": 20, "batch_size": 2, "tolerance": 0.05, "optimizer": "published"}
    compiled = render(tiny, "5", compile=True, **options)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert len(set(compiled.steps.tolist())) > 1
    eager = render(tiny, "5", compile=False, **options)
    torch.testing.assert_close(compiled.history[:4], eager.history[:4], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=1)
def test_compile_step_has_a_recompile_limit_of_its_own_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, *, backend, **o: real_compile(step, backend="eager", **o))
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Conv2d(3, 3, 3, padding=1)).eval()
    model = load_toy(net, size=8)
    options: dict[str, Any] = {"image": "pixel", "transforms": "none", "optimizer": "sgd", "redirect": 0}
    for layer in ("0", "1"):
        assert render(model, layer, [0], steps=1, compile=True, **options).status == ("ok",)


def test_leaves_of_a_run_result_have_the_filters_axis() -> None:
    result = toy_run([3, 4], batch_size=1)
    assert all(leaf.shape[0] == 2 for leaf in tree_leaves(result.best))
    assert all(leaf.shape == (STEPS, 2) for leaf in result.info)
