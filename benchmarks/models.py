"""Whether truncation is right for every model: all of torchvision's classifiers, and a tour of timm's families.

Of each model three layers: at a quarter, half and three quarters of its convolution, linear and norm modules, as far as
a forward pass calls them and they give something per image. For each layer the truncated graph must give the values
that a plain forward hook catches, bit for bit before the rewrites and to 1e-3 after them; its gradient to the image
must be finite and not zero; and it must take no more floating-point operations than a forward pass that ends there.

Weights are random, since no more is needed. Norms have random gains, and the statistics of random images: without those
a hundred layers of random weights overflow.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torchvision.models
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import featvis_func as fv
from benchmarks.common import report
from featvis_func.backbone.export import release, trace, truncate
from featvis_func.backbone.hooks import Backbone, example_images, private_copy
from featvis_func.backbone.layers import LayerRef
from featvis_func.models.base import seeded_init

KINDS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
TOLERANCE = 1e-3
SHARES = (0.25, 0.5, 0.75)

# Pixels, where 64 do not do; the rest of torchvision's classifiers take any size from 64 up.
SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_b_32": 96, "vit_l_32": 96, "vit_h_14": 56}
TIMM = {
    "convnextv2_atto": 64,
    "vit_tiny_patch16_224": 64,
    "vit_small_patch14_reg4_dinov2": 56,
    "eva02_tiny_patch14_224": 56,
    "swin_tiny_patch4_window7_224": 224,
    "mixer_s32_224": 224,
    "resmlp_12_224": 224,
    "tf_efficientnetv2_b0": 64,
    "mobilenetv4_conv_small": 64,
    "mobilevit_xxs": 64,
    "resnet18d": 64,
    "res2net50_14w_8s": 64,
    "dm_nfnet_f0": 64,
    "ghostnet_100": 64,
    "repvgg_a0": 64,
    "levit_128s": 224,
    "coatnet_nano_rw_224": 224,
    "poolformer_s12": 64,
    "xcit_nano_12_p16_224": 64,
    "pvt_v2_b0": 64,
    "fastvit_t8": 64,
    "edgenext_xx_small": 64,
    "mambaout_femto": 64,
}


class Checked(NamedTuple):
    """What was found out about one layer; differences are relative to the largest value."""

    layer: str
    kind: str
    shape: tuple[int, ...]
    before: float
    """Largest absolute difference to the hook's values before the rewrites, for batches of 3 and of 1 images."""
    after: float
    """Largest relative one after them."""
    gradient: float
    """Norm of the gradient to the images, after the rewrites."""
    gradient_error: float
    """Relative to the norm of the module's own."""
    flops: int
    flops_until: int
    """Of a forward pass that stops at the layer."""
    flops_whole: int

    @property
    def faults(self) -> list[str]:
        """What is wrong; nothing, if all is well."""
        return [
            what
            for what, wrong in (
                (f"differs by {self.before:.2g} before the rewrites", self.before != 0),
                (f"differs by {self.after:.2g} after the rewrites", not self.after <= TOLERANCE),
                (f"has a gradient of norm {self.gradient:.2g}", not 0 < self.gradient < float("inf")),
                (f"takes {self.flops} operations instead of {self.flops_until}", self.flops > self.flops_until),
                ("takes more than the whole model", self.flops_until > self.flops_whole),
            )
            if wrong
        ]


class Found(NamedTuple):
    """What was found out about one model."""

    model: str
    size: tuple[int, int]
    parameters: int
    listed: int
    """Layers in its list."""
    modules: int
    """Convolution, linear and norm modules."""
    uncalled: int
    """Of these: not called by the forward pass."""
    unfit: int
    """Of these: called, but their output is not one tensor of up to three axes made of each image."""
    seconds: float
    layers: tuple[Checked, ...]


