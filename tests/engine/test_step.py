"""The parts of an :class:`~featvis_func.Ascent` fit together; earlier names lead to the present ones."""

from typing import Any

import pytest
import torch
from torch.func import vmap

import featvis_func as fv
from featvis_func import objective as objectives
from featvis_func.backbone.features import Features
from featvis_func.transform import chain, jitter, multiview, normalize, uniform_noise, warp
from featvis_func.tree import tree_leaves, tree_structure
from featvis_func.types import Image, Info, Optimizer, State, Transform
from tests.toys import load_toy, make_tiny

SIZE = (12, 12)
FILTERS = [0, 3, 5]


@pytest.fixture(scope="module")
def features() -> Features:
    """Layers of the small CNN, shared by all tests of this module because they are not changed."""
    return fv.make_features(load_toy(make_tiny(), size=SIZE), ["3", "5"], precision="float32")


def make_ascent(
    features: Features,
    *,
    image: Image | None = None,
    transform: Transform | None = None,
    objective: fv.Objective | None = None,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> fv.Ascent:
    return fv.make_ascent(
        features,
        image or fv.pixel(SIZE),
        transform or warp(jitter(1), size=SIZE),
        objective or fv.channel("5"),
        optimizer or fv.default_optimizer(4),
        **options,
    )


COUPLED = fv.channel("5") - objectives.diversity("3") - 0.1 * objectives.departure("3", torch.full((3, *SIZE), 0.3))
ASCENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "fourier": {"image": fv.fourier(SIZE)},
    "phase": {"image": fv.phase(SIZE)},
    "cppn": {"image": fv.cppn(SIZE, hidden=4, layers=1)},
    "shared parameters": {
        "image": fv.shared(fv.image.fourier_canvas(SIZE), fv.image.pyramid_canvas(SIZE, levels=2, first=1))
    },
    "redirected gradients": {"redirect": 2},
    "saliency": {"saliency": True},
    "several copies": {"transform": chain(multiview(warp(jitter(1), size=SIZE), 2), uniform_noise(0.1))},
    "transform without random numbers": {"transform": normalize((0.5,) * 3, (0.25,) * 3)},
    "batch score and picture": {"objective": COUPLED, "saliency": True},
    "map without rows and columns": {"objective": fv.neuron("5", 1) + objectives.total_variation()},
    "optimizer with noise": {"optimizer": fv.published_optimizer()},
    "optimizer without state": {
        "optimizer": Optimizer(lambda params, key: (), lambda grads, state, params: (grads, state))
    },
}


def layouts(state: State) -> list[tuple[torch.Size, torch.dtype, tuple[int, ...], torch.device]]:
    return [(leaf.shape, leaf.dtype, leaf.stride(), leaf.device) for leaf in tree_leaves(state)]


@pytest.mark.parametrize("options", ASCENTS.values(), ids=ASCENTS)
def test_step_keeps_the_structure_of_the_state_that_init_makes(features: Features, options: dict[str, Any]) -> None:
    """Same tree, shapes, dtypes and strides: a compiled step is compiled once, and states can be mixed row by row."""
    ascent = make_ascent(features, **options)
    state, target = ascent.init(fv.filter_keys(0, "5", FILTERS)), torch.tensor(FILTERS)
    structure, layout = tree_structure(state), layouts(state)
    assert all(shape[0] == len(FILTERS) for shape, *_ in layout)
    for number in range(2):
        state, info = ascent.step(features.weights, state, target)
        assert tree_structure(state) == structure
        assert layouts(state) == layout
        assert state.step.tolist() == [number + 1] * len(FILTERS)
        assert isinstance(info, Info)
        assert [(column.shape, column.dtype) for column in info] == [
            ((len(FILTERS),), torch.float32),
            ((len(FILTERS),), torch.float32),
            ((len(FILTERS),), torch.bool),
            ((len(FILTERS),), torch.bool),
        ]


def test_init_decodes_the_image_of_each_key_and_has_no_best_step(features: Features) -> None:
    image = fv.fourier(SIZE)
    keys = fv.filter_keys(0, "5", FILTERS)
    state = make_ascent(features, image=image, saliency=True).init(keys)
    assert torch.equal(state.key, keys)
    torch.testing.assert_close(state.best.image, vmap(image.decode)(state.params))
    assert state.best.score.tolist() == [-torch.inf] * 3
    assert state.best.step.tolist() == [-1] * 3
    assert not state.best.activation.any()
    assert not state.saliency.any()
    alone = make_ascent(features, image=image).init(fv.filter_keys(0, "5", FILTERS[1:2]))
    torch.testing.assert_close(alone.params[0], state.params[1])
    assert alone.saliency == ()


def test_make_ascent_refuses_features_without_a_layer_of_the_objective(features: Features) -> None:
    with pytest.raises(ValueError, match=r"the features lack layer '0' of the objective; they have \['3', '5'\]"):
        make_ascent(features, objective=fv.channel("0"))


