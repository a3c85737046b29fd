"""Top examples: comparison with a loop that uses hooks, boxes, saving, cache keys, and unreadable files."""

import os
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

import featvis_func as fv
from featvis_func.dataset import Example, reading
from featvis_func.dataset.best import Top, keep_best
from featvis_func.io.image_files import read_image
from featvis_func.models import Model
from tests.toys import OneConv, load_toy

LAYERS = ["0", "3", "9"]


def write_images(folder: Path, count: int = 23) -> Path:
    """Write PNG files of coloured noise, of several sizes and aspect ratios."""
    generator = np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for number in range(count):
        shape = ((20, 20), (40, 31), (33, 90))[number % 3]
        coarse = generator.integers(0, 256, (5, 6, 3), np.uint8)
        image = PIL.Image.fromarray(coarse).resize((shape[1], shape[0]), PIL.Image.Resampling.BICUBIC)
        image.save(folder / ("more" if number % 4 == 0 else "") / f"{number:03d}.png")
    return folder


def examples_by_hook(model: Model, layer: str, folder: Path, count: int) -> tuple[Tensor, list[list[str]], Tensor]:
    """Compute scores, paths and flat positions with a forward hook, one image at a time."""
    files = sorted(folder.rglob("*.png"))
    outputs: list[Tensor] = []
    handle = model.module.get_submodule(layer).register_forward_hook(lambda m, a, o: outputs.append(o.detach().clone()))
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    with torch.no_grad():
        for path in files:
            model.module((read_image(path, (model.size[0], model.size[1]))[None] - mean) / std)
    handle.remove()
    values = torch.cat(outputs).flatten(2) if outputs[0].ndim == 4 else torch.cat(outputs)[:, :, None]
    maxima, places = values.max(2)
    top = maxima.topk(min(count, len(files)), dim=0)
    names = [[str(files[i]) for i in column] for column in top.indices.T.tolist()]
    return top.values.T, names, places.gather(0, top.indices).T


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_top_examples_equals_a_loop_with_hooks(tiny: Model, tmp_path: Path, batch_size: int) -> None:
    folder = write_images(tmp_path)
    result = fv.top_examples(tiny, LAYERS, folder, count=4, batch_size=batch_size)
    assert list(result.layers) == LAYERS
    assert (result.seen, result.skipped) == (23, 0)
    for layer in LAYERS:
        scores, names, places = examples_by_hook(tiny, layer, folder, 4)
        torch.testing.assert_close(result.layers[layer].scores, scores, rtol=1e-4, atol=1e-5)
        for filter, expected in enumerate(names):
            examples = result.of(layer, filter)
            if scores[filter].diff().abs().min() > 1e-4:  # Rounding may swap examples with closer scores.
                assert [example.path for example in examples] == expected
                positions = [divmod(int(place), 20 if layer == "0" else 9) for place in places[filter]]
                assert [example.position for example in examples] == (positions if layer != "9" else [()] * 4)


