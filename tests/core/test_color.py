"""Colour correlation: the published matrix, custom matrices, and the inverse."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad, vmap

from featvis_func.color import correlate, correlation_matrix, decorrelate

PUBLISHED = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])


def test_imagenet_matrix_is_lucids_normalised_by_the_largest_column_norm() -> None:
    matrix = correlation_matrix(3)
    assert matrix is not None
    assert matrix.dtype == torch.float32
    norms = np.linalg.norm(PUBLISHED, axis=0)
    np.testing.assert_allclose(matrix.numpy(), PUBLISHED / norms.max(), rtol=1e-6)
    assert matrix.norm(dim=0).max().item() == pytest.approx(1.0, abs=1e-6)
    assert matrix.norm(dim=0).argmax().item() == 0


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_auto_is_the_identity_unless_there_are_three_channels(channels: int) -> None:
    assert correlation_matrix(channels) is None
    assert correlation_matrix(3, None) is None
    torch.testing.assert_close(correlation_matrix(3, "imagenet"), correlation_matrix(3, "auto"), rtol=0, atol=0)


@pytest.mark.parametrize(
    "matrix",
    [[[1, 2], [3, 4]], np.array([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)],
    ids=["list", "array", "tensor"],
)
def test_custom_matrix_is_a_constant_with_one_row_per_channel(matrix: Any) -> None:
    converted = correlation_matrix(2, matrix)
    assert converted is not None
    assert converted.dtype == torch.float32
    assert not converted.requires_grad
    image = torch.tensor([10.0, 1.0])[:, None, None].expand(2, 3, 4)
    expected = torch.tensor([12.0, 34.0])[:, None, None].expand(2, 3, 4)
    torch.testing.assert_close(correlate(image, converted), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("matrix", [None, "imagenet", [[1.0, 0.5, 0.0], [0.0, 2.0, 1.0], [0.3, 0.0, 1.0]]], ids=str)
def test_decorrelate_inverts_correlate(matrix: Any, dtype: torch.dtype) -> None:
    converted = correlation_matrix(3, matrix)
    image = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    correlated, decorrelated = correlate(image, converted), decorrelate(image, converted)
    assert correlated.dtype == decorrelated.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(decorrelate(correlated, converted), image, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(correlate(decorrelated, converted), image, rtol=tolerance, atol=tolerance)
    if converted is not None:
        assert not torch.allclose(correlated, image, atol=0.1)


@pytest.mark.parametrize(
    ("channels", "correlation", "message"),
    [
        (1, "imagenet", "the colour correlation of 1 channels must be a finite 1 x 1 matrix, got shape (3, 3)"),
        (3, [[1.0, 0.0], [0.0, 1.0]], "must be a finite 3 x 3 matrix, got shape (2, 2)"),
        (2, [1.0, 2.0], "must be a finite 2 x 2 matrix, got shape (2,)"),
        (2, [[1.0, 0.0], [0.0, float("nan")]], "must be a finite 2 x 2 matrix"),
        (2, [[1.0, 0.0], [0.0, float("inf")]], "must be a finite 2 x 2 matrix"),
        (3, "cifar", "unknown colour correlation 'cifar'; expected 'auto', 'imagenet', None or a matrix"),
    ],
)
def test_invalid_correlation_raises_value_error(channels: int, correlation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        correlation_matrix(channels, correlation)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 6), (2, 3, 2, 4, 5)])
def test_compiled_colors_are_a_sum_that_fuses_with_what_surrounds_it(shape: tuple[int, ...]) -> None:
    matrix = correlation_matrix(3)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    operations: list[Any] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        operations.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def total(images: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(vmap(lambda image: correlate(image, matrix))(images)).square().sum()

    compiled = torch.compile(grad(total), fullgraph=True, backend=aot_autograd(fw_compiler=record))
    torch.testing.assert_close(compiled(images), grad(total)(images))
    assert operations
    assert not [name for name in operations if "mm" in name.split(".")[1]]  # mm, bmm, addmm
