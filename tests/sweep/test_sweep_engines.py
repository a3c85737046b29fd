"""What a sweep renders, what a worker makes of failures, and who renders what: one process, several, a cluster."""

import contextlib
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

from featvis_func.models import Model, load_model
from featvis_func.rendering import renderer as rendering
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
from featvis_func.sweep.worker import Done, Worker, pending
from featvis_func.tree import tree_map
from tests.sweep_toys import Toy, toy_run

ROOT = Path(__file__).parents[2]
ALL = 63  # units of TextureNet
QUICK: dict[str, Any] = {"steps": 1, "size": 32, "threads": 1, "precision": "float32", "compile": "no"}


def quick(**changes: Any) -> dict[str, Any]:
    return {**QUICK, **changes}


# --- what there is to render ----------------------------------------------------------------------------------------


def test_all_means_convolutions_and_linear_layers(texturenet: Model, tiny: Model) -> None:
    plans = plan_layers(texturenet)
    found = {plan.layer: (len(plan.filters), len(plan.units)) for plan in plans}
    assert found == {
        "block1.conv": (24, 3), "block2.conv": (48, 6), "block3.conv": (80, 10), "block4.conv": (96, 12),
        "block5.conv": (128, 16), "block6.conv": (96, 12), "head": (32, 4),
    }  # fmt: skip
    assert sum(len(plan.units) for plan in plans) == ALL
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
def test_layers_by_name_by_a_unique_end_and_by_pattern(texturenet: Model, layers: Any, expected: list[str]) -> None:
    assert [plan.layer for plan in plan_layers(texturenet, layers)] == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("block7.conv", "no layer 'block7.conv'; did you mean 'block6.conv'"),
        (["head", "haed"], "no layer 'haed'; did you mean 'head'"),
        ("conv", "layer 'conv' is ambiguous; it could be 'block1.conv', 'block2.conv'"),
        ("block9*", r"no layer of texturenet fits the pattern 'block9\*'; 'featvis layers' lists them"),
        (["head", "[x]"], "fits the pattern"),
        ([], "no layers were asked for: the list is empty"),
        ([3], "layers must be 'all', names or patterns, got 3"),
        (3, "layers must be 'all', names or patterns, got 3"),
        ("", "no layer ''"),
    ],
)
def test_layers_that_are_not_there(texturenet: Model, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_layers(texturenet, layers)


def test_a_layer_that_is_not_called_and_a_model_without_layers() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.ReLU(), nn.Conv2d(3, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.used(images)

    model = load_model(Spare(), size=8)
    with pytest.raises(ValueError, match="layer 'spare' has no filters: a forward pass does not call it"):
        plan_layers(model, "spare")
    with pytest.raises(ValueError, match="Spare has no convolution and no linear layer; name its layers"):
        plan_layers(model)
    assert [plan.layer for plan in plan_layers(model, "*")] == ["used"]


def test_filters_that_some_layers_lack_are_left_out_there(tiny: Model) -> None:
    plans = plan_layers(tiny, filters=[11, 5, 0])
    assert {plan.layer: plan.filters for plan in plans} == {"0": (0, 5), "3": (0, 5, 11), "5": (0, 5), "9": (0,)}
    assert {plan.layer: plan.filters for plan in plan_layers(tiny, filters=10)} == {"3": (10,)}
    assert plan_layers(tiny, "9", range(5)) == plan_layers(tiny, "9")


def test_units_are_cut_from_a_layer_in_order(tiny: Model) -> None:
    (plan,) = plan_layers(tiny, "3", batch_size=5)
    assert (plan.batch_size, plan.unit_size) == (5, 5)
    assert [unit.filters for unit in plan.units] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (10, 11)]
    (plan,) = plan_layers(tiny, "3", batch_size=5, unit_size=7)
    assert (plan.batch_size, [len(unit.filters) for unit in plan.units]) == (5, [7, 5])
    assert plan_layers(tiny, "3")[0].batch_size == 8
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
def test_odd_inputs_are_refused(tiny: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_layers(tiny, **options)


# --- workers that fail ----------------------------------------------------------------------------------------------

Bend = Callable[[LayerPlan, Renderer], Any]
_traced: dict[Any, Any] = {}


@pytest.fixture
def bend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Bend], None]:
    """Changes the renderer of each layer from now on; what is the same in each is traced once."""
    real, trace = running.renderers, rendering.make_features

    def traced(model: Model, layers: Sequence[str], **options: Any) -> Any:
        key = (model.name, tuple(layers), *options.items())
        if key not in _traced:
            _traced[key] = trace(model, layers, **options)
        return _traced[key]

    monkeypatch.setattr(rendering, "make_features", traced)

    def bend(change: Bend) -> None:
        def renderers(*args: Any, **options: Any) -> Callable[[LayerPlan], Any]:
            make = real(*args, **options)
            return lambda plan: change(plan, make(plan))

        monkeypatch.setattr(running, "renderers", renderers)

    return bend


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """The lines of the event log, in order, of some kinds or of all."""
    lines = [json.loads(line) for path in sorted(folder.glob("events/*")) for line in path.read_text().splitlines()]
    return [line for line in lines if not kinds or line["event"] in kinds]


