"""Tests of sweeps: plans, failures of units, ranks, and the engines ``local``, ``torchrun`` and ``ray``."""

import gc
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

from featvis_func.backbone import source
from featvis_func.models import Model
from featvis_func.rendering.renderer import Renderer
from featvis_func.rendering.result import Result
from featvis_func.sweep import TooManyFailedError, dry_run, open_store, sweep, validate
from featvis_func.sweep import api as running
from featvis_func.sweep import launchers as engines
from featvis_func.sweep import ray_engine as cluster
from featvis_func.sweep.launchers import Rank, own_device, rank_of, run_units, wait_for_others
from featvis_func.sweep.layout import Folder, Run, start_folder
from featvis_func.sweep.plan import LayerPlan, Unit, plan_layers
from featvis_func.sweep.shard import record_failure
from featvis_func.sweep.validate import Status
from featvis_func.sweep.worker import Done, Worker, pending
from featvis_func.tree import tree_map
from tests.sweep_toys import HANG_SECONDS, Toy, join, kill_self, ready, start, toy_run
from tests.toys import TINY_SIZE, load_toy, make_tiny

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
QUICK: dict[str, Any] = {"steps": 1, "size": 32, "threads": 1, "precision": "float32", "compile": "no"}


def quick(**changes: Any) -> dict[str, Any]:
    return {**QUICK, **changes}


# --- plans ----------------------------------------------------------------------------------------


