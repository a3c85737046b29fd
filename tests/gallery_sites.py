"""Galleries of made-up results for the tests in a browser, and a web server for them."""

import functools
import http.server
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from featvis_func.gallery import build_gallery
from featvis_func.rendering.result import Result
from featvis_func.sweep.layout import Folder, start_folder
from featvis_func.sweep.plan import folder_of
from featvis_func.sweep.shard import commit
from tests.sweep_toys import STEPS, toy_result, toy_run

FILTERS = 1010
"""Of the layer ``wide``, which has three pages."""
HOSTILE = 'a"><script>alert(1)</script>'
QUOTED = "x/y.z %2F é"
# Its folder's name is cut off, in the midst of a letter that is quoted.
LONG = "trunk." + "é" * 40
DAMAGED, EMPTY = "damaged 'one'", "empty"
LAYERS = {"conv": 60, HOSTILE: 6, QUOTED: 5, LONG: 4, DAMAGED: 6, EMPTY: 3, "wide": FILTERS}
MODEL = "torchvision:resnet18@IMAGENET1K_V1"


def _shaped(result: Result, layer: str) -> Result:
    """Other kinds of images and of activation maps in each layer."""
    count = len(result.filters)
    if layer == HOSTILE:
        images = torch.rand(count, 3, 24, 40)
        return replace(result, images=images, snapshots=(torch.rand(count, 3, 3, 24, 40) * 255).to(torch.uint8))
    if layer == QUOTED:
        return replace(result, images=torch.rand(count, 1, 40, 16), activations=torch.rand(count, 17))
    if layer == LONG:
        return replace(result, images=torch.rand(count, 4, 16, 16), activations=torch.rand(count))
    return result


def filters_of(filters: tuple[int, ...], layer: str = "conv") -> Result:
    """Of every 7, one is dead; of every 50, one has steps that were not finite, and of every 100, no other ones."""
    result = toy_result(layer, filters, 7)
    scores, history, status = result.scores * 31234.5, result.history * 31234.5, list(result.status)
    for i, number in enumerate(filters):
        if number % 50 == 2:
            status[i] = "nonfinite"
            history[0, i] = math.nan
        if number % 100 == 2:
            scores[i], history[:, i] = math.nan, math.nan
    return _shaped(replace(result, scores=scores, history=history, status=tuple(status)), layer)


def numbers(key: str = "number", *, layer: str = "conv", falling: bool = False, dead: bool = True) -> list[int]:
    """The filters of a layer, in the order that the page shall show; those without a value stand last."""
    result = filters_of(tuple(range(LAYERS[layer])), layer)
    values = {"number": torch.tensor(result.filters).float(), "score": result.scores}.get(key, _settled(result.history))
    shown = [n for n in result.filters if dead or result.status[n] != "dead"]

    def place(n: int) -> tuple[bool, float, int]:
        value = float(values[n])
        return (True, 0.0, n) if math.isnan(value) else (False, -value if falling else value, n)

    return sorted(shown, key=place)


def _settled(history: torch.Tensor) -> torch.Tensor:
    """The first step at 95% of the way from the first finite score to the greatest."""
    found = []
    for line in history.T.tolist():
        finite = [(step, value) for step, value in enumerate(line) if not math.isnan(value)]
        goal = 0.05 * finite[0][1] + 0.95 * max(value for _, value in finite) if finite else 0.0
        found.append(float(next((step for step, value in finite if value >= goal - 1e-3), math.nan)))
    return torch.tensor(found)


def toy_site(path: Path) -> Path:
    """A gallery of layers with hostile names, of all kinds of images, with units damaged and missing."""
    render = {"seed": 7, "steps": STEPS, "snapshots": 3, "optimizer": "default"}
    run = toy_run(dict(LAYERS), unit_size=2, model=MODEL, objective="", render=render)
    plans = [plan._replace(unit_size=200 if plan.layer in ("conv", "wide") else plan.unit_size) for plan in run.plans]
    folder = start_folder(path.with_name(f"{path.name} store"), type(run)(run.config, tuple(plans)))
    torch.manual_seed(0)
    for unit in folder.run.units:
        if unit.layer == EMPTY or (unit.layer == DAMAGED and unit.filters[0] == 2):
            continue
        done = commit(folder, unit, filters_of(unit.filters, unit.layer), [7] * len(unit.filters), seconds=1.0)
        if unit.layer == DAMAGED and unit.filters[0] == 4:
            _damage(folder.shard(unit, done.sha256))
    build_gallery(folder.path, path)
    return path


def _damage(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])


def heavy_site(path: Path) -> Path:
    """A gallery of 500 images of 128 pixels.

    The thumbnails of the first 200 are as large as those of a photographs' network; the others are grey.
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
    """Coloured noise ``(count, 3, side, side)`` whose amplitude falls with the frequency, as that of an image."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    amplitude = 1 / (x.square() + y.square()).sqrt().clamp_min(1 / side)
    noise = torch.fft.rfft2(torch.randn(count, 3, side, side, generator=generator)) * amplitude
    waves = torch.fft.irfft2(noise, s=(side, side))
    mixed = torch.einsum("ck,nkhw->nchw", torch.tensor([[1.0, 0.5, 0.2], [1, 0, -0.3], [1, -0.5, 0.3]]), waves)
    return torch.sigmoid(1.5 * mixed / mixed.std((1, 2, 3), keepdim=True))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A web server of a folder's files: its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # the browser is on another page by now
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
    """The part of a page's address that stands for a layer."""
    return quote(folder_of(layer), safe="")
