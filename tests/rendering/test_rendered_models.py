"""The models that are rendered, each traced anew: known architectures, and what a rendering leaves behind."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featvis_func.backbone.features import make_features
from featvis_func.models import Model, load_model
from featvis_func.rendering.api import render
from tests.rendering.results import check_consistent
from tests.toys import TINY_SIZE, OneConv, load_toy, make_tiny

SQUEEZENET_LAYER = "features.9.expand3x3"


def test_model_that_cannot_be_exported_is_not_compiled() -> None:
    class Branches(OneConv):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x if x.sum() > 0 else -x)

    model = load_toy(Branches(), size=8)
    warning = "runs with a forward hook, slower and without torch.compile, since it could not be exported: "
    with pytest.warns(UserWarning, match=f"Branches {warning}"):
        check_consistent(render(model, "conv", steps=2), 2)
    with (
        pytest.warns(UserWarning, match=warning),
        pytest.raises(
            ValueError, match=r"Branches cannot be exported and therefore not be compiled; use compile=False"
        ),
    ):
        render(model, "conv", steps=1, compile=True)


@pytest.mark.slow
def test_module_is_left_unchanged() -> None:
    module = make_tiny().train()
    module[1].eval()
    module[3].requires_grad_(False)
    calls: list[int] = []
    module[5].register_forward_hook(lambda *_: calls.append(1))
    module[0].register_forward_pre_hook(lambda *_: calls.append(2))

    def state() -> tuple[Any, ...]:
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return (
            [child.training for child in module.modules()],
            [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in module.modules()],
            {n: (id(t), t._version, t.requires_grad, t.dtype, t.device, t.grad) for n, t in tensors.items()},
            {n: t.tolist() for n, t in module.state_dict().items()},
        )

    before = state()
    expected = render(load_toy(make_tiny(), size=TINY_SIZE), "5", steps=2)
    result = render(load_toy(module, size=TINY_SIZE), "5", steps=2)
    assert state() == before
    assert torch.equal(result.images, expected.images)
    # Hooks that only look run while features are made, to see that they do not change anything.
    looked, calls[:] = len(calls), []
    render(load_toy(module, size=TINY_SIZE), "5", steps=5)
    assert len(calls) == looked


@pytest.mark.slow
def test_renderings_leave_no_tensors_and_hooks_behind(tiny: Model) -> None:
    def live_tensors() -> int:
        gc.collect()
        # The type, and not isinstance: fake tensors in torch.export's own caches hold no memory, and some lazy modules
        # of torch are imported when they are asked for their class.
        return sum(type(o) in (Tensor, nn.Parameter, nn.Buffer) for o in gc.get_objects())

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.module.modules())

    for _ in range(2):
        render(tiny, "5", [0, 1], steps=1)
    before = live_tensors()
    for _ in range(6):
        render(tiny, "5", [0, 1], steps=1)
    assert live_tensors() <= before + 5
    assert hooks() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.slow
def test_module_of_another_precision(dtype: torch.dtype) -> None:
    result = render(load_toy(make_tiny().to(dtype), size=TINY_SIZE), "3", [0, 1], steps=8)
    assert result.status == ("ok", "ok")
    assert result.images.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer", "size"),
    [
        ("googlenet", "4c.branch4.1.conv", 96),
        ("resnet18", "layer3.1.conv2", 96),
    ],
)
def test_known_architectures(name: str, layer: str, size: int) -> None:
    model = load_model(f"torchvision:{name}@none", size=size)
    result = render(model, layer, [1, 3], steps=2)
    check_consistent(result, 2)
    assert {*result.status} <= {"ok", "flat"}  # a second step as large as this need not raise the score
    assert result.config["layer"].endswith(layer)
    assert result.images.shape == (2, 3, size, size)


@pytest.mark.slow
def test_scores_of_squeezenet_filters_rise(squeezenet: Model) -> None:
    filters = [0, 3, 5, 7]
    result = render(squeezenet, SQUEEZENET_LAYER, filters, steps=16)
    check_consistent(result, 16)
    assert result.status == ("ok",) * 4
    noise = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (squeezenet.mean, squeezenet.std))
    features = make_features(squeezenet, [SQUEEZENET_LAYER])

    def scores(images: Tensor) -> Tensor:
        """``(n, 4)``: the scores of the four filters for each image."""
        maps = features.apply(features.weights, (images - mean) / std)[SQUEEZENET_LAYER]
        return maps[:, filters].mean((2, 3))

    start, spread = result.history[0], result.history.std(0)
    assert (result.scores > start).all()
    of_images, of_noise = scores(result.images), scores(noise).diagonal()
    assert (of_images.diagonal() > of_noise + spread).all()
    # No other of the four images raises a filter's score as much as its own image does.
    assert ((of_images - of_noise).argmax(0) == torch.arange(4)).all()
