"""Rendering of filters by ``render``: its results, its options and its errors."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import featvis_func as fv
from featvis_func import objective as objectives
from featvis_func import random
from featvis_func.backbone.features import make_features
from featvis_func.engine.device import fit_batch_size
from featvis_func.engine.run import run
from featvis_func.engine.step import filter_keys
from featvis_func.models import Model, load_model
from featvis_func.objective import Objective
from featvis_func.rendering.api import render
from featvis_func.rendering.optimizers import (
    activation_optimizer,
    default_optimizer,
    plain_optimizer,
    published_optimizer,
)
from featvis_func.rendering.options import IMAGES, OPTIMIZERS, TRANSFORMS
from featvis_func.sweep.plan import plan_layers
from featvis_func.tree import tree_leaves
from featvis_func.types import Image, Optimizer, State, Transform
from tests.rendering.parts import Parts, equal_trees, parts_of
from tests.rendering.results import check_consistent, equal_results
from tests.toys import TINY_SIZE, load_toy

SQUEEZENET_LAYER = "features.9.expand3x3"
pytestmark = pytest.mark.usefixtures("cached_tracing")


# --- results --------------------------------------------------------------------------------------------------------


def test_render_of_the_embedded_model() -> None:
    result = render("texturenet", "block6.conv", [3, 17], steps=3)
    check_consistent(result, 3)
    assert result.images.shape == (2, 3, 96, 96)
    assert result.filters == (3, 17)
    assert {*result.status} <= {"ok", "flat"}  # so few steps are large, and the score need not rise
    assert result.config["model"] == "texturenet"
    assert result.config["layer"] == "block6.conv"


@pytest.mark.slow
def test_activations_are_the_filters_own_and_their_mean_is_the_score(tiny: Model) -> None:
    result = render(tiny, "5", steps=3)
    assert result.activations.shape == (6, 7, 7)
    torch.testing.assert_close(result.activations.mean((1, 2)), result.scores)


@pytest.mark.parametrize("optimizer", ["default", "activation"])
def test_image_has_the_score_without_random_transforms(tiny: Model, optimizer: str) -> None:
    result = render(tiny, "5", steps=4, transforms="none", optimizer=optimizer)
    check_consistent(result, 4)
    assert (result.best_step == 4).all() == (optimizer == "default")
    mean, std = (torch.tensor(values)[:, None, None] for values in (tiny.mean, tiny.std))
    with torch.no_grad():
        maps = tiny.module[:6]((result.images - mean) / std)  # type: ignore[index]
    scores = maps[torch.arange(6), torch.arange(6)].mean((1, 2))
    torch.testing.assert_close(scores, result.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 12])
def test_score_rises(tiny: Model, steps: int) -> None:
    result = render(tiny, "5", steps=steps, transforms="none")
    check_consistent(result, steps)
    assert (result.scores > result.history[0]).all() or steps == 1
    assert result.status == ("ok",) * 6


@pytest.mark.slow
def test_equal_calls_give_bit_equal_results(texturenet: Model) -> None:
    options: dict[str, Any] = {"steps": 3, "size": 24, "batch_size": 2}
    torch.manual_seed(1)
    first = render(texturenet, "block4.conv", [5, 1, 9], **options)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert equal_results(render(texturenet, "block4.conv", [5, 1, 9], **options), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = render(texturenet, "block4.conv", [5, 1, 9], seed=1, **options)
    assert not torch.equal(other.images, first.images)


# --- filters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (None, (0, 1, 2, 3, 4, 5)),
        (4, (4,)),
        (range(1, 4), (1, 2, 3)),
        ([5, 0], (5, 0)),
        ((i for i in (2, 3)), (2, 3)),
        (torch.tensor([1, 2]), (1, 2)),
        (torch.tensor(1), (1,)),
        (torch.tensor([1]), (1,)),
        (iter([1]), (1,)),
    ],
    ids=["all", "int", "range", "list", "generator", "tensor", "tensor without axes", "tensor of one", "iterator"],
)
def test_filters_are_rendered_in_the_given_order(
    tiny: Model, filters: Iterable[int] | int | None, expected: tuple[int]
) -> None:
    result = render(tiny, "5", filters, steps=1)
    assert result.filters == expected
    check_consistent(result, 1)


@pytest.mark.parametrize("filters", ["1", 1.5, [0.5]], ids=repr)
def test_filters_must_be_integers(tiny: Model, filters: Any) -> None:
    with pytest.raises(ValueError, match="filters must be whole numbers"):
        render(tiny, "3", filters, steps=1)


@pytest.mark.parametrize(
    ("text", "filters"), [("5:3", [3]), ("5:1-2,0", [1, 2, 0]), ("5:*", list(range(6))), ("5", list(range(6)))]
)
def test_layer_name_may_state_the_filters(tiny: Model, text: str, filters: list[int]) -> None:
    assert list(render(tiny, text, steps=1).filters) == filters


@pytest.mark.parametrize(
    ("text", "filters", "message"),
    [("5:3", [1], "given twice"), ("5:", None, "numbers and ranges"), ("5:9", None, "filters 0 to 5, got 9")],
)
def test_layer_name_with_invalid_filters_raises(
    tiny: Model, text: str, filters: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        render(tiny, text, filters, steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_padding_of_the_last_batch_does_not_change_the_results(tiny: Model, batch_size: int) -> None:
    expected = render(tiny, "5", steps=1, batch_size=6)
    result = render(tiny, "5", steps=1, batch_size=batch_size)
    check_consistent(result, 1)
    assert result.filters == tuple(range(6))
    assert result.config["batch_size_used"] == fit_batch_size(batch_size, 6, torch.device("cpu"))
    torch.testing.assert_close(result.history, expected.history, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threads", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 7, 8))])
def test_a_filter_alone_has_the_image_that_it_has_among_others(threads: int) -> None:
    model = load_toy(deep_network(), size=32)  # whole vectors: their remainders are rounded otherwise
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        every = render(model, "output", steps=3)
        alone = render(model, "output", 5, steps=3)
        few = render(model, "output", [2, 5, 9], steps=3)
        swept = plan_layers(model, "output", [5], unit_size=1)[0].batch_size
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone.images[0], every.images[5])
    assert torch.equal(few.images, every.images[[2, 5, 9]])
    assert alone.config["batch_size_used"] == swept == max(2, threads)


def deep_network() -> nn.Sequential:
    """Convolutions whose sums over channels torch divides among threads, and pools that hide the memory layout."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    for width in (32, 256, 256):
        layers += [nn.Conv2d(width, 256, 1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1, groups=256), nn.ReLU6()]
    return nn.Sequential(*layers, nn.Conv2d(256, 10, 1))


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["features.8.expand1x1", "classifier.1"])
def test_a_filter_of_a_real_network_alone_has_the_image_that_it_has_among_others(squeezenet: Model, layer: str) -> None:
    every = render(squeezenet, layer, [3, 40, 17, 5], steps=4)
    alone = render(squeezenet, layer, 17, steps=4)
    assert torch.equal(alone.images[0], every.images[2])


