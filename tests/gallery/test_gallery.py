"""Tests of the gallery: its files, incremental builds, rejected input, and images that are reproduced from a record."""

import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import featvis_func as fv
from featvis_func.cli import main as cli
from featvis_func.gallery import Gallery, build_gallery, pages, site, source
from featvis_func.gallery.curve import convergence_step, curve
from featvis_func.gallery.images import activation_map, encode_image, snapshot_sheet
from featvis_func.gallery.manifest import MANIFEST_NAME
from featvis_func.gallery.pages import PAGE
from featvis_func.gallery.reproduce import reproduce
from featvis_func.rendering.result import read_result
from featvis_func.sweep.layout import open_folder
from featvis_func.sweep.shard import commit
from tests.sweep_toys import STEPS, Toy, fill, toy_result, toy_run
from tests.toys import load_toy


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Sweep of two layers with 5 and 4 filters, in units of 2."""
    fill(tmp_path / "store", toy_run(), Toy())
    return tmp_path / "store"


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def times_of(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def data_of(folder: Path) -> dict[str, Any]:
    """Return the data of a layer that the scripts read."""
    text = (folder / "data.js").read_text()
    return json.loads(text[text.index("] = ") + 4 : text.rindex(";")])


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def rebuild_unit(store: Path, index: int, *, noise: float) -> tuple[int, ...]:
    """Replace the images of one unit, as a retry on another machine does, and return its filters."""
    folder = open_folder(store)
    unit = folder.run.units[index]
    commit(folder, unit, toy_result(unit.layer, unit.filters, 7, noise=noise), [7] * len(unit.filters), seconds=0)
    return unit.filters


# --- building -------------------------------------------------------------------------------------------------------


def test_build_writes_the_page_and_images_of_every_filter(store: Path) -> None:
    gallery = build_gallery(store)
    assert gallery == Gallery(store / "gallery" / "index.html", 2, 9, 9, ())
    files = files_of(store / "gallery")
    for layer, count in (("block1.conv", 5), ("head", 4)):
        for n in range(count):
            names = (f"{n}.html", f"images/{n}.webp", f"thumbs/{n}.webp", f"maps/{n}.webp")
            assert {f"layers/{layer}/{name}" for name in names} <= files.keys()
    assert len(files) == 9 * 4 + 2 * 2 + 4 + len(pages.assets())  # pages, data; index, compare, site.js, manifest
    expected = toy_result("head", [2], 7).images[0]
    image = pixels(files["layers/head/images/2.webp"]) / 255
    assert abs(image.mean((0, 1)) - expected.mean((1, 2)).numpy()).max() < 0.02
    sizes = [pixels(files[f"layers/head/{kind}/2.webp"]).shape for kind in ("images", "maps")]
    assert sizes == [(8, 8, 3), (3, 3, 3)]


def test_layer_data_equals_the_results_in_the_store(store: Path) -> None:
    build_gallery(store)
    data = data_of(store / "gallery/layers/block1.conv")
    result = toy_result("block1.conv", range(5), 7)
    assert [row[0] for row in data["filters"]] == [0, 1, 2, 3, 4]
    torch.testing.assert_close(torch.tensor([row[1] for row in data["filters"]]), result.scores)
    assert [row[2] for row in data["filters"]] == result.best_step.tolist()
    assert [row[4] for row in data["filters"]] == ["ok", "ok", "ok", "dead", "ok"]
    assert data["size"] == [8, 8]
    assert data["map"] == [8, 8]
    assert data["video"] is None


def test_all_links_lead_to_existing_files(store: Path) -> None:
    run = toy_run({'x/y "z" <b>%41?#é.conv': 3, "head": 4})
    fill(store.parent / "odd", run, Toy())
    for folder in (store, store.parent / "odd"):
        site = build_gallery(folder).path.parent
        count = 0
        for page in site.rglob("*.html"):
            for link in re.findall(r'(?:href|src)="([^"]+)"', page.read_text()):
                if link.startswith(("#", "data:")):
                    continue
                assert "://" not in link
                target = (page.parent / unquote(link.partition("#")[0])).resolve()
                assert target.is_file(), (page, link)
                assert target.is_relative_to(site.resolve())
                count += 1
        assert count > 50


def test_layer_and_model_names_are_escaped(tmp_path: Path) -> None:
    name = """a"><script>alert(1)</script>'&{{ 7 * 7 }}.conv"""
    fill(tmp_path / "s", toy_run({name: 2}, model=name), Toy())
    site = build_gallery(tmp_path / "s").path.parent
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "<script>alert" not in text
        assert "49.conv" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in (site / "index.html").read_text()
    assert [p.name for p in (site / "layers").iterdir()] == [source.folder_of(name)]