@pytest.mark.slow
def test_missing_entries_are_marked_if_there_are_too_few_images(tiny: Model, tmp_path: Path) -> None:
    result = fv.top_examples(tiny, "3", write_images(tmp_path, 2), count=5)
    layer = result.layers["3"]
    assert layer.scores.shape == (12, 5)
    assert (layer.pictures[:, 2:] == -1).all()
    assert (layer.positions[:, 2:] == -1).all()
    assert (layer.scores[:, 2:] == -torch.inf).all()
    assert (layer.boxes[:, 2:] == 0).all()
    assert len(result.of("3", 0)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_equal_scores_are_in_the_order_of_paths(tiny: Model, tmp_path: Path, batch_size: int) -> None:
    for name in ("d", "b", "c", "a"):
        write_images(tmp_path / name, 1)
    result = fv.top_examples(tiny, LAYERS, tmp_path, count=3, batch_size=batch_size)
    for layer, of_layer in result.layers.items():
        for filter in range(len(of_layer.scores)):
            assert [Path(e.path).parts[-3] for e in result.of(layer, filter)] == ["a", "b", "c"]


def test_box_is_the_receptive_field_in_the_upright_image(tmp_path: Path) -> None:
    """The box surrounds a bright dot in a wide image that is stored rotated."""
    module = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1, bias=False), nn.ReLU())
    module[0].weight.data[:] = 0.01  # type: ignore[union-attr, operator]
    module[0].weight.data[:, :, 1, 1] = 1.0  # type: ignore[union-attr, index]
    values = np.zeros((80, 200, 3), np.uint8)
    values[24:28, 128:132] = 255  # centred at (x, y) = (130, 26)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(values).transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    result = fv.top_examples(load_toy(module, size=20), "1", tmp_path)
    (example,) = result.of("1", 0)
    # A pixel of the input is 4 x 4 pixels of the image, whose crop starts at column 60.
    assert example.position == (6, 17)
    assert example.box == (60 + 16 * 4, 20.0, 60 + 19 * 4, 32.0)
    crop = np.asarray(result.crop(example, 12))
    assert crop.shape == (12, 12, 3)
    np.testing.assert_array_equal(crop, values[20:32, 124:136])
    assert result.crop(example).size == (112, 112)


@pytest.mark.slow
def test_boxes_of_global_layers_and_at_the_border(tiny: Model, tmp_path: Path) -> None:
    PIL.Image.fromarray(np.zeros((50, 80, 3), np.uint8)).save(tmp_path / "a.png")
    result = fv.top_examples(tiny, ["0", "9"], tmp_path)
    assert result.of("9", 2)[0].box == (15.0, 0.0, 65.0, 50.0)
    for filter in range(8):
        left, top, right, bottom = result.of("0", filter)[0].box
        assert (right - left, bottom - top) == (7.5, 7.5)
        assert left >= 15
        assert top >= 0


