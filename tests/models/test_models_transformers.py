"""Vision models of transformers, loaded from folders: input, layers and errors."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featvis_func.backbone.features import make_features
from featvis_func.backbone.listing import list_layers
from featvis_func.models import IMAGENET_MEAN, IMAGENET_STD, Model, load_model
from featvis_func.models.huggingface import preset_of
from featvis_func.models.inputs import IMAGE_INPUT, ImageInputs

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
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 2}
# A layer in the middle of each block; its name differs between versions of transformers.
MIDDLE = ("fc1", "intermediate.dense", "pwconv1", "layer.1.convolution")
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
PROCESSOR |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def make_config(kind: str) -> Any:
    options = {**TINY[kind]}
    if kind in ("vit", "dinov2"):
        options |= DEPTH
    if kind == "clip":
        options = {name: part | DEPTH for name, part in options.items()}
    return transformers.AutoConfig.for_model(kind, **options)


def save_model(folder: Path, kind: str, processor: dict[str, Any] | None = PROCESSOR) -> nn.Module:
    """Save a tiny random model with ``save_pretrained`` and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        module = transformers.AutoModel.from_config(make_config(kind)).eval()
    module.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return module


def middle_layer(module: nn.Module) -> str:
    """Return the name of the last layer among ``MIDDLE``."""
    return [name for name, _ in module.named_modules() if name.endswith(MIDDLE)][-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_features_equal_a_forward_hook(tmp_path: Path, kind: str) -> None:
    """The layers have the names that transformers gives them."""
    module = save_model(tmp_path, kind)
    model = load_model(f"transformers:{tmp_path}")
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    tower = module.vision_model if kind == "clip" else module
    assert isinstance(tower, nn.Module)
    layer = middle_layer(tower)
    assert [name for name, _ in model.module.named_modules()] == [name for name, _ in tower.named_modules()]
    assert list(model.module.state_dict()) == list(tower.state_dict())
    features = make_features(model, [layer])
    assert features.exported
    images = torch.randn(2, 3, *model.size, generator=torch.Generator().manual_seed(0))
    outputs: list[Tensor] = []
    handle = tower.get_submodule(layer).register_forward_hook(lambda *a: outputs.append(a[2].clone()))
    with torch.no_grad():
        tower(pixel_values=images)
        actual = features.apply(features.weights, images)[layer]
    handle.remove()
    # ConvNeXt's blocks use channels last, features use channels first.
    expected = outputs[-1].movedim(-1, 1) if kind == "convnext" else outputs[-1]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit@1")  # The @ in the name of a folder does not start a revision.
    save_model(folder, "vit")
    return folder


def test_load_model_reads_a_folder(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(f"transformers:{vit}")
    assert model.size == (32, 32)
    assert not model.module.training
    assert not any(child.training for child in model.module.modules())
    assert model.weights.startswith("model.safetensors sha256:")
    monkeypatch.chdir(vit.parent)
    assert load_model(f"transformers:./{vit.name}").weights == model.weights


def test_random_weights_need_only_the_configuration(vit: Path, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((vit / name).read_bytes())
    before = torch.random.get_rng_state()
    first, second = (load_model(f"transformers:{tmp_path}@none") for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    one, other, trained = (m.module.state_dict() for m in (first, second, load_model(f"transformers:{vit}")))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], trained[name]) for name in one)
    assert first.weights == ""


def test_load_model_replaces_transformers_weights_by_a_file(vit: Path, tmp_path: Path) -> None:
    trained = load_model(f"transformers:{vit}").module.state_dict()
    torch.save(trained, tmp_path / "w.pth")
    model = load_model(f"transformers:{vit}@none", weights=tmp_path / "w.pth")
    assert all(torch.equal(value, trained[name]) for name, value in model.module.state_dict().items())


def test_half_precision_weights_are_converted_to_float32(tmp_path: Path) -> None:
    save_model(tmp_path, "vit").half().save_pretrained(tmp_path)  # type: ignore[operator]
    assert {p.dtype for p in load_model(f"transformers:{tmp_path}").module.parameters()} == {torch.float32}


def test_missing_parameters_warn(tmp_path: Path) -> None:
    save_model(tmp_path, "vit")
    config = make_config("vit")
    with torch.random.fork_rng(devices=[]):
        transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"the weights of .* lack pooler\.dense\.bias, .*, which are initialised at random"
    ) as caught:
        load_model(f"transformers:{tmp_path}")
    assert [warning.filename for warning in caught] == [__file__]


def test_missing_image_processor_warns_and_assumes_imagenet_normalisation(tmp_path: Path) -> None:
    save_model(tmp_path, "vit", None)
    with pytest.warns(UserWarning, match=r"has no image processor .*: assuming ImageNet's mean") as caught:
        model = load_model(f"transformers:{tmp_path}")
    assert [warning.filename for warning in caught] == [__file__]
    assert (model.mean, model.std, model.size) == (IMAGENET_MEAN, IMAGENET_STD, (32, 32))
    assert model.assumed == ("normalisation",)
    stated = load_model(f"transformers:{tmp_path}", value_range=(-1, 1))
    assert (stated.mean, stated.std, stated.assumed) == ((0.5,) * 3, (0.5,) * 3, ())


