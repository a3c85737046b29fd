"""User-provided modules: unusual ones that work, ones without gradients, and missing optional packages."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn

from featvis_func.backbone.features import make_features
from featvis_func.backbone.listing import list_layers
from featvis_func.models import Model, load_model
from featvis_func.rendering.api import render
from tests.toys import TINY_SIZE, load_toy, make_tiny


def without_warnings(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates quantisation and scripting.
        return make()


# --- without gradients or layers ------------------------------------------------------------------------------------


def dynamically_quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), {nn.Linear})


def statically_quantised() -> nn.Module:
    module = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Conv2d(3, 4, 3)).eval()
    module.qconfig = torch.ao.quantization.get_default_qconfig("x86")  # type: ignore[assignment]
    prepared = torch.ao.quantization.prepare(module)
    prepared(torch.rand(1, 3, 8, 8))
    return torch.ao.quantization.convert(prepared)


def graph_quantised() -> nn.Module:
    class Quantise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8).dequantize()

    return torch.fx.symbolic_trace(nn.Sequential(Quantise()))


def with_int8_weight() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4))
    module[0].weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    return module


def with_float8_weight() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4)).to(torch.float8_e4m3fn)


def with_qweight_buffer() -> nn.Module:
    module = nn.Sequential(nn.Module())
    module[0].register_buffer("qweight", torch.zeros(4, dtype=torch.int32))
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (dynamically_quantised, r"layer '1' of Sequential is quantised \(torch\.ao\.nn\.quantized\.dynamic.*Linear\)"),
        (statically_quantised, r"layer '0' of Sequential is quantised \(torch\.ao\.nn\.quantized.*Quantize\)"),
        (graph_quantised, r"Sequential is quantised \(its graph calls quantize_per_tensor\)"),
        (with_int8_weight, r"layer '0' of Sequential is quantised \(its weight is torch\.int8\)"),
        (with_float8_weight, r"layer '0' of Sequential is quantised \(its weight is torch\.float8_e4m3fn\)"),
        (with_qweight_buffer, r"layer '0' of Sequential is quantised \(its qweight is torch\.int32\)"),
        (lambda: torch.jit.script(make_tiny()), r"RecursiveScriptModule is scripted or traced"),
        (lambda: torch.jit.trace(make_tiny(), torch.rand(1, 3, 20, 20)), r"TopLevelTracedModule is scripted or traced"),
        (lambda: nn.Sequential(torch.jit.script(nn.Tanh())), r"layer '0' of Sequential is scripted or traced"),
    ],
)
def test_modules_without_gradients_raise_and_name_the_alternative(make: Callable[[], nn.Module], message: str) -> None:
    module = without_warnings(make)
    for given in (module, Model(module, type(module).__name__, (0.0,) * 3, (1.0,) * 3, (8, 8))):
        with pytest.raises(ValueError, match=message) as raised:
            load_model(given)
        assert "made from" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_quantised_tensor_subclass_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Params4bit(nn.Parameter):
        __module__ = "bitsandbytes.nn.modules"

    module = nn.Linear(3, 4)
    monkeypatch.setattr(module.weight, "__class__", Params4bit)
    with pytest.raises(ValueError, match=r"Linear is quantised \(its weight is a Params4bit\)"):
        load_model(module)


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x0_5"])
def test_torchvision_models_prepared_for_quantisation_are_accepted(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        module = without_warnings(lambda: getattr(torchvision.models.quantization, name)(weights=None, quantize=False))
    assert load_toy(module, size=64).module is module


def test_integer_buffers_are_accepted() -> None:
    module = make_tiny()
    module.register_buffer("index", torch.arange(4))
    module.register_buffer("mask", torch.ones(4, dtype=torch.int8))
    assert load_toy(module, size=TINY_SIZE).module is module


# --- missing packages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [
        ("timm:resnet18@none", "timm", "timm"),
        ("hf-hub:timm/resnet18.a1_in1k", "timm", "timm"),
        ("transformers:google/vit-base-patch16-224", "transformers", "huggingface"),
    ],
)
def test_missing_package_raises_with_install_command(
    monkeypatch: pytest.MonkeyPatch, spec: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}, which is not installed") as raised:
        load_model(spec)
    assert str(raised.value).endswith(f"pip install 'featvis-func[{extra}]'")
    assert spec in str(raised.value)


# --- unusual modules that work --------------------------------------------------------------------------------------


class NonTensorOutput(nn.Module):
    """A module with one input channel whose output is not a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x).relu_()
        logits = self.head(x.mean((-2, -1)))
        if self.kind == "dict":
            return {"logits": logits, "maps": [x], "loss": None, "name": "output"}
        return (logits, x) if self.kind == "tuple" else None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dict", "tuple", "nothing"])
@pytest.mark.filterwarnings("error")
def test_models_with_non_tensor_outputs_are_supported(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_toy(NonTensorOutput(kind), size=(10, 12))
    assert [layer.filters for layer in list_layers(model)] == [4, 2]
    assert make_features(model, ["conv", "head"]).exported
    result = render(model, "conv", [0, 3], steps=2, seed=1)
    assert result.images.shape == (2, 1, 10, 12)
    assert bool((result.images >= 0).all() & (result.images <= 1).all())


def test_input_size_comes_from_the_torchvision_preset() -> None:
    for name, size in (("inception_v3", 299), ("efficientnet_b1", 240)):
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()  # type: ignore[attr-defined]
        assert preset.crop_size == [size], "torchvision has changed this preset"
    assert load_model("torchvision:efficientnet_b1@none").size == (240, 240)


def test_transformer_with_fixed_size_raises_for_another_image_size() -> None:
    with torch.random.fork_rng(devices=[]):
        module = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16).eval()
    with pytest.raises(
        ValueError, match="fails on an image of 3 x 48 x 48: Wrong image height! Expected 32 but got 48!"
    ):
        list_layers(load_toy(module, size=48))


def test_data_dependent_control_flow_falls_back_to_hooks_with_a_warning() -> None:
    class DataDependent(NonTensorOutput):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x if x.mean() > 0 else -x)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_toy(DataDependent("dict"), size=(10, 12))
    with pytest.warns(UserWarning, match="DataDependent runs .* hook, slower and without torch.compile"):
        result = render(model, "conv", [0], steps=2)
    assert result.status == ("ok",)
