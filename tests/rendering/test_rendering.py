"""One step, its repetition and the one-call door: from a model and a layer to one image per filter."""

import gc
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import featvis_func as fv
from featvis_func import objective as objectives
from featvis_func import random
from featvis_func import transform as transforms
from featvis_func.backbone.features import Features, make_features
from featvis_func.engine.step import Step, compile_step, filter_keys, init_state, make_step, run
from featvis_func.models import Model, load_model
from featvis_func.objective import Objective
from featvis_func.rendering.api import render
from featvis_func.rendering.options import IMAGES
from featvis_func.rendering.presets import OPTIMIZERS, VIEWS, default_optimizer, plain_optimizer, published_optimizer
from featvis_func.rendering.result import Result
from featvis_func.tree import tree_leaves, tree_map
from featvis_func.types import Image, Optimizer, State, Transform
from tests.toys import TINY_SIZE, OneConv, make_tiny

SQUEEZENET_LAYER = "features.9.expand3x3"


class Parts(NamedTuple):
    """A step and what it is made of."""

    features: Features
    image: Image
    transform: Transform
    objective: Objective
    optimizer: Optimizer
    step: Step

    def start(self, filters: Sequence[int], seed: int = 0) -> tuple[State, Tensor]:
        layer = self.features.paths[self.objective.layers[0]]
        keys = filter_keys(seed, layer, filters)
        return init_state(self.features, self.image, self.objective, self.optimizer, keys), torch.tensor(filters)


def parts_of(
    model: Model,
    objective: str | Objective,
    *,
    size: tuple[int, int] = (18, 21),
    optimizer: Optimizer | None = None,
    views: str = "default",
) -> Parts:
    goal = objectives.channel(objective) if isinstance(objective, str) else objective
    features = make_features(model, goal.layers)
    image = fv.fourier(size, channels=model.channels)
    transform = transforms.chain(
        fv.views(views, image=size, size=model.size), transforms.normalize(model.mean, model.std)
    )
    rule = default_optimizer(128) if optimizer is None else optimizer
    return Parts(features, image, transform, goal, rule, make_step(features, image, transform, goal, rule))


def same(a: Any, b: Any) -> bool:
    leaves, others = tree_leaves(a), tree_leaves(b)
    return len(leaves) == len(others) and all(torch.equal(x, y) for x, y in zip(leaves, others, strict=True))


def same_result(a: Result, b: Result) -> bool:
    tensors = ("images", "activations", "scores", "best_step", "history", "steps")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors) and (
        (a.filters, a.status, a.config) == (b.filters, b.status, b.config)
    )


def is_consistent(result: Result, steps: int) -> None:
    """What holds of every result whose scores are finite."""
    count = len(result.filters)
    assert result.history.shape == (steps, count)
    assert result.images.shape[0] == result.activations.shape[0] == count
    assert len(result.status) == count
    assert {result.images.dtype, result.activations.dtype, result.scores.dtype, result.history.dtype} == {torch.float32}
    assert 0 <= result.images.min() <= result.images.max() <= 1
    assert torch.equal(result.scores, result.history.max(0).values)
    assert torch.equal(result.best_step, result.history.argmax(0))
    assert result.steps.tolist() == [steps] * count
    assert not result.images.requires_grad


# --- the one-call door ----------------------------------------------------------------------------------------------


def test_a_render_of_the_embedded_model() -> None:
    result = render("texturenet", "block6.conv", [3, 17], steps=3)
    is_consistent(result, 3)
    assert result.images.shape == (2, 3, 96, 96)
    assert result.filters == (3, 17)
    assert result.status == ("ok", "ok")
    assert result.config["model"] == "texturenet"
    assert result.config["layer"] == "block6.conv"


def test_a_map_is_that_filters_and_its_mean_the_score(tiny: Model) -> None:
    result = render(tiny, "5", steps=3)
    assert result.activations.shape == (6, 7, 7)
    torch.testing.assert_close(result.activations.mean((1, 2)), result.scores)


def test_without_a_view_the_best_image_has_the_best_score(tiny: Model) -> None:
    result = render(tiny, "5", steps=4, views="none")
    is_consistent(result, 4)
    mean, std = (torch.tensor(values)[:, None, None] for values in (tiny.mean, tiny.std))
    with torch.no_grad():
        maps = tiny.module[:6]((result.images - mean) / std)  # type: ignore[index]
    own = maps[torch.arange(6), torch.arange(6)].mean((1, 2))
    torch.testing.assert_close(own, result.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 12])