def outcomes(folder: Path) -> list[str]:
    return [line["outcome"] for line in events(folder, "unit")]


def equal_rows(one: Result, other: Result, rows: Iterable[int]) -> None:
    chosen = list(rows)
    for name in ("images", "activations", "scores", "best_step", "steps"):
        assert torch.equal(getattr(one, name)[chosen], getattr(other, name)[chosen]), name
    assert torch.equal(one.history[:, chosen], other.history[:, chosen])


def test_out_of_memory_halves_the_batch_of_this_unit_and_the_next(
    tiny: Model, bend: Callable[[Bend], None], tmp_path: Path
) -> None:
    small = sweep(tiny, "3", out=tmp_path / "small", batch_size=3, unit_size=6, **quick(steps=2))
    assert small.complete
    widths: list[int] = []

    def scarce(plan: LayerPlan, renderer: Renderer) -> Renderer:
        def step(weights: Any, state: Any, target: Tensor) -> Any:
            widths.append(len(target))
            if len(target) > 4:
                raise RuntimeError("CUDA error: out of memory")
            return renderer.step(weights, state, target)

        return renderer._replace(step=step)

    bend(scarce)
    with pytest.warns(UserWarning, match="out of memory with 6 filters at a time; going on with 3"):
        status = sweep(tiny, "3", out=tmp_path / "large", batch_size=6, **quick(steps=2))
    assert status.complete
    assert status.units == 2
    assert widths == [6] + [3] * 4 + [3] * 4
    assert outcomes(tmp_path / "large") == ["rendered"] * 2
    assert events(tmp_path / "large", "failure") == []
    equal_rows(open_store(tmp_path / "large").layer("3"), open_store(tmp_path / "small").layer("3"), range(12))


def spoiled(renderer: Renderer, number: int, seeds: Sequence[int], begun: list[tuple[list[int], int]]) -> Renderer:
    """A renderer in which one filter begins with NaN, for some seeds."""

    def start(chosen: Sequence[int], seed: int) -> Any:
        begun.append((list(chosen), seed))
        state, target = renderer.start(chosen, seed)
        rows = torch.tensor([i for i, f in enumerate(chosen) if f == number and seed in seeds], dtype=torch.int64)
        params = tree_map(lambda leaf: leaf.index_fill(0, rows, math.nan), state.params)
        return state._replace(params=params), target

    return renderer._replace(start=start)


def test_a_filter_that_is_not_finite_is_tried_once_more_with_another_seed(
    tiny: Model, bend: Callable[[Bend], None], tmp_path: Path
) -> None:
    options = quick(steps=2)
    for seed in (7, 8):
        sweep(tiny, "3", out=tmp_path / str(seed), seed=seed, batch_size=6, **options)
    plain, other = (open_store(tmp_path / str(seed)).layer("3") for seed in (7, 8))
    begun: list[tuple[list[int], int]] = []
    bend(lambda plan, renderer: spoiled(renderer, 4, [7], begun))
    status = sweep(tiny, "3", out=tmp_path / "second", seed=7, batch_size=6, **options)
    assert begun == [([0, 1, 2, 3, 4, 5], 7), ([4] * 6, 8), ([6, 7, 8, 9, 10, 11], 7)]
    store = open_store(tmp_path / "second")
    mates = [f for f in range(12) if f != 4]
    equal_rows(store.layer("3"), plain, mates)
    equal_rows(store.layer("3"), other, [4])
    assert [entry.seed for entry in store] == [7] * 4 + [8] + [7] * 7
    assert store.layer("3").status == ("ok",) * 12
    assert (status.complete, status.odd) == (True, {})

    begun.clear()
    bend(lambda plan, renderer: spoiled(renderer, 4, range(100), begun))
    status = sweep(tiny, "3", out=tmp_path / "never", seed=7, batch_size=6, **options)
    assert [seed for _, seed in begun] == [7, 8, 7]
    store = open_store(tmp_path / "never")
    equal_rows(store.layer("3"), plain, mates)
    assert [entry.status for entry in store] == ["ok"] * 4 + ["nonfinite"] + ["ok"] * 7
    assert (store["3", 4].seed, store["3", 4].score) == (7, -math.inf)
    assert (status.complete, status.odd, status.failed) == (True, {"nonfinite": 1}, {})
    assert validate(tmp_path / "never").sound


class Failing:
    """A renderer that fails on some filters, some number of times."""

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