# --- images and transforms ------------------------------------------------------------------------------------------


SIZES = {7: (7, 7), (9, 30): (9, 30), (40, 13): (40, 13), 1: (1, 1)}


# Every size with one parameterisation, and every parameterisation at the two sizes that are the most unlike.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:images of .* are stretched")
@pytest.mark.parametrize(
    ("image", "size"),
    [*(("fourier", size) for size in SIZES), *((image, s) for image in IMAGES[1:] for s in ((9, 30), 1))],
    ids=str,
)
def test_image_of_any_size(tiny: Model, image: str, size: int | tuple[int, int]) -> None:
    result = render(tiny, "5", [0, 2], steps=2, size=size, image=image)
    check_consistent(result, 2)
    assert result.images.shape == (2, 4 if image == "alpha" else 3, *SIZES[size])
    assert result.config["size"] == list(SIZES[size])


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_image_with_any_number_of_channels(channels: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Tanh()).eval()
    result = render(load_toy(module, size=12), "0", steps=2)
    check_consistent(result, 2)
    assert result.images.shape == (4, channels, 12, 12)


@pytest.mark.slow
def test_image_with_another_number_of_channels_than_the_model_raises(tiny: Model) -> None:
    with pytest.raises(ValueError, match="the image has 1 channels; Sequential takes 3"):
        render(tiny, "3", [1], steps=1, image=fv.fourier(8, channels=1))


