"""Picture files: upright, of all kinds of pixels, and the part that a model sees of them."""

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch

from featvis_func.io.image_files import find_pictures, open_picture, read_picture, read_pixels, seen_part


def corners(h: int, w: int) -> np.ndarray:
    """A red corner at the upper left, a green one at the upper right, a blue one at the lower left."""
    values = np.zeros((h, w, 3), np.uint8)
    values[: h // 2, : w // 2, 0] = values[: h // 2, w // 2 :, 1] = values[h // 2 :, : w // 2, 2] = 255
    return values


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_pictures_are_upright(tmp_path: Path, orientation: int, suffix: str, quick: bool) -> None:
    upright = PIL.Image.fromarray(corners(96, 160))
    # From upright to what is stored: the inverse of what the number says.
    turns = {
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_90,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"picture{suffix}"
    stored.save(path, exif=exif)
    pixels, whole = read_pixels(path, (8, 8), quick=quick)
    assert whole == (96, 160)
    expected = np.array(PIL.ImageOps.fit(upright, (8, 8), PIL.Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_allclose(pixels[:, 1::5, 1::5].numpy(), expected[:, 1::5, 1::5], atol=8)
    assert open_picture(path).size == (160, 96)


def test_a_large_jpeg_is_decoded_small_where_that_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PIL.Image.fromarray(corners(200, 320)).save(tmp_path / "a.jpg", quality=95)
    decoded: list[tuple[int, int]] = []
    fit = PIL.ImageOps.fit

    def watched(image: PIL.Image.Image, *args: object) -> PIL.Image.Image:
        decoded.append(image.size)
        return fit(image, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PIL.ImageOps, "fit", watched)
    plain, _ = read_pixels(tmp_path / "a.jpg", (20, 20))
    quick, whole = read_pixels(tmp_path / "a.jpg", (20, 20), quick=True)
    near, _ = read_pixels(tmp_path / "a.jpg", (60, 60), quick=True)
    assert decoded == [(320, 200), (80, 50), (320, 200)]
    assert whole == (200, 320)
    assert near.shape == (3, 60, 60)
    assert (plain.int() - quick.int()).abs().float().mean() < 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_all_kinds_of_pixels_are_read(tmp_path: Path, mode: str, channels: int) -> None:
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    PIL.Image.new("RGB", (9, 9), (255, 255, 255)).convert(mode).save(path)
    assert torch.equal(read_picture(path, 4, channels=channels), torch.ones(channels, 4, 4))


def test_what_is_transparent_shows_white(tmp_path: Path) -> None:
    values = np.zeros((8, 8, 4), np.uint8)
    values[:, 4:] = 255, 0, 0, 255
    PIL.Image.fromarray(values).save(tmp_path / "a.png")
    found = read_picture(tmp_path / "a.png", 8)
    assert torch.equal(found[:, 0, 0], torch.ones(3))
    assert torch.equal(found[:, 0, 7], torch.tensor([1.0, 0.0, 0.0]))
    assert read_picture(tmp_path / "a.png", 8, channels=4)[3].mean() == 0.5


@pytest.mark.parametrize("size", [(10, 10), (10, 25), (30, 12)], ids=str)
@pytest.mark.parametrize("whole", [(60, 60), (47, 130), (130, 47)], ids=str)
def test_the_part_seen_is_pillows(whole: tuple[int, int], size: tuple[int, int]) -> None:
    """Its box about a pixel of the model's input holds the pixels that this one is made of."""
    columns = PIL.Image.fromarray(np.tile(np.arange(whole[1], dtype=np.float32), (whole[0], 1)))
    rows = PIL.Image.fromarray(np.tile(np.arange(whole[0], dtype=np.float32)[:, None], (1, whole[1])))
    part = seen_part(torch.tensor(whole), size)
    for picture, corner, number in ((columns, part.left, size[1]), (rows, part.top, size[0])):
        fitted = np.array(PIL.ImageOps.fit(picture, (size[1], size[0]), PIL.Image.Resampling.BICUBIC))
        line = fitted[size[0] // 2] if picture is columns else fitted[:, size[1] // 2]
        middle = (corner + (torch.arange(number) + 0.5) * part.scale - 0.5).numpy()
        np.testing.assert_allclose(line[2:-2], middle[2:-2], atol=0.15)


def test_files_are_listed_once_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("z.JPG", "b/a.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert find_pictures(tmp_path) == [tmp_path / "b" / "a.png", tmp_path / "z.JPG"]
    assert find_pictures(["z.png", "a.png", Path("z.png")]) == [Path("a.png"), Path("z.png")]
    with pytest.raises(ValueError, match="no picture files were given"):
        find_pictures([])
