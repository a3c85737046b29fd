"""Activation and saturation against seconds: how soon is there what the script reaches in 128 steps?

On layers of two trained models: SqueezeNet, where its weights are there, and TextureNet, which is not of the size and
normalisation that the script was published for (:mod:`benchmarks.reference` says what is scaled). Scores are those of
:mod:`benchmarks.evaluate`, on the best image of the run, and are taken outside of the timed sections. The two methods
take turns, so that whatever else the machine does meets both.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import featvis_func as fv
from benchmarks.common import RESULTS, Case, cases, report, sheet
from benchmarks.evaluate import evaluate
from benchmarks.reference import Progress, make_reference_step
from benchmarks.step import FILTERS, OurStep

# Early, middle and late.
SQUEEZENET_LAYERS = ("features.4.expand3x3", "features.9.expand3x3", "features.12.expand1x1")
TEXTURENET_LAYERS = ("block4.conv", "block6.conv")
BASELINE_MARKS = (8, 16, 32, 64, 128)
# Runs of their own, since the learning rate falls over a run.
OUR_RUNS = (12, 16, 20, 24, 28, 32, 64)
# Of ours, by the script's: what is gained by burning out does not count.
MOST_SATURATION = 1.25


class Point(NamedTuple):
    """One method after some steps."""

    steps: int
    seconds: float
    robust: float
    plain: float
    saturation: float


class Comparison(NamedTuple):
    """The script at its last mark against the first of our runs that is as good; None where no run is."""

    steps_to_baseline: int | None
    time_ratio: float | None
    """Seconds of the script in one second of ours."""
    saturation_ratio: float | None
    """Ours by the script's; says little where the script's is near 0."""
    saturation_baseline: float
    saturation_ours: float | None


def trained_cases(device: str) -> list[Case]:
    """Each layer that is compared; SqueezeNet's only where its weights are there."""
    squeezenet = [case for case in cases(("squeezenet1_0",), device) if case.trained]
    found = [case._replace(layer=layer) for case in squeezenet for layer in SQUEEZENET_LAYERS]
    texturenet = fv.load_model("texturenet")
    texturenet = texturenet._replace(module=texturenet.module.to(device))
    return found + [Case(texturenet.name, texturenet, layer, True) for layer in TEXTURENET_LAYERS]


def measure(case: Case, device: str) -> tuple[list[Point], list[Point], Tensor]:
    """Runs both methods.

    Returns:
        The script's points, at its marks; ours, one per run; and images ``(2 n, 3, h, w)``: the script's at its end,
        then ours of the first run that is as good, or else of the last.
    """
    model, filters = case.model, list(FILTERS)
    size = model.size[0]

    def script() -> Callable[[], Progress]:
        return make_reference_step(model.module, case.layer, filters, input_size=size, mean=model.mean, std=model.std)

    def point(method: str, steps: int, seconds: float, images: Tensor) -> Point:
        score = evaluate(images, model.module, case.layer, filters, input_size=size, mean=model.mean, std=model.std)
        found = Point(steps, seconds, score.robust, score.plain, score.saturation)
        values = "  ".join(f"{name} {value:.4g}" for name, value in found._asdict().items())
        print(f"{case.name} {case.layer}  {method:8}  {values}", flush=True)
        return found

    script()()  # warm-up
    baseline = script()
    theirs: list[Point] = []
    ours: list[Point] = []
    pictures: list[Tensor] = []
    done, spent, shown = 0, 0.0, torch.empty(0)
    for turn, steps in enumerate(OUR_RUNS):
        run = OurStep(case, device, steps=steps)
        with fv.kept_memory(device == "cpu"):
            run()  # warm-up
            run.state = run.start
            seconds = _timed(run, steps, device)[0]
        pictures.append(run.state.best.image)
        ours.append(point("ours", steps, seconds, pictures[-1]))
        # Then a part of the script's one run, up to its marks.
        last = turn == len(OUR_RUNS) - 1
        for mark in BASELINE_MARKS[turn:] if last else BASELINE_MARKS[turn : turn + 1]:
            seconds, progress = _timed(baseline, mark - done, device)
            done, spent = mark, spent + seconds
            shown = torch.stack([b.image for b in progress.best])
            theirs.append(point("baseline", mark, spent, shown))
    reached = first_as_good(theirs, ours)
    return theirs, ours, torch.cat([shown, pictures[-1 if reached is None else reached]])


def first_as_good(theirs: Sequence[Point], ours: Sequence[Point]) -> int | None:
    """Index of the first of our runs as robust as the script at its last mark, and hardly more saturated."""
    goal = theirs[-1]
    most = MOST_SATURATION * max(goal.saturation, 0.001)  # below this share nobody sees it
    return next((i for i, p in enumerate(ours) if p.robust >= goal.robust and p.saturation <= most), None)


def compare(theirs: Sequence[Point], ours: Sequence[Point]) -> Comparison:
    """What the curves come to."""
    goal, reached = theirs[-1], first_as_good(theirs, ours)
    if reached is None:
        return Comparison(None, None, None, goal.saturation, None)
    run = ours[reached]
    saturation = run.saturation / max(goal.saturation, 1e-6)
    return Comparison(run.steps, goal.seconds / run.seconds, saturation, goal.saturation, run.saturation)


def _timed(call: Callable[[], Any], times: int, device: str) -> tuple[float, Any]:
    """Seconds of some calls, and what the last one returned."""
    start, result = time.perf_counter(), None
    for _ in range(times):
        result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main(device: str, rounds: int) -> None:
    """Prints the curves' points as they come, and what they come to; writes these and the pictures, side by side.

    One run each: ``rounds`` has no effect.
    """
    todo = trained_cases(device)
    if not any(case.name == "squeezenet1_0" for case in todo):
        print("quality: TextureNet alone; FEATVIS_WEIGHTS names the file of SqueezeNet's weights")
    data: dict[str, dict[str, object]] = {}
    table: list[list[object]] = [["model layer", *Comparison._fields]]
    RESULTS.mkdir(exist_ok=True)
    for case in todo:
        theirs, ours, images = measure(case, device)
        outcome = compare(theirs, ours)
        name = f"{case.name} {case.layer}"
        data[name] = {
            "layer": case.layer,
            "size": case.model.size[0],
            "filters": len(FILTERS),
            "baseline": [p._asdict() for p in theirs],
            "ours": [p._asdict() for p in ours],
            **outcome._asdict(),
        }
        table.append([name, *("-" if value is None else value for value in outcome)])
        sheet(images, rows=2).save(RESULTS / f"quality-{case.name}-{case.layer}.png")
    report("quality", device, {"cases": data}, table)
