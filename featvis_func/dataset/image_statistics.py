"""Colour and spectrum of images, measured: what parameterisations take instead of ImageNet's or of a power law.

This module reads files, which the functional core does not.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.color import correlation_of
from featvis_func.image.spectral import frequencies
from featvis_func.io.image_files import check_channels, find_pictures, read_pixels
from featvis_func.validation import check_size

_FOLDER_SIZE = 224  # px
# Higher frequencies are those of the corners of the spectrum alone, which diagonal waves have.
_NYQUIST = 0.5


class ImageStatistics(NamedTuple):
    """What :func:`image_statistics` measures, on the CPU."""

    correlation: Tensor
    """float32 ``(c, c)``: from decorrelated colour to channels, as ``correlation=`` takes it."""
    magnitude: Tensor
    """float32 ``(c, h, w // 2 + 1)``: the mean of ``|rfft2(x, norm="ortho")|`` over the images, ``x`` being
    decorrelated colours about their mean, as :func:`~featvis_func.phase` takes it."""
    decay: float
    """The power with which the magnitude falls with the frequency, as ``decay=`` takes it."""
    mean: Tensor
    """float32 ``(c,)``: of each channel."""
    std: Tensor
    """float32 ``(c,)``: of each channel, over all pixels of all images."""
    images: int
    """How many there were."""


def image_statistics(
    images: str | Path | Iterable[Tensor],
    *,
    size: int | tuple[int, int] | None = None,
    channels: int = 3,
    limit: int | None = None,
) -> ImageStatistics:
    """Measures colours and spectrum of images, one at a time, in two passes.

    * ``correlation``: the square root of the covariance of colours over all pixels, see
      :func:`~featvis_func.color.correlation_of`.
    * ``magnitude``: of the colours that it decorrelates.
    * ``decay``: minus the slope of ``log(magnitude)`` against ``log(f)`` in cycles per pixel up to 0.5, by least
      squares in which each octave counts alike.

    Args:
        images: a folder, whose image files are read, those of its folders too, in the order of their names; or tensors
            ``(c, h, w)`` in ``[0, 1]`` of equal shape, in anything that can be gone through twice.
        size: pixels to which files are resized and cropped about their centre, ``h = w`` or ``(h, w)``; default 224.
            Tensors must have it already; default: that of the first one. At least 4.
        channels: to which files are converted: 1 (grey), 3 or 4 (with opacity). Tensors have their own number.
        limit: at most so many images, of a folder spread evenly over it; ``None``: all.

    Returns:
        An :class:`ImageStatistics`. Equal images give equal numbers.

    Raises:
        ValueError: no folder, no images in it, a file that is no sound image (with its name), tensors of different
            shapes or outside of ``[0, 1]``, an iterator that can be gone through only once, images of one single
            colour, a size below 4 or a limit below 1.

    Source: Olah et al., "Feature Visualization", Distill 2017 (colour); Fel et al., arXiv 2306.06805, section 3 (mean
    magnitude).

    >>> noise = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    >>> found = image_statistics(noise)
    >>> found.magnitude.shape, abs(found.decay) < 0.1
    (torch.Size([3, 16, 9]), True)
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    asked = None if size is None else check_size(size)
    if isinstance(images, str | Path):
        pictures = _of_folder(Path(images), asked or check_size(_FOLDER_SIZE), channels, limit)
    else:
        pictures = _of_tensors(images, asked, limit)
    count, width, mean, covariance = _colors(pictures)
    if not covariance.any():
        raise ValueError(f"all pixels of the {count} images have one colour: there is nothing to measure")
    correlation = correlation_of(covariance)
    magnitude = _magnitude(pictures, mean, torch.linalg.pinv(correlation)) / count
    return ImageStatistics(
        correlation.float(),
        magnitude.float(),
        _decay(magnitude, width),
        mean.float(),
        covariance.diag().sqrt().float(),
        count,
    )


_Pictures = Callable[[], Iterator[Tensor]]


def _colors(pictures: _Pictures) -> tuple[int, int, Tensor, Tensor]:
    """How many pictures, their width, and the mean ``(c,)`` and covariance ``(c, c)`` of their pixels, in float64."""
    count, width, total, products = 0, 0, torch.zeros(()), torch.zeros(())
    for picture in pictures():
        width = picture.shape[-1]
        # About the middle of the range, so that little cancels.
        pixels = picture.flatten(1) - 0.5
        count, total, products = count + 1, total + pixels.mean(1), products + pixels @ pixels.T / pixels.shape[1]
    mean = total / count
    # Symmetric but for rounding, and without variance where only rounding has any.
    covariance = products / count - torch.outer(mean, mean)
    return count, width, mean + 0.5, torch.where(covariance.abs() > 1e-14, covariance, 0.0)


def _magnitude(pictures: _Pictures, mean: Tensor, decorrelate: Tensor) -> Tensor:
    """The sum over the pictures of ``|rfft2(x)|``: float64 ``(c, h, w // 2 + 1)``."""
    total = torch.zeros(())
    for picture in pictures():
        pixels = torch.einsum("ij,jhw->ihw", decorrelate, picture - mean[:, None, None])
        total = total + torch.fft.rfft2(pixels, norm="ortho").abs()
    return total


def _decay(magnitude: Tensor, w: int) -> float:
    """Minus the slope of the logarithm of the mean over the channels, of pictures ``w`` pixels wide."""
    f, level = frequencies(magnitude.shape[1], w).double(), magnitude.mean(0)
    measured = (f > 0) & (f <= _NYQUIST) & (level > 0)
    x, y = torch.log(f[measured]), torch.log(level[measured])
    # An octave has entries as its area, and counts as its width on the scale of the logarithm.
    weight = f[measured] ** -2
    weight = weight / weight.sum()
    x = x - (weight * x).sum()
    return -((weight * x * y).sum() / (weight * x * x).sum()).item()


def _of_folder(folder: Path, size: tuple[int, int], channels: int, limit: int | None) -> _Pictures:
    check_channels(channels, "; give tensors instead")
    if min(size) < 4:
        raise ValueError(f"images must have at least 4 x 4 pixels to have a spectrum, got {size}")
    files = find_pictures(folder)
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    return lambda: (read_pixels(path, size, channels=channels)[0].double() / 255 for path in files)


def _of_tensors(images: Iterable[Tensor], size: tuple[int, int] | None, limit: int | None) -> _Pictures:
    if iter(images) is images:
        raise ValueError("the images are gone through twice, which this iterator cannot be; give a list or a Dataset")
    first = next(iter(images), None)
    if first is None:
        raise ValueError("no images were given")
    if not isinstance(first, Tensor):
        raise ValueError(f"expected tensors (c, h, w), got {type(first).__name__}")
    shape = first.shape
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise ValueError(f"images must be (c, h, w) of at least 4 x 4 pixels, got {tuple(shape)}")
    if size is not None and shape[1:] != size:
        raise ValueError(
            f"the tensors have {shape[1]} x {shape[2]} pixels, not {size[0]} x {size[1]}; resize them first"
        )

    def pictures() -> Iterator[Tensor]:
        for number, image in enumerate(images):
            if limit is not None and number == limit:
                return
            picture = image.detach().to("cpu", torch.float64)
            if picture.shape != shape:
                raise ValueError(f"image {number} has shape {tuple(picture.shape)}, the first one {tuple(shape)}")
            if not bool(((picture >= 0) & (picture <= 1)).all()):
                raise ValueError(f"image {number} is not in [0, 1]")
            yield picture

    return pictures
