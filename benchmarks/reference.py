"""The published eager script as a baseline: faithful in its result and in its cost.

`reference` runs it to the end; `make_reference_step` gives single iterations, for timings that interleave
several methods. Nothing here is meant to be fast, and nothing of the library is used.

Quirks of the published script that are kept on purpose, because results or cost depend on them:

1.  One draw of the random view serves the whole batch, and the gradient norm, the noise and the clip are
    over the whole batch: a filter's image depends on the filters that share its batch.
2.  Each of the four random steps is a `RandomAffine` of its own: four nearest-neighbour resamplings, each
    with an angle drawn (even if it can only be 0). Pixels that leave the frame come back as 0 (black), not
    as the 0.5 of the pad. Translations are fractions `8 / W` and `4 / W`, which torchvision multiplies by
    the padded width, so 224 px images move by up to 9 and 5 px, not 8 and 4.
3.  The view is resized to 256 px, then the weights' preset (resize 256: no change; centre-crop 224) throws
    the rim away: without a shift the model sees the central 196 of 224 px. The border gets hardly a
    gradient and stays paler and smoother. It does not stay as it began: Adam works on frequencies, each of
    which covers the whole image.
4.  The model runs to its last layer, although nothing above the target layer is used.
5.  The layer is caught by a global forward hook that does not clone. Where an in-place ReLU follows, the
    objective sees the rectified map, with zero gradients where the map is negative.
6.  Gradients of all weights (that require one) are computed and thrown away.
7.  The gradient is divided by its norm, and then clipped to norm 0.1: the clip always acts.
8.  The image is decoded a second time in every step, and every image's objective is fetched with `.item()`.
9.  `objective="layer"` takes channel `i` for image `i`, not the whole layer.

Deviations, none of which changes a result:

*   The hook lives only during the forward pass of a step, and weight gradients never reach `.grad`: the
    model is left as it was found.
*   The global random state is forked: the script draws from the global generator.
*   Three-channel images only. For others the script skips the sigmoid and then fails on its own bounds check.
    The check itself is left out: a sigmoid cannot fail it.

One deviation concerns models of another input than 224 px and ImageNet's normalisation, for which there is no
published script: with `k = input_size / 224`, the pad is `round(16 k)` px and the translations `8 k / W` and
`4 k / W`, the view is resized to `round(256 k)` px, and the preset crops `input_size` and takes the model's own
mean and std. So as much of the image is seen, and it moves as far, as at 224 px, up to the rounding.
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
DECAY = 1.0  # power of the frequency that the amplitude falls with
MAGIC = 4.0  # the published script takes it over from Lucid
COLOR = ((0.26, 0.09, 0.02), (0.27, 0.0, -0.05), (0.27, -0.09, 0.03))  # Lucid's SVD square root of the
COLOR_NORM = 0.46195  # ImageNet colour correlation, and the largest norm of its columns
PAD = 16  # px on each side, filled with 0.5
SHIFTS = (8, 4)  # px, before and after scale and rotation
RESIZE = 256  # px, before the centre-crop to the input size
GRADIENT_EPSILON = 1e-8
GRADIENT_NOISE = 1e-6  # the standard deviation; as the variance it lowers the scores by a quarter
GRADIENT_CLIP = 0.1


class Best(NamedTuple):
    """The best of one filter so far."""

    image: Tensor  # (3, h, w) in [0, 1], decoded without the view
    activation: Tensor  # (h', w'), the map of the maximised channel, under that step's view
    score: float  # that step's objective
    step: int  # counted from 0


class Progress(NamedTuple):
    """What one iteration reports."""

    step: int  # counted from 0
    values: list[float]  # n objectives of this step
    best: list[Best]  # n bests up to and with this step


class ReferenceResult(NamedTuple):
    """What the published script gives for n filters."""

    images: Tensor  # (n, 3, h, w) in [0, 1], each from its filter's best step
    activations: Tensor  # (n, h', w') of the maximised channel at the best step
    scores: Tensor  # (n,) the objective at the best step
    best_step: Tensor  # (n,) int64, counted from 0
    history: Tensor  # (steps, n) the objective at every step
    seconds_per_step: list[float]  # wall time of each step


def spectrum_scale(height: int, width: int) -> Tensor:
    """Amplitude of each frequency, `1 / max(f, 1 / max(height, width)) ** decay`.

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
    """Images of spectra: scaled inverse Fourier transform, colour matrix, sigmoid.

    Args:
        spectrum: (n, 3, h, columns, 2) float32; the last axis is real, imaginary.
        scale: (h, columns) of `spectrum_scale`.
        color: (3, 3), rows are red, green, blue.
        width: Image width in px; crops the extra column of odd widths.

    Returns:
        (n, 3, h, width) in [0, 1].
    """
    complex_spectrum = torch.view_as_complex(scale[..., None] * spectrum)
    pixels = torch.fft.irfft2(complex_spectrum, norm="ortho")[..., :width] / MAGIC
    return torch.sigmoid((pixels.movedim(1, -1) @ color.T).movedim(-1, 1))


def resize_size(input_size: int) -> int:
    """Side in px of what the centre-crop to the input size is taken from: 256 for 224."""
    return round(RESIZE * input_size / INPUT_SIZE)


