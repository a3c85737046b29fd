"""Procedural colour textures: the data that TextureNet is trained on.

An image is a pure function of (class, seed, size): Philox keyed by (seed, class), no global state.
Periods are in pixels, so a larger image shows more of a texture and not larger shapes.
"""

import colorsys

import numpy as np
from numpy.typing import NDArray

from featvis_func.zoo.patterns import PATTERNS
from featvis_func.zoo.plane import Field, Plane

CLASSES: tuple[str, ...] = tuple(PATTERNS)

_TYPICAL = 0.6  # share of images in their class's own colours; the others have random ones


def _hsv(rng: np.random.Generator, low: float, high: float) -> Field:
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 0.9), rng.uniform(low, high))
    return np.array(rgb, np.float32)


def _palette(colours: str, rng: np.random.Generator) -> Field:
    """Five colours by role: background, foreground, accent, dark, light."""
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
    """Gaussian blur by the spectrum of the image, which wraps around; `sigma` in pixels."""
    size = image.shape[-1]
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    gain = np.exp(-2 * (np.pi * sigma) ** 2 * (fx**2 + fy**2)).astype(np.float32)
    return np.fft.irfft2(np.fft.rfft2(image) * gain, s=(size, size)).astype(np.float32)


def _class_index(name: str | int) -> int:
    known = f"; there are {len(CLASSES)}: {', '.join(CLASSES)}"
    if isinstance(name, str):
        if name not in PATTERNS:
            raise ValueError(f"unknown texture {name!r}{known}")
        return CLASSES.index(name)
    if not 0 <= name < len(CLASSES):
        raise ValueError(f"unknown texture {name!r}{known}")
    return name


def texture(name: str | int, seed: int, *, size: int = 96) -> NDArray[np.float32]:
    """One texture image.

    The plane is flip_kernel, scaled and gently warped; the class's masks are painted in the colours of a random
    palette; light falls off to one side; blur, contrast and noise are mild.

    Args:
        name: a class of `CLASSES`, or its index.
        seed: which image of that class, 0 to 2**64 - 1.
        size: height and width in pixels, at least 8.

    Returns:
        `(3, size, size)` float32, RGB in [0, 1].

    Raises:
        ValueError: an unknown class, a seed out of range, or a size below 8.

    >>> image = texture("dots", seed=3, size=32)
    >>> image.shape, str(image.dtype), bool((image == texture("dots", 3, size=32)).all())
    ((3, 32, 32), 'float32', True)
    """
    index = _class_index(name)
    if size < 8:
        raise ValueError(f"size={size!r}: a texture has at least 8 pixels a side")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r}: a seed is an integer from 0 to 2**64 - 1")
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    pattern = PATTERNS[CLASSES[index]]

    period = float(np.exp(rng.uniform(*np.log(pattern.period))))
    axis = (np.arange(size, dtype=np.float32) - (size - 1) / 2) / period
    turn = rng.uniform(-pattern.tilt, pattern.tilt)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    x = axis[None] * cos + axis[:, None] * sin
    y = axis[:, None] * cos - axis[None] * sin
    # Python floats, not NumPy scalars: float64 scalars would turn the float32 arrays into float64 ones.
    bend, pace, origin = rng.uniform(0, 0.08), rng.uniform(0.6, 1.6), rng.uniform(0, 64, 2).tolist()
    u = x + origin[0] + bend * np.sin(pace * y)
    v = y + origin[1] + bend * np.sin(pace * x)

    colours = _palette(pattern.colours, rng)
    image = np.broadcast_to(colours[0][:, None, None], (3, size, size))
    for mask, role in pattern.layers(Plane(u, v, 1.3 / period, rng)):
        image = image + mask * (colours[role][:, None, None] - image)

    slope = rng.normal(0, 0.12, 2).tolist()
    across = np.linspace(-1, 1, size, dtype=np.float32)
    image = image * (1 + slope[0] * across[None] + slope[1] * across[:, None])
    image = 0.5 + (image - 0.5) * rng.uniform(0.75, 1.1) + rng.normal(0, 0.05)
    if rng.random() < 0.4:
        image = _blur(image, rng.uniform(0.3, 1.1))
    image = image + rng.uniform(0, 0.05) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0.0, 1.0).astype(np.float32)


def texture_batch(first: int, count: int, *, size: int = 96) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images `first` to `first + count - 1` of the endless data set: image `i` has class `i % len(CLASSES)`.

    Args:
        first: number of the first image, at least 0; it is also the image's seed.
        count: how many images, at least 1.
        size: height and width in pixels.

    Returns:
        Images `(count, 3, size, size)` float32 in [0, 1] and labels `(count,)` int64.

    Raises:
        ValueError: `count` below 1, or what `texture` refuses.

    >>> images, labels = texture_batch(31, 2, size=16)
    >>> images.shape, labels.tolist()
    ((2, 3, 16, 16), [31, 0])
    """
    if count < 1:
        raise ValueError(f"count={count!r}: a batch has at least 1 image")
    labels = np.arange(first, first + count) % len(CLASSES)
    images = [texture(int(c), first + i, size=size) for i, c in enumerate(labels)]
    return np.stack(images), labels.astype(np.int64)