@pytest.mark.slow
def test_crops_read_each_file_once(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = fv.top_examples(tiny, LAYERS, write_images(tmp_path, 3), count=3)
    examples = [example for filter in range(6) for example in result.of("3", filter)]
    opened: list[Any] = []
    original = PIL.Image.open
    monkeypatch.setattr(PIL.Image, "open", lambda path: (opened.append(path), original(path))[1])
    crops = result.crops(examples, 24)
    assert len(crops) == 18
    assert len(opened) == 3
    for crop, example in zip(crops[:4], examples, strict=False):
        np.testing.assert_array_equal(np.asarray(crop), np.asarray(result.crop(example, 24)))


@pytest.mark.slow
def test_token_and_channels_last_layouts(tmp_path: Path) -> None:
    class Net(OneConv):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.tokens = nn.Linear(4, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.last(self.conv(x).movedim(1, -1))
            return self.tokens(torch.cat([x.mean((1, 2))[:, None], x.flatten(1, 2)], 1))

    result = fv.top_examples(load_toy(Net(), size=(8, 12)), ["conv", "last@hwc", "tokens"], write_images(tmp_path))
    shapes = {name: (tuple(layer.scores.shape), layer.positions.shape[2]) for name, layer in result.layers.items()}
    assert shapes == {"conv": ((4, 9), 2), "last": ((4, 9), 2), "tokens": ((5, 9), 1)}
    assert result.layers["last"].positions[..., 0].max() < 6
    assert result.layers["tokens"].positions.max() <= 60
    left, top, right, bottom = result.layers["tokens"].boxes.unbind(-1)
    torch.testing.assert_close((right - left) / (bottom - top), torch.full((5, 9), 1.5))
    left, top, right, bottom = result.layers["last"].boxes.unbind(-1)
    torch.testing.assert_close(right - left, bottom - top)


@pytest.mark.slow
def test_few_batches_of_images_are_in_memory(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, alive, peak = write_images(tmp_path, 80), weakref.WeakSet[Tensor](), 0
    original = reading.read_pixels

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal peak
        pixels, size = original(*args, **options)
        alive.add(pixels)
        peak = max(peak, len(alive))
        return pixels, size

    monkeypatch.setattr(reading, "read_pixels", counted)
    assert fv.top_examples(tiny, "0", folder, batch_size=4).seen == 80
    assert peak <= 12


@pytest.mark.slow
def test_unreadable_files_are_skipped_with_one_warning(tiny: Model, tmp_path: Path) -> None:
    folder = write_images(tmp_path, 6)
    expected = fv.top_examples(tiny, LAYERS, folder, count=3)
    for name in ("bad0", "bad1", "000", "zzz"):
        (folder / f"{name}.jpg").write_bytes(b"not an image")
    data = (folder / "001.png").read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    with pytest.warns(
        UserWarning, match=r"skipped 5 of 11 image files: .*000\.jpg cannot be read as an image"
    ) as warned:
        result = fv.top_examples(tiny, LAYERS, folder, count=3)
    assert len(warned) == 1
    assert str(warned[0].message).endswith("; and 2 more")
    assert (result.seen, result.skipped) == (6, 5)
    assert result.files == expected.files
    for layer in LAYERS:
        assert torch.equal(result.layers[layer].pictures, expected.layers[layer].pictures)


def test_images_with_nan_activations_are_not_kept(tmp_path: Path) -> None:
    class DivideByMean(OneConv):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(x).div(x.mean((1, 2, 3), keepdim=True)))

        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

    write_images(tmp_path, 3)
    PIL.Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "black.png")
    module = DivideByMean()
    module.conv.bias = None
    result = fv.top_examples(fv.load_model(module, size=8, mean=(0.0,) * 3, std=(1.0,) * 3), "relu", tmp_path)
    assert [len(result.of("relu", filter)) for filter in range(4)] == [3] * 4
    assert not any("black" in path for path in result.files)


def test_keep_best_over_batches_equals_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 12, (50, 7), generator=generator).float()  # with many ties
    top = Top(torch.full((7, 6), -torch.inf), torch.full((7, 6), -1), torch.full((7, 6), -1))
    for start in range(0, 50, 8):
        numbers = torch.arange(start, min(start + 8, 50))
        top = keep_best(top, scores[numbers], numbers[:, None].expand(-1, 7) * 10, numbers)
    order = scores.T.sort(dim=1, descending=True, stable=True)
    assert torch.equal(top.scores, order.values[:, :6])
    assert torch.equal(top.pictures, order.indices[:, :6])
    assert torch.equal(top.places, order.indices[:, :6] * 10)


@pytest.mark.slow
def test_save_and_load_round_trip(tiny: Model, tmp_path: Path) -> None:
    result = fv.top_examples(tiny, LAYERS, write_images(tmp_path / "in", 5), count=7)
    path = result.save(tmp_path / "new" / "examples.safetensors")
    loaded = fv.Examples.load(path)
    for layer in LAYERS:
        assert all(torch.equal(a, b) for a, b in zip(result.layers[layer], loaded.layers[layer], strict=True))
    assert (loaded.files, loaded.seen, loaded.skipped, loaded.key) == (result.files, 5, 0, result.key)
    assert list(loaded.layers) == list(result.layers)
    assert repr(loaded) == "Examples(25 filters of 3 layers, 7 of 5 images)"
    data = path.read_bytes()
    assert loaded.save(path).read_bytes() == data
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    for damaged in (data[:100], data[:-9], b"", b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"examples\.safetensors' cannot be read as examples"):
            fv.Examples.load(path)
    with pytest.raises(ValueError, match="cannot be read as examples"):
        fv.Examples.load(tmp_path / "nothing")


