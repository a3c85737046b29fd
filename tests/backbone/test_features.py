"""Truncated backbones: the values are those of the module's layers, and the module is not changed."""

import gc
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from featvis_func.backbone import hardware
from featvis_func.backbone import truncate as truncating
from featvis_func.backbone.export import trace
from featvis_func.backbone.features import Features, make_features, resolve_layer
from featvis_func.backbone.layers import LayerRef
from featvis_func.backbone.listing import Layer, list_layers
from featvis_func.backbone.truncate import release, truncate
from featvis_func.cpu import ops
from featvis_func.models import Model, load_model
from tests.toys import TINY_SIZE, OneConv, load_toy, make_tiny


def images_for(model: Model, count: int, seed: int = 1) -> Tensor:
    """Return random images in the dtype of the module."""
    generator = torch.Generator().manual_seed(seed)
    some = next(model.module.parameters())
    return torch.randn(count, model.channels, *model.size, generator=generator).to(some.dtype)


def by_hook(module: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Return the layers' outputs at their last call, in evaluation mode."""
    modes = {child: child.training for child in module.modules()}
    caught: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(child: nn.Module, args: Any, output: Tensor) -> None:
            caught[path] = output.detach().clone()

        return hook

    handles = [module.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    with torch.no_grad():
        module.eval()(images)
    for handle in handles:
        handle.remove()
    for child, mode in modes.items():
        child.training = mode
    return caught


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    largest = float(expected.double().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * largest)


def equals_the_module(model: Model, layers: Sequence[str], *, tolerance: float = 1e-4) -> Features:
    """Compare with hooks, for other batch sizes than the one of the trace."""
    features = make_features(model, layers)
    for count in (1, 3):
        images = images_for(model, count)
        with torch.no_grad():
            actual = features.apply(features.weights, images)
        expected = by_hook(model.module, list(features.paths.values()), images)
        assert list(actual) == list(layers)
        for name in layers:
            assert actual[name].shape == (count, *features.shapes[name])
            raw = expected[features.paths[name]]
            # Features have channels first.
            close(actual[name], raw if raw.shape == actual[name].shape else raw.movedim(-1, 1), tolerance)
    return features


class Called(nn.Module):
    """A convolution that is called three times, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.never = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu_()
        x = self.norm(self.again(x)).relu_()
        x = self.again(x).relu_()
        return self.again(x).relu_().mean((-2, -1))


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.memory = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        return self.memory(tokens)[0]


class Branches(nn.Module):
    """Control flow that depends on values, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.sum() > 0:
            x = x + 1
        return self.head(self.norm(x).relu_())


class Squashed(nn.Module):
    """A layer that returns one number per image, and one that returns volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.volume = nn.Unflatten(1, (2, 2))
        self.number = nn.Flatten(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.number(self.volume(self.conv(x)).mean((1, 2, 3, 4)))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make().eval()


# --- the values -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layers", [["1"], ["9"], ["5", "0", "1"], ["8", "7"]], ids=str)
def test_truncation_equals_the_module(tiny: Model, layers: list[str]) -> None:
    assert equals_the_module(tiny, layers).exported


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "size"),
    [
        ("resnet18", ["layer3.1.conv2", "layer1.0.bn1", "layer2"], 64),
        ("googlenet", ["4c.branch4.1.conv", "inception3a"], 64),
        ("swin_t", ["features.3.1.mlp.0"], 64),
    ],
)
def test_torchvision_truncation_equals_the_module(name: str, layers: list[str], size: int) -> None:
    model = load_model(f"torchvision:{name}@none", size=size)
    assert equals_the_module(model, layers).exported


@pytest.mark.slow
def test_squeezenet_truncation_equals_the_module(squeezenet: Model) -> None:
    features = equals_the_module(squeezenet, ["features.9.expand3x3", "7.squeeze"])
    assert features.exported
    assert features.shapes["features.9.expand3x3"] == (192, 27, 27)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["1", "3"])
def test_in_place_operations_that_follow_do_not_change_a_layer(tiny: Model, layer: str) -> None:
    features = make_features(tiny, [layer])
    assert features.apply(features.weights, images_for(tiny, 2))[layer].min() < 0


@pytest.mark.slow
@pytest.mark.parametrize("layers", [["again"], ["norm"], ["first", "again", "norm"]], ids=str)
def test_layer_means_the_output_of_its_last_call(layers: list[str]) -> None:
    assert equals_the_module(load_toy(seeded(Called), size=9), layers).exported


def test_one_layer_under_two_names(tiny: Model) -> None:
    features = make_features(load_toy(nn.Sequential(tiny.module), size=TINY_SIZE), ["0.5", "5"])
    assert features.paths == {"0.5": "0.5", "5": "0.5"}
    actual = features.apply(features.weights, images_for(tiny, 1))
    assert torch.equal(actual["0.5"], actual["5"])


def test_images_of_a_batch_are_independent(tiny: Model) -> None:
    features = make_features(tiny, ["9"])
    images = images_for(tiny, 5)
    together = features.apply(features.weights, images)["9"]
    for i in range(5):
        close(features.apply(features.weights, images[i : i + 1])["9"], together[i : i + 1])


@pytest.mark.slow
def test_weights_are_those_up_to_the_layer(tiny: Model) -> None:
    features = make_features(tiny, ["3"])
    assert {name.partition(".")[0] for name in features.weights} <= {"0", "1", "3"}
    assert {"0", "3"} <= {name.partition(".")[0] for name in features.weights}
    count = sum(weight.numel() for weight in features.weights.values())
    assert count <= sum(t.numel() for i in (0, 1, 3) for t in tiny.module.get_submodule(str(i)).state_dict().values())
    assert not any(weight.requires_grad for weight in features.weights.values())


def test_gradients_reach_the_images_and_not_the_weights(tiny: Model) -> None:
    images = images_for(tiny, 2).requires_grad_()
    features = make_features(tiny, ["5"])
    features.apply(features.weights, images)["5"].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in tiny.module.parameters())


@pytest.mark.slow
def test_double_precision() -> None:
    model = load_toy(make_tiny().double(), size=TINY_SIZE)
    features = equals_the_module(model, ["5"], tolerance=1e-9)
    assert features.apply(features.weights, images_for(model, 1))["5"].dtype == torch.float64
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float64}


@pytest.mark.slow
def test_verification_can_be_left_out(tiny: Model) -> None:
    with_it, without = make_features(tiny, ["5"]), make_features(tiny, ["5"], verify=False)
    images = images_for(tiny, 2)
    assert torch.equal(with_it.apply(with_it.weights, images)["5"], without.apply(without.weights, images)["5"])


@pytest.mark.slow
def test_reparametrized_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = seeded(lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.Tanh()))
    new = seeded(lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Tanh()))
    for module in (old, new):
        equals_the_module(load_toy(module, size=9), ["0", "1"])


def test_module_that_cannot_be_traced_runs_with_a_hook_and_one_warning() -> None:
    model = load_toy(seeded(Branches), size=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        features = make_features(model, ["norm", "conv"])
    (warning,) = caught
    assert "Branches runs with a forward hook, slower and without torch.compile" in str(warning.message)
    assert "\n" not in str(warning.message)
    assert not features.exported
    for seed in range(6):  # both branches
        images = images_for(model, 2, seed)
        actual = features.apply(features.weights, images)
        for path, expected in by_hook(model.module, ["norm", "conv"], images).items():
            close(actual[path], expected)
    assert all(not child._forward_hooks for child in model.module.modules())


def test_hook_fallback_stops_at_the_last_layer() -> None:
    class Counts(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counts.calls += 1
            if x.sum() > 1e9:
                return x
            return x * 1.0

    model = load_toy(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), Counts()), size=8)
    with pytest.warns(UserWarning, match="runs with a forward hook"):
        features = make_features(model, ["1"])
    Counts.calls = 0
    features.apply(features.weights, images_for(model, 1))
    assert Counts.calls == 0


# --- the user's module ----------------------------------------------------------------------------------------------

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def snapshot(module: nn.Module) -> dict[str, Any]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        "training": {name: child.training for name, child in module.named_modules()},
        "hooks": {(name, kind): dict(getattr(child, kind)) for name, child in module.named_modules() for kind in HOOKS},
        "attributes": {name: sorted(vars(child)) for name, child in module.named_modules()},
        "classes": {name: type(child) for name, child in module.named_modules()},
        "identity": {name: (id(t), t.data_ptr(), t._version, t.stride()) for name, t in tensors.items()},
        "flags": {name: (t.requires_grad, t.dtype, t.device, t.grad is None) for name, t in tensors.items()},
        "values": {name: t.detach().clone().numpy().tobytes() for name, t in module.state_dict().items()},
    }


@pytest.mark.slow
def test_make_features_does_not_change_the_module() -> None:
    module = make_tiny()
    module.train()
    module[1].eval()
    module[3].requires_grad_(False)
    runs: list[str] = []
    module[0].register_forward_hook(lambda *_: runs.append("forward"))
    module[3].register_forward_pre_hook(lambda *_: runs.append("before"))
    module[5].register_full_backward_hook(lambda *_: runs.append("backward"))
    module.register_forward_hook(lambda *_: torch.zeros(2, 5))
    before = snapshot(module)
    model = load_toy(module, size=TINY_SIZE)
    features = make_features(model, ["5", "1"])
    assert {"forward", "before"} <= set(runs)  # to see whether they change anything
    runs.clear()
    images = images_for(model, 2).requires_grad_()
    features.apply(features.weights, images)["5"].sum().backward()
    assert runs == []
    list_layers(model)
    assert snapshot(module) == before
    close(features.apply(features.weights, images)["5"], by_hook(make_tiny(), ["5"], images.detach())["5"])


@pytest.mark.slow
def test_features_do_not_depend_on_training_mode(tiny: Model) -> None:
    images = images_for(tiny, 2)
    expected = make_features(tiny, ["5"])
    tiny.module.train()
    actual = make_features(tiny, ["5"])
    assert torch.equal(actual.apply(actual.weights, images)["5"], expected.apply(expected.weights, images)["5"])
    assert tiny.module.training


# --- names of layers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def googlenet() -> Model:
    return load_model("torchvision:googlenet@none", size=64)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("inception4c.branch4.1.conv", "inception4c.branch4.1.conv"),
        ("4c.branch4.1.conv", "inception4c.branch4.1.conv"),
        ("inception4c", "inception4c"),
        ("4c", "inception4c"),
        ("conv1.conv", "conv1.conv"),
        ("5b.branch2", "inception5b.branch2"),
        ("fc", "fc"),
    ],
)
def test_resolve_layer_completes_a_unique_ending(googlenet: Model, name: str, path: str) -> None:
    assert resolve_layer(googlenet.module, name) == path


def test_resolve_layer_prefers_endings_of_complete_components() -> None:
    module = nn.ModuleDict({"my_conv": nn.Identity(), "block": nn.ModuleDict({"conv": nn.Identity()})})
    assert resolve_layer(module, "conv") == "block.conv"
    assert resolve_layer(module, "y_conv") == "my_conv"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "branch4.1.conv",
            r"'branch4\.1\.conv' is ambiguous; it could be 'inception3a\.branch4\.1\.conv', 'inception3b",
        ),
        ("bn", r"'bn' is ambiguous; it could be 'conv1\.bn', 'conv2\.bn', .*, \.\.\.$"),
        ("inception4z", r"no layer 'inception4z'; did you mean 'inception4"),
        ("qqqqqq", r"no layer 'qqqqqq'; the layers are conv1, conv1\.conv, .*\.\.\.$"),
        (".conv", r"no layer '\.conv'|'\.conv' is ambiguous"),
    ],
)
def test_unknown_names_are_errors_that_list_what_exists(googlenet: Model, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_features(googlenet, [name])
    assert "\n" not in str(caught.value)


# --- layers without channels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "size", "layers", "message"),
    [
        (Called, 9, ["first", "never"], r"layer 'never' is not called in the forward pass"),
        (Tuples, 16, ["attention"], r"layer 'attention' gives a tuple instead of a tensor, which has no channels"),
        (Tuples, 16, ["embed", "memory"], r"layer 'memory' gives a tuple instead of a tensor"),
        (Squashed, 8, ["number"], r"layer 'number' gives one number per image, which has no channels"),
        (Squashed, 8, ["volume"], r"layer 'volume' gives \(2, 2, 6, 6\) per image, .*; state which: 'volume@cthw' or"),
        (Called, 9, [], r"no layers were requested"),
        (make_tiny, 4, ["0"], r"Sequential fails on an image of 3 x 4 x 4: "),
    ],
)
def test_layers_without_filters_are_errors(
    make: Callable[[], nn.Module], size: int, layers: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_features(load_toy(seeded(make), size=size), layers)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_layers_beside_tuples_are_valid() -> None:
    equals_the_module(load_toy(seeded(Tuples), size=16), ["embed"])


# --- the list -------------------------------------------------------------------------------------------------------


def test_list_layers_returns_shapes_and_filters(tiny: Model) -> None:
    assert list_layers(tiny) == [
        Layer("0", "Conv2d", (8, 20, 20), 8),
        Layer("1", "BatchNorm2d", (8, 20, 20), 8),
        Layer("2", "ReLU", (8, 20, 20), 8),
        Layer("3", "Conv2d", (12, 9, 9), 12),
        Layer("4", "ReLU", (12, 9, 9), 12),
        Layer("5", "Conv2d", (6, 7, 7), 6),
        Layer("6", "ReLU", (6, 7, 7), 6),
        Layer("7", "AdaptiveAvgPool2d", (6, 1, 1), 6),
        Layer("8", "Flatten", (6,), 6),
        Layer("9", "Linear", (5,), 5),
    ]


@pytest.mark.parametrize(
    ("make", "size", "expected"),
    [
        (Called, 9, {"never": (None, None), "again": ((4, 9, 9), 4)}),
        (Tuples, 16, {"attention[0]": ((16, 8), 8), "memory[0]": ((16, 6), 6), "embed": ((8, 4, 4), 8)}),
        (Squashed, 8, {"volume": ((2, 2, 6, 6), None), "number": ((), None)}),
    ],
)
def test_list_layers_includes_layers_without_filters(
    make: Callable[[], nn.Module], size: int, expected: dict[str, tuple[Any, int | None]]
) -> None:
    listed = {layer.name: (layer.shape, layer.filters) for layer in list_layers(load_toy(seeded(make), size=size))}
    assert {name: listed[name] for name in expected} == expected


def test_list_layers_does_not_change_the_module(tiny: Model) -> None:
    tiny.module.train()
    before = snapshot(tiny.module)
    list_layers(tiny)
    assert snapshot(tiny.module) == before


def test_list_layers_of_a_wrong_image_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="fails on an image of 3 x 4 x 4"):
        list_layers(load_toy(make_tiny(), size=4))


def test_bfloat16_module_is_exported() -> None:
    assert make_features(load_toy(make_tiny().to(torch.bfloat16), size=TINY_SIZE), ["5"]).exported


def test_hooks_of_the_user_are_not_copied() -> None:
    """A hook that cannot be copied makes no difference."""
    module = make_tiny()
    lock = threading.Lock()
    module[0].register_forward_hook(lambda child, args, output, held=lock: None)
    module[0].register_forward_pre_hook(lambda child, args, held=lock: None)
    assert make_features(load_toy(module, size=TINY_SIZE), ["3"]).exported
    assert len(module[0]._forward_hooks) == len(module[0]._forward_pre_hooks) == 1


def test_second_name_of_a_shared_module() -> None:
    conv = nn.Conv2d(3, 3, 1)
    module = nn.Sequential(conv, nn.ReLU(), conv)
    assert resolve_layer(module, "2") == "2"
    model = load_toy(module, size=4)
    images = images_for(model, 2)
    features = make_features(model, ["2"])
    with torch.no_grad():
        torch.testing.assert_close(features.apply(features.weights, images)["2"], module(images))


class Scaled(nn.Module):
    """A convolution on activations whose scale is measured without a gradient, which torch.export forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        with torch.no_grad():
            scale = y.abs().amax((1, 2, 3), keepdim=True)
        return self.d(y / scale)


@pytest.mark.slow
def test_different_gradient_of_the_exported_graph_is_noticed() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_toy(Scaled(), size=16)
    with pytest.warns(UserWarning, match="the gradient differs from the module's by"):
        features = make_features(model, ["d"])
    assert not features.exported
    images = images_for(model, 2)
    ours = torch.func.grad(lambda x: features.apply(features.weights, x)["d"].square().sum())(images)
    leaf = images.clone().requires_grad_()
    theirs = torch.autograd.grad(model.module(leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(ours, theirs)


class TimeFirst(nn.Module):
    """Tokens as the first axis, as in a transformer with ``batch_first=False``."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.e = nn.Conv2d(3, 4, 8, stride=8), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.e(self.c(x).flatten(2).permute(2, 0, 1)).mean(0)


@pytest.mark.parametrize("width", [16, 24, 32])
def test_layer_without_an_entry_per_image_is_an_error(width: int) -> None:
    with pytest.raises(ValueError, match=r"layer 'e' gives .* for 3 images; expected one entry per image"):
        make_features(load_toy(TimeFirst(), size=(8, width)), ["e"])


def test_layer_that_mixes_images_is_reported() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.warns(
        UserWarning, match="layer '1' of Sequential depends on the other images of its batch or on random numbers"
    ):
        make_features(load_toy(module, size=8), ["1"])


def test_random_numbers_in_the_forward_pass_are_reported_and_the_generator_restored() -> None:
    class Noisy(OneConv):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(nn.functional.dropout(x))

    model = load_toy(Noisy(), size=8)
    before = torch.random.get_rng_state()
    with (
        pytest.warns(UserWarning, match="or on random numbers"),
        pytest.warns(UserWarning, match="runs with a forward hook"),
    ):
        make_features(model, ["conv"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_forward_pass_that_writes_to_its_tensors_does_not_change_the_module() -> None:
    class Counting(OneConv):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.n += 1
            self.conv.weight.data = self.conv.weight.data.clamp(-0.01, 0.01)
            return self.conv(x)

    module = Counting()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_features(load_toy(module, size=8), ["conv"])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap", [torch.nn.utils.weight_norm, parametrizations.weight_norm], ids=["hook", "parametrized"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_computed_kernel_before_a_batch_norm_is_not_folded(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = load_toy(nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), size=8)
    assert equals_the_module(model, ["2"]).exported


@pytest.mark.slow
def test_threads_can_trace_at_the_same_time() -> None:
    model = load_toy(make_tiny(), size=TINY_SIZE)
    exported: list[bool] = []
    threads = [threading.Thread(target=lambda: exported.append(make_features(model, ["3"]).exported)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exported == [True] * 3
    assert not torch.compiler.is_compiling()


@pytest.mark.slow
def test_repeated_tracing_releases_its_shape_environments() -> None:
    """They are in a reference cycle through C++, which gc cannot see."""
    model = load_toy(make_tiny(), size=TINY_SIZE)

    def environments() -> int:
        make_features(model, ["3"])
        gc.collect()
        return sum(type(o).__name__ == "ShapeEnv" and bool(vars(o)) for o in gc.get_objects())

    first = environments()
    assert [environments() for _ in range(2)] == [first] * 2


@pytest.mark.slow
def test_repeated_tracing_needs_less_than_100_kilobytes_each() -> None:
    """In a process of its own, whose memory nothing else fills."""
    code = """
        import gc
        import tracemalloc

        from featvis_func.backbone.features import make_features
        from tests.toys import load_toy
        from torch import nn

        model = load_toy(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), size=16)

        def memory_after(count):
            for _ in range(count):
                make_features(model, ["2"])
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        before = memory_after(2)  # fills caches
        print((memory_after(2) - before) // 2)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert int(process.stdout) < 100_000


# --- the graph passes ------------------------------------------------------------------------------------------------


class Stem(nn.Module):
    """A strided first convolution, and pools of odd sides with ceil_mode and ties."""

    def __init__(
        self, channels: int, kernel: int | tuple[int, int], stride: int, padding: int | tuple[int, int]
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, kernel, stride, padding)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.last(torch.relu(self.pool(x) + self.pool(x.flip(1))))


@pytest.mark.parametrize("size", [(21, 26)], ids=str)
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding"),
    [
        (3, 7, 2, 3),
        (3, (3, 6), 3, (1, 2)),
        pytest.param(1, 5, 2, 2, marks=pytest.mark.slow),
        pytest.param(4, 3, 2, 1, marks=pytest.mark.slow),
        pytest.param(3, 2, 4, 0, marks=pytest.mark.slow),
    ],
)
def test_graph_of_a_strided_stem_has_the_gradient_of_the_module(
    channels: int, kernel: int, stride: int, padding: int, size: tuple[int, int]
) -> None:
    module = seeded(lambda: Stem(channels, kernel, stride, padding)).double()
    model = load_model(module, size=size, mean=[0.0] * channels, std=[1.0] * channels)
    for layers in (["last"], ["conv", "pool", "last"]):
        features = make_features(model, layers)
        assert features.exported
        images = images_for(model, 2).requires_grad_()
        expected = by_gradient(module, layers, images)
        values = features.apply(features.weights, images)
        gradient = torch.autograd.grad(torch.stack([(v**2).sum() for v in values.values()]).sum(), images)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def by_gradient(module: nn.Module, layers: Sequence[str], images: Tensor) -> Tensor:
    """Return the gradient of the sum of squares of some layers at their last calls."""
    caught: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(child: nn.Module, args: Any, output: Tensor) -> None:
            caught[name] = output.clone()

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    module(images)
    for handle in handles:
        handle.remove()
    return torch.autograd.grad(torch.stack([(v**2).sum() for v in caught.values()]).sum(), images)[0]


@pytest.mark.slow
def test_strided_convolution_of_few_channels_behind_a_pool() -> None:
    module = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, 2))
    )
    assert equals_the_module(load_toy(module, size=30), ["3"]).exported


