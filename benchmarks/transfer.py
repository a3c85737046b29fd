"""Transfer: does another network recognise the image of a class?

An image that merely excites a network is not one that shows what the network looks for. Images of ImageNet classes are
made on one of two networks with ImageNet weights, SqueezeNet 1.0 and EfficientNet-Lite0, and classified by the other,
which took no part in making them. Rows are the published script, presets and numbers of steps; each is written when it
is measured, and not measured again, so that the command can be interrupted.

The classes are every twentieth of ImageNet's, from 10 and from 3 on: a hundred. The library's defaults were chosen on
multiples of 40, and at last of 25, of which ten are among them: the default is also measured with every tenth class
from 3 on, a hundred on which nothing was chosen.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import featvis_func as fv
from benchmarks.common import RESULTS, contact_sheet, machine, report
from benchmarks.evaluate import WEIGHTS_FILE, weights_path
from benchmarks.reference import reference

CLASSES = (*range(10, 1000, 20), *range(3, 1000, 20))
OTHERS = range(3, 1000, 10)
SCRIPT_STEPS = 128
SHOWN = 20
_RESAMPLES = 2000


class Network(NamedTuple):
    """A network, and its layer of class logits."""

    name: str
    spec: str
    weights: str
    """Name of the file of its weights."""
    layer: str


NETWORKS = (
    Network("squeezenet", "torchvision:squeezenet1_0", WEIGHTS_FILE, "classifier.1"),
    Network("lite0", "timm:tf_efficientnet_lite0", "tf_efficientnet_lite0-imagenet.safetensors", "classifier"),
)

# Name of a row -> options of fv.render; None: the published script.
METHODS: dict[str, dict[str, Any] | None] = {
    "published script": None,
    "default": {},
    "default, others": {},
    "32 steps": {"steps": 32},
    "64 steps": {"steps": 64},
    "128 steps": {"steps": 128},
    "256 steps": {"steps": 256},
    "published transforms": {"transforms": "published"},
    "lucid": {"transforms": "lucid"},
    "maco": {"transforms": "maco"},
    "own gradients": {"smooth_pools": False},
}


def classes_of(method: str) -> Sequence[int]:
    """The classes that a row is measured with."""
    return OTHERS if method == "default, others" else CLASSES


def weights_folder() -> Path:
    """The folder of the weights' files."""
    path = weights_path()
    return path.parent if path.is_file() else path


class Row(NamedTuple):
    """Images made on one network by one method, as the other network sees them. Means over the classes."""

    made_on: str
    method: str
    classes: int
    top1: float
    top1_low: float
    """Lower bound of the 95% confidence interval, by bootstrap over classes; ``top1_high`` is the upper one."""
    top1_high: float
    top5: float
    probability: float
    log_probability: float
    rank: float
    """Mean number of classes that the judge finds more likely."""
    own_top1: float
    """Share that the network itself ranks first."""
    saturation: float
    """Share of values below 0.02 or above 0.98."""
    grain: float
    """Share of the power above half the Nyquist frequency."""
    spectrum: float
    """Exponent of the power spectrum, ``1 / f ** spectrum``; about 2 in photographs."""
    seconds: float
    """Per image."""


def load(network: Network, device: str) -> fv.Model | None:
    """The network with its weights, or ``None`` without their file."""
    file = weights_folder() / network.weights
    if not file.is_file():
        return None
    model = fv.load_model(network.spec, weights=file)
    return model._replace(module=model.module.to(device))


@torch.no_grad()
def logits(model: fv.Model, images: Tensor) -> Tensor:
    """Class logits ``(n, classes)`` of images ``(n, 3, h, w)`` in ``[0, 1]``, resized to the model's input size."""
    device = next(model.module.parameters()).device
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    rows = []
    for part in images.split(16):
        if tuple(part.shape[-2:]) != tuple(model.size):
            part = F.interpolate(part, model.size, mode="bilinear", antialias=True)
        rows.append(model.module(((part - mean) / std).to(device)).cpu())
    return torch.cat(rows)


class Judgement(NamedTuple):
    """What a network makes of images, each ``(n,)``."""

    rank: Tensor
    """Number of classes with a larger logit than the image's own: 0 is recognised."""
    log_probability: Tensor


def judge(model: fv.Model, images: Tensor, classes: Sequence[int]) -> Judgement:
    """Classify images of classes.

    Args:
        model: a classifier.
        images: ``(n, 3, h, w)`` in ``[0, 1]``.
        classes: the class of each image.
    """
    values = logits(model, images)
    own = values[torch.arange(len(classes)), torch.tensor(list(classes))]
    return Judgement((values > own[:, None]).sum(1), own - values.logsumexp(1))