def random_view(size: int, *, input_size: int = INPUT_SIZE) -> Callable[[Tensor], Tensor]:
    """The published chain of random steps, up to and with the resize to 256 px.

    Draws from the global generator, once for the whole batch.

    Args:
        size: Height and width of the image in px.
        input_size: Height and width of the model's input in px; pad, shifts and resize are proportional to it.

    Returns:
        A function (n, 3, size, size) -> (n, 3, r, r) with r of `resize_size`.
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
    """The torchvision preset of ImageNet weights: resize 256, centre-crop 224, normalise.

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
    """The module whose name is, or else ends with, `layer`.

    Args:
        model: The model to look in.
        layer: A module's full name, or an ending that only one module's name has.

    Returns:
        The module.

    Raises:
        ValueError: If no module's name or several modules' names end so.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if layer in modules:
        return modules[layer]
    names = [name for name in modules if layer and name.endswith(layer)]
    if len(names) != 1:
        found = f"these do: {names}" if names else f"the model has: {list(modules)}"
        raise ValueError(f"layer {layer!r}: expected the end of one module's name; {found}")
    return modules[names[0]]


@contextmanager
def catch(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of a module with a global forward hook, not cloned.

    Args:
        module: The module whose outputs to collect.

    Yields:
        A list that each forward pass of the module appends to. An in-place operation that follows changes
        what is in it, as in the published script.
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
def own_random(device: torch.device, state: RandomState | None = None) -> Iterator[Callable[[], RandomState]]:
    """Fork the global random state, of the CPU and of the device, and go on from `state`.

    Args:
        device: Where noise is drawn besides the CPU.
        state: What the yielded function returned earlier, or None to leave the state as it is.

    Yields:
        A function that returns the state to go on from later.
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
    """One iteration of the published script, as a callable with a state of its own.

    Two such callables, or one and anything else, may be called in turns: neither the model, nor the global
    random state, nor the global hooks differ after a call. The first call is slower, as any first call of
    a model is.

    Args:
        model: A classifier of (n, 3, input_size, input_size) normalised images, in eval mode.
        layer: Name, or end of the name, of a module with (n, c, h', w') output.
        filters: The n channels to maximise, one image each; in one batch.
        size: Height and width of the images in px. Default: the model's input size.
        input_size: Height and width of the model's input in px.
        mean, std: Normalisation of the model's input, per channel; ImageNet's by default.
        lr: Learning rate of Adam.
        seed: Seed of the initial spectrum, the views and the noise.
        objective: "channel" (mean over the map), "neuron" (its centre), or "layer" (in the script: channel
            `i` for image `i`, whatever the filters).

    Returns:
        A function without arguments that runs one iteration and returns its `Progress`.

    Raises:
        ValueError: If an argument is out of range, no single layer has the name, or the model is in training
            mode. The callable raises it if the layer's output has not four axes or too few channels.
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
        raise ValueError(f"filters {list(filters)}: expected one or more channel numbers from 0 on")

    target = find_layer(model, layer)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    channels = list(range(len(filters))) if objective == "layer" else [int(index) for index in filters]

    color = (torch.tensor(COLOR) / COLOR_NORM).to(device)
    scale = spectrum_scale(side, side).to(device)
    view, normalise = random_view(side, input_size=input_size), preset(input_size=input_size, mean=mean, std=std)
    with own_random(device) as save:
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
            model(normalise(view(image)))
        if not caught:
            raise ValueError(f"layer {layer!r}: the model's forward pass does not call it")
        maps = maps_of(caught[-1])
        if objective == "neuron":
            values = [m[m.shape[0] // 2, m.shape[1] // 2] for m in maps]
        else:
            values = [m.mean() for m in maps]

        # The weights' gradients cost what they cost in the script, and are dropped here.
        gradient = torch.autograd.grad(torch.stack(values).sum(), [spectrum, *weights], allow_unused=True)[0]
        gradient = gradient / (gradient.norm() + GRADIENT_EPSILON)  # norm over the whole batch
        spectrum.grad = gradient + GRADIENT_NOISE * torch.randn_like(gradient)
        with torch.no_grad():  # before the update: the very image whose objective was measured
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
        with torch.enable_grad(), own_random(device, random_state) as save:
            values = iterate()
            random_state = save()
        step += 1
        return Progress(step - 1, values, [found for found in best if found is not None])

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
        seed: Seed of the initial spectrum, the views and the noise.
        objective: "channel", "neuron" or "layer"; see `make_reference_step`.

    Returns:
        The `ReferenceResult`, on the model's device; all but the images and activations on the CPU.

    Raises:
        ValueError: If `steps` is less than 1, and as `make_reference_step`.
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
        start = time.perf_counter()  # the `.item()` calls, last in a step, wait for the device
        _, values, best = run()
        seconds.append(time.perf_counter() - start)
        history.append(values)
    return ReferenceResult(
        images=torch.stack([found.image for found in best]),
        activations=torch.stack([found.activation for found in best]),
        scores=torch.tensor([found.score for found in best]),
        best_step=torch.tensor([found.step for found in best]),
        history=torch.tensor(history),
        seconds_per_step=seconds,
    )