def test_channels_are_reversed_where_the_processor_says_so(tmp_path: Path) -> None:
    module = save_model(tmp_path, "resnet", {**PROCESSOR, "do_normalize": False})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        reversed_output = ImageInputs(module, {"pixel_values": IMAGE_INPUT}, reverse=True)(images).pooler_output
        assert torch.equal(reversed_output, module(images.flip(1)).pooler_output)
    model = load_model(f"transformers:{tmp_path}")
    assert (model.mean, model.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.slow
def test_inputs_are_those_of_the_whole_model(tmp_path: Path) -> None:
    """Not of its vision tower."""
    module = save_model(tmp_path, "clip")
    tokens = torch.tensor([3, 4, 5, 1])
    model = load_model(f"transformers:{tmp_path}", inputs={"pixel_values": IMAGE_INPUT, "input_ids": tokens})
    assert (model.size, model.assumed) == ((32, 32), ())
    assert [name for name, _ in model.module.named_modules()] == [name for name, _ in module.named_modules()]
    features = make_features(model, ["output[image_embeds]", "output[text_embeds]"], precision="float32")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        actual = features.apply(features.weights, images)
        expected = module(pixel_values=images, input_ids=tokens.expand(2, -1))
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(actual[f"output[{name}]"], expected[name], rtol=1e-4, atol=1e-5)


def test_list_layers_has_no_prefix(vit: Path) -> None:
    model = load_model(f"transformers:{vit}")
    layers = {layer.name: layer.filters for layer in list_layers(model)}
    assert layers[middle_layer(model.module)] == 24
    assert layers["layernorm"] == 16


def test_code_from_a_folder_is_not_run(vit: Path, tmp_path: Path) -> None:
    config = json.loads((vit / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'created')!r})\n")
    with pytest.raises(ValueError, match="requires code from its repository, which is never run") as raised:
        load_model(f"transformers:{tmp_path}")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "created").exists()


def test_text_model_raises(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, **DEPTH}
    transformers.AutoConfig.for_model("bert", **sizes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a BertModel, which does not take images as its only input"):
        load_model(f"transformers:{tmp_path}@none")


@pytest.mark.parametrize("error", [OSError("no route\nand more"), ValueError("Unrecognized model")])
def test_failed_download_raises_one_line_error_with_alternatives(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls: list[Any] = []

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments[-1], options))
        raise error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"could not load transformers:org/name@v1 \(.*'@none'") as raised:
        load_model("transformers:org/name@v1")
    assert "\n" not in str(raised.value)
    assert calls == [("org/name", {"trust_remote_code": False, "revision": "v1"})]


def test_missing_folder_raises() -> None:
    with pytest.raises(ValueError, match=r"no folder '\./nowhere'"):
        load_model("transformers:./nowhere@none")


@pytest.mark.slow
def test_load_model_accepts_a_transformers_module(vit: Path) -> None:
    module = transformers.AutoModel.from_pretrained(vit)
    model = load_model(module, mean=[0.5] * 3, std=[0.5] * 3)
    assert isinstance(model, Model)
    assert model.size == (32, 32)
    assert make_features(model, [middle_layer(module)]).exported


@pytest.mark.parametrize(
    ("attributes", "mean", "std", "size"),
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
def test_preset_of_reads_an_image_processor(attributes: dict[str, Any], mean: Any, std: Any, size: Any) -> None:
    preset = preset_of(SimpleNamespace(**attributes))
    assert (preset.size, preset.reverse) == (size, False)
    assert preset.mean == pytest.approx(mean)
    assert preset.std == pytest.approx(std)


@pytest.mark.parametrize(
    "attributes",
    [
        {"rescale_factor": 1 / 127.5, "rescale_offset": True},
        {"rescale_factor": 1 / 127.5, "rescale_offset": True, "image_mean": [0.3] * 3, "image_std": [0.7] * 3},
        {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
        {"rescale_factor": 1 / 255, "image_mean": [0.3] * 3, "image_std": [0.7] * 3},
    ],
)
def test_preset_of_includes_rescaling_in_the_normalisation(attributes: dict[str, Any]) -> None:
    """Expected: bytes times the factor, minus 1 if there is an offset, then normalised by mean and std."""
    preset = preset_of(SimpleNamespace(**attributes))
    for x in (0.0, 0.25, 1.0):
        value = 255 * x * (attributes["rescale_factor"] if attributes.get("do_rescale", True) else 1.0)
        value -= 1.0 if attributes.get("rescale_offset") else 0.0
        value = (value - attributes.get("image_mean", [0.0])[0]) / attributes.get("image_std", [1.0])[0]
        assert (x - preset.mean[0]) / preset.std[0] == pytest.approx(value)
