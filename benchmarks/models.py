"""Check that truncation is correct for many models: all classifiers of torchvision, and families of timm.

Per model, three layers are checked: those at a quarter, a half and three quarters of its convolution, linear and
normalisation modules, among those that a forward pass calls and that return a tensor per image. For each layer the
truncated graph must return the values that a plain forward hook catches, bit for bit before the graph is rewritten and
to a relative error of 1e-3 after; its gradient with respect to the image must be finite and not zero; and it must take
no more floating-point operations than a forward pass that stops at the layer.

Weights are random, because the check needs no others. Normalisation modules have random gains and the statistics of
random images: without those the activations of a hundred layers of random weights overflow.
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
from benchmarks.evaluate import IMAGENET_MEAN, IMAGENET_STD
from featvis_func.backbone.export import trace
from featvis_func.backbone.hooks import Backbone, example_images
from featvis_func.backbone.layers import LayerRef
from featvis_func.backbone.truncate import release, truncate
from featvis_func.models.base import seeded_init
from featvis_func.models.copying import private_copy

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

# Input sizes in pixels of the models that do not take 64; all other classifiers of torchvision do.
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


class LayerReport(NamedTuple):
    """The check of one layer; differences are relative to the largest value."""

    layer: str
    kind: str
    shape: tuple[int, ...]
    before: float
    """Largest absolute difference from the hook's values before the graph is rewritten, for batches of 3 and of 1."""
    after: float
    """Largest relative difference after it is rewritten."""
    gradient: float
    """Norm of the gradient with respect to the images, after the graph is rewritten."""
    gradient_error: float
    """Norm of its difference from the module's own gradient, relative to the latter's norm."""
    flops: int
    flops_until: int
    """Of a forward pass that stops at the layer."""
    flops_model: int

    @property
    def problems(self) -> list[str]:
        """What is wrong; empty if the layer passes."""
        return [
            problem
            for problem, wrong in (
                (f"differs by {self.before:.2g} before the rewrites", self.before != 0),
                (f"differs by {self.after:.2g} after the rewrites", not self.after <= TOLERANCE),
                (f"has a gradient of norm {self.gradient:.2g}", not 0 < self.gradient < float("inf")),
                (f"takes {self.flops} operations instead of {self.flops_until}", self.flops > self.flops_until),
                ("takes more operations than the model", self.flops_until > self.flops_model),
            )
            if wrong
        ]


class ModelReport(NamedTuple):
    """The check of one model."""

    model: str
    size: tuple[int, ...]
    parameters: int
    listed: int
    """Number of layers that :func:`featvis_func.list_layers` returns."""
    modules: int
    """Number of convolution, linear and normalisation modules."""
    uncalled: int
    """Number of these that the forward pass does not call."""
    unsupported: int
    """Number of these that are called, but do not return one tensor with one to three axes per image."""
    seconds: float
    layers: tuple[LayerReport, ...]


def check(model: fv.Model, *, shares: Sequence[float] = SHARES) -> ModelReport:
    """Check the layers of a model at some fractions of its depth.

    Args:
        model: its module is not changed.
        shares: fractions of the list of its convolution, linear and normalisation modules, in ``[0, 1)``.

    Raises:
        Exception: of any kind, where the model cannot be traced.
    """
    start = time.perf_counter()
    # Frozen, as the graph is: torch multiplies some matrices in another order if a weight requires a gradient.
    module = private_copy(model.module, None).requires_grad_(False)
    images = example_images(model, module)
    listed = len(fv.list_layers(model))
    modules = {path: child for path, child in module.named_modules() if isinstance(child, KINDS)}
    calls, shapes = _calls_and_shapes(module, list(modules), images)
    supported = list(shapes)
    if not supported:
        raise ValueError(f"{model.name} has no layer to check")
    chosen = list(dict.fromkeys(supported[int(len(supported) * share)] for share in shares))
    chosen_calls = {path: calls[path] for path in chosen}
    traced = trace(module, {LayerRef(path): count for path, count in chosen_calls.items()}, images)
    try:
        exact, optimized = (truncate(traced, chosen, optimize=optimize) for optimize in (False, True))
        separate = {path: truncate(traced, [path], optimize=False) for path in chosen}
    finally:
        release(traced)
    flops = {path: _flops(lambda x, b=backbone: b.apply(b.weights, x), images) for path, backbone in separate.items()}
    flops_until = {path: _flops(lambda x, p=path: _hook_values(module, {p: calls[p]}, x), images) for path in chosen}
    flops_model = _flops(module, images)
    before = _differences(module, chosen_calls, exact, images)
    after, gradients, errors = _compare_gradients(module, chosen_calls, optimized, images)
    return ModelReport(
        model.name,
        model.size,
        sum(p.numel() for p in module.parameters()),
        listed,
        len(modules),
        sum(calls[path] == 0 for path in modules),
        sum(calls[path] > 0 for path in modules) - len(supported),
        time.perf_counter() - start,
        tuple(
            LayerReport(
                path,
                type(modules[path]).__name__,
                shapes[path],
                before[path],
                after[path],
                gradients[path],
                errors[path],
                flops[path],
                flops_until[path],
                flops_model,
            )
            for path in chosen
        ),
    )