@pytest.mark.parametrize("transforms", TRANSFORMS)
def test_transforms_by_name(tiny: Model, transforms: str) -> None:
    result = render(tiny, "5", [1], steps=2, transforms=transforms, size=48)
    check_consistent(result, 2)
    assert result.config["transforms"] == transforms


def test_own_image_transform_and_optimizer(tiny: Model) -> None:
    grey = Image(
        lambda key: {"level": 0.1 * random.normal(key, (1, 4, 5))},
        lambda params: torch.sigmoid(params["level"]).expand(3, 4, 5),
    )
    resize = Transform(
        lambda key: (),
        lambda image, draw: torch.nn.functional.interpolate(image[None], (TINY_SIZE, TINY_SIZE))[0],
    )
    plain = Optimizer(lambda params, key: (), lambda grads, state, params: ({"level": 0.5 * grads["level"]}, state))
    result = render(tiny, "5", [0, 1], steps=3, image=grey, transforms=resize, optimizer=plain)
    check_consistent(result, 3)
    assert result.images.shape == (2, 3, 4, 5)
    assert torch.equal(result.images[:, 0], result.images[:, 2])
    assert (result.history[2] > result.history[0]).all()
    names = ("image", "transforms", "optimizer", "lr")
    assert [result.config[name] for name in names] == ["custom", "custom", "custom", None]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_by_name(tiny: Model, name: str) -> None:
    options: dict[str, Any] = {"steps": 4, "transforms": "none", "redirect": 0}
    result = render(tiny, "5", [0, 1], optimizer=name, **options)
    check_consistent(result, 4)
    assert result.config["optimizer"] == name
    groups = fv.fourier(tiny.size, channels=tiny.channels).groups
    presets = {
        "default": default_optimizer(4, groups=groups),
        "activation": activation_optimizer(4),
        "published": published_optimizer(),
    }
    optimizer = presets[name] if name in presets else plain_optimizer(name)
    assert torch.equal(render(tiny, "5", [0, 1], optimizer=optimizer, **options).images, result.images)
    other = render(tiny, "5", [0, 1], optimizer=name, lr=0.01, **options)
    assert not torch.equal(other.images, result.images)
    assert other.config["lr"] == 0.01


