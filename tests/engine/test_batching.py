"""Filters pass through a batch of fixed width: whoever shares it, and whatever it does when memory runs out."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import featvis_func as fv
from featvis_func.engine import batching as slots
from featvis_func.engine import device as execution
from featvis_func.engine.batching import RunResult, run_batched
from featvis_func.engine.device import deterministic_algorithms, is_out_of_memory, plan_batch_size
from featvis_func.models import Model
from featvis_func.rendering.api import render
from featvis_func.rendering.result import Result
from featvis_func.tree import tree_leaves
from featvis_func.types import Best, Info, State

STEPS = 12


def toy_begin(filters: Sequence[int]) -> tuple[State, Tensor]:
    """A state that counts; a filter's number is its target."""
    count = len(filters)
    zeros = torch.zeros(count)
    best = Best(zeros - torch.inf, zeros[:, None, None, None], zeros, zeros.long() - 1)
    return State(zeros, (), torch.zeros(count, 2, dtype=torch.int64), zeros.long(), best), torch.tensor(list(filters))


class Toy:
    """Rises by one a step until the step that is the filter's number; then it rests. Counts what it is asked."""

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.widths: list[int] = []

    def __call__(self, weights: dict[str, Tensor], state: State, target: Tensor) -> tuple[State, Info]:
        self.widths.append(len(target))
        if len(target) > self.most:
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
    return run_batched(toy or Toy(), {}, toy_begin, filters, **{"steps": STEPS, **options})


def expected(filters: Sequence[int], taken: Sequence[int]) -> Tensor:
    history = torch.full((STEPS, len(filters)), torch.nan)
    for i, (number, count) in enumerate(zip(filters, taken, strict=True)):
        history[:count, i] = torch.arange(count).clamp_max(number)
    return history


