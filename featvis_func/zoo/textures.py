"""Procedural colour textures: the training data of TextureNet.

An image is a pure function of (class, seed, size): its generator is Philox with the key (seed, class). Periods are
given in pixels, so a larger image shows more of a texture, not larger shapes.
"""

import colorsys

import numpy as np
from numpy.typing import NDArray

from featvis_func.validation import check_int, check_name, check_seed
from featvis_func.zoo.patterns import PATTERNS
from featvis_func.zoo.plane import Field, Plane

CLASSES: tuple[str, ...] = tuple(PATTERNS)

_TYPICAL = 0.6  # share of images in the typical colours of their class; the others have random colours


def _hsv(rng: np.random.Generator, low: float, high: float) -> Field:
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 0.9), rng.uniform(low, high))
    return np.array(rgb, np.float32)


def _palette(colours: str, rng: np.random.Generator) -> Field:
    """Draw five colours, by role: background, foreground, accent, dark, light."""
    if rng.random() < _TYPICAL:
        base = np.array([list(bytes.fromhex(c)) for c in colours.split()], np.float32) / 255
        base = base + rng.normal(0, 0.07, (3, 3)).astype(np.float32)
    else:
        tones = [_hsv(rng, 0.1, 0.5), _hsv(rng, 0.75, 1.0)]
        if rng.random() < 0.5:
            tones.reverse()
        base = np.stack([*tones, _hsv(rng, 0.3, 1.0)])
    dark = np.full((1, 3), rng.uniform(0.0, 0.15), np.float32)
    light = np.full((1, 3), rng.uniform(0.88, 1.0), np.float32)
    return np.clip(np.concatenate([base, dark, light]), 0.0, 1.0)


def _blur(image: Field, sigma: float) -> Field:
    """Apply a circular Gaussian blur in the frequency domain; ``sigma`` in pixels."""
    size = image.shape[-1]
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    gain = np.exp(-2 * (np.pi * sigma) ** 2 * (fx**2 + fy**2)).astype(np.float32)
    return np.fft.irfft2(np.fft.rfft2(image) * gain, s=(size, size)).astype(np.float32)


def _class_index(name: str | int) -> int:
    if isinstance(name, str):
        check_name("texture", name, CLASSES)
        return CLASSES.index(name)
    if not 0 <= name < len(CLASSES):
        raise ValueError(f"texture index must be in [0, {len(CLASSES)}), got {name}")
    return name


def texture(name: str | int, seed: int, *, size: int = 96) -> NDArray[np.float32]:
    """Generate a texture image.

    The plane is rotated, scaled and slightly warped; the masks of the class are composited in the colours of a random
    palette; a brightness gradient and mild contrast, blur and noise are applied.

    Args:
        name: a class of ``CLASSES``, or its index.
        seed: selects the image of that class, in [0, 2**64).
        size: height and width in pixels, at least 8.

    Returns:
        ``(3, size, size)`` float32, RGB in [0, 1].

    Raises:
        ValueError: If the class is unknown, the seed is out of range, or the size is below 8.

    >>> image = texture("dots", seed=3, size=32)
    >>> image.shape, str(image.dtype), bool((image == texture("dots", 3, size=32)).all())
    ((3, 32, 32), 'float32', True)
    """
    index = _class_index(name)
    size, seed = check_int("size", size, 8), check_seed(seed)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    pattern = PATTERNS[CLASSES[index]]

    period = float(np.exp(rng.uniform(*np.log(pattern.period))))
    axis = (np.arange(size, dtype=np.float32) - (size - 1) / 2) / period
    theta = rng.uniform(-pattern.tilt, pattern.tilt)
    cos, sin = np.float32(np.cos(theta)), np.float32(np.sin(theta))
    x = axis[None] * cos + axis[:, None] * sin
    y = axis[:, None] * cos - axis[None] * sin
    # Python floats, since float64 NumPy scalars would promote the float32 arrays to float64.
    amplitude, frequency, origin = rng.uniform(0, 0.08), rng.uniform(0.6, 1.6), rng.uniform(0, 64, 2).tolist()
    u = x + origin[0] + amplitude * np.sin(frequency * y)
    v = y + origin[1] + amplitude * np.sin(frequency * x)

    colours = _palette(pattern.colours, rng)
    image = np.broadcast_to(colours[0][:, None, None], (3, size, size))
    for mask, role in pattern.layers(Plane(u, v, 1.3 / period, rng)):
        image = image + mask * (colours[role][:, None, None] - image)

    slope = rng.normal(0, 0.12, 2).tolist()
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    image = image * (1 + slope[0] * ramp[None] + slope[1] * ramp[:, None])
    image = 0.5 + (image - 0.5) * rng.uniform(0.75, 1.1) + rng.normal(0, 0.05)
    if rng.random() < 0.4:
        image = _blur(image, rng.uniform(0.3, 1.1))
    image = image + rng.uniform(0, 0.05) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0.0, 1.0).astype(np.float32)


def texture_batch(first: int, count: int, *, size: int = 96) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Generate images ``first`` to ``first + count - 1`` of the infinite data set.

    Image ``i`` has class ``i % len(CLASSES)``.

    Args:
        first: index of the first image, at least 0. The index of an image is also its seed.
        count: number of images, at least 1.
        size: height and width in pixels.

    Returns:
        Images ``(count, 3, size, size)`` float32 in [0, 1] and labels ``(count,)`` int64.

    Raises:
        ValueError: If ``count`` is below 1, or as for ``texture``.

    >>> images, labels = texture_batch(31, 2, size=16)
    >>> images.shape, labels.tolist()
    ((2, 3, 16, 16), [31, 0])
    """
    count = check_int("count", count, 1)
    labels = np.arange(first, first + count) % len(CLASSES)
    images = [texture(int(c), first + i, size=size) for i, c in enumerate(labels)]
    return np.stack(images), labels.astype(np.int64)
