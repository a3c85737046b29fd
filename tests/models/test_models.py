"""Load models by name, with weights files, and from modules."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models import _api as torchvision_api

from featvis_func.models import IMAGENET_MEAN, IMAGENET_STD, Model, load_model
from featvis_func.models.state_dict import load_weights
from featvis_func.validation import suggest
from featvis_func.zoo import CLASSES, MEAN, SIZE, STD


def have_equal_states(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def make_small(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


class Downloads:
    """Replacement of torchvision's download function: records the URL and returns random weights."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.states: dict[str, dict[str, Tensor]] = {}

    def __call__(self, url: str, **options: Any) -> dict[str, Tensor]:
        del options
        self.urls.append(url)
        name = url.rsplit("/", 1)[1].partition("-")[0]
        extra = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            module = torchvision.models.get_model(name, weights=None, **extra)
        self.states[name] = module.state_dict()
        return self.states[name]


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Downloads:
    loader = Downloads()
    monkeypatch.setattr(torchvision_api, "load_state_dict_from_url", loader)
    return loader


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("unexpected download")

    monkeypatch.setattr(torchvision_api, "load_state_dict_from_url", refuse)


# --- texturenet -----------------------------------------------------------------------------------------------------


def test_texturenet_has_its_input_and_classes() -> None:
    model = load_model("texturenet")
    assert (model.name, model.mean, model.std, model.size) == ("texturenet", MEAN, STD, (SIZE, SIZE))
    assert model.categories == tuple(CLASSES)
    assert model.channels == 3
    assert not model.module.training
    assert have_equal_states(model.module, load_model("texturenet").module)


def test_load_model_returns_a_model_unchanged(texturenet: Model) -> None:
    assert load_model(texturenet) == texturenet
    assert load_model(texturenet).module is texturenet.module


# --- torchvision ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0", "googlenet"])
def test_random_weights_are_reproducible_and_keep_the_global_rng_state(name: str) -> None:
    before = torch.random.get_rng_state()
    first = load_model(f"torchvision:{name}@none")
    torch.rand(3)
    second = load_model(f"torchvision:{name}@none")
    torch.random.set_rng_state(before)
    third = load_model(f"torchvision:{name}@none")
    assert torch.equal(before, torch.random.get_rng_state())
    assert have_equal_states(first.module, second.module)
    assert have_equal_states(first.module, third.module)
    assert not first.module.training
    assert first.weights == ""
    assert first.categories == ()
    assert (first.mean, first.std, first.size) == (IMAGENET_MEAN, IMAGENET_STD, (224, 224))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "weights", "size"),
    [
        ("resnet18", "ResNet18_Weights.IMAGENET1K_V1", 224),
        ("resnet18@IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", 224),
        ("resnet18@DEFAULT", "ResNet18_Weights.IMAGENET1K_V1", 224),
        ("resnet18@ResNet18_Weights.IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", 224),
        ("efficientnet_b1@IMAGENET1K_V2", "EfficientNet_B1_Weights.IMAGENET1K_V2", 240),
        ("mobilenet_v3_small", "MobileNet_V3_Small_Weights.IMAGENET1K_V1", 224),
    ],
)
def test_named_weights_set_input_and_categories_from_their_preset(
    downloads: Downloads, spec: str, weights: str, size: int
) -> None:
    model = load_model(f"torchvision:{spec}")
    (url,) = downloads.urls
    enum = torchvision.models.get_weight(weights)
    assert url == enum.url
    assert model.name == f"torchvision:{spec}"
    assert model.weights == weights
    assert (model.mean, model.std, model.size) == (IMAGENET_MEAN, IMAGENET_STD, (size, size))
    assert model.categories == tuple(enum.meta["categories"])
    assert len(model.categories) == 1000
    assert not model.module.training
    (state,) = downloads.states.values()
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())


def test_normalisation_and_size_come_from_the_preset(downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    class Preset:
        mean, std, crop_size = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), [96]

    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(weights), "transforms", property(lambda self: Preset))
    model = load_model("torchvision:resnet18")
    assert (model.mean, model.std, model.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (96, 96))
    assert len(downloads.urls) == 1


def test_mean_std_and_size_arguments_override_the_preset(downloads: Downloads) -> None:
    model = load_model("torchvision:resnet18", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size=(64, 48))
    assert (model.mean, model.std, model.size) == ((0.5,) * 3, (0.25,) * 3, (64, 48))
    assert downloads.urls


