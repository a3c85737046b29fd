"""The published eager script as a baseline: faithful in its results and in its cost.

:func:`reference` runs it to the end; :func:`make_reference_step` returns single iterations, for timings that alternate
between several methods. Nothing here is optimised, and nothing of the library is used.

Quirks of the published script that are kept on purpose, because results or cost depend on them:

1.  One draw of the random transform serves the whole batch, and the gradient norm, the noise and the clip are over the
    whole batch: a filter's image depends on the other filters in its batch.
2.  Each of the four random steps is a ``RandomAffine`` of its own: four nearest-neighbour resamplings, each with an
    angle drawn (even if it can only be 0). Pixels from outside of the frame are 0 (black), not the 0.5 of the pad.
    Translations are fractions ``8 / W`` and ``4 / W``, which torchvision multiplies by the padded width, so that images
    of 224 px move by up to 9 and 5 px, not 8 and 4.
3.  The transformed image is resized to 256 px; then the preset of the weights (resize to 256 px: no change; centre crop
    of 224 px) cuts the border off: without a shift the model sees the central 196 of 224 px. The border gets hardly any
    gradient and stays paler and smoother. It does not keep its initial values, since Adam works on frequencies, each of
    which covers the whole image.
4.  The model runs to its last layer, although nothing after the target layer is used.
5.  The layer's output is taken by a global forward hook that does not clone it. If an in-place ReLU follows, the
    objective is that of the rectified map, with zero gradients where the map is negative.
6.  Gradients of all weights that require one are computed and not used.
7.  The gradient is divided by its norm, and then clipped to norm 0.1: the clip always acts.
8.  The image is decoded a second time in every step, and every image's objective is read with ``.item()``.
9.  ``objective="layer"`` maximises channel ``i`` for image ``i``, not the whole layer.

Deviations, none of which changes a result:

*   The hook exists only during the forward pass of a step, and gradients of weights are not stored in ``.grad``: the
    model is not changed.
*   The global random state is forked; the published script draws from the global generator.
*   Only images of three channels are supported. For others the published script skips the sigmoid and then fails on its
    own check of bounds. The check itself is left out: the output of a sigmoid always passes it.

A further deviation concerns models with another input size than 224 px or another normalisation than ImageNet's, for
which there is no published script: with ``k = input_size / 224``, the pad is ``round(16 k)`` px and the translations
``8 k / W`` and ``4 k / W``, the transformed image is resized to ``round(256 k)`` px, and the preset crops
``input_size`` and uses the model's own mean and std. As much of the image is visible, and it moves as far, as at 224
px, up to rounding.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torchvision.models import SqueezeNet1_0_Weights
from torchvision.transforms import v2

from benchmarks.evaluate import IMAGENET_MEAN, IMAGENET_STD, INPUT_SIZE, check_input

INIT_SCALE = 0.01  # standard deviation of the initial spectrum
DECAY = 1.0  # the amplitude is the frequency to the power of -DECAY
MAGIC = 4.0  # from Lucid, as in the published script
# Lucid's SVD square root of ImageNet's colour correlation, and the largest norm of its columns.
COLOR = ((0.26, 0.09, 0.02), (0.27, 0.0, -0.05), (0.27, -0.09, 0.03))
COLOR_NORM = 0.46195
PAD = 16  # px on each side, filled with 0.5
SHIFTS = (8, 4)  # px, before and after scale and rotation
RESIZE = 256  # px, before the centre crop to the input size
GRADIENT_EPSILON = 1e-8
GRADIENT_NOISE = 1e-6  # standard deviation; as a variance it would lower the scores by a quarter
GRADIENT_CLIP = 0.1


class Best(NamedTuple):
    """The best image of one filter so far."""

    image: Tensor  # (3, h, w) in [0, 1], without the random transform
    activation: Tensor  # (h', w'), map of the maximised channel, with that step's transform
    score: float  # that step's objective
    step: int  # counted from 0


class Progress(NamedTuple):
    """Report of one iteration."""

    step: int  # counted from 0
    values: list[float]  # n objectives of this step
    best: list[Best]  # of each of the n filters, up to and including this step


class ReferenceResult(NamedTuple):
    """Results of the published script for n filters."""

    images: Tensor  # (n, 3, h, w) in [0, 1], each from its filter's best step
    activations: Tensor  # (n, h', w') of the maximised channel at the best step
    scores: Tensor  # (n,) the objective at the best step
    best_step: Tensor  # (n,) int64, counted from 0
    history: Tensor  # (steps, n) the objective at every step
    seconds_per_step: list[float]  # wall time of each step


def spectrum_scale(height: int, width: int) -> Tensor:
    """Return the amplitude of each frequency, ``1 / max(f, 1 / max(height, width)) ** decay``.

    Args:
        height: Image height in px.
        width: Image width in px.

    Returns:
        (height, width // 2 + 1) float32; one more column if the width is odd.
    """
    columns = width // 2 + (2 if width % 2 else 1)
    fy = torch.fft.fftfreq(height)[:, None]
    fx = torch.fft.fftfreq(width)[None, :columns]
    frequency = torch.sqrt(fx**2 + fy**2)
    return 1.0 / frequency.clamp(min=1.0 / max(height, width)) ** DECAY


def decode(spectrum: Tensor, scale: Tensor, color: Tensor, width: int) -> Tensor:
    """Decode spectra into images: scaled inverse Fourier transform, colour matrix, sigmoid.

    Args:
        spectrum: (n, 3, h, columns, 2) float32; the last axis is real, imaginary.
        scale: (h, columns), see :func:`spectrum_scale`.
        color: (3, 3), rows are red, green, blue.
        width: Image width in px; crops the extra column if it is odd.

    Returns:
        (n, 3, h, width) in [0, 1].
    """
    complex_spectrum = torch.view_as_complex(scale[..., None] * spectrum)
    pixels = torch.fft.irfft2(complex_spectrum, norm="ortho")[..., :width] / MAGIC
    return torch.sigmoid((pixels.movedim(1, -1) @ color.T).movedim(-1, 1))


def resize_size(input_size: int) -> int:
    """Return the image size before the centre crop to the input size, in px: 256 for 224."""
    return round(RESIZE * input_size / INPUT_SIZE)


def random_transform(size: int, *, input_size: int = INPUT_SIZE) -> Callable[[Tensor], Tensor]:
    """Return the published chain of random transforms, up to and including the resize to 256 px.

    It draws from the global generator, once for the whole batch.

    Args:
        size: Height and width of the image in px.
        input_size: Height and width of the model's input in px; pad, shifts and resize are proportional to it.

    Returns:
        A function (n, 3, size, size) -> (n, 3, r, r), where r is that of :func:`resize_size`.
    """
    unit = input_size / INPUT_SIZE
    first, second = (shift * unit / size for shift in SHIFTS)
    resized = resize_size(input_size)
    return v2.Compose(
        [
            v2.Pad(round(PAD * unit), fill=0.5),
            v2.RandomAffine(degrees=(0.0, 0.0), translate=(first, first)),
            v2.RandomAffine(degrees=(0.0, 0.0), scale=(0.95, 1.05)),
            v2.RandomAffine(degrees=(-5.0, 5.0)),
            v2.RandomAffine(degrees=(0.0, 0.0), translate=(second, second)),
            v2.CenterCrop([size, size]),
            v2.Resize([resized, resized], interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
        ]
    )


def preset(
    *,
    input_size: int = INPUT_SIZE,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Callable[[Tensor], Tensor]:
    """Return torchvision's preset of ImageNet weights: resize to 256 px, centre crop of 224 px, normalise.

    Args:
        input_size: Height and width of the model's input in px; the resize is proportional to it.
        mean, std: Normalisation of the model's input, per channel.

    Returns:
        A function (n, 3, h, w) in [0, 1] -> (n, 3, input_size, input_size).
    """
    # SqueezeNet, ResNet-18 and GoogLeNet (V1 weights) share this preset.
    return SqueezeNet1_0_Weights.IMAGENET1K_V1.transforms(
        crop_size=input_size, resize_size=resize_size(input_size), mean=tuple(mean), std=tuple(std)
    )


def find_layer(model: nn.Module, layer: str) -> nn.Module:
    """Return the module whose name is ``layer``, or else ends with it.

    Args:
        model: The model that contains it.
        layer: Full name of a module, or an ending of only one module's name.

    Returns:
        The module.

    Raises:
        ValueError: If no module's name, or more than one, ends with ``layer``.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if layer in modules:
        return modules[layer]
    names = [name for name in modules if layer and name.endswith(layer)]
    if len(names) != 1:
        known = f"these end with it: {names}" if names else f"the model has: {list(modules)}"
        raise ValueError(f"layer {layer!r}: expected the end of one module's name; {known}")
    return modules[names[0]]


@contextmanager
def catch(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of a module with a global forward hook, without cloning them.

    Args:
        module: The module whose outputs to collect.

    Yields:
        A list that each forward pass of the module appends to. An in-place operation that follows changes its tensors,
        as in the published script.
    """
    caught: list[Tensor] = []

    def hook(source: nn.Module, inputs: object, output: Tensor) -> None:
        del inputs
        if source is module:
            caught.append(output)

    handle = register_module_forward_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()


RandomState = tuple[Tensor, Tensor | None]


@contextmanager
def forked_random_state(device: torch.device, state: RandomState | None = None) -> Iterator[Callable[[], RandomState]]:
    """Fork the global random state of the CPU and of the device, and continue from ``state``.

    Args:
        device: Device on which noise is drawn, besides the CPU.
        state: Return value of an earlier block's yielded function, or None to start from the current state.

    Yields:
        A function that returns the state from which a later block continues.
    """
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        if state is not None:
            torch.set_rng_state(state[0])
            if state[1] is not None:
                torch.cuda.set_rng_state(state[1], device)
        yield lambda: (torch.get_rng_state(), torch.cuda.get_rng_state(device) if is_cuda else None)


def make_reference_step(
    model: nn.Module,
    layer: str,
    filters: Sequence[int],
    *,
    size: int | None = None,
    input_size: int = INPUT_SIZE,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    lr: float = 0.05,
    seed: int = 0,
    objective: str = "channel",
) -> Callable[[], Progress]:
    """Return one iteration of the published script, as a callable that holds its state.

    Calls may alternate with anything else, such as another such callable: after a call the model, the global random
    state and the global hooks are as before. The first call is slower, like any first call of a model.

    Args:
        model: A classifier of (n, 3, input_size, input_size) normalised images, in eval mode.
        layer: Name, or end of the name, of a module with (n, c, h', w') output.
        filters: The n channels to maximise, one image each; in one batch.
        size: Height and width of the images in px. Default: the model's input size.
        input_size: Height and width of the model's input in px.
        mean, std: Normalisation of the model's input, per channel; ImageNet's by default.
        lr: Learning rate of Adam.
        seed: Seed of the initial spectrum, the random transforms and the noise.
        objective: "channel" (mean over the map), "neuron" (its centre), or "layer" (in the published script: channel
            ``i`` for image ``i``, whatever the filters).

    Returns:
        A function without arguments that runs one iteration and returns its :class:`Progress`.

    Raises:
        ValueError: If an argument is out of range, the name does not determine a layer, or the model is in training
            mode. The callable raises it if the layer's output does not have four axes, or has too few channels.
    """
    if model.training:
        raise ValueError("model is in training mode: expected eval mode (call model.eval())")
    if objective not in ("channel", "neuron", "layer"):
        raise ValueError(f"objective {objective!r}: expected 'channel', 'neuron' or 'layer'")
    check_input(input_size, mean, std)
    side = input_size if size is None else size
    if side < 2:
        raise ValueError(f"size {side}: expected at least 2 px")
    if not filters or min(filters) < 0:
        raise ValueError(f"filters {list(filters)}: expected one or more channel numbers, at least 0")

    target = find_layer(model, layer)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    channels = list(range(len(filters))) if objective == "layer" else [int(index) for index in filters]

    color = (torch.tensor(COLOR) / COLOR_NORM).to(device)
    scale = spectrum_scale(side, side).to(device)
    transform = random_transform(side, input_size=input_size)
    normalise = preset(input_size=input_size, mean=mean, std=std)
    with forked_random_state(device) as save:
        torch.manual_seed(seed)
        noise = torch.randn(len(channels), 3, *scale.shape, 2)
        random_state = save()
    spectrum = (INIT_SCALE * noise).to(device).requires_grad_()
    optimizer = torch.optim.Adam([spectrum], lr=lr, betas=(0.9, 0.999), maximize=True)
    best: list[Best | None] = [None] * len(channels)
    step = 0

    def maps_of(output: object) -> list[Tensor]:
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer {layer!r}: expected an output (n, c, h, w), got {shape}")
        if max(channels) >= output.shape[1]:
            raise ValueError(f"channels {channels}: layer {layer!r} has channels 0 to {output.shape[1] - 1}")
        return [output[index, channel] for index, channel in enumerate(channels)]

    def iterate() -> list[float]:
        image = decode(spectrum, scale, color, side)
        with catch(target) as caught:
            model(normalise(transform(image)))
        if not caught:
            raise ValueError(f"layer {layer!r}: the model's forward pass does not call it")
        maps = maps_of(caught[-1])
        if objective == "neuron":
            values = [m[m.shape[0] // 2, m.shape[1] // 2] for m in maps]
        else:
            values = [m.mean() for m in maps]

        # Also the gradients of the weights, which the published script computes; they are not used.
        gradient = torch.autograd.grad(torch.stack(values).sum(), [spectrum, *weights], allow_unused=True)[0]
        gradient = gradient / (gradient.norm() + GRADIENT_EPSILON)  # norm over the whole batch
        spectrum.grad = gradient + GRADIENT_NOISE * torch.randn_like(gradient)
        with torch.no_grad():  # before the update: the image whose objective was computed
            decoded = decode(spectrum, scale, color, side)
        nn.utils.clip_grad_norm_([spectrum], GRADIENT_CLIP)
        optimizer.step()

        floats: list[float] = []
        for index, value in enumerate(values):
            score = value.item()
            floats.append(score)
            previous = best[index]
            if previous is None or score > previous.score:
                best[index] = Best(decoded[index].clone(), maps[index].detach().clone(), score, step)
        return floats

    def run() -> Progress:
        nonlocal random_state, step
        with torch.enable_grad(), forked_random_state(device, random_state) as save:
            values = iterate()
            random_state = save()
        step += 1
        return Progress(step - 1, values, [entry for entry in best if entry is not None])

    return run


def reference(
    model: nn.Module,
    layer: str,
    filters: Sequence[int],
    *,
    steps: int,
    size: int | None = None,
    input_size: int = INPUT_SIZE,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    lr: float = 0.05,
    seed: int = 0,
    objective: str = "channel",
) -> ReferenceResult:
    """Run the published script on one batch of filters.

    Args:
        model: A classifier of (n, 3, input_size, input_size) normalised images, in eval mode.
        layer: Name, or end of the name, of a module with (n, c, h', w') output.
        filters: The n channels to maximise, one image each; in one batch.
        steps: Number of iterations (the published entry points take 256 and 30).
        size: Height and width of the images in px. Default: the model's input size.
        input_size: Height and width of the model's input in px.
        mean, std: Normalisation of the model's input, per channel; ImageNet's by default.
        lr: Learning rate of Adam.
        seed: Seed of the initial spectrum, the random transforms and the noise.
        objective: "channel", "neuron" or "layer"; see :func:`make_reference_step`.

    Returns:
        A :class:`ReferenceResult`. Images and activations are on the model's device, the rest on the CPU.

    Raises:
        ValueError: If ``steps`` is less than 1, or as for :func:`make_reference_step`.
    """
    if steps < 1:
        raise ValueError(f"steps {steps}: expected at least 1")
    run = make_reference_step(
        model,
        layer,
        filters,
        size=size,
        input_size=input_size,
        mean=mean,
        std=std,
        lr=lr,
        seed=seed,
        objective=objective,
    )
    history: list[list[float]] = []
    seconds: list[float] = []
    best: list[Best] = []
    for _ in range(steps):
        start = time.perf_counter()  # the .item() calls at the end of a step wait for the device
        _, values, best = run()
        seconds.append(time.perf_counter() - start)
        history.append(values)
    return ReferenceResult(
        images=torch.stack([entry.image for entry in best]),
        activations=torch.stack([entry.activation for entry in best]),
        scores=torch.tensor([entry.score for entry in best]),
        best_step=torch.tensor([entry.step for entry in best]),
        history=torch.tensor(history),
        seconds_per_step=seconds,
    )
