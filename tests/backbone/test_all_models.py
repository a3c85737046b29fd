"""The check of ``python -m benchmarks models``, on small models of a dozen families."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torchvision.models
from torch import nn

from benchmarks.models import ModelReport, check, randomized, torchvision_model
from featvis_func.backbone import truncate as truncating
from featvis_func.models import Model, load_model
from tests.toys import load_toy

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
FAST = ("resnet", "vit")
"""The others are marked as slow, and run with ``-m slow``."""


def small(name: str) -> Model:
    make, size = SMALL[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval()
    return randomized(load_toy(module, size=size))


@cache
def report_of(name: str) -> ModelReport:
    return check(small(name) if name in SMALL else torchvision_model(name))


def problems_of(report: ModelReport) -> list[str]:
    return [problem for layer in report.layers for problem in layer.problems]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in (*SMALL, "squeezenet1_1")]
)
def test_truncation_is_correct_at_every_depth(name: str) -> None:
    report = report_of(name)
    assert len(report.layers) == 3
    assert problems_of(report) == []
    assert all(layer.gradient_error < 1e-3 for layer in report.layers)
    first, *_, last = (layer.flops for layer in report.layers)
    assert first < last < report.layers[0].flops_model


@pytest.mark.slow
def test_truncation_of_a_timm_model_is_correct() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    assert problems_of(check(randomized(load_model("timm:test_nfnet@none", size=64)))) == []


def test_check_counts_modules_that_are_not_called() -> None:
    """Attention reads the weights of its output projection and does not call it."""
    report = report_of("vit")
    assert (report.modules, report.uncalled, report.unsupported) == (13, 2, 0)
    assert not any("out_proj" in layer.layer for layer in report.layers)


@pytest.mark.slow
def test_check_reports_a_graph_pass_that_changes_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def change_weights(graph: torch.fx.Graph, weights: dict[str, torch.Tensor], *_: object, **__: object) -> None:
        for name in weights:
            weights[name] = weights[name] * 1.01

    monkeypatch.setattr(truncating, "optimize_graph", change_weights)
    problems = problems_of(check(small("resnet")))
    assert len(problems) == 3
    assert all("after the rewrites" in problem for problem in problems)
