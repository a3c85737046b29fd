"""Which layers of torchvision's other models can be rendered, and in which way: detection, segmentation, video, flow.

Per model, three layers are tried: the modules with weights at two fifths and four fifths of those that a forward pass
calls, and the first tensor of the model's own output. Each is rendered for two steps, and its activations for
three images of noise are compared with what a plain forward hook catches. Weights are random.
"""

import gc
import time
import warnings
from typing import Any, NamedTuple

import torch
import torchvision.models
from torch import Tensor, nn

import featvis_func as fv
from benchmarks.common import report
from featvis_func.backbone.hooks import example_images, float_outputs
from featvis_func.backbone.layers import parse_layer, select
from featvis_func.validation import first_line

FAMILIES = ("segmentation", "optical_flow", "video", "detection")
# Sizes at which a step takes seconds on two cores, except for models that are built for one size.
SIZES: dict[str, tuple[int, ...]] = {
    "detection": (128, 128),
    "segmentation": (128, 128),
    "video": (8, 64, 64),
    "optical_flow": (128, 128),
}
FIXED = {"mvit_v1_b": (16, 224, 224), "mvit_v2_s": (16, 224, 224), "s3d": (16, 224, 224)}
SHARES = (0.4, 0.8)


class Row(NamedTuple):
    """One layer of one model."""

    model: str
    layer: str
    shape: tuple[int, ...] | None
    path: str
    """``"export"``, ``"fallback"`` or ``"refused"``."""
    why: str
    difference: float | None
    """Largest difference from a plain hook's values, relative to the largest value."""
    status: str
    seconds: float


def main(device: str, rounds: int) -> None:
    """Try all models and write ``results/coverage-DEVICE.json``; ``rounds`` is ignored."""
    rows: list[Row] = []
    for family in FAMILIES:
        for name in torchvision.models.list_models(getattr(torchvision.models, family)):
            rows += try_model(name, FIXED.get(name, SIZES[family]), device)
            print(f"{name}: {', '.join(row.path for row in rows if row.model == name)}", flush=True)
            gc.collect()
        _report(rows, device)  # after each family, since all of them take a quarter of an hour


def _report(rows: list[Row], device: str) -> None:
    cells = [
        (
            row.model,
            row.layer,
            "-" if row.shape is None else " x ".join(map(str, row.shape)),
            row.path,
            "-" if row.difference is None else f"{row.difference:.1e}",
            row.status,
            row.why,
        )
        for row in rows
    ]
    header = ("model", "layer", "shape", "path", "difference", "status", "why")
    paths = [row.path for row in rows]
    counts = {path: paths.count(path) for path in sorted(set(paths))}
    report("coverage", device, {"counts": counts, "layers": [row._asdict() for row in rows]}, [header, *cells])


def try_model(name: str, size: tuple[int, ...], device: str) -> list[Row]:
    """Render some layers of a model, two steps of one filter each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fv.load_model(f"torchvision:{name}@none")._replace(size=size)
    resize: Any = getattr(model.module, "transform", None)
    if hasattr(resize, "min_size"):  # detection models enlarge images to 800 pixels
        resize.min_size, resize.max_size = (min(size),), max(size)
    return [_try_layer(name, model, layer, device) for layer in chosen_layers(model)]


def chosen_layers(model: fv.Model) -> list[str]:
    """Layers with weights at some fractions of a model's depth, and the tensors that it returns."""
    called = [
        layer.name for layer in fv.list_layers(model) if layer.filters and hasattr(_module(model, layer.name), "weight")
    ]
    chosen = [called[min(int(share * len(called)), len(called) - 1)] for share in SHARES]
    images = example_images(model, model.module)
    try:
        output = float_outputs(model, model.module, images)[0].path
    except ValueError:  # a list of detections
        output = "output"
    return [*dict.fromkeys(chosen), output]


def _module(model: fv.Model, name: str) -> nn.Module:
    return model.module.get_submodule(parse_layer(model.module, name).module)


def _try_layer(name: str, model: fv.Model, layer: str, device: str) -> Row:
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            features = fv.make_features(model, [layer], device=device, precision="float32")
            result = fv.render(model, layer, [0], features=features, steps=2, size=model.size, progress=False)  # type: ignore
        why = next((str(w.message) for w in caught if "could not be exported" in str(w.message)), "")
        difference = _difference(model, layer, features)
        path = "export" if features.exported else "fallback"
        why = why.partition("could not be exported: ")[2]
        return Row(name, layer, features.shapes[layer], path, why, difference, result.status[0], _since(start))
    except ValueError as error:
        return Row(name, layer, None, "refused", first_line(error), None, "-", _since(start))


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 1)


def _difference(model: fv.Model, layer: str, features: fv.Features) -> float:
    """The largest difference between the features and what a plain hook catches, for three images of noise."""
    ref = parse_layer(model.module, layer)
    images = example_images(model, model.module)
    caught: list[Tensor] = []

    def keep(child: nn.Module, args: Any, output: Any) -> None:
        value = select(output, ref.parts)
        assert value is not None
        caught.append(value.clone())

    handle = model.module.get_submodule(ref.module).register_forward_hook(keep)
    try:
        with torch.no_grad():
            model.module(images)
            values = features.apply(features.weights, images)[layer]
    finally:
        handle.remove()
    expected = caught[-1]
    if values.shape != expected.shape:  # channels last
        expected = expected.movedim(-1, 1)
    return float((values - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
