"""The published baseline keeps the published script's quirks and changes neither the model nor any global state."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torchvision.models import SqueezeNet1_0_Weights
from torchvision.transforms import v2

from benchmarks import reference as baseline
from benchmarks.evaluate import evaluate, load_squeezenet
from benchmarks.reference import make_reference_step, preset, random_transform, reference
from featvis_func.models import Model
from tests.benchmarks.models import tiny_cnn
from tests.toys import OneConv


def test_result_has_the_documented_shapes_and_the_best_step() -> None:
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


def test_objective_increases() -> None:
    history = reference(tiny_cnn(), "2", [1, 4], steps=12, size=32).history
    assert (history[-1] > history[0]).all()


def test_reference_restores_hooks_weights_and_global_random_state() -> None:
    model = tiny_cnn()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    reference(model, "2", [0], steps=2, size=32)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch_module._global_forward_hooks
    assert not any(part._forward_hooks for part in model.modules())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_reference_removes_its_hook_when_the_model_raises() -> None:
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


def test_same_seed_gives_the_same_result_even_when_interleaved() -> None:
    model = tiny_cnn()
    alone = reference(model, "2", [2], steps=3, size=32, seed=5).history[:, 0].tolist()
    run, other = (make_reference_step(model, "2", [2], size=32, seed=seed) for seed in (5, 6))
    values = [(run().values[0], torch.rand(1), other().values[0]) for _ in range(3)]
    assert [value[0] for value in values] == pytest.approx(alone, rel=1e-6)
    assert [value[2] for value in values] != pytest.approx(alone, rel=1e-6)


def test_other_filters_in_the_batch_change_an_image() -> None:
    # The first filter has the same initial image and random transforms in each run; the gradient norm is the batch's. A
    # filter with large gradients scales those of the first one down, relative to Adam's epsilon and the noise.
    model = tiny_cnn()
    weight = model[2].weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight[5] *= 1000
    image = {other: reference(model, "2", [2, other], steps=4, size=32).images[0] for other in (5, 7)}
    again = reference(model, "2", [2, 5], steps=4, size=32).images[0]
    assert (image[5] - again).abs().max() < 1e-5
    assert (image[5] - image[7]).abs().max() > 1e-2


def test_hook_returns_the_map_that_an_in_place_relu_has_rectified() -> None:
    plain = make_reference_step(tiny_cnn(inplace=False), "2", range(8), size=32)().best
    overwritten = make_reference_step(tiny_cnn(inplace=True), "2", range(8), size=32)().best
    assert min(best.activation.min() for best in plain) < 0
    for raw, rectified in zip(plain, overwritten, strict=True):
        torch.testing.assert_close(raw.activation.relu(), rectified.activation)


def test_layer_objective_is_the_channel_of_the_batch_index() -> None:
    model = tiny_cnn()
    layer = reference(model, "2", [6, 7], steps=1, size=32, objective="layer").history
    channel = reference(model, "2", [0, 1], steps=1, size=32).history
    torch.testing.assert_close(layer, channel)


def test_neuron_objective_is_the_central_activation() -> None:
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


def test_only_the_central_196_px_of_an_unshifted_image_are_visible() -> None:
    image = torch.zeros(1, 3, 224, 224, requires_grad=True)
    preset()(v2.Resize([256, 256], antialias=True)(image)).sum().backward()
    assert image.grad is not None
    seen = image.grad[0, 0] != 0
    assert seen[14:-14, 14:-14].all()
    seen[13:-13, 13:-13] = False  # the interpolation reads one pixel further
    assert not seen.any()


@pytest.mark.slow
def test_border_is_rarely_visible() -> None:
    # Only some random shifts make it visible; the fraction of draws decreases towards the edge.
    draws = 20
    seen = torch.zeros(224, 224)
    normalise, transform = preset(), random_transform(224)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(draws):
            image = torch.zeros(1, 3, 224, 224, requires_grad=True)
            normalise(transform(image)).sum().backward()
            assert image.grad is not None
            seen += (image.grad[0, 0] != 0) / draws
    edge = torch.cat([seen[:4].flatten(), seen[-4:].flatten(), seen[:, :4].flatten(), seen[:, -4:].flatten()])
    assert edge.mean() < 0.1
    assert seen[40:-40, 40:-40].mean() > 0.9  # nearest-neighbour sampling skips some


def test_random_transform_draws_once_for_the_batch_and_fills_with_black() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.rand(1, 3, 48, 48).expand(3, -1, -1, -1)
        transformed = torch.stack([random_transform(48)(images) for _ in range(6)])
        white = torch.stack([random_transform(16)(torch.ones(1, 3, 16, 16)) for _ in range(20)])
    assert transformed.shape == (6, 3, 3, 256, 256)
    assert torch.equal(transformed[:, 0], transformed[:, 1])
    assert not torch.equal(transformed[0], transformed[1])
    # At 16 px the shifts of 8/16 and 4/16 of the padded frame exceed the pad of 0.5: black pixels become visible.
    assert white.min() < 0.1


def test_preset_equals_that_of_the_torchvision_weights() -> None:
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
    # 196 of 224 px, plus what the interpolation reads beyond them; the size of the resize is rounded as well.
    assert shares.max() == pytest.approx(196 / 224, abs=3 / size)

    transform = random_transform(size, input_size=size)
    pad, first, _, _, second, _, resize = getattr(transform, "transforms")  # noqa: B009
    assert pad.padding == round(16 * size / 224)
    assert first.translate == pytest.approx([8 / 224, 8 / 224])
    assert second.translate == pytest.approx([4 / 224, 4 / 224])
    assert resize.size == [side, side] == [round(256 * size / 224)] * 2


def test_preset_uses_the_given_normalisation() -> None:
    mean, std = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)
    images = torch.rand(1, 3, 110, 110, generator=torch.Generator().manual_seed(0))
    crop = images[..., 7:103, 7:103]
    expected = (crop - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(preset(input_size=96, mean=mean, std=std)(images), expected)


def test_reference_scales_its_input_to_texturenet(texturenet: Model) -> None:
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
    assert result.images.shape == (2, 3, 96, 96)  # by default the images have the model's input size
    assert result.activations.shape == (2, 24, 24)
    assert (result.history[-1] > result.history[0]).all()

    scale, color = baseline.spectrum_scale(96, 96), torch.tensor(baseline.COLOR) / baseline.COLOR_NORM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spectrum = baseline.INIT_SCALE * torch.randn(2, 3, *scale.shape, 2)
        transformed = random_transform(96, input_size=96)(baseline.decode(spectrum, scale, color, 96))
    assert transformed.shape == (2, 3, 110, 110)
    torch.testing.assert_close(inputs[0], preset(input_size=96, mean=mean, std=std)(transformed))

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
def test_reference_rejects_invalid_arguments(arguments: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"layer": "2", "filters": [0], "steps": 1, "size": 32, **arguments}
    with pytest.raises(ValueError, match=message):
        reference(tiny_cnn(), **settings)  # pyright: ignore[reportArgumentType]


def test_reference_rejects_a_model_in_training_mode() -> None:
    with pytest.raises(ValueError, match="training mode"):
        reference(tiny_cnn().train(), "2", [0], steps=1)


def test_find_layer_accepts_a_unique_end_of_a_name() -> None:
    model = nn.Sequential()
    model.add_module("block", tiny_cnn())
    assert baseline.find_layer(model, "2") is model.get_submodule("block.2")
    with pytest.raises(ValueError, match=r"these end with it: \['a\.conv', 'b\.conv'\]"):
        baseline.find_layer(nn.ModuleDict({key: nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)}) for key in "ab"}), "conv")


@pytest.mark.slow
def test_reference_raises_the_scores_of_a_squeezenet_filter() -> None:
    state = torch.get_rng_state()
    model = load_squeezenet()
    assert torch.equal(torch.get_rng_state(), state)
    if model is None:
        pytest.skip("no SqueezeNet weights: set FEATVIS_WEIGHTS to their file or folder")
    layer, filters = "features.9.expand3x3", [2]
    run = make_reference_step(model, layer, filters)
    progress_of_steps = [run() for _ in range(5)]
    assert all(progress.values[0] >= 0 for progress in progress_of_steps)  # the following ReLU is in place
    first, last = (progress_of_steps[index].best[0].image[None] for index in (0, -1))
    before, after = (evaluate(image, model, layer, filters) for image in (first, last))
    assert after.plain > 3 * before.plain
    assert after.robust > 3 * before.robust