@pytest.mark.parametrize(
    "optimizer",
    [
        default_optimizer(4, groups=torch.arange(50) // 10),
        activation_optimizer(4),
        published_optimizer(),
        *map(plain_optimizer, OPTIMIZERS[3:]),
    ],
    ids=OPTIMIZERS,
)
def test_optimizers_move_parameters_without_a_gradient_by_their_key(optimizer: Optimizer) -> None:
    params = torch.zeros(50)
    update, again, other = (
        optimizer.update(params, optimizer.init(params, random.key(k)), params)[0] for k in (1, 1, 2)
    )
    assert update.abs().max() > 0
    assert update.isfinite().all()
    assert torch.equal(update, again)
    assert not torch.equal(update, other)


# --- objectives -----------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(tiny: Model, name: str) -> None:
    objective, count, shape = OBJECTIVES[name]
    result = render(tiny, objective, steps=2)
    check_consistent(result, 2)
    assert result.activations.shape == (count, *shape)
    assert result.config["objective"] == repr(objective)


def test_filters_are_variants_if_the_objective_names_its_channel(tiny: Model) -> None:
    result = render(tiny, objectives.channel("5", 2), [0, 900], steps=1)
    assert result.filters == (0, 900)
    assert not torch.equal(result.images[0], result.images[1])


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filters": [2, 6]}, r"layer '5' has filters 0 to 5, got 6"),
        ({"filters": 6}, r"layer '5' has filters 0 to 5, got 6"),
        ({"filters": [-1]}, r"layer '5' has filters 0 to 5, got -1"),
        ({"filters": []}, r"no filters were asked for: the list is empty"),
        ({"filters": range(0)}, r"the list is empty"),
        ({"filters": [1, 1]}, r"filter 1 is asked for more than once"),
        ({"steps": 0}, r"steps must be at least 1, got 0"),
        ({"steps": 2.0}, r"steps must be a whole number, got 2\.0"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"batch_size": "2"}, r"batch_size must be a whole number, got '2'"),
        ({"size": 0}, r"image size must be .*0"),
        ({"size": (4, -2)}, r"image size must be .*4.*-2"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"seed": None}, r"seed must be a whole number, got None"),
        (
            {"transforms": "sideways"},
            r"unknown transforms 'sideways'; expected one of default, small, published, lucid, maco, none",
        ),
        (
            {"transforms": None},
            r"transforms must be one of default, small, published, lucid, maco, none or a Transform, got None",
        ),
        (
            {"transforms": fv.named_transform("none", image=(20, 20), size=(8, 8))},
            r"the transformed images must be \(3, 20, 20\)",
        ),
        ({"image": "oil"}, r"unknown image 'oil'; expected one of fourier, pixel, phase, "),
        ({"lr": 0.0}, r"learning rate must be finite and above 0, got 0\.0"),
        ({"lr": float("nan")}, r"learning rate must be finite and above 0, got nan"),
        ({"lr": float("inf")}, r"learning rate must be finite and above 0, got inf"),
        ({"optimizer": "downhill"}, r"unknown optimizer 'downhill'; expected one of default, activation, published"),
        ({"optimizer": published_optimizer(), "lr": 0.1}, r"lr= goes with the name of an optimizer"),
        ({"objective": "55"}, r"no layer '55'"),
        ({"objective": objectives.channel("5", 6)}, r"no channel 6 in layer '5', which has 6"),
        ({"objective": objectives.neuron("5", position=(7, 0))}, r"no position \(7, 0\) in layer '5'"),
        ({"objective": objectives.channel("5", 1), "filters": [-3]}, r"must be in \[0, 2\*\*32\), got -3"),
        ({"objective": objectives.channel("3") + objectives.channel("5"), "filters": [7]}, r"'5' has filters 0 to 5"),
    ],
)
def test_bad_input_raises_one_line(tiny: Model, change: dict[str, Any], message: str) -> None:
    options = {"objective": "5", "filters": [0], "steps": 1, **change}
    with pytest.raises(ValueError, match=message) as caught:
        render(tiny, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transforms": "sideways"}, "unknown transforms"),
        ({"image": "oil"}, "unknown image"),
        ({"optimizer": "downhill"}, "unknown optimizer"),
        ({"lr": -1.0}, "learning rate must be"),
        ({"compile": "fast"}, "unknown compile 'fast'; expected one of"),
        ({"precision": "half"}, "unknown precision 'half'; expected one of"),
        ({"tolerance": float("nan")}, "tolerance must be"),
        ({"redirect": -1}, "redirect must be at least 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"size": 0}, "image size must be"),
        ({"snapshots": 80}, "snapshots must be"),
        ({"filters": []}, "no filters"),
        ({"filters": ["1"]}, "filters must be whole numbers"),
        ({"filters": [1, 1]}, "filter 1 is asked for more than once"),
    ],
    ids=str,
)
def test_options_are_checked_before_the_model_is_traced(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr("featvis_func.rendering.resolve.make_features", fail)
    with pytest.raises(ValueError, match=message):
        render(tiny, "3", **{"filters": [1], **options})


def test_numpy_numbers_are_accepted(tiny: Model, tmp_path: Path) -> None:
    numbers: dict[str, Any] = {"steps": np.int64(1), "lr": np.float32(0.1), "seed": np.int64(3)}
    result = render(tiny, "3", np.array([1]), **numbers, batch_size=np.int64(2), tolerance=np.float32(0.5))  # type: ignore[arg-type]
    assert len(result.save(tmp_path)) == 4


# --- independence of the filters ------------------------------------------------------------------------------------


def batches(parts: Parts, filters: Sequence[int]) -> list[tuple[list[int], State, Tensor]]:
    """The same filter alone, among eight, and among three in another order."""
    groups = ([filters[1]], list(filters), [filters[6], filters[1], filters[0]])
    return [(group, *parts.start(group)) for group in groups]


@pytest.fixture(params=["tiny", "texturenet", pytest.param("squeezenet", marks=pytest.mark.slow)])
def parts_and_filters(request: pytest.FixtureRequest) -> tuple[Parts, list[int]]:
    model = request.getfixturevalue(request.param)
    if request.param == "tiny":
        return parts_of(model, "3"), [*range(8)]
    if request.param == "texturenet":
        return parts_of(model, "block4.conv", size=(64, 64)), [*range(8, 16)]
    return parts_of(model, SQUEEZENET_LAYER, size=(224, 224)), [*range(8)]


@pytest.mark.slow
def test_image_does_not_depend_on_the_other_filters_of_the_batch(parts_and_filters: tuple[Parts, list[int]]) -> None:
    parts, filters = parts_and_filters
    params, draws, decoded, scores = [], [], [], []
    for group, state, target in batches(parts, filters):
        i = group.index(filters[1])
        params.append(state.params[i])
        all_draws = [
            vmap(parts.transform.draw)(vmap(lambda k, s=step: random.fold_in(k, s, stream=2))(state.key))
            for step in range(3)
        ]
        draws.append([leaf[i] for leaf in tree_leaves(all_draws)])
        state, _ = run(parts.step, parts.features.weights, state, target, steps=1)
        decoded.append(parts.image.decode(state.params[i]))
        state, _ = run(parts.step, parts.features.weights, state, target, steps=5)
        scores.append(state.best.score[i].item())
    assert torch.equal(params[0], params[1])
    assert torch.equal(params[0], params[2])
    assert draws[0]
    assert equal_trees(draws[0], draws[1])
    assert equal_trees(draws[0], draws[2])
    for other in decoded[1:]:
        assert (other - decoded[0]).abs().max() <= 1e-5
    # Rounding errors grow from step to step: after 6 steps they are up to 2.4% on SqueezeNet.
    assert scores[1:] == pytest.approx([scores[0]] * 2, rel=0.04)


def test_keys_depend_on_seed_layer_and_filter_only() -> None:
    keys = filter_keys(0, "conv", range(6))
    assert torch.equal(filter_keys(0, "conv", [4, 1]), keys[[4, 1]])
    all_keys = torch.cat([keys, filter_keys(1, "conv", range(6)), filter_keys(0, "conv2", range(6))])
    assert len(all_keys.unique(dim=0)) == 18
    assert keys.dtype == torch.int64


# --- filters without a finite score or a gradient -------------------------------------------------------------------


@pytest.mark.slow
def test_dead_filter_is_reported_and_the_others_continue(tiny: Model) -> None:
    expected = render(tiny, "3", [0, 2], steps=3, transforms="none", optimizer=published_optimizer(noise=0.0))
    convolution = tiny.module.get_submodule("3")
    with torch.no_grad():
        for parameter in convolution.parameters():
            parameter[1] = 0
    result = render(tiny, "3", [0, 1, 2], steps=3, transforms="none", optimizer=published_optimizer(noise=0.0))
    assert result.status == ("ok", "dead", "ok")
    assert result.scores[1] == 0
    assert result.best_step[1] == 0
    torch.testing.assert_close(result.history[:, [0, 2]], expected.history, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_filter_without_finite_scores_is_reported_and_the_others_continue(tiny: Model, value: float) -> None:
    """Only the objective's score is not finite; the activations are."""
    expected = render(tiny, "3", [0, 2], steps=3, transforms="none", optimizer=published_optimizer(noise=0.0))
    channel = objectives.channel("3")
    broken = Objective(
        lambda a, t: torch.where(t == 1, value, channel.score(a, t)),
        channel.activation_map,
        channel.layers,
        channel.targeted,
        "broken",
    )
    result = render(tiny, broken, [0, 1, 2], steps=3, transforms="none", optimizer=published_optimizer(noise=0.0))
    assert result.status == ("ok", "nonfinite", "ok")
    assert result.scores[1] == -torch.inf
    assert result.best_step[1] == -1
    assert 0 <= result.images.min() <= result.images.max() <= 1
    torch.testing.assert_close(result.history[:, [0, 2]], expected.history, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.images[[0, 2]], expected.images, rtol=1e-3, atol=1e-3)


def test_steps_that_are_not_finite_are_skipped(tiny: Model) -> None:
    """A random transform makes some steps of each filter NaN."""
    resize = fv.named_transform("none", image=(18, 21), size=tiny.size)

    def apply(image: Tensor, number: Tensor) -> Tensor:
        return resize.apply(image, torch.eye(3)) * torch.where(number < 0.5, torch.nan, 1.0)

    broken = Transform(lambda key: random.uniform(key, (1,)), apply)
    result = render(tiny, "5", steps=10, size=(18, 21), transforms=broken, optimizer="activation")
    finite = result.history.isfinite()
    assert 0.2 < finite.double().mean() < 0.8
    assert result.status == ("nonfinite",) * 6
    assert torch.equal(result.scores, result.history.nan_to_num(-torch.inf).max(0).values)
    assert finite.gather(0, result.best_step[None]).all()
    for column, mask in zip(result.history.T, finite.T, strict=True):
        assert column[mask][-1] > column[mask][0]


@pytest.fixture
def blocked() -> Model:
    """A model whose ReLU is off everywhere for an image near grey."""
    convolution = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        convolution.weight.copy_(torch.eye(3)[:, :, None, None])
        assert convolution.bias is not None
        convolution.bias.fill_(-0.53)
    return load_model(nn.Sequential(convolution, nn.ReLU(inplace=True)), mean=(0, 0, 0), std=(1, 1, 1), size=24)


@pytest.mark.slow
def test_drift_revives_a_filter_behind_a_rectifier(blocked: Model) -> None:
    without = render(blocked, "1", steps=12, optimizer=published_optimizer(noise=0.0), transforms="none")
    assert without.status == ("dead",) * 3
    assert (without.history == 0).all()
    result = render(blocked, "1", steps=12, transforms="none", redirect=0)
    assert (result.history[0] == 0).all()
    assert result.status == ("ok",) * 3
    assert (result.scores > 0.01).all()


def test_filters_before_the_rectifier_are_not_dead(blocked: Model) -> None:
    result = render(blocked, "0", steps=2, transforms="none")
    assert result.status == ("ok",) * 3
    assert (result.history[1] > result.history[0]).all()


@pytest.mark.slow
def test_drift_revives_a_filter_behind_a_hidden_rectifier() -> None:
    """A ReLU between two convolutions that is off everywhere on the grey initial image passes no gradient."""
    first = nn.Conv2d(1, 2, 5)
    module = nn.Sequential(first, nn.ReLU(), nn.Conv2d(2, 1, 5))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.1)
        first.weight[:, :, ::2] = -0.1  # On grey: 0.5 * (10 - 15) * 0.1 = -0.25.
        first.get_parameter("bias").fill_(0.2)  # 0.05 below the threshold.
    model = load_toy(module, size=24)
    dead = render(model, "2", steps=16, transforms="small", optimizer=default_optimizer(16, drift=0.0))
    assert dead.status == ("dead",)
    revived = render(model, "2", steps=16, transforms="small")
    assert revived.status == ("ok",)
    assert revived.scores[0] > dead.scores[0] + 0.01


# --- features, precision, progress ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_given_features_are_not_traced_again(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    features = make_features(tiny, ["3"])
    expected = render(tiny, "3", [1], steps=2)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr("featvis_func.rendering.resolve.make_features", fail)
    assert torch.equal(render(tiny, "3", [1], steps=2, features=features).images, expected.images)
    with pytest.raises(ValueError, match="the features lack layer '0'"):
        render(tiny, "0", [1], steps=2, features=features)


@pytest.mark.slow
def test_precision_of_the_features_is_recorded(tiny: Model) -> None:
    features = make_features(tiny, ["5"], precision="bfloat16")
    result = render(tiny, "5", [0], steps=1, features=features, precision="float32")
    assert result.config["precision"] == "bfloat16"
    assert render(tiny, "5", [0], steps=1).config["precision"] == "float32"


def test_progress_bar_is_written_to_the_standard_error(tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    render(tiny, "5", [0], steps=1)
    assert capsys.readouterr() == ("", "")
    render(tiny, "5", [0, 1, 2], steps=2, batch_size=2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "0/6" in err