@pytest.mark.parametrize(
    "error",
    [
        OSError("<urlopen error no route>\nand a second line"),
        RuntimeError('invalid hash value (expected "f37072fd", got "00")'),
    ],
)
def test_failed_download_raises_one_line_error_with_alternatives(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(torchvision_api, "load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match=r"could not fetch the weights ResNet18_Weights\.IMAGENET1K_V1") as raised:
        load_model("torchvision:resnet18")
    assert str(error).splitlines()[0] in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "'@none'" in str(raised.value)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", r"unknown model 'resnet18'; did you mean 'torchvision:resnet18'\?$"),
        ("texturnet", r"unknown model 'texturnet'; .*'texturenet', 'torchvision:NAME.*did you mean 'texturenet'"),
        ("", r"unknown model ''; expected 'texturenet', 'torchvision:NAME.*'timm:NAME.* or 'transformers:ORG"),
        ("torchvision:resnet81", r"no model 'resnet81'; did you mean .*'resnet18'"),
        ("torchvision:", r"no model ''"),
        ("torchvison:resnet18", r"unknown model 'torchvison:resnet18'; expected .*'torchvision:NAME"),
        ("torchvision:quantized_resnet50", r"is quantised, .*did you mean 'torchvision:resnet50'\?$"),
        ("torchvision:qqqqqqqq", r"no model 'qqqqqqqq'$"),
        ("torchvision:resnet50@IMAGENET1K_V3", r"'IMAGENET1K_V3'; it has IMAGENET1K_V1, IMAGENET1K_V2$"),
        (
            "torchvision:resnet18@ResNet50_Weights.IMAGENET1K_V2",
            r"'ResNet50_Weights.IMAGENET1K_V2' are not for resnet18, which has IMAGENET1K_V1$",
        ),
        ("torchvision:resnet18@Nothing.V1", r"no weights 'Nothing.V1'; resnet18 has IMAGENET1K_V1$"),
        ("torchvision:resnet18@ResNet18_Weights.V9", r"'ResNet18_Weights.V9'; resnet18 has IMAGENET1K_V1$"),
        ("torchvision:resnet18@a.b.c", r"no weights 'a.b.c'; resnet18 has IMAGENET1K_V1$"),
    ],
)
def test_unknown_names_raise_with_existing_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_model(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("resnet81", ["resnet18", "vgg11"], "; did you mean 'resnet18'?"),
        ("zzz", ["resnet18"], ""),
        ("a", [], ""),
    ],
)
def test_suggest_lists_similar_names(name: str, known: list[str], expected: str) -> None:
    assert suggest(name, known) == expected


# --- user modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_bare_module_is_kept_and_what_is_assumed_is_said(channels: int) -> None:
    module = nn.Sequential(nn.Conv2d(channels, 2, 3)).train()
    with pytest.warns(UserWarning, match="Sequential does not say how its input is normalised: assuming ") as caught:
        model = load_model(module)
    assert len(caught) == 1
    assert "mean= and std=" in str(caught[0].message)
    assert ("ImageNet" in str(caught[0].message)) == (channels == 3)
    assert model.module is module
    assert module.training
    assert model.channels == channels
    expected = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.0,) * channels, (1.0,) * channels)
    assert (model.mean, model.std) == expected
    assert (model.name, model.size, model.categories, model.weights) == ("Sequential", (224, 224), (), "")
    assert model.assumed == ("size", "normalisation")


def test_size_is_inferred_from_image_size() -> None:
    with torch.random.fork_rng(devices=[]):
        module = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16)
    stated: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    assert load_model(module, **stated).size == (32, 32)
    assert load_model(module, **stated).assumed == ()
    assert load_model(module, size=48, **stated).size == (48, 48)


@pytest.mark.filterwarnings("ignore:Linear does not say:UserWarning")
def test_module_without_convolution_has_three_channels() -> None:
    model = load_model(nn.Linear(3, 2))
    assert model.mean == IMAGENET_MEAN
    assert model.assumed == ("size", "channels", "normalisation")
    assert "channels" not in load_model(nn.Linear(224, 2)).assumed  # three channels work


BOTH = {"mean": (0.5, 0.5, 0.5), "std": [1, 2, 3]}


@pytest.mark.parametrize(
    ("given", "mean", "std", "size", "assumed"),
    [
        (BOTH, (0.5,) * 3, (1, 2, 3), (224, 224), ("size",)),
        ({**BOTH, "size": 32}, (0.5,) * 3, (1, 2, 3), (32, 32), ()),
        ({**BOTH, "size": (32, 48)}, (0.5,) * 3, (1, 2, 3), (32, 48), ()),
        ({"mean": torch.tensor([0.25]), "std": np.array([0.5])}, (0.25,), (0.5,), (224, 224), ("size",)),
    ],
)
def test_arguments_override_the_inferred_input(
    given: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...], size: tuple[int, int], assumed: Any
) -> None:
    model = load_model(make_small(), **given)
    assert (model.mean, model.std, model.size, model.assumed) == (mean, std, size, assumed)