def test_ascent_ascends(tiny: Model, steps: int) -> None:
    result = render(tiny, "5", steps=steps, views="none")
    is_consistent(result, steps)
    assert (result.history[-1] > result.history[0]).all() or steps == 1
    assert result.status == ("ok",) * 6


def test_a_repeat_is_the_same_bit_for_bit(texturenet: Model) -> None:
    options: dict[str, Any] = {"steps": 3, "size": 24, "batch_size": 2}
    torch.manual_seed(1)
    first = render(texturenet, "block4.conv", [5, 1, 9], **options)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert same_result(render(texturenet, "block4.conv", [5, 1, 9], **options), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = render(texturenet, "block4.conv", [5, 1, 9], seed=1, **options)
    assert not torch.equal(other.images, first.images)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (None, (0, 1, 2, 3, 4, 5)),
        (4, (4,)),
        (range(1, 4), (1, 2, 3)),
        ([5, 0], (5, 0)),
        ((i for i in (2, 3)), (2, 3)),
        (torch.tensor([1, 2]), (1, 2)),
    ],
    ids=["all", "int", "range", "list", "generator", "tensor"],
)
def test_filters_in_the_order_given(tiny: Model, filters: Iterable[int] | int | None, expected: tuple[int]) -> None:
    result = render(tiny, "5", filters, steps=1)
    assert result.filters == expected
    is_consistent(result, 1)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_the_last_batch_is_padded_and_the_padding_gone(tiny: Model, batch_size: int) -> None:
    whole = render(tiny, "5", steps=1, batch_size=6)
    result = render(tiny, "5", steps=1, batch_size=batch_size)
    is_consistent(result, 1)
    assert result.filters == tuple(range(6))
    torch.testing.assert_close(result.history, whole.history, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("size", "shape"), [(7, (7, 7)), ((9, 30), (9, 30)), ((40, 13), (40, 13)), (1, (1, 1))])
@pytest.mark.parametrize("image", IMAGES)
def test_any_size(tiny: Model, size: int | tuple[int, int], shape: tuple[int, int], image: str) -> None:
    result = render(tiny, "5", [0, 2], steps=2, size=size, image=image)
    is_consistent(result, 2)
    assert result.images.shape == (2, 4 if image == "alpha" else 3, *shape)
    assert result.config["size"] == list(shape)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_image_channels(channels: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Tanh()).eval()
    result = render(load_model(module, size=12), "0", steps=2)
    is_consistent(result, 2)
    assert result.images.shape == (4, channels, 12, 12)


@pytest.mark.parametrize("views", VIEWS)
def test_any_views(tiny: Model, views: str) -> None:
    is_consistent(render(tiny, "5", [1], steps=2, views=views, size=48), 2)