def check(model: fv.Model, *, shares: Sequence[float] = SHARES) -> Found:
    """Checks the layers of a model at some shares of its depth.

    Args:
        model: its module is left as it is.
        shares: of its convolution, linear and norm modules, in ``[0, 1)``.

    Raises:
        Exception: of any kind, where the model cannot be traced.
    """
    start = time.perf_counter()
    # Frozen, as the graph is: a weight with a gradient makes torch multiply some matrices in another order.
    module = private_copy(model.module, None).requires_grad_(False)
    images = example_images(model, module)
    listed = len(fv.list_layers(model))
    paths = {path: child for path, child in module.named_modules() if isinstance(child, KINDS)}
    calls, shapes = _called(module, list(paths), images)
    fit = list(shapes)
    if not fit:
        raise ValueError(f"{model.name} has no layer to check")
    chosen = list(dict.fromkeys(fit[int(len(fit) * share)] for share in shares))
    wanted = {path: calls[path] for path in chosen}
    traced = trace(module, {LayerRef(path): count for path, count in wanted.items()}, images)
    try:
        plain, fast = (truncate(traced, chosen, optimize=optimize) for optimize in (False, True))
        alone = {path: truncate(traced, [path], optimize=False) for path in chosen}
    finally:
        release(traced)
    counted = {path: _flops(lambda x, b=backbone: b.apply(b.weights, x), images) for path, backbone in alone.items()}
    until = {path: _flops(lambda x, p=path: _by_hook(module, {p: calls[p]}, x), images) for path in chosen}
    whole = _flops(module, images)
    before = _differences(module, wanted, plain, images)
    after, gradients, errors = _gradients(module, wanted, fast, images)
    return Found(
        model.name,
        model.size,
        sum(p.numel() for p in module.parameters()),
        listed,
        len(paths),
        sum(calls[path] == 0 for path in paths),
        sum(calls[path] > 0 for path in paths) - len(fit),
        time.perf_counter() - start,
        tuple(
            Checked(
                path,
                type(paths[path]).__name__,
                shapes[path],
                before[path],
                after[path],
                gradients[path],
                errors[path],
                counted[path],
                until[path],
                whole,
            )
            for path in chosen
        ),
    )


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    pass


def _by_hook(module: nn.Module, calls: dict[str, int], images: Tensor) -> dict[str, Tensor]:
    """What layers give at their last calls, by plain hooks; the forward pass ends with the last."""
    values: dict[str, Tensor] = {}
    left = dict(calls)

    def hook(path: str) -> Callable[..., None]:
        def keep(child: nn.Module, args: Any, output: Tensor) -> None:
            left[path] -= 1
            if left[path] == 0:
                values[path] = output.clone()
            if not any(left.values()):
                raise _Stop

        return keep

    handles = [module.get_submodule(path).register_forward_hook(hook(path)) for path in calls]
    try:
        module(images)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return values


