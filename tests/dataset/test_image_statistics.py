"""Statistics of images: known colours and spectra are recovered, and invalid input raises."""

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
    """Generate white noise with correlated channels of different means and variances."""
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((shape[0], shape[0])) * 0.05
    drawn = [np.einsum("ij,jhw->ihw", matrix, generator.standard_normal(shape)) for _ in range(count)]
    mean = np.linspace(0.4, 0.6, shape[0])[:, None, None]
    return [torch.from_numpy((mean + image).clip(0, 1)) for image in drawn]


def waves(count: int, size: tuple[int, int], decay: float) -> list[Tensor]:
    """Generate grey images with random phases and the magnitude 1 / f**decay."""
    generator = np.random.default_rng(1)
    h, w = size
    f = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :])
    f[0, 0] = f[0, 1]
    images = []
    for _ in range(count):
        drawn = np.fft.rfft2(generator.standard_normal(size))
        pixels = np.fft.irfft2(drawn / np.abs(drawn) * f**-decay, s=size)
        images.append(torch.from_numpy(0.5 + 0.45 * pixels / np.abs(pixels).max())[None])
    return images


def write_images(images: list[Tensor], folder: Path, *, suffix: str = ".png") -> list[Tensor]:
    """Write images to files, and return them with the rounding of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = []
    for number, image in enumerate(images):
        values = (image * 255).round().to(torch.uint8).movedim(0, -1).numpy()
        PIL.Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values).save(folder / f"{number:03d}{suffix}")
        rounded.append(torch.from_numpy(values).movedim(-1, 0) / 255.0)
    return rounded


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_color_statistics_equal_numpy(channels: int) -> None:
    images = noise(5, (channels, 16, 20))
    statistics = image_statistics(images)
    pixels = torch.stack(images).movedim(1, 0).flatten(1).numpy()
    covariance = np.cov(pixels, bias=True).reshape(channels, channels)
    np.testing.assert_allclose(statistics.mean.numpy(), pixels.mean(1), rtol=1e-6)
    np.testing.assert_allclose(statistics.std.numpy(), pixels.std(1), rtol=1e-6)
    u, s, _ = np.linalg.svd(covariance)
    expected = u * np.sqrt(s / s[0])
    expected = expected * np.sign(expected[np.abs(expected).argmax(0), np.arange(channels)])
    np.testing.assert_allclose(statistics.correlation.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert statistics.images == 5


def test_known_covariance_is_recovered() -> None:
    """Uses the covariance of ImageNet's colours."""
    matrix = correlation_matrix(3)
    assert matrix is not None
    generator = torch.Generator().manual_seed(0)
    images = [
        0.5 + 0.08 * torch.einsum("ij,jhw->ihw", matrix, torch.randn(3, 64, 64, generator=generator)).clamp(-6, 6)
        for _ in range(8)
    ]
    statistics = image_statistics(images)
    torch.testing.assert_close(
        statistics.correlation @ statistics.correlation.T, matrix @ matrix.T, rtol=0.03, atol=0.01
    )
    assert statistics.correlation.norm(dim=0).max().item() == pytest.approx(1.0, abs=1e-6)