@pytest.mark.parametrize(
    ("given", "mean", "std", "message"),
    [
        (
            {"mean": (0.5,) * 3},
            (0.5,) * 3,
            IMAGENET_STD,
            r"given mean= without std=: assuming std \(0\.229, .* state both",
        ),
        ({"std": [1, 2, 3]}, IMAGENET_MEAN, (1, 2, 3), r"given std= without mean=: assuming mean \(0\.485, "),
        ({"mean": [0.5]}, (0.5,), (1.0,), r"assuming std \(1,\); state both"),
        ({"std": (0.5, 0.5)}, (0.0, 0.0), (0.5, 0.5), r"assuming mean \(0, 0\)"),
    ],
)
def test_half_a_normalisation_is_completed_with_a_warning(
    given: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...], message: str
) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        model = load_model(make_small(), size=8, **given)
    assert len(caught) == 1
    assert (model.mean, model.std, model.assumed) == (mean, std, ("normalisation",))


def test_half_a_normalisation_keeps_the_other_half_of_a_preset(texturenet: Model) -> None:
    model = load_model("texturenet", std=(0.5, 0.5, 0.5))
    assert (model.mean, model.std, model.assumed) == (texturenet.mean, (0.5,) * 3, ())


@pytest.mark.filterwarnings("ignore:Sequential does not say:UserWarning")
def test_stating_the_input_of_a_model_ends_the_assumptions() -> None:
    model = load_model(make_small())
    assert model.assumed == ("size", "normalisation")
    assert load_model(model) == model
    assert load_model(model, size=9).assumed == ("normalisation",)
    assert load_model(model, **BOTH).assumed == ("size",)  # type: ignore[arg-type]
    assert load_model(model, value_range=(0, 255)).assumed == ("size",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 0}, r"input size must be whole numbers, at least 1: .* got 0"),
        ({"size": 2.5}, r"input size must be .* got 2\.5"),
        ({"size": True}, r"input size must be .* got True"),
        ({"size": (1, 2, 3, 4)}, r"input size must be .* got \(1, 2, 3, 4\)"),
        ({"mean": 0.5}, r"got mean 0\.5, std None"),
        ({"mean": "abc"}, r"got mean abc"),
        ({"value_range": (1, 0)}, r"value_range must be two numbers \(lo, hi\) with lo < hi, got \(1, 0\)"),
        ({"value_range": 255}, r"value_range must be two numbers .* got 255"),
        ({"size": (32, -1)}, r"got \(32, -1\)"),
        ({"mean": (0.5, 0.5), "std": (1.0,)}, r"one mean and one std above 0 per channel"),
        ({"mean": ()}, r"got mean \(\)"),
        ({"std": (1.0, 0.0, 1.0)}, r"std \(1\.0, 0\.0, 1\.0\)"),
        ({"std": (1.0, -1.0, 1.0)}, r"std above 0"),
        ({"std": (1.0, float("nan"), 1.0)}, r"std above 0"),
        ({"weights": "w.pth"}, r"weights= requires a model name, got a Sequential"),
    ],
)
def test_invalid_arguments_raise(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_model(make_small(), **given)
    assert "\n" not in str(raised.value)


# --- weights files --------------------------------------------------------------------------------------------------


def write(path: Path, state: Any) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


WRAPPERS = {
    "bare": lambda state: state,
    "ordered": OrderedDict,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state, "loss": 0.5},
    "module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "state_dict and module.": lambda state: {"state_dict": {f"module.{n}": v for n, v in state.items()}},
    "without num_batches_tracked": lambda state: {n: v for n, v in state.items() if "num_batches" not in n},
}


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_load_weights_reads_wrapped_torch_files(tmp_path: Path, wrapper: str, suffix: str) -> None:
    source, target = make_small(1), make_small(2)
    path = write(tmp_path / f"w{suffix}", WRAPPERS[wrapper](source.state_dict()))
    load_weights(target, path)
    load_weights(target, str(path))
    assert have_equal_states(source, target)


def test_load_weights_reads_safetensors(tmp_path: Path) -> None:
    source, target = make_small(1), make_small(2)
    load_weights(target, write(tmp_path / "w.safetensors", source.state_dict()))
    assert have_equal_states(source, target)


