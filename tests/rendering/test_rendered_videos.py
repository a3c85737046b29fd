"""Rendering of models of videos ``(c, t, h, w)`` and of signals ``(c, t)``."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featvis_func as fv
from featvis_func import objective as o
from featvis_func import transform as t
from featvis_func.color import IMAGENET_CORRELATION
from featvis_func.engine.step import filter_keys, make_ascent
from featvis_func.models import Model, load_model
from featvis_func.optimizer import adam
from featvis_func.rendering.options import IMAGES, TRANSFORMS
from featvis_func.rendering.presets import SIGNAL_TRANSFORMS
from featvis_func.types import Optimizer
from tests.rendering.results import check_consistent
from tests.toys import SIGNAL_SIZE, VIDEO_SIZE

pytestmark = [pytest.mark.usefixtures("cached_tracing", "one_thread")]
PLAIN = Optimizer(
    lambda params, key: (), lambda grads, state, params: (0.5 * grads / grads.norm().clamp_min(1e-9), state)
)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Model:
    return request.getfixturevalue(request.param)


by_kind = pytest.mark.parametrize("model", ["video_model", "signal_model"], indirect=True, ids=["video", "signal"])


# --- against plain gradient ascent ----------------------------------------------------------------------------------


def plain_scores(model: Model, start: Tensor, *, filter: int, steps: int) -> tuple[list[float], Tensor]:
    """Eager gradient ascent on a spectrum, by torch alone: the scores, and the image of the best one."""
    *others, last = model.size
    axes = [torch.fft.fftfreq(side) for side in others] + [torch.fft.rfftfreq(last)]
    frequency = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0).clamp_min(1 / max(model.size))
    amplitude = (frequency ** (-len(model.size) / 2) / 4)[..., None]
    colours = torch.tensor(IMAGENET_CORRELATION) if len(model.size) == 3 else torch.eye(model.channels)
    column = (-1, *(1,) * len(model.size))
    mean, std = (torch.tensor(values).reshape(column) for values in (model.mean, model.std))
    spectrum = start.clone().requires_grad_()
    scores, images = [], []
    for _ in range(steps):
        waves = torch.view_as_complex(spectrum * amplitude)
        pixels = torch.fft.irfftn(waves, s=model.size, dim=list(range(1, waves.ndim)), norm="ortho")
        image = torch.sigmoid(torch.tensordot(colours, pixels, dims=1))
        score = model.module[:3](((image - mean) / std)[None])[0, filter].mean()  # type: ignore[index]
        (gradient,) = torch.autograd.grad(score, spectrum)
        spectrum = (spectrum + 0.5 * gradient / gradient.norm()).detach().requires_grad_()
        scores.append(score.item())
        images.append(image.detach())
    return scores, images[scores.index(max(scores))]


@by_kind
def test_scores_equal_those_of_plain_gradient_ascent(model: Model) -> None:
    result = fv.render(model, "2", [0, 3], steps=6, transforms="none", optimizer=PLAIN, redirect=0)
    check_consistent(result, 6)
    assert result.status == ("ok", "ok")
    for row, number in enumerate((0, 3)):
        image = fv.fourier(model.size, channels=model.channels)
        features = fv.make_features(model, ["2"])
        transform = t.normalize(model.mean, model.std, sides=len(model.size))
        ascent = make_ascent(features, image, transform, o.channel("2"), adam(0.1))
        start = ascent.init(filter_keys(0, "2", [number])).params[0]
        scores, best = plain_scores(model, start, filter=number, steps=6)
        torch.testing.assert_close(result.history[:, row], torch.tensor(scores), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.images[row], best, rtol=0, atol=1e-4)


# --- parts that go by name ------------------------------------------------------------------------------------------


def check_shapes(result: fv.Result, model: Model, size: tuple[int, ...], *, channels: int) -> None:
    positions = (2, 7, 9) if len(size) == 3 else (30,)
    count = len(result.filters)
    assert result.images.shape == (count, channels, *size)
    assert result.activations.shape == (count, *positions)
    assert result.saliency is not None
    assert result.saliency.shape == (count, *size)
    assert (result.saliency > 0).any()
    assert result.snapshots is not None
    assert result.snapshots.shape == (count, 2, channels, *size)
    assert (result.config["size"], result.config["input_size"]) == ([*size], [*model.size])


@pytest.mark.parametrize(
    ("image", "transforms"), [*((image, "default") for image in IMAGES), *(("fourier", name) for name in TRANSFORMS)]
)
def test_parameterisations_and_transforms_of_videos(video_model: Model, image: str, transforms: str) -> None:
    size = (4, 12, 15)
    options: dict[str, Any] = {"steps": 2, "size": size, "saliency": True, "snapshots": 2}
    result = fv.render(video_model, "2", [0, 1], image=image, transforms=transforms, **options)
    check_consistent(result, 2)
    check_shapes(result, video_model, size, channels=4 if image == "alpha" else 3)


@pytest.mark.parametrize(
    ("image", "transforms"),
    [*((image, "default") for image in IMAGES if image != "alpha"), *(("fourier", name) for name in SIGNAL_TRANSFORMS)],
)
def test_parameterisations_and_transforms_of_signals(signal_model: Model, image: str, transforms: str) -> None:
    options: dict[str, Any] = {"steps": 2, "size": 50, "saliency": True, "snapshots": 2}
    result = fv.render(signal_model, "2", [0, 1], image=image, transforms=transforms, **options)
    check_consistent(result, 2)
    check_shapes(result, signal_model, (50,), channels=2)


@by_kind
def test_score_rises_and_is_the_mean_of_the_map(model: Model) -> None:
    result = fv.render(model, "2", steps=8, transforms="none")
    assert (result.scores > result.history[0]).all()
    torch.testing.assert_close(result.activations.flatten(1).mean(1), result.scores)
    assert fv.render(model, "5", [2], steps=2).activations.shape == (1,)


@by_kind
def test_filters_do_not_depend_on_the_others(model: Model) -> None:
    together = fv.render(model, "2", range(4), steps=4, batch_size=4)
    alone = fv.render(model, "2", [2], steps=4)
    torch.testing.assert_close(together.images[2:3], alone.images, rtol=0, atol=1e-3)
    assert torch.equal(fv.render(model, "2", [2], steps=4).images, alone.images)


@by_kind
@pytest.mark.slow
def test_compiled_step_equals_the_eager_one(model: Model) -> None:
    parts: dict[str, Any] = {"image": "pixel", "optimizer": "sgd", "steps": 2}
    eager, compiled = (fv.render(model, "2", [0, 1], compile=choice, **parts) for choice in (False, True))
    torch.testing.assert_close(compiled.history, eager.history, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled.images, eager.images, rtol=0, atol=2e-3)


# --- objectives, copies, starts -------------------------------------------------------------------------------------


@by_kind
def test_objectives_across_images_and_on_the_image(model: Model) -> None:
    objective = 4 * o.channel("2", 1) - o.diversity("2") + 0.1 * o.alignment("0") - 0.1 * o.total_variation() - o.blur()
    result = fv.render(model, objective - 0.1 * (o.boundary_complexity(2) + o.l2()), range(3), steps=8)
    assert result.status == ("ok",) * 3
    assert len({image.sum().item() for image in result.images}) == 3


@by_kind
def test_several_transformed_copies_are_averaged(model: Model) -> None:
    copies = (
        t.per_frame(t.warp(t.jitter(2), size=model.size[1:]))
        if len(model.size) == 3
        else t.warp_time(size=model.size[0], shift=3.0)
    )
    result = fv.render(model, "2", [0, 1], steps=3, transforms=t.multiview(copies, 3))
    check_consistent(result, 3)
    assert result.activations.shape[1:] == ((2, 7, 9) if len(model.size) == 3 else (30,))
    # Copies without random numbers are equal, and so is their mean.
    still, plain = (
        fv.render(model, "2", [0], steps=3, transforms=transform).scores
        for transform in (t.multiview(t.roll(0), 2) if len(model.size) == 3 else t.multiview(t.uniform_noise(0.0), 2),
                          "none")
    )  # fmt: skip
    torch.testing.assert_close(still, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@by_kind
def test_activations_of_a_video_or_signal_can_be_inverted(model: Model) -> None:
    picture = torch.rand(model.channels, *model.size, generator=torch.Generator().manual_seed(0))
    reference = fv.activations_of(model, ["2", "5"], picture)
    column = (-1, *(1,) * len(model.size))
    mean, std = (torch.tensor(values).reshape(column) for values in (model.mean, model.std))
    with torch.no_grad():
        expected = model.module(((picture - mean) / std)[None])[0]
    torch.testing.assert_close(reference["5"], expected, rtol=1e-4, atol=1e-5)
    start = fv.from_image(fv.fourier(model.size, channels=model.channels), picture)
    objective = o.inversion(reference) - o.departure("0", picture)
    result = fv.render(model, objective, steps=1, image=start, transforms="none", optimizer="activation")
    assert result.scores.item() > -1e-3
    larger = torch.rand(model.channels, *(2 * side for side in model.size))
    assert fv.activations_of(model, ["2"], larger)["2"].shape == reference["2"].shape


# --- status ---------------------------------------------------------------------------------------------------------


@by_kind
def test_status_of_filters_without_a_gradient_and_without_finite_values(model: Model) -> None:
    last = model.module[2]  # type: ignore[index]
    assert isinstance(last, nn.Conv1d | nn.Conv3d)
    assert last.bias is not None
    with torch.no_grad():
        last.bias[:] = torch.tensor([1.0, -1e3, torch.nan, 1.0])
    relu = load_model(nn.Sequential(*model.module[:3], nn.ReLU()), size=model.size, mean=model.mean, std=model.std)  # type: ignore[index]
    result = fv.render(relu, "3", steps=3, optimizer=PLAIN, redirect=0)
    assert result.status == ("ok", "dead", "nonfinite", "ok")
    assert result.scores[2] == -torch.inf
    assert (result.images[1] - result.images[1].mean()).abs().max() < 0.5


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (8,)}, "takes videos, whose size is N pixels, (h, w) or (t, h, w), got size=(8,)"),
        ({"size": (1, 2, 3, 4)}, "image size must be whole pixels"),
        ({"size": (0, 8, 8)}, "image size must be whole pixels"),
        ({"image": fv.fourier((16, 20))}, "the image is (3, 16, 20); Sequential takes videos (c, t, h, w)"),
        ({"image": fv.fourier(VIDEO_SIZE, channels=1)}, "the image has 1 channels; Sequential takes 3"),
        ({"transforms": t.warp_time(size=4, axis=-3)}, "the transformed images must be (3, 6, 16, 20)"),
        ({"objective": fv.neuron("2", position=(3, 4))}, "no position (3, 4) in layer '2', whose pos"),
    ],
)  # fmt: skip
def test_bad_input_for_a_video_model(video_model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fv.render(video_model, **{"objective": "2", "filters": [0], "steps": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (8, 8)}, "takes signals, whose size is N samples or (t,), got size=(8, 8)"),
        ({"image": "alpha"}, "alpha is for images and videos; a signal can be fourier, pixel, phase, "),
        ({"transforms": "lucid"}, "transforms='lucid' is for images and videos; signals have default, none"),
        ({"image": fv.fourier(8, channels=2)}, "the image is (2, 8, 8); Sequential takes signals (c, t) of (2, 64)"),
        ({"image": fv.fourier(SIGNAL_SIZE, channels=3)}, "the image has 3 channels; Sequential takes 2"),
        ({"objective": o.region("2")}, "layer '2' has no rows and columns: its positions are (30,)"),
    ],
)
def test_bad_input_for_a_signal_model(signal_model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fv.render(signal_model, **{"objective": "2", "filters": [0], "steps": 1, **options})


def test_image_models_take_no_other_sizes(tiny: Model) -> None:
    for size in ((4, 8, 8), (8,)):
        message = f"Sequential takes images, whose size is N pixels or (h, w), got size={size}"
        with pytest.raises(ValueError, match=re.escape(message)):
            fv.render(tiny, "5", [0], steps=1, size=size)
    with pytest.raises(ValueError, match=re.escape("the image is (3, 4, 20, 20); Sequential takes images (c, h, w)")):
        fv.render(tiny, "5", [0], steps=1, image=fv.fourier((4, 20, 20)))


@by_kind
def test_what_is_for_photographs_takes_models_of_images(model: Model) -> None:
    kind = "videos (c, t, h, w)" if len(model.size) == 3 else "signals (c, t)"
    with pytest.raises(ValueError, match=re.escape(f"accentuate is for photographs and models of images (c, h, w); "
                                                   f"Sequential takes {kind}")):  # fmt: skip
        fv.accentuate(model, "2:0", torch.rand(3, 16, 16), near="0")
    with pytest.raises(ValueError, match=re.escape(f"Sequential takes {kind}")):
        fv.top_examples(model, "2", "no such folder")
    with pytest.raises(ValueError, match=re.escape("expected an image (2, t) of floats" if len(model.size) == 1 else
                                                   "expected an image (3, t, h, w) of floats")):  # fmt: skip
        fv.activations_of(model, ["2"], torch.rand(1, 7))
