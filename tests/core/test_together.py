"""What several images, several views and a picture have to do with each other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import featvis_func as fv
from featvis_func import objective as o
from featvis_func.objective import PICTURE, Objective
from featvis_func.random import fold_in, split
from featvis_func.transform import chain, jitter, normalize, rotate, scale, warp
from featvis_func.tree import tree_map
from featvis_func.types import Image, Transform


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def toy(channels: int = 3, size: int = 12) -> fv.Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()
    return fv.load_model(module, size=size)


def plain_diversity(x: Tensor) -> Tensor:
    values = [row.flatten(1).T if row.ndim == 3 else row.reshape(-1, row.shape[-1]) for row in x]
    grams = [torch.stack([torch.outer(p, p) for p in v]).mean(0).flatten() for v in values]
    cosine = torch.nn.functional.cosine_similarity
    return torch.stack(
        [
            sum((cosine(a, b, dim=0) for j, b in enumerate(grams) if j != i), 0 * x.sum()) / max(1, len(grams) - 1)
            for i, a in enumerate(grams)
        ]
    )


def plain_alignment(x: Tensor, decay: float = 2.0) -> Tensor:
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
    ("goal", "formula", "shape"),
    [
        (o.diversity("a"), plain_diversity, (5, 4, 3, 2)),
        (o.diversity("a"), plain_diversity, (3, 6, 4)),
        (o.diversity("a"), plain_diversity, (3, 4)),
        (o.diversity("a"), plain_diversity, (1, 4, 3, 2)),
        (o.alignment("a"), plain_alignment, (7, 4, 3, 2)),
        (o.alignment("a", decay=3.0), lambda x: plain_alignment(x, 3.0), (6, 5, 4)),
        (o.alignment("a"), plain_alignment, (1, 4)),
        (
            2.0 * o.alignment("a") - 0.5 * o.diversity("a"),
            lambda x: 2 * plain_alignment(x) - 0.5 * plain_diversity(x),
            (3, 4),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Objective | tuple) else "formula",
)
def test_across_images_equals_the_formula(
    goal: Objective, formula: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    x = noise(*shape).requires_grad_()
    weights = noise(shape[0], seed=1)
    assert goal.batch_score is not None
    found, expected = goal.batch_score({"a": x}, torch.arange(shape[0])), formula(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    slopes = [torch.autograd.grad((weights * v).sum(), x, retain_graph=True)[0] for v in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-9)
    assert float(goal({"a": x[0]}, torch.tensor(0))) == 0.0


def test_the_gradient_is_finite_where_images_are_black() -> None:
    for goal in (o.diversity("a"), o.alignment("a")):
        x = torch.zeros(3, 4, 2, 2, requires_grad=True)
        assert goal.batch_score is not None
        (slope,) = torch.autograd.grad(goal.batch_score({"a": x}, torch.arange(3)).sum(), x)
        assert bool(slope.isfinite().all())


def test_interpolation_goes_from_one_to_the_other() -> None:
    goal = o.interpolate(o.channel("a", 0), o.neuron("b", 2, position=(0, 1)), count=5)
    assert repr(goal) == "interpolate(channel('a', 0), neuron('b', 2, position=(0, 1)), count=5)"
    assert goal.layers == ("a", "b")
    a, b = noise(4, 3, 3), noise(5, 2, 2, seed=1)
    for i in range(5):
        score = goal({"a": a, "b": b}, torch.tensor(i))
        torch.testing.assert_close(score, (1 - i / 4) * a[0].mean() + i / 4 * b[2, 0, 1])
    assert (goal - 0.1 * o.total_variation()).variants == 5
    model = toy()
    goal = o.interpolate(o.channel("0", 1), o.channel("2", 3), count=3)
    assert fv.render(model, goal, steps=2).filters == (0, 1, 2)
    with pytest.raises(ValueError, match="describes images 0 to 2, got 3"):
        fv.render(model, goal, [1, 3], steps=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: o.alignment("a", decay=0.5), "the decay must be finite and at least 1, got 0.5"),
        (lambda: o.interpolate(o.channel("a", 0), o.channel("a", 1), count=1), "at least 2 images, got 1"),
        (lambda: o.interpolate(o.channel("a"), o.channel("a", 1), count=2), r"channel\('a'\) does not name its own"),
        (
            lambda: o.interpolate(o.channel("a", 0), o.channel("a", 1) - o.diversity("a"), count=2),
            "or is about several images",
        ),
        (
            lambda: (
                o.interpolate(o.channel("a", 0), o.channel("a", 1), count=2)
                + o.interpolate(o.channel("a", 0), o.channel("a", 1), count=3)
            ),
            r"different numbers of images: \[2, 3\]",
        ),
        (lambda: o.departure("a", torch.rand(8, 8)), r"expected a picture \(c, h, w\) .*got \(8, 8\)"),
        (
            lambda: o.departure("a", torch.rand(3, 8, 8)) + o.departure("b", torch.rand(3, 8, 8)),
            "are about different pictures",
        ),
        (
            lambda: fv.render(toy(), o.channel("0", 1) - o.diversity("0"), range(4), steps=2, batch_size=2),
            "the 4 images of .* belong together.*batch_size=2",
        ),
        (
            lambda: fv.render(toy(), o.channel("0", 1) - o.diversity("0"), range(4), steps=2, tolerance=0.1),
            "the 4 images of .* belong together.*tolerance=0.1",
        ),
        (
            lambda: fv.render(toy(), o.channel("0", 1) - o.departure("0", torch.rand(3, 8, 8)), steps=2),
            r"the picture of .* is \(3, 8, 8\), the images \(3, 12, 12\)",
        ),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_diversity_makes_images_of_one_unit_differ() -> None:
    model = toy()
    unit = o.channel("2", 1)
    alike, apart = (fv.render(model, goal, range(12), steps=24) for goal in (unit, unit - 20 * o.diversity("0")))
    assert alike.images.shape == apart.images.shape == (12, 3, 12, 12)

    def likeness(result: fv.Result) -> float:
        features = fv.make_features(model, ["0"])
        seen = features.apply(features.weights, (result.images - 0.45) / 0.225)["0"]
        across = o.diversity("0").batch_score
        assert across is not None
        return float(across({"0": seen}, torch.arange(12)).mean())

    assert likeness(apart) < likeness(alike) - 0.02
    assert apart.config["batch_size"] == "auto"
    assert apart.config["slots"] == 12  # more than a CPU takes otherwise


def test_compiled_equals_eager_across_images_and_views() -> None:
    model, size = toy(), (12, 12)
    features = fv.make_features(model, ["0", "2"])
    goal = o.channel("2") - o.diversity("0") - 0.1 * o.departure("0", torch.full((3, *size), 0.3))
    view = several(warp(jitter(2), rotate(5), size=size), 3)
    image, rule = fv.fourier(size), fv.default_optimizer(4)
    step = fv.make_step(features, image, view, goal, rule, saliency=True)
    state = fv.init_state(features, image, goal, rule, fv.filter_keys(0, "2", [0, 3]), saliency=True)
    target = torch.tensor([0, 3])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        (plain, info), (quick, fast) = (fv.run(f, features.weights, state, target, steps=2) for f in (step, compiled))
    torch.testing.assert_close(fast.score, info.score, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quick.saliency, plain.saliency, rtol=1e-3, atol=1e-5)


def several(view: Transform, count: int) -> Transform:
    """Independent views, side by side."""
    return Transform(
        lambda k: tree_map(lambda *draws: torch.stack(draws), *(view.draw(own) for own in split(k, count))),
        lambda image, draws: vmap(view.apply, (None, 0))(image, draws),
    )


def test_the_score_of_several_views_is_their_mean() -> None:
    model, size = toy(), (12, 12)
    features = fv.make_features(model, ["2"])
    goal, image, rule = o.channel("2") - o.l2(), fv.fourier(size), fv.default_optimizer(4)
    one = chain(warp(jitter(2), scale(0.8, 1.2), size=size), normalize(model.mean, model.std))
    step = fv.make_step(features, image, several(one, 3), goal, rule)
    state = fv.init_state(features, image, goal, rule, fv.filter_keys(0, "2", [0, 3]))
    new, info = step(features.weights, state, torch.tensor([0, 3]))
    for row, number in enumerate((0, 3)):
        decoded = image.decode(state.params[row])
        draws = several(one, 3).draw(fold_in(state.key[row], state.step[row], stream=2))
        views = [one.apply(decoded, tree_map(lambda leaf, i=i: leaf[i], draws)) for i in range(3)]
        maps = features.apply(features.weights, torch.stack(views))["2"][:, number]
        expected = maps.mean() - ((decoded - 0.5) ** 2).mean().sqrt()
        torch.testing.assert_close(info.score[row], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new.best.activation[row], maps[0], rtol=1e-4, atol=1e-5)


def test_a_picture_is_seen_under_the_same_view() -> None:
    """An image that is the picture departs from it in nothing, however the view turns."""
    model, size = toy(), (12, 12)
    picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(3))
    image = Image(lambda k: torch.zeros_like(k[0], dtype=torch.float32), lambda p: picture.to(p.device) + p)
    goal = o.channel("2", 1) - 5 * o.departure("0", picture)
    features = fv.make_features(model, goal.layers)
    view, rule = warp(jitter(3), rotate(30), size=size), fv.default_optimizer(4)
    near, free = (fv.make_step(features, image, view, some, rule) for some in (goal, o.channel("2", 1)))
    state, target = fv.init_state(features, image, goal, rule, fv.filter_keys(0, "2", [0, 1])), torch.tensor([0, 1])
    scores = [step(features.weights, state, target)[1].score for step in (near, free)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)
    moved = state._replace(params=state.params + 0.2)
    scores = [step(features.weights, moved, target)[1].score for step in (near, free)]
    assert bool((scores[0] < scores[1] - 0.1).all())


def test_departure_equals_its_formula() -> None:
    x, r = noise(4, 3, 3).requires_grad_(), noise(4, 3, 3, seed=1)
    goal = o.departure("a", torch.rand(3, 8, 8))
    score = goal.score({"a": x, PICTURE + "a": r}, torch.tensor(0))
    torch.testing.assert_close(score, (x - r).norm() / r.norm())
    same = noise(4, 3, 3, seed=1).requires_grad_()
    (slope,) = torch.autograd.grad(goal.score({"a": same, PICTURE + "a": r}, torch.tensor(0)), same)
    assert bool(slope.isfinite().all())


def test_transparency_is_the_sum_of_the_gradients_at_the_pixels() -> None:
    model, size = toy(), (12, 12)
    result = fv.render(model, "2", [1, 4], steps=3, saliency=True, views="none")
    assert result.saliency is not None
    assert result.saliency.shape == (2, 12, 12)
    assert result.config["saliency"] is True
    plain = fv.render(model, "2", [1, 4], steps=3, views="none")
    assert torch.equal(plain.images, result.images)
    assert plain.saliency is None
    features, image = fv.make_features(model, ["2"]), fv.fourier(size)
    view, rule, goal = normalize(model.mean, model.std), fv.default_optimizer(3), o.channel("2")
    step = fv.make_step(features, image, view, goal, rule, saliency=True)
    state = fv.init_state(features, image, goal, rule, fv.filter_keys(0, "2", [1, 4]), saliency=True)
    total = torch.zeros(2, 12, 12)
    for _ in range(3):
        decoded = vmap(image.decode)(state.params).requires_grad_()
        seen = features.apply(features.weights, vmap(lambda x: view.apply(x, ()))(decoded))["2"]
        total += torch.autograd.grad(seen[0, 1].mean() + seen[1, 4].mean(), decoded)[0].abs().mean(1)
        state, _ = step(features.weights, state, torch.tensor([1, 4]))
    torch.testing.assert_close(state.saliency, total, rtol=1e-4, atol=1e-7)


def test_transparency_does_not_depend_on_the_batch() -> None:
    whole = fv.render(toy(), "2", range(5), steps=4, saliency=True, tolerance=0.0, batch_size=2).saliency
    some = fv.render(toy(), "2", [4], steps=4, saliency=True).saliency
    assert whole is not None
    assert some is not None
    torch.testing.assert_close(whole[4], some[0], rtol=1e-4, atol=1e-7)


def test_what_filters_share_stays_equal() -> None:
    """Parameters of two parts, of which one is common to all filters."""
    model, size = toy(), (12, 12)
    own = fv.fourier(size)

    def share_params(params: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return params[0], params[1].mean(0, keepdim=True).expand_as(params[1])

    image = Image(
        lambda k: (own.init(k), torch.zeros_like(own.init(k))),
        lambda p: own.decode(p[0] + p[1]),
        share_params=share_params,
    )
    goal, rule, view = o.channel("2"), fv.default_optimizer(4), warp(jitter(1), size=size)
    features = fv.make_features(model, ["2"])
    step = fv.make_step(features, image, view, goal, rule)
    state = fv.init_state(features, image, goal, rule, fv.filter_keys(0, "2", [0, 1, 2]))
    for _ in range(3):
        state, _ = step(features.weights, state, torch.arange(3))
    common = state.params[1]
    assert torch.equal(common[0], common[1])
    assert torch.equal(common[0], common[2])
    assert float(common.abs().max()) > 0
    assert not torch.equal(state.params[0][0], state.params[0][1])
    renderer = fv.make_renderer(model, goal, image=image, steps=2)
    assert renderer.together
    assert renderer.slots == 5
    assert renderer([0, 3]).config["slots"] == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_with_opacity_is_seen_over_backgrounds(channels: int) -> None:
    model = toy(channels)
    result = fv.render(model, o.channel("2") - 2.0 * o.opacity(), [1, 3], steps=24, image="alpha")
    assert result.images.shape == (2, channels + 1, 12, 12)
    kept = fv.render(model, o.channel("2") + 2.0 * o.opacity(), [1, 3], steps=24, image="alpha")
    assert bool((result.images[:, -1].mean((1, 2)) < kept.images[:, -1].mean((1, 2)) - 0.1).all())
    with pytest.raises(ValueError, match=r"the views must be \(\d, 12, 12\) .*, got \(\d, 12, 12\)"):
        fv.render(model, "2", [1], steps=1, image="alpha", views=warp(size=(12, 12)))
    with pytest.raises(ValueError, match="the image has 5 channels"):
        fv.render(model, "2", [1], steps=1, image=fv.fourier(12, channels=5))
