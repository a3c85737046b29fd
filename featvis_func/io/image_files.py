"""Find and read image files, and compute the geometry of the centre crop."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from featvis_func.validation import check_sides

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes of image files; their case is ignored."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_8_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"}
_WHITE = (255, 255, 255, 255)
_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as this is at least the required size times this factor.
_DRAFT_FACTOR = 2


class CenterCrop(NamedTuple):
    """Geometry of the centre crop of an image: the largest region with the aspect ratio of the model's input."""

    left: Tensor
    """Left edge, in pixels of the image file."""
    top: Tensor
    """Top edge, in pixels of the image file."""
    scale: Tensor
    """Pixels of the image file per pixel of the model's input."""


def find_images(images: str | Path | Iterable[str | Path]) -> list[Path]:
    """List image files.

    Args:
        images: a folder, which is searched recursively for files with :data:`SUFFIXES` that are not hidden; or paths
            of files.

    Returns:
        The sorted paths, without duplicates.

    Raises:
        ValueError: If ``images`` is neither a folder nor paths, or there are no image files.
    """
    if not isinstance(images, str | Path):
        if not isinstance(images, Iterable):
            raise ValueError(f"expected a folder or image files, got {images!r}")
        files = sorted({Path(path) for path in images})
        if not files:
            raise ValueError("no image files were given")
        return files
    folder = Path(images)
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise ValueError(f"no image files in {str(folder)!r}; expected one of {', '.join(SUFFIXES)}")
    return files


def check_channels(channels: int, advice: str = "") -> None:
    """Raise ValueError if image files cannot be read with this number of channels.

    Args:
        channels: number of channels.
        advice: appended to the error message.

    >>> check_channels(2)
    Traceback (most recent call last):
        ...
    ValueError: image files can be read with 1 (grey), 3 or 4 channels, got 2
    """
    if channels not in _MODES:
        raise ValueError(f"image files can be read with 1 (grey), 3 or 4 channels, got {channels}{advice}")


def read_image(path: str | Path, size: int | tuple[int, int], *, channels: int = 3) -> Tensor:
    """Read an image file as a tensor, rotated upright according to EXIF, resized, and cropped to its centre.

    Args:
        path: a file with 8 bits per channel, in any format that Pillow reads.
        size: size in pixels, an integer for a square or ``(h, w)``.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA). Transparent pixels are blended with white for 1 and 3 channels.

    Returns:
        float32 ``(channels, h, w)`` in ``[0, 1]``.

    Raises:
        ValueError: If the file is missing or cannot be read, or ``channels`` is another number.
    """
    pixels, _ = read_pixels(path, check_sides(size), channels=channels)
    return (pixels.double() / 255).float()


def read_pixels(
    path: str | Path, size: tuple[int, int], *, channels: int = 3, quick: bool = False
) -> tuple[Tensor, tuple[int, int]]:
    """Read an image file like :func:`read_image`, but as uint8 and together with its original size.

    Args:
        path, channels: as for :func:`read_image`.
        size: ``(h, w)`` in pixels.
        quick: whether a large JPEG may be decoded at a reduced size of at least twice ``size``.

    Returns:
        uint8 ``(channels, h, w)``; and ``(height, width)`` of the upright image before resizing and cropping.

    Raises:
        ValueError: as for :func:`read_image`.
    """
    check_channels(channels, "; give a tensor instead")
    h, w = size
    upright, file_size = _open(Path(path), _MODES[channels], _DRAFT_FACTOR * max(h, w) if quick else None)
    values = np.array(PIL.ImageOps.fit(upright, (w, h), PIL.Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(values)
    return (pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0).contiguous()), file_size


def open_image(path: str | Path, *, channels: int = 3) -> PIL.Image.Image:
    """Open an image file at its original size, rotated upright according to EXIF.

    Raises:
        ValueError: as for :func:`read_image`.
    """
    check_channels(channels)
    return _open(Path(path), _MODES[channels], None)[0]


def center_crop(file_size: Tensor, size: tuple[int, int]) -> CenterCrop:
    """Compute the region of an image that :func:`read_pixels` keeps.

    Args:
        file_size: ``(..., 2)``: height and width of the image files in pixels.
        size: ``(h, w)`` of the model's input.

    Returns:
        The geometry; each field has shape ``(...)``.

    >>> center_crop(torch.tensor([100, 300]), (50, 50))
    CenterCrop(left=tensor(100.), top=tensor(0.), scale=tensor(2.))
    """
    scale = torch.minimum(file_size[..., 0] / size[0], file_size[..., 1] / size[1])
    top, left = ((file_size[..., axis] - scale * size[axis]) / 2 for axis in (0, 1))
    return CenterCrop(left, top, scale)


def _open(path: Path, mode: str, draft_size: int | None) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """Open an image upright, and return it with the height and width of the file.

    With ``draft_size``, a JPEG is decoded at a reduced size, with both sides at least this many pixels.
    """
    try:
        with PIL.Image.open(path) as file:
            w, h = file.size
            draft = None if draft_size is None else file.draft(None, (draft_size, draft_size))
            transposed = draft is not None and file.getexif().get(_ORIENTATION) in _TRANSPOSED
            upright = PIL.ImageOps.exif_transpose(file)
            if draft is None:
                w, h = upright.size
            if upright.mode not in _8_BIT_MODES:
                raise ValueError(f"its mode is {upright.mode}, expected 8 bits per channel")
            # A palette may have transparent entries: convert it to RGBA first.
            if upright.mode in ("P", "PA", "LA", "RGBA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                if mode != "RGBA":
                    upright = PIL.Image.alpha_composite(PIL.Image.new("RGBA", upright.size, _WHITE), upright)
            return upright.convert(mode), (w, h) if transposed else (h, w)
    except MemoryError:
        raise
    except Exception as error:  # Damaged files raise many types of exceptions.
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