def test_layers_all_selects_convolutions_and_linear_layers(texturenet: Model, tiny: Model) -> None:
    plans = plan_layers(texturenet)
    sizes = {plan.layer: (len(plan.filters), len(plan.units)) for plan in plans}
    assert sizes == {
        "block1.conv": (24, 2), "block2.conv": (48, 3), "block3.conv": (80, 5), "block4.conv": (96, 6),
        "block5.conv": (128, 8), "block6.conv": (96, 6), "head": (32, 2),
    }  # fmt: skip
    assert plans[0].shape == (24, 96, 96)
    assert [plan.layer for plan in plan_layers(tiny)] == ["0", "3", "5", "9"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("head", ["head"]),
        ("block2", ["block2"]),
        ("2.conv", ["block2.conv"]),
        ("block[12].conv", ["block1.conv", "block2.conv"]),
        ("block?.conv", [f"block{i}.conv" for i in range(1, 7)]),
        ("*d", ["head"]),
        (["head", "block3.conv", "block1.conv*"], ["block1.conv", "block3.conv", "head"]),
        (("block3.conv", "head", "block3.conv", "block[3].conv"), ["block3.conv", "head"]),
        (iter(["head"]), ["head"]),
    ],
)
def test_layers_are_selected_by_name_unique_ending_or_pattern(
    texturenet: Model, layers: Any, expected: list[str]
) -> None:
    assert [plan.layer for plan in plan_layers(texturenet, layers)] == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("block7.conv", "no layer 'block7.conv'; did you mean 'block6.conv'"),
        (["head", "haed"], "no layer 'haed'; did you mean 'head'"),
        ("conv", "layer 'conv' is ambiguous; it could be 'block1.conv', 'block2.conv'"),
        ("block9*", r"no layer of texturenet fits the pattern 'block9\*'; 'featvis layers' lists them"),
        (["head", "[x]*"], "fits the pattern"),
        ([], "no layers were asked for: the list is empty"),
        ([3], "layers must be 'all', names or patterns, got 3"),
        (3, "layers must be 'all', names or patterns, got 3"),
    ],
)
def test_unknown_layers_are_rejected(texturenet: Model, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_layers(texturenet, layers)


def test_uncalled_layer_and_model_without_layers_are_rejected() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.ReLU(), nn.Conv2d(3, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.used(images)

    model = load_toy(Spare(), size=8)
    with pytest.raises(ValueError, match="layer 'spare' has no filters: a forward pass does not call it"):
        plan_layers(model, "spare")
    with pytest.raises(ValueError, match="Spare has no convolution and no linear layer; name its layers"):
        plan_layers(model)
    assert [plan.layer for plan in plan_layers(model, "*")] == ["used"]


def test_filters_are_limited_to_those_that_a_layer_has(tiny: Model) -> None:
    plans = plan_layers(tiny, filters=[11, 5, 0])
    assert {plan.layer: plan.filters for plan in plans} == {"0": (0, 5), "3": (0, 5, 11), "5": (0, 5), "9": (0,)}
    assert {plan.layer: plan.filters for plan in plan_layers(tiny, filters=10)} == {"3": (10,)}
    assert plan_layers(tiny, "9", range(5)) == plan_layers(tiny, "9")


def test_units_split_the_filters_of_a_layer_in_order(tiny: Model) -> None:
    (plan,) = plan_layers(tiny, "3", batch_size=5)
    assert (plan.batch_size, plan.unit_size) == (4, 4)  # as many batches, and none has empty rows
    assert [unit.filters for unit in plan.units] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    (plan,) = plan_layers(tiny, "3", range(11), batch_size=5)
    assert [unit.filters for unit in plan.units] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10)]
    (plan,) = plan_layers(tiny, "3", batch_size=5, unit_size=7)
    assert (plan.batch_size, [len(unit.filters) for unit in plan.units]) == (4, [7, 5])
    assert plan_layers(tiny, "3")[0].batch_size == 12
    assert plan_layers(tiny, "3", device="cuda")[0].batch_size == 12  # no more than there are
    assert plan_layers(tiny, "3", [4, 9], batch_size=5)[0].batch_size == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": []}, "no filters were asked for: the list is empty"),
        ({"filters": [-1]}, "no layer of the sweep has a filter -1; they have up to 12, numbered from 0"),
        ({"filters": [3, 12]}, "no layer of the sweep has a filter 12"),
        ({"filters": [3, 3]}, "filter 3 is asked for more than once"),
        ({"filters": "3"}, "filters must be whole numbers, got '3'"),
        ({"filters": [1.5]}, "filters must be whole numbers"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": -4}, "batch_size must be at least 1, got -4"),
        ({"batch_size": "many"}, "batch_size must be a whole number, got 'many'"),
        ({"batch_size": 2.0}, "batch_size must be a whole number, got 2.0"),
        ({"unit_size": 0}, "unit_size must be at least 1, got 0"),
    ],
)
def test_invalid_filters_and_sizes_are_rejected(tiny: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_layers(tiny, **options)


# --- failures of units ----------------------------------------------------------------------------------------------

Replace = Callable[[LayerPlan, Renderer], Any]


@pytest.fixture
def replace_renderers(monkeypatch: pytest.MonkeyPatch, cached_tracing: None) -> Callable[[Replace], None]:
    """Function that replaces the renderer of each layer by what another function makes of it."""
    real = running.renderers

    def replace_renderers(replace: Replace) -> None:
        def renderers(*args: Any, **options: Any) -> Callable[[LayerPlan], Any]:
            make = real(*args, **options)
            return lambda plan: replace(plan, make.single(plan))

        monkeypatch.setattr(running, "renderers", renderers)

    return replace_renderers


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """Return the entries of the event logs, in order: those of some kinds, or all."""
    lines = [json.loads(line) for path in sorted(folder.glob("events/*")) for line in path.read_text().splitlines()]
    return [line for line in lines if not kinds or line["event"] in kinds]


def outcomes(folder: Path) -> list[str]:
    return [line["outcome"] for line in events(folder, "unit")]


def equal_rows(one: Result, other: Result, rows: Iterable[int]) -> None:
    chosen = list(rows)
    for name in ("images", "activations", "scores", "best_step", "steps"):
        assert torch.equal(getattr(one, name)[chosen], getattr(other, name)[chosen]), name
    assert torch.equal(one.history[:, chosen], other.history[:, chosen])


@pytest.mark.slow
def test_out_of_memory_halves_the_batch_size_for_this_and_later_units(
    tiny: Model, replace_renderers: Callable[[Replace], None], tmp_path: Path
) -> None:
    small = sweep(tiny, "3", out=tmp_path / "small", batch_size=3, unit_size=6, **quick(steps=2))
    assert small.complete
    widths: list[int] = []

    def limit_memory(plan: LayerPlan, renderer: Renderer) -> Renderer:
        def step(weights: Any, state: Any, target: Tensor) -> Any:
            widths.append(len(target))
            if len(target) > 4:
                raise RuntimeError("CUDA error: out of memory")
            return renderer.step(weights, state, target)

        return renderer._replace(step=step)

    replace_renderers(limit_memory)
    with pytest.warns(UserWarning, match="out of memory with batch_size=6; going on with 3"):
        status = sweep(tiny, "3", out=tmp_path / "large", batch_size=6, **quick(steps=2))
    assert status.complete
    assert status.units == 2
    assert widths == [6] + [3] * 4 + [3] * 4
    assert outcomes(tmp_path / "large") == ["rendered"] * 2
    assert events(tmp_path / "large", "failure") == []
    equal_rows(open_store(tmp_path / "large").layer("3"), open_store(tmp_path / "small").layer("3"), range(12))


def start_with_nan(
    renderer: Renderer, number: int, seeds: Sequence[int], starts: list[tuple[list[int], int]]
) -> Renderer:
    """Return a renderer in which one filter starts with NaN for some seeds; append each start to ``starts``."""

    def init(chosen: Sequence[int], seed: int) -> Any:
        starts.append((list(chosen), seed))
        state, target = renderer.init(chosen, seed)
        rows = torch.tensor([i for i, f in enumerate(chosen) if f == number and seed in seeds], dtype=torch.int64)
        params = tree_map(lambda leaf: leaf.index_fill(0, rows, math.nan), state.params)
        return state._replace(params=params), target

    return renderer._replace(init=init)


@pytest.mark.slow
def test_nonfinite_filter_is_rendered_again_with_the_next_seed(
    tiny: Model, replace_renderers: Callable[[Replace], None], tmp_path: Path
) -> None:
    options = quick(steps=2)
    for seed in (7, 8):
        sweep(tiny, "3", out=tmp_path / str(seed), seed=seed, batch_size=6, **options)
    plain, other = (open_store(tmp_path / str(seed)).layer("3") for seed in (7, 8))
    starts: list[tuple[list[int], int]] = []
    replace_renderers(lambda plan, renderer: start_with_nan(renderer, 4, [7], starts))
    status = sweep(tiny, "3", out=tmp_path / "second", seed=7, batch_size=6, **options)
    assert starts == [([0, 1, 2, 3, 4, 5], 7), ([4] * 6, 8), ([6, 7, 8, 9, 10, 11], 7)]
    store = open_store(tmp_path / "second")
    mates = [f for f in range(12) if f != 4]
    equal_rows(store.layer("3"), plain, mates)
    equal_rows(store.layer("3"), other, [4])
    assert [entry.seed for entry in store] == [7] * 4 + [8] + [7] * 7
    expected = [*plain.status[:4], other.status[4], *plain.status[5:]]
    assert {*expected} <= {"ok", "flat"}  # two steps need not raise a score
    assert [entry.status for entry in store] == expected
    assert (status.complete, status.failed) == (True, {})

    starts.clear()
    replace_renderers(lambda plan, renderer: start_with_nan(renderer, 4, range(100), starts))
    status = sweep(tiny, "3", out=tmp_path / "never", seed=7, batch_size=6, **options)
    assert [seed for _, seed in starts] == [7, 8, 7]
    store = open_store(tmp_path / "never")
    equal_rows(store.layer("3"), plain, mates)
    expected[4] = "nonfinite"
    assert [entry.status for entry in store] == expected
    assert (store["3", 4].seed, store["3", 4].score) == (7, -math.inf)
    assert status.odd == {word: expected.count(word) for word in {*expected} - {"ok"}}
    assert (status.complete, status.failed) == (True, {})
    assert validate(tmp_path / "never").sound


class Failing:
    """Replacement of renderers that fails on some filters of a layer, a given number of times each."""

    def __init__(self, layer: str, filters: Iterable[int], times: int) -> None:
        self.layer = layer
        self.left = dict.fromkeys(filters, times)
        self.calls: list[int] = []

    def __call__(self, plan: LayerPlan, renderer: Renderer) -> Any:
        def render(filters: Sequence[int], *, seed: int | None = None) -> Result:
            for number in filters:
                if plan.layer == self.layer and self.left.get(number, 0) > 0:
                    self.calls.append(number)
                    self.left[number] -= 1
                    raise RuntimeError(f"filter {number} is cursed\nand more of it")
            return renderer(filters, seed=seed)

        return render


@pytest.mark.slow
def test_unit_that_fails_three_times_is_recorded_and_tried_by_the_next_run(
    tiny: Model, replace_renderers: Callable[[Replace], None], tmp_path: Path
) -> None:
    out = tmp_path / "store"
    cursed = Failing("3", [4], times=3)
    replace_renderers(cursed)
    status = sweep(tiny, ["0", "3"], out=out, unit_size=1, batch_size=2, **QUICK)
    assert (status.units, status.done, status.complete) == (20, 19, False)
    assert status.failed == {"3/00004-00004": "RuntimeError: filter 4 is cursed"}
    assert cursed.calls == [4] * 3
    failures = events(out, "failure")
    assert [(line["unit"], line["attempt"]) for line in failures] == [("3/00004-00004", n) for n in (1, 2, 3)]
    assert sorted(outcomes(out)) == ["failed"] + ["rendered"] * 19
    assert [line["event"] for line in events(out, "start", "end", "gave up", "interrupted")] == ["start", "end"]

    cursed = Failing("3", [4], times=2)  # the third attempt of the rerun succeeds
    replace_renderers(cursed)
    status = sweep(tiny, ["0", "3"], out=out, unit_size=1, batch_size=2, **QUICK)
    assert status.complete
    assert status.failed == {}
    assert cursed.calls == [4] * 2
    assert outcomes(out)[20:] == ["rendered"]
    assert validate(out).sound

    def never(plan: LayerPlan, renderer: Renderer) -> Any:
        raise AssertionError("a renderer is made although every unit is done")

    replace_renderers(never)
    assert sweep(tiny, ["0", "3"], out=out, unit_size=1, batch_size=2, **QUICK).complete
    assert len(outcomes(out)) == 21


@pytest.mark.slow
def test_run_stops_when_more_than_five_percent_failed(
    tiny: Model, replace_renderers: Callable[[Replace], None], tmp_path: Path
) -> None:
    out = tmp_path / "store"
    replace_renderers(Failing("0", [2, 5], times=3))
    with pytest.raises(TooManyFailedError, match="2 of 20 units failed, which is more than 5%; giving up"):
        sweep(tiny, ["0", "3"], out=out, unit_size=1, batch_size=2, **QUICK)
    assert outcomes(out) == ["rendered"] * 2 + ["failed"] + ["rendered"] * 2 + ["failed"]
    assert [line["event"] for line in events(out)][-1] == "gave up"
    replace_renderers(lambda plan, renderer: renderer)
    assert sweep(tiny, ["0", "3"], out=out, unit_size=1, batch_size=2, **QUICK).complete
    assert outcomes(out)[6:] == ["rendered"] * 16
    assert validate(out).sound


# --- one renderer per layer ----------------------------------------------------------------------------


@pytest.mark.slow
def test_all_layers_are_traced_at_once(tiny: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trace = source.trace
    traced: list[list[str]] = []

    def count(module: nn.Module, calls: Any, *arguments: Any) -> Any:
        traced.append([ref.path for ref in calls])
        return trace(module, calls, *arguments)

    monkeypatch.setattr(source, "trace", count)
    status = sweep(tiny, ["3", "9"], out=tmp_path, batch_size=5, **QUICK)
    assert (status.units, status.filters_done) == (3 + 1, 12 + 5)
    assert traced == [["3", "9"]]


@pytest.mark.slow
def test_each_layer_is_compiled_once(tiny: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compile_step = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, *, backend, **o: compile_step(step, backend="eager", **o))
    counters = torch._dynamo.utils.counters
    counters.clear()
    status = sweep(tiny, "3", out=tmp_path, batch_size=5, **quick(compile="yes"))
    assert (status.units, status.filters_done) == (3, 12)  # of 5, 5 and 2 filters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def measure_memory() -> tuple[float, int]:
    """Return the memory of this process in MiB, and its number of tensors."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, sum(type(one) is Tensor for one in gc.get_objects())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc, which tells how much memory is used")
def test_memory_and_tensors_do_not_accumulate_over_units(
    replace_renderers: Callable[[Replace], None], tmp_path: Path
) -> None:
    model = load_toy(nn.Sequential(nn.Conv2d(3, 41, 3)).eval(), size=64)
    at: dict[int, tuple[float, int]] = {}

    def watch(plan: LayerPlan, renderer: Renderer) -> Any:
        def render(filters: Sequence[int], *, seed: int | None = None) -> Result:
            if filters[0] in (10, 40):
                at[filters[0]] = measure_memory()
            return renderer(filters, seed=seed)

        return render

    replace_renderers(watch)
    assert sweep(model, "0", out=tmp_path, batch_size=2, unit_size=1, **quick(size=64)).done == 41
    assert at[40][0] < at[10][0] + 4
    assert at[40][1] == at[10][1]


# --- ranks ----------------------------------------------------------------------------------------------------------


def toy_render(filters: Sequence[int], /, *, seed: int | None = None) -> Result:
    """Return a result that depends on the filters only."""
    numbers = torch.tensor(list(filters))
    count = len(filters)
    return Result(
        images=(numbers / 100)[:, None, None, None].expand(count, 3, 4, 4).contiguous(),
        activations=numbers[:, None, None].float().expand(count, 2, 2).contiguous(),
        scores=numbers.float(),
        best_step=torch.zeros(count, dtype=torch.int64),
        filters=tuple(filters),
        status=("ok",) * count,
        history=numbers.float()[None],
        steps=torch.ones(count, dtype=torch.int64),
        config={},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Folder of a sweep of 15 units, in two layers."""
    plans = (LayerPlan("a", (20, 2, 2), tuple(range(20)), 2, 2), LayerPlan("b", (9, 2, 2), tuple(range(9)), 2, 2))
    return start_folder(tmp_path / "store", Run({"image_dtype": "uint8", "what": "toy"}, plans))


def make_worker(folder: Folder) -> Worker:
    return Worker(folder, lambda plan: toy_render, seed=0)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 15, 40])
