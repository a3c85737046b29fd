"""Filters behind a rectifier that start dead: how many there are, and which cure wakes how many, to what images.

Of three rectified layers of SqueezeNet, with its ImageNet weights, all filters are asked for their gradient at the
first step, under the default view and from the default start; so are those of the convolutions before the rectifiers.
Then those that start dead are rendered with each cure, and of the others some, which a cure must not harm. The rule of
ascent is the default one in all else. Scores are those of :mod:`benchmarks.evaluate`, of the best image. Images and
the network's input are 128 pixels wide, so that it takes minutes; how many start dead at 224 is counted, too.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import featvis_func as fv
from benchmarks.common import RESULTS, Case, cases, report, sheet
from benchmarks.evaluate import evaluate
from featvis_func.optimizer import adam, add_noise, chain, linear_decay, normalize_gradient
from featvis_func.rendering.presets import default_optimizer

LAYERS = ("features.12.expand3x3", "features.9.expand3x3", "features.4.expand3x3")
RECTIFIED = "_activation"
SIZE = 128  # px
STEPS = 32
REDIRECT = 16
ALIVE = 8  # filters of a layer that start with a gradient and are rendered, too
BATCH = 8
SHOWN = 6
NOISE = 1e-6  # of the published script


class Cure(NamedTuple):
    """What is done about filters without a gradient."""

    name: str
    optimizer: fv.Optimizer
    redirect: int


class Score(NamedTuple):
    """Some filters under one cure; means over them."""

    filters: int
    fired: int
    """How many had a positive score at some step."""
    robust: float
    saturation: float


def cures() -> list[Cure]:
    """None, the published one, ours, Lucid's, and the last two at once."""
    rate = linear_decay(8 / STEPS, 0.3 * 8 / STEPS, STEPS)  # of default_optimizer
    noisy = chain(normalize_gradient(), add_noise(NOISE), adam(rate, betas=(0.0, 0.99)))
    none, drift = default_optimizer(STEPS, drift=0.0), default_optimizer(STEPS)
    return [
        Cure("nothing", none, 0),
        Cure("noise", noisy, 0),
        Cure("drift", drift, 0),
        Cure("redirect", none, REDIRECT),
        Cure("redirect + drift", drift, REDIRECT),
    ]


def first_gradients(case: Case) -> Tensor:
    """Of every filter of a layer: the norm of its gradient at the first step, ``(n,)``."""
    rule = default_optimizer(STEPS, drift=0.0)
    renderer = fv.make_renderer(case.model, case.layer, steps=STEPS, optimizer=rule, compile=False, batch_size=BATCH)
    norms = []
    for first in range(0, len(renderer.filters), BATCH):
        state, target = renderer.start(renderer.filters[first : first + BATCH], 0)
        norms.append(renderer.step(renderer.weights, state, target)[1].grad_norm)
    return torch.cat(norms).cpu()