def test_magnitude_is_the_mean_spectrum_of_decorrelated_colors() -> None:
    images = noise(4)
    statistics = image_statistics(images)
    mean = torch.stack(images).mean((0, 2, 3)).numpy()[:, None, None]
    inverse = np.linalg.inv(statistics.correlation.double().numpy())
    expected = np.mean(
        [np.abs(np.fft.rfft2(np.einsum("ij,jhw->ihw", inverse, i.numpy() - mean), norm="ortho")) for i in images],
        axis=0,
    )
    np.testing.assert_allclose(statistics.magnitude.numpy(), expected, rtol=1e-4)
    # All channels of decorrelated white noise have the same power.
    assert statistics.magnitude.mean((1, 2)).std().item() < 0.05 * statistics.magnitude.mean().item()


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("size", [(32, 32), (31, 40), (24, 33)], ids=str)
def test_known_decay_is_recovered(size: tuple[int, int], decay: float) -> None:
    statistics = image_statistics(waves(4, size, decay))
    assert statistics.decay == pytest.approx(decay, abs=0.01)
    assert statistics.magnitude.shape == (1, size[0], size[1] // 2 + 1)
    f = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None, :])
    ratio = statistics.magnitude[0].double().numpy()[f > 0] * f[f > 0] ** decay
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_decay_fit_weights_octaves_equally() -> None:
    statistics = image_statistics(noise(3, (2, 20, 15)))
    f = np.hypot(np.fft.fftfreq(20)[:, None], np.fft.rfftfreq(15)[None, :])
    inside = (f > 0) & (f <= 0.5)
    level = statistics.magnitude.double().numpy().mean(0)
    # NumPy applies the weights to the residuals, not to their squares.
    slope, _ = np.polyfit(np.log(f[inside]), np.log(level[inside]), 1, w=1 / f[inside])
    assert statistics.decay == pytest.approx(-slope, rel=1e-4)
    assert abs(slope) > 1e-3


def test_statistics_are_valid_arguments_of_parameterisations() -> None:
    """Images generated with the measured spectrum have the same decay."""
    statistics = image_statistics(waves(4, (24, 24), 1.3))
    image = phase(24, channels=1, magnitude=statistics.magnitude, contrast=0.1, correlation=statistics.correlation)
    remeasured = image_statistics([image.decode(image.init(random.key(seed))) for seed in range(4)])
    assert remeasured.decay == pytest.approx(statistics.decay, abs=0.05)
    fourier(24, channels=1, correlation=statistics.correlation, decay=statistics.decay)


def test_files_and_tensors_give_equal_statistics(tmp_path: Path) -> None:
    """Folders are searched recursively; hidden files and other files are ignored."""
    first = write_images(noise(3), tmp_path / "b")
    second = write_images(noise(6)[3:], tmp_path / "a" / "c", suffix=".PNG")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    statistics = image_statistics(tmp_path, size=(16, 20))
    for a, b in zip(statistics, image_statistics(second + first), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    repeated = image_statistics(str(tmp_path), size=(16, 20))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(statistics, repeated, strict=True))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_files_are_converted_to_the_number_of_channels(tmp_path: Path, channels: int) -> None:
    write_images(noise(2, (3, 16, 16)), tmp_path)
    write_images(noise(2, (1, 16, 16)), tmp_path / "grey")
    write_images(noise(2, (4, 16, 16)), tmp_path / "opacity")
    statistics = image_statistics(tmp_path, size=16, channels=channels)
    assert statistics.mean.shape == (channels,)
    assert statistics.magnitude.shape == (channels, 16, 9)


def test_files_are_resized_and_cropped_to_their_centre(tmp_path: Path) -> None:
    values = np.zeros((16, 48, 3), np.uint8)
    values[::2, 16:32], values[1::2, 16:32] = 40, 200
    PIL.Image.fromarray(values).save(tmp_path / "wide.png")
    assert image_statistics(tmp_path, size=16).mean[0].item() == pytest.approx(120 / 255, abs=1e-6)