@pytest.mark.slow
def test_layer_pages_have_at_most_500_filters(tmp_path: Path) -> None:
    fill(tmp_path / "s", toy_run({"wide": 1201}, unit_size=100), Toy(side=4))
    site = build_gallery(tmp_path / "s").path.parent
    counts = [
        (site / "layers/wide" / name).read_text().count("<img ")
        for name in ("index.html", "page-2.html", "page-3.html")
    ]
    assert counts == [PAGE, PAGE, 201]
    assert not (site / "layers/wide/page-4.html").exists()
    script = (Path(pages.__file__).parent / "assets/grid.js").read_text()
    assert f"const PAGE = {PAGE};" in script


def test_galleries_of_a_result_and_of_its_saved_folder_are_equal(tmp_path: Path) -> None:
    result = replace(toy_result("head", [4, 1], 7), config={"layer": "head", "model": "toy", "steps": STEPS})
    result.save(tmp_path / "saved")
    loaded = read_result(tmp_path / "saved")
    assert (loaded.filters, loaded.status, loaded.config) == (result.filters, result.status, result.config)
    for name in ("images", "activations", "scores", "best_step", "history", "steps"):
        torch.testing.assert_close(getattr(loaded, name), getattr(result, name), rtol=0, atol=0, equal_nan=True)
    for store, out in ((result, tmp_path / "a"), (tmp_path / "saved", None)):
        assert build_gallery(store, out).filters == 2
    first, second = files_of(tmp_path / "a"), files_of(tmp_path / "saved/gallery")
    assert first == second
    assert [row[0] for row in data_of(tmp_path / "a/layers/head")["filters"]] == [1, 4]
    with pytest.raises(ValueError, match="the gallery of a Result needs a folder: pass out="):
        build_gallery(result)


def test_snapshots_become_a_sheet_and_an_animation(tmp_path: Path) -> None:
    frames = torch.stack([torch.full((3, 6, 10), v, dtype=torch.uint8) for v in (0, 100, 250)])
    result = replace(
        toy_result("head", [1], 7),
        snapshots=frames[None],
        config={"layer": "head", "model": "toy", "steps": 8, "snapshots": 3},
    )
    for kind in ("gif", "webp"):
        site = build_gallery(result, tmp_path / "site", moving=kind).path.parent
        files = files_of(site / "layers/head/films")
        assert files.keys() == {"1.webp", f"1-moving.{kind}"}
        sheet = pixels(files["1.webp"])
        assert sheet.shape == (6, 30, 3)
        assert abs(sheet[:, [5, 15, 25]].mean((0, 2)) - [0, 100, 250]).max() < 3
        animation: Any = PIL.Image.open(io.BytesIO(files[f"1-moving.{kind}"]))
        assert animation.n_frames == 3
        assert 'data-steps="0 4 8"' in (site / "layers/head/1.html").read_text()
    with pytest.raises(ValueError, match="unknown moving 'mp4'; expected one of"):
        build_gallery(result, tmp_path / "site", moving="mp4")


# --- incremental rebuilds -------------------------------------------------------------------------------------------


def test_rebuild_without_changes_writes_only_the_manifest(store: Path) -> None:
    build_gallery(store)
    before = times_of(store / "gallery")
    assert build_gallery(store).made == 0
    after = times_of(store / "gallery")
    assert {name for name in before if before[name] != after[name]} <= {MANIFEST_NAME}


def test_rebuild_writes_only_files_of_changed_filters(store: Path) -> None:
    build_gallery(store)
    before = files_of(store / "gallery")
    assert rebuild_unit(store, 0, noise=0.3) == (0, 1)
    assert build_gallery(store).made == 2
    after = files_of(store / "gallery")
    changed = {name for name in before if before[name] != after[name]} - {MANIFEST_NAME}
    layer = "layers/block1.conv/"
    own = {f"{layer}{part}" for n in (0, 1) for part in (f"{n}.html", f"images/{n}.webp", f"thumbs/{n}.webp")}
    # The activation maps and the score histories are unchanged.
    assert own <= changed <= own | {f"{layer}data.js", f"{layer}index.html"}


