"""Vision models of transformers, from folders: their input, their layers, and what they are refused for."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featvis_func.backbone.features import list_layers, make_features
from featvis_func.models import IMAGENET_MEAN, IMAGENET_STD, Model, load_model
from featvis_func.models.huggingface import PixelValues, preset_of

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

TINY: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24},
    "dinov2": {"image_size": 28, "patch_size": 14, "hidden_size": 16, "mlp_ratio": 2},
    "convnext": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 32},
    "swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "clip": {
        "vision_config": {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24},
        "text_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "vocab_size": 50,
            "eos_token_id": 1,
            "bos_token_id": 0,
        },
    },
}
DEEP = {"num_hidden_layers": 2, "num_attention_heads": 2}
# Of several names that transformers gave it over its versions, a layer in the middle of every block.
MIDDLE = ("fc1", "intermediate.dense", "pwconv1", "layer.1.convolution")
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
PROCESSOR |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def configured(kind: str) -> Any:
    options = {**TINY[kind]}
    if kind in ("vit", "dinov2"):
        options |= DEEP
    if kind == "clip":
        options = {name: part | DEEP for name, part in options.items()}
    return transformers.AutoConfig.for_model(kind, **options)


def written(folder: Path, kind: str, processor: dict[str, Any] | None = PROCESSOR) -> nn.Module:
    """A folder as ``save_pretrained`` writes it, and the model that it holds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        module = transformers.AutoModel.from_config(configured(kind)).eval()
    module.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return module


def middle(module: nn.Module) -> str:
    """The name of the last layer of its kind."""
    return [name for name, _ in module.named_modules() if name.endswith(MIDDLE)][-1]


@pytest.mark.parametrize("kind", TINY)
def test_a_layer_gives_what_the_model_gives(tmp_path: Path, kind: str) -> None:
    """With the names that transformers itself has for its layers."""
    module = written(tmp_path, kind)
    model = load_model(f"transformers:{tmp_path}")
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    tower = module.vision_model if kind == "clip" else module
    assert isinstance(tower, nn.Module)
    layer = middle(tower)
    assert [name for name, _ in model.module.named_modules()] == [name for name, _ in tower.named_modules()]
    assert list(model.module.state_dict()) == list(tower.state_dict())
    features = make_features(model, [layer])
    assert features.exported
    images = torch.randn(2, 3, *model.size, generator=torch.Generator().manual_seed(0))
    caught: list[Tensor] = []
    handle = tower.get_submodule(layer).register_forward_hook(lambda *a: caught.append(a[2].clone()))
    with torch.no_grad():
        tower(pixel_values=images)
        found = features.apply(features.weights, images)[layer]
    handle.remove()
    # ConvNeXt's blocks work with channels last; features have them first.
    expected = caught[-1].movedim(-1, 1) if kind == "convnext" else caught[-1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit@1")  # an @ in a folder's name is no revision
    written(folder, "vit")
    return folder


def test_a_model_from_a_folder(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(f"transformers:{vit}")
    assert model.size == (32, 32)
    assert not model.module.training
    assert not any(child.training for child in model.module.modules())
    assert model.weights.startswith("model.safetensors sha256:")
    monkeypatch.chdir(vit.parent)
    assert load_model(f"transformers:./{vit.name}").weights == model.weights


def test_random_weights_need_the_configuration_alone(vit: Path, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((vit / name).read_bytes())
    before = torch.random.get_rng_state()
    first, second = (load_model(f"transformers:{tmp_path}@none") for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    one, other, trained = (m.module.state_dict() for m in (first, second, load_model(f"transformers:{vit}")))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], trained[name]) for name in one)
    assert first.weights == ""


def test_own_weights(vit: Path, tmp_path: Path) -> None:
    trained = load_model(f"transformers:{vit}").module.state_dict()
    torch.save(trained, tmp_path / "w.pth")
    model = load_model(f"transformers:{vit}@none", weights=tmp_path / "w.pth")
    assert all(torch.equal(value, trained[name]) for name, value in model.module.state_dict().items())


def test_half_precision_weights_are_read_as_float32(tmp_path: Path) -> None:
    written(tmp_path, "vit").half().save_pretrained(tmp_path)  # type: ignore[operator]
    assert {p.dtype for p in load_model(f"transformers:{tmp_path}").module.parameters()} == {torch.float32}


def test_weights_that_lack_something_say_so(tmp_path: Path) -> None:
    written(tmp_path, "vit")
    config = configured("vit")
    with torch.random.fork_rng(devices=[]):
        transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"the weights of .* lack pooler\.dense\.bias, .*, which are random now"):
        load_model(f"transformers:{tmp_path}")


def test_without_an_image_processor_the_normalisation_is_assumed_aloud(tmp_path: Path) -> None:
    written(tmp_path, "vit", None)
    with pytest.warns(UserWarning, match="comes without an image processor .* assumed to be"):
        model = load_model(f"transformers:{tmp_path}")
    assert (model.mean, model.std, model.size) == (IMAGENET_MEAN, IMAGENET_STD, (32, 32))


