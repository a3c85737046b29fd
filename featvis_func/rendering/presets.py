"""The parameterisations and transforms that go by name."""

import functools
from collections.abc import Callable, Sequence

from featvis_func import image as images
from featvis_func import transform as transforms
from featvis_func.rendering.options import TRANSFORMS
from featvis_func.transform import (
    box_crop,
    color_jitter,
    jitter,
    normal_noise,
    pad,
    rotate,
    scale,
    uniform_noise,
    warp,
    warp_time,
)
from featvis_func.types import Image, Transform
from featvis_func.validation import check_name

IMAGES: dict[str, Callable[..., Image]] = {
    "fourier": images.fourier,
    "pixel": images.pixel,
    "phase": images.phase,
    "laplacian_pyramid": images.laplacian_pyramid,
    "cppn": images.cppn,
    "alpha": images.alpha,
}
"""Name -> parameterisation."""

SIGNAL_TRANSFORMS = ("default", "none")
"""The named transforms that signals have."""

# Of the default transforms, in units of the normalised input, and on values in [0, 1]. Of SqueezeNet, whose input has a
# standard deviation of about 0.225, the best images come with noise of 0.05; of EfficientNet-Lite0, with 0.5, with 0.1.
# The bounds are for models that do not divide by the spread of photographs: by 1, or after multiplying by 255.
_NOISE, _MIN_NOISE, _MAX_NOISE = 0.2, 0.04, 0.1

_BRIGHTNESS, _CONTRAST = 0.3, 0.5

# Of MACO, in one step.
_BOXES = 8

# The published magnitudes, in 224ths of the width: the two shifts.
_SHIFTS = (8, 4)


def named_transform(
    name: str,
    *,
    image: tuple[int, ...],
    size: tuple[int, ...],
    deterministic: bool = False,
    std: Sequence[float] = (0.25,),
) -> Transform:
    """A preset of random transforms, from the image's size to the model's input size.

    * ``"default"``: shift by up to a ninth of the width, rotate 10 degrees, a box of 0.5 to 1.43 times the sides at any
      position, brightness times 0.7 to 1.3, contrast times 0.5 to 1.5, and normal noise of 0.2 in the units of the
      normalised input, 0.04 to 0.1 on values in ``[0, 1]``.
      What survives them is what the unit looks for, rather than a pattern that excites only this network.
    * ``"small"``: the published magnitudes, with the whole image visible to the model.
    * ``"published"``: pad 16, shift 8/w, scale 0.95 to 1.05, rotate 5 degrees, shift 4/w, crop, resize 256, crop
      224: the outer eighth is hardly visible and stays grey. One bilinear sampling where the published script resamples
      six times.
    * ``"lucid"``: pad 12, jitter 8, scale 0.9 to 1.1, rotate 10 degrees (zero more often), jitter 4.
    * ``"maco"``: eight random boxes at once, so that a step takes eight times as long, with normal noise of 0.04 and
      uniform noise of 0.02 on values in ``[0, 1]``. The boxes are as wide as the model's input, at least a quarter of
      the image and at most 0.6 of it on average. Goes with ``image="phase"``, its default; MACO takes 32 boxes.
    * ``"none"``: the image, resized.

    All frames of a video are transformed alike, by the same transform of images. All but ``"none"`` also shift videos
    in time by up to one frame; at the ends the first and the last frame are repeated.

    Signals have ``"default"``, which shifts them in time by up to 12/224 of their length, repeating the first and the
    last sample, and stretches them by 0.95 to 1.05, in one linear sampling; and ``"none"``.

    Args:
        name: one of these.
        image: ``(h, w)`` of the images in pixels, ``(t, h, w)`` of videos, ``(t,)`` of signals.
        size: ``(h', w')``, ``(t', h', w')`` or ``(t',)`` of the model's input.
        deterministic: see :func:`~featvis_func.transform.warp`.
        std: by which the model's input is normalised; the noise of ``"default"`` is proportional to their mean.

    Raises:
        ValueError: an unknown name, one that signals do not have, or sizes of different numbers of sides.

    Source: for ``"lucid"``, ``optvis/transform.py`` of tensorflow/lucid; for ``"maco"``, arXiv 2306.06805 and
    ``xplique/features_visualizations/maco.py``, whose noise of 0.08 is for values in ``[-1, 1]``: see
    :func:`~featvis_func.transform.box_crop`.

    >>> import torch
    >>> transform = named_transform("lucid", image=(128, 128), size=(224, 224))
    >>> transform.apply(torch.rand(3, 128, 128), transform.draw(torch.tensor([0, 1]))).shape
    torch.Size([3, 224, 224])
    """
    check_name("transforms", name, TRANSFORMS)
    if len(image) != len(size) or not 1 <= len(size) <= 3:
        raise ValueError(
            f"image and size must be (h, w), (t, h, w) or (t,), both of as many sides, got {image} and {size}"
        )
    if len(size) == 1:
        return _signal_transform(name, image[0], size[0])
    shown = _geometry(name, image[-2:], size[-2:], deterministic)
    if len(size) == 3:
        in_time = warp_time(size=size[0], shift=0.0 if name == "none" else 1.0, axis=-3)
        shown = transforms.chain(in_time, transforms.per_frame(shown))
    # Each value, also of a video, and each copy has noise of its own.
    if name == "default":
        colors = color_jitter(brightness=_BRIGHTNESS, contrast=_CONTRAST)
        colors = colors if len(size) == 2 else transforms.per_frame(colors)
        sd = min(max(_NOISE * sum(std) / len(std), _MIN_NOISE), _MAX_NOISE)
        return transforms.chain(shown, colors, normal_noise(sd))
    if name == "maco":
        return transforms.chain(transforms.multiview(shown, _BOXES), normal_noise(0.04), uniform_noise(0.02))
    return shown