STRIDED = [  # kernel, stride, padding, sides of the image
    ((7, 7), 2, (3, 3), (32, 33)),
    ((7, 7), 2, (0, 0), (31, 30)),
    ((3, 3), 2, (1, 1), (16, 17)),
    ((3, 5), 3, (0, 2), (19, 20)),
    ((11, 11), 4, (2, 2), (35, 38)),
    ((4, 4), 4, (0, 0), (18, 16)),
    ((1, 1), 2, (0, 0), (5, 4)),
    ((2, 3), 4, (1, 0), (11, 13)),  # pixels and padding that no kernel position covers
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("sides", "stride", "padding", "size"), STRIDED)
def test_strided_conv2d_equals_conv2d_with_its_gradients(
    sides: tuple[int, int], stride: int, padding: tuple[int, int], size: tuple[int, int], channels: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, channels, *size), (5, channels, *sides), (5,))
    given = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]

    def total(images: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        return (ops.strided_conv2d(images, kernel, bias, stride, list(padding)) ** 2).sum()

    def plain(images: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        return (nn.functional.conv2d(images, kernel, bias, stride, padding) ** 2).sum()

    assert torch.equal(total(*given), plain(*given))
    expected = torch.func.grad(plain, argnums=(0, 1, 2))(*given)
    torch.testing.assert_close(torch.func.grad(total, argnums=(0, 1, 2))(*given), expected)
    leaves = [t.clone().requires_grad_() for t in given]
    torch.testing.assert_close(torch.autograd.grad(total(*leaves), leaves), tuple(expected))


@pytest.mark.slow
def test_strided_conv2d_works_compiled_under_vmap_and_twice_differentiated() -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 3, 16, 16, generator=draw, dtype=torch.float64)
    kernel = torch.randn(5, 3, 7, 7, generator=draw, dtype=torch.float64)

    def gradient_of(conv: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda images: (conv(images) ** 3).sum())

    ours = gradient_of(lambda images: ops.strided_conv2d(images, kernel, None, 2, [3, 3]))
    plain = gradient_of(lambda images: nn.functional.conv2d(images, kernel, None, 2, 3))
    compiled = torch.compile(ours, fullgraph=True)
    torch.testing.assert_close(compiled(images[0]), plain(images[0]))
    torch.testing.assert_close(torch.func.vmap(ours)(images), torch.func.vmap(plain)(images))
    twice = [torch.func.grad(lambda images, g=g: (g(images) ** 2).sum())(images[0]) for g in (ours, plain)]
    torch.testing.assert_close(*twice)


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "expected"), [((3, 7, 2, 3), 1), ((3, 3, 1, 1), 0), ((5, 3, 2, 1), 0)])
def test_strided_conv2d_replaces_strided_convolutions_of_few_channels_only(
    stem: tuple[int, int, int, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    original = ops._StridedConv.apply
    monkeypatch.setattr(ops._StridedConv, "apply", lambda *args: calls.append(args) or original(*args))
    module = Stem(*stem)
    model = load_model(module, size=32, mean=[0.0] * stem[0], std=[1.0] * stem[0])
    features = make_features(model, ["last"])
    calls.clear()
    features.apply(features.weights, torch.rand(2, stem[0], 32, 32))
    assert len(calls) == expected
    torch.testing.assert_close(features.weights["conv.weight"], module.conv.weight.detach(), rtol=0, atol=0)


class Siblings(nn.Module):
    """Branches of one tensor: three that can be merged, and others that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.branches = nn.ModuleList([nn.Sequential(nn.Conv2d(6, n, 1), nn.ReLU(inplace=True)) for n in (2, 3, 5)])
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)
        self.strided = nn.Conv2d(6, 4, 1, stride=2)
        self.wide = nn.Conv2d(6, 4, 3, padding=1)
        self.plain = nn.Conv2d(6, 4, 1)
        self.last = nn.Conv2d(22, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        others = [torch.relu(layer(x)) for layer in (self.grouped, self.wide)]
        up = nn.functional.interpolate(torch.relu(self.strided(x)), scale_factor=2.0)
        return self.last(torch.cat([*(branch(x) for branch in self.branches), *others, self.plain(x)], 1)) + up


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "merged"),
    [
        (["last"], (0, 1, 2)),
        (["branches.1"], ()),  # the others are truncated
        (["branches.1", "last"], (0, 1, 2)),
        (["branches.1.0", "last"], (0, 2)),  # the values before its ReLU are an output
    ],
)
def test_merged_siblings_have_the_gradient_of_the_module(layers: list[str], merged: tuple[int, ...]) -> None:
    module = seeded(Siblings).double()
    model = load_toy(module, size=16)
    features = make_features(model, layers)
    assert features.exported
    images = images_for(model, 2).requires_grad_()
    values = features.apply(features.weights, images)
    gradient = torch.autograd.grad(torch.stack([(v**2).sum() for v in values.values()]).sum(), images)[0]
    torch.testing.assert_close(gradient, by_gradient(module, layers, images), rtol=1e-10, atol=1e-10)
    names = {"+".join(f"branches.{i}.0.{kind}" for i in merged) for kind in ("weight", "bias")} - {""}
    assert {name for name in features.weights if "+" in name} == names


def test_siblings_are_merged_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncating, "specialization", lambda device_type: hardware.GENERIC)
    features = make_features(load_toy(seeded(Siblings), size=16), ["last"])
    assert {name.count("+") for name in features.weights if "+" in name} == {2}


@pytest.mark.slow
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_max_pool2d_compiled_has_the_gradient_of_torch(direct: bool, ceil_mode: bool) -> None:
    images = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    images = images.round(decimals=0)  # with ties

    def total(images: Tensor) -> Tensor:
        inputs = images if direct else images.relu() * images
        return (ops.max_pool2d(inputs, [3, 3], [2, 2], [1, 1], [1, 1], ceil_mode) ** 2).sum()

    expected = torch.func.grad(total)(images)
    reference = images.clone().requires_grad_()
    inputs = reference if direct else reference.relu() * reference
    pooled = nn.functional.max_pool2d(inputs, 3, 2, 1, ceil_mode=ceil_mode)
    assert torch.equal(torch.autograd.grad((pooled**2).sum(), reference)[0], expected)
    compiled = torch.compile(torch.func.grad(total), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_of_weights_and_activations(tiny: Model, precision: str) -> None:
    dtype = getattr(torch, precision)
    features = make_features(tiny, ["5"], precision=precision)
    assert {w.dtype for w in features.weights.values()} == {dtype}
    images = images_for(tiny, 3)
    actual = features.apply(features.weights, images)["5"]
    assert actual.dtype == dtype
    close(actual.float(), by_hook(tiny.module, ["5"], images)["5"], 1e-4 if precision == "float32" else 0.05)
    assert {p.dtype for p in tiny.module.parameters()} == {torch.float32}


@pytest.mark.slow
def test_auto_is_bfloat16_where_the_hardware_has_it(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def dtype(model: Model) -> torch.dtype:
        return next(iter(make_features(model, ["5"]).weights.values())).dtype

    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert dtype(tiny) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert dtype(tiny) == torch.bfloat16
    assert dtype(load_toy(make_tiny().double(), size=TINY_SIZE)) == torch.float64


class Insists(OneConv):
    """Casts its input to float32, which is an error with bfloat16 weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.double().float())


def test_model_that_does_not_run_in_bfloat16_is_an_error_or_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_toy(seeded(Insists), size=8)
    with pytest.raises(ValueError, match="Insists does not run in bfloat16: "):
        make_features(model, ["conv"], precision="bfloat16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with pytest.warns(UserWarning, match="Insists runs in float32, slower than in bfloat16"):
        features = make_features(model, ["conv"])
    assert features.weights["conv.weight"].dtype == torch.float32


def test_unknown_precision_is_an_error(tiny: Model) -> None:
    with pytest.raises(ValueError, match="precision must be one of auto, float32, bfloat16, got 'half'"):
        make_features(tiny, ["5"], precision="half")


@pytest.mark.slow
def test_graph_without_passes_has_the_values_of_the_module_bit_for_bit(tiny: Model) -> None:
    """Folding batch norms changes rounding."""
    module, images = tiny.module.eval(), images_for(tiny, 3)
    expected = by_hook(module, ["5", "1"], images)
    traced = trace(module, {LayerRef("5"): 1, LayerRef("1"): 1}, images)
    plain, optimized = (truncate(traced, traced.layers, optimize=optimize) for optimize in (False, True))
    release(traced)
    actual = plain.apply(plain.weights, images)
    assert all(torch.equal(actual[path], expected[path]) for path in expected)
    assert set(plain.weights) > {"1.running_mean", "1.running_var"}
    assert not any("running" in name for name in make_features(tiny, ["5"]).weights)
    assert not torch.equal(optimized.apply(optimized.weights, images)["5"], expected["5"])


@pytest.mark.slow
def test_traced_module_can_be_truncated_more_than_once(tiny: Model) -> None:
    module, images = tiny.module.eval(), images_for(tiny, 2)
    expected = by_hook(module, ["5", "1"], images)
    traced = trace(module, {LayerRef("5"): 1, LayerRef("1"): 1}, images)
    backbones = [
        truncate(traced, layers, optimize=optimize)
        for layers in (["1"], ["5"], ["1", "5"])
        for optimize in (False, True)
    ]
    release(traced)
    for backbone, layers in zip(backbones, (["1"], ["1"], ["5"], ["5"], ["1", "5"], ["1", "5"]), strict=True):
        actual = backbone.apply(backbone.weights, images)
        assert list(actual) == layers
        for path in layers:
            close(actual[path], expected[path])
    assert not any(name.startswith(("3.", "5.")) for name in backbones[0].weights)


def test_graph_is_used_as_traced_where_the_passes_change_it_too_much(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in very deep networks, where rounding switches ReLUs: batch norms are not folded."""
    mismatches = iter(["the gradient differs from the module's by 0.08 of its norm", ""])
    monkeypatch.setattr("featvis_func.backbone.source.find_mismatch", lambda core, reference: next(mismatches))
    traced: list[object] = []
    monkeypatch.setattr("featvis_func.backbone.source.trace", lambda *args: traced.append(trace(*args)) or traced[-1])
    with pytest.warns(UserWarning, match=r"runs as it was traced, slower.*with them the gradient differs .* by 0\.08"):
        features = make_features(tiny, ["3"])
    assert features.exported
    assert len(traced) == 1, "tracing takes most of the time"
    assert {"1.weight", "1.running_mean"} <= features.weights.keys()
    images = images_for(tiny, 2)
    close(features.apply(features.weights, images)["3"], by_hook(tiny.module, ["3"], images)["3"], 1e-6)