@pytest.mark.parametrize("width", [1, 2, 3, 5, 50])
def test_every_filter_runs_to_its_end_in_the_order_asked_for(width: int) -> None:
    filters = [7, 1, 30, 4, 9]
    toy = Toy()
    outcome = toy_run(filters, toy, slots=width)
    assert torch.equal(outcome.info.score, expected(filters, [STEPS] * 5))
    assert outcome.steps.tolist() == [STEPS] * 5
    assert outcome.best.score.tolist() == [7, 1, 11, 4, 9]
    assert outcome.best.step.tolist() == [7, 1, 11, 4, 9]
    assert outcome.best.image.flatten().tolist() == filters
    assert set(toy.widths) == {min(width, 5)}
    assert len(toy.widths) == STEPS * -(-5 // min(width, 5))


# A filter that rises until step k is looked at after 4, 8 and 12 steps; one of number 0 has no gradient and goes on.
RESTS = {0: 12, 1: 8, 3: 8, 4: 12, 7: 12, 30: 12}


@pytest.mark.parametrize("width", [1, 2, 3, 6])
@pytest.mark.parametrize("filters", [[0, 1, 3, 4, 7, 30], [30, 3, 1, 0, 7, 4]], ids=str)
def test_a_filter_that_rests_gives_its_slot_away(filters: list[int], width: int) -> None:
    toy = Toy()
    outcome = toy_run(filters, toy, slots=width, tolerance=0.0, patience=4)
    taken = [RESTS[number] for number in filters]
    assert outcome.steps.tolist() == taken
    torch.testing.assert_close(outcome.info.score, expected(filters, taken), equal_nan=True)
    assert outcome.best.image.flatten().tolist() == filters
    assert not outcome.info.alive[8:, filters.index(1)].any()
    assert set(toy.widths) == {width}
    # Whoever waits takes the first slot that is free.
    free = [0] * width
    for steps in taken:
        free[free.index(min(free))] += steps
    assert len(toy.widths) == max(free)


def test_ages_that_are_no_multiples_of_the_patience_change_nothing() -> None:
    filters = [30, 1, 3, 4, 7, 1, 30, 3]
    one = toy_run(filters, slots=1, tolerance=0.0, patience=5)
    for width in (2, 3, 8):
        other = toy_run(filters, slots=width, tolerance=0.0, patience=5)
        assert torch.equal(one.steps, other.steps)
        torch.testing.assert_close(one.info.score, other.info.score, equal_nan=True)
    assert set(one.steps.tolist()) == {10, 12}


def test_the_tolerance_is_a_share_of_the_score() -> None:
    # 11 after 12 steps against 7 after 8: 57% more.
    assert toy_run([30], tolerance=0.5, patience=4).steps.item() == 12
    assert toy_run([30], tolerance=1.0, patience=2).steps.item() == 6  # 5 against 3: 67% more


@pytest.mark.parametrize("most", [1, 2, 3])
def test_out_of_memory_halves_the_batch(most: int) -> None:
    filters = list(range(1, 12))
    toy = Toy(most)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = toy_run(filters, toy, slots=8)
    halved = [(8, 4), (4, 2), (2, 1)][: 3 if most == 1 else 2]
    told = [f"out of memory with {a} filters at a time; going on with {b}" for a, b in halved]
    assert [str(warning.message) for warning in caught] == told
    torch.testing.assert_close(outcome.info.score, expected(filters, [STEPS] * 11))
    assert toy.widths[-1] == (2 if most > 1 else 1)


class Fills(Toy):
    """Takes four filters at a time to their end, but only two from the third step after that on."""

    def __call__(self, weights: dict[str, Tensor], state: State, target: Tensor) -> tuple[State, Info]:
        self.most = 4 if len(self.widths) < STEPS + 3 else 2
        return super().__call__(weights, state, target)


def test_what_was_finished_before_memory_ran_out_is_kept() -> None:
    toy = Fills()
    with pytest.warns(UserWarning, match="going on with 2"):
        outcome = toy_run(range(1, 9), toy, slots=4)
    assert outcome.best.image.flatten().tolist() == list(range(1, 9))
    assert toy.widths == [4] * (STEPS + 4) + [2] * 2 * STEPS


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), MemoryError(), RuntimeError("something else")])
def test_what_no_smaller_batch_helps_is_raised(error: Exception) -> None:
    calls: list[int] = []

    def step(weights: Any, state: State, target: Tensor) -> Any:
        calls.append(len(target))
        raise error

    helps = is_out_of_memory(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(type(error)):
            run_batched(step, {}, toy_begin, [1, 2, 3], steps=1)
    assert calls == ([3, 1] if helps else [3])


def test_a_filter_that_was_not_finite_and_now_rises_goes_on() -> None:
    class Late(Toy):
        def __call__(self, weights: dict[str, Tensor], state: State, target: Tensor) -> tuple[State, Info]:
            state, info = super().__call__(weights, state, target)
            finite = state.step > 4
            return state, info._replace(score=torch.where(finite, info.score, torch.nan), finite=finite)

    assert toy_run([30], Late(), tolerance=0.0, patience=4).steps.item() == STEPS


def test_progress_comes_to_the_whole() -> None:
    for options in ({}, {"tolerance": 0.0, "patience": 4, "slots": 2}):
        done: list[int] = []
        toy_run([1, 30, 3, 1, 7], progress=done.append, **options)
        assert sum(done) == 5 * STEPS


def test_progress_comes_to_the_whole_where_filters_begin_anew() -> None:
    done: list[int] = []
    with pytest.warns(UserWarning, match="going on with 2"):
        toy_run(range(1, 9), Fills(), slots=4, progress=done.append)
    assert [number for number in done if number < 0] == [-4 * 3]
    assert sum(done) == 8 * STEPS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"tolerance": -0.1}, "tolerance must be finite and at least 0, got -0.1"),
        ({"tolerance": float("nan")}, "tolerance must be finite and at least 0, got nan"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_run([1], **options)


# --- snapshots ------------------------------------------------------------------------------------------------------


def walk_begin(filters: Sequence[int]) -> tuple[State, Tensor]:
    """The parameters are a filter's number and how many steps it has taken."""
    state, target = toy_begin(filters)
    return state._replace(params=torch.stack([target, torch.zeros_like(target)], dim=1).float()), target


class Walk(Toy):
    """Counts its steps in the parameters, too."""

    def __call__(self, weights: dict[str, Tensor], state: State, target: Tensor) -> tuple[State, Info]:
        params = state.params + torch.tensor([0.0, 1.0])
        state, info = super().__call__(weights, state, target)
        return state._replace(params=params), info


def walk(filters: Sequence[int], toy: Toy | None = None, **options: Any) -> RunResult:
    def decode(params: Tensor) -> Tensor:
        return params.reshape(2, 1, 1) / 255

    return run_batched(toy or Walk(), {}, walk_begin, filters, **{"steps": STEPS, "decode": decode, **options})


def walked(filters: Sequence[int], moments: Sequence[int], taken: Sequence[int]) -> Tensor:
    rows = [[[number, min(moment, most)] for moment in moments] for number, most in zip(filters, taken, strict=True)]
    return torch.tensor(rows, dtype=torch.uint8)[..., None, None]


@pytest.mark.parametrize("count", [1, 2, 4, 5, STEPS + 1])
@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize("options", [{}, {"tolerance": 0.0, "patience": 4}, {"tolerance": 0.0, "patience": 5}], ids=str)
def test_snapshots_are_of_a_filters_own_steps(options: dict[str, Any], width: int, count: int) -> None:
    filters = [7, 1, 30, 4, 9, 1, 3]
    plain = walk(filters, slots=width, **options)
    assert plain.snapshots is None
    toys = Walk(), Walk()
    outcome = walk(filters, toys[0], slots=width, pad=True, snapshots=count, **options)
    assert outcome.snapshots is not None
    assert outcome.snapshots.dtype == torch.uint8
    moments = fv.snapshot_steps(STEPS, count)
    assert torch.equal(outcome.snapshots, walked(filters, moments, outcome.steps.tolist()))
    torch.testing.assert_close((outcome.best, outcome.info), (plain.best, plain.info), rtol=0, atol=0, equal_nan=True)
    walk(filters, toys[1], slots=width, pad=True, **options)
    assert toys[0].widths == toys[1].widths, "snapshots take steps"


def test_snapshots_where_memory_runs_out() -> None:
    class Scarce(Walk, Fills):
        pass

    with pytest.warns(UserWarning, match="going on with 2"):
        outcome = walk(range(1, 9), Scarce(), slots=4, snapshots=3)
    assert outcome.snapshots is not None
    assert torch.equal(outcome.snapshots, walked(range(1, 9), (0, 6, 12), [STEPS] * 8))


def test_memory_that_runs_out_while_decoding_halves_the_batch_too() -> None:
    calls: list[Tensor] = []

    def decode(params: Tensor) -> Tensor:
        calls.append(params)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("too many")
        return params.reshape(2, 1, 1) / 255

    with pytest.warns(UserWarning, match="going on with 1"):
        outcome = walk([5, 6, 7], slots=3, snapshots=3, decode=decode)
    assert outcome.snapshots is not None
    assert torch.equal(outcome.snapshots, walked([5, 6, 7], (0, 6, 12), [STEPS] * 3))


def test_without_snapshots_nothing_is_decoded() -> None:
    def decode(params: Tensor) -> Tensor:
        raise AssertionError("nobody asked")

    assert walk([1, 2], decode=decode).snapshots is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snapshots": STEPS + 2}, r"snapshots must be 0 to 13, as 12 steps have so many images, got 14"),
        ({"snapshots": -1}, "snapshots must be 0 to 13"),
        ({"snapshots": 2, "decode": None}, "2 snapshots were asked for, but no decode="),
    ],
    ids=str,
)
def test_snapshots_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        walk([1], **options)


