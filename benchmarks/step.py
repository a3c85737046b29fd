"""Seconds per step of the published script, of this library, and of the floor that no method can pass.

The floor is the forward pass of the truncated, folded backbone and the backward pass to its input, alone: same batch,
dtype and memory layout. The three are timed in turn, round by round, in one process.
"""

from collections.abc import Callable

import torch
from torch.func import grad
from torch.utils.flop_counter import FlopCounterMode

import featvis_func as fv
from benchmarks.common import Case, cases, interleave, report
from benchmarks.reference import make_reference_step
from featvis_func.transform import chain, normalize

MODELS = ("googlenet", "resnet18", "squeezenet1_0", "vit_b_16")
FILTERS = range(8)


class OurStep:
    """One step of the library as ``render`` runs it, on its own state."""

    def __init__(self, case: Case, device: str, *, steps: int = 32) -> None:
        model, goal = case.model, fv.channel(case.layer)
        self.features = fv.make_features(model, goal.layers, device=device)
        image = fv.fourier(model.size, device=device)
        view = fv.views("default", image=model.size, size=model.size)
        optimizer = fv.default_optimizer(steps)
        self.step = fv.make_step(
            self.features, image, chain(view, normalize(model.mean, model.std, device=device)), goal, optimizer
        )
        keys = fv.filter_keys(0, case.layer, FILTERS, device=device)
        self.start = self.state = fv.init_state(self.features, image, goal, optimizer, keys)
        self.target = torch.tensor(list(FILTERS), device=device)

    def __call__(self) -> None:
        self.state, _ = self.step(self.features.weights, self.state, self.target)


def measure(case: Case, device: str, rounds: int) -> dict[str, object]:
    """Times one model."""
    ours = OurStep(case, device)
    images = torch.randn(len(FILTERS), 3, *case.model.size, device=device)

    def total(x: torch.Tensor) -> torch.Tensor:
        return ours.features.apply(ours.features.weights, x)[case.layer].sum()

    def floor() -> None:
        grad(total)(images)

    with FlopCounterMode(display=False) as counter:
        floor()
    calls: dict[str, Callable[[], object]] = {"ours": ours, "floor": floor}
    if len(ours.features.shapes[case.layer]) == 3:  # the script knows no tokens
        calls["baseline"] = make_reference_step(case.model.module, case.layer, list(FILTERS), size=case.model.size[0])
    times = interleave(calls, rounds=rounds)
    median = {name: t.median for name, t in times.items()}
    return {
        "layer": case.layer,
        "trained": case.trained,
        "filters": len(FILTERS),
        "seconds": {name: t._asdict() for name, t in times.items()},
        "ours/floor": median["ours"] / median["floor"],
        "baseline/ours": median["baseline"] / median["ours"] if "baseline" in median else None,
        "floor_gflop": counter.get_total_flops() / 1e9,
        "ours_gflop_per_second": counter.get_total_flops() / 1e9 / median["ours"],
    }


def main(device: str, rounds: int) -> None:
    """Prints and writes the timings of all models."""
    data = {case.name: measure(case, device, rounds) for case in cases(MODELS, device)}
    table: list[list[object]] = [["model", "baseline s", "ours s", "floor s", "ours/floor", "baseline/ours", "GFLOP/s"]]
    for name, d in data.items():
        seconds: dict = d["seconds"]  # type: ignore[assignment]
        medians = [seconds[k]["median"] if k in seconds else "-" for k in ("baseline", "ours", "floor")]
        table.append([name, *medians, d["ours/floor"], d["baseline/ours"] or "-", d["ours_gflop_per_second"]])
    report("step", device, {"rounds": rounds, "models": data}, table)
