"""Fixtures that the tests of sweeps share."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from featvis_func.models import Model, fingerprint
from featvis_func.rendering import renderer as rendering

_FEATURES: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread: the images are tiny, and several threads wait for each other on a loaded machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cached_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace each pair of a model and a layer only once per session: tracing takes most of the time of a small sweep."""
    make_features = rendering.make_features

    def cached(model: Model, layers: Sequence[str], **options: Any) -> Any:
        key = (model.name, fingerprint(model.module), tuple(layers), *sorted(options.items()))
        if key not in _FEATURES:
            _FEATURES[key] = make_features(model, layers, **options)
        return _FEATURES[key]

    monkeypatch.setattr(rendering, "make_features", cached)
