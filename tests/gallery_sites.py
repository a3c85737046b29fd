"""Galleries of synthetic results for the browser tests, and a web server that serves them."""

import functools
import http.server
import math
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from featvis_func.gallery import build_gallery
from featvis_func.objective import directions, facets, neurons
from featvis_func.rendering.result import Result
from featvis_func.sweep.families import describe_families, write_members
from featvis_func.sweep.layout import Folder, start_folder
from featvis_func.sweep.plan import folder_of
from featvis_func.sweep.shard import commit
from tests.sweep_toys import STEPS, toy_result, toy_run

FILTERS = 1010
"""Number of filters of the layer ``wide``, which needs three pages."""
# Layer names that break careless quoting.
HOSTILE = 'a"><script>alert(1)</script>'
QUOTED = "x/y.z %2F é"
# The folder's name of this layer is cut off within a percent-encoded character.
LONG = "trunk." + "é" * 40
DAMAGED, EMPTY = "damaged 'one'", "empty"
LAYERS = {"conv": 60, HOSTILE: 6, QUOTED: 5, LONG: 4, DAMAGED: 6, EMPTY: 3, "wide": FILTERS}
MODEL = "torchvision:resnet18@IMAGENET1K_V1"


def _reshape(result: Result, layer: str) -> Result:
    """Give the layers different shapes of images and activation maps."""
    count = len(result.filters)
    if layer == HOSTILE:
        images = torch.rand(count, 3, 24, 40)
        return replace(result, images=images, snapshots=(torch.rand(count, 3, 3, 24, 40) * 255).to(torch.uint8))
    if layer == QUOTED:
        return replace(result, images=torch.rand(count, 1, 40, 16), activations=torch.rand(count, 17))
    if layer == LONG:
        return replace(result, images=torch.rand(count, 4, 16, 16), activations=torch.rand(count))
    return result


def synthetic_result(filters: tuple[int, ...], layer: str = "conv") -> Result:
    """Return a result in which some filters are dead or have scores that are not finite.

    Of every 7 filters one is dead. Of every 50 filters one has steps that are not finite; of every second of these no
    step is finite.
    """
    result = toy_result(layer, filters, 7)
    scores, history, status = result.scores * 31234.5, result.history * 31234.5, list(result.status)
    for i, number in enumerate(filters):
        if number % 50 == 2:
            status[i] = "nonfinite"
            history[0, i] = math.nan
        if number % 100 == 2:
            scores[i], history[:, i] = math.nan, math.nan
    return _reshape(replace(result, scores=scores, history=history, status=tuple(status)), layer)


def expected_order(
    key: str = "number", *, layer: str = "conv", descending: bool = False, dead: bool = True
) -> list[int]:
    """Return a layer's filters in the order that its page must show; filters without a value come last."""
    result = synthetic_result(tuple(range(LAYERS[layer])), layer)
    by_key = {"number": torch.tensor(result.filters).float(), "score": result.scores}
    values = by_key[key] if key in by_key else _convergence_steps(result.history)
    visible = [n for n in result.filters if dead or result.status[n] != "dead"]

    def sort_key(n: int) -> tuple[bool, float, int]:
        value = float(values[n])
        return (True, 0.0, n) if math.isnan(value) else (False, -value if descending else value, n)

    return sorted(visible, key=sort_key)


def _convergence_steps(history: torch.Tensor) -> torch.Tensor:
    """Return the first steps that cover 95% of the range from the first finite score to the greatest."""
    steps = []
    for line in history.T.tolist():
        finite = [(step, value) for step, value in enumerate(line) if not math.isnan(value)]
        threshold = 0.05 * finite[0][1] + 0.95 * max(value for _, value in finite) if finite else 0.0
        steps.append(float(next((step for step, value in finite if value >= threshold - 1e-3), math.nan)))
    return torch.tensor(steps)


def toy_site(path: Path) -> Path:
    """Build a gallery with hostile layer names, several kinds of images, and damaged and missing units."""
    render = {"seed": 7, "steps": STEPS, "snapshots": 3, "optimizer": "default"}
    run = toy_run(dict(LAYERS), unit_size=2, model=MODEL, objective="", render=render)
    plans = [plan._replace(unit_size=200 if plan.layer in ("conv", "wide") else plan.unit_size) for plan in run.plans]
    folder = start_folder(path.with_name(f"{path.name} store"), type(run)(run.config, tuple(plans)))
    torch.manual_seed(0)
    for unit in folder.run.units:
        if unit.layer == EMPTY or (unit.layer == DAMAGED and unit.filters[0] == 2):
            continue
        record = commit(folder, unit, synthetic_result(unit.filters, unit.layer), [7] * len(unit.filters), seconds=1.0)
        if unit.layer == DAMAGED and unit.filters[0] == 4:
            _damage(folder.shard(unit, record.sha256))
    build_gallery(folder.path, path)
    return path