def test_rebuild_adds_filters_of_a_resumed_sweep(store: Path, tmp_path: Path) -> None:
    folder = open_folder(store)
    hidden = [folder.sidecar(folder.run.units[i]) for i in (1, 3)]
    kept = [path.read_bytes() for path in hidden]
    for path in hidden:
        path.unlink()
    partial = build_gallery(store, tmp_path / "site")
    assert (partial.filters, partial.made, partial.problems) == (5, 5, ())
    text = (tmp_path / "site/layers/block1.conv/1.html").read_text()
    assert 'href="4.html" rel="next"' in text
    assert "3 of 5 filters" in (tmp_path / "site/index.html").read_text()
    for path, data in zip(hidden, kept, strict=True):
        path.write_bytes(data)
    complete = build_gallery(store, tmp_path / "site")
    assert complete.filters == 9
    assert complete.made == 4 + 5  # 4 new filters, and 5 whose links to their neighbours have changed
    fresh = build_gallery(store, tmp_path / "fresh").path.parent
    assert files_of(tmp_path / "site") == files_of(fresh)


def test_rebuild_removes_files_of_missing_filters_and_layers(tmp_path: Path) -> None:
    def result(layer: str, filters: list[int]) -> fv.Result:
        return replace(toy_result(layer, filters, 7), config={"layer": layer, "model": "toy"})

    build_gallery(result("a", [1, 2, 3]), tmp_path / "site")
    build_gallery(result("a", [2]), tmp_path / "site")
    assert {name for name in files_of(tmp_path / "site/layers") if re.search(r"/[13]\.", name)} == set()
    build_gallery(result("b", [5]), tmp_path / "site")
    assert [p.name for p in (tmp_path / "site/layers").iterdir()] == ["b"]
    build_gallery(result("b", [5]), tmp_path / "fresh")
    assert files_of(tmp_path / "site") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["missing", "empty", "manifest", "program"])
def test_rebuild_repairs_a_damaged_gallery(store: Path, damage: str) -> None:
    site = store / "gallery"
    build_gallery(store)
    expected = files_of(site)
    if damage == "missing":
        (site / "layers/head/images/1.webp").unlink()
    elif damage == "empty":
        (site / "layers/head/1.html").write_bytes(b"")
    elif damage == "manifest":
        (site / MANIFEST_NAME).write_text('{"program": 3, "par')
    else:  # built by an older version
        value = json.loads((site / MANIFEST_NAME).read_text())
        (site / MANIFEST_NAME).write_text(json.dumps({**value, "program": "older"}))
        (site / "layers/head/1.html").write_text("old")
    assert build_gallery(store).made == {"missing": 2, "empty": 2, "manifest": 9, "program": 9}[damage]
    assert files_of(site) == expected


