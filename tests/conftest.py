"""Settings of the test processes, and models that several test modules share."""

import os
from collections.abc import Iterator

import pytest
import torch

from benchmarks.evaluate import load_squeezenet
from featvis_func.models import Model, load_model
from tests.cached_tracing import cached_tracing as cached_tracing
from tests.toys import SIGNAL_SIZE, TINY_SIZE, VIDEO_SIZE, load_toy, make_signal_net, make_tiny, make_video_net


def pytest_configure(config: pytest.Config) -> None:
    """Give each pytest-xdist worker, and the processes that it starts, a single thread."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def plain_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide bfloat16 instructions, so that ``precision="auto"`` means float32 on every machine."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Reset torch.compile, which would make a size symbolic if the same code had another size in an earlier test."""
    torch._dynamo.reset()


@pytest.fixture
def tiny() -> Model:
    """A small random CNN, made anew for each test, which may therefore change it."""
    return load_toy(make_tiny(), size=TINY_SIZE)


@pytest.fixture
def video_model() -> Model:
    """A small random model of videos, made anew for each test."""
    return load_model(make_video_net(), size=VIDEO_SIZE)


@pytest.fixture
def signal_model() -> Model:
    """A small random model of signals, made anew for each test."""
    return load_model(make_signal_net(), size=SIGNAL_SIZE, mean=(0.5, 0.5), std=(0.25, 0.5))


@pytest.fixture(scope="session")
def texturenet() -> Model:
    """The built-in texturenet."""
    return load_model("texturenet")


@pytest.fixture(scope="session")
def squeezenet() -> Model:
    """SqueezeNet 1.0 with its ImageNet weights; tests that need it are skipped if the file is missing."""
    module = load_squeezenet()
    if module is None:
        pytest.skip("no SqueezeNet weights at FEATVIS_WEIGHTS or in ../shared/weights")
    return load_toy(module, size=224)  # normalised as torchvision's preset says


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread: for tiny images, where several threads wait for each other on a loaded machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