def test_make_ascent_refuses_redirect_if_the_features_cannot_redirect(features: Features) -> None:
    with pytest.raises(ValueError, match="redirect=2: the model runs with a forward hook"):
        make_ascent(features._replace(redirected=None), redirect=2)


@pytest.mark.parametrize(("name", "replacement"), [("make_step", "step"), ("init_state", "init")])
def test_removed_functions_raise_an_error_that_names_make_ascent(name: str, replacement: str) -> None:
    with pytest.raises(AttributeError, match=rf"{name} was replaced by featvis_func.make_ascent\(...\).{replacement}$"):
        getattr(fv, name)


@pytest.mark.parametrize(
    ("name", "renamed"), [("Outcome", "RunResult"), ("run_all", "run_batched"), ("views", "named_transform")]
)
def test_renamed_objects_are_returned_with_a_deprecation_warning(name: str, renamed: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"featvis_func.{name} is now called {renamed}"):
        value = getattr(fv, name)
    assert value is getattr(fv, renamed)
    with pytest.warns(DeprecationWarning, match=renamed):  # also the second time
        getattr(fv, name)


def test_target_tensor_selects_the_filter(features: Features) -> None:
    ascent = make_ascent(features)
    state = ascent.init(fv.filter_keys(0, "5", [0, 0]))
    _, info = ascent.step(features.weights, state, torch.tensor([3, 5]))
    _, same = ascent.step(features.weights, state, torch.tensor([3, 3]))
    torch.testing.assert_close(info.score[0], same.score[0])
    assert info.score[1] != same.score[1]


def averaging(features: Features, objective: fv.Objective | None = None) -> fv.Ascent:
    image = fv.fourier(SIZE)
    optimizer = fv.default_optimizer(4, groups=image.groups)
    return make_ascent(features, image=image, transform=warp(size=SIZE), objective=objective, optimizer=optimizer)


def test_finish_shows_the_average_of_the_run_with_its_own_score_and_map(features: Features) -> None:
    ascent, image = averaging(features), fv.fourier(SIZE)
    state, target = ascent.init(fv.filter_keys(0, "5", FILTERS)), torch.tensor(FILTERS)
    iterates = []
    for _ in range(4):
        state, _ = ascent.step(features.weights, state, target)
        iterates.append(state.params)
    assert ascent.finish is not None
    done = ascent.finish(features.weights, state, target)
    weights = torch.tensor([t * (t + 1) * (t + 2) for t in range(1, 5)]) / 210.0  # of average_iterates(3.0)
    mean = torch.einsum("t,t...->...", weights, torch.stack(iterates))
    torch.testing.assert_close(done.best.image, vmap(image.decode)(mean), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ascent.decode(state), done.best.image)
    maps = features.apply(features.weights, done.best.image)["5"][torch.arange(3), target]
    torch.testing.assert_close(done.best.activation, maps)
    torch.testing.assert_close(done.best.score, maps.mean((1, 2)))
    assert done.best.step.tolist() == [4] * 3
    assert torch.equal(done.params, state.params)


def test_finish_keeps_what_never_was_finite(features: Features) -> None:
    channel = fv.channel("5")
    broken = fv.Objective(
        lambda a, t: torch.where(t == 3, torch.nan, channel.score(a, t)), channel.activation_map, ("5",), ("5",), "own"
    )
    ascent = averaging(features, broken)
    start, target = ascent.init(fv.filter_keys(0, "5", FILTERS)), torch.tensor(FILTERS)
    state, _ = ascent.step(features.weights, start, target)
    assert ascent.finish is not None
    best = ascent.finish(features.weights, state, target).best
    assert best.step.tolist() == [1, -1, 1]
    assert best.score[1] == -torch.inf
    assert not best.activation[1].any()
    torch.testing.assert_close(best.image[1], vmap(fv.fourier(SIZE).decode)(start.params)[1])


def test_steps_leave_alone_what_finish_replaces(features: Features) -> None:
    ascent = averaging(features)
    state, target = ascent.init(fv.filter_keys(0, "5", FILTERS)), torch.tensor(FILTERS)
    after, _ = ascent.step(features.weights, state, target)
    assert after.best.image is state.best.image
    assert after.best.activation is state.best.activation
    assert bool(after.best.image.isnan().all())  # nobody takes it for a result
    assert ascent.finish is not None
    assert bool(ascent.finish(features.weights, after, target).best.image.isfinite().all())


def test_optimizers_without_an_average_have_nothing_to_finish(features: Features) -> None:
    ascent = make_ascent(features, optimizer=fv.published_optimizer())
    state = ascent.init(fv.filter_keys(0, "5", FILTERS))
    assert ascent.finish is None
    torch.testing.assert_close(ascent.decode(state), state.best.image)
