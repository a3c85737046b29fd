"""Colour and spectrum of images: what is known is found again, and odd input is refused."""

import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from featvis_func import random
from featvis_func.color import correlation_matrix, correlation_of
from featvis_func.dataset.image_statistics import image_statistics
from featvis_func.image import fourier, phase


def noise(count: int, shape: tuple[int, int, int] = (3, 16, 20)) -> list[Tensor]:
    """Colours that depend on each other, of other means and variances."""
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((shape[0], shape[0])) * 0.05
    drawn = [np.einsum("ij,jhw->ihw", matrix, generator.standard_normal(shape)) for _ in range(count)]
    mean = np.linspace(0.4, 0.6, shape[0])[:, None, None]
    return [torch.from_numpy((mean + image).clip(0, 1)) for image in drawn]


def waves(count: int, size: tuple[int, int], decay: float) -> list[Tensor]:
    """Grey images of random phases and the spectrum 1 / f**decay."""
    generator = np.random.default_rng(1)
    h, w = size
    f = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :])
    f[0, 0] = f[0, 1]
    found = []
    for _ in range(count):
        drawn = np.fft.rfft2(generator.standard_normal(size))
        pixels = np.fft.irfft2(drawn / np.abs(drawn) * f**-decay, s=size)
        found.append(torch.from_numpy(0.5 + 0.45 * pixels / np.abs(pixels).max())[None])
    return found


def written(images: list[Tensor], folder: Path, *, suffix: str = ".png") -> list[Tensor]:
    """The images as files, and as the bytes of the files say."""
    folder.mkdir(parents=True, exist_ok=True)
    read = []
    for number, image in enumerate(images):
        values = (image * 255).round().to(torch.uint8).movedim(0, -1).numpy()
        PIL.Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values).save(folder / f"{number:03d}{suffix}")
        read.append(torch.from_numpy(values).movedim(-1, 0) / 255.0)
    return read


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_colours_equal_numpy(channels: int) -> None:
    images = noise(5, (channels, 16, 20))
    found = image_statistics(images)
    pixels = torch.stack(images).movedim(1, 0).flatten(1).numpy()
    covariance = np.cov(pixels, bias=True).reshape(channels, channels)
    np.testing.assert_allclose(found.mean.numpy(), pixels.mean(1), rtol=1e-6)
    np.testing.assert_allclose(found.std.numpy(), pixels.std(1), rtol=1e-6)
    u, s, _ = np.linalg.svd(covariance)
    expected = u * np.sqrt(s / s[0])
    expected = expected * np.sign(expected[np.abs(expected).argmax(0), np.arange(channels)])
    np.testing.assert_allclose(found.correlation.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert found.images == 5


def test_a_known_covariance_is_found() -> None:
    """Of ImageNet's colours."""
    matrix = correlation_matrix(3)
    assert matrix is not None
    generator = torch.Generator().manual_seed(0)
    images = [
        0.5 + 0.08 * torch.einsum("ij,jhw->ihw", matrix, torch.randn(3, 64, 64, generator=generator)).clamp(-6, 6)
        for _ in range(8)
    ]
    found = image_statistics(images)
    torch.testing.assert_close(found.correlation @ found.correlation.T, matrix @ matrix.T, rtol=0.03, atol=0.01)
    assert found.correlation.norm(dim=0).max().item() == pytest.approx(1.0, abs=1e-6)


def test_magnitude_is_the_mean_over_images_of_decorrelated_colours() -> None:
    images = noise(4)
    found = image_statistics(images)
    mean = torch.stack(images).mean((0, 2, 3)).numpy()[:, None, None]
    back = np.linalg.inv(found.correlation.double().numpy())
    expected = np.mean(
        [np.abs(np.fft.rfft2(np.einsum("ij,jhw->ihw", back, i.numpy() - mean), norm="ortho")) for i in images], axis=0
    )
    np.testing.assert_allclose(found.magnitude.numpy(), expected, rtol=1e-4)
    # White noise, decorrelated: all channels have the same power, that of the first direction.
    assert found.magnitude.mean((1, 2)).std().item() < 0.05 * found.magnitude.mean().item()


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("size", [(32, 32), (31, 40), (24, 33)], ids=str)
def test_a_known_decay_is_found(size: tuple[int, int], decay: float) -> None:
    found = image_statistics(waves(4, size, decay))
    assert found.decay == pytest.approx(decay, abs=0.01)
    assert found.magnitude.shape == (1, size[0], size[1] // 2 + 1)
    f = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None, :])
    ratio = found.magnitude[0].double().numpy()[f > 0] * f[f > 0] ** decay
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_decay_is_the_slope_in_which_each_octave_counts_alike() -> None:
    found = image_statistics(noise(3, (2, 20, 15)))
    f = np.hypot(np.fft.fftfreq(20)[:, None], np.fft.rfftfreq(15)[None, :])
    inside = (f > 0) & (f <= 0.5)
    level = found.magnitude.double().numpy().mean(0)
    # numpy's weights are those of the residuals, not of their squares.
    slope, _ = np.polyfit(np.log(f[inside]), np.log(level[inside]), 1, w=1 / f[inside])
    assert found.decay == pytest.approx(-slope, rel=1e-4)
    assert abs(slope) > 1e-3


def test_what_is_measured_plugs_in() -> None:
    """Pictures of the measured spectrum measure the same again."""
    found = image_statistics(waves(4, (24, 24), 1.3))
    image = phase(24, channels=1, magnitude=found.magnitude, contrast=0.1, correlation=found.correlation)
    again = image_statistics([image.decode(image.init(random.key(seed))) for seed in range(4)])
    assert again.decay == pytest.approx(found.decay, abs=0.05)
    fourier(24, channels=1, correlation=found.correlation, decay=found.decay)