def _signal_transform(name: str, length: int, size: int) -> Transform:
    if name not in SIGNAL_TRANSFORMS:
        raise ValueError(f"transforms={name!r} is for images and videos; signals have {', '.join(SIGNAL_TRANSFORMS)}")
    if name == "none":
        return warp_time(size=size)
    return warp_time(size=size, shift=sum(_SHIFTS) / 224 * length, scale=(0.95, 1.05))


def _geometry(name: str, image: tuple[int, ...], size: tuple[int, ...], deterministic: bool) -> Transform:
    """The geometric part of a preset, for images and for the frames of videos."""
    w = image[1]
    show = functools.partial(warp, size=(size[0], size[1]), deterministic=deterministic)
    if name == "default":
        return show(jitter(24 / 224 * w), rotate(10), box_crop(0.5, 1.43, normal=None, centre_sd=None))
    if name == "small":
        first, second = (shift / 224 * w for shift in _SHIFTS)
        return show(jitter(first), scale(0.95, 1.05), rotate(5), jitter(second))
    if name == "published":
        padded = w + 32  # the published shifts are fractions 8/w and 4/w of the padded side, here of a square
        first, second = (shift / w * padded for shift in _SHIFTS)
        return show(jitter(first), scale(0.95, 1.05), rotate(5), jitter(second), scale(256 / 224, 256 / 224))
    if name == "lucid":
        # Lucid's jitter(d) crops d pixels at a random offset: a shift of up to d / 2.
        sizes = [1 + (i - 5) / 50 for i in range(11)]
        angles = [*range(-10, 11), 0, 0, 0, 0, 0]
        return show(pad(12), pad(-4), jitter(4), scale(choices=sizes), rotate(choices=angles), pad(-2), jitter(2))
    if name == "maco":
        # A box holds as many pixels as the model sees, if the image has enough of them: MACO's images are four times as
        # wide. Of smaller images such boxes would show a few enlarged pixels, which excite nothing.
        mean = min(max(size[1] / w, 0.25), 0.6)
        return show(box_crop(0.05, 1.0, normal=(mean, 0.4 * mean)))
    return show()
