"""Names of layers: the part of the output that they select, and the meaning of its axes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import swin_t

import featvis_func as fv
from featvis_func.backbone.layers import axes_of, canonical, parse_layer, resolve_layer, tensors_in
from featvis_func.sweep.plan import select_layers
from tests.toys import load_toy


class Tokens(nn.Module):
    """Attention (which returns a tuple), a module that returns a dictionary, and a convolution over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.both = Both()
        self.mix = nn.Conv1d(8, 6, 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.mix(self.both(tokens)["deep"][1].transpose(1, 2)).mean(-1)


class Both(nn.Module):
    """Returns a dictionary that contains a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)
        self.back = nn.Linear(5, 8)

    def forward(self, tokens: Tensor) -> dict[str, object]:
        narrow = self.linear(tokens)
        return {"narrow": narrow, "deep": (None, self.back(narrow))}


class LastChannels(nn.Module):
    """Returns channels last; ``even`` has as many channels as rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.widen = nn.Linear(6, 8)
        self.even = nn.GELU()
        self.narrow = nn.Linear(8, 6)
        self.out = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images).permute(0, 2, 3, 1))
        return self.out(self.narrow(self.even(self.widen(x))))


def toy(kind: type[nn.Module]) -> fv.Model:
    torch.manual_seed(0)
    return load_toy(kind().eval(), size=16)


@pytest.mark.parametrize(
    ("child", "shape", "size", "last", "axes"),
    [
        (nn.Conv2d(3, 8, 1), (8, 8, 8), (64, 64), True, "chw"),
        (nn.BatchNorm2d(8), (8, 4, 4), (64, 64), True, "chw"),
        (nn.GroupNorm(1, 7), (7, 7, 7), (224, 224), True, "chw"),
        (nn.Linear(3, 7), (7, 7, 7), (224, 224), True, "hwc"),
        (nn.LayerNorm(7), (7, 7, 7), (224, 224), True, "hwc"),
        (nn.ReLU(), (7, 7, 7), (224, 224), False, "chw"),  # no module of the model returns channels last
        (nn.ReLU(), (7, 7, 7), (224, 224), True, None),
        (nn.ReLU(), (7, 7, 96), (224, 224), True, "hwc"),
        (nn.ReLU(), (96, 7, 7), (224, 224), True, "chw"),
        (nn.ReLU(), (96, 1, 1), (224, 224), True, "chw"),
        (nn.ReLU(), (1, 1, 96), (224, 224), True, "hwc"),
        (nn.ReLU(), (6, 10, 32), (192, 320), True, "hwc"),
        (nn.ReLU(), (10, 6, 10), (192, 320), True, "chw"),
        (nn.ReLU(), (9, 5, 2), (192, 320), True, None),
        (nn.Linear(3, 4), (5, 4), (64, 64), True, "td"),
        (nn.Conv1d(3, 4, 1), (4, 5), (64, 64), True, "dt"),
        (nn.Identity(), (4,), (64, 64), True, "d"),
    ],
    ids=str,
)
def test_axes_of_infers_the_axes(
    child: nn.Module, shape: tuple[int, ...], size: tuple[int, int], last: bool, axes: str | None
) -> None:
    assert axes_of(child, shape, size, channels_last=last) == axes


