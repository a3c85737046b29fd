"""Objectives that couple the images of a run, several transformed copies per step, pictures, and shared parameters."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import featvis_func as fv
from featvis_func import objective as o
from featvis_func.objective import PICTURE, Objective
from featvis_func.random import fold_in
from featvis_func.transform import chain, jitter, multiview, normalize, rotate, scale, warp
from featvis_func.tree import tree_map
from featvis_func.types import Image
from tests.toys import load_toy

pytestmark = pytest.mark.usefixtures("cached_tracing")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def toy(channels: int = 3, size: int = 12) -> fv.Model:
    """Make a network of two convolutions, layers "0" of 6 and "2" of 5 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()
    return load_toy(module, size=size)


@functools.cache
def toy_features(*layers: str) -> fv.Features:
    return fv.make_features(toy(), layers)


def diversity_formula(x: Tensor) -> Tensor:
    positions = [row.flatten(1).T if row.ndim == 3 else row.reshape(-1, row.shape[-1]) for row in x]
    grams = [torch.stack([torch.outer(p, p) for p in rows]).mean(0).flatten() for rows in positions]
    cosine = torch.nn.functional.cosine_similarity
    return torch.stack(
        [
            sum((cosine(a, b, dim=0) for j, b in enumerate(grams) if j != i), 0 * x.sum()) / max(1, len(grams) - 1)
            for i, a in enumerate(grams)
        ]
    )


def alignment_formula(x: Tensor, decay: float = 2.0) -> Tensor:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum() / (a.square().sum() + b.square().sum())

    return torch.stack(
        [
            -sum(
                (decay ** -abs(i - j) * distance(a, b) / 2 for j, b in enumerate(x) if 0 < abs(i - j) <= 4),
                0 * x.sum(),
            )
            for i, a in enumerate(x)
        ]
    )