class _AllCaught(Exception):  # noqa: N818 - a signal, not an error
    pass


def _hook_values(module: nn.Module, calls: dict[str, int], images: Tensor) -> dict[str, Tensor]:
    """Return the layers' outputs at their last calls, by plain hooks; the forward pass ends once all are caught."""
    values: dict[str, Tensor] = {}
    left = dict(calls)

    def hook(path: str) -> Callable[..., None]:
        def keep(child: nn.Module, args: Any, output: Tensor) -> None:
            left[path] -= 1
            if left[path] == 0:
                values[path] = output.clone()
            if not any(left.values()):
                raise _AllCaught

        return keep

    handles = [module.get_submodule(path).register_forward_hook(hook(path)) for path in calls]
    try:
        module(images)
    except _AllCaught:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return values


def _calls_and_shapes(
    module: nn.Module, paths: Sequence[str], images: Tensor
) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Count the calls of each module; return also the output shapes of those that return 1 to 3 axes per image."""
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
    """Count the floating-point operations of a forward pass on one image."""
    # The input requires a gradient: without, attention runs as one fused operation, which the counter does not know.
    image = images[:1].clone().requires_grad_()
    counter = FlopCounterMode(display=False)
    with counter:
        call(image)
    return counter.get_total_flops()


def _differences(module: nn.Module, calls: dict[str, int], backbone: Backbone, images: Tensor) -> dict[str, float]:
    """Return each layer's largest absolute difference from the hook's values, over all images and one alone."""
    worst = dict.fromkeys(calls, 0.0)
    for batch in (images, images[:1]):
        # The input requires a gradient: without, the module's attention runs fused, which rounds differently.
        batch = batch.clone().requires_grad_()
        expected = {path: value.detach() for path, value in _hook_values(module, calls, batch).items()}
        actual = backbone.apply(backbone.weights, batch)
        for path in calls:
            worst[path] = max(worst[path], float((actual[path].detach() - expected[path]).abs().max()))
    return worst


def _compare_gradients(
    module: nn.Module, calls: dict[str, int], backbone: Backbone, images: Tensor
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Compare a random linear combination of each layer's values, and its gradient.

    Returns:
        For each layer: the relative difference of the values, the norm of the gradient, and its relative error.
    """

    def run(apply: Callable[[Tensor], dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        leaf = images.clone().requires_grad_()
        values = apply(leaf)
        gradients = {}
        for path in calls:
            generator = torch.Generator().manual_seed(0)
            mixed = (torch.randn(values[path].shape, generator=generator).to(values[path]) * values[path]).sum()
            (gradient,) = torch.autograd.grad(mixed, leaf, retain_graph=True)
            gradients[path] = gradient.double()
        return {path: value.detach().double() for path, value in values.items()}, gradients

    expected, expected_gradients = run(lambda x: _hook_values(module, calls, x))
    actual, gradients = run(lambda x: backbone.apply(backbone.weights, x))
    return (
        {path: float((actual[path] - expected[path]).abs().max() / expected[path].abs().max()) for path in calls},
        {path: float(gradients[path].norm()) for path in calls},
        {
            path: float((gradients[path] - expected_gradients[path]).norm() / expected_gradients[path].norm())
            for path in calls
        },
    )


@contextmanager
def _recording_statistics(module: nn.Module) -> Iterator[None]:
    """Within the block, batch norms replace their running statistics by those of their input; nothing else changes."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def randomized(model: fv.Model) -> fv.Model:
    """Give a model with random weights random gains and batch norm statistics, so that no layer is constant."""
    images = example_images(model, model.module)
    with seeded_init(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, parameter in model.module.named_parameters():
            # Gains that are initialised at or near zero, so that training starts with the residual connections.
            if parameter.ndim <= 1 or parameter.abs().max() < 1e-3:
                parameter.add_(torch.rand_like(parameter).add_(0.5 if "bias" not in name else -0.5).mul_(0.3))
        with _recording_statistics(model.module):
            model.module(images)
    return model


def torchvision_model(name: str) -> fv.Model:
    """Load a classifier of torchvision with random weights, for small images."""
    size = SIZES.get(name, 64)
    if name.startswith("vit_"):  # its position embedding has one size
        with seeded_init():
            module = torchvision.models.get_model(name, weights=None, image_size=size)
        model = fv.load_model(module.eval(), size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        return randomized(model._replace(name=f"torchvision:{name}@none"))
    return randomized(fv.load_model(f"torchvision:{name}@none", size=size))


def models() -> Iterator[tuple[str, Callable[[], fv.Model]]]:
    """Yield the models that are checked: name and the function that makes the model."""
    for name in torchvision.models.list_models(module=torchvision.models):
        yield f"torchvision:{name}", lambda name=name: torchvision_model(name)
    for name, size in TIMM.items():
        yield f"timm:{name}", lambda name=name, size=size: randomized(fv.load_model(f"timm:{name}@none", size=size))


def examine(make: Callable[[], fv.Model]) -> dict[str, Any]:
    """Return the report of :func:`check` as JSON holds it, or the error that it raised."""
    try:
        model_report = check(make())
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    layers = model_report.layers
    problems = [f"{layer.layer} {problem}" for layer in layers for problem in layer.problems]
    return {**model_report._asdict(), "layers": [layer._asdict() for layer in layers], "problems": problems}


def row(name: str, data: dict[str, Any]) -> list[object]:
    """Return a row of the table."""
    if "error" in data:
        return [name, *[""] * 10, data["error"].splitlines()[0][:80]]
    layers = data["layers"]
    worst = [max(layer[kind] for layer in layers) for kind in ("before", "after")]
    shares = " ".join(f"{layer['flops'] / layer['flops_model']:.2f}" for layer in layers)
    counts = [data[kind] for kind in ("listed", "modules", "uncalled", "unsupported")]
    size = "x".join(map(str, data["size"]))
    verdict = "; ".join(data["problems"]) or "ok"
    return [name, size, data["parameters"] / 1e6, *counts, *worst, shares, data["seconds"], verdict]


def summarize(data: dict[str, dict[str, Any]]) -> None:
    """Print and write the reports of all models."""
    headings = [
        "model", "pixels", "Mparam", "layers", "modules", "uncalled", "unsupported", "difference before",
        "difference after", "FLOPs / model's", "seconds", "verdict",
    ]  # fmt: skip
    reports = [d for d in data.values() if "error" not in d]
    counts = {
        "models": len(data),
        "errors": len(data) - len(reports),
        "with_problems": sum(bool(d["problems"]) for d in reports),
        "layers": sum(len(d["layers"]) for d in reports),
        "modules": sum(d["modules"] for d in reports),
        "uncalled": sum(d["uncalled"] for d in reports),
        "unsupported": sum(d["unsupported"] for d in reports),
        "largest_gradient_error": max(layer["gradient_error"] for d in reports for layer in d["layers"]),
    }
    report("models", "cpu", {"counts": counts, "models": data}, [headings, *(row(name, d) for name, d in data.items())])
    print(counts)


def main(device: str, rounds: int) -> None:
    """Print and write the report of each model. Nothing is timed: ``rounds`` has no effect."""
    if device != "cpu":
        raise ValueError(f"the benchmark models compares values and runs on the cpu only, got device {device!r}")
    data: dict[str, dict[str, Any]] = {}
    for name, make in models():
        data[name] = examine(make)
        print(*row(name, data[name]), flush=True)
        gc.collect()
    summarize(data)
