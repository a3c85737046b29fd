"""The status of a filter: whether it had a gradient, and whether its score rose."""

from typing import Any

import pytest
import torch
from torch import nn

import featvis_func as fv
from featvis_func.models import Model
from featvis_func.rendering.api import render
from featvis_func.types import Optimizer
from tests.toys import TINY_SIZE, load_toy, make_tiny

pytestmark = pytest.mark.usefixtures("cached_tracing")

DESCENT = Optimizer(lambda params, key: (), lambda grads, state, params: (-0.01 * grads, state))


def scaled(scale: float) -> Model:
    """The small CNN, with the second convolution scaled."""
    module = make_tiny()
    convolution = module[3]
    assert isinstance(convolution, nn.Conv2d)
    with torch.no_grad():
        for parameter in convolution.parameters():
            parameter.mul_(scale)
    return load_toy(module, size=TINY_SIZE)


# --- flat -----------------------------------------------------------------------------------------------------------


def test_a_filter_whose_score_never_rises_is_flat(tiny: Model) -> None:
    result = render(tiny, "3", [0, 1], steps=5, image=fv.pixel(TINY_SIZE), optimizer=DESCENT, transforms="none")
    assert (result.history[1:] < result.history[0]).all()
    assert result.best_step.tolist() == [0, 0]
    assert result.status == ("flat", "flat")
    assert repr(result).endswith("{'flat': 2})")


def test_a_filter_that_rises_is_ok_and_so_is_one_of_a_single_step(tiny: Model) -> None:
    options = {"image": fv.pixel(TINY_SIZE), "transforms": "none"}
    rising = render(tiny, "3", [0], steps=5, optimizer=fv.optimizer.sgd(0.01), **options)  # pyright: ignore
    assert rising.best_step.tolist() == [4]
    assert rising.status == ("ok",)
    assert render(tiny, "3", [0], steps=1, optimizer=DESCENT, **options).status == ("ok",)  # pyright: ignore


@pytest.mark.slow
def test_a_dead_filter_is_not_flat(tiny: Model) -> None:
    convolution = tiny.module.get_submodule("3")
    with torch.no_grad():
        for parameter in convolution.parameters():
            parameter[1] = 0
    result = render(tiny, "3", [0, 1], steps=4, image=fv.pixel(TINY_SIZE), optimizer=DESCENT, transforms="none")
    assert result.status == ("flat", "dead")


# --- weights of any size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "compile"), [
    *((scale, False) for scale in (1e-30, 1e-20, 1e-12, 1e30)),
    pytest.param(1e-30, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_filters_with_tiny_or_huge_weights_are_rendered_like_others(scale: float, compile: bool) -> None:
    """Few steps: later ones would amplify the rounding of the weights."""
    parts: dict[str, Any] = {"image": "pixel", "transforms": "none"} if compile else {}  # which compile fastest
    expected, result = (render(scaled(s), "3", [0, 5], steps=3, compile=compile, **parts) for s in (1.0, scale))
    assert result.status == expected.status
    assert "dead" not in result.status
    torch.testing.assert_close(result.images, expected.images, rtol=0, atol=0.02)
    torch.testing.assert_close(result.scores / scale, expected.scores, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("optimizer", ["published", "adam", "sgd"])
def test_other_optimizers_do_so_too(optimizer: str) -> None:
    expected, result = (render(scaled(s), "3", [0, 5], steps=3, optimizer=optimizer) for s in (1.0, 2.0**-100))
    assert result.status == expected.status
    torch.testing.assert_close(result.images, expected.images, rtol=0, atol=1e-3)
