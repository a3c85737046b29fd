"""3 x 3 convolutions by Winograd's algorithm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featvis_func import compiled_weights, load_model, make_features, make_renderer
from featvis_func.cpu import winograd
from featvis_func.cpu.winograd import conv2d_3x3, flip_kernel, transform_kernel
from featvis_func.types import Weights

SIZES = [  # images, channels in and out, sides, padding
    (1, (3, 5), (4, 4), (1, 1)),  # one tile
    (2, (3, 5), (8, 12), (1, 1)),  # whole tiles
    (3, (1, 1), (9, 6), (1, 1)),
    (2, (4, 3), (7, 10), (0, 0)),
    (2, (4, 3), (7, 10), (2, 2)),
    (1, (2, 6), (5, 18), (2, 0)),
    (1, (2, 2), (3, 3), (0, 0)),  # one pixel
]


def drawn(
    n: int, channels: tuple[int, int], sides: tuple[int, int], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Images, kernel, bias."""
    draw = torch.Generator().manual_seed(0)
    (c, d), (h, w) = channels, sides
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in ((n, c, h, w), (d, c, 3, 3), (d,))]


def by_winograd(images: Tensor, kernel: Tensor, padding: tuple[int, int]) -> Tensor:
    """Whether it pays or not."""
    transformed = transform_kernel(kernel.detach()), transform_kernel(flip_kernel(kernel.detach()))
    return winograd._Winograd.apply(images, kernel, list(padding), *transformed)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the pieces that go through the algorithm."""
    seen: list[tuple[int, ...]] = []
    original = winograd._convolve_piece

    def spy(images: Tensor, transformed: Tensor) -> Tensor:
        seen.append(tuple(images.shape))
        return original(images, transformed)

    monkeypatch.setattr(winograd, "_convolve_piece", spy)
    return seen


@pytest.mark.parametrize(("n", "channels", "sides", "padding"), SIZES)
def test_values_and_gradients_are_those_of_a_convolution(
    n: int, channels: tuple[int, int], sides: tuple[int, int], padding: tuple[int, int]
) -> None:
    """In float64, where nothing but the algorithm could differ."""
    images, kernel, _ = (t.requires_grad_() for t in drawn(n, channels, sides))
    found, wanted = by_winograd(images, kernel, padding), F.conv2d(images, kernel, padding=padding)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad((y**3).sum(), (images, kernel)) for y in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_twice_differentiable() -> None:
    images, kernel, _ = drawn(1, (2, 3), (6, 5))

    def second(conv: Callable[[Tensor], Tensor]) -> Tensor:
        first = torch.func.grad(lambda images: (conv(images) ** 3).sum())
        return torch.func.grad(lambda images: (first(images) ** 2).sum())(images)

    torch.testing.assert_close(
        second(lambda images: by_winograd(images, kernel, (1, 1))),
        second(lambda images: F.conv2d(images, kernel, padding=1)),
    )


def test_rounding_is_some_1e_5_of_the_largest_value() -> None:
    images, kernel, _ = drawn(2, (64, 64), (28, 28), torch.float32)
    exact = F.conv2d(images.double(), kernel.double(), padding=1)
    error = (by_winograd(images, kernel, (1, 1)).double() - exact).abs().max() / exact.abs().max()
    assert error < 5e-5


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (10**9, [(3, 14, 10, 4)]),
        (36 * 5 * 2 * 3 * 2, [(2, 14, 10, 4), (1, 14, 10, 4)]),  # two images
        (36 * 5 * 2 * 2, [(1, 10, 10, 4), (1, 6, 10, 4)] * 3),  # two rows of tiles
        (1, [(1, 6, 10, 4)] * 9),
    ],
)
def test_pieces_make_the_same(
    size: int, expected: list[tuple[int, ...]], pieces: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, kernel, _ = drawn(3, (4, 5), (12, 7))
    monkeypatch.setattr(winograd, "_PIECE", size)
    torch.testing.assert_close(by_winograd(images, kernel, (1, 1)), F.conv2d(images, kernel, padding=1))
    assert pieces == expected


@pytest.mark.parametrize("bias", [True, False])
def test_compiled_it_is_the_same_as_in_eager_mode(bias: bool, pieces: list[tuple[int, ...]]) -> None:
    images, kernel, shift = drawn(2, (6, 7), (13, 10), torch.float32)
    transformed = transform_kernel(kernel), transform_kernel(flip_kernel(kernel))

    def total(images: Tensor, kernel: Tensor, shift: Tensor) -> Tensor:
        values = conv2d_3x3(images, kernel, shift if bias else None, [1, 1], *transformed)
        return (values**2).sum() + shift.sum()

    gradients = torch.func.grad(total, argnums=(0, 1, 2))
    wanted = gradients(images, kernel, shift)
    assert not pieces
    compiled = torch.compile(gradients, fullgraph=True)
    found = compiled(images, kernel, shift)
    assert pieces == [(2, 18, 14, 6), (2, 18, 14, 7)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled(images, kernel, shift)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "compiled again"
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("n", "dtype"), [(1, torch.float32), (2, torch.float64), (2, torch.bfloat16)], ids=str)
def test_few_tiles_and_other_types_go_the_usual_road(n: int, dtype: torch.dtype, pieces: list[tuple[int, ...]]) -> None:
    images, kernel, bias = drawn(n, (3, 4), (12, 16), dtype)

    def conv(images: Tensor) -> Tensor:
        return conv2d_3x3(images, kernel, bias, [1, 1], transform_kernel(kernel), transform_kernel(flip_kernel(kernel)))

    torch.testing.assert_close(torch.compile(conv, fullgraph=True)(images), F.conv2d(images, kernel, bias, padding=1))
    assert not pieces


class Net(nn.Module):
    """A convolution of few channels, and another of many, called twice."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.conv = nn.Conv2d(64, 64, **{"kernel_size": 3, "padding": 1, **settings})

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.conv(torch.relu(self.first(x)))))


