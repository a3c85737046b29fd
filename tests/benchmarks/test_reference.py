"""The eager baseline keeps the published script's quirks; the evaluator is its plain formula; what both come to."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torchvision.models import SqueezeNet1_0_Weights
from torchvision.transforms import v2

from benchmarks import quality
from benchmarks import reference as baseline
from benchmarks.evaluate import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VIEWS,
    evaluate,
    fixed_view,
    load_squeezenet,
)
from benchmarks.reference import make_reference_step, preset, random_view, reference
from featvis_func.models import Model
from tests.toys import OneConv


def tiny_cnn(*, inplace: bool = False) -> nn.Sequential:
    """A random CNN of 224 px images whose module "2" has 8 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 7, stride=8),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2),
            nn.ReLU(inplace=inplace),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    return model.eval()


def test_result_shapes_and_best_of() -> None:
    result = reference(tiny_cnn(), "2", [3, 5], steps=4, size=32)
    assert result.images.shape == (2, 3, 32, 32)
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert result.activations.shape == (2, 13, 13)
    assert result.history.shape == (4, 2)
    assert len(result.seconds_per_step) == 4
    torch.testing.assert_close(result.scores, result.history.max(dim=0).values)
    assert torch.equal(result.best_step, result.history.argmax(dim=0))
    torch.testing.assert_close(result.activations.mean(dim=(1, 2)), result.scores)


def test_objective_rises() -> None:
    history = reference(tiny_cnn(), "2", [1, 4], steps=12, size=32).history
    assert (history[-1] > history[0]).all()


def test_leaves_hooks_weights_and_global_random_state() -> None:
    model = tiny_cnn()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    reference(model, "2", [0], steps=2, size=32)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch_module._global_forward_hooks
    assert not any(part._forward_hooks for part in model.modules())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_removes_hook_when_the_model_fails() -> None:
    class Failing(OneConv):
        def forward(self, x: Tensor) -> Tensor:
            self.conv(x)
            raise RuntimeError("broken model")

    model = Failing().eval()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken model"):
        reference(model, "conv", [0], steps=1, size=32)
    assert not torch_module._global_forward_hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_same_seed_same_result_even_when_interleaved() -> None:
    model = tiny_cnn()
    alone = reference(model, "2", [2], steps=3, size=32, seed=5).history[:, 0].tolist()
    run, other = (make_reference_step(model, "2", [2], size=32, seed=seed) for seed in (5, 6))
    turns = [(run().values[0], torch.rand(1), other().values[0]) for _ in range(3)]
    assert [turn[0] for turn in turns] == pytest.approx(alone, rel=1e-6)
    assert [turn[2] for turn in turns] != pytest.approx(alone, rel=1e-6)


def test_batch_mates_change_an_image() -> None:
    # The initial image and the views are the first filter's own in each run; the gradient norm is not. A mate
    # with large gradients scales the first filter's down, against Adam's epsilon and the noise.
    model = tiny_cnn()
    weight = model[2].weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight[5] *= 1000
    image = {mate: reference(model, "2", [2, mate], steps=4, size=32).images[0] for mate in (5, 7)}
    again = reference(model, "2", [2, 5], steps=4, size=32).images[0]
    assert (image[5] - again).abs().max() < 1e-5
    assert (image[5] - image[7]).abs().max() > 1e-2


def test_hook_sees_what_an_in_place_relu_leaves() -> None:
    plain = make_reference_step(tiny_cnn(inplace=False), "2", range(8), size=32)().best
    overwritten = make_reference_step(tiny_cnn(inplace=True), "2", range(8), size=32)().best
    assert min(best.activation.min() for best in plain) < 0
    for raw, rectified in zip(plain, overwritten, strict=True):
        torch.testing.assert_close(raw.activation.relu(), rectified.activation)


def test_layer_objective_is_channel_of_the_batch_position() -> None:
    model = tiny_cnn()
    layer = reference(model, "2", [6, 7], steps=1, size=32, objective="layer").history
    channel = reference(model, "2", [0, 1], steps=1, size=32).history
    torch.testing.assert_close(layer, channel)