def shown_site(path: Path, kind: str) -> Path:
    """Build a gallery of 12 filters: of images of 6 channels, videos or signals, with snapshots.

    The last filters are dead, flat, and not finite.
    """
    colors = textures(24, 32)
    videos = torch.stack([colors[:12].roll(2 * i, -1) * (0.6 + 0.1 * i) for i in range(5)], 2)
    waves = torch.sigmoid(torch.linspace(0, 40, 250).sin() * torch.linspace(-3, 3, 12)[:, None])
    images, activations = {
        "six": (torch.cat([colors[:12], colors[12:]], 1), torch.rand(12, 5, 5)),
        "video": (videos, torch.rand(12, 4, 5, 5)),
        "signal": (torch.stack([waves, 1 - waves, waves.square()], 1), torch.rand(12, 62)),
    }[kind]
    result = toy_result("conv", range(12), 7)
    channels, *size = images.shape[1:]
    snapshots = torch.stack([images * 0.2, images * 0.6, images], 1)
    config = {"layer": "conv", "model": MODEL, "steps": STEPS, "mean": [0.0] * channels, "input_size": size}
    if kind == "six":
        config["bands"] = [5, 4, 3]
    shown = replace(
        result,
        images=images,
        activations=activations,
        status=("ok",) * 9 + ("dead", "flat", "nonfinite"),
        snapshots=(snapshots * 255).to(torch.uint8),
        config=config,
    )
    build_gallery(shown, path)
    return path


def _damage(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])


def heavy_site(path: Path) -> Path:
    """Build a gallery of 500 images of 128 pixels.

    The thumbnail files of the first 200 are as large as those of an ImageNet model; the other images are grey.
    """
    run = toy_run({"conv": 500}, unit_size=500)
    folder: Folder = start_folder(path.with_name(f"{path.name} store"), run)
    (unit,) = folder.run.units
    result = toy_result("conv", unit.filters, 7)
    images = torch.full((500, 3, 128, 128), 0.5)
    images[:200] = textures(200, 128)
    commit(folder, unit, replace(result, images=images), [7] * 500, seconds=1.0)
    build_gallery(folder.path, path)
    return path


def textures(count: int, side: int) -> torch.Tensor:
    """Return coloured noise ``(count, 3, side, side)`` whose amplitude falls with frequency, as in natural images."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    amplitude = 1 / (x.square() + y.square()).sqrt().clamp_min(1 / side)
    noise = torch.fft.rfft2(torch.randn(count, 3, side, side, generator=generator)) * amplitude
    waves = torch.fft.irfft2(noise, s=(side, side))
    mixed = torch.einsum("ck,nkhw->nchw", torch.tensor([[1.0, 0.5, 0.2], [1, 0, -0.3], [1, -0.5, 0.3]]), waves)
    return torch.sigmoid(1.5 * mixed / mixed.std((1, 2, 3), keepdim=True))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder over HTTP and yield its URL."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # the browser has left the page
                super().handle_error(request, client_address)

    handler = functools.partial(Handler, directory=str(folder))
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def folder_url(layer: str) -> str:
    """Return the part of a page's URL that stands for a layer."""
    return quote(folder_of(layer), safe="")


# Names of members that break careless code; the third is empty.
NAMES = (
    "</script><script>alert(1)</script>",
    "quo\"ted & 'single'",
    "",
    "tench, Tinca tinca",
    "goldfish",
    "a dog that looks at the camera from the left, with a red collar and a blurred green background " * 2,
    "шарик \u2028 日本語 \u202eright",
    "{{ 7 * 7 }}",
    "golden retriever",
    "retriever, golden coat",
)
FAMILY, FACETS = "directions:conv", "neuron:conv x2"


def family_directions() -> torch.Tensor:
    """Directions of which 0 and 4 have the same one, 8 is near them, 1 is opposite, and 9 is zero."""
    angles = torch.tensor([0.0, math.pi, 1.2, 1.5, 0.0, 2.0, 2.3, 2.6, 0.3, 0.0])
    length = torch.tensor([1.0, 2, 3, 1, 5, 1, 1, 1, 0.5, 0])
    return torch.stack([angles.cos(), angles.sin(), torch.zeros(10)], 1) * length[:, None]


def family_store(path: Path, *, done: int | None = None, layer: bool = True) -> Path:
    """Write a sweep of a family of ten named directions, of which seven are planned, one of facets, and a layer.

    Args:
        path: of the sweep's folder.
        done: number of units of the directions that are done. Default: all.
        layer: whether there is anything but the directions.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a direction of zeros
        named = directions("conv", family_directions(), names=NAMES)
    objectives = {FAMILY: named, FACETS: facets(neurons("conv", [1], [(0, 0), (1, 1)]), 2)}
    counts = {FAMILY: 10, "conv": 6, FACETS: 4}
    if not layer:
        objectives, counts = {FAMILY: named}, {FAMILY: 10}
    run = toy_run(counts, model=MODEL, objective="", families=describe_families(objectives))
    plans = [plan._replace(filters=(0, 1, 2, 3, 4, 6, 8)) if plan.layer == FAMILY else plan for plan in run.plans]
    folder = start_folder(path, type(run)(run.config, tuple(plans)))
    write_members(folder, objectives)
    units = [unit for unit in folder.run.units if unit.layer == FAMILY]
    for unit in folder.run.units:
        if unit in units[done:] and done is not None:
            continue
        result = toy_result(unit.layer, unit.filters, 7)
        commit(folder, unit, result, [7] * len(unit.filters), seconds=1.0)
    return folder.path