def test_a_unit_that_fails_three_times_is_left_and_tried_again_by_a_rerun(
    tiny: Model, bend: Callable[[Bend], None], tmp_path: Path
) -> None:
    out = tmp_path / "store"
    cursed = Failing("3", [4], times=3)
    bend(cursed)
    status = sweep(tiny, ["0", "3"], out=out, unit_size=1, batch_size=2, **QUICK)
    assert (status.units, status.done, status.complete) == (20, 19, False)
    assert status.failed == {"3/00004-00004": "RuntimeError: filter 4 is cursed"}
    assert cursed.calls == [4] * 3
    failures = events(out, "failure")
    assert [(line["unit"], line["attempt"]) for line in failures] == [("3/00004-00004", n) for n in (1, 2, 3)]
    assert sorted(outcomes(out)) == ["failed"] + ["rendered"] * 19
    assert [line["event"] for line in events(out, "start", "end", "gave up", "interrupted")] == ["start", "end"]

    cursed = Failing("3", [4], times=2)  # the third attempt of the rerun succeeds
    bend(cursed)
    status = sweep(tiny, ["0", "3"], out=out, unit_size=1, batch_size=2, **QUICK)
    assert status.complete
    assert status.failed == {}
    assert cursed.calls == [4] * 2
    assert outcomes(out)[20:] == ["rendered"]
    assert validate(out).sound

    def never(plan: LayerPlan, renderer: Renderer) -> Any:
        raise AssertionError("a finished run has nothing to make")

    bend(never)
    start = time.perf_counter()
    assert sweep(tiny, ["0", "3"], out=out, unit_size=1, batch_size=2, **QUICK).complete
    print(f"a finished run of 20 units: {time.perf_counter() - start:.2f} s")
    assert len(outcomes(out)) == 21


def test_a_run_gives_up_once_more_than_a_twentieth_failed(
    tiny: Model, bend: Callable[[Bend], None], tmp_path: Path
) -> None:
    out = tmp_path / "store"
    bend(Failing("0", [2, 5], times=3))
    with pytest.raises(TooManyFailedError, match="2 of 20 units failed, which is more than 5%; giving up"):
        sweep(tiny, ["0", "3"], out=out, unit_size=1, batch_size=2, **QUICK)
    assert outcomes(out) == ["rendered"] * 2 + ["failed"] + ["rendered"] * 2 + ["failed"]
    assert [line["event"] for line in events(out)][-1] == "gave up"
    bend(lambda plan, renderer: renderer)
    assert sweep(tiny, ["0", "3"], out=out, unit_size=1, batch_size=2, **QUICK).complete
    assert outcomes(out)[6:] == ["rendered"] * 16
    assert validate(out).sound


# --- a renderer is made once for a layer ----------------------------------------------------------------------------