OBJECTIVES: dict[str, tuple[Objective, int, tuple[int, ...]]] = {
    "neuron": (objectives.neuron("5"), 6, (7, 7)),
    "neuron at a position": (objectives.neuron("5", position=(0, 6)), 6, (7, 7)),
    "layer": (objectives.layer("3"), 1, (9, 9)),
    "mean of squares": (objectives.layer("3", power=2), 1, (9, 9)),
    "fixed channel": (objectives.channel("5", 2), 1, (7, 7)),
    "vector": (objectives.channel("9"), 5, ()),
    "two layers": (objectives.channel("3") + 0.5 * objectives.channel("5"), 6, (9, 9)),
    "difference": (objectives.channel("5") - objectives.channel("3", 1), 6, (7, 7)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(tiny: Model, name: str) -> None:
    goal, count, shape = OBJECTIVES[name]
    result = render(tiny, goal, steps=2)
    is_consistent(result, 2)
    assert result.activations.shape == (count, *shape)
    assert result.config["objective"] == repr(goal)


def test_variants_of_an_objective_that_names_its_channel(tiny: Model) -> None:
    result = render(tiny, objectives.channel("5", 2), [0, 900], steps=1)
    assert result.filters == (0, 900)
    assert not torch.equal(result.images[0], result.images[1])


def test_own_image_transform_and_optimizer(tiny: Model) -> None:
    grey = Image(
        lambda key: {"level": 0.1 * random.normal(key, (1, 4, 5))},
        lambda params: torch.sigmoid(params["level"]).expand(3, 4, 5),
    )
    still = Transform(
        lambda key: (),
        lambda image, draw: torch.nn.functional.interpolate(image[None], (TINY_SIZE, TINY_SIZE))[0],
    )
    plain = Optimizer(lambda params, key: (), lambda grads, state, params: ({"level": 0.5 * grads["level"]}, state))
    result = render(tiny, "5", [0, 1], steps=3, image=grey, views=still, optimizer=plain)
    is_consistent(result, 3)
    assert result.images.shape == (2, 3, 4, 5)
    assert torch.equal(result.images[:, 0], result.images[:, 2])
    assert (result.history[2] > result.history[0]).all()
    config = result.config
    assert (config["image"], config["views"], config["optimizer"], config["lr"]) == ("custom", "custom", "custom", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filters": [2, 6]}, r"layer '5' has filters 0 to 5, got 6"),
        ({"filters": 6}, r"layer '5' has filters 0 to 5, got 6"),
        ({"filters": [-1]}, r"layer '5' has filters 0 to 5, got -1"),
        ({"filters": []}, r"no filters were asked for: the list is empty"),
        ({"filters": range(0)}, r"the list is empty"),
        ({"steps": 0}, r"steps must be at least 1, got 0"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"size": 0}, r"image size must be .*0"),
        ({"size": (4, -2)}, r"image size must be .*4.*-2"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"views": "sideways"}, r"unknown views 'sideways'; expected one of default, published, lucid, maco, none"),
        ({"image": "oil"}, r"unknown image parameterisation 'oil'; expected one of fourier, pixel, phase, "),
        ({"lr": 0.0}, r"above 0, got 0\.0|start > 0"),
        ({"lr": float("nan")}, r"got nan|start > 0"),
        ({"lr": float("inf")}, r"got inf|start > 0"),
        ({"optimizer": "downhill"}, r"unknown optimizer 'downhill'; expected one of default, published"),
        ({"optimizer": published_optimizer(), "lr": 0.1}, r"lr= goes with an optimiser's name"),
        ({"objective": "55"}, r"no layer '55'"),
        ({"objective": objectives.channel("5", 6)}, r"no channel 6 in layer '5', which has 6"),
        ({"objective": objectives.neuron("5", position=(7, 0))}, r"no position \(7, 0\) in layer '5'"),
        ({"objective": objectives.channel("5", 1), "filters": [-3]}, r"must be in \[0, 2\*\*32\), got -3"),
        ({"objective": objectives.channel("3") + objectives.channel("5"), "filters": [7]}, r"'5' has filters 0 to 5"),
    ],
)
def test_bad_input_is_refused(tiny: Model, change: dict[str, Any], message: str) -> None:
    options = {"objective": "5", "filters": [0], "steps": 1, **change}
    with pytest.raises(ValueError, match=message) as caught:
        render(tiny, **options)
    assert "\n" not in str(caught.value)


# --- a filter's image is its own ------------------------------------------------------------------------------------


def batches(parts: Parts, chosen: Sequence[int]) -> list[tuple[list[int], State, Tensor]]:
    """The same filter alone, among eight and shuffled among three."""
    groups = ([chosen[1]], list(chosen), [chosen[6], chosen[1], chosen[0]])
    return [(group, *parts.start(group)) for group in groups]


@pytest.fixture(params=["tiny", "texturenet", "squeezenet"])
def setting(request: pytest.FixtureRequest) -> tuple[Parts, list[int]]:
    model = request.getfixturevalue(request.param)
    if request.param == "tiny":
        return parts_of(model, "3"), [*range(8)]
    if request.param == "texturenet":
        return parts_of(model, "block4.conv", size=(64, 64)), [*range(8, 16)]
    return parts_of(model, SQUEEZENET_LAYER, size=(224, 224)), [*range(8)]