def test_limit_selects_files_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection is by sorted names, independent of the order of the file system."""
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: sorted(folder.glob("*"), reverse=True))
    images = write_images([torch.full((1, 8, 8), number / 10) + 0.01 * torch.eye(8) for number in range(8)], tmp_path)
    statistics = image_statistics(tmp_path, size=8, channels=1, limit=4)
    expected = image_statistics([images[i] for i in (0, 2, 4, 6)])
    torch.testing.assert_close(statistics.mean, expected.mean)
    assert statistics.images == 4
    torch.testing.assert_close(image_statistics(images, limit=3).mean, image_statistics(images[:3]).mean)


def test_one_image_is_in_memory_at_a_time() -> None:
    images, alive, peak = noise(6), weakref.WeakSet[Tensor](), 0

    class Reader:
        def __iter__(self) -> Iterator[Tensor]:
            nonlocal peak
            for image in images:
                copy = image.clone()
                alive.add(copy)
                peak = max(peak, len(alive))
                yield copy
                del copy

    image_statistics(Reader())
    assert peak <= 2


def test_grey_rgb_images_have_one_direction() -> None:
    """All variance is in one direction; the columns of the others are zero."""
    statistics = image_statistics([image.expand(3, -1, -1) for image in waves(3, (16, 16), 1.0)])
    assert (statistics.correlation[:, 1:] == 0).all()
    torch.testing.assert_close(statistics.correlation[:, 0], torch.full((3,), 3**-0.5))
    assert statistics.magnitude[1:].abs().max() == 0
    assert statistics.decay == pytest.approx(1.0, abs=0.01)
    phase(16, magnitude=statistics.magnitude, correlation=statistics.correlation)


def test_correlation_of_is_a_scaled_square_root() -> None:
    root = torch.tensor([[2.0, 0.5], [0.3, 1.0]], dtype=torch.float64)
    matrix = correlation_of(root @ root.T)
    scale = torch.linalg.eigvalsh(root @ root.T).max()
    torch.testing.assert_close(matrix @ matrix.T * scale, root @ root.T)
    torch.testing.assert_close(matrix.T @ matrix, torch.diag((matrix**2).sum(0)))
    assert matrix.norm(dim=0)[0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("data", [b"not an image", b"", b"\x89PNG\r\n\x1a\n broken"], ids=["text", "empty", "broken"])
def test_unreadable_file_raises_with_its_path(tmp_path: Path, data: bytes) -> None:
    write_images(noise(2), tmp_path)
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'bad.png'))} cannot be read as an image: "):
        image_statistics(tmp_path)


def test_truncated_file_raises_with_its_path(tmp_path: Path) -> None:
    write_images(noise(1), tmp_path)
    path = tmp_path / "000.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"000\.png cannot be read as an image: "):
        image_statistics(tmp_path)


def test_16_bit_image_raises(tmp_path: Path) -> None:
    PIL.Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png cannot be read as an image: its mode is I"):
        image_statistics(tmp_path)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ("nowhere", {}, "no folder 'nowhere'"),
        (".", {}, "no image files in '.'; expected one of .bmp"),
        (".", {"channels": 2}, "image files can be read with 1 (grey), 3 or 4 channels, got 2; give tensors instead"),
        (".", {"size": 3}, "images must have at least 4 x 4 pixels to have a spectrum, got (3, 3)"),
        (".", {"limit": 0}, "limit must be at least 1, got 0"),
        ([], {}, "no images were given"),
        (iter([torch.zeros(3, 8, 8)]), {}, "the images are iterated twice, which this list_iterator does not allow"),
        ([(torch.zeros(3, 8, 8), 1)], {}, "expected tensors (c, h, w), got tuple"),
        ([torch.zeros(8, 8)], {}, "images must be (c, h, w) of at least 4 x 4 pixels, got (8, 8)"),
        ([torch.zeros(3, 8, 8)], {"size": 16}, "tensors must have 16 x 16 pixels, got 8 x 8"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], {}, "image 1 has shape (3, 8, 9), but image 0 has (3, 8, 8)"),
        ([torch.zeros(3, 8, 8), torch.full((3, 8, 8), 255)], {}, "image 1 is not in [0, 1]"),
        ([torch.full((3, 8, 8), torch.nan)], {}, "image 0 is not in [0, 1]"),
        ([torch.full((3, 8, 8), 0.3)] * 2, {}, "the images must have at least two colours, got 2 images of one colour"),
    ],
)
def test_invalid_arguments_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Any, options: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        image_statistics(images, **options)