@pytest.mark.parametrize(
    ("objective", "formula", "shape"),
    [
        (o.diversity("a"), diversity_formula, (5, 4, 3, 2)),
        (o.diversity("a"), diversity_formula, (3, 6, 4)),
        (o.diversity("a"), diversity_formula, (3, 4)),
        (o.diversity("a"), diversity_formula, (1, 4, 3, 2)),
        (o.alignment("a"), alignment_formula, (7, 4, 3, 2)),
        (o.alignment("a", decay=3.0), lambda x: alignment_formula(x, 3.0), (6, 5, 4)),
        (o.alignment("a"), alignment_formula, (1, 4)),
        (
            2.0 * o.alignment("a") - 0.5 * o.diversity("a"),
            lambda x: 2 * alignment_formula(x) - 0.5 * diversity_formula(x),
            (3, 4),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Objective | tuple) else "formula",
)
def test_batch_score_and_its_gradient_equal_the_formula(
    objective: Objective, formula: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    x = noise(*shape).requires_grad_()
    weights = noise(shape[0], seed=1)
    assert objective.batch_score is not None
    scores, expected = objective.batch_score({"a": x}, torch.arange(shape[0])), formula(x)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-11)
    gradients = [torch.autograd.grad((weights * v).sum(), x, retain_graph=True)[0] for v in (scores, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)
    assert float(objective({"a": x[0]}, torch.tensor(0))) == 0.0


@pytest.mark.parametrize("objective", [o.diversity("a"), o.alignment("a")], ids=str)
def test_batch_score_has_a_finite_gradient_at_zero_activations(objective: Objective) -> None:
    x = torch.zeros(3, 4, 2, 2, requires_grad=True)
    assert objective.batch_score is not None
    (gradient,) = torch.autograd.grad(objective.batch_score({"a": x}, torch.arange(3)).sum(), x)
    assert bool(gradient.isfinite().all())


def test_interpolate_mixes_the_scores_linearly() -> None:
    objective = o.interpolate(o.channel("a", 0), o.neuron("b", 2, position=(0, 1)), count=5)
    assert repr(objective) == "interpolate(channel('a', 0), neuron('b', 2, position=(0, 1)), count=5)"
    assert objective.layers == ("a", "b")
    a, b = noise(4, 3, 3), noise(5, 2, 2, seed=1)
    for i in range(5):
        score = objective({"a": a, "b": b}, torch.tensor(i))
        torch.testing.assert_close(score, (1 - i / 4) * a[0].mean() + i / 4 * b[2, 0, 1])
    assert (objective - 0.1 * o.total_variation()).variants == 5


def test_interpolate_renders_as_many_images_as_it_describes() -> None:
    model = toy()
    objective = o.interpolate(o.channel("0", 1), o.channel("2", 3), count=3)
    assert fv.render(model, objective, steps=2).filters == (0, 1, 2)
    with pytest.raises(ValueError, match="describes images 0 to 2, got 3"):
        fv.render(model, objective, [1, 3], steps=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: o.alignment("a", decay=0.5), "alignment: decay must be finite and at least 1, got 0.5"),
        (
            lambda: o.interpolate(o.channel("a", 0), o.channel("a", 1), count=1),
            "interpolate: count must be at least 2, got 1",
        ),
        (
            lambda: o.interpolate(o.channel("a"), o.channel("a", 1), count=2),
            r"depend on neither the filter number nor other images, got channel\('a'\)$",
        ),
        (
            lambda: o.interpolate(o.channel("a", 0), o.channel("a", 1) - o.diversity("a"), count=2),
            r"got channel\('a', 1\) - diversity\('a'\)$",
        ),
        (
            lambda: (
                o.interpolate(o.channel("a", 0), o.channel("a", 1), count=2)
                + o.interpolate(o.channel("a", 0), o.channel("a", 1), count=3)
            ),
            r"different numbers of images: \[2, 3\]",
        ),
        (lambda: o.departure("a", torch.rand(8)), r"departure: picture must be \(c, h, w\), .*got \(8,\)"),
        (
            lambda: o.departure("a", torch.rand(3, 8, 8)) + o.departure("b", torch.rand(3, 8, 8)),
            "refer to different pictures",
        ),
        (
            lambda: fv.render(toy(), o.channel("0", 1) - o.diversity("0"), range(4), steps=2, batch_size=2),
            "the 4 images of .* depend on each other.*batch_size=2",
        ),
        (
            lambda: fv.render(toy(), o.channel("0", 1) - o.diversity("0"), range(4), steps=2, tolerance=0.1),
            "the 4 images of .* depend on each other.*tolerance=0.1",
        ),
        (
            lambda: fv.render(toy(), o.channel("0", 1) - o.departure("0", torch.rand(3, 8, 8)), steps=2),
            r"the picture of .* is \(3, 8, 8\), the images are \(3, 12, 12\)",
        ),
    ],
)
def test_invalid_arguments_raise_value_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_diversity_makes_images_of_one_unit_differ() -> None:
    model = toy()
    unit = o.channel("2", 1)
    plain, diverse = (
        fv.render(model, objective, range(12), steps=24) for objective in (unit, unit - 20 * o.diversity("0"))
    )
    assert plain.images.shape == diverse.images.shape == (12, 3, 12, 12)

    def similarity(result: fv.Result) -> float:
        features = toy_features("0")
        activations = features.apply(features.weights, (result.images - 0.45) / 0.225)
        batch_score = o.diversity("0").batch_score
        assert batch_score is not None
        return float(batch_score(activations, torch.arange(12)).mean())

    assert similarity(diverse) < similarity(plain) - 0.02
    assert diverse.config["batch_size"] == "auto"
    assert diverse.config["batch_size_used"] == 12  # a single batch, although the default on a CPU is 8


