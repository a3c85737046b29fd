"""The comparison of a truncated graph with the module: in float32 proper, and loud where it costs speed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from featvis_func.backbone import features as features_module
from featvis_func.backbone.features import make_features
from featvis_func.backbone.verify import exact_float32
from featvis_func.models import Model
from tests.toys import OneConv, load_toy


def precisions() -> tuple[str, ...]:
    """How float32 is computed on CUDA, read without the older settings, which refuse a mixture."""
    backends: Any = torch.backends
    return tuple(k.fp32_precision for k in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul))


class Recording(OneConv):
    """Records the settings of each forward pass."""

    seen: list[tuple[str, ...]] = []  # noqa: RUF012  # shared by the copies on purpose

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(precisions())
        return self.conv(x)


def test_module_and_graph_are_compared_without_tf32_which_is_restored() -> None:
    before = precisions()
    Recording.seen.clear()
    make_features(load_toy(Recording(), size=8), ["conv"], precision="float32")
    assert Recording.seen
    # But for those of loading the model, before any comparison.
    assert set(Recording.seen[-3:]) == {("ieee",) * 3}
    assert precisions() == before
    with pytest.raises(KeyError), exact_float32():
        raise KeyError
    assert precisions() == before
    assert torch.backends.cudnn.allow_tf32  # the older setting can still be read


@contextmanager
def emulated_tf32() -> Iterator[None]:
    """Round the operands of convolutions to 10 bits of mantissa, as CUDA does unless it is told not to."""

    def rounded(values: Tensor) -> Tensor:
        bits = values.detach().contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            convolution = func is torch.ops.aten.convolution.default
            if convolution and type(args[0]) is Tensor and precisions()[0] != "ieee":
                args = (rounded(args[0]), rounded(args[1]), *args[2:])
            return func(*args, **(kwargs or {}))

    with Mode():
        yield


def with_statistics(module: nn.Module) -> nn.Module:
    """Batch norms as after training: of very different scales, which folding moves into the kernels."""
    generator = torch.Generator().manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            with torch.no_grad():
                for tensor in (child.running_mean, child.bias):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))  # type: ignore[union-attr]
                for tensor in (child.running_var, child.weight):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * 4 + 0.01)  # type: ignore[union-attr]
    return module


def deep() -> Model:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(12):
        layers += [nn.Conv2d(8 if i else 3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return load_toy(with_statistics(nn.Sequential(*layers)), size=12)


def folded(model: Model) -> bool:
    """Whether the weights of batch norms have gone into those of convolutions."""
    weights = make_features(model, ["35"], precision="float32").weights
    return not any("running" in name for name in weights)


@pytest.mark.slow
def test_tf32_does_not_hide_that_the_changed_graph_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()
    with emulated_tf32(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folded(model)
    # The emulation is strong enough: without the guard the changes are thrown away, with a warning.
    monkeypatch.setattr(features_module, "exact_float32", nullcontext)
    with emulated_tf32(), pytest.warns(UserWarning, match="runs as it was traced, slower.*differ"):
        assert not folded(model)