def test_files_equal_their_tensors(tmp_path: Path) -> None:
    """Those of folders in the folder, too; hidden files and others are passed over."""
    first = written(noise(3), tmp_path / "b")
    second = written(noise(6)[3:], tmp_path / "a" / "c", suffix=".PNG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    found = image_statistics(tmp_path, size=(16, 20))
    for a, b in zip(found, image_statistics(second + first), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    again = image_statistics(str(tmp_path), size=(16, 20))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_files_are_converted_to_the_channels(tmp_path: Path, channels: int) -> None:
    written(noise(2, (3, 16, 16)), tmp_path)
    written(noise(2, (1, 16, 16)), tmp_path / "grey")
    written(noise(2, (4, 16, 16)), tmp_path / "opacity")
    found = image_statistics(tmp_path, size=16, channels=channels)
    assert found.mean.shape == (channels,)
    assert found.magnitude.shape == (channels, 16, 9)


def test_files_are_resized_and_cropped_about_their_centre(tmp_path: Path) -> None:
    values = np.zeros((16, 48, 3), np.uint8)
    values[::2, 16:32], values[1::2, 16:32] = 40, 200
    PIL.Image.fromarray(values).save(tmp_path / "wide.png")
    assert image_statistics(tmp_path, size=16).mean[0].item() == pytest.approx(120 / 255, abs=1e-6)


def test_a_limit_is_spread_over_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names, in whatever order the file system tells them."""
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: sorted(folder.glob("*"), reverse=True))
    images = written([torch.full((1, 8, 8), number / 10) + 0.01 * torch.eye(8) for number in range(8)], tmp_path)
    found = image_statistics(tmp_path, size=8, channels=1, limit=4)
    expected = image_statistics([images[i] for i in (0, 2, 4, 6)])
    torch.testing.assert_close(found.mean, expected.mean)
    assert found.images == 4
    torch.testing.assert_close(image_statistics(images, limit=3).mean, image_statistics(images[:3]).mean)


def test_one_image_at_a_time() -> None:
    images, alive, most = noise(6), weakref.WeakSet[Tensor](), 0

    class Reader:
        def __iter__(self) -> Iterator[Tensor]:
            nonlocal most
            for image in images:
                copy = image.clone()
                alive.add(copy)
                most = max(most, len(alive))
                yield copy
                del copy

    image_statistics(Reader())
    assert most <= 2


def test_grey_pictures_in_colour() -> None:
    """One direction has all the variance; the others are left out instead of blown up."""
    found = image_statistics([image.expand(3, -1, -1) for image in waves(3, (16, 16), 1.0)])
    assert (found.correlation[:, 1:] == 0).all()
    torch.testing.assert_close(found.correlation[:, 0], torch.full((3,), 3**-0.5))
    assert found.magnitude[1:].abs().max() == 0
    assert found.decay == pytest.approx(1.0, abs=0.01)
    phase(16, magnitude=found.magnitude, correlation=found.correlation)


def test_correlation_of_a_covariance_is_its_root() -> None:
    root = torch.tensor([[2.0, 0.5], [0.3, 1.0]], dtype=torch.float64)
    matrix = correlation_of(root @ root.T)
    scale = torch.linalg.eigvalsh(root @ root.T).max()
    torch.testing.assert_close(matrix @ matrix.T * scale, root @ root.T)
    torch.testing.assert_close(matrix.T @ matrix, torch.diag((matrix**2).sum(0)))
    assert matrix.norm(dim=0)[0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("data", [b"no image", b"", b"\x89PNG\r\n\x1a\n broken"], ids=["text", "empty", "broken"])
def test_a_bad_file_is_named(tmp_path: Path, data: bytes) -> None:
    written(noise(2), tmp_path)
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'bad.png'))} cannot be read as an image: "):
        image_statistics(tmp_path)


def test_a_file_that_ends_too_soon_is_named(tmp_path: Path) -> None:
    written(noise(1), tmp_path)
    path = tmp_path / "000.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"000\.png cannot be read as an image: "):
        image_statistics(tmp_path)


def test_deep_pixels_are_refused(tmp_path: Path) -> None:
    PIL.Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png cannot be read as an image: its pixels are of kind I"):
        image_statistics(tmp_path)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ("nowhere", {}, "no folder 'nowhere'"),
        (".", {}, "no image files in '.', such as .bmp"),
        (".", {"channels": 2}, "files can be read with 1 (grey), 3 or 4 channels, got 2; give tensors instead"),
        (".", {"size": 3}, "images must have at least 4 x 4 pixels to have a spectrum, got (3, 3)"),
        (".", {"limit": 0}, "limit must be at least 1, got 0"),
        ([], {}, "no images were given"),
        (iter([torch.zeros(3, 8, 8)]), {}, "the images are gone through twice, which this iterator cannot be"),
        ([(torch.zeros(3, 8, 8), 1)], {}, "expected tensors (c, h, w), got tuple"),
        ([torch.zeros(8, 8)], {}, "images must be (c, h, w) of at least 4 x 4 pixels, got (8, 8)"),
        ([torch.zeros(3, 8, 8)], {"size": 16}, "the tensors have 8 x 8 pixels, not 16 x 16; resize them first"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], {}, "image 1 has shape (3, 8, 9), the first one (3, 8, 8)"),
        ([torch.zeros(3, 8, 8), torch.full((3, 8, 8), 255)], {}, "image 1 is not in [0, 1]"),
        ([torch.full((3, 8, 8), torch.nan)], {}, "image 0 is not in [0, 1]"),
        ([torch.full((3, 8, 8), 0.3)] * 2, {}, "all pixels of the 2 images have one colour"),
    ],
)
def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Any, options: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        image_statistics(images, **options)
