"""Activation and saturation against seconds: how soon does each method reach what the script reaches in 128 steps?

On the trained SqueezeNet; the script and the evaluator are made for its input. Scores are those of
:mod:`benchmarks.evaluate`, on the best image of the run, and are taken outside of the timed sections. The two methods
take turns, so that whatever else the machine does meets both.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor

import featvis_func as fv
from benchmarks.common import RESULTS, Case, cases, report
from benchmarks.evaluate import evaluate
from benchmarks.reference import make_reference_step
from benchmarks.step import FILTERS, OurStep

BASELINE_MARKS = (8, 16, 32, 64, 128)
# Runs of their own, since the learning rate falls over a run.
OUR_RUNS = (12, 16, 20, 24, 32, 64)


class Point(NamedTuple):
    """One method after some steps."""

    steps: int
    seconds: float
    robust: float
    plain: float
    saturation: float


def measure(case: Case, device: str) -> tuple[dict[str, object], Tensor]:
    """Runs both methods; also returns images ``(2 n, 3, h, w)``: the script's at its end, then ours when as good."""
    baseline = make_reference_step(case.model.module, case.layer, list(FILTERS), size=case.model.size[0])

    def point(steps: int, seconds: float, images: Tensor) -> Point:
        score = evaluate(images, case.model.module, case.layer, list(FILTERS))
        return Point(steps, seconds, score.robust, score.plain, score.saturation)

    theirs: list[Point] = []
    ours: list[Point] = []
    pictures: list[Tensor] = []
    done, spent, shown = 0, 0.0, torch.empty(0)
    for turn, steps in enumerate(OUR_RUNS):
        run = OurStep(case, device, steps=steps)
        run()  # warm-up
        run.state = run.start
        seconds = _timed(run, steps, device)[0]
        pictures.append(run.state.best.image)
        ours.append(point(steps, seconds, pictures[-1]))
        # Then a part of the script's one run, up to its marks.
        last = turn == len(OUR_RUNS) - 1
        for mark in BASELINE_MARKS[turn:] if last else BASELINE_MARKS[turn : turn + 1]:
            seconds, progress = _timed(baseline, mark - done, device)
            done, spent = mark, spent + seconds
            shown = torch.stack([b.image for b in progress.best])
            theirs.append(point(mark, spent, shown))
    goal = theirs[-1]
    reached = next((i for i, p in enumerate(ours) if p.robust >= goal.robust), None)
    there = None if reached is None else ours[reached]
    data = {
        "layer": case.layer,
        "filters": len(FILTERS),
        "baseline": [p._asdict() for p in theirs],
        "ours": [p._asdict() for p in ours],
        "steps_to_baseline": there and there.steps,
        "time_ratio": there and goal.seconds / there.seconds,
        "saturation_ratio": there and there.saturation / max(goal.saturation, 1e-6),
    }
    return data, torch.cat([shown, pictures[-1 if reached is None else reached]])


def _timed(call: Callable[[], Any], times: int, device: str) -> tuple[float, Any]:
    """Seconds of some calls, and what the last one returned."""
    start, result = time.perf_counter(), None
    for _ in range(times):
        result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main(device: str, rounds: int) -> None:
    """Prints and writes the curves, and the pictures side by side. One run each: ``rounds`` has no effect."""
    squeezenet = [case for case in cases(("squeezenet1_0",), device) if case.trained]
    if not squeezenet:
        print("quality: skipped, no trained SqueezeNet; FEATVIS_WEIGHTS names the file of its weights")
        return
    data: dict[str, object] = {}
    table: list[list[object]] = [["model layer", "method", "steps", "seconds", "robust", "plain", "saturation"]]
    for case in squeezenet:
        name = f"{case.name} {case.layer}"
        data[name], images = measure(case, device)
        entry: dict = data[name]  # type: ignore[assignment]
        for method in ("baseline", "ours"):
            table += [[name, method, *(p[k] for k in Point._fields)] for p in entry[method]]
        ratio, sat = entry["time_ratio"], entry["saturation_ratio"]
        table.append([name, "time ratio", entry["steps_to_baseline"], ratio or "-", "", "saturation ratio", sat or "-"])
        RESULTS.mkdir(exist_ok=True)
        sheet(images).save(RESULTS / f"quality-{case.name}-{case.layer}.png")
    report("quality", device, {"cases": data}, table)


def sheet(images: Tensor) -> PIL.Image.Image:
    """The script's images in the first row, ours in the second."""
    count = images.shape[0]
    blank = torch.zeros(count)
    names = tuple(range(count))
    everything = fv.Result(images.cpu(), blank, blank, blank.long(), names, ("ok",) * count, blank[None])
    return everything.grid(columns=count // 2)
