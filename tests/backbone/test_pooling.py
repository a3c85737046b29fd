"""Adaptive average pools with a deterministic gradient, as they run on devices without a specialization."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from featvis_func.backbone import hardware
from featvis_func.backbone import truncate as truncating
from featvis_func.backbone.features import make_features
from featvis_func.backbone.pooling import adaptive_mean
from tests.toys import load_toy

POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 3, 7, 7), (7, 7)),
        ((2, 3, 14, 21), (7, 7)),
        ((2, 3, 13, 9), (6, 4)),
        ((1, 2, 5, 3), (7, 7)),  # more windows than values: they overlap
        ((2, 3, 8, 8), (1, 1)),
        ((2, 3, 8, 9), (None, 2)),
        ((2, 3, 10), (4,)),
        ((1, 2, 5, 6, 7), (2, 3, 4)),
    ],
    ids=str,
)
def test_adaptive_mean_is_torchs_adaptive_average_pool(shape: tuple[int, ...], size: tuple[int | None, ...]) -> None:
    dtype = torch.float64
    values = torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    gradients = []
    for pool in (adaptive_mean, POOLS[len(size)]):
        leaf = values.clone().requires_grad_()
        output = pool(leaf, size)  # type: ignore[arg-type]
        cotangent = torch.linspace(-1, 1, output.numel(), dtype=dtype).reshape(output.shape)
        (gradient,) = torch.autograd.grad(output, leaf, cotangent)
        gradients += [(output, gradient)]
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1])


class Operations(TorchDispatchMode):
    """Collects the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_a_network_with_an_adaptive_pool_takes_no_operation_that_is_not_deterministic_on_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """VGG and AlexNet pool to 7 x 7 and 6 x 6."""
    monkeypatch.setattr(truncating, "specialization", lambda device_type: hardware.GENERIC)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((6, 5)), nn.Flatten(), nn.Linear(120, 8))
    features = make_features(load_toy(net.eval(), size=20), ["4"], precision="float32")

    def score(images: Tensor) -> Tensor:
        return features.apply(features.weights, images)["4"].square().sum()

    with Operations() as operations:
        torch.func.grad(score)(torch.rand(2, 3, 20, 20))
    assert features.exported
    assert not [name for name in operations.names if "adaptive" in name]
