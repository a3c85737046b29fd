"""Measure the colour correlation and the spectrum of a data set, for use in image parameterisations.

This module reads files, which the functional core does not.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.color import correlation_of
from featvis_func.image.spectral import frequencies
from featvis_func.io.image_files import check_channels, find_images, read_pixels
from featvis_func.validation import check_int, check_sides

_FOLDER_SIZE = 224  # px
# Cycles per pixel. Only diagonal waves, in the corners of the spectrum, have higher frequencies.
_NYQUIST = 0.5


class ImageStatistics(NamedTuple):
    """The result of :func:`image_statistics`, on the CPU."""

    correlation: Tensor
    """float32 ``(c, c)``: maps decorrelated colours to channels; for ``correlation=`` of an image parameterisation."""
    magnitude: Tensor
    """float32 ``(c, h, w // 2 + 1)``: mean of ``|rfft2(x, norm="ortho")|`` over the images, where ``x`` are the
    decorrelated colours minus their mean; for ``magnitude=`` of :func:`~featvis_func.phase`."""
    decay: float
    """Exponent ``p`` of the power law ``magnitude ~ 1 / f**p``; for ``decay=`` of an image parameterisation."""
    mean: Tensor
    """float32 ``(c,)``: mean of each channel."""
    std: Tensor
    """float32 ``(c,)``: standard deviation of each channel, over all pixels of all images."""
    images: int
    """Number of images."""


def image_statistics(
    images: str | Path | Iterable[Tensor],
    *,
    size: int | tuple[int, int] | None = None,
    channels: int = 3,
    limit: int | None = None,
) -> ImageStatistics:
    """Measure the colour correlation and the spectrum of images, one image at a time, in two passes.

    * ``correlation``: square root of the covariance of the colours over all pixels, see
      :func:`~featvis_func.color.correlation_of`.
    * ``magnitude``: mean magnitude of the spectrum of the colours decorrelated by ``correlation``.
    * ``decay``: minus the slope of ``log(magnitude)`` against ``log(f)`` for ``f`` up to 0.5 cycles per pixel, by least
      squares with equal weight for each octave.

    Args:
        images: a folder, which is searched recursively for image files; or tensors ``(c, h, w)`` in ``[0, 1]`` of equal
            shape, in an iterable that can be iterated twice, such as a list or a ``Dataset``.
        size: size in pixels, an integer for a square or ``(h, w)``, at least 4. Files are resized and cropped to their
            centre; default 224. Tensors must have this size; default: that of the first tensor.
        channels: number of channels to which files are converted: 1 (grey), 3 (RGB) or 4 (RGBA). Ignored for tensors.
        limit: maximum number of images, at least 1. Files are selected evenly from the sorted list. ``None``: all.

    Returns:
        An :class:`ImageStatistics`. The result is deterministic.

    Raises:
        ValueError: If the folder does not exist or holds no images, a file cannot be read, the tensors differ in shape
            or are outside ``[0, 1]``, ``images`` is an iterator that can be iterated only once, all pixels have one
            colour, ``size`` is below 4, or ``limit`` is below 1.

    Source: Olah et al., "Feature Visualization", Distill 2017 (colour); Fel et al., arXiv 2306.06805, section 3 (mean
    magnitude).

    >>> noise = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    >>> statistics = image_statistics(noise)
    >>> statistics.magnitude.shape, abs(statistics.decay) < 0.1
    (torch.Size([3, 16, 9]), True)
    """
    limit = None if limit is None else check_int("limit", limit, 1)
    image_size = None if size is None else check_sides(size)
    if isinstance(images, str | Path):
        read = _folder_reader(Path(images), image_size or check_sides(_FOLDER_SIZE), channels, limit)
    else:
        read = _tensor_reader(images, image_size, limit)
    count, width, mean, covariance = _color_moments(read)
    if not covariance.any():
        raise ValueError(f"the images must have at least two colours, got {count} images of one colour")
    correlation = correlation_of(covariance)
    magnitude = _sum_magnitudes(read, mean, torch.linalg.pinv(correlation)) / count
    return ImageStatistics(
        correlation.float(),
        magnitude.float(),
        _decay(magnitude, width),
        mean.float(),
        covariance.diag().sqrt().float(),
        count,
    )


_Reader = Callable[[], Iterator[Tensor]]  # iterates over the images from the start: float64 (c, h, w)


def _color_moments(read: _Reader) -> tuple[int, int, Tensor, Tensor]:
    """Return the number of images, their width, and the mean ``(c,)`` and covariance ``(c, c)`` of all pixels."""
    count, width, total, products = 0, 0, torch.zeros(()), torch.zeros(())
    for image in read():
        width = image.shape[-1]
        # Subtract the middle of the range, which reduces cancellation in the covariance.
        pixels = image.flatten(1) - 0.5
        count, total, products = count + 1, total + pixels.mean(1), products + pixels @ pixels.T / pixels.shape[1]
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    # Treat rounding errors as zero variance.
    return count, width, mean + 0.5, torch.where(covariance.abs() > 1e-14, covariance, 0.0)


def _sum_magnitudes(read: _Reader, mean: Tensor, decorrelate: Tensor) -> Tensor:
    """Return the sum of ``|rfft2(x)|`` over the images, float64 ``(c, h, w // 2 + 1)``."""
    total = torch.zeros(())
    for image in read():
        pixels = torch.einsum("ij,jhw->ihw", decorrelate, image - mean[:, None, None])
        total = total + torch.fft.rfft2(pixels, norm="ortho").abs()
    return total


def _decay(magnitude: Tensor, w: int) -> float:
    """Return the exponent of the power law fitted to the mean over channels, for images ``w`` pixels wide."""
    f, level = frequencies(magnitude.shape[1], w).double(), magnitude.mean(0)
    fitted = (f > 0) & (f <= _NYQUIST) & (level > 0)
    x, y = torch.log(f[fitted]), torch.log(level[fitted])
    # The number of frequencies in an octave is proportional to f**2; divide by it so that octaves weigh the same.
    weight = f[fitted] ** -2
    weight = weight / weight.sum()
    x = x - (weight * x).sum()
    return -((weight * x * y).sum() / (weight * x * x).sum()).item()


def _folder_reader(folder: Path, size: tuple[int, int], channels: int, limit: int | None) -> _Reader:
    check_channels(channels, "; give tensors instead")
    if min(size) < 4:
        raise ValueError(f"images must have at least 4 x 4 pixels to have a spectrum, got {size}")
    files = find_images(folder)
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    return lambda: (read_pixels(path, size, channels=channels)[0].double() / 255 for path in files)


def _tensor_reader(images: Iterable[Tensor], size: tuple[int, int] | None, limit: int | None) -> _Reader:
    if iter(images) is images:
        raise ValueError(
            f"the images are iterated twice, which this {type(images).__name__} does not allow;"
            f" give a list or a Dataset"
        )
    first = next(iter(images), None)
    if first is None:
        raise ValueError("no images were given")
    if not isinstance(first, Tensor):
        raise ValueError(f"expected tensors (c, h, w), got {type(first).__name__}")
    shape = first.shape
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise ValueError(f"images must be (c, h, w) of at least 4 x 4 pixels, got {tuple(shape)}")
    if size is not None and shape[1:] != size:
        raise ValueError(f"tensors must have {size[0]} x {size[1]} pixels, got {shape[1]} x {shape[2]}")

    def read() -> Iterator[Tensor]:
        for number, given in enumerate(images):
            if limit is not None and number == limit:
                return
            image = given.detach().to("cpu", torch.float64)
            if image.shape != shape:
                raise ValueError(f"image {number} has shape {tuple(image.shape)}, but image 0 has {tuple(shape)}")
            if not bool(((image >= 0) & (image <= 1)).all()):
                raise ValueError(f"image {number} is not in [0, 1]")
            yield image

    return read