def test_a_layer_is_traced_once_and_compiled_once(tiny: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler, tracer = torch.compile, rendering.make_features
    traced: list[tuple[str, ...]] = []

    def trace(model: Model, layers: Sequence[str], **options: Any) -> Any:
        traced.append(tuple(layers))
        return tracer(model, layers, **options)

    monkeypatch.setattr(rendering, "make_features", trace)
    monkeypatch.setattr(torch, "compile", lambda step, *, backend, **o: compiler(step, backend="eager", **o))
    counters = torch._dynamo.utils.counters
    counters.clear()
    options = quick(compile="yes")
    status = sweep(tiny, ["3", "9"], out=tmp_path, batch_size=5, **options)
    assert (status.units, status.filters_done) == (3 + 1, 12 + 5)  # of 5, 5 and 2; of 5
    assert traced == [("3",), ("9",)]
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    print(f"{status.units} units of 2 layers: {len(traced)} traces, {counters['stats']['unique_graphs']} graphs")


def held() -> tuple[float, int]:
    """This process's memory, in MiB, and how many tensors there are."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, sum(type(some) is Tensor for some in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc, which tells how much memory is taken")
def test_the_memory_of_a_long_sweep_does_not_grow(
    texturenet: Model, bend: Callable[[Bend], None], tmp_path: Path
) -> None:
    at: dict[int, tuple[float, int]] = {}

    def watch(plan: LayerPlan, renderer: Renderer) -> Any:
        def render(filters: Sequence[int], *, seed: int | None = None) -> Result:
            if filters[0] in (10, 30, 60):
                at[filters[0]] = held()
            return renderer(filters, seed=seed)

        return render

    bend(watch)
    assert sweep(texturenet, "block3.conv", range(61), out=tmp_path, batch_size=2, unit_size=1, **QUICK).done == 61
    print("; ".join(f"after {n} units {mebibytes:.1f} MiB and {count} tensors" for n, (mebibytes, count) in at.items()))
    assert at[60][0] < at[10][0] + 4
    assert at[60][1] == at[10][1]


# --- ranks ----------------------------------------------------------------------------------------------------------


def stand_in(filters: Sequence[int], /, *, seed: int | None = None) -> Result:
    """What a renderer gives, at once."""
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
    """Of 15 units, in two layers."""
    plans = (LayerPlan("a", (20, 2, 2), tuple(range(20)), 2, 2), LayerPlan("b", (9, 2, 2), tuple(range(9)), 2, 2))
    return start_folder(tmp_path / "store", Run({"image_dtype": "uint8", "what": "stand-in"}, plans))


def made(folder: Folder) -> Worker:
    return Worker(folder, lambda plan: stand_in, seed=0)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 15, 40])
def test_ranks_share_all_units_among_them(folder: Folder, count: int) -> None:
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


def test_a_rank_that_was_ended_goes_on_when_it_is_started_again(folder: Folder) -> None:
    worker = made(folder)
    seen: list[Unit] = []

    def work(unit: Unit, most: float) -> Done:
        if len(seen) == most:
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


def test_a_unit_that_another_process_has_done_is_found_and_not_rendered(folder: Folder) -> None:
    unit = folder.run.units[3]
    assert made(folder)(unit).outcome == "rendered"
    before = content(folder.path)

    def never(plan: LayerPlan) -> Any:
        raise AssertionError("there is nothing to render")

    assert Worker(folder, never, seed=0)(unit).outcome == "found"
    assert content(folder.path) == before


def test_the_failures_of_all_ranks_are_counted_together(tmp_path: Path) -> None:
    plans = (LayerPlan("a", (100, 2, 2), tuple(range(100)), 1, 1),)
    folder = start_folder(tmp_path, Run({"image_dtype": "uint8"}, plans))

    def broken(filters: Sequence[int], /, *, seed: int | None = None) -> Result:
        raise RuntimeError("no such device")

    worker = Worker(folder, lambda plan: broken, seed=0)
    for number in range(2):  # of 50 ranks, with 2 units each: none has 5% of all
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
def test_a_process_learns_its_rank_from_its_launcher(engine: str, environment: dict[str, str], expected: Rank) -> None:
    assert rank_of(engine, environment) == expected


@pytest.mark.parametrize(
    ("engine", "environment", "message"),
    [
        ("slurm", {}, "unknown engine 'slurm'; expected one of local, torchrun, srun, array, ray"),
        ("torchrun", {}, "the engine torchrun needs RANK in the environment; its launcher sets it"),
        ("torchrun", {"RANK": "0"}, "the engine torchrun needs WORLD_SIZE in the environment"),
        ("srun", {"SLURM_NTASKS": "2"}, "the engine srun needs SLURM_PROCID"),
        ("array", {"SLURM_ARRAY_TASK_ID": "0"}, "the engine array needs SLURM_ARRAY_TASK_COUNT"),
        ("torchrun", {"RANK": "first", "WORLD_SIZE": "2"}, "needs whole numbers in RANK and WORLD_SIZE.*'first'"),
        ("torchrun", {"RANK": "0", "WORLD_SIZE": ""}, "needs whole numbers"),
        ("srun", {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "x"}, "needs whole numbers"),
        ("torchrun", {"RANK": "2", "WORLD_SIZE": "2"}, "the engine torchrun has RANK 2 out of 2 processes"),
        ("torchrun", {"RANK": "-1", "WORLD_SIZE": "2"}, "has RANK -1 out of 2"),
        ("array", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2"}, "without gaps, such as 0-15"),
    ],
)
def test_a_rank_that_the_environment_does_not_tell(engine: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_of(engine, environment)


def test_a_sweep_under_no_launcher_says_so_before_it_makes_a_folder(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="needs RANK"):
        sweep(tiny, out=tmp_path / "store", engine="torchrun")
    assert not (tmp_path / "store").exists()


def test_each_process_of_a_machine_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_device("cuda", Rank(5, 8, 1)) == "cuda:1"
    assert own_device(torch.device("cuda"), Rank(5, 8, 6)) == "cuda:2"  # more processes than devices
    assert own_device("cuda:3", Rank(5, 8, 1)) == "cuda:3"
    assert own_device("cpu", Rank(5, 8, 1)) == "cpu"
    assert own_device(None, Rank(5, 8, 1)) is None
    assert own_device("cuda", Rank(5, 8)) == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun shows each task its own alone
    assert own_device("cuda", Rank(5, 8, 1)) == "cuda"


def test_a_rank_waits_until_the_others_have_done_or_failed(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_LOOK_SECONDS", 0.02)
    worker, units = made(folder), folder.run.units
    for unit in units[:-2]:
        worker(unit)
    waits = threading.Thread(target=wait_for_others, args=(folder, units), daemon=True)
    waits.start()
    for finish in (lambda: worker(units[-1]), lambda: record_failure(folder, units[-2], "RuntimeError: no", 3)):
        waits.join(0.2)
        assert waits.is_alive()
        finish()
    waits.join(20)
    assert not waits.is_alive()


# --- the engines, and one store -------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, Any]:
    """All that a store says, but for when, how fast and on which machine it was written."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.parent.name == "events":
            continue
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes()
        if name.startswith("units/") and path.suffix == ".json":
            value = json.loads(found[name])
            assert set(value.pop("written")) == {"host", "at", "seconds", "modified"}
            assert len(value.pop("seal")) == 64
            found[name] = value
    return found


def child_environment() -> dict[str, str]:
    """One thread, and this checkout to import from."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def check_int(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layer of TextureNet, by this process."""
    out = tmp_path_factory.mktemp("local") / "store"
    start = time.perf_counter()
    status = sweep("texturenet", out=out, **QUICK)
    print(f"local: {status.units} units, {status.filters} filters in {time.perf_counter() - start:.1f} s")
    assert status.complete
    assert status.units == ALL
    return out


def same_store(out: Path, whole: Path, engine: str, start: float) -> None:
    mine, other = content(out), content(whole)
    assert list(mine) == list(other)
    assert [name for name in mine if mine[name] != other[name]] == []
    assert len(mine) == 1 + 2 * ALL
    size = sum(len(value) for value in mine.values() if isinstance(value, bytes))
    seconds = time.perf_counter() - start
    print(f"{engine}: {len(mine)} files equal, {size} bytes of these byte for byte; {seconds:.1f} s")
    assert validate(out).sound


def torchrun(script: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(script)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path, *arguments],
        env=child_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_two_processes_of_torchrun_make_the_same_store(whole: Path, tmp_path: Path) -> None:
    out, start = tmp_path / "store", time.perf_counter()
    script = f"""
from featvis_func.sweep import sweep
sweep("texturenet", out={str(out)!r}, engine="torchrun", **{QUICK!r})
"""
    ended = torchrun(script, tmp_path)
    assert ended.returncode == 0, ended.stderr
    same_store(out, whole, "torchrun", start)
    shares = [len(list(filter(None, path.read_text().splitlines()))) - 2 for path in out.glob("events/*")]
    assert sorted(shares) == [ALL // 2, ALL // 2 + 1]


WAITS = """
import os, sys, time
from pathlib import Path
from featvis_func.sweep import launchers as engines, api as running, sweep

real, rank = running.renderers, int(os.environ["RANK"])
out, start = Path(sys.argv[1]), time.monotonic()
engines._LOOK_SECONDS = 0.1

def renderers(*args, **options):
    make = real(*args, **options)
    def bent(plan):
        renderer = make(plan)
        def render(filters, *, seed=None):
            if filters == (0,):
                raise RuntimeError("cursed")
            # Until the other has nothing left to do, and would have ended.
            while rank and len(list(out.glob("units/*/*.json"))) < 10 and time.monotonic() < start + 60:
                time.sleep(0.05)
            time.sleep(0.2 * rank)
            return renderer(filters, seed=seed)
        return render
    return bent

running.renderers = renderers
status = sweep("texturenet", "block1.conv", range(20), out=out, engine="torchrun", unit_size=1, **OPTIONS)
Path(f"{out}.{rank}").write_text(f"{status.done} {status.failed}")
sys.exit(1 if status.failed else 0)
""".replace("OPTIONS", repr(QUICK))


def test_a_rank_with_a_failure_to_tell_lets_the_others_finish(tmp_path: Path) -> None:
    out = tmp_path / "store"
    ended = torchrun(WAITS, tmp_path, str(out))
    assert ended.returncode == 1, ended.stderr
    assert sorted(outcomes(out)) == ["failed"] + ["rendered"] * 19
    assert validate(out).status.done == 19
    told = [path.read_text() for path in tmp_path.glob("store.*")]  # by the first; torchrun may have ended the other
    assert set(told) == {"19 {'block1.conv/00000-00000': 'RuntimeError: cursed'}"}


def test_a_dry_run_tells_the_filters_and_nearly_the_bytes(whole: Path, tiny: Model, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in (whole / "units").rglob("*") if path.is_file())
    options, small = quick(), quick(steps=30, size=16)
    for chosen in (options, small):
        del chosen["threads"]  # which says nothing of what is rendered
    before = set(Path.cwd().iterdir())
    found = dry_run("texturenet", **options)
    assert sum(len(plan.filters) for plan in found.plans) == 504
    assert sum(len(plan.units) for plan in found.plans) == ALL
    print(f"TextureNet: {found.estimate.bytes} bytes told, {size} there; {found.estimate.seconds:.1f} s told")
    assert found.estimate.bytes == pytest.approx(size, rel=0.05)
    assert 0 < found.estimate.seconds < 100
    # A small one, in which what is told of each filter weighs as much as the images.
    sweep(tiny, ["3", "5"], out=tmp_path, image_dtype="float16", **small)
    size = sum(path.stat().st_size for path in (tmp_path / "units").rglob("*") if path.is_file())
    told = dry_run(tiny, ["3", "5"], image_dtype="float16", **small).estimate.bytes
    print(f"a small network: {told} bytes told, {size} there")
    assert told == pytest.approx(size, rel=0.05)
    assert set(Path.cwd().iterdir()) == before


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from featvis_func.rendering.renderer import make_renderer
from featvis_func.sweep import api as running, sweep

out, kills, options = Path(sys.argv[1]), int(sys.argv[2]), OPTIONS
# Traced once, here, so that it is while they render that the processes are killed.
threads = options.pop("threads")
renderer = make_renderer("texturenet", "block1.conv", batch_size=1, **options)
running.renderers = lambda *_, **__: lambda plan: renderer

def child(name):
    process = os.fork()
    if process == 0:
        try:
            status = sweep("texturenet", "block1.conv", out=out / name, batch_size=1, threads=threads, **options)
            os._exit(0 if status.complete else 3)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(4)
    return process

def units():
    return {p.name: p.stat().st_mtime_ns for p in (out / "killed").glob("units/*/*.json")}

start = time.monotonic()
assert os.waitpid(child("whole"), 0)[1] == 0
seconds = time.monotonic() - start
draw = random.Random(0)
for number in range(kills):
    before = units()
    process = child("killed")
    time.sleep(draw.uniform(0.2, 1.8) * seconds / (kills + 1))
    os.kill(process, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    after = units()
    assert all(after[name] == when for name, when in before.items())
    print(f"kill {number}: {len(before)} units before, {len(after)} after it", flush=True)
assert os.waitpid(child("killed"), 0)[1] == 0
print(f"{kills} kills; a whole run takes {seconds:.1f} s")
"""


def test_a_sweep_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path: Path) -> None:
    options = quick(steps=8)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED.replace("OPTIONS", repr(options)), tmp_path, "6"],
        env=child_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = validate(tmp_path / "killed")
    assert report.status.complete
    mine, other = content(tmp_path / "killed"), content(tmp_path / "whole")
    assert mine == other
    rendered = [line["unit"] for line in events(tmp_path / "killed", "unit") if line["outcome"] == "rendered"]
    print(f"{len(rendered)} units rendered and told of, out of {report.status.units}")
    assert len(rendered) == len(set(rendered))


# --- Ray ------------------------------------------------------------------------------------------------------------


class Nodes:
    """A simulated cluster: its head, which renders nothing, and nodes of one processor."""

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
        """Exactly so many."""
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
        # A node that is gone is noticed within seconds.
        "_system_config": {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 6,
        },
    }
    simulated = utilities.Cluster(initialize_head=True, head_node_args=head)
    # The actors have no such module as this one.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        ray.init(address=simulated.address, log_to_driver=False, logging_level="ERROR")
        yield Nodes(simulated)
    finally:
        ray.shutdown()
        simulated.shutdown()


class Marked(nn.Module):
    """Two layers, in a network that tells by files who runs it, and that waits when told so."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3)
        self.folder, self.home = str(folder), os.getpid()

    def forward(self, images: Tensor) -> Tensor:
        if float(images.detach().sum()) == math.inf:  # what torch.export cannot trace: this code runs in every step
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
    """What the processes of a :class:`Marked` network tell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = load_model(Marked(folder).eval(), size=12)

    def hold(self) -> None:
        """Who begins a step waits, from now on."""
        (self.folder / "hold").touch()

    def release(self) -> None:
        (self.folder / "hold").unlink(missing_ok=True)

    def seen(self) -> dict[str, int]:
        """Node -> the process there that came last."""
        marks = sorted(self.folder.glob("*.*"), key=lambda path: path.stat().st_mtime_ns)
        return {path.stem: int(path.suffix[1:]) for path in marks}

    def wait(self, *, nodes: Iterable[Any] = (), processes: int = 0) -> None:
        """Until these nodes, and so many processes, are at work."""
        wanted = {node.node_id for node in nodes}
        end = time.monotonic() + 90
        while not (wanted <= set(self.seen()) and len(list(self.folder.glob("*.*"))) >= processes):
            assert time.monotonic() < end, self.seen()
            time.sleep(0.05)


@contextlib.contextmanager
def in_background(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Runs it in a thread beside the block, and waits for it; gives what it returned."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield results
    thread.join(120)
    assert not thread.is_alive()


MARKED = quick(size=12, unit_size=1, batch_size=2)


def test_two_nodes_of_ray_make_the_same_store(whole: Path, nodes: Nodes, tmp_path: Path) -> None:
    nodes.reset(2)
    out, start = tmp_path / "store", time.perf_counter()
    assert sweep("texturenet", out=out, engine="ray", **QUICK).complete
    same_store(out, whole, "ray", start)
    assert outcomes(out) == ["rendered"] * ALL


def test_a_run_outlives_an_actor_and_a_node_and_takes_on_a_new_one(nodes: Nodes, tmp_path: Path) -> None:
    nodes.reset(2)
    marks, out = Marks(tmp_path / "marks"), tmp_path / "store"
    marks.hold()
    with in_background(lambda: sweep(marks.model, out=out, engine="ray", **MARKED)) as results:
        first, second = nodes.up
        marks.wait(nodes=nodes.up)  # both are at work on a unit
        os.kill(marks.seen()[first.node_id], signal.SIGKILL)
        marks.wait(processes=3)  # another process takes its place
        nodes.remove(second)
        joined = nodes.add()
        marks.wait(nodes=[joined])
        marks.release()
    (status,) = results
    assert status.complete
    assert status.units == 24
    # An actor that was on its way to the node that left is lost, too, but had nothing in hand.
    lost = [line["unit"] for line in events(out, "lost") if line["unit"] is not None]
    print(f"{status.units} units done, {len(outcomes(out))} times; lost in between: {lost}")
    assert len(lost) == 2
    assert outcomes(out) == ["rendered"] * 24
    assert validate(out).sound
    with pytest.warns(UserWarning, match="could not be exported"):
        assert sweep(marks.model, out=tmp_path / "plain", **MARKED).complete
    assert content(out) == content(tmp_path / "plain")


class LostError(Exception):
    """What Ray says of an actor that is no more."""


class TaskError(Exception):
    """What Ray says of an actor's exception."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"ray::work() at length\n{cause!r}")
        self.cause = cause


class PretendedRay:
    """Ray's part, played in this process: what the driver makes of what the cluster says.

    Args:
        nodes: the resources of each, at each look at them; the last look stays.
        work: what an actor makes of a unit.
        ready: what it does to begin with.
    """

    exceptions = SimpleNamespace(RayTaskError=TaskError)

    def __init__(
        self,
        work: Callable[[Unit], Done],
        *,
        nodes: Sequence[Sequence[dict[str, float]]] = ([{"CPU": 1}],),
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._looks = [list(look) for look in nodes]
        self._ready, self._work = ready, work
        self.options: dict[str, Any] = {}
        self.actors: list[tuple[Any, ...]] = []
        self.most = 0

    def nodes(self) -> list[dict[str, Any]]:
        look = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        return [{"Alive": True, "Resources": resources} for resources in look] + [{"Alive": False, "Resources": {}}]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.options = options
        return lambda kind: SimpleNamespace(remote=self._hire)

    def _hire(self, *arguments: Any) -> Any:
        self.actors.append(arguments)
        return SimpleNamespace(
            ready=SimpleNamespace(remote=lambda: lambda: self._ready()),
            work=SimpleNamespace(remote=lambda unit: lambda: self._work(unit)),
        )

    def wait(self, results: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(results))
        return results[:1], results[1:]

    def get(self, result: Any) -> Any:
        return result()

    def run(self, folder: Folder, model: Model, **options: Any) -> None:
        given = {"device": None, "workers": None, "threads": 1, "progress": False, **options}
        cluster._run(self, LostError, folder, model, **given)


def test_actors_are_as_many_as_the_nodes_hold(folder: Folder, tiny: Model) -> None:
    ray = PretendedRay(made(folder), nodes=[[{"CPU": 5}, {"CPU": 2, "GPU": 1}, {"memory": 1}]])
    ray.run(folder, tiny, threads=2)
    assert (ray.options, ray.most) == ({"num_cpus": 2, "num_gpus": 0, "max_restarts": 0}, 3)
    assert outcomes(folder.path) == ["rendered"] * 15
    PretendedRay(made(folder)).run(folder, tiny)  # there is nothing left
    assert outcomes(folder.path) == ["rendered"] * 15


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_each_actor_has_one_gpu_and_the_model_comes_from_the_processor(
    folder: Folder, tiny: Model, device: str
) -> None:
    ray = PretendedRay(made(folder), nodes=[[{"CPU": 9, "GPU": 2}, {"CPU": 9}]])
    ray.run(folder, tiny, device=device, threads=None, workers=9)
    assert (ray.options["num_cpus"], ray.options["num_gpus"], ray.most) == (1, 1, 2)
    _, model, device, threads = ray.actors[0]
    assert (device, threads) == ("cuda", 1)
    assert model.module is not tiny.module
    assert {p.device.type for p in model.module.parameters()} == {"cpu"}


def test_no_more_actors_than_asked_for(folder: Folder, tiny: Model) -> None:
    ray = PretendedRay(made(folder), nodes=[[{"CPU": 8}]])
    ray.run(folder, tiny, workers=3)
    assert ray.most == 3
    assert len(ray.actors) == 3
    assert pending(folder, folder.run.units) == []


def test_a_unit_whose_process_is_lost_goes_to_another(folder: Folder, tiny: Model) -> None:
    worker, left = made(folder), {folder.run.units[4]: 2, folder.run.units[14]: 1}

    def work(unit: Unit) -> Done:
        if left.get(unit, 0) > 0:
            left[unit] -= 1
            raise LostError
        return worker(unit)

    ray = PretendedRay(work, nodes=[[{"CPU": 2}]])
    ray.run(folder, tiny)
    assert outcomes(folder.path) == ["rendered"] * 15
    assert len(events(folder.path, "lost")) == 3
    assert ray.most == 2
    assert validate(folder.path).sound


def test_a_unit_that_takes_its_process_with_it_is_left_after_three_times(tmp_path: Path, tiny: Model) -> None:
    plans = (LayerPlan("a", (40, 2, 2), tuple(range(40)), 1, 1),)
    folder = start_folder(tmp_path, Run({"image_dtype": "uint8"}, plans))
    worker, cursed = made(folder), folder.run.units[7]

    def work(unit: Unit) -> Done:
        if unit == cursed:
            raise LostError
        return worker(unit)

    PretendedRay(work).run(folder, tiny)
    report = validate(folder.path)
    assert report.status.failed == {cursed.name: "LostError: its process was lost, 3 times"}
    assert report.status.done == 39
    assert sorted(outcomes(folder.path)) == ["failed"] + ["rendered"] * 39
    PretendedRay(worker).run(folder, tiny)
    assert validate(folder.path).sound


def test_a_run_on_ray_gives_up_once_more_than_a_twentieth_failed(folder: Folder, tiny: Model) -> None:
    with pytest.raises(TooManyFailedError, match="1 of 15 units failed"):
        PretendedRay(lambda unit: Done(unit, "failed", 0.0, "RuntimeError: no")).run(folder, tiny)
    assert events(folder.path)[-1]["event"] == "gave up"


def test_an_error_of_the_file_system_ends_a_run_on_ray_as_itself(folder: Folder, tiny: Model) -> None:
    def work(unit: Unit) -> Done:
        raise TaskError(OSError(28, "No space left on device"))

    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        PretendedRay(work).run(folder, tiny)


def test_actors_that_never_begin_end_the_run(folder: Folder, tiny: Model) -> None:
    def ready() -> None:
        raise LostError("The actor died because of an error raised in its creation task\nNo module named 'mine'")

    ray = PretendedRay(made(folder), nodes=[[{"CPU": 2}]], ready=ready)
    with pytest.raises(RuntimeError, match="Ray's actors end before they begin: No module named 'mine'"):
        ray.run(folder, tiny)
    assert len(ray.actors) == 7 + 1  # three times as many as there is room for, and one; another was on its way


def test_a_cluster_without_room_is_told_of_and_waited_for(folder: Folder, tiny: Model) -> None:
    ray = PretendedRay(made(folder), nodes=[[{"CPU": 1}], [], [{"CPU": 1}], [{"CPU": 4}]])
    with pytest.warns(UserWarning, match="no node of the cluster has 2 processors for an actor; waiting for one"):
        ray.run(folder, tiny, threads=2)
    assert outcomes(folder.path) == ["rendered"] * 15


def test_the_engine_ray_without_ray(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"the engine ray needs the package ray: pip install 'featvis-func\[ray\]'"):
        sweep(tiny, "9", out=tmp_path, engine="ray", **QUICK)


@pytest.mark.parametrize("pause", [0.0, math.inf], ids=["always", "never"])
def test_the_bar_counts_every_filter_once_and_looks_no_more_often_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    """To look at every unit after every unit would take the square of their number."""
    bars: list[Any] = []

    class Bar(tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(file=io.StringIO(), **options)
            bars.append(self)

    looks: list[Unit] = []
    sidecar = Folder.sidecar
    monkeypatch.setattr(engines, "tqdm", Bar)
    monkeypatch.setattr(engines, "_LOOK_SECONDS", pause)
    monkeypatch.setattr(engines, "_LOOK_SHARE", 0)
    folder = start_folder(tmp_path, toy_run({"a": 40}))
    worker = Worker(folder, Toy(), seed=7)
    others = folder.run.units[:4]
    worker(others[0])  # before it starts
    with engines.watched(folder, Rank(), progress=True) as report:
        assert bars[0].n == bars[0].initial == 2
        done = [worker(unit) for unit in folder.run.units[4:]]
        for unit in others[1:]:
            worker(unit)
        monkeypatch.setattr(Folder, "sidecar", lambda own, unit: looks.append(unit) or sidecar(own, unit))
        for one in done:
            report(one)
        assert bars[0].n == (40 if pause == 0 else 2 + 2 * len(done))
        assert len(looks) == (18 if pause == 0 else 0), "all that were not known yet, once"
    assert bars[0].n == 40
