"""Scores of finished images: how strongly they activate their filters.

The score is the mean over positions of the positive part of the filter's map, which is what the published script
maximises if an in-place ReLU follows the layer. It is computed in the same way for every method that is compared.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import squeezenet1_0

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INPUT_SIZE = 224  # px
WEIGHTS_FILE = "squeezenet1_0-imagenet.safetensors"

# (degrees counter-clockwise, scale, px to the right, px down), each value spread over its range so that shifts into all
# four quadrants, rotations in both directions, enlarging and shrinking occur. Pixels are those of a 224 px image.
FIXED_TRANSFORMS = (
    (-5.0, 0.98, 3.0, -7.0),
    (4.0, 1.05, -8.0, 2.0),
    (-2.0, 1.02, 7.0, 6.0),
    (1.0, 0.95, -4.0, -3.0),
    (3.0, 0.99, 5.0, 8.0),
    (-4.0, 1.04, -6.0, 4.0),
    (5.0, 0.96, 8.0, -5.0),
    (-1.0, 1.01, -2.0, -8.0),
)


class Score(NamedTuple):
    """Scores of n images; floats are means over the filters."""

    plain: float  # of the unchanged images
    robust: float  # mean over the fixed transforms
    saturation: float  # share of values below 0.02 or above 0.98
    plain_per_filter: Tensor  # (n,)
    robust_per_filter: Tensor  # (n,)
    saturation_per_filter: Tensor  # (n,)


def fixed_transform(images: Tensor, degrees: float, scale: float, right: float, down: float) -> Tensor:
    """Rotate and scale images about their centre, then shift them; pixels from outside of the frame are 0.5.

    Args:
        images: (n, c, h, w) in [0, 1].
        degrees: Rotation, counter-clockwise.
        scale: Factor; above 1 enlarges.
        right: Shift to the right in px.
        down: Shift downwards in px.

    Returns:
        (n, c, h, w) in [0, 1], sampled bilinearly.
    """
    height, width = images.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    # Maps a pixel of the output, counted from the centre with y downwards, to one of the input: the inverse rotation
    # and scale, after the shift is subtracted.
    inverse = ((cos, -sin, -cos * right + sin * down), (sin, cos, -sin * right - cos * down))
    theta = images.new_tensor(inverse)
    # In the normalised coordinates of grid_sample, in which the image is 2 wide and 2 high.
    half = images.new_tensor((width / 2, height / 2))
    theta = theta * torch.cat([half, half.new_ones(1)]) / half[:, None]
    grid = F.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images - 0.5, grid, padding_mode="zeros", align_corners=False) + 0.5


@contextmanager
def rectified(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the positive part of a module's outputs, copied before an in-place operation can follow.

    Args:
        module: The module to hook; the hook is removed at the end of the block.

    Yields:
        A list that each forward pass appends to.
    """
    caught: list[Tensor] = []

    def hook(source: nn.Module, inputs: object, output: Tensor) -> None:
        del source, inputs
        caught.append(output.detach().relu())  # a new tensor, which in-place operations do not change

    handle = module.register_forward_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()


