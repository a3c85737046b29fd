"""Photographs of families of objectives in a gallery."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import featvis_func as fv
from featvis_func import objective as ob
from featvis_func.dataset import Examples
from featvis_func.gallery import build_gallery, top_examples
from featvis_func.gallery.build import Gallery
from featvis_func.models import Model
from featvis_func.objective import Objective
from featvis_func.sweep import sweep
from tests.toys import load_toy

STEPS: dict[str, Any] = {"steps": 2, "size": 12}


@pytest.fixture
def model() -> Model:
    """A convolution with three filters: the red, the green and the blue channel."""
    conv = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(3)[:, :, None, None])
    return load_toy(nn.Sequential(conv).eval(), size=12)


def own() -> Objective:
    return ob.family("own", "0", {"w": torch.eye(3)}, lambda a, row: (a["0"].mean((1, 2)) * row["w"]).sum())


def order_of(gallery: Gallery, folder: str, number: int) -> list[int]:
    """The numbers of the photographs on a filter's page."""

    text = (gallery.path.parent / f"layers/{folder}/{number}.html").read_text()
    return [int(match) for match in re.findall(r"image-(\d+)\.png", text.partition("<ol>")[2])]


def never(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("searched again")


RED_BLUE = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0]])


def test_pages_of_members_show_the_photographs_of_their_own_score(
    model: Model, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = {
        "rows": ob.directions("0", RED_BLUE),
        "away": -ob.directions("0", RED_BLUE, names=["red", "blue", "both"]),
        "three": ob.facets(ob.directions("0", RED_BLUE), 2),
        "neurons": ob.neurons("0", [0, 2], [(1, 2)]),
        "own": own(),
    }
    sweep(model, {"0": "0", **families}, out=tmp_path / "store", **STEPS)
    gallery = build_gallery(tmp_path / "store", images=photographs, model=model)
    red, blue = list(range(11, 2, -1)), list(range(9))
    assert [order_of(gallery, "0", n) for n in (0, 2)] == [red, blue]
    assert [order_of(gallery, "rows", n) for n in (0, 1)] == [red, blue]
    assert [order_of(gallery, "away", n) for n in (0, 1)] == [blue, red]
    assert [order_of(gallery, "three", n) for n in range(4)] == [red, red, blue, blue]
    assert [order_of(gallery, "neurons", n) for n in (0, 1)] == [red, blue]
    assert order_of(gallery, "own", 0) == []
    assert gallery.problems == (
        "the photographs of own: the objective depends on your own objective 'own', which is not recorded",
    )
    monkeypatch.setattr(top_examples, "top_examples", never)
    again = build_gallery(tmp_path / "store", images=photographs, model=model)
    assert (again.made, again.problems) == (0, gallery.problems)


def test_only_members_that_were_rendered_are_searched(model: Model, photographs: Path, tmp_path: Path) -> None:
    sweep(model, ob.directions("0", RED_BLUE), [1], out=tmp_path / "store", **STEPS)
    gallery = build_gallery(tmp_path / "store", images=photographs, model=model)
    examples = Examples.load(gallery.path.parent / "examples.safetensors")
    assert [len(layer.scores) for layer in examples.layers.values()] == [1]
    assert order_of(gallery, "directions%3A0", 1) == list(range(9))


def test_a_damaged_family_leaves_its_photographs_out(model: Model, photographs: Path, tmp_path: Path) -> None:
    sweep(model, ["0", ob.directions("0", RED_BLUE)], out=tmp_path / "store", **STEPS)
    (file,) = (tmp_path / "store/members").iterdir()
    file.write_bytes(b"")
    gallery = build_gallery(tmp_path / "store", images=photographs, model=model)
    assert order_of(gallery, "0", 0)[0] == 11
    assert any(
        "the photographs of directions:0: " in problem and "run the sweep again" in problem
        for problem in gallery.problems
    )


@pytest.mark.parametrize("saved", [False, True], ids=["live", "saved"])
@pytest.mark.slow
def test_photographs_of_a_result_of_a_family(model: Model, photographs: Path, tmp_path: Path, saved: bool) -> None:
    def gallery_of(objective: str | Objective, filters: Any) -> Gallery:
        result = fv.render(model, objective, filters, **STEPS)
        name = str(len(list(tmp_path.iterdir())))
        if not saved:
            return build_gallery(result, tmp_path / name, images=photographs, model=model)
        result.save(tmp_path / name)
        return build_gallery(tmp_path / name, images=photographs, model=model)

    red, blue = list(range(11, 2, -1)), list(range(9))
    neurons = gallery_of(ob.neurons("0", [0, 2], [(1, 2)]), [1])
    assert (order_of(neurons, "neuron%3A0", 1), neurons.problems) == (blue, ())
    away = gallery_of(-ob.channel("0"), [2])
    assert (order_of(away, "0", 2), away.problems) == (red, ())
    fixed = gallery_of(ob.channel("0", 2) + ob.diversity("0"), [0, 1])
    assert ([order_of(fixed, "0", n) for n in (0, 1)], fixed.problems) == ([blue, blue], ())
    rows = gallery_of(ob.directions("0", RED_BLUE), [0])
    assert order_of(rows, "directions%3A0", 0) == []
    assert rows.problems == (
        "the photographs of directions:0: the objective depends on a tensor (3, 3) of torch.float32, which is not"
        " recorded",
    )
    assert "your own objective 'own', which is not recorded" in gallery_of(own(), [0]).problems[0]


def test_a_result_of_an_earlier_version_is_one_of_channels(model: Model, photographs: Path, tmp_path: Path) -> None:
    result = fv.render(model, "0", [2], **STEPS)
    config = {name: value for name, value in result.config.items() if name != "objective_code"}
    gallery = build_gallery(replace(result, config=config), tmp_path / "site", images=photographs, model=model)
    assert order_of(gallery, "0", 2) == list(range(9))


def test_crops_are_regions_of_the_photographs(tmp_path: Path) -> None:
    """A direction whose map is largest at a bright dot shows the dot."""
    conv = nn.Conv2d(3, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.fill_(0.01)
        conv.weight[0, :, 1, 1] = 1.0
    model = load_toy(nn.Sequential(conv).eval(), size=20)
    values = np.zeros((80, 80, 3), np.uint8)
    values[24:28, 48:52] = 255
    (tmp_path / "in").mkdir()
    PIL.Image.fromarray(values).save(tmp_path / "in" / "a.png")
    sweep(model, ob.directions("0", [[1.0, 0.5]]), out=tmp_path / "store", **STEPS)
    gallery = build_gallery(tmp_path / "store", images=tmp_path / "in", model=model)
    (example,) = Examples.load(gallery.path.parent / "examples.safetensors").of("directions:0", 0)
    assert example.position == (6, 12)
    assert example.box == (44.0, 20.0, 56.0, 32.0)