@pytest.mark.parametrize("steps", [1, 2, 7, 32, 513])
def test_moments_rise_evenly_from_the_start_to_the_end(steps: int) -> None:
    for count in range(2, steps + 2):
        moments = fv.snapshot_steps(steps, count)
        assert (len(moments), moments[0], moments[-1]) == (count, 0, steps)
        gaps = {b - a for a, b in itertools.pairwise(moments)}
        assert gaps <= {steps // (count - 1), -(-steps // (count - 1))}
    assert fv.snapshot_steps(steps, 1) == (steps,)
    assert fv.snapshot_steps(steps, 0) == ()


# --- in a render ----------------------------------------------------------------------------------------------------


def agree(a: Result, b: Result) -> None:
    assert torch.equal(a.steps, b.steps)
    torch.testing.assert_close(a.history, b.history, rtol=1e-3, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(a.images, b.images, rtol=0, atol=0.02)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_render_with_a_tolerance_is_the_same_in_any_batch(tiny: Model, batch_size: int) -> None:
    options: dict[str, Any] = {"steps": 40, "tolerance": 0.05, "views": "none", "optimizer": "published"}
    whole = render(tiny, "5", batch_size=6, **options)
    assert len(set(whole.steps.tolist())) > 1
    assert (whole.steps < 40).any()
    agree(render(tiny, "5", batch_size=batch_size, **options), whole)
    full = render(tiny, "5", batch_size=6, **{**options, "tolerance": None})
    for i, steps in enumerate(whole.steps.tolist()):
        torch.testing.assert_close(full.history[:steps, i], whole.history[:steps, i])
        assert whole.history[steps:, i].isnan().all()


def test_out_of_memory_gives_the_same_images(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = render(tiny, "5", steps=4)
    real = slots.run

    def scarce(step: Any, weights: Any, state: State, target: Tensor, **options: Any) -> Any:
        if len(target) > 2:
            raise torch.OutOfMemoryError("too many")
        return real(step, weights, state, target, **options)

    monkeypatch.setattr(slots, "run", scarce)
    with pytest.warns(UserWarning, match="going on with 3"), pytest.warns(UserWarning, match="going on with 1"):
        agree(render(tiny, "5", steps=4), whole)


# --- the device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("two", "six", "free", "slots"),
    [
        (300.0, 700.0, 10_200.0, 80),  # 100 + 100 n in 8160
        (300.0, 700.0, 1_000.0, 7),
        (300.0, 700.0, 10.0, 1),
        (300.0, 300.0, 1e12, 256),
        (300.0, 700.0, 1e12, 256),
    ],
)
def test_the_batch_that_fills_a_memory(two: float, six: float, free: float, slots: int) -> None:
    assert plan_batch_size(two, six, free) == slots


def test_the_memory_is_probed_on_two_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (9_000, 20_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1_300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 200 + 100 * toy.widths[-1])
    device = torch.device("cuda")
    assert execution.probe_batch_size(toy, {}, toy_begin, [1], device=device) == 80
    assert toy.widths == [2, 2, 6]
    assert execution.probe_batch_size(Toy(1), {}, toy_begin, [1], device=device) == 1
    assert execution.probe_batch_size(toy, {}, toy_begin, [1], device=device, most=24) == 24


def test_what_says_that_memory_ran_out() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)


def test_deterministic_settings_are_put_back(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = torch.utils.deterministic

    def now() -> tuple[bool, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            settings.fill_uninitialized_memory,
            torch.backends.cudnn.benchmark,
        )

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(settings, "fill_uninitialized_memory", True)
    before = now()
    with deterministic_algorithms(True):
        assert now() == (True, False, False, False)
    assert now() == before
    with pytest.raises(ValueError, match="finite"), deterministic_algorithms(True):
        toy_run([1], tolerance=-1.0)
    assert now() == before
    with deterministic_algorithms(False):
        assert now() == before
    plain = render(tiny, "5", [0, 4], steps=3)
    exact = render(tiny, "5", [0, 4], steps=3, deterministic=True)
    assert now() == before
    torch.testing.assert_close(exact.history, plain.history, rtol=1e-3, atol=1e-4)
    again = render(tiny, "5", [0, 4], steps=3, deterministic=True)
    assert torch.equal(again.images, exact.images)


def test_deterministic_settings_that_warn_only_are_put_back() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_algorithms(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_reruns_are_bit_equal_and_the_loop_does_not_wait(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"steps": 4, "device": "cuda", "deterministic": True}
    results = [render(tiny, "5", compile=False, **options) for _ in range(2)]
    assert torch.equal(results[0].images, results[1].images)
    real = slots.run

    def strict(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(slots, "run", strict)
    render(tiny, "5", steps=4, device="cuda")


# --- compiling ------------------------------------------------------------------------------------------------------


def chosen(compile: str, *, pixels: int = 1, exported: bool = True, device: str = "cpu") -> Any:
    return execution.select_step(
        Toy(), compile, device=torch.device(device), pixels=pixels, exported=exported, name="Net"
    )


def test_auto_compiles_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    def compile_step(step: Any, *, cudagraphs: bool) -> Any:
        made.append(cudagraphs)
        return step

    monkeypatch.setattr(execution, "compile_step", compile_step)
    assert isinstance(chosen("auto"), Toy)
    assert isinstance(chosen("no", pixels=10**12), Toy)
    assert isinstance(chosen("auto", pixels=10**12, exported=False), Toy)
    assert made == []
    chosen("auto", pixels=10**12)
    chosen("auto", device="cuda")
    chosen("yes")
    assert made == [False] * 3
    chosen("cudagraphs")
    assert made[3:] == [True]
    with pytest.raises(ValueError, match="Net cannot be exported, and so not compiled"):
        chosen("yes", exported=False)
    with pytest.raises(ValueError, match="compile must be one of auto, yes, no, cudagraphs, got 'fast'"):
        chosen("fast")


def test_auto_goes_on_where_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(execution, "compile_step", lambda *_, **__: broken)
    step = chosen("auto", pixels=10**12)
    begun = toy_begin([3])
    with pytest.warns(UserWarning, match="goes on without torch.compile, which failed: no compiler here$"):
        state, _ = step({}, *begun)
    step({}, state, begun[1])
    step({}, *toy_begin([3, 4]))
    with pytest.raises(RuntimeError, match="no compiler here"):
        chosen("yes")({}, *begun)


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_a_whole_layer_compiles_once(tiny: Model) -> None:
    counters = torch._dynamo.utils.counters
    counters.clear()
    result = render(tiny, "5", steps=20, batch_size=2, tolerance=0.05, optimizer="published", compile=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert len(set(result.steps.tolist())) > 1
    eager = render(tiny, "5", steps=20, batch_size=2, tolerance=0.05, optimizer="published", compile=False)
    torch.testing.assert_close(result.history[:4], eager.history[:4], rtol=1e-3, atol=1e-4)


def test_many_layers_compile_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, *, backend, **o: real(step, backend="aot_eager", **o))
    count = torch._dynamo.config.recompile_limit + 2
    net = torch.nn.Sequential(*[torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(count)]).eval()
    model = fv.load_model(net, size=8)
    for layer in range(count):
        assert render(model, str(layer), [0], steps=1, compile=True).status == ("ok",)


def test_leaves_of_an_outcome_have_the_filters_axis() -> None:
    outcome = toy_run([3, 4], slots=1)
    assert all(leaf.shape[0] == 2 for leaf in tree_leaves(outcome.best))
    assert all(leaf.shape == (STEPS, 2) for leaf in outcome.info)
