"""The check of ``python -m benchmarks models``, on small members of a dozen families."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torchvision.models
from torch import nn

from benchmarks.models import Found, check, enlivened, torchvision_model
from featvis_func.models import Model, load_model

_v = torchvision.models


def densenet() -> nn.Module:
    return _v.DenseNet(growth_rate=4, block_config=(2, 2, 1, 1), num_init_features=8, num_classes=10)


def swin() -> nn.Module:
    return _v.SwinTransformer([4, 4], 8, [1, 2], [1, 2], [4, 4], num_classes=10)


def swin_v2() -> nn.Module:
    block = _v.swin_transformer.SwinTransformerBlockV2
    merging = _v.swin_transformer.PatchMergingV2
    return _v.SwinTransformer([4, 4], 8, [1, 2], [1, 2], [4, 4], num_classes=10, block=block, downsample_layer=merging)


def vit() -> nn.Module:
    return _v.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=10)


def convnext() -> nn.Module:
    setting = _v.convnext.CNBlockConfig
    return _v.ConvNeXt([setting(8, 16, 1), setting(16, None, 1)], num_classes=10)


def resnet() -> nn.Module:
    return _v.ResNet(_v.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def maxvit() -> nn.Module:
    return _v.MaxVit((16, 16), 8, 4, [8], [1], 8, 0.1, num_classes=10)


def mobilenet() -> nn.Module:
    setting = torchvision.models.mobilenetv3.InvertedResidualConfig  # type: ignore[attr-defined]
    rows = [(8, 3, 16, 8, True, "RE", 1, 1), (8, 5, 16, 12, True, "HS", 2, 1)]
    return _v.MobileNetV3([setting(*row, width_mult=1) for row in rows], 16, num_classes=10)


def shufflenet() -> nn.Module:
    return _v.ShuffleNetV2([1, 2, 1], [8, 16, 24, 32, 40], num_classes=10)


SMALL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "densenet": (densenet, 32),
    "swin": (swin, 32),
    "swin_v2": (swin_v2, 32),
    "vit": (vit, 32),
    "convnext": (convnext, 32),
    "resnet": (resnet, 64),
    "maxvit": (maxvit, 16),
    "mobilenet": (mobilenet, 32),
    "shufflenet": (shufflenet, 32),
}
WHOLE = ("squeezenet1_1",)


def small(name: str) -> Model:
    make, size = SMALL[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval()
    return enlivened(load_model(module, size=size))


@cache
def checked(name: str) -> Found:
    return check(small(name) if name in SMALL else torchvision_model(name))


@pytest.mark.parametrize("name", [*SMALL, *WHOLE])
def test_truncation_is_right_at_every_depth(name: str) -> None:
    found = checked(name)
    assert len(found.layers) == 3
    assert [find_mismatch for layer in found.layers for find_mismatch in layer.faults] == []
    assert all(layer.gradient_error < 1e-3 for layer in found.layers)
    first, *_, last = (layer.flops for layer in found.layers)
    assert first < last < found.layers[0].flops_whole


@pytest.mark.parametrize("name", ["test_nfnet"])
def test_truncation_of_timms_small_ones(name: str) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    found = check(enlivened(load_model(f"timm:{name}@none", size=64)))
    assert [find_mismatch for layer in found.layers for find_mismatch in layer.faults] == []


def test_modules_that_are_not_called_are_counted() -> None:
    """The projection behind attention is read by attention's own function, not called."""
    found = checked("vit")
    assert (found.modules, found.uncalled, found.unfit) == (13, 2, 0)
    assert not any("out_proj" in layer.layer for layer in found.layers)


def test_a_wrong_graph_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check would say of a rewrite that changes values, and of a layer that the whole model never reaches."""
    import featvis_func.backbone.export as export

    def spoil(graph: torch.fx.Graph, weights: dict[str, torch.Tensor], *_: object, **__: object) -> None:
        for name in weights:
            weights[name] = weights[name] * 1.01

    monkeypatch.setattr(export, "optimise", spoil)
    faults = [find_mismatch for layer in check(small("resnet")).layers for find_mismatch in layer.faults]
    assert len(faults) == 3
    assert all("after the rewrites" in find_mismatch for find_mismatch in faults)
