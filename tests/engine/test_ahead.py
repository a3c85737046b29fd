"""Random numbers that are drawn for several steps at once: the same as those that each step draws for itself."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import featvis_func as fv
from featvis_func import transform as t
from featvis_func.engine import ahead as ahead_module
from featvis_func.engine.ahead import AheadStep
from featvis_func.engine.batching import run_batched
from featvis_func.engine.capture import CapturedStep
from featvis_func.engine.run import repeat_step, run
from featvis_func.engine.step import Ascent
from featvis_func.models import Model
from featvis_func.random import normal
from featvis_func.tree import tree_map
from featvis_func.types import Key, Transform
from tests.engine.test_capture import Recorder, assert_equal

pytestmark = pytest.mark.usefixtures("cached_tracing")

SIDE = 20
# The keys of a draw, whole numbers, several copies, no random numbers at all, and more than are drawn ahead.
TRANSFORMS = {
    "matrix and colours": t.chain(t.warp(t.jitter(3), t.rotate(9), size=(SIDE, SIDE)), t.color_jitter(hue=0.1)),
    "key": t.chain(t.warp(size=(SIDE, SIDE)), t.over_background()),
    "copies": t.multiview(t.warp(t.jitter(3), t.box_crop(), size=(SIDE, SIDE)), 3),
    "whole numbers": t.chain(t.roll(3), t.gaussian_blur(1.0)),
    "none": t.chain(),
}


def make_ascent(model: Model, transform: Transform, image: fv.Image | None = None) -> tuple[Ascent, fv.Features]:
    features = fv.make_features(model, ["5"], precision="float32")
    several = fv.make_ascent(features, image or fv.fourier(SIDE), transform, fv.channel("5"), fv.default_optimizer(9))
    return several, features


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_steps_are_equal_to_those_that_draw_for_themselves(
    tiny: Model, name: str, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead_module, "_STEPS", 4)
    ascent, features = make_ascent(tiny, TRANSFORMS[name], fv.alpha(SIDE) if name == "key" else None)
    recorder = Recorder()
    step = AheadStep(ascent, (lambda plain: CapturedStep(plain, recorder)) if captured else None)
    state, target = ascent.init(fv.filter_keys(0, "5", [3, 5])), torch.tensor([3, 5])
    state, _ = ascent.step(features.weights, state, target)
    state = state._replace(step=torch.tensor([1, 7]))  # the second filter has begun earlier
    before = tree_map(torch.clone, state)
    for steps in (6, 1, 4):  # more than are drawn at once, and fewer
        expected, reports = repeat_step(ascent.step, features.weights, state, target, steps=steps)
        actual, infos = repeat_step(step, features.weights, state, target, steps=steps)
        assert_equal(actual, expected)
        assert_equal(infos, reports)
    assert_equal(state, before)
    assert recorder.captures == captured


def test_numbers_are_drawn_once_for_many_steps(tiny: Model) -> None:
    calls: list[int] = []

    def draw(key: Key) -> Tensor:
        calls.append(1)
        return normal(key, (2,))

    ascent, features = make_ascent(tiny, Transform(draw, lambda image, drawn: image * (1 + 0.01 * drawn[0])))
    state, target = ascent.init(fv.filter_keys(0, "5", range(3))), torch.arange(3)
    calls.clear()
    run(AheadStep(ascent), features.weights, state, target, steps=40)
    assert len(calls) == 3
    reported: list[fv.Info] = []
    run(AheadStep(ascent), features.weights, state, target, steps=5, callback=reported.append)
    assert len(calls) == 4
    assert len(reported) == 5


class Operations(TorchDispatchMode):
    """Counts operations, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        return output


def test_step_of_a_run_has_less_than_half_the_operations(tiny: Model) -> None:
    made = fv.make_renderer(tiny, "5", range(3), compile=False, steps=16)
    state, target = made.init([0, 1, 2], 0)
    with Operations() as alone:
        for _ in range(16):
            made.step(made.weights, state, target)
    with Operations() as many:
        run(made.step, made.weights, state, target, steps=16)
    assert many.count < alone.count / 2


def large(key: Key) -> Tensor:
    return normal(key, (3, SIDE, SIDE))


@pytest.mark.parametrize(
    ("transforms", "ahead"), [("default", True), ("maco", True), (Transform(large, torch.add), False)]
)
def test_renderers_draw_ahead_where_the_numbers_are_few(tiny: Model, transforms: Any, ahead: bool) -> None:
    options: dict[str, Any] = {"transforms": transforms, "steps": 3, "size": SIDE, "compile": False}
    made = fv.make_renderer(tiny, "5", range(3), **options)
    assert isinstance(made.step, AheadStep) == ahead


def test_runs_that_many_snapshots_cut_short_draw_for_themselves(tiny: Model) -> None:
    steps = [
        fv.make_renderer(tiny, "5", [0], compile=False, steps=16, snapshots=snapshots).step for snapshots in (4, 5)
    ]
    assert [isinstance(step, AheadStep) for step in steps] == [True, False]


def test_step_of_a_renderer_is_not_for_compile_step(tiny: Model) -> None:
    made = fv.make_renderer(tiny, "5", [0], compile=False, steps=3)
    with pytest.raises(TypeError, match=r"compile_step takes the step of make_ascent, a function; .*compile=True"):
        fv.compile_step(made.step)


def test_filters_take_the_place_of_others_while_numbers_are_drawn_ahead(tiny: Model) -> None:
    made = fv.make_renderer(tiny, "5", range(5), compile=False, steps=12, batch_size=2)
    assert isinstance(made.step, AheadStep)
    options: dict[str, Any] = {"steps": 12, "batch_size": 2, "tolerance": 0.3, "patience": 2, "finish": made.finish}

    def one_by_one(*args: Any) -> Any:
        return made.step(*args)

    results = [
        run_batched(step, made.weights, lambda chosen: made.init(chosen, 0), range(5), **options)
        for step in (made.step, one_by_one)
    ]
    assert len(set(results[0].steps.tolist())) > 1, "all filters ended together"
    assert_equal(*results)