@pytest.mark.slow
def test_compiled_step_equals_the_eager_one_with_batch_score_picture_and_several_copies() -> None:
    size = (12, 12)
    features = toy_features("0", "2")
    objective = o.channel("2") - o.diversity("0") - 0.1 * o.departure("0", torch.full((3, *size), 0.3))
    transform = multiview(warp(jitter(2), rotate(5), size=size), 3)
    ascent = fv.make_ascent(features, fv.fourier(size), transform, objective, fv.default_optimizer(4), saliency=True)
    state, target = ascent.init(fv.filter_keys(0, "2", [0, 3])), torch.tensor([0, 3])
    compiled = torch.compile(ascent.step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        (eager_state, eager_info), (compiled_state, compiled_info) = (
            fv.run(step, features.weights, state, target, steps=2) for step in (ascent.step, compiled)
        )
    torch.testing.assert_close(compiled_info.score, eager_info.score, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled_state.saliency, eager_state.saliency, rtol=1e-3, atol=1e-5)


def test_score_of_several_transformed_copies_is_their_mean() -> None:
    model, size = toy(), (12, 12)
    features = toy_features("2")
    objective, image = o.channel("2") - o.l2(), fv.fourier(size)
    single = chain(warp(jitter(2), scale(0.8, 1.2), size=size), normalize(model.mean, model.std))
    several = multiview(single, 3)
    ascent = fv.make_ascent(features, image, several, objective, fv.default_optimizer(4))
    state = ascent.init(fv.filter_keys(0, "2", [0, 3]))
    new, info = ascent.step(features.weights, state, torch.tensor([0, 3]))
    for row, number in enumerate((0, 3)):
        decoded = image.decode(state.params[row])
        draws = several.draw(fold_in(state.key[row], state.step[row], stream=2))
        copies = [single.apply(decoded, tree_map(lambda leaf, i=i: leaf[i], draws)) for i in range(3)]
        maps = features.apply(features.weights, torch.stack(copies))["2"][:, number]
        expected = maps.mean() - ((decoded - 0.5) ** 2).mean().sqrt()
        torch.testing.assert_close(info.score[row], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new.best.activation[row], maps[0], rtol=1e-4, atol=1e-5)


def test_departure_is_zero_for_the_picture_itself_under_any_random_transform() -> None:
    size = (12, 12)
    picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(3))
    image = Image(lambda k: torch.zeros_like(k[0], dtype=torch.float32), lambda p: picture.to(p.device) + p)
    plain = o.channel("2", 1)
    penalised = plain - 5 * o.departure("0", picture)
    features = toy_features(*penalised.layers)
    ascents = [
        fv.make_ascent(features, image, warp(jitter(3), rotate(30), size=size), objective, fv.default_optimizer(4))
        for objective in (penalised, plain)
    ]
    state, target = ascents[0].init(fv.filter_keys(0, "2", [0, 1])), torch.tensor([0, 1])
    scores = [ascent.step(features.weights, state, target)[1].score for ascent in ascents]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)
    brighter = state._replace(params=state.params + 0.2)
    scores = [ascent.step(features.weights, brighter, target)[1].score for ascent in ascents]
    assert bool((scores[0] < scores[1] - 0.1).all())


