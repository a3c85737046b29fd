"""Images on their way: the same as those of a plain loop over the step, and no image changes for it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featvis_func as fv
from featvis_func import objective as objectives
from featvis_func.models import Model, load_model
from featvis_func.rendering.api import render
from featvis_func.rendering.renderer import make_renderer
from featvis_func.rendering.result import Result

STEPS = 9
TENSORS = ("images", "activations", "scores", "best_step", "history", "steps")


def unchanged(a: Result, b: Result) -> bool:
    pairs = [(getattr(a, name).nan_to_num(), getattr(b, name).nan_to_num()) for name in TENSORS]
    return all(torch.equal(one, other) for one, other in pairs) and a.status == b.status


def looped(model: Model, objective: Any, filters: list[int], count: int, **options: Any) -> Tensor:
    """Snapshots as they are taken by hand: one step after the other, all filters at once."""
    renderer = make_renderer(model, objective, filters, steps=STEPS, batch_size=len(filters), **options)
    state, target = renderer.start(filters, 0)
    assert renderer.decode is not None
    images = []
    for done in range(STEPS + 1):
        if done in fv.snapshot_steps(STEPS, count):
            images.append(torch.func.vmap(renderer.decode)(state.params))
        state, _ = renderer.step(renderer.weights, state, target)
    return (torch.stack(images, dim=1) * 255).round().to(torch.uint8)


def near(a: Tensor | None, b: Tensor) -> bool:
    """Equal but for what rounding does in a batch of another size."""
    return a is not None and a.shape == b.shape and bool((a.int() - b.int()).abs().max() <= 2)


@pytest.mark.parametrize("image", ["fourier", "pixel", "phase", "laplacian_pyramid", "cppn", "alpha"])
def test_snapshots_are_those_of_a_plain_loop(tiny: Model, image: str) -> None:
    filters = [4, 0, 5]
    expected = looped(tiny, "5", filters, 4, image=image)
    result = render(tiny, "5", filters, steps=STEPS, image=image, snapshots=4)
    assert result.snapshots is not None
    assert result.snapshots.shape == (3, 4, *result.images.shape[1:])
    assert torch.equal(result.snapshots, expected)
    assert result.config["snapshots"] == 4
    plain = render(tiny, "5", filters, steps=STEPS, image=image)
    assert plain.snapshots is None
    assert "snapshots" not in plain.config
    assert unchanged(result, plain)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_snapshots_in_any_batch(tiny: Model, batch_size: int) -> None:
    expected = looped(tiny, "5", [0, 1, 2, 3, 4], 3)
    result = render(tiny, "5", range(5), steps=STEPS, batch_size=batch_size, snapshots=3)
    assert near(result.snapshots, expected)
    assert unchanged(result, render(tiny, "5", range(5), steps=STEPS, batch_size=batch_size))


@pytest.mark.parametrize("batch_size", [2, 6])
def test_a_filter_that_is_stopped_stands_still(tiny: Model, batch_size: int) -> None:
    options: dict[str, Any] = {"steps": 40, "tolerance": 0.05, "views": "none", "optimizer": "published"}
    result = render(tiny, "5", batch_size=batch_size, snapshots=41, **options)
    assert unchanged(result, render(tiny, "5", batch_size=batch_size, **options))
    full = render(tiny, "5", batch_size=batch_size, snapshots=41, **{**options, "tolerance": None})
    assert result.snapshots is not None
    assert full.snapshots is not None
    assert (result.steps < 40).any()
    for i, steps in enumerate(result.steps.tolist()):
        assert near(result.snapshots[i, : steps + 1], full.snapshots[i, : steps + 1])
        assert (result.snapshots[i, steps:] == result.snapshots[i, steps]).all()


def test_the_last_snapshot_is_the_image_after_the_last_step(tiny: Model) -> None:
    last = render(tiny, "5", [2], steps=STEPS, snapshots=1, views="none", redirect=0).snapshots
    renderer = make_renderer(tiny, "5", [2], steps=STEPS, views="none", redirect=0)
    state, target = renderer.start([2], 0)
    for _ in range(STEPS):
        state, _ = renderer.step(renderer.weights, state, target)
    assert renderer.decode is not None
    assert last is not None
    assert near(last[0, 0], (renderer.decode(state.params[0]) * 255).round())


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_snapshots_of_any_channels(channels: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Tanh()).eval()
    result = render(load_model(module, size=12), "0", steps=2, snapshots=3)
    assert result.snapshots is not None
    assert result.snapshots.shape == (4, 3, channels, 12, 12)


def test_snapshots_of_filters_that_belong_together(tiny: Model) -> None:
    goal = objectives.channel("5", 1) - objectives.diversity("5")
    shared = fv.shared(fv.image.fourier_canvas(16), fv.image.pyramid_canvas(16, first=1))
    cases: list[tuple[Any, dict[str, Any]]] = [(goal, {}), ("5", {"image": shared})]
    for objective, options in cases:
        expected = looped(tiny, objective, [0, 1, 2], 4, **options)
        result = render(tiny, objective, range(3), steps=STEPS, snapshots=4, **options)
        assert result.snapshots is not None
        assert torch.equal(result.snapshots, expected)
        assert unchanged(result, render(tiny, objective, range(3), steps=STEPS, **options))


def test_a_renderer_keeps_snapshots_of_any_filters_and_seed(tiny: Model) -> None:
    renderer = make_renderer(tiny, "5", steps=4, snapshots=2)
    some = renderer([3, 1], seed=5)
    assert some.snapshots is not None
    assert near(render(tiny, "5", [1], steps=4, seed=5, snapshots=2).snapshots, some.snapshots[1:])


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (4, "snapshots must be 0 to 3, as 2 steps have so many images, got 4"),
        (-1, "snapshots must be at least 0, got -1"),
        (2.0, "snapshots must be a whole number, got 2.0"),
    ],
)
def test_counts_out_of_range_are_refused_before_the_model_is_traced(
    tiny: Model, count: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featvis_func.rendering.renderer.make_features", None)
    with pytest.raises(ValueError, match=message):
        render(tiny, "5", steps=2, snapshots=count)


def test_none_and_zero_are_none(tiny: Model) -> None:
    for count in (None, 0):
        result = render(tiny, "5", [0], steps=1, snapshots=count)
        assert result.snapshots is None
        assert "snapshots" not in result.config
        assert "snapshots" not in result.summary()