def test_rebuild_after_an_interruption_keeps_the_finished_parts(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = site.make_filter_files, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(site, "_MANIFEST_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(site, "make_filter_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_gallery(store)
    monkeypatch.setattr(site, "make_filter_files", real)
    assert build_gallery(store).made == 4
    assert not list((store / "gallery").rglob("*.tmp"))
    fresh = build_gallery(store, store.parent / "fresh").path.parent
    assert files_of(store / "gallery") == files_of(fresh)


# --- damaged and rejected input -------------------------------------------------------------------------------------


def test_damaged_units_are_left_out_and_reported(store: Path) -> None:
    folder = open_folder(store)
    shards = sorted((store / "units/block1.conv").glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    # The second unit keeps its size and time, so that its damage shows only when its tensors are read.
    data = bytearray(shards[1].read_bytes())
    data[:8] = b"\xff" * 8
    state = shards[1].stat()
    shards[1].write_bytes(data)
    os.utime(shards[1], ns=(state.st_atime_ns, state.st_mtime_ns))
    gallery = build_gallery(store)
    assert gallery.filters == 5
    assert [problem.partition(":")[0] for problem in gallery.problems] == [unit.name for unit in folder.run.units[:2]]
    assert "bytes instead of" in gallery.problems[0]
    assert "cannot be read" in gallery.problems[1]
    text = (store / "gallery/index.html").read_text()
    assert "2 parts left out" in text
    assert "block1.conv/00000-00001" in text
    assert "1 of 5 filters" in text
    assert cli.main(["gallery", str(store)]) == 0


def test_folder_with_other_files_is_rejected_and_unchanged(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="is not empty and is not a gallery"):
        build_gallery(store, other)
    assert files_of(other) == {"thesis.tex": b"years"}
    with pytest.raises(ValueError, match="is a file; a gallery needs a folder"):
        build_gallery(store, other / "thesis.tex")


@pytest.mark.parametrize("given", [3, None, "nowhere"])
def test_build_rejects_values_that_are_not_a_store(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a sweep's store|is not the folder of a sweep"):
        build_gallery(given, tmp_path / "site")
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("place", ["mine", "units/mine", "events"])
def test_build_rejects_other_folders_inside_a_sweep(store: Path, place: str) -> None:
    before = files_of(store)
    with pytest.raises(ValueError, match="is inside the sweep's folder, where the gallery must be"):
        build_gallery(store, store / place)
    assert files_of(store) == before
    assert build_gallery(store, store / "gallery" / "mine").filters == 9


def test_snapshots_of_a_result_without_a_config(tmp_path: Path) -> None:
    frames = torch.zeros(1, 3, 3, 8, 8, dtype=torch.uint8)
    gallery = build_gallery(replace(toy_result("0", [1], 7), snapshots=frames), tmp_path / "site")
    assert 'data-steps="0 2 5"' in (gallery.path.parent / "layers/layer/1.html").read_text()


def test_full_disk_is_reported(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.parent.name == "images":
            raise OSError(28, "No space left on device", str(path))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cli.main(["gallery", str(store)]) == 2
    assert "cannot write the gallery" in (error := capsys.readouterr().err)
    assert "No space left on device" in error
    assert not list((store / "gallery").rglob("*.tmp"))


# --- photographs ----------------------------------------------------------------------------------------------------


def red_and_blue() -> nn.Module:
    """Convolution with one filter that is the red channel and one that is the blue channel."""
    conv = nn.Conv2d(3, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])[:, :, None, None])
    return nn.Sequential(conv).eval()


def test_filter_pages_show_the_photographs_with_the_highest_scores(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featvis_func.gallery import top_examples as module
    from featvis_func.sweep import sweep

    model = load_toy(red_and_blue(), size=12)
    sweep(model, "0", out=tmp_path / "store", steps=2)
    gallery = build_gallery(tmp_path / "store", images=photographs, model=model)
    site = gallery.path.parent
    for n, brightest in ((0, 11), (1, 0)):
        text = (site / f"layers/0/{n}.html").read_text()
        order = re.findall(r"image-(\d+)\.png", text.partition("<ol>")[2])
        assert order == [f"{abs(brightest - i):02d}" for i in range(9)]
        crops = pixels((site / f"layers/0/examples/{n}.webp").read_bytes())
        assert crops.shape == (344, 344, 3)
        first = [crops[56, 56 + 116 * i] for i in range(3)]
        for i, colour in enumerate(first):
            assert abs(colour - [20 * abs(brightest - i), 10, 255 - 20 * abs(brightest - i)]).max() < 8

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("searched again")

    monkeypatch.setattr(module, "top_examples", never)
    assert build_gallery(tmp_path / "store", images=photographs, model=model).made == 0
    assert build_gallery(tmp_path / "store").made == 2  # pages without photographs differ
    assert not (site / "layers/0/examples").exists()
    PIL.Image.new("RGB", (20, 16)).save(photographs / "new.png")
    with pytest.raises(AssertionError, match="searched again"):
        build_gallery(tmp_path / "store", images=photographs, model=model)


@pytest.mark.slow
def test_photographs_with_another_model_are_rejected(photographs: Path, tmp_path: Path) -> None:
    from featvis_func.sweep import sweep

    sweep("texturenet", "head", [1], out=tmp_path / "store", steps=1, size=16)
    other = load_toy(red_and_blue(), size=12)
    with pytest.raises(ValueError, match="is not the model that was rendered"):
        build_gallery(tmp_path / "store", images=photographs, model=other)
    assert not (tmp_path / "store/gallery").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli.main(["gallery", str(tmp_path / "store"), "--images", str(empty), "--device", "cpu"]) == 2
    assert cli.main(["gallery", str(tmp_path / "store"), "--device", "cpu"]) == 2
    assert not (tmp_path / "store/gallery").exists()
    assert cli.main(["gallery", str(tmp_path / "store"), "--images", str(photographs), "--device", "cpu"]) == 0
    assert (tmp_path / "store/gallery/layers/head/examples/1.webp").exists()


def test_code_that_a_folder_names_is_not_imported(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders are passed on; a model made by code is imported only where the user names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "named_by_a_folder.py").write_text("raise SystemExit('imported')")
    config = {"layer": "0", "model": "named_by_a_folder:make"}
    result = replace(toy_result("0", [1], 7), config=config)
    with pytest.raises(ValueError, match=r"the model named_by_a_folder:make is made by code, .* \(--model named"):
        build_gallery(result, tmp_path / "site", images=photographs)
    result.save(tmp_path / "saved")
    command = ["gallery", "saved", "--images", str(photographs), "--device", "cpu"]
    for given in ([], ["--mean", "0,0,0"]):
        assert cli.main([*command, *given]) == 2
        assert "is made by code" in capsys.readouterr().err
    assert cli.main([*command, "--model", "named_by_a_folder:make"]) == 2
    assert "importing named_by_a_folder raises SystemExit: imported" in capsys.readouterr().err


def test_missing_photographs_leave_no_files_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = replace(toy_result("0", [1], 7), config={"layer": "0"})
    model = load_toy(red_and_blue(), size=12)
    for place in ("one/two", "empty"):
        with pytest.raises(ValueError, match="no folder 'nowhere'"):
            build_gallery(result, tmp_path / place, images="nowhere", model=model)
    assert not (tmp_path / "one").exists()
    assert not list((tmp_path / "empty").iterdir())


class ChannelsLast(nn.Module):
    """Model whose layer ``permuted`` has channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 1)
        self.permuted = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.permuted(self.first(x).movedim(1, -1)).sum((1, 2))


@pytest.mark.slow
def test_photographs_and_reproduction_of_a_layer_with_explicit_axes(photographs: Path, tmp_path: Path) -> None:
    from featvis_func.sweep import sweep

    model = load_toy(ChannelsLast().eval(), size=12)
    sweep(model, ["permuted@hwc"], out=tmp_path / "store", steps=2)
    result = fv.render(model, "permuted@hwc", [0, 1], steps=2)
    for given, place in ((tmp_path / "store", tmp_path / "a"), (result, tmp_path / "b")):
        folder = build_gallery(given, place, images=photographs, model=model).path.parent / "layers/permuted@hwc"
        assert (folder / "examples/1.webp").exists()
        assert "fv.channel(&#39;permuted@hwc&#39;), 1," in (folder / "1.html").read_text()


@pytest.mark.slow
def test_photographs_with_other_weights_are_rejected(photographs: Path, tmp_path: Path) -> None:
    module = fv.load_model("texturenet").module
    files = [tmp_path / "one.pt", tmp_path / "two.pt"]
    for file in files:
        torch.save(module.state_dict(), file)
        with torch.no_grad():
            module.get_parameter("head.bias").add_(1)
    first, second = (fv.load_model("texturenet", weights=file) for file in files)
    result = fv.render(first, "head", [1], steps=1, size=16)
    for other in (second, "texturenet"):
        with pytest.raises(ValueError, match="texturenet is not the model that was rendered"):
            build_gallery(result, tmp_path / "site", images=photographs, model=other)
    for same in (first, first.module):
        assert build_gallery(result, tmp_path / "site", images=photographs, model=same).filters == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux allows file names that are not valid text")
def test_photographs_whose_file_names_are_not_valid_text(photographs: Path, tmp_path: Path) -> None:
    (photographs / "image-00.png").rename(photographs / os.fsdecode(b"\xfcber.png"))
    model = load_toy(red_and_blue(), size=12)
    result = fv.render(model, "0", [1], steps=1)
    for expected in (1, 0):
        gallery = build_gallery(result, tmp_path / "site", images=photographs, model=model)
        assert gallery.made == expected
    assert "<li>?ber.png, " in (gallery.path.parent / "layers/0/1.html").read_text()


def test_photographs_without_a_loadable_model_are_rejected(photographs: Path, tmp_path: Path) -> None:
    result = replace(toy_result("0", [1], 7), config={"layer": "0", "model": "Sequential"})
    with pytest.raises(ValueError, match=r"needs the model; give it \(unknown model 'Sequential'"):
        build_gallery(result, tmp_path / "site", images=photographs)
    from_file = replace(result, config={**result.config, "weights": f"mine.pth sha256:{'0' * 64}"})
    with pytest.raises(ValueError, match=r"rendered with the weights file 'mine\.pth', which does not exist"):
        build_gallery(from_file, tmp_path / "site", images=photographs)
    assert not (tmp_path / "site").exists()


# --- reproduction ------------------------------------------------------------------------------------------------

OPTIONS = ["--steps", "3", "--size", "24x20", "--seed", "5", "--views", "lucid", "--optimizer", "adam", "--lr", "0.1"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:images of 24 x 20 are stretched:UserWarning")
@pytest.mark.parametrize("options", [[], OPTIONS, ["--image", "pixel", "--redirect", "2", "--snapshots", "2"]])
def test_reproduction_reproduces_a_rendered_image(options: list[str], tmp_path: Path) -> None:
    given = ["--steps", "2", "--device", "cpu", *options]
    command = ["render", "texturenet", "--layer", "head", "--filters", "3,5", "--out", str(tmp_path / "first"), *given]
    assert cli.main([*command, "--no-gallery"]) == 0
    first = read_result(tmp_path / "first")
    reproduced = reproduce(first.config, "head", 5, 5 if "--seed" in options else 0)
    assert reproduced.command is not None
    words = shlex.split(reproduced.command)
    assert words[:2] == ["featvis", "render"]
    assert cli.main([*words[1:], "--out", str(tmp_path / "again")]) == 0
    names: dict[str, Any] = {}
    exec(reproduced.call, names)
    for other in (read_result(tmp_path / "again"), names["result"]):
        assert other.filters == (5,)
        torch.testing.assert_close(other.images[0], first.images[1], rtol=0, atol=1e-4)
    assert (tmp_path / "again/gallery/layers/head/5.html").exists()
    assert not (tmp_path / "first/gallery").exists()


@pytest.mark.slow
def test_reproduction_reproduces_an_image_of_a_sweep(tmp_path: Path) -> None:
    from featvis_func.sweep import open_store, sweep

    sweep("texturenet", "head", [3, 5], out=tmp_path, steps=2, size=32, seed=4, image_dtype="float16")
    entry = open_store(tmp_path)["head", 5]
    reproduced = reproduce(open_store(tmp_path).config, "head", 5, entry.seed)
    assert reproduced.command == "featvis render texturenet --layer head --filters 5 --steps 2 --size 32x32 --seed 4"
    names: dict[str, Any] = {}
    exec(reproduced.call, names)
    torch.testing.assert_close(names["result"].images[0], entry.image, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_reproduction_of_a_custom_module_and_objective_is_python_only(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).eval()
    model = fv.load_model(module, size=12, mean=[0.5], std=[0.5])
    objective = fv.channel("1") - 0.5 * fv.objective.diversity("1")
    result = fv.render(model, objective, [0, 2], steps=2)
    reproduced = reproduce(result.config, "1", 2, 0, filters=result.filters)
    assert reproduced.command is None
    names: dict[str, Any] = {"module": module}
    exec(reproduced.call, names)
    torch.testing.assert_close(names["result"].images, result.images, rtol=0, atol=1e-5)
    assert "your Sequential" in reproduced.call
    site = build_gallery(result, tmp_path).path.parent
    assert "featvis render" not in (site / "layers/1/2.html").read_text()


# --- images and curves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"), [((3, 4), (3, 4)), ((9,), (3, 3)), ((10,), (3, 3)), ((7,), (1, 7)), ((2,), (1, 2))]
)
def test_activation_map_arranges_values_in_rows_and_columns(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    values = torch.arange(float(math.prod(shape))).reshape(shape)
    drawn = activation_map(values)
    assert drawn is not None
    assert drawn.shape == expected
    brightness = pixels(drawn.data).sum(-1)
    assert brightness.shape == expected
    assert (np.diff(brightness.reshape(-1)) > 0).all()
    assert drawn.high == f"{values.max():.4g}"


@pytest.mark.parametrize("values", [torch.tensor(3.0), torch.tensor([3.0])])
def test_activation_map_is_none_without_spatial_positions(values: torch.Tensor) -> None:
    assert activation_map(values) is None


@pytest.mark.parametrize("values", [torch.zeros(2, 2), torch.full((2, 2), math.nan), torch.full((2, 2), -math.inf)])
def test_activation_map_of_constant_or_nonfinite_values_has_the_lowest_colour(values: torch.Tensor) -> None:
    drawn = activation_map(values)
    assert drawn is not None
    assert (pixels(drawn.data) == [13, 8, 45]).all()


@pytest.mark.parametrize(("channels", "shape"), [(1, (5, 9)), (2, (5, 18)), (3, (5, 9)), (4, (5, 9))])
def test_encode_image_accepts_any_number_of_channels(channels: int, shape: tuple[int, int]) -> None:
    image = encode_image(torch.rand(channels, 5, 9))
    assert pixels(image.full).shape[:2] == shape
    assert image.size == shape[::-1]


def test_encode_image_limits_thumbnails_to_128_pixels() -> None:
    image = encode_image(torch.rand(3, 300, 400))
    assert (image.size, image.thumb_size) == ((400, 300), (128, 96))
    assert PIL.Image.open(io.BytesIO(image.thumb)).size == (128, 96)


def test_snapshot_sheet_of_wide_images_has_several_rows() -> None:
    frames = torch.zeros(3, 1, 2, 7000, dtype=torch.uint8)
    frames[2] = 255
    sheet = snapshot_sheet(frames)
    assert (sheet.columns, sheet.rows, sheet.frames, sheet.size) == (2, 2, 3, (2, 7000))
    values = pixels(sheet.data)
    assert values.shape == (4, 14000, 3)
    assert values[3, 100].mean() > 250
    assert values[:2].mean() < 5


def test_curve_leaves_gaps_at_nonfinite_scores() -> None:
    line = curve(torch.tensor([0.0, 1.0, math.nan, 2.0, 4.0, math.nan]))
    assert line is not None
    assert line.path == "M0 120L80 90M240 60L320 0"
    assert (line.best, line.low, line.high, line.steps) == ((320.0, 0.0), 0.0, 4.0, 5)
    assert curve(torch.tensor([1.0, math.nan])) is None
    flat = curve(torch.ones(3))
    assert flat is not None
    assert flat.path == "M0 60L160 60L320 60"


@pytest.mark.parametrize(
    ("history", "step"),
    [([1.0, 2.0, 3.0], 2), ([3.0, 2.0, 1.0], 0), ([math.nan, 0.0, 9.0, 10.0], 3), ([math.nan], -1), ([5.0, 5.0], 0)],
)
def test_convergence_step_covers_95_percent_of_the_score_range(history: list[float], step: int) -> None:
    assert convergence_step(torch.tensor(history)) == step


# --- the command line -----------------------------------------------------------------------------------------------


def test_gallery_command(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site"
    assert cli.main(["gallery", str(store), "--out", str(site)]) == 0
    assert capsys.readouterr().out == f"9 filters of 2 layers, 9 of them made now: {site / 'index.html'}\n"
    assert cli.main(["validate", str(store)]) == 0
    assert cli.main(["gallery", str(store)]) == 0
    assert cli.main(["validate", str(store)]) == 0  # the sweep's folder may contain a gallery
    toy_result("head", [1], 7).save(tmp_path / "one")
    capsys.readouterr()
    assert cli.main(["gallery", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out.startswith("1 filters of 1 layer, 1 of them made now: ")
    assert cli.main(["gallery", str(tmp_path / "nowhere")]) == 2
    assert "is not the folder of a sweep" in capsys.readouterr().err


def test_render_command_rejects_an_occupied_gallery_folder_before_rendering(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery/mine.txt").write_text("x")
    assert cli.main(["render", "--steps", "1", "--filters", "0", "--size", "16", "--out", str(tmp_path)]) == 2
    assert "is not empty and is not a gallery" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["gallery"]


@pytest.mark.slow
def test_templates_and_assets_are_package_data() -> None:
    code = "import featvis_func.gallery.pages as p; print(*sorted(p.assets()), p.compare_page('m')[:15])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    scripts = ("compare", "filter", "filters", "grid", "main", "model", "pins", "state", "thumbs", "tools", "video")
    names = sorted(["gallery.css", *(f"{name}.js" for name in scripts)])
    assert done.stdout.strip() == f"{' '.join(names)} <!doctype html>"