def test_company_changes_nothing(setting: tuple[Parts, list[int]]) -> None:
    parts, chosen = setting
    params, draws, decoded, scores = [], [], [], []
    for group, state, target in batches(parts, chosen):
        i = group.index(chosen[1])
        params.append(state.params[i])
        own = [
            vmap(parts.transform.draw)(vmap(lambda k, s=step: random.fold_in(k, s, stream=2))(state.key))
            for step in range(3)
        ]
        draws.append([leaf[i] for leaf in tree_leaves(own)])
        state, _ = run(parts.step, parts.features.weights, state, target, steps=1)
        decoded.append(parts.image.decode(state.params[i]))
        state, _ = run(parts.step, parts.features.weights, state, target, steps=5)
        scores.append(state.best.score[i].item())
    assert torch.equal(params[0], params[1])
    assert torch.equal(params[0], params[2])
    assert draws[0]
    assert same(draws[0], draws[1])
    assert same(draws[0], draws[2])
    for other in decoded[1:]:
        assert (other - decoded[0]).abs().max() <= 1e-5
    # Rounding grows from step to step: after these 9 it has come to 2.4% on SqueezeNet.
    assert scores[1:] == pytest.approx([scores[0]] * 2, rel=0.04)


def test_keys_depend_on_seed_layer_and_filter_alone() -> None:
    keys = filter_keys(0, "conv", range(6))
    assert torch.equal(filter_keys(0, "conv", [4, 1]), keys[[4, 1]])
    everything = torch.cat([keys, filter_keys(1, "conv", range(6)), filter_keys(0, "conv2", range(6))])
    assert len(everything.unique(dim=0)) == 18
    assert keys.dtype == torch.int64


