"""timm models: by name, from a folder, from the hub, and as modules."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featvis_func.backbone.features import make_features
from featvis_func.backbone.listing import list_layers
from featvis_func.models import IMAGENET_MEAN, IMAGENET_STD, load_model
from featvis_func.validation import table

timm = pytest.importorskip("timm", reason="timm is not installed")

# A small and fast model: 1.6 million parameters.
NAME = "mobilenetv3_small_050"


def have_equal_states(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_random_weights_are_reproducible_and_keep_the_global_rng_state() -> None:
    before = torch.random.get_rng_state()
    first = load_model(f"timm:{NAME}@none")
    torch.rand(3)
    second = load_model(f"timm:{NAME}@none")
    torch.random.set_rng_state(before)
    assert have_equal_states(first.module, second.module)
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
def test_input_comes_from_the_preset(name: str, mean: Any, std: Any, size: tuple[int, int]) -> None:
    preset = timm.get_pretrained_cfg(name)
    assert (preset.mean, preset.std, preset.input_size[1:]) == (mean, std, size), "timm has changed this preset"
    model = load_model(f"timm:{name}@none")
    assert (model.mean, model.std, model.size) == (mean, std, size)


def test_mean_std_and_size_arguments_override_the_preset() -> None:
    model = load_model(f"timm:{NAME}@none", mean=[0.1] * 3, std=[0.2] * 3, size=(64, 48))
    assert (model.mean, model.std, model.size) == ((0.1,) * 3, (0.2,) * 3, (64, 48))


@pytest.mark.slow
def test_transformer_is_built_for_the_given_size() -> None:
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
        (
            f"timm:{NAME}@lamb_in1k",
            rf"tag after a dot, .* got '@lamb_in1k'; use 'timm:{NAME}@none' for random weights$",
        ),
        ("timm:./nowhere", r"no folder '\./nowhere'"),
        (NAME, rf"unknown model '{NAME}'; did you mean 'timm:{NAME}'\?$"),
        ("hf-hub:resnet18", r"expected 'hf-hub:ORG/NAME\[@REVISION\]', got 'hf-hub:resnet18'"),
        ("hf-hub:/resnet18", r"expected 'hf-hub:ORG/NAME"),
        ("hf-hub:timm/resnet18@none", r"use 'timm:NAME@none' for random weights"),
    ],
)
def test_unknown_names_raise_with_existing_names(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_model(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("spec", [f"timm:{NAME}", f"timm:{NAME}.lamb_in1k", "hf-hub:timm/mobilenetv3_small_050@main"])
def test_failed_download_raises_one_line_error_with_alternatives(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    calls: list[Any] = []

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        raise OSError("no route to the hub\nand a second line")

    for function in ("load_state_dict_from_hf", "load_state_dict_from_url"):
        monkeypatch.setattr(f"timm.models._builder.{function}", fail)
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", fail)
    with pytest.raises(ValueError, match=r"could not load .* \(no route to the hub\).*'timm:NAME@none'") as raised:
        load_model(spec)
    assert spec in str(raised.value)
    assert "\n" not in str(raised.value)
    assert calls


def test_pretrained_weights_are_loaded_with_imagenet_categories(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has the downloaded values, and its classes are named after ImageNet's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        state = timm.create_model(NAME).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    model = load_model(f"timm:{NAME}.lamb_in1k")
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())
    assert model.weights == f"timm/{NAME}.lamb_in1k"
    assert len(model.categories) == 1000
    assert "goldfish" in model.categories[1]


def test_load_model_reads_a_folder_written_by_timm(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        source = timm.create_model("test_resnet", num_classes=7)
    timm.models.save_for_hf(source, tmp_path / "mine", safe_serialization=True)
    path = tmp_path / "mine" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64]}
    path.write_text(json.dumps(config))
    model = load_model(f"timm:{tmp_path / 'mine'}")
    assert have_equal_states(model.module, source)
    assert (model.mean, model.std, model.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (64, 64))
    assert model.weights.startswith("model.safetensors sha256:")
    random = load_model(f"timm:{tmp_path / 'mine'}@none")
    assert random.weights == ""
    assert not have_equal_states(random.module, source)


def test_load_model_replaces_timm_weights_by_a_file(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = load_model("timm:test_resnet", weights=tmp_path / "w.pth")
    assert have_equal_states(model.module, source)
    assert model.weights.startswith("w.pth sha256:")


def test_input_of_a_timm_module_comes_from_its_preset() -> None:
    """Includes a module built for another size, and one with a single channel, for which the preset does not apply."""
    model = load_model(timm.create_model("test_vit", img_size=48))
    assert (model.mean, model.std, model.size) == ((0.5,) * 3, (0.5,) * 3, (48, 48))
    assert model.assumed == ()
    with pytest.warns(UserWarning, match=r"ResNet does not say .*: assuming mean \(0,\) and std \(1,\)"):
        one = load_model(timm.create_model("test_resnet", in_chans=1))
    assert (one.mean, one.std, one.size) == ((0.0,), (1.0,), (160, 160))
    assert one.assumed == ("normalisation",)


def test_list_layers_lists_the_layers_of_a_transformer() -> None:
    layers = list_layers(load_model("timm:test_vit@none", size=32))
    rows = {layer.name: (layer.type, layer.filters) for layer in layers}
    assert rows["blocks.0.attn.qkv"][0] == "Linear"
    assert rows["head"] == ("Linear", 1000)
    assert table([(layer.name, layer.type) for layer in layers])
