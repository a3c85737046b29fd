"""Activation and saturation over time: how soon does the library reach what the published script reaches in 128 steps?

Measured on layers of two trained models: SqueezeNet, if the file of its weights exists, and TextureNet, whose input
size and normalisation differ from those that the published script was written for (:mod:`benchmarks.reference`
describes what is scaled). The library runs with ``transforms="small"`` and ``optimizer="activation"``, which raise the
activation soonest; the default prefers images that another network recognises (:mod:`benchmarks.transfer`). Scores are
those of :mod:`benchmarks.evaluate`, of the best image of the run, computed outside of the timed sections. The two
methods run alternately, so that other load on the machine affects both.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import featvis_func as fv
from benchmarks.common import RESULTS, Case, cases, contact_sheet, report
from benchmarks.evaluate import evaluate
from benchmarks.reference import Progress, make_reference_step
from benchmarks.step import FILTERS, LibraryStep

# Early, middle and late.
SQUEEZENET_LAYERS = ("features.4.expand3x3", "features.9.expand3x3", "features.12.expand1x1")
TEXTURENET_LAYERS = ("block4.conv", "block6.conv")
# Steps of the published script's one run after which its images are scored.
PUBLISHED_STEPS = (8, 16, 32, 64, 128)
# Steps of the library's runs: separate runs, since the learning rate depends on the length of the run.
LIBRARY_STEPS = (12, 16, 20, 24, 28, 32, 64)
# Largest saturation of the library's images relative to the published script's: higher activation by saturated pixels
# does not count.
MAX_SATURATION_RATIO = 1.25


class Point(NamedTuple):
    """Scores of one method after some steps."""

    steps: int
    seconds: float
    robust: float
    plain: float
    saturation: float


class Comparison(NamedTuple):
    """The published script's last point against the library's first run that matches it; ``None`` where none does."""

    steps_to_match: int | None
    time_ratio: float | None
    """Seconds of the published script divided by those of the library."""
    saturation_ratio: float | None
    """Saturation of the library's images divided by the published script's; meaningless where the latter is near 0."""
    saturation_published: float
    saturation_library: float | None


def trained_cases(device: str) -> list[Case]:
    """Return each layer that is compared; those of SqueezeNet only if the file of its weights exists."""
    squeezenet = [case for case in cases(("squeezenet1_0",), device) if case.trained]
    compared = [case._replace(layer=layer) for case in squeezenet for layer in SQUEEZENET_LAYERS]
    texturenet = fv.load_model("texturenet")
    texturenet = texturenet._replace(module=texturenet.module.to(device))
    return compared + [Case(texturenet.name, texturenet, layer, True) for layer in TEXTURENET_LAYERS]


def measure(case: Case, device: str) -> tuple[list[Point], list[Point], Tensor]:
    """Run both methods.

    Returns:
        The points of the published script's run; the points of the library, one per run; and images ``(2 n, 3, h, w)``:
        the published script's last ones, then those of the library's first run that matches, or of its last run.
    """
    model, filters = case.model, list(FILTERS)
    size = model.size[0]

    def start_published() -> Callable[[], Progress]:
        return make_reference_step(model.module, case.layer, filters, input_size=size, mean=model.mean, std=model.std)

    def point(method: str, steps: int, seconds: float, images: Tensor) -> Point:
        score = evaluate(images, model.module, case.layer, filters, input_size=size, mean=model.mean, std=model.std)
        new = Point(steps, seconds, score.robust, score.plain, score.saturation)
        values = "  ".join(f"{name} {value:.4g}" for name, value in new._asdict().items())
        print(f"{case.name} {case.layer}  {method:16}  {values}", flush=True)
        return new

    start_published()()  # warm-up
    published_step = start_published()
    published: list[Point] = []
    library: list[Point] = []
    library_images: list[Tensor] = []
    done, total_seconds, published_images = 0, 0.0, torch.empty(0)
    for turn, steps in enumerate(LIBRARY_STEPS):
        run = LibraryStep(case, device, steps=steps, transforms="small", optimizer="activation")
        with fv.kept_memory(device == "cpu"):
            run()  # warm-up
            run.state = run.initial
            seconds = _timed(run, steps, device)[0]
        library_images.append(run.state.best.image)
        library.append(point("featvis_func", steps, seconds, library_images[-1]))
        # Then the next part of the published script's run.
        last = turn == len(LIBRARY_STEPS) - 1
        for until in PUBLISHED_STEPS[turn:] if last else PUBLISHED_STEPS[turn : turn + 1]:
            seconds, progress = _timed(published_step, until - done, device)
            done, total_seconds = until, total_seconds + seconds
            published_images = torch.stack([b.image for b in progress.best])
            published.append(point("published script", until, total_seconds, published_images))
    match = first_match(published, library)
    return published, library, torch.cat([published_images, library_images[-1 if match is None else match]])


def first_match(published: Sequence[Point], library: Sequence[Point]) -> int | None:
    """Index of the library's first run with at least the published script's final robust activation.

    Its saturation must be at most :data:`MAX_SATURATION_RATIO` times the published script's.
    """
    final = published[-1]
    max_saturation = MAX_SATURATION_RATIO * max(final.saturation, 0.001)  # a smaller share is not visible
    return next((i for i, p in enumerate(library) if p.robust >= final.robust and p.saturation <= max_saturation), None)


def compare(published: Sequence[Point], library: Sequence[Point]) -> Comparison:
    """Compare the published script's last point with the library's first run that matches it."""
    final, match = published[-1], first_match(published, library)
    if match is None:
        return Comparison(None, None, None, final.saturation, None)
    run = library[match]
    ratio = run.saturation / max(final.saturation, 1e-6)
    return Comparison(run.steps, final.seconds / run.seconds, ratio, final.saturation, run.saturation)


def _timed(call: Callable[[], Any], times: int, device: str) -> tuple[float, Any]:
    """Call a function some times; return the seconds that took, and the last result."""
    start, result = time.perf_counter(), None
    for _ in range(times):
        result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main(device: str, rounds: int) -> None:
    """Print each point when it is measured, then the comparison; write both, and the images of both methods.

    Each run is timed once: ``rounds`` has no effect.
    """
    todo = trained_cases(device)
    if not any(case.name == "squeezenet1_0" for case in todo):
        print("quality: measuring TextureNet only; set FEATVIS_WEIGHTS to the file of SqueezeNet's weights for both")
    data: dict[str, dict[str, object]] = {}
    table: list[list[object]] = [["model layer", *Comparison._fields]]
    RESULTS.mkdir(exist_ok=True)
    for case in todo:
        published, library, images = measure(case, device)
        comparison = compare(published, library)
        name = f"{case.name} {case.layer}"
        data[name] = {
            "layer": case.layer,
            "size": case.model.size[0],
            "filters": len(FILTERS),
            "published script": [p._asdict() for p in published],
            "featvis_func": [p._asdict() for p in library],
            **comparison._asdict(),
        }
        table.append([name, *("-" if value is None else value for value in comparison)])
        contact_sheet(images, rows=2).save(RESULTS / f"quality-{case.name}-{case.layer}.png")
    report("quality", device, {"cases": data}, table)
