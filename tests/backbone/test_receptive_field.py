"""Receptive fields against those computed from kernels and strides, and against gradients."""

import re

import pytest
import torch
from torch import Tensor, nn

from featvis_func import make_features
from featvis_func.backbone.receptive_field import Field, receptive_fields
from featvis_func.models import Model
from tests.toys import load_toy


def expected_ends(steps: list[tuple[int, int, int, int]], length: int) -> list[list[int]]:
    """Return the half-open range of pixels of each position, from (kernel, stride, padding, dilation) of each layer."""
    pixels = [{pixel} for pixel in range(length)]
    for kernel, stride, padding, dilation in steps:
        count = (len(pixels) + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        inputs = [[i * stride - padding + k * dilation for k in range(kernel)] for i in range(count)]
        pixels = [set().union(*(pixels[i] for i in own if 0 <= i < len(pixels))) for own in inputs]
    return [[min(own), max(own) + 1] for own in pixels]


STACKS: dict[str, list[tuple[str, int, int, int, int]]] = {
    "one": [("conv", 3, 1, 1, 1)],
    "stem": [("conv", 7, 2, 3, 1), ("pool", 3, 2, 1, 1), ("conv", 3, 1, 1, 1)],
    "unpadded": [("conv", 5, 1, 0, 1), ("pool", 2, 2, 0, 1), ("conv", 3, 2, 0, 1), ("average", 2, 2, 0, 1)],
    "dilated": [("conv", 3, 1, 2, 2), ("conv", 3, 1, 4, 4)],
    "patches": [("conv", 8, 8, 0, 1), ("conv", 1, 1, 0, 1)],
    "deep": [("conv", 3, 1, 1, 1)] * 4 + [("pool", 2, 2, 0, 1)] + [("conv", 3, 1, 1, 1)] * 2,
}


def stack(steps: list[tuple[str, int, int, int, int]]) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for kind, kernel, stride, padding, dilation in steps:
            if kind == "conv":
                layers += [nn.Conv2d(width, 8, kernel, stride, padding, dilation), nn.ReLU()]
                width = 8
            else:
                layers.append((nn.MaxPool2d if kind == "pool" else nn.AvgPool2d)(kernel, stride, padding))
    return nn.Sequential(*layers)


def fields_of(model: Model, layer: str, batch_size: int = 32) -> Field:
    h, w = model.size
    field = receptive_fields(make_features(model, [layer]), (model.channels, h, w), batch_size=batch_size)[layer]
    assert field is not None
    return field


@pytest.mark.slow
@pytest.mark.parametrize("size", [(56, 40)], ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_fields_follow_from_kernels_strides_and_padding(name: str, size: tuple[int, int]) -> None:
    module = stack(STACKS[name])
    field = fields_of(load_toy(module, size=size), str(len(module) - 1))
    for ends, length in ((field.rows, size[0]), (field.columns, size[1])):
        assert ends.tolist() == expected_ends([step[1:] for step in STACKS[name]], length)


def test_field_of_a_dead_unit_is_that_of_the_others() -> None:
    """Its gradient is zero everywhere."""
    module = stack(STACKS["one"])
    conv = module[0]
    assert isinstance(conv, nn.Conv2d)
    conv.bias = nn.Parameter(torch.full((8,), -3.0))
    assert not module(torch.rand(1, 3, 16, 16)).any()
    assert fields_of(load_toy(module, size=16), "1").size == (3, 3)


@pytest.mark.slow
def test_gradients_are_zero_outside_of_the_field() -> None:
    torch.manual_seed(1)
    model = load_toy(stack(STACKS["stem"]), size=48)
    features = make_features(model, ["3"])
    field = fields_of(model, "3", batch_size=7)
    image = torch.randn(1, 3, 48, 48, requires_grad=True)
    values = features.apply(features.weights, image)["3"]
    for row, column in ((0, 0), (5, 4), (11, 11)):
        (gradient,) = torch.autograd.grad(values[0, :, row, column].sum(), image, retain_graph=True)
        pixels = gradient[0].abs().sum(0).nonzero()
        (top, bottom), (left, right) = field.rows[row].tolist(), field.columns[column].tolist()
        assert pixels[:, 0].min() >= top
        assert pixels[:, 0].max() < bottom
        assert pixels[:, 1].min() >= left
        assert pixels[:, 1].max() < right


def test_fields_of_branches_asymmetric_kernels_and_global_pools() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.tall = nn.Conv2d(3, 4, (1, 7), padding=(0, 3)), nn.Conv2d(3, 4, (5, 1), padding=(2, 0))
            self.both, self.gated, self.head = nn.Identity(), nn.Identity(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.both(torch.cat([self.wide(x), self.tall(x)], 1))
            x = self.gated(x * x.mean((2, 3), keepdim=True).sigmoid())
            return self.head(x.mean((2, 3)))

    features = make_features(load_toy(Net(), size=24), ["wide", "both", "gated", "head"])
    fields = receptive_fields(features, (3, 24, 24))
    assert {name: field and field.size for name, field in fields.items()} == {
        "wide": (1, 7),
        "both": (5, 7),
        "gated": (24, 24),
        "head": None,
    }


@pytest.mark.slow
def test_fields_of_squeezenet(squeezenet: Model) -> None:
    """conv 7/2, pool 3/2: 7 + 2 * 2 = 11; two fire modules: 11 + 2 * 8."""
    small = squeezenet._replace(size=(64, 64))
    assert fields_of(small, "features.3.squeeze").size == (11, 11)
    assert fields_of(small, "features.4.expand3x3").size == (27, 27)


def test_windows_at_borders_are_shifted_inside() -> None:
    field = fields_of(load_toy(stack(STACKS["stem"]), size=48), "4")
    assert field.size == (19, 19)
    boxes = field.boxes(torch.tensor([[0, 0], [5, 5], [11, 0]]))
    assert boxes.tolist() == [[0, 0, 19, 19], [11, 11, 30, 30], [0, 29, 19, 48]]


@pytest.mark.parametrize("shape", [(3, 4, 20, 20), (3, 20)])
def test_receptive_fields_of_videos_and_signals_are_refused(tiny: Model, shape: tuple[int, ...]) -> None:
    features = make_features(tiny, ["0"])
    message = (
        rf"receptive fields are measured for models of images \(c, h, w\), got an input of {re.escape(str(shape))}"
    )
    with pytest.raises(ValueError, match=message):
        receptive_fields(features, shape)
