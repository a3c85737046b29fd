"""3 x 3 convolutions by Winograd's algorithm."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featvis_func import compiled_weights, load_model, make_features, make_renderer
from featvis_func.backbone.features import Features
from featvis_func.backbone.hardware import Convolution
from featvis_func.cpu import winograd
from featvis_func.cpu.winograd import conv2d_3x3, flip_kernel, transform_kernel, winograd_3x3
from featvis_func.models import Model
from featvis_func.types import Weights

SIZES = [  # images, channels in and out, sides, padding
    (1, (3, 5), (4, 4), (1, 1)),  # one tile
    (2, (3, 5), (8, 12), (1, 1)),  # no partial tiles
    (3, (1, 1), (9, 6), (1, 1)),
    (2, (4, 3), (7, 10), (0, 0)),
    (2, (4, 3), (7, 10), (2, 2)),
    (1, (2, 6), (5, 18), (2, 0)),
    (1, (2, 2), (3, 3), (0, 0)),  # one pixel
]


def random_inputs(
    n: int, channels: tuple[int, int], sides: tuple[int, int], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return images, kernel and bias."""
    generator = torch.Generator().manual_seed(0)
    (c, d), (h, w) = channels, sides
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((n, c, h, w), (d, c, 3, 3), (d,))]


def packings(kernel: Tensor) -> tuple[Tensor, Tensor]:
    return transform_kernel(kernel.detach()), transform_kernel(flip_kernel(kernel.detach()))


def by_winograd(images: Tensor, kernel: Tensor, padding: tuple[int, int]) -> Tensor:
    """Run the algorithm, whatever the size and in eager mode too."""
    return winograd._Winograd.apply(images, kernel, list(padding), *packings(kernel))


@pytest.fixture
def eager_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the transforms to the points and back without compiling them."""
    monkeypatch.setattr(winograd, "_transforms", lambda: (winograd._to_points, winograd._from_points))


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the chunks that the algorithm computes."""
    shapes: list[tuple[int, ...]] = []
    original = winograd._convolve_chunk

    def spy(images: Tensor, transformed: Tensor) -> Tensor:
        shapes.append(tuple(images.shape))
        return original(images, transformed)

    monkeypatch.setattr(winograd, "_convolve_chunk", spy)
    return shapes


