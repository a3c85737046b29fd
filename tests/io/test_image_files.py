"""Image files: orientation, pixel modes, and the geometry of the centre crop."""

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch

from featvis_func.io.image_files import center_crop, find_images, open_image, read_image, read_pixels


def corners(h: int, w: int) -> np.ndarray:
    """Create an image with a red upper left, a green upper right and a blue lower left corner."""
    values = np.zeros((h, w, 3), np.uint8)
    values[: h // 2, : w // 2, 0] = values[: h // 2, w // 2 :, 1] = values[h // 2 :, : w // 2, 2] = 255
    return values


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_images_are_read_upright(tmp_path: Path, orientation: int, suffix: str, quick: bool) -> None:
    upright = PIL.Image.fromarray(corners(96, 160))
    # From upright to stored: the inverse of the operation that EXIF specifies.
    inverses = {
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_90,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverses[orientation]) if orientation in inverses else upright
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image{suffix}"
    stored.save(path, exif=exif)
    pixels, file_size = read_pixels(path, (8, 8), quick=quick)
    assert file_size == (96, 160)
    expected = np.array(PIL.ImageOps.fit(upright, (8, 8), PIL.Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_allclose(pixels[:, 1::5, 1::5].numpy(), expected[:, 1::5, 1::5], atol=8)
    assert open_image(path).size == (160, 96)


def test_quick_decodes_a_large_jpeg_at_reduced_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PIL.Image.fromarray(corners(200, 320)).save(tmp_path / "a.jpg", quality=95)
    decoded: list[tuple[int, int]] = []
    fit = PIL.ImageOps.fit

    def recording_fit(image: PIL.Image.Image, *args: object) -> PIL.Image.Image:
        decoded.append(image.size)
        return fit(image, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PIL.ImageOps, "fit", recording_fit)
    full, _ = read_pixels(tmp_path / "a.jpg", (20, 20))
    quick, file_size = read_pixels(tmp_path / "a.jpg", (20, 20), quick=True)
    larger, _ = read_pixels(tmp_path / "a.jpg", (60, 60), quick=True)
    assert decoded == [(320, 200), (80, 50), (320, 200)]
    assert file_size == (200, 320)
    assert larger.shape == (3, 60, 60)
    assert (full.int() - quick.int()).abs().float().mean() < 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_all_8_bit_modes_are_read(tmp_path: Path, mode: str, channels: int) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    PIL.Image.new("RGB", (9, 9), (255, 255, 255)).convert(mode).save(path)
    assert torch.equal(read_image(path, 4, channels=channels), torch.ones(channels, 4, 4))


def test_transparent_pixels_are_blended_with_white(tmp_path: Path) -> None:
    values = np.zeros((8, 8, 4), np.uint8)
    values[:, 4:] = 255, 0, 0, 255
    PIL.Image.fromarray(values).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 8)
    assert torch.equal(image[:, 0, 0], torch.ones(3))
    assert torch.equal(image[:, 0, 7], torch.tensor([1.0, 0.0, 0.0]))
    assert read_image(tmp_path / "a.png", 8, channels=4)[3].mean() == 0.5


@pytest.mark.parametrize("size", [(10, 10), (10, 25), (30, 12)], ids=str)
@pytest.mark.parametrize("file_size", [(60, 60), (47, 130), (130, 47)], ids=str)
def test_center_crop_equals_pillow_fit(file_size: tuple[int, int], size: tuple[int, int]) -> None:
    """Fitted images of row and column numbers show where each pixel comes from."""
    columns = PIL.Image.fromarray(np.tile(np.arange(file_size[1], dtype=np.float32), (file_size[0], 1)))
    rows = PIL.Image.fromarray(np.tile(np.arange(file_size[0], dtype=np.float32)[:, None], (1, file_size[1])))
    crop = center_crop(torch.tensor(file_size), size)
    for image, corner, count in ((columns, crop.left, size[1]), (rows, crop.top, size[0])):
        fitted = np.array(PIL.ImageOps.fit(image, (size[1], size[0]), PIL.Image.Resampling.BICUBIC))
        line = fitted[size[0] // 2] if image is columns else fitted[:, size[1] // 2]
        centres = (corner + (torch.arange(count) + 0.5) * crop.scale - 0.5).numpy()
        np.testing.assert_allclose(line[2:-2], centres[2:-2], atol=0.15)


def test_find_images_returns_sorted_unique_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("z.JPG", "b/a.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert find_images(tmp_path) == [tmp_path / "b" / "a.png", tmp_path / "z.JPG"]
    assert find_images(["z.png", "a.png", Path("z.png")]) == [Path("a.png"), Path("z.png")]
    with pytest.raises(ValueError, match="no image files were given"):
        find_images([])
