"""Snapshots of rendered filters: equal to those of a plain loop over the step, and without effect on the images."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featvis_func as fv
from featvis_func import objective as objectives
from featvis_func.models import Model
from featvis_func.rendering.api import render
from featvis_func.rendering.plan import make_renderer
from featvis_func.rendering.result import Result
from tests.toys import load_toy

pytestmark = pytest.mark.usefixtures("cached_tracing")

STEPS = 9
TENSORS = ("images", "activations", "scores", "best_step", "history", "steps")


def assert_equal_results(a: Result, b: Result) -> None:
    """Compare everything but the snapshots, bit for bit."""
    for name in TENSORS:
        assert torch.equal(getattr(a, name).nan_to_num(), getattr(b, name).nan_to_num()), name
    assert a.status == b.status


def snapshots_by_loop(model: Model, objective: Any, filters: list[int], count: int, **options: Any) -> Tensor:
    """Take the snapshots in a plain loop over the steps, with all filters in one batch."""
    renderer = make_renderer(model, objective, filters, steps=STEPS, batch_size=len(filters), **options)
    state, target = renderer.init(filters, 0)
    assert renderer.decode is not None
    images = []
    for step in range(STEPS + 1):
        if step in fv.snapshot_steps(STEPS, count):
            images.append(renderer.decode(state))
        state, _ = renderer.step(renderer.weights, state, target)
    return (torch.stack(images, dim=1) * 255).round().to(torch.uint8)


def equal_up_to_rounding(a: Tensor | None, b: Tensor) -> bool:
    """Compare snapshots that were rendered in batches of different sizes."""
    return a is not None and a.shape == b.shape and bool((a.int() - b.int()).abs().max() <= 2)


@pytest.mark.slow
@pytest.mark.parametrize("image", ["fourier", "pixel", "phase", "laplacian_pyramid", "cppn", "alpha"])
def test_snapshots_equal_those_of_a_plain_loop(tiny: Model, image: str) -> None:
    filters = [4, 0, 5]
    expected = snapshots_by_loop(tiny, "5", filters, 4, image=image)
    result = render(tiny, "5", filters, steps=STEPS, image=image, snapshots=4)
    assert result.snapshots is not None
    assert result.snapshots.shape == (3, 4, *result.images.shape[1:])
    assert torch.equal(result.snapshots, expected)
    assert result.config["snapshots"] == 4
    plain = render(tiny, "5", filters, steps=STEPS, image=image)
    assert plain.snapshots is None
    assert plain.config["snapshots"] == 0
    assert_equal_results(result, plain)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_snapshots_do_not_depend_on_the_batch_size(tiny: Model, batch_size: int) -> None:
    # Steps in proportion to the gradient: Adam's would amplify the rounding in which batches differ.
    expected = snapshots_by_loop(tiny, "5", [0, 1, 2, 3, 4], 3, optimizer="sgd")
    result = render(tiny, "5", range(5), steps=STEPS, batch_size=batch_size, snapshots=3, optimizer="sgd")
    assert equal_up_to_rounding(result.snapshots, expected)
    assert_equal_results(result, render(tiny, "5", range(5), steps=STEPS, batch_size=batch_size, optimizer="sgd"))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 6])
def test_snapshots_of_a_stopped_filter_repeat_its_last_image(tiny: Model, batch_size: int) -> None:
    options: dict[str, Any] = {"steps": 40, "tolerance": 0.05, "transforms": "none", "optimizer": "published"}
    result = render(tiny, "5", batch_size=batch_size, snapshots=41, **options)
    assert_equal_results(result, render(tiny, "5", batch_size=batch_size, **options))
    all_steps = render(tiny, "5", batch_size=batch_size, snapshots=41, **{**options, "tolerance": None})
    assert result.snapshots is not None
    assert all_steps.snapshots is not None
    assert (result.steps < 40).any()
    for i, steps in enumerate(result.steps.tolist()):
        assert equal_up_to_rounding(result.snapshots[i, : steps + 1], all_steps.snapshots[i, : steps + 1])
        assert (result.snapshots[i, steps:] == result.snapshots[i, steps]).all()


def test_last_snapshot_is_the_image_after_the_last_step(tiny: Model) -> None:
    options: dict[str, Any] = {"steps": STEPS, "transforms": "none", "redirect": 0}
    snapshots = render(tiny, "5", [2], snapshots=1, **options).snapshots
    renderer = make_renderer(tiny, "5", [2], **options)
    state, target = renderer.init([2], 0)
    for _ in range(STEPS):
        state, _ = renderer.step(renderer.weights, state, target)
    assert renderer.decode is not None
    assert snapshots is not None
    assert equal_up_to_rounding(snapshots[0, 0], (renderer.decode(state)[0] * 255).round())


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_snapshots_have_the_channels_of_the_image(channels: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Tanh()).eval()
    result = render(load_toy(module, size=12), "0", steps=2, snapshots=3)
    assert result.snapshots is not None
    assert result.snapshots.shape == (4, 3, channels, 12, 12)


@pytest.mark.parametrize("coupled_by", ["objective", "image"])
def test_snapshots_of_filters_that_need_a_single_batch(tiny: Model, coupled_by: str) -> None:
    objective: Any = "5"
    options: dict[str, Any] = {}
    if coupled_by == "objective":
        objective = objectives.channel("5", 1) - objectives.diversity("5")
    else:
        options["image"] = fv.shared(fv.image.fourier_canvas(16), fv.image.pyramid_canvas(16, first=1))
    expected = snapshots_by_loop(tiny, objective, [0, 1, 2], 4, **options)
    result = render(tiny, objective, range(3), steps=STEPS, snapshots=4, **options)
    assert result.snapshots is not None
    assert torch.equal(result.snapshots, expected)
    assert_equal_results(result, render(tiny, objective, range(3), steps=STEPS, **options))


def test_renderer_takes_snapshots_of_any_of_its_filters_and_any_seed(tiny: Model) -> None:
    renderer = make_renderer(tiny, "5", steps=4, snapshots=2)
    result = renderer([3, 1], seed=5)
    assert result.snapshots is not None
    assert equal_up_to_rounding(render(tiny, "5", [1], steps=4, seed=5, snapshots=2).snapshots, result.snapshots[1:])


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (4, r"snapshots must be in \[0, 3\] for steps=2, got 4"),
        (-1, "snapshots must be at least 0, got -1"),
        (2.0, "snapshots must be a whole number, got 2.0"),
    ],
)
def test_invalid_number_of_snapshots_is_refused_before_the_model_is_traced(
    tiny: Model, count: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featvis_func.rendering.resolve.make_features", None)
    with pytest.raises(ValueError, match=message):
        render(tiny, "5", steps=2, snapshots=count)


@pytest.mark.parametrize("count", [None, 0])
def test_no_snapshots_are_taken_for_none_and_0(tiny: Model, count: Any) -> None:
    result = render(tiny, "5", [0], steps=1, snapshots=count)
    assert result.snapshots is None
    assert result.config["snapshots"] == 0
    assert "snapshots" not in result.summary()