@pytest.mark.slow
def test_covers_compares_model_layers_files_and_count(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "in", 4)
    monkeypatch.chdir(folder)
    result = fv.Examples.load(fv.top_examples(tiny, LAYERS, folder, count=3).save(tmp_path / "saved"))

    def covers(model: Model = tiny, layers: Any = LAYERS, images: Any = folder, count: int = 3) -> bool:
        return result.covers(fv.examples_key(model, layers, images, count=count))

    assert covers()
    assert covers(layers="3")
    assert covers(layers=["9", "0"])
    assert covers(images=list(folder.rglob("*.png")))
    assert covers(images=[*folder.rglob("*.png"), "001.png"])
    assert not covers(layers=["0", "5"])
    assert not covers(layers="3@chw")
    assert not covers(count=4)
    assert not covers(model=tiny._replace(mean=(0.0, 0.0, 0.0)))
    assert not covers(images=list(folder.glob("*.png")))
    os.utime(folder / "001.png", ns=(1, 1))
    assert not covers()
    result = fv.top_examples(tiny, LAYERS, folder, count=3)
    assert covers()
    with torch.no_grad():
        next(tiny.module.parameters()).add_(1)
    assert not covers()


def test_top_examples_does_not_modify_the_model(tiny: Model, tmp_path: Path) -> None:
    tiny.module.train()
    before = {name: value.clone() for name, value in tiny.module.state_dict().items()}
    fv.top_examples(tiny, "0", write_images(tmp_path, 2))
    assert tiny.module.training
    assert all(torch.equal(value, before[name]) for name, value in tiny.module.state_dict().items())


@pytest.mark.slow
def test_layers_are_resolved_by_suffix(texturenet: Model, tmp_path: Path) -> None:
    result = fv.top_examples(texturenet, ["block1.conv", "1.conv", "head"], write_images(tmp_path, 2), count=1)
    assert list(result.layers) == ["block1.conv", "head"]
    assert result.of("conv", 3) == result.of("block1.conv", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": []}, "no layers were given"),
        ({"layers": "nowhere"}, "no layer 'nowhere'"),
        ({"layers": ["0", "0@chw"]}, "layer '0' is given with different axes: default and chw"),
        ({"images": "nowhere"}, "no folder 'nowhere'"),
        ({"images": []}, "no image files were given"),
        ({"images": None}, "expected a folder or image files, got None"),
        ({"images": ["a.png"]}, "none of 1 image files could be read; the first: "),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"precision": "half"}, "precision must be one of auto, float32, bfloat16, got 'half'"),
    ],
)
def test_invalid_arguments_raise(tiny: Model, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    given = {"layers": "0", "images": write_images(tmp_path, 1), **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        fv.top_examples(tiny, **given)


@pytest.mark.slow
def test_invalid_lookups_and_crops_raise(tiny: Model, tmp_path: Path) -> None:
    result = fv.top_examples(tiny, LAYERS, write_images(tmp_path, 2))
    with pytest.raises(ValueError, match="layer '0' has filters 0 to 7, got 8"):
        result.of("0", 8)
    with pytest.raises(ValueError, match="no examples of layer '5'; the layers are 0, 3, 9"):
        result.of("5", 0)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        result.crop(result.of("0", 0)[0], 0)
    example: Example = result.of("0", 0)[0]._replace(box=(0.0, 0.0, 500.0, 500.0))
    with pytest.raises(ValueError, match=r"which do not contain the box \(0\.0, 0\.0, 500\.0, 500\.0\)"):
        result.crop(example)


def test_positions_of_maps_with_any_number_of_axes(tiny: Model, tmp_path: Path) -> None:
    """A layer of a model of images may have maps ``(t, h, w)``: here two halves of the channels."""
    module = nn.Sequential(*tiny.module[:1], nn.Unflatten(1, (4, 2)))  # type: ignore[index]
    folder = write_images(tmp_path, 3)
    model = tiny._replace(module=module.eval())
    result = fv.top_examples(model, ["1@cthw"], folder, count=1)
    (mean, std) = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    for filter in range(4):
        (example,) = result.of("1", filter)
        assert len(example.position) == 3
        with torch.no_grad():
            maps = module((read_image(example.path, (20, 20))[None] - mean) / std)[0, filter]
        assert float(maps[example.position]) == pytest.approx(example.score, rel=1e-3, abs=1e-4)
        assert float(maps.max()) == pytest.approx(example.score, rel=1e-3, abs=1e-4)