def features_of(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = load_model(Net(**settings).to(dtype), size=24, mean=[0.0] * 3, std=[1.0] * 3)
    return model, make_features(model, ["conv"])


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"padding": 0}, {"padding": (1,)}], ids=str)
def test_a_backbone_takes_it_where_it_is_compiled(settings: dict[str, Any], pieces: list[tuple[int, ...]]) -> None:
    model, features = features_of(**settings)
    assert features.weights.keys() - {"conv.bias"} == {"first.weight", "first.bias", "conv.weight"}
    weights = compiled_weights(features)
    assert weights.keys() - features.weights.keys() == {"conv.weight.transformed", "conv.weight.flipped"}
    images = torch.rand(2, 3, 24, 24)

    def total(images: Tensor, weights: Weights = features.weights) -> Tensor:
        return (features.apply(weights, images)["conv"] ** 2).sum()

    reference = images.clone().requires_grad_()
    wanted = torch.autograd.grad((model.module(reference) ** 2).sum(), reference)[0]
    torch.testing.assert_close(torch.func.grad(total)(images), wanted)
    assert not pieces
    for given, count in ((features.weights, 0), (weights, 4)):
        found = torch.compile(torch.func.grad(total), fullgraph=True)(images, given)
        assert len(pieces) == count
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"kernel_size": 5},
        {"kernel_size": (3, 1), "padding": 0},
        {"padding": 3},
        {"padding": "same"},
        {"padding_mode": "reflect"},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_other_convolutions_stay_as_they_are(settings: dict[str, Any]) -> None:
    _, features = features_of(**{"dtype": torch.float32, **settings})
    taken = any(name.endswith("transformed") for name in compiled_weights(features))
    # Padded by torch beforehand, it is one without padding.
    assert taken == ("padding_mode" in settings)


@pytest.mark.parametrize("compile", [False, True])
def test_a_renderer_makes_the_forms_where_it_compiles(compile: bool) -> None:
    model, features = features_of()
    renderer = make_renderer(model, "conv", range(2), compile=compile)
    assert renderer.weights.keys() - features.weights.keys() == (set(features.packed) if compile else set())
    assert len(features.packed) == 2


def test_kernels_of_another_type_have_no_forms() -> None:
    _, features = features_of()
    cast = {name: weight.to(torch.bfloat16) for name, weight in features.weights.items()}
    assert compiled_weights(features._replace(weights=cast)).keys() == cast.keys()


def test_forms_that_are_there_already_are_kept() -> None:
    model, features = features_of()
    features = features._replace(weights=compiled_weights(features))
    renderers = [make_renderer(model, "conv", [number], features=features, compile=True) for number in range(2)]
    for renderer in renderers:
        assert all(renderer.weights[name] is features.weights[name] for name in features.weights)


class Awkward(nn.Module):
    """Settings of one number for both axes, a convolution of a single picture, and parameters named as forms are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, stride=(2,), padding=(1,))  # type: ignore[arg-type]
        self.conv = nn.Conv2d(64, 64, 3, padding=(1,))  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.rand(64, 1, 1))
        self.conv.register_parameter("weight_taps", self.scale)
        self.conv_weight = nn.ParameterDict({"flipped": nn.Parameter(torch.rand(64, 1, 1))})
        self.picture = nn.Parameter(torch.rand(64, 12, 12))
        self.last = nn.Conv2d(64, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.conv(torch.relu(self.stem(x))) * self.conv.get_parameter("weight_taps")
        return self.last(seen + self.conv_weight["flipped"] * self.conv(self.picture))


def test_what_cannot_go_this_way_is_exported_all_the_same(pieces: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    module = Awkward().eval()
    features = make_features(load_model(module, size=24, mean=[0.0] * 3, std=[1.0] * 3), ["last"])
    assert features.exported
    assert len(features.packed) == 2
    images = torch.rand(2, 3, 24, 24)
    wanted = module(images).detach()
    torch.testing.assert_close(features.apply(features.weights, images)["last"], wanted)
    found = torch.compile(features.apply, fullgraph=True)(compiled_weights(features), images)["last"]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert len(pieces) == 1, "the batch's convolution, and not the single picture's"
