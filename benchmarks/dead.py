"""Filters behind a ReLU that start dead: how many there are, and which method revives how many of them.

A filter is dead if its score has no gradient. For three layers of SqueezeNet behind their ReLU, with ImageNet weights,
the gradient of every filter at the first step is computed, with small random transforms and the default initial image;
likewise for the convolutions before the ReLUs. Then the filters that start dead are rendered with each method, and some
of the others, which a method must not change for the worse. All else is :func:`featvis_func.activation_optimizer`.
Scores are those of :mod:`benchmarks.evaluate`, of the best image. Images and the network's input are 128 pixels wide,
so that the benchmark takes minutes; how many filters start dead at 224 pixels is counted as well.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import featvis_func as fv
from benchmarks.common import RESULTS, Case, cases, contact_sheet, report
from benchmarks.evaluate import evaluate
from featvis_func.optimizer import adam, add_noise, chain, linear_decay, normalize_gradient
from featvis_func.rendering.optimizers import activation_optimizer

LAYERS = ("features.12.expand3x3", "features.9.expand3x3", "features.4.expand3x3")
RELU = "_activation"  # suffix of the name of the ReLU behind a layer
SIZE = 128  # pixels
STEPS = 32
REDIRECT = 16
ALIVE = 8  # number of filters with a gradient per layer that are rendered as well
BATCH = 8
SHOWN = 6
NOISE = 1e-6  # of the published script


class Method(NamedTuple):
    """A way to revive filters without a gradient."""

    name: str
    optimizer: fv.Optimizer
    redirect: int


class Score(NamedTuple):
    """Some filters with one method; means over them."""

    filters: int
    active: int
    """Number of filters with a positive score at some step."""
    robust: float
    saturation: float


def methods() -> list[Method]:
    """No method, gradient noise (the published script), a drift, redirected gradients (Lucid), and the last two."""
    rate = linear_decay(8 / STEPS, 0.3 * 8 / STEPS, STEPS)  # of activation_optimizer
    noisy = chain(normalize_gradient(), add_noise(NOISE), adam(rate, betas=(0.0, 0.99)))
    plain, drift = activation_optimizer(STEPS, drift=0.0), activation_optimizer(STEPS)
    return [
        Method("none", plain, 0),
        Method("noise", noisy, 0),
        Method("drift", drift, 0),
        Method("redirect", plain, REDIRECT),
        Method("redirect + drift", drift, REDIRECT),
    ]


def first_gradients(case: Case) -> Tensor:
    """Return the norm of every filter's gradient at the first step, ``(n,)``."""
    optimizer = activation_optimizer(STEPS, drift=0.0)
    renderer = fv.make_renderer(
        case.model, case.layer, steps=STEPS, transforms="small", optimizer=optimizer, compile=False, batch_size=BATCH
    )
    norms = []
    for first in range(0, len(renderer.filters), BATCH):
        state, target = renderer.init(renderer.filters[first : first + BATCH], 0)
        norms.append(renderer.step(renderer.weights, state, target)[1].grad_norm)
    return torch.cat(norms).cpu()


