"""One trace of the model for a sweep, and one compiled step for several layers."""

import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featvis_func as fv
from featvis_func.backbone import source
from featvis_func.backbone.features import trace_model
from featvis_func.engine import device, step
from featvis_func.models import Model
from featvis_func.rendering import resolve
from featvis_func.rendering.options import DEFAULTS
from featvis_func.rendering.result import Result
from featvis_func.sweep import api as running
from featvis_func.sweep import open_store, renderers, sweep, worker
from featvis_func.sweep.groups import COSTS, Costs, Group, choose_groups
from featvis_func.sweep.launchers import Rank, share
from featvis_func.sweep.layout import Folder, start_folder
from featvis_func.sweep.plan import plan_layers
from featvis_func.sweep.renderers import GroupRenderer, LayerRenderers
from featvis_func.sweep.shard import stored_images
from featvis_func.sweep.worker import Worker
from tests.sweep_toys import Toy, toy_result, toy_run
from tests.toys import TINY_SIZE, OneConv, load_toy, make_tiny

pytestmark = pytest.mark.usefixtures("one_thread")
# Steps in proportion to the gradient, which do not amplify rounding.
QUICK: dict[str, Any] = {"steps": 3, "precision": "float32", "optimizer": "sgd", "threads": 1}
LAYERS = ["0", "3", "5", "9"]  # 8, 12, 6 and 5 filters


@pytest.fixture
def eager_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every step that would be compiled run eagerly."""
    monkeypatch.setattr(device, "compile_step", lambda plain, **options: lambda *args: plain(*args))


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of layers of each trace."""
    real, numbers = source.trace, []

    def trace(module: nn.Module, calls: Any, *args: Any) -> Any:
        numbers.append(len(calls))
        return real(module, calls, *args)

    monkeypatch.setattr(source, "trace", trace)
    return numbers


# --- which layers share a step ----------------------------------------------------------------------------------------


def cost(groups: list[Group], seconds: dict[str, float], steps: dict[str, int], costs: Costs) -> float:
    total = 0.0
    for group in groups:
        if group.compiled:
            share = costs.compiled_share * (1 + costs.layer_share * (len(group.layers) - 1))
            slowest = max(seconds[name] for name in group.layers)
            total += costs.compile_seconds + share * slowest * sum(steps[name] for name in group.layers)
        else:
            total += sum(seconds[name] * steps[name] for name in group.layers)
    return total


