"""How long a gallery takes to build, in how much memory, and how large it is, by the number of filters.

The filters are synthetic: random images with the spectrum of natural pictures and some fine grain, as files about as
large as rendered ones, in the store of a sweep that was never rendered; 224 pixels, maps of 14 x 14, 32 steps.
Each build is a process of its own, because a process's peak memory only ever grows.
"""

import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

import featvis_func as fv
from benchmarks.common import peak_memory, report
from featvis_func import random
from featvis_func.gallery import build_gallery
from featvis_func.sweep.layout import Folder, Run, start_folder
from featvis_func.sweep.plan import LayerPlan
from featvis_func.sweep.shard import commit
from featvis_func.tree import tree_map

FILTERS = (1_000, 10_000)
SIZE, STEPS, UNIT, LAYER = 224, 32, 50, 500
# Images that differ; the others are these, shifted, which takes as long to encode.
_DISTINCT = 64


class Build(NamedTuple):
    """One build in a process of its own."""

    made: int
    seconds: float
    peak_mb: float
    before_mb: float
    """With the interpreter and the libraries, before the build."""


def make_store(path: Path, filters: int) -> Folder:
    """The store of a sweep of so many filters."""
    layers = {f"layer{i}.conv": min(LAYER, filters - i * LAYER) for i in range(-(-filters // LAYER))}
    plans = [LayerPlan(name, (count, 14, 14), tuple(range(count)), UNIT, UNIT) for name, count in layers.items()]
    config = {"model": "synthetic", "image_dtype": "uint8", "render": {"seed": 0, "steps": STEPS}, "layers": layers}
    folder = start_folder(path, Run(config, tuple(plans)))
    image = fv.fourier((SIZE, SIZE))
    keys = random.split(random.key(0), _DISTINCT)
    pictures = torch.stack([image.decode(tree_map(lambda p: 8 * p, image.init(k))) for k in keys])
    fine = random.uniform(random.key(1), pictures.shape) - 0.5
    pictures = (pictures + torch.nn.functional.avg_pool2d(fine, 3, 1, 1)).clamp(0, 1)
    for number, unit in enumerate(folder.run.units):
        commit(folder, unit, synthetic(pictures, unit.filters, number), [0] * len(unit.filters), seconds=0.0)
    return folder


def synthetic(pictures: torch.Tensor, filters: tuple[int, ...], shift: int) -> fv.Result:
    """A result that nothing rendered."""
    n = len(filters)
    rise = 1 - torch.exp(-torch.arange(STEPS) / 8)[:, None]
    scores = random.uniform(random.key(shift), (n,)) * 30
    return fv.Result(
        images=pictures[torch.arange(n) % len(pictures)].roll(shift, -1),
        activations=random.uniform(random.key(shift + 1), (n, 14, 14)),
        scores=scores,
        best_step=torch.full((n,), STEPS - 1),
        filters=filters,
        status=tuple("dead" if f % 97 == 0 else "ok" for f in filters),
        history=rise * scores,
        steps=torch.full((n,), STEPS),
    )


def child(store: str, site: str) -> Build:
    """Builds, in this process."""
    before = peak_memory("cpu")
    start = time.perf_counter()
    made = build_gallery(store, site)
    return Build(made.made, time.perf_counter() - start, peak_memory("cpu") / 1e6, before / 1e6)


def measure(filters: int) -> dict[str, dict[str, float]]:
    """A first build, one where nothing has changed, and one where a unit has."""
    with tempfile.TemporaryDirectory() as place:
        store, site = Path(place) / "store", Path(place) / "site"
        folder = make_store(store, filters)
        builds = {"first": _apart(store, site), "again": _apart(store, site)}
        unit = folder.run.units[0]
        folder.sidecar(unit).unlink()
        other = synthetic(torch.rand(_DISTINCT, 3, SIZE, SIZE), unit.filters, 1)
        commit(folder, unit, other, [0] * len(unit.filters), seconds=0.0)
        builds["one unit changed"] = _apart(store, site)
        files = [path for path in site.rglob("*") if path.is_file()]
        thumbs = [path.stat().st_size for path in files if path.parent.name == "thumbs"]
        total = sum(path.stat().st_size for path in files)
        shutil.rmtree(site)
    sizes = {"files": len(files), "site_mb": total / 1e6, "thumbnail_kb": sum(thumbs) / len(thumbs) / 1e3}
    return {**{name: build._asdict() for name, build in builds.items()}, "site": sizes}


def _apart(store: Path, site: Path) -> Build:
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply(child, (str(store), str(site)))
    finally:
        pool.close()  # and not terminate: the child clears up
        pool.join()


def main(device: str, rounds: int) -> None:
    """Prints and writes the figures; each build is timed once, whatever ``rounds``."""
    data = {str(filters): measure(filters) for filters in FILTERS}
    table: list[list[object]] = [["filters", "build", "made", "seconds", "peak MB", "before MB", "files", "site MB"]]
    for filters, found in data.items():
        for name in ("first", "again", "one unit changed"):
            build = found[name]
            row = [build[key] for key in ("made", "seconds", "peak_mb", "before_mb")]
            table.append([filters, name, *row, found["site"]["files"], found["site"]["site_mb"]])
    report("gallery", device, {"size": SIZE, "steps": STEPS, "filters": data}, table, measured_here=False)
