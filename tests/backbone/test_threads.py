"""Threads that trace, compute and render at the same time do not affect one another."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from featvis_func.backbone import forward_pass
from featvis_func.backbone.features import make_features
from featvis_func.models import Model
from featvis_func.rendering.api import render
from tests.toys import TINY_SIZE, load_toy, make_tiny

TRACES = 4


def backend_flags() -> tuple[Any, ...]:
    return torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch._C._get_nnpack_enabled()


class Worker:
    """A thread that computes a model in eager mode and draws random numbers, until it is told to stop."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.module = make_tiny()
        self.images = torch.randn(2, 3, 32, 32, generator=generator)
        with torch.no_grad():
            self.expected = self.module(self.images)
        self.flags = backend_flags()
        self.outputs_equal: list[bool] = []
        self.flags_equal: list[bool] = []
        self.drawn: list[Tensor] = []
        self.undisturbed: list[Tensor] = []
        self.started, self.stop = threading.Event(), threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            with torch.no_grad():
                self.outputs_equal.append(torch.equal(self.module(self.images), self.expected))
            self.flags_equal.append(backend_flags() == self.flags)
            self.drawn.append(torch.rand(3))
            self.started.set()


def work_beside(action: Callable[[], object]) -> Worker:
    """Run an action some times in this thread while a worker runs in another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        worker = Worker()
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            worker.started.wait()
            for _ in range(TRACES):
                action()
                done = len(worker.drawn)
                while len(worker.drawn) < done + 3:  # the worker sees every state that the action leaves behind
                    worker.stop.wait(0.001)
        finally:
            worker.stop.set()
            thread.join()
        torch.manual_seed(7)
        worker.undisturbed = [torch.rand(3) for _ in worker.drawn]
    return worker


@pytest.mark.slow
def test_make_features_does_not_disturb_another_thread() -> None:
    model = load_toy(make_tiny(), size=TINY_SIZE)
    exported: list[bool] = []
    worker = work_beside(lambda: exported.append(make_features(model, ["5"]).exported))
    assert exported == [True] * TRACES
    assert len(worker.drawn) > TRACES
    assert all(worker.outputs_equal)
    assert all(worker.flags_equal)
    assert torch.equal(torch.stack(worker.drawn), torch.stack(worker.undisturbed))


class Switch(nn.Module):
    """Control flow that depends on values, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + 1 if x.sum() > 0 else x)


@pytest.mark.filterwarnings("ignore:Switch runs with a forward hook")
def test_a_failed_trace_does_not_disturb_another_thread() -> None:
    model = load_toy(Switch(), size=8)
    worker = work_beside(lambda: make_features(model, ["conv"]))
    assert all(worker.outputs_equal)
    assert all(worker.flags_equal)
    assert torch.equal(torch.stack(worker.drawn), torch.stack(worker.undisturbed))


def test_random_state_is_restored_only_after_draws_of_its_own_thread() -> None:
    def draw_in_another_thread() -> None:
        thread = threading.Thread(target=lambda: torch.rand(3))
        thread.start()
        thread.join()

    def run(own: bool, other: bool) -> None:
        if own:
            nn.functional.dropout(torch.ones(5))
        if other:
            draw_in_another_thread()

    with torch.random.fork_rng(devices=[]):
        for own, other in ((True, False), (False, True), (True, True), (False, False)):
            torch.manual_seed(0)
            before = torch.get_rng_state()
            _, drew = forward_pass.keeping_random_state(lambda own=own, other=other: run(own, other))
            assert drew == own
            assert torch.equal(torch.get_rng_state(), before) == (own or not other)


class Conditional(nn.Module):
    """An operator that calls functions, which not every way of watching a module supports."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.cond(x.sum() > 0, lambda x: x.relu(), lambda x: x * 2, (x,))


class FlexAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)[:, None]
        return flex_attention(tokens, tokens, tokens)  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:FlexAttention runs with a")
@pytest.mark.parametrize("module", [Conditional(), FlexAttention()], ids=["cond", "flex_attention"])
@pytest.mark.slow
def test_modules_with_operators_of_higher_order_have_features(module: nn.Module) -> None:
    model = load_toy(module.eval(), size=8)
    images = torch.rand(2, 3, 8, 8)
    features = make_features(model, ["conv"])
    torch.testing.assert_close(features.apply(features.weights, images)["conv"], module.conv(images))  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_renders_in_threads_equal_renders_one_after_another(texturenet: Model) -> None:
    layers = ["block1.conv", "block2.conv", "block3.conv", "head"]

    def images(layer: str) -> Tensor:
        return render(texturenet, layer, [0, 1], steps=2, size=32).images

    expected = [images(layer) for layer in layers]
    with ThreadPoolExecutor(len(layers)) as pool:
        assert all(torch.equal(*pair) for pair in zip(pool.map(images, layers), expected, strict=True))