def test_the_gradient_of_the_sum_is_each_filters_own(tiny: Model) -> None:
    """With a plain rule one step shows the gradient itself; it equals that of a run alone, and finite differences."""
    plain = Optimizer(lambda params, key: (), lambda grads, state, params: (grads, state))
    parts = parts_of(tiny, "5", optimizer=plain, views="none")
    state, target = parts.start([0, 3, 5])
    after, info = parts.step(parts.features.weights, state, target)
    gradients = after.params - state.params
    for i, number in enumerate([0, 3, 5]):
        alone, own = parts.start([number])
        moved, _ = parts.step(parts.features.weights, alone, own)
        torch.testing.assert_close(moved.params[0] - alone.params[0], gradients[i], rtol=1e-3, atol=1e-6)

        def score(params: Tensor, number: int = number) -> Tensor:
            image = parts.transform.apply(parts.image.decode(params), parts.transform.draw(random.key(0)))
            return parts.features.apply(parts.features.weights, image[None])["5"][0, number].mean()

        exact = torch.func.grad(score)(state.params[i])
        torch.testing.assert_close(gradients[i], exact, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(info.grad_norm[i], exact.norm(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(info.score[i], score(state.params[i]), rtol=1e-4, atol=1e-6)


# --- filters that do not move ---------------------------------------------------------------------------------------


def test_a_dead_filter_is_named_and_its_mates_go_on(tiny: Model) -> None:
    expected = render(tiny, "3", [0, 2], steps=3, optimizer=published_optimizer(noise=0.0))
    convolution = tiny.module.get_submodule("3")
    with torch.no_grad():
        for parameter in convolution.parameters():
            parameter[1] = 0
    result = render(tiny, "3", [0, 1, 2], steps=3, optimizer=published_optimizer(noise=0.0))
    assert result.status == ("ok", "dead", "ok")
    assert result.scores[1] == 0
    assert result.best_step[1] == 0
    torch.testing.assert_close(result.history[:, [0, 2]], expected.history, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_filter_without_finite_scores_is_named_and_its_mates_go_on(tiny: Model, value: float) -> None:
    """The score is what is not finite; the graph and the layer itself are sound."""
    expected = render(tiny, "3", [0, 2], steps=3, optimizer=published_optimizer(noise=0.0))
    channel = objectives.channel("3")
    broken = Objective(
        lambda a, t: torch.where(t == 1, value, channel.score(a, t)),
        channel.activation_map,
        channel.layers,
        channel.targeted,
        "broken",
    )
    result = render(tiny, broken, [0, 1, 2], steps=3, optimizer=published_optimizer(noise=0.0))
    assert result.status == ("ok", "nonfinite", "ok")
    assert result.scores[1] == -torch.inf
    assert result.best_step[1] == -1
    assert 0 <= result.images.min() <= result.images.max() <= 1
    torch.testing.assert_close(result.history[:, [0, 2]], expected.history, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.images[[0, 2]], expected.images, rtol=1e-3, atol=1e-3)


def test_a_step_that_is_not_finite_is_skipped(tiny: Model) -> None:
    """The gradient is broken at the first step only: a view that draws it."""
    still = fv.views("none", image=(18, 21), size=tiny.size)

    def apply(image: Tensor, number: Tensor) -> Tensor:
        return still.apply(image, torch.eye(3)) * torch.where(number < 0.5, torch.nan, 1.0)

    broken = Transform(lambda key: random.uniform(key, (1,)), apply)
    result = render(tiny, "5", steps=10, size=(18, 21), views=broken)
    finite = result.history.isfinite()
    assert 0.2 < finite.double().mean() < 0.8
    assert result.status == ("nonfinite",) * 6
    assert torch.equal(result.scores, result.history.nan_to_num(-torch.inf).max(0).values)
    assert finite.gather(0, result.best_step[None]).all()
    for column, fine in zip(result.history.T, finite.T, strict=True):
        assert column[fine][-1] > column[fine][0]


def test_a_filter_stands_still_while_not_finite(tiny: Model) -> None:
    parts = parts_of(tiny, "5", views="none")
    state, target = parts.start([0, 1])
    state = state._replace(best=state.best._replace(score=torch.tensor([-torch.inf, 1e9])))
    weights = {**parts.features.weights}
    after, info = parts.step(weights, state, target)
    assert after.best.step.tolist() == [0, -1]
    assert after.best.score[1] == 1e9
    assert info.finite.tolist() == [True, True]
    poison = {name: value * torch.nan for name, value in weights.items()}
    still, info = parts.step(poison, state, target)
    assert info.finite.tolist() == [False, False]
    assert same((still.params, still.opt, still.best), (state.params, state.opt, state.best))
    assert still.step.tolist() == [1, 1]


@pytest.fixture
def asleep() -> Model:
    """Behind the ReLU no filter sees anything in an image near grey."""
    convolution = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        convolution.weight.copy_(torch.eye(3)[:, :, None, None])
        assert convolution.bias is not None
        convolution.bias.fill_(-0.53)
    return load_model(nn.Sequential(convolution, nn.ReLU(inplace=True)), mean=(0, 0, 0), std=(1, 1, 1), size=24)


def test_noise_wakes_a_filter_behind_a_rectifier(asleep: Model) -> None:
    without = render(asleep, "1", steps=12, optimizer=published_optimizer(noise=0.0), views="none")
    assert without.status == ("dead",) * 3
    assert (without.history == 0).all()
    result = render(asleep, "1", steps=12, views="none", redirect=0)
    assert (result.history[0] == 0).all()
    assert result.status == ("ok",) * 3
    assert (result.scores > 0.01).all()


def test_before_the_rectifier_nothing_sleeps(asleep: Model) -> None:
    result = render(asleep, "0", steps=2, views="none")
    assert result.status == ("ok",) * 3
    assert (result.history[1] > result.history[0]).all()


# --- the parts ------------------------------------------------------------------------------------------------------


def test_features_must_have_the_objectives_layers(tiny: Model) -> None:
    parts = parts_of(tiny, "5")
    with pytest.raises(ValueError, match=r"the features lack layer '3' of the objective; they have \['5'\]"):
        make_step(parts.features, parts.image, parts.transform, objectives.channel("3"), parts.optimizer)


def test_run_reports_each_step(tiny: Model) -> None:
    parts = parts_of(tiny, "5")
    state, target = parts.start([1, 4])
    seen: list[fv.Info] = []
    last, infos = run(parts.step, parts.features.weights, state, target, steps=3, callback=seen.append)
    assert len(seen) == 3
    assert all(torch.equal(infos.score[i], info.score) for i, info in enumerate(seen))
    assert {column.shape for column in infos} == {(3, 2)}
    assert last.step.tolist() == [3, 3]
    assert torch.equal(last.best.score, infos.score.max(0).values)
    assert torch.equal(last.key, state.key)


def test_run_in_two_parts_is_one_run(tiny: Model) -> None:
    parts = parts_of(tiny, "5", optimizer=default_optimizer(4, drift=1e-3))
    weights, (state, target) = parts.features.weights, parts.start([1, 4])
    whole, _ = run(parts.step, weights, state, target, steps=4)
    half, _ = run(parts.step, weights, state, target, steps=2)
    rest, _ = run(parts.step, weights, half, target, steps=2)
    assert same(rest, whole)


@pytest.mark.parametrize("steps", [0, -3])
def test_run_needs_a_step(tiny: Model, steps: int) -> None:
    parts = parts_of(tiny, "5")
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        run(parts.step, parts.features.weights, *parts.start([0]), steps=steps)


def test_a_callbacks_error_is_the_callers(tiny: Model) -> None:
    parts = parts_of(tiny, "5")

    def stop(info: fv.Info) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(parts.step, parts.features.weights, *parts.start([0]), steps=5, callback=stop)


def test_a_step_writes_to_nothing(tiny: Model) -> None:
    parts = parts_of(tiny, "5", optimizer=default_optimizer(4, drift=1e-6))
    state, target = parts.start([0, 1])
    kept = tree_map(torch.clone, (parts.features.weights, state, target))
    first, _ = parts.step(parts.features.weights, state, target)
    assert same((parts.features.weights, state, target), kept)
    again, _ = parts.step(parts.features.weights, state, target)
    assert same(first, again)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_by_name(tiny: Model, name: str) -> None:
    result = render(tiny, "5", [0, 1], steps=4, optimizer=name, views="none")
    is_consistent(result, 4)
    assert result.config["optimizer"] == name
    presets = {"default": default_optimizer(4), "published": published_optimizer()}
    own = presets[name] if name in presets else plain_optimizer(name)
    assert torch.equal(render(tiny, "5", [0, 1], steps=4, optimizer=own, views="none").images, result.images)
    other = render(tiny, "5", [0, 1], steps=4, optimizer=name, lr=0.01, views="none")
    assert not torch.equal(other.images, result.images)
    assert other.config["lr"] == 0.01


def test_progress_goes_to_the_standard_error(tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    render(tiny, "5", [0], steps=1)
    assert capsys.readouterr() == ("", "")
    render(tiny, "5", [0, 1, 2], steps=2, batch_size=2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "0/6" in err


@pytest.mark.parametrize(
    ("text", "filters"), [("5:3", [3]), ("5:1-2,0", [1, 2, 0]), ("5:*", list(range(6))), ("5", list(range(6)))]
)
def test_a_layer_with_its_filters(tiny: Model, text: str, filters: list[int]) -> None:
    assert list(render(tiny, text, steps=1).filters) == filters


@pytest.mark.parametrize(
    ("text", "filters", "says"),
    [("5:3", [1], "given twice"), ("5:", None, "numbers and ranges"), ("5:9", None, "filters 0 to 5, got 9")],
)
def test_a_layer_with_filters_that_are_none(tiny: Model, text: str, filters: list[int] | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        render(tiny, text, filters, steps=1)


# --- compiled -------------------------------------------------------------------------------------------------------


# Inductor says so wherever a Fourier transform is in a graph.
complex_numbers = pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")


@complex_numbers
def test_a_compiled_step_equals_the_eager_one_and_compiles_once(tiny: Model) -> None:
    parts = parts_of(tiny, "5")
    compiled = compile_step(parts.step)
    weights = parts.features.weights
    with torch._dynamo.config.patch(error_on_recompile=True):
        for filters, seed in (([0, 1], 0), ([5, 2], 0), ([3, 3], 9)):
            state, target = parts.start(filters, seed)
            expected, infos = run(parts.step, weights, state, target, steps=2)
            found, reports = run(compiled, weights, state, target, steps=2)
            torch.testing.assert_close(reports.score, infos.score, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(found.best.image, expected.best.image, rtol=1e-3, atol=2e-3)
            assert torch.equal(found.step, expected.step)


@complex_numbers
def test_a_step_inside_a_compiled_function_of_ones_own(tiny: Model) -> None:
    parts = parts_of(tiny, "5")

    def two_steps(weights: dict[str, Tensor], state: State, target: Tensor) -> tuple[State, Tensor]:
        state, first = parts.step(weights, state, target)
        state, second = parts.step(weights, state, target)
        return state, second.score - first.score

    mine = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for filters in ([0, 1], [4, 2]):
            state, target = parts.start(filters)
            expected, gain = two_steps(parts.features.weights, state, target)
            found, own = mine(parts.features.weights, state, target)
            torch.testing.assert_close(own, gain, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(found.best.image, expected.best.image, rtol=1e-3, atol=2e-3)


def test_what_runs_through_a_hook_is_not_compiled() -> None:
    class Branches(OneConv):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x if x.sum() > 0 else -x)

    model = load_model(Branches(), size=8)
    with pytest.warns(UserWarning, match="runs through a hook"):
        is_consistent(render(model, "conv", steps=2), 2)
    with (
        pytest.warns(UserWarning, match="runs through a hook"),
        pytest.raises(ValueError, match=r"Branches cannot be exported, and so not compiled; use compile=False"),
    ):
        render(model, "conv", steps=1, compile=True)


# --- the user's module, and the process -----------------------------------------------------------------------------


def test_the_module_is_left_as_it_was() -> None:
    module = make_tiny().train()
    module[1].eval()
    module[3].requires_grad_(False)
    runs: list[int] = []
    module[5].register_forward_hook(lambda *_: runs.append(1))
    module[0].register_forward_pre_hook(lambda *_: runs.append(2))

    def state() -> tuple[Any, ...]:
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return (
            [child.training for child in module.modules()],
            [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in module.modules()],
            {n: (id(t), t._version, t.requires_grad, t.dtype, t.device, t.grad) for n, t in tensors.items()},
            {n: t.tolist() for n, t in module.state_dict().items()},
        )

    before = state()
    expected = render(load_model(make_tiny(), size=TINY_SIZE), "5", steps=2)
    result = render(load_model(module, size=TINY_SIZE), "5", steps=2)
    assert state() == before
    assert runs == []
    assert torch.equal(result.images, expected.images)


def test_many_renders_leave_nothing_behind(tiny: Model) -> None:
    def live() -> int:
        gc.collect()
        # Not the fake tensors of torch.export's own caches, which hold no memory; not isinstance, which asks some lazy
        # modules of torch for their class.
        return sum(type(o) in (Tensor, nn.Parameter, nn.Buffer) for o in gc.get_objects())

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.module.modules())

    for _ in range(2):
        render(tiny, "5", [0, 1], steps=1)
    before = live()
    for _ in range(20):
        render(tiny, "5", [0, 1], steps=1)
    assert live() <= before + 5
    assert hooks() == 0


# --- real networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "size"),
    [
        ("googlenet", "4c.branch4.1.conv", 96),
        ("resnet18", "layer3.1.conv2", 96),
        ("vit_b_16", "encoder_layer_0.mlp.3", 224),
    ],
)
def test_known_architectures(name: str, layer: str, size: int) -> None:
    model = load_model(f"torchvision:{name}@none", size=size)
    result = render(model, layer, [1, 3], steps=2)
    is_consistent(result, 2)
    assert result.status == ("ok", "ok")
    assert result.config["layer"].endswith(layer)
    assert result.images.shape == (2, 3, size, size)


def test_squeezenet_filters_rise(squeezenet: Model) -> None:
    filters = [0, 3, 5, 7]
    result = render(squeezenet, SQUEEZENET_LAYER, filters, steps=16)
    is_consistent(result, 16)
    assert result.status == ("ok",) * 4
    noise = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (squeezenet.mean, squeezenet.std))
    features = make_features(squeezenet, [SQUEEZENET_LAYER])

    def scores(images: Tensor) -> Tensor:
        maps = features.apply(features.weights, (images - mean) / std)[SQUEEZENET_LAYER]
        return maps[torch.arange(4), torch.tensor(filters)].mean((1, 2))

    start, spread = result.history[0], result.history.std(0)
    assert (result.scores > start + 2 * spread).all()
    own = scores(result.images)
    assert (own > scores(noise) + spread).all()
    # Each image is its own filter's: no other of the four is raised as much by it.
    maps = features.apply(features.weights, (result.images - mean) / std)[SQUEEZENET_LAYER][:, filters].mean((2, 3))
    gain = maps - scores(noise)
    assert (gain.argmax(0) == torch.arange(4)).all()


@pytest.mark.parametrize(
    "rule", [default_optimizer(4), published_optimizer(), *map(plain_optimizer, OPTIMIZERS[2:])], ids=OPTIMIZERS
)
def test_what_wakes_is_keyed_and_moves_what_has_no_gradient(rule: Optimizer) -> None:
    params = torch.zeros(50)
    update, again, other = (rule.update(params, rule.init(params, random.key(k)), params)[0] for k in (1, 1, 2))
    assert update.abs().max() > 0
    assert update.isfinite().all()
    assert torch.equal(update, again)
    assert not torch.equal(update, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_module_of_another_precision(dtype: torch.dtype) -> None:
    result = render(load_model(make_tiny().to(dtype), size=TINY_SIZE), "3", [0, 1], steps=2)
    assert result.status == ("ok", "ok")
    assert result.images.dtype == torch.float32


@pytest.mark.parametrize(
    "filters", [torch.tensor(1), torch.tensor([1]), range(1, 2), iter([1])], ids=lambda filters: type(filters).__name__
)
def test_filters_of_many_kinds(tiny: Model, filters: Any) -> None:
    assert render(tiny, "3", filters, steps=1).filters == (1,)


@pytest.mark.parametrize("filters", ["1", 1.5, [0.5]], ids=repr)
def test_filters_that_are_no_numbers(tiny: Model, filters: Any) -> None:
    with pytest.raises(ValueError, match="filters must be whole numbers"):
        render(tiny, "3", filters, steps=1)


def test_features_are_used_again(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    features = make_features(tiny, ["3"])
    fresh = render(tiny, "3", [1], steps=2)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr("featvis_func.rendering.renderer.make_features", fail)
    assert torch.equal(render(tiny, "3", [1], steps=2, features=features).images, fresh.images)
    with pytest.raises(ValueError, match="the features lack layer '0'"):
        render(tiny, "0", [1], steps=2, features=features)


def test_an_image_of_other_channels_is_refused(tiny: Model) -> None:
    with pytest.raises(ValueError, match="the image has 1 channels; Sequential takes 3"):
        render(tiny, "3", [1], steps=1, image=fv.fourier(8, channels=1))


def test_filters_behind_a_silent_rectifier_wake() -> None:
    """A deep ReLU that is off everywhere on the grey start leaves no gradient; the drift finds its way out."""
    first = nn.Conv2d(1, 2, 5)
    module = nn.Sequential(first, nn.ReLU(), nn.Conv2d(2, 1, 5))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.1)
        first.weight[:, :, ::2] = -0.1  # on grey: 0.5 * (10 - 15) * 0.1 = -0.25
        first.get_parameter("bias").fill_(0.2)  # 0.05 short of the threshold
    model = load_model(module, size=24)
    asleep = render(model, "2", steps=16, optimizer=default_optimizer(16, drift=0.0))
    assert asleep.status == ("dead",)
    awake = render(model, "2", steps=16)
    assert awake.status == ("ok",)
    assert awake.scores[0] > asleep.scores[0] + 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.0}, "steps must be a whole number, got 2.0"),
        ({"batch_size": "2"}, "batch_size must be a whole number, got '2'"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"lr": float("nan")}, "the learning rate must be finite and above 0, got nan"),
        ({"views": None}, "views must be one of default, published, lucid, maco, none or a Transform, got None"),
        ({"filters": [1, 1]}, "filter 1 is asked for more than once"),
        ({"views": fv.views("none", image=(20, 20), size=(8, 8))}, "the views must be (3, 20, 20)"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_is_not_understood(tiny: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        render(tiny, "3", **{"filters": [1], **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": "sideways"}, "unknown views"),
        ({"image": "oil"}, "unknown image"),
        ({"optimizer": "downhill"}, "unknown optimizer"),
        ({"lr": -1.0}, "the learning rate must be"),
        ({"compile": "fast"}, "compile must be one of"),
        ({"precision": "half"}, "precision must be one of"),
        ({"tolerance": float("nan")}, "the tolerance must be"),
        ({"redirect": -1}, "redirect must be at least 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"size": 0}, "image size must be"),
        ({"filters": []}, "no filters"),
        ({"filters": ["1"]}, "filters must be whole numbers"),
        ({"filters": [1, 1]}, "filter 1 is asked for more than once"),
    ],
    ids=str,
)
def test_what_is_wrong_for_any_model_is_refused_before_it_is_traced(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr("featvis_func.backbone.features.private_copy", fail)
    with pytest.raises(ValueError, match=message):
        render(tiny, "3", **{"filters": [1], **options})


def test_numbers_of_numpy_are_numbers(tiny: Model, tmp_path: Path) -> None:
    numbers: dict[str, Any] = {"steps": np.int64(1), "lr": np.float32(0.1), "seed": np.int64(3)}
    result = render(tiny, "3", np.array([1]), **numbers, batch_size=np.int64(2), tolerance=np.float32(0.5))  # type: ignore[arg-type]
    assert len(result.save(tmp_path)) == 4


def test_the_precision_that_was_is_recorded(tiny: Model) -> None:
    features = make_features(tiny, ["5"], precision="bfloat16")
    result = render(tiny, "5", [0], steps=1, features=features, precision="float32")
    assert result.config["precision"] == "bfloat16"
    assert render(tiny, "5", [0], steps=1).config["precision"] == "float32"