def test_neuron_objective_is_the_centre() -> None:
    result = reference(tiny_cnn(), "2", [3], steps=2, size=32, objective="neuron")
    torch.testing.assert_close(result.scores, result.activations[:, 13 // 2, 13 // 2])


@pytest.mark.parametrize("size", [8, 9])
def test_decode_matches_the_formula(size: int) -> None:
    scale = baseline.spectrum_scale(size, size)
    assert scale.shape == (size, size // 2 + 1 + size % 2)
    assert scale[0, 0] == pytest.approx(size)
    assert scale[2, 1] == pytest.approx(1 / (5**0.5 / size))
    generator = torch.Generator().manual_seed(1)
    spectrum = torch.randn(2, 3, *scale.shape, 2, generator=generator)
    color = torch.tensor(baseline.COLOR) / baseline.COLOR_NORM
    assert color.norm(dim=0).max() == pytest.approx(1, abs=1e-3)
    image = baseline.decode(spectrum, scale, color, size)
    pixels = torch.fft.irfft2(torch.complex(spectrum[..., 0], spectrum[..., 1]) * scale, norm="ortho") / 4
    expected = torch.einsum("rc,nchw->nrhw", color, pixels[..., :size]).sigmoid()
    torch.testing.assert_close(image, expected)
    grey = baseline.decode(torch.zeros_like(spectrum), scale, color, size)
    torch.testing.assert_close(grey, torch.full_like(grey, 0.5))


def test_model_sees_the_central_196_px_of_an_unshifted_view() -> None:
    image = torch.zeros(1, 3, 224, 224, requires_grad=True)
    preset()(v2.Resize([256, 256], antialias=True)(image)).sum().backward()
    assert image.grad is not None
    seen = image.grad[0, 0] != 0
    assert seen[14:-14, 14:-14].all()
    seen[13:-13, 13:-13] = False  # the interpolation reaches one pixel further
    assert not seen.any()


def test_model_hardly_ever_sees_the_border() -> None:
    # The random shifts let it in now and then; a pixel's share of draws falls towards the edge.
    draws = 20
    seen = torch.zeros(224, 224)
    normalise, view = preset(), random_view(224)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(draws):
            image = torch.zeros(1, 3, 224, 224, requires_grad=True)
            normalise(view(image)).sum().backward()
            assert image.grad is not None
            seen += (image.grad[0, 0] != 0) / draws
    edge = torch.cat([seen[:4].flatten(), seen[-4:].flatten(), seen[:, :4].flatten(), seen[:, -4:].flatten()])
    assert edge.mean() < 0.1
    assert seen[40:-40, 40:-40].mean() > 0.9  # nearest-neighbour sampling skips some


def test_view_draws_once_for_the_batch_and_fills_black() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.rand(1, 3, 48, 48).expand(3, -1, -1, -1)
        views = torch.stack([random_view(48)(images) for _ in range(6)])
        white = torch.stack([random_view(16)(torch.ones(1, 3, 16, 16)) for _ in range(20)])
    assert views.shape == (6, 3, 3, 256, 256)
    assert torch.equal(views[:, 0], views[:, 1])
    assert not torch.equal(views[0], views[1])
    # At 16 px the fractions 8/16 and 4/16 of the padded frame shift past the pad of 0.5: black comes in.
    assert white.min() < 0.1


def test_preset_is_that_of_the_weights() -> None:
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(preset()(images), SqueezeNet1_0_Weights.IMAGENET1K_V1.transforms()(images))


@pytest.mark.parametrize("size", [96, 112, 224, 299])
def test_other_input_sizes_keep_the_geometry(size: int) -> None:
    image = torch.zeros(1, 3, size, size, requires_grad=True)
    side = baseline.resize_size(size)
    seen = preset(input_size=size)(v2.Resize([side, side], antialias=True)(image))
    assert seen.shape == (1, 3, size, size)
    seen.sum().backward()
    assert image.grad is not None
    shares = (image.grad[0, 0] != 0).sum(dim=1) / size
    # 196 of 224 px and what the interpolation reaches further; the side of the resize is rounded, too.
    assert shares.max() == pytest.approx(196 / 224, abs=3 / size)

    view = random_view(size, input_size=size)
    pad, first, _, _, second, _, resize = getattr(view, "transforms")  # noqa: B009
    assert pad.padding == round(16 * size / 224)
    assert first.translate == pytest.approx([8 / 224, 8 / 224])
    assert second.translate == pytest.approx([4 / 224, 4 / 224])
    assert resize.size == [side, side] == [round(256 * size / 224)] * 2


def test_preset_takes_the_model_own_normalisation() -> None:
    mean, std = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)
    images = torch.rand(1, 3, 110, 110, generator=torch.Generator().manual_seed(0))
    crop = images[..., 7:103, 7:103]
    expected = (crop - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(preset(input_size=96, mean=mean, std=std)(images), expected)


def test_reference_gives_texturenet_what_it_expects(texturenet: Model) -> None:
    model, mean, std = texturenet.module, texturenet.mean, texturenet.std
    inputs: list[Tensor] = []

    def record(module: nn.Module, arguments: tuple[Tensor]) -> None:
        del module
        inputs.append(arguments[0].detach())

    handle = model.register_forward_pre_hook(record)
    try:
        result = reference(model, "block4.conv", [0, 5], steps=6, input_size=96, mean=mean, std=std)
    finally:
        handle.remove()
    assert [tuple(batch.shape) for batch in inputs] == [(2, 3, 96, 96)] * 6
    assert result.images.shape == (2, 3, 96, 96)  # the images' size is the input's by default
    assert result.activations.shape == (2, 24, 24)
    assert (result.history[-1] > result.history[0]).all()

    scale, color = baseline.spectrum_scale(96, 96), torch.tensor(baseline.COLOR) / baseline.COLOR_NORM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spectrum = baseline.INIT_SCALE * torch.randn(2, 3, *scale.shape, 2)
        view = random_view(96, input_size=96)(baseline.decode(spectrum, scale, color, 96))
    assert view.shape == (2, 3, 110, 110)
    torch.testing.assert_close(inputs[0], preset(input_size=96, mean=mean, std=std)(view))

    smaller = reference(model, "block4.conv", [0], steps=1, size=64, input_size=96)
    assert smaller.images.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "9"}, "layer '9'"),
        ({"filters": [8]}, "channels 0 to 7"),
        ({"filters": []}, "one or more"),
        ({"filters": [-1]}, "one or more"),
        ({"layer": "6"}, "expected an output"),
        ({"steps": 0}, "at least 1"),
        ({"size": 1}, "size 1: expected at least 2 px"),
        ({"input_size": 1}, "input_size 1: expected at least 2 px"),
        ({"mean": (0.5,)}, "three numbers each"),
        ({"std": (0.5, 0.5)}, "three numbers each"),
        ({"std": (0.5, 0.5, 0.0)}, "std above 0"),
        ({"objective": "class"}, "'neuron'"),
    ],
)
def test_rejects(arguments: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"layer": "2", "filters": [0], "steps": 1, "size": 32, **arguments}
    with pytest.raises(ValueError, match=message):
        reference(tiny_cnn(), **settings)  # pyright: ignore[reportArgumentType]


