"""Models that several test modules share."""

import os

import pytest
import torch

from benchmarks.evaluate import load_squeezenet
from featvis_func.models import Model, load_model
from tests.toys import TINY_SIZE, make_tiny


def pytest_configure(config: pytest.Config) -> None:
    """Workers that share the cores take one each, and so does what they start."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def plain_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every processor computes in float32 by default, so that equal tests hold on all of them."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """torch.compile remembers sizes by code object and makes them symbolic at the second: no test sees another's."""
    torch._dynamo.reset()


@pytest.fixture
def tiny() -> Model:
    """Made anew for each test, so that a test may change it."""
    return load_model(make_tiny(), size=TINY_SIZE)


@pytest.fixture(scope="session")
def texturenet() -> Model:
    return load_model("texturenet")


@pytest.fixture(scope="session")
def squeezenet() -> Model:
    """SqueezeNet 1.0 with its ImageNet weights; tests that need it are skipped where the file is not there."""
    module = load_squeezenet()
    if module is None:
        pytest.skip("no SqueezeNet weights: neither FEATVIS_WEIGHTS nor ../shared/weights leads to them")
    return load_model(module)