def test_load_weights_reads_legacy_torch_files(tmp_path: Path) -> None:
    source, target = make_small(1), make_small(2)
    torch.save(source.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    load_weights(target, tmp_path / "w.pth")
    assert have_equal_states(source, target)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_load_model_replaces_torchvision_weights_by_a_file(tmp_path: Path, suffix: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        source = torchvision.models.squeezenet1_1()
    path = write(tmp_path / f"mine{suffix}", source.state_dict())
    model = load_model("torchvision:squeezenet1_1", weights=path)
    assert have_equal_states(model.module, source)
    assert model.weights.startswith(f"mine{suffix} sha256:")
    assert len(model.weights.partition("sha256:")[2]) == 64
    assert not model.module.training


def test_load_model_replaces_texturenet_weights_by_a_file(tmp_path: Path, texturenet: Model) -> None:
    state = {name: value + 1 for name, value in texturenet.module.state_dict().items()}
    model = load_model("texturenet", weights=write(tmp_path / "w.safetensors", state))
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())
    assert have_equal_states(load_model("texturenet").module, texturenet.module)


@pytest.mark.usefixtures("offline")
def test_googlenet_with_weights_file_transforms_its_input(tmp_path: Path) -> None:
    """torchvision's builder does so for its pretrained weights, which were converted from another framework."""
    with torch.random.fork_rng(devices=[]):
        source = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False)
    trunk = {name: value for name, value in source.state_dict().items() if not name.startswith("aux")}
    model = load_model("torchvision:googlenet", weights=write(tmp_path / "w.pth", trunk))
    assert isinstance(model.module, torchvision.models.GoogLeNet)
    assert model.module.transform_input
    assert all(torch.equal(value, trunk[name]) for name, value in model.module.state_dict().items() if name in trunk)


class CreatesFolder:
    """An object that creates a folder when it is unpickled without restrictions."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_pickle_with_code_raises_and_is_not_run(tmp_path: Path) -> None:
    created = tmp_path / "created"
    torch.save({"0.weight": CreatesFolder(str(created))}, tmp_path / "w.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(CreatesFolder(str(created)), protocol=2))
    for name in ("w.pth", "plain.pth"):
        with pytest.raises(ValueError, match="cannot be read") as raised:
            load_weights(make_small(), tmp_path / name)
        assert "\n" not in str(raised.value)
    assert not created.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_file_raises(tmp_path: Path, suffix: str, share: float) -> None:
    path = write(tmp_path / f"w{suffix}", make_small().state_dict())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="cannot be read") as raised:
        load_weights(make_small(), path)
    assert repr(str(path)) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "no weights file"),
        ("absent.safetensors", None, "no weights file"),
        ("w.bin", {"a": torch.zeros(1)}, r"must be a \.safetensors, \.pth or \.pt file"),
        ("w", {"a": torch.zeros(1)}, r"must be a \.safetensors, \.pth or \.pt file"),
        ("w.pth", [torch.zeros(1)], "no state dict of tensors"),
        ("w.pth", {}, "no state dict of tensors"),
        ("w.pth", {"a": 1}, "no state dict of tensors"),
        ("w.pth", torch.zeros(2), "no state dict of tensors"),
    ],
)
def test_file_without_state_dict_raises(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_weights(make_small(), path)


def test_folder_as_weights_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights file"):
        load_weights(make_small(), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {n: v for n, v in state.items() if n != "0.bias"}, r"\(Sequential\): no 0\.bias$"),
        (lambda state: {**state, "9.weight": torch.zeros(1)}, r"unknown 9\.weight$"),
        (
            lambda state: {**state, "0.weight": torch.zeros(4, 1, 3, 3)},
            r"0\.weight is \(4, 1, 3, 3\) instead of \(4, 3, 3, 3\)$",
        ),
        (lambda state: {f"x.{n}": v for n, v in state.items()}, r"no 0\.weight, no 0\.bias, .*, and \d+ more$"),
    ],
)
def test_weights_of_another_architecture_raise_and_leave_the_module_unchanged(
    tmp_path: Path, change: Any, message: str
) -> None:
    path = write(tmp_path / "w.safetensors", change(make_small(1).state_dict()))
    target = make_small(2)
    with pytest.raises(ValueError, match=message) as raised:
        load_weights(target, path)
    assert "\n" not in str(raised.value)
    assert have_equal_states(target, make_small(2))


def test_legacy_file_truncated_anywhere_raises(tmp_path: Path) -> None:
    """Damaged pickles raise many types of exceptions; all become a ValueError."""
    path = tmp_path / "weights.pth"
    torch.save(make_small().state_dict(), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for length in range(0, 600, 7):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cannot be read|hold no state dict"):
            load_weights(make_small(), path)


def test_state_dict_with_integer_keys_raises(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({0: torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="hold no state dict of tensors"):
        load_weights(make_small(), path)


def test_random_weights_do_not_download_a_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("unexpected download")

    monkeypatch.setattr(torchvision_api, "load_state_dict_from_url", fail)
    model = load_model("torchvision:lraspp_mobilenet_v3_large@none")
    assert (model.size, model.assumed) == ((224, 224), ("size",))