def test_ranks_divide_all_units_evenly(folder: Folder, count: int) -> None:
    taken: list[Unit] = []
    shares: list[int] = []
    for number in range(count):
        own: list[Unit] = []

        def work(unit: Unit, own: list[Unit] = own) -> Done:
            own.append(unit)
            return Done(unit, "rendered", 0.0)

        run_units(folder, work, Rank(number, count))
        taken += own
        shares.append(len(own))
    assert sorted(taken) == sorted(folder.run.units)
    assert max(shares) - min(shares) <= 1


def test_interrupted_rank_resumes_when_it_is_started_again(folder: Folder) -> None:
    worker = make_worker(folder)
    seen: list[Unit] = []

    def work(unit: Unit, limit: float) -> Done:
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(unit)
        return worker(unit)

    with pytest.raises(KeyboardInterrupt):
        run_units(folder, lambda unit: work(unit, 2), Rank(1, 3))
    assert events(folder.path)[-1]["event"] == "interrupted"
    for number in range(3):
        run_units(folder, lambda unit: work(unit, math.inf), Rank(number, 3))
    assert sorted(seen) == sorted(folder.run.units)  # none of them twice
    assert pending(folder, folder.run.units) == []


def test_unit_that_another_process_has_done_is_not_rendered(folder: Folder) -> None:
    unit = folder.run.units[3]
    assert make_worker(folder)(unit).outcome == "rendered"
    before = content(folder.path)

    def never(plan: LayerPlan) -> Any:
        raise AssertionError("a renderer is made although the unit is done")

    assert Worker(folder, never, seed=0)(unit).outcome == "found"
    assert content(folder.path) == before