@pytest.mark.slow
def test_features_of_swin_have_channels_first() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_toy(swin_t().eval(), size=64)
    names = ("features.0.0", "features.0.1", "features.0.2", "features.1.0", "features.1.0.mlp.1", "features.2", "norm")
    widths = {layer.name: layer.filters for layer in fv.list_layers(model)}
    assert [widths[name] for name in names] == [96, 96, 96, 96, 384, 192, 768]
    features = fv.make_features(model, names)
    assert [features.shapes[name][0] for name in names] == [96, 96, 96, 96, 384, 192, 768]
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    outputs: list[Tensor] = []
    handle = model.module.get_submodule("features.1.0").register_forward_hook(lambda *a: outputs.append(a[2].clone()))
    with torch.no_grad():
        actual = features.apply(features.weights, images)["features.1.0"]
        model.module(images)
    handle.remove()
    torch.testing.assert_close(actual, outputs[0].permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_names_select_parts_of_outputs() -> None:
    model = toy(Tokens)
    names = ["attention[0]", "both[narrow]", "both[deep][1]", "mix"]
    features = fv.make_features(model, names)
    assert features.exported
    assert features.shapes == {
        "attention[0]": (16, 8),
        "both[narrow]": (16, 5),
        "both[deep][1]": (16, 8),
        "mix": (16, 6),
    }
    assert features.paths["attention[0]"] == "attention[0]"
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    module: Any = model.module
    with torch.no_grad():
        actual = features.apply(features.weights, images)
        tokens = module.embed(images).flatten(2).transpose(1, 2)
        attended = module.attention(tokens, tokens, tokens, need_weights=False)[0]
        both = module.both(attended)
    torch.testing.assert_close(actual["attention[0]"], attended, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual["both[narrow]"], both["narrow"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual["both[deep][1]"], both["deep"][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        actual["mix"], module.mix(both["deep"][1].transpose(1, 2)).transpose(1, 2).detach(), rtol=1e-4, atol=1e-5
    )
    listed = {layer.name: (layer.shape, layer.filters) for layer in fv.list_layers(model)}
    assert listed["attention[0]"] == ((16, 8), 8)
    assert listed["both[deep][1]"] == ((16, 8), 8)
    assert listed["mix"] == ((6, 16), 6)
    assert "attention" not in listed


@pytest.mark.slow
def test_render_takes_a_part_of_an_output() -> None:
    model = toy(Tokens)
    result = fv.render(model, "attention[0]:3-4", steps=2)
    assert result.activations.shape == (2, 16)
    assert result.config["layer"] == "attention[0]"
    assert fv.activations_of(model, ["both[narrow]"], torch.rand(3, 16, 16))["both[narrow]"].shape == (16, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "both",
            r"layer 'both' gives a dict instead of a tensor, .*; choose one of 'both\[narrow\]', 'both\[deep\]\[1\]'",
        ),
        ("both[deep][0]", r"layer 'both\[deep\]\[0\]' gives no tensor: 'both' is a dict; choose one of"),
        ("attention[1]", r"layer 'attention\[1\]' gives no tensor: .* a tuple; choose one of 'attention\[0\]'$"),
        ("mix[0]", r"layer 'mix\[0\]' does not exist: 'mix' gives a single tensor; choose one of 'mix'$"),
        ("nothing[0]", r"no layer 'nothing'"),
        ("mix@cwh", r"unknown axes of a layer 'cwh'; expected one of chw"),
        ("mix@chw", r"layer 'mix' gives \(6, 16\) per image, which is not c x h x w"),
    ],
)
def test_unknown_names_are_errors_that_list_what_exists(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fv.make_features(toy(Tokens), [name])


@pytest.mark.slow
def test_ambiguous_axes_must_be_stated() -> None:
    model = toy(LastChannels)
    with pytest.raises(ValueError, match=r"layer 'even' gives \(8, 8, 8\) .*'even@chw' or 'even@hwc'"):
        fv.make_features(model, ["even"])
    assert {layer.name: layer.filters for layer in fv.list_layers(model)}["even"] is None
    features = fv.make_features(model, ["even@hwc", "even@chw", "narrow"])
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    actual = features.apply(features.weights, images)
    assert features.paths == {"even@hwc": "even", "even@chw": "even", "narrow": "narrow"}
    torch.testing.assert_close(actual["even@hwc"], actual["even@chw"].permute(0, 3, 1, 2))
    assert actual["narrow"].shape == (2, 6, 8, 8)
    chosen = select_layers(model, ["even@hwc", "narrow"])
    assert [(layer.name, layer.filters) for layer in chosen] == [("even@hwc", 8), ("narrow", 6)]
    with pytest.raises(ValueError, match=r"'even' gives .* per image, which is not t x d"):
        select_layers(model, ["even@td"])
    result = fv.render(model, "even@hwc:3", steps=2)
    assert result.activations.shape == (1, 8, 8)


def test_stated_axes_do_not_change_the_keys_of_filters() -> None:
    model = toy(LastChannels)
    plain, stated = (fv.render(model, name, 2, steps=2).images for name in ("narrow", "narrow@hwc"))
    assert torch.equal(plain, stated)


def test_parse_layer_reads_the_suffixes_of_a_name() -> None:
    module = nn.ModuleDict({"a@hwc": nn.Identity(), "b[0]": nn.Identity(), "c": nn.Identity()})
    assert parse_layer(module, "a@hwc").module == "a@hwc"
    assert parse_layer(module, "b[0]").module == "b[0]"
    assert resolve_layer(module, "c[0][key]@td") == "c[0][key]"
    assert tensors_in([1, None, (torch.zeros(2),)]).keys() == {"[2][0]"}
    assert canonical(torch.zeros(2, 3, 4), "dt").shape == (2, 4, 3)