def bootstrap(values: Tensor, *, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean of ``(n,)`` values, from resamples with a fixed seed.

    >>> bootstrap(torch.ones(10))
    (1.0, 1.0)
    """
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (_RESAMPLES, len(values)), generator=generator)
    means = values.double()[index].mean(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def spectrum(images: Tensor) -> tuple[float, float]:
    """Grain, and the exponent of the power spectrum, of images ``(n, c, h, w)``, which need not be square.

    The exponent is fitted to the mean power in octaves between 4 cycles per image side and the Nyquist frequency.
    """
    height, width = images.shape[-2:]
    power = torch.fft.rfft2(images - images.mean((-2, -1), keepdim=True)).abs().square().double().mean((0, 1))
    # The columns between the first and the Nyquist frequency stand for their conjugates, too.
    twice = torch.full((power.shape[1],), 2.0, dtype=torch.float64)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    f = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    grain = ((power * twice)[f > 0.25].sum() / (power * twice).sum()).item()
    edges = [4 / min(height, width) * 2**i for i in range(16) if 4 / min(height, width) * 2**i < 0.5]
    points = []
    for low, high in zip(edges, [*edges[1:], 0.5], strict=True):
        ring = (f >= low) & (f < high)
        points.append((math.log(f[ring].mean().item()), math.log(power[ring].mean().item() + 1e-30)))
    x, y = torch.tensor(points, dtype=torch.float64).unbind(1)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return grain, -slope.item()


def make_images(
    model: fv.Model, layer: str, classes: Sequence[int], options: dict[str, Any] | None, device: str
) -> tuple[Tensor, float]:
    """Images of classes ``(n, 3, h, w)``, and seconds per image; compiling does not count.

    Args:
        model: a classifier.
        layer: of its logits.
        classes: to make images of.
        options: of ``fv.render``; ``None``: the published script.
        device: to compute on.
    """
    if options is None:
        start = time.perf_counter()
        size, wrapped, images = model.size[0], _AsMap(model.module), []
        # In batches of eight, as the benchmark of a step.
        for i in range(0, len(classes), 8):
            part = list(classes[i : i + 8])
            result = reference(
                wrapped, "logits", part, steps=SCRIPT_STEPS, input_size=size, mean=model.mean, std=model.std
            )
            images.append(result.images.cpu())
        return torch.cat(images), (time.perf_counter() - start) / len(classes)
    renderer = fv.make_renderer(model, layer, classes, device=device, **options)
    with fv.kept_memory(device == "cpu"):
        state, target = renderer.init(list(classes)[: renderer.batch_size], 0)
        renderer.step(renderer.weights, state, target)  # compiles
        start = time.perf_counter()
        result = renderer(classes)
    return result.images, (time.perf_counter() - start) / len(classes)


class _AsMap(torch.nn.Module):
    """A classifier whose logits have two more axes of length 1, since the published script takes maps only."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.logits = torch.nn.Unflatten(1, (-1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.module(images))


def measure(
    maker: tuple[Network, fv.Model],
    judging: fv.Model,
    method: str,
    classes: Sequence[int],
    device: str,
) -> tuple[Row, Tensor]:
    """Make images on one network, and have the other judge them."""
    network, model = maker
    images, seconds = make_images(model, network.layer, classes, METHODS[method], device)
    other, own = judge(judging, images, classes), judge(model, images, classes)
    first = (other.rank == 0).double()
    low, high = bootstrap(first)
    grain, exponent = spectrum(images)
    row = Row(
        made_on=network.name,
        method=method,
        classes=len(classes),
        top1=first.mean().item(),
        top1_low=low,
        top1_high=high,
        top5=(other.rank < 5).double().mean().item(),
        probability=other.log_probability.exp().mean().item(),
        log_probability=other.log_probability.mean().item(),
        rank=other.rank.double().mean().item(),
        own_top1=(own.rank == 0).double().mean().item(),
        saturation=((images < 0.02) | (images > 0.98)).double().mean().item(),
        grain=grain,
        spectrum=exponent,
        seconds=seconds,
    )
    return row, images


def main(device: str, rounds: int) -> None:
    """Measure the rows that ``results/transfer-DEVICE.json`` lacks; ``rounds`` is ignored."""
    loaded = [(network, load(network, device)) for network in NETWORKS]
    missing = [network.weights for network, model in loaded if model is None]
    if missing:
        print(f"transfer: not run; no file {', '.join(missing)} in {weights_folder()} (FEATVIS_WEIGHTS)")
        return
    makers = [(network, model) for network, model in loaded if model is not None]
    path = RESULTS / f"transfer-{device}.json"
    rows = _read(path)
    for method in METHODS:
        for i, maker in enumerate(makers):
            if (maker[0].name, method) == ("lite0", "own gradients"):  # it has no max pools
                continue
            if any((row.made_on, row.method) == (maker[0].name, method) for row in rows):
                continue
            row, images = measure(maker, makers[1 - i][1], method, classes_of(method), device)
            rows.append(row)
            RESULTS.mkdir(exist_ok=True)
            sheet = contact_sheet(images[:SHOWN], rows=2)
            sheet.save(RESULTS / f"transfer-{row.made_on}-{method.replace(',', '').replace(' ', '_')}.webp", quality=85)
            _write(path, rows, device)
            print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row._asdict().items()))
    report("transfer", device, {"rows": [row._asdict() for row in rows]}, [Row._fields, *rows])


def _read(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.is_file() else []


def _write(path: Path, rows: Sequence[Row], device: str) -> None:
    path.write_text(json.dumps({"machine": machine(device), "rows": [row._asdict() for row in rows]}, indent=1) + "\n")
