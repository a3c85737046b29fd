"""Picture files: which there are, how one is read, and which part of it a model sees.

Like :mod:`featvis_func.dataset.image_statistics`, this reads files, which the functional core does not.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from featvis_func.validation import check_size

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What the names of pictures end in, in small or capital letters."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_BYTES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"}
_WHITE = (255, 255, 255, 255)
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # the orientations that swap width and height
# A JPEG may be decoded at an eighth, a quarter or half of its size, if that is this many times what is needed.
_SPARE = 2


class Seen(NamedTuple):
    """What a model sees of a picture of ``(height, width)``: the largest part of its own form, about the centre."""

    left: Tensor
    """In the picture's pixels, as the next."""
    top: Tensor
    scale: Tensor
    """The picture's pixels per pixel of the model's input."""


def find_pictures(images: str | Path | Iterable[str | Path]) -> list[Path]:
    """Picture files, each once, in the order of their names.

    Args:
        images: a folder, whose files are found by :data:`SUFFIXES`, and in its folders, but for
            hidden ones; or files.

    Raises:
        ValueError: neither a folder nor files, or no pictures.
    """
    if not isinstance(images, str | Path):
        if not isinstance(images, Iterable):
            raise ValueError(f"expected a folder or picture files, got {images!r}")
        files = sorted({Path(path) for path in images})
        if not files:
            raise ValueError("no picture files were given")
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
        raise ValueError(f"no image files in {str(folder)!r}, such as {', '.join(SUFFIXES)}")
    return files


def check_channels(channels: int, instead: str = "") -> None:
    """Raises ValueError if files cannot be read with so many channels.

    >>> check_channels(2)
    Traceback (most recent call last):
        ...
    ValueError: files can be read with 1 (grey), 3 or 4 channels, got 2
    """
    if channels not in _MODES:
        raise ValueError(f"files can be read with 1 (grey), 3 or 4 channels, got {channels}{instead}")


def read_picture(path: str | Path, size: int | tuple[int, int], *, channels: int = 3) -> Tensor:
    """An image file as a tensor, upright, resized and cropped about its centre.

    Args:
        path: of a file that Pillow reads, of 8 bits per channel.
        size: pixels, ``h = w`` or ``(h, w)``.
        channels: 1 (grey), 3 or 4. Without the fourth, what is transparent shows white.

    Returns:
        float32 ``(channels, h, w)`` in ``[0, 1]``.

    Raises:
        ValueError: a file that is not there or cannot be read, or another number of channels.
    """
    pixels, _ = read_pixels(path, check_size(size), channels=channels)
    return (pixels.double() / 255).float()


def read_pixels(
    path: str | Path, size: tuple[int, int], *, channels: int = 3, quick: bool = False
) -> tuple[Tensor, tuple[int, int]]:
    """An image file as :func:`read_picture` reads it, in bytes, and how large it is.

    Args:
        path, size, channels: as for :func:`read_picture`.
        quick: whether a large JPEG may be decoded at a reduced size, of at least twice ``size``.

    Returns:
        uint8 ``(channels, h, w)``; and the whole picture's ``(height, width)``, upright.

    Raises:
        ValueError: as :func:`read_picture`.
    """
    check_channels(channels, "; give a tensor instead")
    h, w = size
    upright, whole = _opened(Path(path), _MODES[channels], _SPARE * max(h, w) if quick else None)
    values = np.array(PIL.ImageOps.fit(upright, (w, h), PIL.Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(values)
    return (pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0).contiguous()), whole


def open_picture(path: str | Path, *, channels: int = 3) -> PIL.Image.Image:
    """An image file as a whole, upright.

    Raises:
        ValueError: as :func:`read_picture`.
    """
    check_channels(channels)
    return _opened(Path(path), _MODES[channels], None)[0]


def seen_part(whole: Tensor, size: tuple[int, int]) -> Seen:
    """Which part of a picture :func:`read_pixels` keeps.

    Args:
        whole: ``(..., 2)``, height and width of pictures.
        size: ``(h, w)`` of the model's input.

    >>> seen_part(torch.tensor([100, 300]), (50, 50))
    Seen(left=tensor(100.), top=tensor(0.), scale=tensor(2.))
    """
    scale = torch.minimum(whole[..., 0] / size[0], whole[..., 1] / size[1])
    top, left = ((whole[..., axis] - scale * size[axis]) / 2 for axis in (0, 1))
    return Seen(left, top, scale)


def _opened(path: Path, mode: str, near: int | None) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """A picture, upright, of no less than ``near`` pixels a side if it has so many; and its own height and width."""
    try:
        with PIL.Image.open(path) as file:
            w, h = file.size
            drafted = None if near is None else file.draft(None, (near, near))
            flip_kernel = drafted is not None and file.getexif().get(_ORIENTATION) in _TURNED
            upright = PIL.ImageOps.exif_transpose(file)
            if drafted is None:
                w, h = upright.size
            if upright.mode not in _BYTES:
                raise ValueError(f"its pixels are of kind {upright.mode}; convert it to 8 bits per channel")
            # Palettes may have transparent entries, which go by way of the opacity.
            if upright.mode in ("P", "PA", "LA", "RGBA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                if mode != "RGBA":
                    upright = PIL.Image.alpha_composite(PIL.Image.new("RGBA", upright.size, _WHITE), upright)
            return upright.convert(mode), (w, h) if flip_kernel else (h, w)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in any way there is
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