def test_a_model_of_the_other_channel_order(tmp_path: Path) -> None:
    module = written(tmp_path, "resnet", {**PROCESSOR, "do_normalize": False})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        mirrored = PixelValues(module, reverse=True)(images).pooler_output
        assert torch.equal(mirrored, module(images.flip(1)).pooler_output)
    model = load_model(f"transformers:{tmp_path}")
    assert (model.mean, model.std) == ((0.0,) * 3, (1.0,) * 3)


def test_layers_are_listed_without_a_prefix(vit: Path) -> None:
    model = load_model(f"transformers:{vit}")
    layers = {layer.name: layer.filters for layer in list_layers(model)}
    assert layers[middle(model.module)] == 24
    assert layers["layernorm"] == 16


def test_the_folders_own_code_is_not_run(vit: Path, tmp_path: Path) -> None:
    config = json.loads((vit / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\n")
    with pytest.raises(ValueError, match="needs code of its own repository, which is never run") as caught:
        load_model(f"transformers:{tmp_path}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_a_model_of_text_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, **DEEP}
    transformers.AutoConfig.for_model("bert", **sizes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a BertModel, which takes no images alone"):
        load_model(f"transformers:{tmp_path}@none")


@pytest.mark.parametrize("error", [OSError("no route\nand more"), ValueError("Unrecognized model")])
def test_a_download_that_fails_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    asked: list[Any] = []

    def fail(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments[-1], options))
        raise error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"could not load transformers:org/name@v1 \(.*'@none'") as caught:
        load_model("transformers:org/name@v1")
    assert "\n" not in str(caught.value)
    assert asked == [("org/name", {"trust_remote_code": False, "revision": "v1"})]


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"no folder '\./nowhere'"):
        load_model("transformers:./nowhere@none")


def test_a_module_of_the_users(vit: Path) -> None:
    module = transformers.AutoModel.from_pretrained(vit)
    model = load_model(module, mean=[0.5] * 3, std=[0.5] * 3)
    assert isinstance(model, Model)
    assert model.size == (32, 32)
    assert make_features(model, [middle(module)]).exported


@pytest.mark.parametrize(
    ("says", "mean", "std", "size"),
    [
        ({"size": 48}, (0.0,) * 3, (1.0,) * 3, (48, 48)),
        ({"size": {"height": 32, "width": 48}}, (0.0,) * 3, (1.0,) * 3, (32, 48)),
        ({"size": {"shortest_edge": 64}, "crop_size": 48, "do_center_crop": True}, (0.0,) * 3, (1.0,) * 3, (48, 48)),
        ({"size": {"shortest_edge": 64}, "crop_size": 48, "do_center_crop": False}, (0.0,) * 3, (1.0,) * 3, (64, 64)),
        ({"size": SimpleNamespace(height=8, width=9)}, (0.0,) * 3, (1.0,) * 3, (8, 9)),
        ({"size": {"longest_edge": 96}}, (0.0,) * 3, (1.0,) * 3, (96, 96)),
        ({"size": [24, 16]}, (0.0,) * 3, (1.0,) * 3, (24, 16)),
        ({}, (0.0,) * 3, (1.0,) * 3, None),
        ({"image_mean": 0.5, "image_std": [0.25]}, (0.5,) * 3, (0.25,) * 3, None),
        ({"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "do_normalize": False}, (0.0,) * 3, (1.0,) * 3, None),
    ],
)
def test_presets(says: dict[str, Any], mean: Any, std: Any, size: Any) -> None:
    found = preset_of(SimpleNamespace(**says))
    assert found[2:] == (size, False)
    assert found[0] == pytest.approx(mean)
    assert found[1] == pytest.approx(std)


@pytest.mark.parametrize(
    "says",
    [
        {"rescale_factor": 1 / 127.5, "rescale_offset": True},
        {"rescale_factor": 1 / 127.5, "rescale_offset": True, "image_mean": [0.3] * 3, "image_std": [0.7] * 3},
        {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
        {"rescale_factor": 1 / 255, "image_mean": [0.3] * 3, "image_std": [0.7] * 3},
    ],
)
def test_rescaling_is_part_of_the_normalisation(says: dict[str, Any]) -> None:
    """By hand: bytes times the factor, minus one where there is an offset, then mean and std."""
    found = preset_of(SimpleNamespace(**says))
    for x in (0.0, 0.25, 1.0):
        value = 255 * x * (says["rescale_factor"] if says.get("do_rescale", True) else 1.0)
        value -= 1.0 if says.get("rescale_offset") else 0.0
        value = (value - says.get("image_mean", [0.0])[0]) / says.get("image_std", [1.0])[0]
        assert (x - found.mean[0]) / found.std[0] == pytest.approx(value)