def test_rejects_training_mode() -> None:
    with pytest.raises(ValueError, match="training mode"):
        reference(tiny_cnn().train(), "2", [0], steps=1)


def test_layer_is_found_by_the_end_of_its_name() -> None:
    model = nn.Sequential()
    model.add_module("block", tiny_cnn())
    assert baseline.find_layer(model, "2") is model.get_submodule("block.2")
    with pytest.raises(ValueError, match=r"these do: \['a\.conv', 'b\.conv'\]"):
        baseline.find_layer(nn.ModuleDict({key: nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)}) for key in "ab"}), "conv")


@pytest.mark.parametrize("inplace", [False, True])
def test_evaluator_is_the_plain_formula(inplace: bool) -> None:
    model, filters = tiny_cnn(inplace=inplace), [1, 6]
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    images[0, 0] = 0.0  # a third of the first image is saturated, besides 4% of the rest

    def by_hand(batch: Tensor) -> Tensor:
        with torch.no_grad():
            normalised = (batch - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
            maps = model[2](model[1](model[0](normalised)))
        return torch.stack([maps[i, channel].clamp(min=0).mean() for i, channel in enumerate(filters)])

    score = evaluate(images, model, "2", filters)
    torch.testing.assert_close(score.plain_per_filter, by_hand(images))
    assert score.plain == pytest.approx(by_hand(images).mean().item(), rel=1e-5)
    robust = sum((by_hand(fixed_view(images, *view)) for view in VIEWS), torch.zeros(2)) / 8
    torch.testing.assert_close(score.robust_per_filter, robust)
    assert score.saturation_per_filter.tolist() == pytest.approx([1 / 3 + 2 / 3 * 0.04, 0.04], abs=0.003)
    assert not model[2]._forward_hooks


def test_evaluator_resizes_to_the_model_input() -> None:
    model = tiny_cnn()
    small = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    large = F.interpolate(small, (224, 224), mode="bilinear", antialias=True)
    assert evaluate(small, model, "2", [0]).plain == evaluate(large, model, "2", [0]).plain


def test_evaluator_scales_to_other_inputs(texturenet: Model) -> None:
    model, filters = texturenet.module, [1, 6]
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (texturenet.mean, texturenet.std))

    def by_hand(batch: Tensor) -> Tensor:
        with torch.no_grad():
            maps = model.get_submodule("block2.conv")(model.get_submodule("block1")((batch - mean) / std))
        return torch.stack([maps[i, channel].clamp(min=0).mean() for i, channel in enumerate(filters)])

    expected = {"input_size": 96, "mean": texturenet.mean, "std": texturenet.std}
    score = evaluate(images, model, "block2.conv", filters, **expected)
    torch.testing.assert_close(score.plain_per_filter, by_hand(images))
    views = [(degrees, scale, right * 96 / 224, down * 96 / 224) for degrees, scale, right, down in VIEWS]
    robust = sum((by_hand(fixed_view(images, *view)) for view in views), torch.zeros(2)) / 8
    torch.testing.assert_close(score.robust_per_filter, robust)
    large = F.interpolate(images, (150, 150), mode="bilinear", antialias=True)
    small = F.interpolate(large, (96, 96), mode="bilinear", antialias=True)
    resized = (evaluate(i, model, "block2.conv", filters, **expected) for i in (large, small))
    assert len({found.plain for found in resized}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 0}, "input_size 0"),
        ({"mean": (0.5,) * 4}, "three numbers each"),
        ({"std": (1.0, -1.0, 1.0)}, "std above 0"),
    ],
)
def test_evaluator_rejects_an_impossible_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(torch.zeros(1, 3, 224, 224), tiny_cnn(), "2", [0], **arguments)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("images", "layer", "message"),
    [
        (torch.full((1, 3, 224, 224), 1.1), "2", r"expected \[0, 1\]"),
        (torch.full((1, 3, 224, 224), float("nan")), "2", r"expected \[0, 1\]"),
        (torch.zeros(2, 3, 224, 224), "2", "one image per filter"),
        (torch.zeros(1, 1, 224, 224), "2", "one image per filter"),
        (torch.zeros(1, 3, 224, 224), "conv", "the model has"),
    ],
)
def test_evaluator_rejects(images: Tensor, layer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(images, tiny_cnn(), layer, [0])


def test_fixed_view_directions() -> None:
    image = torch.full((1, 1, 41, 61), 0.5)
    image[0, 0, 20, 40] = 1.0  # 10 px to the right of the centre (20, 30)

    def peak(degrees: float, scale: float, right: float, down: float) -> tuple[int, int]:
        flat = int(fixed_view(image, degrees, scale, right, down).argmax())
        return flat // 61, flat % 61

    assert peak(0, 1, 0, 0) == (20, 40)
    assert peak(0, 1, 3, 5) == (25, 43)
    assert peak(90, 1, 0, 0) == (10, 30)  # counter-clockwise: up
    assert peak(90, 1, 3, 5) == (15, 33)  # flip_kernel first, shifted then
    assert peak(0, 2, 0, 0) == (20, 50)
    torch.testing.assert_close(fixed_view(image, 0, 1, 0, 0), image)
    shifted = fixed_view(torch.ones(1, 1, 20, 20), 0, 1, 4, 0)
    torch.testing.assert_close(shifted[..., :4], torch.full((1, 1, 20, 4), 0.5))


def test_absent_weights_give_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_squeezenet(tmp_path) is None
    assert load_squeezenet(tmp_path / "weights.safetensors") is None
    monkeypatch.setenv("FEATVIS_WEIGHTS", str(tmp_path))
    assert load_squeezenet() is None


def test_squeezenet_filter_is_found() -> None:
    state = torch.get_rng_state()
    model = load_squeezenet()
    assert torch.equal(torch.get_rng_state(), state)
    if model is None:
        pytest.skip("SqueezeNet weights absent: set FEATVIS_WEIGHTS to their file or folder")
    layer, filters = "features.9.expand3x3", [2]
    run = make_reference_step(model, layer, filters)
    course = [run() for _ in range(5)]
    assert all(progress.values[0] >= 0 for progress in course)  # the ReLU that follows works in place
    first, last = (course[index].best[0].image[None] for index in (0, -1))
    before, after = (evaluate(image, model, layer, filters) for image in (first, last))
    assert after.plain > 3 * before.plain
    assert after.robust > 3 * before.robust


def test_comparison_takes_the_first_run_that_is_as_good() -> None:
    script = [quality.Point(64, 30.0, 900.0, 0.0, 0.3), quality.Point(128, 60.0, 1000.0, 0.0, 0.02)]
    runs = [
        quality.Point(12, 3.0, 950.0, 0.0, 0.0),
        quality.Point(16, 4.0, 1000.0, 0.0, 0.01),
        quality.Point(20, 5.0, 1100.0, 0.0, 0.5),
    ]
    assert quality.compare(script, runs) == (16, 15.0, 0.5, 0.02, 0.01)
    assert quality.compare(script, runs[:1]) == (None, None, None, 0.02, None)
    burnt = [run._replace(saturation=0.026) for run in runs]
    assert quality.compare(script, burnt).steps_to_baseline is None
    clear = [script[1]._replace(saturation=0.0)]
    assert quality.compare(clear, runs).steps_to_baseline is None
    faint = [run._replace(saturation=0.001) for run in runs]
    assert quality.compare(clear, faint).saturation_ratio == pytest.approx(0.001 / 1e-6)
    assert quality.compare(clear, faint).saturation_baseline == 0.0


def test_quality_measures_a_model_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATVIS_WEIGHTS", "absent")
    monkeypatch.setattr(quality, "BASELINE_MARKS", (1, 2, 3))
    monkeypatch.setattr(quality, "OUR_RUNS", (1, 2))
    todo = quality.trained_cases("cpu")
    assert [(case.name, case.layer) for case in todo] == [("texturenet", layer) for layer in quality.TEXTURENET_LAYERS]
    script, ours, images = quality.measure(todo[0], "cpu")
    assert [point.steps for point in script] == [1, 2, 3]
    assert [point.steps for point in ours] == [1, 2]
    assert all(point.seconds > 0 and point.robust > 0 for point in (*script, *ours))
    assert script[0].seconds < script[1].seconds < script[2].seconds
    assert images.shape == (16, 3, 96, 96)
    sheet = quality.sheet(images, rows=2)
    assert sheet.width > 3 * sheet.height


def test_quality_covers_layers_of_squeezenet(squeezenet: Model) -> None:
    todo = [case for case in quality.trained_cases("cpu") if case.name == "squeezenet1_0"]
    assert "features.9.expand3x3" in (layers := [case.layer for case in todo])
    assert len(set(layers)) == 3
    assert {case.model.size for case in todo} == {squeezenet.size}
    assert all(dict(case.model.module.named_modules()).get(layer) for case, layer in zip(todo, layers, strict=True))