def spread(filters: Sequence[int], count: int) -> list[int]:
    """As many of some filters, evenly.

    >>> spread(range(10), 3)
    [0, 3, 6]
    """
    count = min(count, len(filters))
    return [filters[i * len(filters) // count] for i in range(count)]


def scored(case: Case, result: fv.Result) -> tuple[Tensor, Tensor]:
    """Robust activation and saturation of each filter's image."""
    found = []
    for first in range(0, len(result.filters), BATCH):
        some = slice(first, first + BATCH)
        score = evaluate(result.images[some], case.model.module, case.layer, result.filters[some], input_size=SIZE)
        found.append((score.robust_per_filter, score.saturation_per_filter))
    robust, saturation = (torch.cat(column) for column in zip(*found, strict=True))
    return robust, saturation


def measure(case: Case, dead: Sequence[int], alive: Sequence[int]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Renders with each cure.

    Returns:
        For each cure what it comes to, and its images of the first of the dead.
    """
    features = fv.make_features(case.model, [case.layer])
    chosen = [*dead, *alive]
    rows: list[dict[str, Any]] = []
    pictures = []
    images: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for cure in cures():
        start = time.perf_counter()
        result = fv.render(
            case.model, case.layer, chosen, steps=STEPS, optimizer=cure.optimizer, redirect=cure.redirect,
            features=features, compile=False, batch_size=BATCH, progress=False,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        images[cure.name] = result.scores > 0, *scored(case, result)
        pictures.append(result.images[: min(SHOWN, len(dead))])
        fired, robust, _ = images[cure.name]
        count = len(dead)
        print(
            f"{case.layer}  {cure.name}: {int(fired[:count].sum())} of {count} woken,"
            f" robust {robust[:count].mean():.4g}; of the others {robust[count:].mean():.4g}; {seconds:.0f} s",
            flush=True,
        )
        rows.append({"cure": cure.name})
    # Those that every cure wakes, so that their images can be compared.
    common = torch.stack([fired for name, (fired, _, _) in images.items() if name != "nothing"]).all(0)
    starts_dead = torch.arange(len(chosen)) < len(dead)
    for row, (fired, robust, saturation) in zip(rows, images.values(), strict=True):
        groups = {"dead": starts_dead, "woken by all": starts_dead & common, "alive": ~starts_dead}
        for name, group in groups.items():
            count = int(group.sum())
            means = (float(v[group].mean()) if count else float("nan") for v in (robust, saturation))
            row[name] = Score(count, int(fired[group].sum()), *means)._asdict()
        row["per_filter"] = {
            "filters": chosen, "fired": fired.tolist(), "robust": robust.tolist(), "saturation": saturation.tolist()
        }  # fmt: skip
    return rows, pictures


def main(device: str, rounds: int) -> None:
    """Prints and writes what each cure comes to, and the pictures: a row for each cure, in order.

    One run each: ``rounds`` has no effect.
    """
    found = [case for case in cases(("squeezenet1_0",), device) if case.trained]
    if not found:
        print("dead: needs SqueezeNet's weights, whose file FEATVIS_WEIGHTS names")
        return
    start = time.perf_counter()
    layers: dict[str, object] = {}
    table: list[list[object]] = [
        ["layer, cure", "filters", "start dead", "rendered", "woken", "robust", "woken by all", "robust", "saturation",
         "alive", "robust", "saturation"]
    ]  # fmt: skip
    small = found[0]._replace(model=found[0].model._replace(size=(SIZE, SIZE)))
    for layer in LAYERS:
        before, case = small._replace(layer=layer), small._replace(layer=layer + RECTIFIED)
        norms = first_gradients(case)
        dead = torch.nonzero(norms == 0).flatten().tolist()
        alive = spread(torch.nonzero(norms > 0).flatten().tolist(), ALIVE)
        before_dead = int((first_gradients(before) == 0).sum())
        whole_dead = int((first_gradients(case._replace(model=found[0].model)) == 0).sum())
        print(f"{case.layer}: {len(dead)} of {len(norms)} start dead; of the convolution {before_dead}", flush=True)
        rows, pictures = measure(case, dead, alive)
        layers[case.layer] = {
            "filters": len(norms), "start_dead": dead, "start_dead_at_224": whole_dead,
            "convolution_starts_dead": before_dead, "cures": rows,
        }  # fmt: skip
        for row in rows:
            d, w, a = (row[name] for name in ("dead", "woken by all", "alive"))
            table.append(
                [f"{case.layer} {row['cure']}", len(norms), len(dead), d["filters"], d["fired"], d["robust"],
                 w["filters"], w["robust"], w["saturation"], a["filters"], a["robust"], a["saturation"]]
            )  # fmt: skip
        if dead:
            images = torch.cat(pictures)
            half = torch.nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
            sheet(half, rows=len(cures())).save(RESULTS / f"dead-{case.layer}.png")
    settings = {
        "note": f"all that start dead, and {ALIVE} of the others, evenly spread over a layer",
        "size": SIZE, "steps": STEPS, "redirect": REDIRECT, "noise": NOISE, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    report("dead", device, {**settings, "layers": layers}, table)
