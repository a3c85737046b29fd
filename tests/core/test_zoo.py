"""TextureNet: the texture generator, the shipped weights and the training module."""

from importlib import resources
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from featvis_func.zoo import CLASSES, SIZE, TextureNet, normalise, texture, texture_batch, texturenet, train

TINY = ["--epochs", "2", "--images", "16", "--batch", "8", "--held-out", "16"]


@pytest.fixture(scope="module")
def net() -> TextureNet:
    return texturenet()


@pytest.mark.parametrize("name", CLASSES)
def test_texture_is_a_deterministic_image_in_range(name: str) -> None:
    state = torch.random.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    image = texture(name, 5, size=48)
    assert image.shape == (3, 48, 48)
    assert image.dtype == np.float32
    assert 0.0 <= image.min() < image.max() <= 1.0
    assert image.std() > 0.02, "the image is constant"
    np.testing.assert_array_equal(image, texture(CLASSES.index(name), 5, size=48))
    assert np.abs(image - texture(name, 6, size=48)).mean() > 0.02, "the seed has no effect"
    assert torch.equal(state[0], torch.random.get_rng_state())
    assert state[1] == str(np.random.get_state())  # noqa: NPY002


def test_textures_equal_those_of_the_shipped_weights() -> None:
    """A change of the generator fails here: the weights would have to be trained again.

    Golden: `[round(float(np.abs(np.diff(texture(c, 0))).mean()), 4) for c in CLASSES]`.
    """
    golden = """
        0.0581 0.0547 0.0271 0.0734 0.0667 0.0769 0.0637 0.0389 0.0616 0.0539 0.0619
        0.0638 0.0573 0.0663 0.067 0.0765 0.0364 0.0762 0.0617 0.0477 0.0646 0.0767
        0.0672 0.0623 0.0777 0.0927 0.0698 0.0742 0.1554 0.0919 0.0132 0.0162
    """
    contrast = [float(np.abs(np.diff(texture(c, 0))).mean()) for c in CLASSES]
    np.testing.assert_allclose(contrast, [float(v) for v in golden.split()], atol=1e-4)


def test_classes_look_different() -> None:
    assert len(set(CLASSES)) == len(CLASSES) >= 24
    images = [texture(name, 1, size=48) for name in CLASSES]
    for (i, a), (j, b) in combinations(enumerate(images), 2):
        assert np.abs(a - b).mean() > 0.02, f"{CLASSES[i]} and {CLASSES[j]} look alike"


def test_texture_batch_cycles_through_the_classes() -> None:
    images, labels = texture_batch(30, 4, size=24)
    assert labels.tolist() == [(30 + i) % len(CLASSES) for i in range(4)]
    np.testing.assert_array_equal(images[3], texture(int(labels[3]), 33, size=24))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: texture("tartan", 0), r"unknown texture 'tartan'; expected one of stripes, "),
        (lambda: texture(len(CLASSES), 0), rf"texture index must be in \[0, {len(CLASSES)}\), got {len(CLASSES)}"),
        (lambda: texture(-1, 0), "texture index must be in .*, got -1"),
        (lambda: texture("dots", 0, size=4), "size must be at least 8, got 4"),
        (lambda: texture("dots", -1), r"seed must be in \[0, 2\*\*64\), got -1"),
        (lambda: texture_batch(0, 0), "count must be at least 1, got 0"),
    ],
)
def test_invalid_arguments_raise_and_name_the_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_shipped_weights_classify_held_out_textures(net: TextureNet) -> None:
    # Other images than those that the training module evaluates on.
    images, labels = train.make_images(train.HELD_OUT + 10**6, 12 * len(CLASSES), size=SIZE)
    assert train.accuracy(net, images, labels) >= 0.9


def test_untrained_network_has_low_accuracy() -> None:
    """The accuracy above is due to the weights, not an artefact of the measurement."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = texturenet(pretrained=False)
    assert train.accuracy(untrained, *train.make_images(train.HELD_OUT, 64, size=SIZE)) < 0.3


def test_shipped_file_is_small_float32_and_finite(net: TextureNet) -> None:
    assert len(resources.files("featvis_func.zoo").joinpath("texturenet.safetensors").read_bytes()) < 2_000_000
    assert not net.training
    parameters = list(net.parameters())
    assert {p.dtype for p in parameters} == {torch.float32}
    assert all(bool(p.isfinite().all()) for p in parameters)
    assert 300_000 <= sum(p.numel() for p in parameters) <= 480_000


def test_last_block_has_few_dead_channels(net: TextureNet) -> None:
    """A channel is dead if no texture activates it."""
    images, _ = texture_batch(train.HELD_OUT, 2 * len(CLASSES), size=SIZE)
    x = normalise(torch.from_numpy(images))
    with torch.no_grad():
        for number in range(1, 7):
            x = net.get_submodule(f"block{number}")(x)
    assert (x.amax((0, 2, 3)) > 0).float().mean() > 0.9


def test_network_accepts_other_sizes_and_every_pixel_has_a_gradient(net: TextureNet) -> None:
    image = torch.full((1, 3, 40, 56), 0.5, requires_grad=True)
    net(normalise(image)).square().sum().backward()
    assert image.grad is not None
    assert bool((image.grad.abs().amax(1) > 0).all()), "some pixels have no gradient"


@pytest.mark.slow
def test_training_is_reproducible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same seed gives bit-equal weights, whether the images are generated in this or in another process."""
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors"]
    state = torch.random.get_rng_state()
    for file, seed, workers in zip(files, "001", "010", strict=True):
        train.main([*TINY, "--out", str(file), "--seed", seed, "--workers", workers])
    assert "held-out accuracy 0." in capsys.readouterr().out
    assert torch.equal(state, torch.random.get_rng_state())
    assert sorted(tmp_path.iterdir()) == files, "a temporary file remains"
    first, second, other = (safetensors.torch.load_file(f) for f in files)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    TextureNet().load_state_dict(first)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(train.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        train.save(TextureNet(), file)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
