"""Models of timm: by name, from a folder, from the hub, and as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featvis_func.backbone.features import list_layers, make_features
from featvis_func.models import IMAGENET_MEAN, IMAGENET_STD, load_model
from featvis_func.validation import table

timm = pytest.importorskip("timm", reason="timm is not installed")

# Small and quick: 1.6 million parameters.
NAME = "mobilenetv3_small_050"


def same_values(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_random_weights_are_the_same_each_time_and_cost_no_draws() -> None:
    before = torch.random.get_rng_state()
    first = load_model(f"timm:{NAME}@none")
    torch.rand(3)
    second = load_model(f"timm:{NAME}@none")
    torch.random.set_rng_state(before)
    assert same_values(first.module, second.module)
    assert not first.module.training
    assert (first.name, first.weights, first.categories) == (f"timm:{NAME}@none", "", ())


@pytest.mark.parametrize(
    ("name", "mean", "std", "size"),
    [
        (NAME, IMAGENET_MEAN, IMAGENET_STD, (224, 224)),
        ("tf_efficientnet_lite1", (0.5,) * 3, (0.5,) * 3, (240, 240)),
        ("test_vit.r160_in1k", (0.5,) * 3, (0.5,) * 3, (160, 160)),
    ],
)
def test_each_brings_its_own_preset(name: str, mean: Any, std: Any, size: tuple[int, int]) -> None:
    preset = timm.get_pretrained_cfg(name)
    assert (preset.mean, preset.std, preset.input_size[1:]) == (mean, std, size), "timm has another preset now"
    model = load_model(f"timm:{name}@none")
    assert (model.mean, model.std, model.size) == (mean, std, size)


def test_own_mean_std_and_size_go_before_the_preset() -> None:
    model = load_model(f"timm:{NAME}@none", mean=[0.1] * 3, std=[0.2] * 3, size=(64, 48))
    assert (model.mean, model.std, model.size) == ((0.1,) * 3, (0.2,) * 3, (64, 48))


def test_a_model_of_a_fixed_size_is_built_for_the_size_asked_for() -> None:
    model = load_model("timm:test_vit@none", size=(32, 48))
    assert model.size == (32, 48)
    assert make_features(model, ["blocks.0.mlp.fc1"]).shapes["blocks.0.mlp.fc1"][0] == 2 * 3 + 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:mobilenetv3_smal_050", rf"timm has no model 'mobilenetv3_smal_050'; did you mean '{NAME}'"),
        ("timm:qqqqqqqqqq@none", r"timm has no model 'qqqqqqqqqq'$"),
        ("timm:", r"timm has no model ''"),
        (f"timm:{NAME}.qqq", rf"{NAME} has no weights 'qqq' in timm; it has lamb_in1k"),
        (f"timm:{NAME}@lamb_in1k", rf"tag behind a dot, .* got '@lamb_in1k'; 'timm:{NAME}@none' has random ones$"),
        ("timm:./nowhere", r"no folder '\./nowhere'"),
        (NAME, rf"unknown model '{NAME}'; did you mean 'timm:{NAME}'\?$"),
        ("hf-hub:resnet18", r"expected 'hf-hub:ORG/NAME\[@REVISION\]', got 'hf-hub:resnet18'"),
        ("hf-hub:/resnet18", r"expected 'hf-hub:ORG/NAME"),
        ("hf-hub:timm/resnet18@none", r"for random weights say 'timm:NAME@none'"),
    ],
)
def test_unknown_names_say_what_exists(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", [f"timm:{NAME}", f"timm:{NAME}.lamb_in1k", "hf-hub:timm/mobilenetv3_small_050@main"])
def test_a_download_that_fails_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    asked: list[Any] = []

    def fail(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        raise OSError("no route to the hub\nand a second line")

    for function in ("load_state_dict_from_hf", "load_state_dict_from_url"):
        monkeypatch.setattr(f"timm.models._builder.{function}", fail)
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", fail)
    with pytest.raises(ValueError, match=r"could not load .* \(no route to the hub\).*'timm:NAME@none'") as caught:
        load_model(spec)
    assert spec in str(caught.value)
    assert "\n" not in str(caught.value)
    assert asked


def test_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What timm fetches is what the model has, and its classes have ImageNet's names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        state = timm.create_model(NAME).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    model = load_model(f"timm:{NAME}.lamb_in1k")
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())
    assert model.weights == f"timm/{NAME}.lamb_in1k"
    assert len(model.categories) == 1000
    assert "goldfish" in model.categories[1]


def test_a_folder_that_timm_wrote(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        source = timm.create_model("test_resnet", num_classes=7)
    timm.models.save_for_hf(source, tmp_path / "mine", safe_serialization=True)
    path = tmp_path / "mine" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64]}
    path.write_text(json.dumps(config))
    model = load_model(f"timm:{tmp_path / 'mine'}")
    assert same_values(model.module, source)
    assert (model.mean, model.std, model.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (64, 64))
    assert model.weights.startswith("model.safetensors sha256:")
    random = load_model(f"timm:{tmp_path / 'mine'}@none")
    assert random.weights == ""
    assert not same_values(random.module, source)


def test_own_weights(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = load_model("timm:test_resnet", weights=tmp_path / "w.pth")
    assert same_values(model.module, source)
    assert model.weights.startswith("w.pth sha256:")


def test_a_module_of_the_users_tells_its_preset() -> None:
    """Also one of a single channel, whose mean and std timm does not know, and one built for another size."""
    model = load_model(timm.create_model("test_vit", img_size=48))
    assert (model.mean, model.std, model.size) == ((0.5,) * 3, (0.5,) * 3, (48, 48))
    one = load_model(timm.create_model("test_resnet", in_chans=1))
    assert (one.mean, one.std, one.size) == ((0.0,), (1.0,), (160, 160))


def test_layers_are_listed() -> None:
    layers = list_layers(load_model("timm:test_vit@none", size=32))
    rows = {layer.name: (layer.type, layer.filters) for layer in layers}
    assert rows["blocks.0.attn.qkv"][0] == "Linear"
    assert rows["head"] == ("Linear", 1000)
    assert table([(layer.name, layer.type) for layer in layers])