@pytest.mark.usefixtures("eager_transforms")
@pytest.mark.parametrize(("n", "channels", "sides", "padding"), SIZES)
def test_winograd_equals_a_convolution_with_its_gradients(
    n: int, channels: tuple[int, int], sides: tuple[int, int], padding: tuple[int, int]
) -> None:
    """In float64, where only errors of the algorithm remain."""
    images, kernel, _ = (t.requires_grad_() for t in random_inputs(n, channels, sides))
    actual, expected = by_winograd(images, kernel, padding), F.conv2d(images, kernel, padding=padding)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad((y**3).sum(), (images, kernel)) for y in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_winograd_equals_a_convolution_with_compiled_transforms() -> None:
    for n, channels, sides, padding in SIZES[1:4]:
        images, kernel, _ = random_inputs(n, channels, sides)
        expected = F.conv2d(images, kernel, padding=padding)
        torch.testing.assert_close(by_winograd(images, kernel, padding), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("eager_transforms")
def test_winograd_is_twice_differentiable() -> None:
    images, kernel, _ = random_inputs(1, (2, 3), (6, 5))

    def second(conv: Callable[[Tensor], Tensor]) -> Tensor:
        first = torch.func.grad(lambda images: (conv(images) ** 3).sum())
        return torch.func.grad(lambda images: (first(images) ** 2).sum())(images)

    torch.testing.assert_close(
        second(lambda images: by_winograd(images, kernel, (1, 1))),
        second(lambda images: F.conv2d(images, kernel, padding=1)),
    )


@pytest.mark.usefixtures("eager_transforms")
def test_winograd_has_a_rounding_error_of_some_1e_5_of_the_largest_value() -> None:
    images, kernel, _ = random_inputs(2, (64, 64), (28, 28), torch.float32)
    exact = F.conv2d(images.double(), kernel.double(), padding=1)
    error = (by_winograd(images, kernel, (1, 1)).double() - exact).abs().max() / exact.abs().max()
    assert error < 5e-5


@pytest.mark.usefixtures("eager_transforms")
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (10**9, [(3, 14, 10, 4)]),
        (36 * 5 * 2 * 3 * 2, [(2, 14, 10, 4), (1, 14, 10, 4)]),  # two images
        (36 * 5 * 2 * 2, [(1, 10, 10, 4), (1, 6, 10, 4)] * 3),  # two rows of tiles
        (1, [(1, 6, 10, 4)] * 9),
    ],
)
def test_winograd_in_chunks_equals_a_convolution(
    size: int, expected: list[tuple[int, ...]], chunks: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, kernel, _ = random_inputs(3, (4, 5), (12, 7))
    monkeypatch.setattr(winograd, "_CHUNK", size)
    torch.testing.assert_close(by_winograd(images, kernel, (1, 1)), F.conv2d(images, kernel, padding=1))
    assert chunks == expected


def compare_compiled_gradients(
    backend: str, bias: bool, argnums: tuple[int, ...], chunks: list[tuple[int, ...]]
) -> None:
    images, kernel, shift = random_inputs(2, (6, 7), (13, 10), torch.float32)
    packed = packings(kernel)

    def total(images: Tensor, kernel: Tensor, shift: Tensor) -> Tensor:
        values = conv2d_3x3(images, kernel, shift if bias else None, [1, 1], *packed)
        return (values**2).sum() + shift.sum()

    gradients = torch.func.grad(total, argnums=argnums)
    expected = gradients(images, kernel, shift)
    assert not chunks
    compiled = torch.compile(gradients, fullgraph=True, backend=backend)
    actual = compiled(images, kernel, shift)
    assert chunks[0] == (2, 18, 14, 6)
    assert chunks[1:] == ([(2, 18, 14, 7)] if 0 in argnums else [])
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(images, kernel, shift)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("eager_transforms")
@pytest.mark.parametrize(
    "argnums", [pytest.param(argnums, marks=pytest.mark.slow) for argnums in ((0,), (2,), (0, 1, 2))] + [(1,)], ids=str
)
def test_conv2d_3x3_compiled_equals_eager_with_all_gradients(
    argnums: tuple[int, ...], chunks: list[tuple[int, ...]]
) -> None:
    """Of arguments of torch.func.grad itself, which torch.compile takes for tensors without gradients."""
    compare_compiled_gradients("aot_eager", True, argnums, chunks)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
def test_conv2d_3x3_compiled_by_inductor_equals_eager_with_all_gradients(
    bias: bool, chunks: list[tuple[int, ...]]
) -> None:
    compare_compiled_gradients("inductor", bias, (0, 1, 2), chunks)


@pytest.mark.slow
@pytest.mark.usefixtures("eager_transforms")
def test_conv2d_3x3_compiled_takes_the_gradients_of_leaves(chunks: list[tuple[int, ...]]) -> None:
    """By ``torch.autograd.grad`` outside of the compiled function, as in training."""
    images, kernel, shift = (t.requires_grad_() for t in random_inputs(2, (6, 7), (13, 10), torch.float32))
    packed = packings(kernel)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def conv(images: Tensor, kernel: Tensor, shift: Tensor) -> Tensor:
        return conv2d_3x3(images, kernel, shift, [1, 1], *packed)

    actual, expected = (
        torch.autograd.grad((values**2).sum(), (images, kernel, shift))
        for values in (conv(images, kernel, shift), F.conv2d(images, kernel, shift, padding=1))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert len(chunks) == 2


@pytest.mark.usefixtures("eager_transforms")
@pytest.mark.parametrize(("n", "dtype"), [(1, torch.float32), (2, torch.float64), (2, torch.bfloat16)], ids=str)
def test_conv2d_3x3_runs_torchs_convolution_for_few_tiles_and_other_dtypes(
    n: int, dtype: torch.dtype, chunks: list[tuple[int, ...]]
) -> None:
    images, kernel, bias = random_inputs(n, (3, 4), (12, 16), dtype)
    packed = packings(kernel)

    def conv(images: Tensor) -> Tensor:
        return conv2d_3x3(images, kernel, bias, [1, 1], *packed)

    actual = torch.compile(conv, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(actual, F.conv2d(images, kernel, bias, padding=1))
    assert not chunks


class Net(nn.Module):
    """A convolution of few channels, and another of many, called twice."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.conv = nn.Conv2d(64, 64, **{"kernel_size": 3, "padding": 1, **settings})

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.conv(torch.relu(self.first(x)))))


@cache
def features_of(**settings: Any) -> tuple[Model, Features]:
    torch.manual_seed(0)
    model = load_model(Net(**settings), size=24, mean=[0.0] * 3, std=[1.0] * 3)
    return model, make_features(model, ["conv"])


def compare_backbone(settings: dict[str, Any], backend: str, chunks: list[tuple[int, ...]]) -> None:
    model, features = features_of(**settings)
    assert features.weights.keys() - {"conv.bias"} == {"first.weight", "first.bias", "conv.weight"}
    weights = compiled_weights(features)
    assert weights.keys() - features.weights.keys() == {"conv.weight.transformed", "conv.weight.flipped"}
    images = torch.rand(2, 3, 24, 24)

    def total(images: Tensor, weights: Weights = features.weights) -> Tensor:
        return (features.apply(weights, images)["conv"] ** 2).sum()

    leaf = images.clone().requires_grad_()
    expected = torch.autograd.grad((model.module(leaf) ** 2).sum(), leaf)[0]
    torch.testing.assert_close(torch.func.grad(total)(images), expected)
    assert not chunks
    for given, count in ((features.weights, 0), (weights, 4)):
        actual = torch.compile(torch.func.grad(total), fullgraph=True, backend=backend)(images, given)
        assert len(chunks) == count
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.usefixtures("eager_transforms")
@pytest.mark.parametrize("settings", [{"bias": False}, {"padding": (1,)}], ids=str)
def test_backbone_runs_winograd_where_it_is_compiled(settings: dict[str, Any], chunks: list[tuple[int, ...]]) -> None:
    compare_backbone(settings, "aot_eager", chunks)


@pytest.mark.slow
def test_backbone_runs_winograd_where_inductor_compiles_it(chunks: list[tuple[int, ...]]) -> None:
    compare_backbone({}, "inductor", chunks)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"padding": (2, 0)}, True),
        ({"stride": (2, 2)}, False),
        ({"dilation": (2, 2), "padding": (2, 2)}, False),
        ({"groups": 2}, False),
        ({"kernel": torch.zeros(64, 64, 5, 5)}, False),
        ({"kernel": torch.zeros(64, 64, 3, 1)}, False),
        ({"kernel": torch.zeros(64, 3, 3, 3)}, False),
        ({"kernel": torch.zeros(64, 64, 3, 3, dtype=torch.float64)}, False),
        ({"padding": (3, 3)}, False),
        ({"padding": "same"}, False),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_winograd_3x3_is_chosen_for_plain_float32_convolutions(settings: dict[str, Any], expected: bool) -> None:
    default = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    convolution = Convolution(**{"kernel": torch.zeros(64, 64, 3, 3), **default, **settings})
    assert (winograd_3x3(convolution) is not None) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"padding": "same"}, False),
        ({"padding_mode": "reflect"}, True),  # torch pads first: it is a convolution without padding
    ],
    ids=str,
)
def test_backbone_has_packed_weights_for_winograd_only(settings: dict[str, Any], expected: bool) -> None:
    _, features = features_of(**settings)
    assert any(name.endswith("transformed") for name in compiled_weights(features)) == expected


@pytest.mark.slow
def test_renderer_packs_weights_if_it_compiles() -> None:
    model, features = features_of()
    assert len(features.packed) == 2
    for compile in (False, True):
        renderer = make_renderer(model, "conv", range(2), features=features, compile=compile)
        assert renderer.weights.keys() - features.weights.keys() == (set(features.packed) if compile else set())


def test_renderer_takes_the_packed_weights_of_its_features() -> None:
    model, features = features_of()
    features = features._replace(weights=compiled_weights(features))
    renderers = [make_renderer(model, "conv", [number], features=features, compile=True) for number in range(2)]
    for renderer in renderers:
        assert all(renderer.weights[name] is features.weights[name] for name in features.weights)


def test_compiled_weights_pack_no_kernels_of_other_dtypes() -> None:
    _, features = features_of()
    cast = {name: weight.to(torch.bfloat16) for name, weight in features.weights.items()}
    assert compiled_weights(features._replace(weights=cast)).keys() == cast.keys()


class Awkward(nn.Module):
    """One number for both axes, a convolution of an unbatched image, and parameters named like packed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, stride=(2,), padding=(1,))  # type: ignore[arg-type]
        self.conv = nn.Conv2d(64, 64, 3, padding=(1,))  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.rand(64, 1, 1))
        self.conv.register_parameter("weight_transformed", self.scale)
        self.conv_weight = nn.ParameterDict({"flipped": nn.Parameter(torch.rand(64, 1, 1))})
        self.picture = nn.Parameter(torch.rand(64, 12, 12))
        self.last = nn.Conv2d(64, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        values = self.conv(torch.relu(self.stem(x))) * self.conv.get_parameter("weight_transformed")
        return self.last(values + self.conv_weight["flipped"] * self.conv(self.picture))


@pytest.mark.slow
@pytest.mark.usefixtures("eager_transforms")
def test_backbone_of_unusual_convolutions_equals_the_module(chunks: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    module = Awkward().eval()
    features = make_features(load_model(module, size=24, mean=[0.0] * 3, std=[1.0] * 3), ["last"])
    assert features.exported
    assert len(features.packed) == 2
    images = torch.rand(2, 3, 24, 24)
    expected = module(images).detach()
    torch.testing.assert_close(features.apply(features.weights, images)["last"], expected)
    compiled = torch.compile(features.apply, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(compiled_weights(features), images)["last"], expected, rtol=1e-3, atol=1e-4)
    assert len(chunks) == 1, "the convolution of the batch, and not that of the unbatched image"
