"""Time and memory to build a gallery, and the size of the site, by the number of filters.

The filters are synthetic: random images with the spectrum of natural images and some fine grain, whose files are about
as large as those of rendered images, in the folder of a sweep that was never rendered; 224 pixels, maps of 14 x 14, 32
steps. Each build runs in a process of its own, because the peak memory of a process never decreases.
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
# Number of different images; the others are shifted copies, which take as long to encode.
_DISTINCT = 64


class Build(NamedTuple):
    """One build in a process of its own."""

    made: int
    """Number of filters whose files were written."""
    seconds: float
    peak_mb: float
    before_mb: float
    """Peak before the build: interpreter and libraries."""


def make_store(path: Path, filters: int) -> Folder:
    """Write the folder of a sweep with this many filters."""
    layers = {f"layer{i}.conv": min(LAYER, filters - i * LAYER) for i in range(-(-filters // LAYER))}
    plans = [LayerPlan(name, (count, 14, 14), tuple(range(count)), UNIT, UNIT) for name, count in layers.items()]
    config = {"model": "synthetic", "image_dtype": "uint8", "render": {"seed": 0, "steps": STEPS}, "layers": layers}
    folder = start_folder(path, Run(config, tuple(plans)))
    image = fv.fourier((SIZE, SIZE))
    keys = random.split(random.key(0), _DISTINCT)
    images = torch.stack([image.decode(tree_map(lambda p: 8 * p, image.init(k))) for k in keys])
    grain = random.uniform(random.key(1), images.shape) - 0.5
    images = (images + torch.nn.functional.avg_pool2d(grain, 3, 1, 1)).clamp(0, 1)
    for number, unit in enumerate(folder.run.units):
        result = synthetic_result(images, unit.filters, number)
        commit(folder, unit, result, [0] * len(unit.filters), seconds=0.0)
    return folder


def synthetic_result(images: torch.Tensor, filters: tuple[int, ...], shift: int) -> fv.Result:
    """Return a result with the given images, shifted by some pixels, and random scores."""
    n = len(filters)
    rise = 1 - torch.exp(-torch.arange(STEPS) / 8)[:, None]
    scores = random.uniform(random.key(shift), (n,)) * 30
    return fv.Result(
        images=images[torch.arange(n) % len(images)].roll(shift, -1),
        activations=random.uniform(random.key(shift + 1), (n, 14, 14)),
        scores=scores,
        best_step=torch.full((n,), STEPS - 1),
        filters=filters,
        status=tuple("dead" if f % 97 == 0 else "ok" for f in filters),
        history=rise * scores,
        steps=torch.full((n,), STEPS),
    )


def child(store: str, site: str) -> Build:
    """Build a gallery in this process."""
    before = peak_memory("cpu")
    start = time.perf_counter()
    gallery = build_gallery(store, site)
    return Build(gallery.made, time.perf_counter() - start, peak_memory("cpu") / 1e6, before / 1e6)


def measure(filters: int) -> dict[str, dict[str, float]]:
    """Measure the first build, a build after which nothing has changed, and one after a unit has changed."""
    with tempfile.TemporaryDirectory() as place:
        store, site = Path(place) / "store", Path(place) / "site"
        folder = make_store(store, filters)
        builds = {"first": _in_new_process(store, site), "unchanged": _in_new_process(store, site)}
        unit = folder.run.units[0]
        folder.sidecar(unit).unlink()
        other = synthetic_result(torch.rand(_DISTINCT, 3, SIZE, SIZE), unit.filters, 1)
        commit(folder, unit, other, [0] * len(unit.filters), seconds=0.0)
        builds["one unit changed"] = _in_new_process(store, site)
        files = [path for path in site.rglob("*") if path.is_file()]
        thumbnails = [path.stat().st_size for path in files if path.parent.name == "thumbs"]
        total = sum(path.stat().st_size for path in files)
        shutil.rmtree(site)
    sizes = {"files": len(files), "site_mb": total / 1e6, "thumbnail_kb": sum(thumbnails) / len(thumbnails) / 1e3}
    return {**{name: build._asdict() for name, build in builds.items()}, "site": sizes}


def _in_new_process(store: Path, site: Path) -> Build:
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply(child, (str(store), str(site)))
    finally:
        pool.close()  # not terminate, so that the process can clean up
        pool.join()


def main(device: str, rounds: int) -> None:
    """Print and write the measurements. Each build is timed once: ``rounds`` has no effect."""
    data = {str(filters): measure(filters) for filters in FILTERS}
    table: list[list[object]] = [["filters", "build", "made", "seconds", "peak MB", "before MB", "files", "site MB"]]
    for filters, measured in data.items():
        for name in ("first", "unchanged", "one unit changed"):
            build = measured[name]
            row = [build[key] for key in ("made", "seconds", "peak_mb", "before_mb")]
            table.append([filters, name, *row, measured["site"]["files"], measured["site"]["site_mb"]])
    report("gallery", device, {"size": SIZE, "steps": STEPS, "filters": data}, table, measured_here=False)