def evenly_spaced(filters: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` of some filters, evenly spaced.

    >>> evenly_spaced(range(10), 3)
    [0, 3, 6]
    """
    count = min(count, len(filters))
    return [filters[i * len(filters) // count] for i in range(count)]


def scores_of(case: Case, result: fv.Result) -> tuple[Tensor, Tensor]:
    """Return the robust activation and the saturation of each filter's image."""
    scores = []
    for first in range(0, len(result.filters), BATCH):
        part = slice(first, first + BATCH)
        score = evaluate(result.images[part], case.model.module, case.layer, result.filters[part], input_size=SIZE)
        scores.append((score.robust_per_filter, score.saturation_per_filter))
    robust, saturation = (torch.cat(column) for column in zip(*scores, strict=True))
    return robust, saturation


def measure(case: Case, dead: Sequence[int], alive: Sequence[int]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Render the filters with each method.

    Returns:
        The results of each method, and its images of the first of the dead filters.
    """
    features = fv.make_features(case.model, [case.layer])
    chosen = [*dead, *alive]
    rows: list[dict[str, Any]] = []
    images: list[Tensor] = []
    measured: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for method in methods():
        start = time.perf_counter()
        result = fv.render(
            case.model, case.layer, chosen, steps=STEPS, transforms="small", optimizer=method.optimizer,
            redirect=method.redirect, features=features, compile=False, batch_size=BATCH, progress=False,
            retain_memory=True,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        measured[method.name] = result.scores > 0, *scores_of(case, result)
        images.append(result.images[: min(SHOWN, len(dead))])
        active, robust, _ = measured[method.name]
        count = len(dead)
        print(
            f"{case.layer}  {method.name}: {int(active[:count].sum())} of {count} revived,"
            f" robust {robust[:count].mean():.4g}; of the others {robust[count:].mean():.4g}; {seconds:.0f} s",
            flush=True,
        )
        rows.append({"method": method.name})
    # The filters that every method revives, whose images can be compared.
    common = torch.stack([active for name, (active, _, _) in measured.items() if name != "none"]).all(0)
    starts_dead = torch.arange(len(chosen)) < len(dead)
    for row, (active, robust, saturation) in zip(rows, measured.values(), strict=True):
        groups = {"dead": starts_dead, "revived by all": starts_dead & common, "alive": ~starts_dead}
        for name, group in groups.items():
            count = int(group.sum())
            means = (float(v[group].mean()) if count else float("nan") for v in (robust, saturation))
            row[name] = Score(count, int(active[group].sum()), *means)._asdict()
        row["per_filter"] = {
            "filters": chosen, "active": active.tolist(), "robust": robust.tolist(), "saturation": saturation.tolist()
        }  # fmt: skip
    return rows, images


def main(device: str, rounds: int) -> None:
    """Print and write the results of each method, and a picture per layer with one row of images per method.

    Each rendering runs once: ``rounds`` has no effect.
    """
    trained = [case for case in cases(("squeezenet1_0",), device) if case.trained]
    if not trained:
        print("dead: not run, because it needs SqueezeNet's weights: set FEATVIS_WEIGHTS to their file")
        return
    start = time.perf_counter()
    layers: dict[str, object] = {}
    table: list[list[object]] = [
        ["layer, method", "filters", "start dead", "rendered", "revived", "robust", "revived by all", "robust",
         "saturation", "alive", "robust", "saturation"]
    ]  # fmt: skip
    small = trained[0]._replace(model=trained[0].model._replace(size=(SIZE, SIZE)))
    for layer in LAYERS:
        convolution, case = small._replace(layer=layer), small._replace(layer=layer + RELU)
        norms = first_gradients(case)
        dead = torch.nonzero(norms == 0).flatten().tolist()
        alive = evenly_spaced(torch.nonzero(norms > 0).flatten().tolist(), ALIVE)
        convolution_dead = int((first_gradients(convolution) == 0).sum())
        full_size_dead = int((first_gradients(case._replace(model=trained[0].model)) == 0).sum())
        print(f"{case.layer}: {len(dead)} of {len(norms)} start dead; before the ReLU {convolution_dead}", flush=True)
        rows, images = measure(case, dead, alive)
        layers[case.layer] = {
            "filters": len(norms), "start_dead": dead, "start_dead_at_224": full_size_dead,
            "start_dead_before_relu": convolution_dead, "methods": rows,
        }  # fmt: skip
        for row in rows:
            d, c, a = (row[name] for name in ("dead", "revived by all", "alive"))
            table.append(
                [f"{case.layer} {row['method']}", len(norms), len(dead), d["filters"], d["active"], d["robust"],
                 c["filters"], c["robust"], c["saturation"], a["filters"], a["robust"], a["saturation"]]
            )  # fmt: skip
        if dead:
            half = torch.nn.functional.interpolate(torch.cat(images), scale_factor=0.5, mode="bilinear", antialias=True)
            contact_sheet(half, rows=len(methods())).save(RESULTS / f"dead-{case.layer}.png")
    settings = {
        "note": f"all filters that start dead, and {ALIVE} of the others, evenly spaced over a layer",
        "size": SIZE, "steps": STEPS, "redirect": REDIRECT, "noise": NOISE, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    report("dead", device, {**settings, "layers": layers}, table)