def test_failures_of_all_ranks_are_added(tmp_path: Path) -> None:
    plans = (LayerPlan("a", (100, 2, 2), tuple(range(100)), 1, 1),)
    folder = start_folder(tmp_path, Run({"image_dtype": "uint8"}, plans))

    def broken(filters: Sequence[int], /, *, seed: int | None = None) -> Result:
        raise RuntimeError("no such device")

    worker = Worker(folder, lambda plan: broken, seed=0)
    for number in range(2):  # two of 50 ranks, with 2 units each: none has 5% of all units
        run_units(folder, worker, Rank(number, 50))
    with pytest.raises(TooManyFailedError, match="6 of 100 units"):
        run_units(folder, worker, Rank(2, 50))


@pytest.mark.parametrize(
    ("engine", "environment", "expected"),
    [
        ("local", {}, Rank(0, 1, None)),
        ("ray", {"RANK": "3"}, Rank(0, 1, None)),
        ("torchrun", {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(5, 8, 1)),
        ("torchrun", {"RANK": "0", "WORLD_SIZE": "1"}, Rank(0, 1, None)),
        ("srun", {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, Rank(3, 8, 1)),
        ("array", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, Rank(3, 4, None)),
        ("array", {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}, Rank(3, 4)),
        (
            "array",  # --array=10-16:3
            {"SLURM_ARRAY_TASK_ID": "16", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "10",
             "SLURM_ARRAY_TASK_STEP": "3"},
            Rank(2, 3),
        ),
    ],
)  # fmt: skip
def test_rank_is_read_from_the_environment(engine: str, environment: dict[str, str], expected: Rank) -> None:
    assert rank_of(engine, environment) == expected


@pytest.mark.parametrize(
    ("engine", "environment", "message"),
    [
        ("slurm", {}, "unknown engine 'slurm'; expected one of local, torchrun, srun, array, ray"),
        ("torchrun", {}, "engine 'torchrun' needs the environment variable RANK, which its launcher sets"),
        ("torchrun", {"RANK": "0"}, "engine 'torchrun' needs the environment variable WORLD_SIZE"),
        ("srun", {"SLURM_NTASKS": "2"}, "engine 'srun' needs the environment variable SLURM_PROCID"),
        ("array", {"SLURM_ARRAY_TASK_ID": "0"}, "engine 'array' needs the environment variable SLURM_ARRAY_TASK_COUNT"),
        ("torchrun", {"RANK": "first", "WORLD_SIZE": "2"}, "needs integers in RANK and WORLD_SIZE.*'first'"),
        ("torchrun", {"RANK": "0", "WORLD_SIZE": ""}, "needs integers"),
        ("srun", {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "x"}, "needs integers"),
        ("torchrun", {"RANK": "2", "WORLD_SIZE": "2"}, "engine 'torchrun' expects RANK in 0 to 1, got 2"),
        ("torchrun", {"RANK": "-1", "WORLD_SIZE": "2"}, "expects RANK in 0 to 1, got -1"),
        (
            "array",
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2"},
            "without gaps, such as 0-15, but task 7 is not among 2",
        ),
    ],
)
def test_missing_or_invalid_rank_in_the_environment_is_rejected(
    engine: str, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rank_of(engine, environment)


def test_sweep_without_its_launcher_is_rejected_before_a_folder_is_created(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="needs the environment variable RANK"):
        sweep(tiny, out=tmp_path / "store", engine="torchrun")
    assert not (tmp_path / "store").exists()


def test_processes_of_one_machine_use_different_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_device("cuda", Rank(5, 8, 1)) == "cuda:1"
    assert own_device(torch.device("cuda"), Rank(5, 8, 6)) == "cuda:2"  # more processes than devices
    assert own_device("cuda:3", Rank(5, 8, 1)) == "cuda:3"
    assert own_device("cpu", Rank(5, 8, 1)) == "cpu"
    assert own_device(None, Rank(5, 8, 1)) is None
    assert own_device("cuda", Rank(5, 8)) == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # under srun, each task sees only its own
    assert own_device("cuda", Rank(5, 8, 1)) == "cuda"


def test_wait_for_others_returns_when_every_unit_is_done_or_failed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finish the last two units one by one while the function sleeps."""
    worker, units = make_worker(folder), folder.run.units
    for unit in units[:-2]:
        worker(unit)
    finish = [lambda: worker(units[-1]), lambda: None, lambda: record_failure(folder, units[-2], "RuntimeError: no", 3)]
    sleep = SimpleNamespace(sleep=lambda seconds: finish.pop(0)())
    monkeypatch.setattr(engines, "time", sleep)
    wait_for_others(folder, units)
    assert finish == []


# --- all engines write the same store ---------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, Any]:
    """Return all files of a store except logs, without the time, duration and host of each unit."""
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.parent.name == "events":
            continue
        name = str(path.relative_to(folder))
        files[name] = path.read_bytes()
        if name.startswith("units/") and path.suffix == ".json":
            value = json.loads(files[name])
            assert set(value.pop("written")) == {"host", "at", "seconds", "modified"}
            assert len(value.pop("seal")) == 64
            files[name] = value
    return files


ALL_OF_TINY = {**QUICK, "unit_size": 3}
"""Options of a sweep of all layers of the tiny model: 11 units, in 4 layers."""


@pytest.fixture(scope="module")
def local_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store of all layers of the tiny model, by the engine ``local``."""
    out = tmp_path_factory.mktemp("local") / "store"
    status = sweep(load_toy(make_tiny(), size=TINY_SIZE), out=out, **ALL_OF_TINY)
    assert status.complete
    assert status.units == 11
    return out


def check_same_store(out: Path, expected: Path) -> None:
    """Check that two complete stores are equal."""
    mine, other = content(out), content(expected)
    assert list(mine) == list(other)
    assert [name for name in mine if mine[name] != other[name]] == []
    assert len(mine) == 1 + 2 * 11
    assert validate(out).sound


# Two sweeps under one launch of torchrun. In the second, rank 0 fails on a unit. Rank 1 begins to render only when rank
# 0 has nothing left to do and waits for the others: rank 0 writes a line each time that it checks the other units.
TORCHRUN = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from featvis_func.sweep import api as running, launchers, sweep
from tests.toys import TINY_SIZE, load_toy, make_tiny

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
model = load_toy(make_tiny(), size=TINY_SIZE)
sweep(model, out=folder / "same", engine="torchrun", **ALL_OF_TINY)

looks, real, sleep = folder / "looks", running.renderers, time.sleep

def look(seconds):
    with looks.open("a") as file:
        file.write("look\\n")
    sleep(0.01)

launchers.time = SimpleNamespace(monotonic=time.monotonic, sleep=look)

def renderers(*args, **options):
    make = real(*args, **options)
    def replaced(plan):
        renderer = make(plan)
        def render(filters, *, seed=None):
            if (plan.layer, filters) == ("0", (0,)):
                raise RuntimeError("cursed")
            while rank and not (looks.exists() and len(looks.read_text().splitlines()) > 1):
                sleep(0.01)
            return renderer(filters, seed=seed)
        return render
    return replaced

running.renderers = renderers
status = sweep(model, ["0", "3"], out=folder / "failing", engine="torchrun", unit_size=1, **QUICK)
(folder / f"status.{rank}").write_text(f"{status.done} {status.failed}")
sys.exit(1 if status.failed else 0)
""".replace("ALL_OF_TINY", repr(ALL_OF_TINY)).replace("QUICK", repr(QUICK))


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Folder with the sweeps of two processes of torchrun, and how the launcher ended."""
    folder = tmp_path_factory.mktemp("torchrun")
    script = folder / "script.py"
    script.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return folder, subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=HANG_SECONDS
    )


@pytest.mark.slow
def test_two_processes_of_torchrun_write_the_same_store(
    local_store: Path, torchrun: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    folder, ended = torchrun
    assert (folder / "same" / "run.json").exists(), ended.stderr
    check_same_store(folder / "same", local_store)
    assert outcomes(folder / "same") == ["rendered"] * 11
    shares = [len(path.read_text().splitlines()) - 2 for path in folder.glob("same/events/*")]
    assert sorted(shares) == [5, 6]


@pytest.mark.slow
def test_rank_with_a_failed_unit_waits_for_the_others_before_it_exits(
    torchrun: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, ended = torchrun
    assert ended.returncode == 1, ended.stderr
    assert sorted(outcomes(folder / "failing")) == ["failed"] + ["rendered"] * 19
    assert validate(folder / "failing").status.done == 19
    # The first process that exits with an error may make torchrun stop the other one before it has written this.
    written = {path.read_text() for path in folder.glob("status.*")}
    assert written == {"19 {'0/00000-00000': 'RuntimeError: cursed'}"}


@pytest.mark.slow
def test_dry_run_estimates_the_bytes_of_the_store(cached_tracing: None, tiny: Model, tmp_path: Path) -> None:
    large = load_toy(nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 40, 3)).eval(), size=48)
    small: dict[str, Any] = {"steps": 30, "size": 16, "precision": "float32", "compile": "no"}
    before = set(Path.cwd().iterdir())
    # In the small one, what is stored of each filter beside the images weighs as much as the images.
    for name, model, layers, dtype, options in (
        ("large", large, "all", "uint8", {**small, "steps": 1, "size": 32}),
        ("small", tiny, ["3", "5"], "float16", small),
    ):
        status = sweep(model, layers, out=tmp_path / name, image_dtype=dtype, **options)
        dry = dry_run(model, layers, image_dtype=dtype, **options)
        assert sum(len(plan.filters) for plan in dry.plans) == status.filters
        assert sum(len(plan.units) for plan in dry.plans) == status.units
        size = sum(path.stat().st_size for path in (tmp_path / name / "units").rglob("*") if path.is_file())
        assert dry.estimate.bytes == pytest.approx(size, rel=0.05)
        assert 0 < dry.estimate.seconds < math.inf
    assert set(Path.cwd().iterdir()) == before


def sweep_in_child(connection: Connection, out: Path, kill_at: int) -> None:
    """Sweep a layer of the tiny model in a child process, which kills itself in its n-th optimization step."""
    ready(connection)
    real, steps = running.renderers, [0]

    def replace(renderer: Renderer) -> Renderer:
        def step(weights: Any, state: Any, target: Tensor) -> Any:
            steps[0] += 1
            if steps[0] == kill_at:
                kill_self()
            return renderer.step(weights, state, target)

        return renderer._replace(step=step)

    def renderers(*args: Any, **options: Any) -> Callable[[LayerPlan], Renderer]:
        make = real(*args, **options)
        return lambda plan: replace(make.single(plan))

    running.renderers = renderers
    model = load_toy(make_tiny(), size=TINY_SIZE)
    status = sweep(model, "0", out=out, batch_size=1, **quick(steps=3))
    sys.exit(0 if status.complete else 3)


@pytest.mark.slow
def test_sweep_that_is_killed_during_rendering_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    """Kill it in the first unit, and then in a unit after two and after three others: 8 units of 3 steps."""
    assert join(*start(sweep_in_child, tmp_path / "undisturbed", 0)) == 0
    for kill_at, done in ((2, 0), (7, 2), (12, 5)):
        assert join(*start(sweep_in_child, tmp_path / "killed", kill_at)) == -signal.SIGKILL
        assert validate(tmp_path / "killed").status.done == done
    assert join(*start(sweep_in_child, tmp_path / "killed", 0)) == 0
    report = validate(tmp_path / "killed")
    assert report.status.complete
    assert report.sound
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")
    rendered = [line["unit"] for line in events(tmp_path / "killed", "unit") if line["outcome"] == "rendered"]
    assert len(rendered) == len(set(rendered)) == 8


# --- Ray ------------------------------------------------------------------------------------------------------------


class Nodes:
    """Simulated cluster of a head without processors and of nodes with one processor each."""

    def __init__(self, simulated: Any) -> None:
        self._simulated = simulated
        self.up: list[Any] = []

    def add(self) -> Any:
        node = self._simulated.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        self.up.append(node)
        return node

    def remove(self, node: Any) -> None:
        self.up.remove(node)
        self._simulated.remove_node(node, allow_graceful=False)

    def reset(self, count: int) -> None:
        """Add or remove nodes until there are ``count``."""
        while len(self.up) > count:
            self.remove(self.up[-1])
        while len(self.up) < count:
            self.add()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    ray = pytest.importorskip("ray", reason="the engine ray needs the extra ray")
    utilities = pytest.importorskip("ray.cluster_utils")
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "object_store_memory": 80 * 2**20,
        # Notice within seconds that a node is lost.
        "_system_config": {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 6,
        },
    }
    simulated = utilities.Cluster(initialize_head=True, head_node_args=head)
    # The actors cannot import this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        ray.init(address=simulated.address, log_to_driver=False, logging_level="ERROR")
        yield Nodes(simulated)
    finally:
        ray.shutdown()
        simulated.shutdown()


class Marked(nn.Module):
    """Network of two layers that creates a file for each process that runs it, and waits while the file hold exists."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.folder, self.home = str(folder), os.getpid()

    def forward(self, images: Tensor) -> Tensor:
        if float(images.detach().sum()) == math.inf:  # cannot be exported: the code below runs in every step
            return images
        x = self.first(images)
        if os.getpid() == self.home:
            return self.second(x)
        import ray

        node = ray.get_runtime_context().get_node_id()
        (Path(self.folder) / f"{node}.{os.getpid()}").touch()
        while (Path(self.folder) / "hold").exists():
            time.sleep(0.02)
        return self.second(x)


class Marks:
    """Files of the processes that run a :class:`Marked` network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = load_toy(Marked(folder).eval(), size=12)

    def hold(self) -> None:
        """Make every process wait at the beginning of its next step."""
        (self.folder / "hold").touch()

    def release(self) -> None:
        (self.folder / "hold").unlink(missing_ok=True)

    def seen(self) -> dict[str, int]:
        """Return the latest process of each node."""
        marks = sorted(self.folder.glob("*.*"), key=lambda path: path.stat().st_mtime_ns)
        return {path.stem: int(path.suffix[1:]) for path in marks}

    def wait(self, *, nodes: Iterable[Any] = (), processes: int = 0, sweep: threading.Thread) -> None:
        """Wait until these nodes, and so many processes, have begun a step."""
        names = {node.node_id for node in nodes}
        end = time.monotonic() + HANG_SECONDS
        while not (names <= set(self.seen()) and len(list(self.folder.glob("*.*"))) >= processes):
            assert sweep.is_alive(), "the sweep has ended"
            assert time.monotonic() < end, self.seen()
            time.sleep(0.05)


MARKED = quick(size=12, unit_size=1, batch_size=2)


@pytest.mark.slow
def test_two_nodes_of_ray_write_the_same_store(local_store: Path, nodes: Nodes, tmp_path: Path) -> None:
    nodes.reset(2)
    out = tmp_path / "store"
    assert sweep(load_toy(make_tiny(), size=TINY_SIZE), out=out, engine="ray", **ALL_OF_TINY).complete
    check_same_store(out, local_store)
    assert outcomes(out) == ["rendered"] * 11


@pytest.mark.slow
def test_ray_run_survives_the_loss_of_an_actor_and_a_node_and_uses_a_new_node(nodes: Nodes, tmp_path: Path) -> None:
    nodes.reset(2)
    marks, out = Marks(tmp_path / "marks"), tmp_path / "store"
    marks.hold()
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(sweep(marks.model, out=out, engine="ray", **MARKED))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        first, second = nodes.up
        marks.wait(nodes=nodes.up, sweep=thread)  # both are rendering a unit
        os.kill(marks.seen()[first.node_id], signal.SIGKILL)
        marks.wait(processes=3, sweep=thread)  # another process has replaced it
        nodes.remove(second)
        joined = nodes.add()
        marks.wait(nodes=[joined], sweep=thread)
    finally:
        marks.release()
        thread.join(HANG_SECONDS)
    (status,) = results
    assert isinstance(status, Status), status
    assert status.complete
    assert status.units == 6
    # An actor that was being started on the removed node is lost too, but had no unit.
    lost = [line["unit"] for line in events(out, "lost") if line["unit"] is not None]
    assert len(lost) == 2
    assert outcomes(out) == ["rendered"] * 6
    assert validate(out).sound
    with pytest.warns(UserWarning, match="could not be exported"):
        assert sweep(marks.model, out=tmp_path / "plain", **MARKED).complete
    assert content(out) == content(tmp_path / "plain")


class LostError(Exception):
    """Stands for Ray's error of a lost actor."""


class TaskError(Exception):
    """Stands for Ray's error that wraps an exception of an actor."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"ray::work() at length\n{cause!r}")
        self.cause = cause


class FakeRay:
    """Substitute for the module ``ray`` that runs everything in this process.

    Args:
        work: What an actor does with a unit.
        nodes: Resources of each node, for each call of ``ray.nodes()``; the last entry is repeated.
        ready: What an actor does when it starts.
    """

    exceptions = SimpleNamespace(RayTaskError=TaskError)

    def __init__(
        self,
        work: Callable[[Unit], Done],
        *,
        nodes: Sequence[Sequence[dict[str, float]]] = ([{"CPU": 1}],),
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._nodes = [list(resources) for resources in nodes]
        self._ready, self._work = ready, work
        self.options: dict[str, Any] = {}
        self.actors: list[tuple[Any, ...]] = []
        self.max_pending = 0

    def nodes(self) -> list[dict[str, Any]]:
        nodes = self._nodes.pop(0) if len(self._nodes) > 1 else self._nodes[0]
        return [{"Alive": True, "Resources": resources} for resources in nodes] + [{"Alive": False, "Resources": {}}]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.options = options
        return lambda cls: SimpleNamespace(remote=self._make_actor)

    def _make_actor(self, *arguments: Any) -> Any:
        self.actors.append(arguments)
        return SimpleNamespace(
            ready=SimpleNamespace(remote=lambda: lambda: self._ready()),
            work=SimpleNamespace(remote=lambda unit: lambda: self._work(unit)),
        )

    def wait(self, results: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.max_pending = max(self.max_pending, len(results))
        return results[:1], results[1:]

    def get(self, result: Any) -> Any:
        return result()

    def run(self, folder: Folder, model: Model, **options: Any) -> None:
        arguments = {"objectives": {}, "device": None, "workers": None, "threads": 1, "progress": False, **options}
        cluster._run_actors(self, LostError, folder, model, **arguments)


def test_number_of_actors_is_the_capacity_of_the_nodes(folder: Folder, tiny: Model) -> None:
    ray = FakeRay(make_worker(folder), nodes=[[{"CPU": 5}, {"CPU": 2, "GPU": 1}, {"memory": 1}]])
    ray.run(folder, tiny, threads=2)
    assert (ray.options, ray.max_pending) == ({"num_cpus": 2, "num_gpus": 0, "max_restarts": 0}, 3)
    assert outcomes(folder.path) == ["rendered"] * 15
    FakeRay(make_worker(folder)).run(folder, tiny)  # every unit is done
    assert outcomes(folder.path) == ["rendered"] * 15


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_each_actor_has_one_gpu_and_gets_the_model_on_the_cpu(folder: Folder, tiny: Model, device: str) -> None:
    ray = FakeRay(make_worker(folder), nodes=[[{"CPU": 9, "GPU": 2}, {"CPU": 9}]])
    ray.run(folder, tiny, device=device, threads=None, workers=9)
    assert (ray.options["num_cpus"], ray.options["num_gpus"], ray.max_pending) == (1, 1, 2)
    _, ((model, objectives),), _, device, threads = ray.actors[0]
    assert (device, threads, objectives) == ("cuda", 1, {})
    assert model.module is not tiny.module
    assert {p.device.type for p in model.module.parameters()} == {"cpu"}


def test_workers_limits_the_number_of_actors(folder: Folder, tiny: Model) -> None:
    ray = FakeRay(make_worker(folder), nodes=[[{"CPU": 8}]])
    ray.run(folder, tiny, workers=3)
    assert ray.max_pending == 3
    assert len(ray.actors) == 3
    assert pending(folder, folder.run.units) == []


def test_unit_of_a_lost_actor_is_given_to_another_actor(folder: Folder, tiny: Model) -> None:
    worker, left = make_worker(folder), {folder.run.units[4]: 2, folder.run.units[14]: 1}

    def work(unit: Unit) -> Done:
        if left.get(unit, 0) > 0:
            left[unit] -= 1
            raise LostError
        return worker(unit)

    ray = FakeRay(work, nodes=[[{"CPU": 2}]])
    ray.run(folder, tiny)
    assert outcomes(folder.path) == ["rendered"] * 15
    assert len(events(folder.path, "lost")) == 3
    assert ray.max_pending == 2
    assert validate(folder.path).sound


def test_unit_whose_actor_is_lost_three_times_is_recorded_as_failed(tmp_path: Path, tiny: Model) -> None:
    plans = (LayerPlan("a", (40, 2, 2), tuple(range(40)), 1, 1),)
    folder = start_folder(tmp_path, Run({"image_dtype": "uint8"}, plans))
    worker, cursed = make_worker(folder), folder.run.units[7]

    def work(unit: Unit) -> Done:
        if unit == cursed:
            raise LostError
        return worker(unit)

    FakeRay(work).run(folder, tiny)
    report = validate(folder.path)
    assert report.status.failed == {cursed.name: "LostError: the process that rendered the unit was lost 3 times"}
    assert report.status.done == 39
    assert sorted(outcomes(folder.path)) == ["failed"] + ["rendered"] * 39
    FakeRay(worker).run(folder, tiny)
    assert validate(folder.path).sound


def test_ray_run_stops_when_more_than_five_percent_failed(folder: Folder, tiny: Model) -> None:
    with pytest.raises(TooManyFailedError, match="1 of 15 units failed"):
        FakeRay(lambda unit: Done(unit, "failed", 0.0, "RuntimeError: no")).run(folder, tiny)
    assert events(folder.path)[-1]["event"] == "gave up"


def test_ray_run_raises_file_system_errors_of_actors_unchanged(folder: Folder, tiny: Model) -> None:
    def work(unit: Unit) -> Done:
        raise TaskError(OSError(28, "No space left on device"))

    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        FakeRay(work).run(folder, tiny)


def test_ray_run_stops_when_actors_die_before_they_start(folder: Folder, tiny: Model) -> None:
    def ready() -> None:
        raise LostError("The actor died because of an error raised in its creation task\nNo module named 'mine'")

    ray = FakeRay(make_worker(folder), nodes=[[{"CPU": 2}]], ready=ready)
    with pytest.raises(RuntimeError, match="Ray's actors die before they have started: No module named 'mine'"):
        ray.run(folder, tiny)
    assert len(ray.actors) == 7 + 1  # more than three times the capacity of 2, and one that was being started


def test_ray_run_warns_and_waits_when_no_node_has_room(folder: Folder, tiny: Model) -> None:
    ray = FakeRay(make_worker(folder), nodes=[[{"CPU": 1}], [], [{"CPU": 1}], [{"CPU": 4}]])
    with pytest.warns(UserWarning, match="no node of the cluster has 2 processors for an actor; waiting for one"):
        ray.run(folder, tiny, threads=2)
    assert outcomes(folder.path) == ["rendered"] * 15


def test_engine_ray_without_the_package_is_rejected(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"engine 'ray' needs the package ray: pip install 'featvis-func\[ray\]'"):
        sweep(tiny, "9", out=tmp_path, engine="ray", **QUICK)


@pytest.mark.parametrize("pause", [0.0, math.inf], ids=["always", "never"])
def test_progress_bar_counts_each_filter_once_and_limits_its_polling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    """Checking every unit after every unit would take quadratic time."""
    bars: list[Any] = []

    class Bar(tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(file=io.StringIO(), **options)
            bars.append(self)

    checks: list[Unit] = []
    sidecar = Folder.sidecar
    monkeypatch.setattr(engines, "tqdm", Bar)
    monkeypatch.setattr(engines, "_POLL_SECONDS", pause)
    monkeypatch.setattr(engines, "_POLL_SHARE", 0)
    folder = start_folder(tmp_path, toy_run({"a": 40}))
    worker = Worker(folder, Toy(), seed=7)
    others = folder.run.units[:4]
    worker(others[0])  # before it starts
    with engines.watched(folder, Rank(), progress=True) as report:
        assert bars[0].n == bars[0].initial == 2
        done = [worker(unit) for unit in folder.run.units[4:]]
        for unit in others[1:]:
            worker(unit)
        monkeypatch.setattr(Folder, "sidecar", lambda self, unit: checks.append(unit) or sidecar(self, unit))
        for one in done:
            report(one)
        assert bars[0].n == (40 if pause == 0 else 2 + 2 * len(done))
        assert len(checks) == (18 if pause == 0 else 0), "each unit that is not known to be done is checked once"
    assert bars[0].n == 40