def partitions(names: list[str]) -> Iterator[list[list[str]]]:
    for cuts in itertools.product([False, True], repeat=len(names) - 1):
        parts = [[names[0]]]
        for name, new in zip(names[1:], cuts, strict=True):
            if new:
                parts.append([name])
            else:
                parts[-1].append(name)
        yield parts


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_groups_are_the_cheapest_of_all_divisions(seed: int, always: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = list("abcdef")
    seconds = dict(zip(names, torch.rand(6, generator=generator).cumsum(0).tolist(), strict=True))
    steps = dict(zip(names, torch.randint(1, 60, (6,), generator=generator).tolist(), strict=True))
    costs = Costs(float(10 * torch.rand((), generator=generator)), 0.7, 0.02)
    chosen = choose_groups(names, list(seconds.values()), list(steps.values()), costs, always=always)
    assert [name for group in chosen for name in group.layers] == names
    every = min(
        cost([Group(tuple(part), c) for part, c in zip(parts, compiled, strict=True)], seconds, steps, costs)
        for parts in partitions(names)
        for compiled in itertools.product([True] if always else [False, True], repeat=len(parts))
    )
    assert cost(chosen, seconds, steps, costs) == pytest.approx(every)
    assert all(group.compiled for group in chosen) or not always


def test_a_short_sweep_is_not_compiled_and_a_long_one_in_few_groups() -> None:
    names = [str(i) for i in range(20)]
    seconds = [0.1 + 0.01 * i for i in range(20)]
    assert not any(group.compiled for group in choose_groups(names, seconds, [10] * 20, COSTS["cpu"]))
    long = choose_groups(names, seconds, [4000] * 20, COSTS["cpu"])
    assert all(group.compiled for group in long)
    assert 1 < len(long) < 20


# --- results ----------------------------------------------------------------------------------------------------------


def group_of(model: Model, plans: Any, **options: Any) -> GroupRenderer:
    given = {**DEFAULTS, **{k: v for k, v in QUICK.items() if k != "threads"}, "compile": "no", **options}
    features = trace_model(model, [plan.layer for plan in plans], precision="float32").features(
        [plan.layer for plan in plans]
    )
    return GroupRenderer(model, plans, features, given)


def assert_close(actual: Result, expected: Result) -> None:
    assert (actual.filters, actual.status) == (expected.filters, expected.status)
    assert torch.equal(actual.best_step, expected.best_step)
    assert torch.equal(actual.steps, expected.steps)
    for name in ("images", "activations", "scores", "history"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "default", "steps": 2, "transforms": "none"},
        {"size": (18, 18), "redirect": 3, "seed": 5},
        {"image": "pixel", "transforms": "maco"},
        {"image": "alpha"},
        {"snapshots": 2, "tolerance": 0.0},
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_group_renders_what_each_layer_renders(tiny: Model, options: dict[str, Any]) -> None:
    """Maps and vectors, filters of several layers in one batch, more of them than a batch holds."""
    plans = plan_layers(tiny, LAYERS, batch_size=4)
    units = [("9", (4, 0)), ("0", (3,)), ("5", (0, 1, 2, 5)), ("3", (7, 11))]
    results = group_of(tiny, plans, **options).render(units)
    for (layer, filters), result in zip(units, results, strict=True):
        own = {name: value for name, value in {**QUICK, **options}.items() if name != "threads"}
        expected = fv.render(tiny, layer, filters, compile=False, **own)
        assert_close(result, expected)
        assert result.config["layer"] == layer
        assert (result.snapshots is None) == ("snapshots" not in options)


def test_any_channel_has_the_scores_and_gradients_of_channel() -> None:
    shapes = {"a": (4, 5, 6), "b": (7, 3), "c": (9,), "d": (2, 2, 3, 4)}
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
    values["c"][0] = torch.inf  # another filter's value does not matter
    objective = fv.objective.any_channel(("a", 4), ("b", 3), ("c", 9), ("d", 2))
    number = 0
    for name, count in (("a", 4), ("b", 3), ("c", 9), ("d", 2)):
        for index in range(count):
            expected_gradient, expected = torch.func.grad_and_value(
                lambda a, name=name: fv.channel(name)(a, torch.tensor(index))  # noqa: B023
            )(values)
            gradient, score = torch.func.grad_and_value(lambda a: objective(a, torch.tensor(number)))(values)  # noqa: B023
            torch.testing.assert_close(score, expected)
            for key, value in expected_gradient.items():
                torch.testing.assert_close(gradient[key], value)
            number += 1


@pytest.mark.parametrize(
    ("layers", "message"),
    [((), "needs layers"), ((("a", 0),), "needs layers"), ((("a", 3),), "layer 'a' has 2 channels, not 3")],
)
def test_any_channel_refuses_wrong_layers(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fv.objective.any_channel(*layers)({"a": torch.zeros(2, 3, 3)}, torch.tensor(0))


# --- whole sweeps -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager_groups")
def test_sweep_in_groups_stores_what_one_without_stores(
    tiny: Model, tmp_path: Path, traces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, batches = GroupRenderer.render, []

    def render(self: GroupRenderer, units: Any, **options: Any) -> list[Result]:
        batches.append([layer for layer, _ in units])
        return real(self, units, **options)

    monkeypatch.setattr(GroupRenderer, "render", render)
    together = sweep(tiny, LAYERS, out=tmp_path / "together", compile="yes", batch_size=8, unit_size=4, **QUICK)
    assert traces == [4]
    assert together.complete
    assert any(len(set(batch)) > 1 for batch in batches), "layers share a batch"
    assert sum(map(len, batches)) == together.units
    alone = sweep(tiny, LAYERS, out=tmp_path / "alone", compile="no", batch_size=4, **QUICK)
    assert alone.complete
    assert traces == [4, 4]
    for a, b in zip(open_store(tmp_path / "together"), open_store(tmp_path / "alone"), strict=True):
        assert (a.layer, a.filter, a.status, a.best_step) == (b.layer, b.filter, b.status, b.best_step)
        assert a.score == pytest.approx(b.score, rel=1e-3, abs=1e-4)
        torch.testing.assert_close(a.activation, b.activation, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a.image, b.image, rtol=0, atol=1.01 / 255)


@pytest.mark.usefixtures("eager_groups")
def test_layers_are_rendered_alone_where_their_group_fails(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: GroupRenderer, *args: Any, **options: Any) -> list[Result]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(GroupRenderer, "render", fail)
    status = sweep(tiny, LAYERS, out=tmp_path, compile="yes", batch_size=8, unit_size=4, **QUICK)
    assert status.complete
    assert not status.failed
    lines = [json.loads(line) for path in tmp_path.glob("events/*") for line in path.read_text().splitlines()]
    failures = [line for line in lines if line["event"] == "failure"]
    assert {line["error"] for line in failures} == {"RuntimeError: no such kernel"}
    assert {line["attempt"] for line in failures} == {1}


@pytest.mark.usefixtures("eager_groups")
def test_layers_are_rendered_alone_where_their_group_cannot_be_made(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("too large")

    monkeypatch.setattr(renderers, "GroupRenderer", fail)
    with pytest.warns(UserWarning, match="the layers 0, 3, 5, 9 are rendered one by one: too large"):
        assert sweep(tiny, LAYERS, out=tmp_path, compile="yes", **QUICK).complete


@pytest.mark.usefixtures("eager_groups")
def test_layers_are_rendered_alone_where_no_step_can_be_measured(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(renderers, "measure_steps", fail)
    with pytest.warns(UserWarning, match="each layer has a step of its own, since none could be measured: too large"):
        assert sweep(tiny, LAYERS, out=tmp_path, compile="yes", **QUICK).complete


@pytest.mark.slow
def test_sweep_compiles_one_step_for_all_layers(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def compile_graph(graph: Any, *_: Any, **__: Any) -> Any:
        graphs.append(graph)
        return graph  # to run it as it is; what Inductor makes of a step is tested elsewhere

    monkeypatch.setattr(step, "compile_graph", compile_graph)
    assert sweep(tiny, LAYERS, out=tmp_path, compile="yes", **QUICK).complete
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:.*runs with a forward hook", "ignore:.*depends on the other images")
def test_a_layer_that_cannot_be_traced_does_not_keep_the_others_from_being_rendered(tmp_path: Path) -> None:
    class Loop(OneConv):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.head(image[None]) for image in self.conv(x)])

    status = sweep(load_toy(Loop(), size=8), ["conv", "head"], out=tmp_path, **QUICK)
    assert status.done == 1
    assert list(status.failed) == ["head/00000-00002"]


def test_trace_of_several_layers_gives_the_features_of_each(traces: list[int]) -> None:
    model = load_toy(make_tiny(), size=TINY_SIZE)
    traced = trace_model(model, LAYERS, precision="float32")
    images = torch.rand(2, 3, TINY_SIZE, TINY_SIZE, generator=torch.Generator().manual_seed(0))
    for layers in (["0"], ["9", "3"], LAYERS):
        features, own = traced.features(layers), fv.make_features(model, layers, precision="float32")
        assert features.weights.keys() == own.weights.keys()
        assert features.shapes == own.shapes
        assert features.exported
        actual, expected = features.apply(features.weights, images), own.apply(own.weights, images)
        for name in layers:
            torch.testing.assert_close(actual[name], expected[name])
    assert traces == [4, 1, 2, 4]


@pytest.mark.filterwarnings("ignore:.*runs with a forward hook")
def test_features_of_a_model_that_cannot_be_traced_fall_back_to_hooks() -> None:
    class Branches(OneConv):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y if y.sum() > 0 else -y

    traced = trace_model(load_toy(Branches(), size=8), ["conv", "output"], precision="float32")
    features = traced.features(["conv"])
    assert not features.exported
    assert features.shapes == {"conv": (4, 6, 6)}


# --- ranks and commits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 20])
def test_every_unit_belongs_to_one_rank_and_each_rank_needs_few_layers(ranks: int, tmp_path: Path) -> None:
    run = toy_run(dict.fromkeys("abcd", 5), unit_size=1)
    folder = Folder(tmp_path, run)
    shares = [share(folder, Rank(number, ranks)) for number in range(ranks)]
    assert [unit for units in shares for unit in units] == list(run.units)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(len({unit.layer for unit in units}) <= -(-len(units) // 5) + 1 for units in shares)


def test_units_are_committed_in_another_thread_and_reported_when_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, threads = worker.commit, []

    def commit(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return real(*args, **options)

    monkeypatch.setattr(worker, "commit", commit)
    folder = start_folder(tmp_path, toy_run())
    reported = []
    for done in Worker(folder, Toy(), seed=7, background=True).run(folder.run.units):
        assert done.outcome == "rendered"
        assert folder.sidecar(done.unit).exists()
        reported.append(done.unit)
    assert reported == list(folder.run.units)
    assert threading.main_thread() not in threads
    assert [done.outcome for done in Worker(folder, Toy(), seed=7).run(folder.run.units)] == ["found"] * len(reported)


@pytest.mark.parametrize("background", [False, True])
def test_a_commit_that_fails_is_tried_again(background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, numbers = worker.commit, itertools.count()

    def commit(*args: Any, **options: Any) -> Any:
        if next(numbers) == 1:
            raise RuntimeError("the disk said no")
        return real(*args, **options)

    monkeypatch.setattr(worker, "commit", commit)
    folder = start_folder(tmp_path, toy_run())
    worker_of_units = Worker(folder, Toy(), seed=7, background=background)
    outcomes = [done.outcome for done in worker_of_units.run(folder.run.units)]
    assert outcomes == ["rendered"] * len(folder.run.units)


@pytest.mark.usefixtures("eager_groups")
@pytest.mark.parametrize(
    ("dtype", "compile"), [("uint8", "yes"), pytest.param("float16", "no", marks=pytest.mark.slow)]
)
def test_images_that_are_converted_on_their_device_give_the_same_files(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, compile: str
) -> None:
    def files(name: str) -> dict[str, bytes]:
        status = sweep(tiny, LAYERS[:2], out=tmp_path / name, image_dtype=dtype, compile=compile, **QUICK)
        assert status.complete
        return {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}

    expected, taken = files("converted last"), []

    def take(images: Tensor) -> Tensor:
        taken.append(len(images))
        return stored_images(images, dtype)

    monkeypatch.setattr(renderers, "float_images", take)  # what a sweep on the CPU takes
    assert files("converted first") == expected
    assert sum(taken) == 20


@pytest.mark.parametrize("background", [False, True])
def test_images_on_a_device_are_packed_when_they_have_arrived(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of each unit leave the device "meta"; what arrives are those that the toy has."""
    originals: dict[tuple[int, ...], Tensor] = {}
    threads, begun = [], []

    def make(plan: Any) -> Any:
        def render(filters: Any, /, *, seed: int | None = None) -> Result:
            result = Toy()(plan)(filters, seed=seed)
            originals[result.filters] = result.images
            begun.append(result.filters)
            return replace(result, images=result.images.to("meta"))

        return render

    def begin_copy(images: Tensor) -> Any:
        assert (images.device.type, images.dtype) == ("meta", torch.uint8)
        return originals[begun[-1]], lambda: threads.append(threading.current_thread())

    monkeypatch.setattr(worker, "begin_copy", begin_copy)
    files = []
    for name, maker in (("meta", make), ("cpu", Toy())):
        folder = start_folder(tmp_path / name, toy_run())
        done = list(Worker(folder, maker, seed=7, background=background).run(folder.run.units))
        assert [d.outcome for d in done] == ["rendered"] * len(folder.run.units)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")})
    assert files[0] == files[1]
    assert len(threads) == len(folder.run.units)
    assert (threading.main_thread() in threads) != background


def test_rows_of_stored_images_are_replaced() -> None:
    first, second = toy_result("a", range(3), 7), toy_result("a", [2], 8)
    first, second = (replace(r, images=stored_images(r.images, "uint8")) for r in (first, second))
    replaced = worker._replace_rows(first, [2], second, [0])
    assert torch.equal(replaced.images, torch.cat([first.images[:2], second.images]))


def test_select_filters_takes_rows_of_every_tensor() -> None:
    whole = toy_result("a", range(5), 7)
    part = fv.rendering.result.select_filters(whole, [4, 1])
    assert part.filters == (4, 1)
    assert torch.equal(part.images, whole.images[[4, 1]])
    assert torch.equal(part.history, whole.history[:, [4, 1]])
    assert part.status == (whole.status[4], whole.status[1])


def test_layers_that_are_done_do_not_count_for_the_groups(tiny: Model) -> None:
    plans = plan_layers(tiny, LAYERS)
    made = LayerRenderers(
        tiny, {**DEFAULTS, "steps": 3, "compile": "yes", "precision": "float32"}, plans, remaining=lambda: {"5": 6}
    )
    assert made._choose_groups() == {}


class Stop(Exception):  # noqa: N818 - not an error
    """Ends a call once it has been seen what was to be seen."""


def test_a_rank_checks_its_own_device_and_no_other(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []

    def check_device(name: Any) -> None:
        checked.append(str(name))
        raise Stop

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(running, "check_device", check_device)
    for name, value in (("RANK", "11"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(Stop):
        sweep(tiny, "0", out=tmp_path, device="cuda", engine="torchrun", **QUICK)
    assert checked == ["cuda:3"]


@pytest.mark.parametrize(("model", "device"), [("texturenet", "cuda"), (None, None)], ids=["name", "module"])
def test_a_model_given_by_name_is_rendered_on_cuda_if_there_is_one(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, model: str | None, device: str | None
) -> None:
    seen = []

    def make_features(*args: Any, device: Any, **options: Any) -> None:
        seen.append(device)
        raise Stop

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(resolve, "make_features", make_features)
    with pytest.raises(Stop):
        fv.render(model or tiny, "block1.conv" if model else "0", 0)
    assert seen == [device]
