"""A fixture that traces each model once, for the tests of rendering and of the command line."""

from collections.abc import Sequence
from typing import Any

import pytest

from featvis_func.backbone.features import Features, make_features
from featvis_func.models import Model, fingerprint
from featvis_func.rendering import accentuate, activations, resolve

_FEATURES: dict[Any, Features] = {}


@pytest.fixture
def cached_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace each pair of a model and its layers once per process: tracing takes most of the time of a small run."""

    def cached(model: Model, layers: Sequence[str], **options: Any) -> Features:
        key = (model.name, model.size, fingerprint(model.module), tuple(layers), *sorted(options.items(), key=str))
        if key not in _FEATURES:
            _FEATURES[key] = make_features(model, layers, **options)
        return _FEATURES[key]

    for module in (accentuate, activations, resolve):
        monkeypatch.setattr(module, "make_features", cached)