def filter_means(
    images: Tensor,
    model: nn.Module,
    layer: str,
    filters: Sequence[int],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Return the mean positive part of channel ``filters[i]`` for image ``i``.

    Args:
        images: (n, 3, h, w) in [0, 1], at the model's input size.
        model: The model, in eval mode.
        layer: Full name of the module, with output (n, c, h', w').
        filters: n channels.
        mean, std: Normalisation of the model's input, per channel.

    Returns:
        (n,), means over the positions.
    """
    center, spread = (images.new_tensor(v)[:, None, None] for v in (mean, std))
    with torch.no_grad(), rectified(model.get_submodule(layer)) as caught:
        model((images - center) / spread)
    index = torch.arange(len(filters), device=images.device)
    return caught[-1][index, torch.tensor(filters, device=images.device)].mean(dim=(-2, -1))


def check_input(input_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Check the input size and the normalisation of a model.

    Args:
        input_size: Height and width in px, at least 2.
        mean, std: Three numbers each, ``std`` above 0.

    Raises:
        ValueError: If one of them is out of range.
    """
    if input_size < 2:
        raise ValueError(f"input_size {input_size}: expected at least 2 px")
    if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
        raise ValueError(f"mean {tuple(mean)}, std {tuple(std)}: expected three numbers each, std above 0")


def evaluate(
    images: Tensor,
    model: nn.Module,
    layer: str,
    filters: Sequence[int],
    *,
    input_size: int = INPUT_SIZE,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Score:
    """Score images by the positive part of their filters' maps: unchanged, and under eight fixed transforms.

    The images are first resized to the model's input size (antialiased bilinear), so that a shift in px means the same
    for images of every size; for models of another input size than 224 px the shifts are multiplied by
    ``input_size / 224``. Saturation is that of the images as given.

    Args:
        images: (n, 3, h, w) in [0, 1].
        model: A model of square three-channel images, in eval mode, on the images' device.
        layer: Full name of the module, with output (n, c, h', w').
        filters: The channels of the n images.
        input_size: Height and width of the model's input in px.
        mean, std: Normalisation of the model's input, per channel; ImageNet's by default.

    Returns:
        A :class:`Score`.

    Raises:
        ValueError: If the images are not (n, 3, h, w) in [0, 1] with one filter each, the model is in training mode or
            has no such layer; or as for :func:`check_input`.
    """
    check_input(input_size, mean, std)
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(filters):
        expected = f"({len(filters)}, 3, h, w), one image per filter"
        raise ValueError(f"images {tuple(images.shape)}: expected {expected}")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images from {images.min():.3g} to {images.max():.3g}: expected [0, 1]")
    if model.training:
        raise ValueError("model is in training mode: expected eval mode (call model.eval())")
    if layer not in (names := [name for name, _ in model.named_modules() if name]):
        raise ValueError(f"layer {layer!r}: the model has {names}")
    images = images.detach()
    resized = images
    if tuple(images.shape[-2:]) != (input_size, input_size):
        resized = F.interpolate(images, (input_size, input_size), mode="bilinear", antialias=True)

    def means(batch: Tensor) -> Tensor:
        return filter_means(batch, model, layer, filters, mean=mean, std=std)

    unit = input_size / INPUT_SIZE  # px of this model's input per px of a 224 px image
    plain = means(resized)
    transformed = [
        means(fixed_transform(resized, degrees, scale, right * unit, down * unit))
        for degrees, scale, right, down in FIXED_TRANSFORMS
    ]
    robust = torch.stack(transformed).mean(dim=0)
    saturation = ((images < 0.02) | (images > 0.98)).float().mean(dim=(1, 2, 3))
    return Score(plain.mean().item(), robust.mean().item(), saturation.mean().item(), plain, robust, saturation)


def weights_path() -> Path:
    """The file or folder of weights: the environment variable FEATVIS_WEIGHTS, or ``../shared/weights`` beside the
    repository."""
    return Path(os.environ.get("FEATVIS_WEIGHTS") or Path(__file__).resolve().parents[2] / "shared" / "weights")


def load_squeezenet(path: str | Path | None = None) -> nn.Module | None:
    """Load SqueezeNet 1.0 with its ImageNet weights, if their file exists.

    Args:
        path: File of the weights, or its folder. None: the value of the environment variable FEATVIS_WEIGHTS, or
            else the folder ``../shared/weights`` beside the repository.

    Returns:
        The model in eval mode on the CPU, or None if there is no such file.
    """
    file = weights_path() if path is None else Path(path)
    if file.is_dir():
        file = file / WEIGHTS_FILE
    if not file.is_file():
        return None
    with torch.random.fork_rng(devices=[]):  # the initial values are overwritten
        model = squeezenet1_0()
    model.load_state_dict(load_file(file))
    return model.eval()