def test_departure_equals_the_formula_and_has_a_finite_gradient_at_zero() -> None:
    x, r = noise(4, 3, 3).requires_grad_(), noise(4, 3, 3, seed=1)
    objective = o.departure("a", torch.rand(3, 8, 8))
    score = objective.score({"a": x, PICTURE + "a": r}, torch.tensor(0))
    torch.testing.assert_close(score, (x - r).norm() / r.norm())
    same = noise(4, 3, 3, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(objective.score({"a": same, PICTURE + "a": r}, torch.tensor(0)), same)
    assert bool(gradient.isfinite().all())


def test_saliency_option_adds_the_map_and_leaves_the_images_unchanged() -> None:
    result = fv.render(toy(), "2", [1, 4], steps=3, saliency=True, transforms="none")
    assert result.saliency is not None
    assert result.saliency.shape == (2, 12, 12)
    assert result.config["saliency"] is True
    plain = fv.render(toy(), "2", [1, 4], steps=3, transforms="none")
    assert torch.equal(plain.images, result.images)
    assert plain.saliency is None


def test_saliency_is_the_accumulated_gradient_magnitude_at_each_pixel() -> None:
    model, size = toy(), (12, 12)
    features, image = toy_features("2"), fv.fourier(size)
    transform = normalize(model.mean, model.std)
    ascent = fv.make_ascent(features, image, transform, o.channel("2"), fv.default_optimizer(3), saliency=True)
    state = ascent.init(fv.filter_keys(0, "2", [1, 4]))
    total = torch.zeros(2, 12, 12)
    for _ in range(3):
        decoded = vmap(image.decode)(state.params).requires_grad_()
        activations = features.apply(features.weights, vmap(lambda x: transform.apply(x, ()))(decoded))["2"]
        score = activations[0, 1].mean() + activations[1, 4].mean()
        total += torch.autograd.grad(score, decoded)[0].abs().mean(1)
        state, _ = ascent.step(features.weights, state, torch.tensor([1, 4]))
    torch.testing.assert_close(state.saliency, total, rtol=1e-4, atol=1e-7)


def test_saliency_does_not_depend_on_the_batch() -> None:
    batched = fv.render(toy(), "2", range(5), steps=4, saliency=True, tolerance=0.0, batch_size=2).saliency
    alone = fv.render(toy(), "2", [4], steps=4, saliency=True).saliency
    assert batched is not None
    assert alone is not None
    torch.testing.assert_close(batched[4], alone[0], rtol=1e-4, atol=1e-7)


def test_shared_parameters_stay_equal_for_all_filters() -> None:
    """The parameters have two parts: one for each filter, and one that all filters share."""
    model, size = toy(), (12, 12)
    fourier = fv.fourier(size)

    def share_params(params: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return params[0], params[1].mean(0, keepdim=True).expand_as(params[1])

    image = Image(
        lambda k: (fourier.init(k), torch.zeros_like(fourier.init(k))),
        lambda p: fourier.decode(p[0] + p[1]),
        share_params=share_params,
    )
    features, objective = toy_features("2"), o.channel("2")
    ascent = fv.make_ascent(features, image, warp(jitter(1), size=size), objective, fv.default_optimizer(4))
    state = ascent.init(fv.filter_keys(0, "2", [0, 1, 2]))
    for _ in range(3):
        state, _ = ascent.step(features.weights, state, torch.arange(3))
    own, shared = state.params
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[0], shared[2])
    assert float(shared.abs().max()) > 0
    assert not torch.equal(own[0], own[1])
    renderer = fv.make_renderer(model, objective, image=image, steps=2)
    assert renderer.single_batch
    assert renderer.batch_size == 5
    assert renderer([0, 3]).config["batch_size_used"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_opacity_penalty_makes_an_image_with_alpha_channel_more_transparent(channels: int) -> None:
    model = toy(channels)
    penalised, rewarded = (
        fv.render(model, o.channel("2") + weight * o.opacity(), [1, 3], steps=24, image="alpha")
        for weight in (-2.0, 2.0)
    )
    assert penalised.images.shape == (2, channels + 1, 12, 12)
    assert bool((penalised.images[:, -1].mean((1, 2)) < rewarded.images[:, -1].mean((1, 2)) - 0.1).all())


def test_transforms_and_images_with_another_number_of_channels_are_refused() -> None:
    model = toy()
    with pytest.raises(ValueError, match=r"the transformed images must be \(3, 12, 12\), .* got \(4, 12, 12\)"):
        fv.render(model, "2", [1], steps=1, image="alpha", transforms=warp(size=(12, 12)))
    with pytest.raises(ValueError, match="the image has 5 channels"):
        fv.render(model, "2", [1], steps=1, image=fv.fourier(12, channels=5))