def _called(
    module: nn.Module, paths: Sequence[str], images: Tensor
) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """How often each module is called; of those that make a tensor of one to three axes of each image, these."""
    calls = dict.fromkeys(paths, 0)
    shapes: dict[str, tuple[int, ...]] = {}

    def hook(path: str) -> Callable[..., None]:
        def note(child: nn.Module, args: Any, output: Any) -> None:
            calls[path] += 1
            tensor = isinstance(output, Tensor) and output.requires_grad
            shapes.pop(path, None)
            if tensor and output.shape[0] == len(images) and 2 <= output.ndim <= 4:
                shapes[path] = tuple(output.shape[1:])

        return note

    handles = [module.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    module(images.clone().requires_grad_())
    for handle in handles:
        handle.remove()
    return calls, {path: shapes[path] for path in paths if path in shapes}


def _flops(call: Callable[[Tensor], object], images: Tensor) -> int:
    """Of a forward pass on one image."""
    # With a gradient asked for, or attention runs as one operation, of which the counter knows nothing.
    image = images[:1].clone().requires_grad_()
    counter = FlopCounterMode(display=False)
    with counter:
        call(image)
    return counter.get_total_flops()


def _differences(module: nn.Module, calls: dict[str, int], core: Backbone, images: Tensor) -> dict[str, float]:
    """The largest absolute differences, for all images and for one alone."""
    worst = dict.fromkeys(calls, 0.0)
    for batch in (images, images[:1]):
        # With a gradient asked for, or the module's attention runs as one operation, which rounds otherwise.
        batch = batch.clone().requires_grad_()
        truth = {path: value.detach() for path, value in _by_hook(module, calls, batch).items()}
        found = core.apply(core.weights, batch)
        for path in calls:
            worst[path] = max(worst[path], float((found[path].detach() - truth[path]).abs().max()))
    return worst


def _gradients(
    module: nn.Module, calls: dict[str, int], core: Backbone, images: Tensor
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Of each layer: the values' relative difference, the norm of a mixture's gradient, and that one's error."""

    def run(apply: Callable[[Tensor], dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        leaf = images.clone().requires_grad_()
        values = apply(leaf)
        slopes = {}
        for path in calls:
            generator = torch.Generator().manual_seed(0)
            mixed = (torch.randn(values[path].shape, generator=generator).to(values[path]) * values[path]).sum()
            (slope,) = torch.autograd.grad(mixed, leaf, retain_graph=True)
            slopes[path] = slope.double()
        return {path: value.detach().double() for path, value in values.items()}, slopes

    truth, own = run(lambda x: _by_hook(module, calls, x))
    found, ours = run(lambda x: core.apply(core.weights, x))
    return (
        {path: float((found[path] - truth[path]).abs().max() / truth[path].abs().max()) for path in calls},
        {path: float(ours[path].norm()) for path in calls},
        {path: float((ours[path] - own[path]).norm() / own[path].norm()) for path in calls},
    )


@contextmanager
def _statistics_of(module: nn.Module) -> Iterator[None]:
    """Within the block, batch norms take their running statistics from what they see, and nothing else changes."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def enlivened(model: fv.Model) -> fv.Model:
    """A model of random weights whose layers all have something to say: random gains, norms that know images."""
    images = example_images(model, model.module)
    with seeded_init(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, parameter in model.module.named_parameters():
            # Gains that start at zero or near it, so that training starts with the shortcuts.
            if parameter.ndim <= 1 or parameter.abs().max() < 1e-3:
                parameter.add_(torch.rand_like(parameter).add_(0.5 if "bias" not in name else -0.5).mul_(0.3))
        with _statistics_of(model.module):
            model.module(images)
    return model


def torchvision_model(name: str) -> fv.Model:
    """A classifier of torchvision with random weights, for small images."""
    size = SIZES.get(name, 64)
    if name.startswith("vit_"):  # built for one size
        with seeded_init():
            module = torchvision.models.get_model(name, weights=None, image_size=size)
        return enlivened(fv.load_model(module.eval(), size=size)._replace(name=f"torchvision:{name}@none"))
    return enlivened(fv.load_model(f"torchvision:{name}@none", size=size))


def models() -> Iterator[tuple[str, Callable[[], fv.Model]]]:
    """What is checked: name -> how to make it."""
    for name in torchvision.models.list_models(module=torchvision.models):
        yield f"torchvision:{name}", lambda name=name: torchvision_model(name)
    for name, size in TIMM.items():
        yield f"timm:{name}", lambda name=name, size=size: enlivened(fv.load_model(f"timm:{name}@none", size=size))


def examine(make: Callable[[], fv.Model]) -> dict[str, Any]:
    """What :func:`check` found, or why it could not look, as JSON can hold it."""
    try:
        found = check(make())
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    faults = [f"{layer.layer} {fault}" for layer in found.layers for fault in layer.faults]
    return {**found._asdict(), "layers": [layer._asdict() for layer in found.layers], "faults": faults}


def row(name: str, data: dict[str, Any]) -> list[object]:
    """A line of the table."""
    if "error" in data:
        return [name, *[""] * 10, data["error"].splitlines()[0][:80]]
    layers = data["layers"]
    worst = [max(layer[kind] for layer in layers) for kind in ("before", "after")]
    shares = " ".join(f"{layer['flops'] / layer['flops_whole']:.2f}" for layer in layers)
    counts = [data[kind] for kind in ("listed", "modules", "uncalled", "unfit")]
    size = "x".join(map(str, data["size"]))
    verdict = "; ".join(data["faults"]) or "ok"
    return [name, size, data["parameters"] / 1e6, *counts, *worst, shares, data["seconds"], verdict]


def conclude(data: dict[str, dict[str, Any]]) -> None:
    """Prints and writes what was found of all models."""
    heads = ["model", "px", "Mparam", "layers", "modules", "uncalled", "unfit", "before", "after", "FLOPs", "s", ""]
    found = [d for d in data.values() if "error" not in d]
    counts = {
        "models": len(data),
        "errors": len(data) - len(found),
        "with_faults": sum(bool(d["faults"]) for d in found),
        "layers": sum(len(d["layers"]) for d in found),
        "modules": sum(d["modules"] for d in found),
        "uncalled": sum(d["uncalled"] for d in found),
        "unfit": sum(d["unfit"] for d in found),
        "largest_gradient_error": max(layer["gradient_error"] for d in found for layer in d["layers"]),
    }
    report("models", "cpu", {"counts": counts, "models": data}, [heads, *(row(name, d) for name, d in data.items())])
    print(counts)


def main(device: str, rounds: int) -> None:
    """Prints and writes what was found. Nothing varies: ``rounds`` has no effect."""
    if device != "cpu":
        raise ValueError("the check is about values, and made for the cpu")
    data: dict[str, dict[str, Any]] = {}
    for name, make in models():
        data[name] = examine(make)
        print(*row(name, data[name]), flush=True)
        gc.collect()
    conclude(data)
