"""The input size of modules that do not state it, and images of another aspect ratio than the model's input."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import featvis_func as fv
from featvis_func import transform as t
from featvis_func.models import Model
from featvis_func.rendering.input_size import image_size, with_input_size
from featvis_func.sweep import dry_run, open_store, sweep
from tests.toys import TINY_SIZE, load_toy

pytestmark = [pytest.mark.usefixtures("cached_tracing", "one_thread")]


def unknown(model: Model) -> Model:
    """The model as it is loaded from a module whose input size is not known."""
    return model._replace(assumed=("size",))


@pytest.fixture
def bare(tiny: Model) -> Model:
    return unknown(tiny)


# --- sizes of as many sides as the model's input --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input_size", "size", "expected"),
    [
        ((20, 30), None, (20, 30)),
        ((20, 30), 8, (8, 8)),
        ((20, 30), (8, 9), (8, 9)),
        ((4, 20, 30), None, (4, 20, 30)),
        ((4, 20, 30), 8, (4, 8, 8)),
        ((4, 20, 30), (8, 9), (4, 8, 9)),
        ((4, 20, 30), (2, 8, 9), (2, 8, 9)),
        ((50,), None, (50,)),
        ((50,), 8, (8,)),
        ((50,), (8,), (8,)),
    ],
)
def test_size_of_the_images(
    tiny: Model, input_size: tuple[int, ...], size: int | tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    assert image_size(size, tiny._replace(size=input_size)) == expected


@pytest.mark.parametrize("text", ["8", "8x9", "2x8x9"])
def test_size_on_the_command_line_is_that_of_python(text: str, video_model: Model) -> None:
    from featvis_func.rendering.options import RenderOptions, parse_size

    size = RenderOptions(size=parse_size(text)).size
    assert image_size(size, video_model) == {"8": (6, 8, 8), "8x9": (6, 8, 9), "2x8x9": (2, 8, 9)}[text]


@pytest.mark.parametrize("text", ["", "x", "8x", "x8", "8x9x", "1x2x3x4", "8.5", "-8", "8*9", "axb"])
def test_what_is_no_size_on_the_command_line_is_refused(text: str) -> None:
    from featvis_func.rendering.options import parse_size

    with pytest.raises(ValueError, match=re.escape(f"{text!r} is not a size; expected N or HxW pixels, or TxHxW with")):
        parse_size(text)


# --- an input size that is not known --------------------------------------------------------------------------------

NOT_KNOWN = "the input size of Sequential is not known: 20 x 20 was assumed; state it by size=, here or of load_model"


@pytest.mark.slow
@pytest.mark.parametrize("size", [12, (12, 17)])
def test_size_states_an_input_size_that_is_not_known(bare: Model, size: int | tuple[int, int]) -> None:
    stated = bare._replace(size=(12, 12) if size == 12 else (12, 17), assumed=())
    expected = fv.render(stated, "5", [0, 1], steps=2)
    result = fv.render(bare, "5", [0, 1], steps=2, size=size)
    assert torch.equal(result.images, expected.images)
    assert result.config["input_size"] == result.config["size"] == [*stated.size]
    assert result.activations.shape == expected.activations.shape


CALLS: dict[str, Callable[[Model, Path], Any]] = {
    "render": lambda model, out: fv.render(model, "5", [0], steps=1),
    "make_renderer": lambda model, out: fv.make_renderer(model, "5", [0, 1], steps=1)([0]),
    "sweep": lambda model, out: sweep(model, ["3", "5"], [0, 1], out=out, steps=1, unit_size=1, progress=False),
    "dry_run": lambda model, out: dry_run(model, ["3", "5"], [0, 1], steps=1),
    "accentuate": lambda model, out: fv.accentuate(model, "5:0", torch.rand(3, 20, 20), near="0", steps=1),
    "activations_of": lambda model, out: fv.activations_of(model, ["5"], torch.rand(3, 20, 20)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_assumed_input_size_is_warned_of_once(bare: Model, tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[name](bare, tmp_path)
    assert [str(warning.message) for warning in caught] == [NOT_KNOWN]
    assert caught[0].filename == __file__  # the line of the call


@pytest.mark.parametrize("name", CALLS)
def test_known_input_size_is_not_warned_of(tiny: Model, tmp_path: Path, name: str) -> None:
    CALLS[name](tiny, tmp_path)


@pytest.mark.slow
def test_size_states_the_input_size_wherever_it_is_given(bare: Model, tmp_path: Path) -> None:
    assert fv.make_renderer(bare, "5", [0], steps=1, size=12).config["input_size"] == [12, 12]
    assert sweep(bare, "5", [0], out=tmp_path, steps=1, size=12, progress=False).complete
    config = open_store(tmp_path).config
    assert (config["input_size"], config["render"]["size"]) == ([12, 12], [12, 12])
    assert dry_run(bare, "5", [0], steps=1, size=12).plans[0].shape == (6, 3, 3)
    picture = torch.rand(3, 15, 15)
    accentuated = fv.accentuate(bare, "5:0", picture, near="0", steps=1, size=12)
    assert (accentuated.images.shape[2:], accentuated.config["input_size"]) == ((12, 12), [12, 12])


def test_features_were_made_for_an_input_size(bare: Model) -> None:
    """Features that know their size decide, and the images may have another one."""
    features = fv.make_features(bare._replace(size=(12, 12)), ["5"])
    given: tuple[dict[str, Any], ...] = ({}, {"size": 24})
    for options in given:
        config = fv.render(bare, "5", [0], steps=1, features=features, **options).config
        assert config["input_size"] == [12, 12]
        assert config["size"] == [options.get("size", 12)] * 2
    assert fv.activations_of(bare, ["5"], torch.rand(3, 9, 9), features=features)["5"].shape == (6, 3, 3)


def test_frames_that_are_not_known_are_warned_of(video_model: Model) -> None:
    bare = unknown(video_model)
    message = r"the number of frames that Sequential takes is not known: 6 was assumed; state it by size=\(t, h, w\)"
    for size, expected in ((12, [6, 12, 12]), ((12, 15), [6, 12, 15])):
        with pytest.warns(UserWarning, match=message):
            assert fv.render(bare, "2", [0], steps=1, size=size).config["input_size"] == expected
    assert fv.render(bare, "2", [0], steps=1, size=(5, 12, 15)).config["input_size"] == [5, 12, 15]


def test_number_of_sides_is_stated_where_no_convolution_tells_it() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.flatten(2).mean(2))

    model = unknown(load_toy(Mean().eval(), size=TINY_SIZE))
    for size in ((9,), (7, 5), (3, 7, 5)):
        result = fv.render(model, "fc", [0], steps=1, size=size)
        assert result.images.shape == (1, 3, *size)
        assert result.config["input_size"] == [*size]


def test_only_the_size_is_taken_as_known() -> None:
    model = Model(nn.Identity(), "one", (0.0,), (1.0,), (2, 2), assumed=("size", "channels"))
    assert with_input_size(model, (3, 4)) == model._replace(size=(3, 4), assumed=("channels",))
    known = model._replace(assumed=("channels",))
    assert with_input_size(known, (3, 4)) is known


# --- images that are stretched --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transforms", ["default", "none", "maco"])
def test_stretched_images_are_warned_of(tiny: Model, transforms: str) -> None:
    message = "images of 12 x 24 are stretched to the input of Sequential, 20 x 20, which has another aspect ratio"
    with pytest.warns(UserWarning, match=message) as caught:
        fv.render(tiny, "5", [0], steps=1, size=(12, 24), transforms=transforms)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="are stretched"):
        fv.render(tiny, "5", [0], steps=1, image=fv.fourier((12, 24)), transforms=transforms)


@pytest.mark.parametrize("size", [8, (40, 40), (13, 14), (1, 1)])
def test_images_of_the_models_aspect_ratio_are_not_stretched(tiny: Model, size: int | tuple[int, int]) -> None:
    fv.render(tiny, "5", [0], steps=1, size=size)


def test_a_transform_of_the_users_own_is_not_warned_of(tiny: Model) -> None:
    cropped = t.warp(t.crop_or_pad(TINY_SIZE), size=(TINY_SIZE, TINY_SIZE))
    fv.render(tiny, "5", [0], steps=1, size=(12, 24), transforms=cropped)


def test_frames_of_a_video_are_stretched_but_not_its_time(video_model: Model) -> None:
    fv.render(video_model, "2", [0], steps=1, size=(12, 16, 20))
    message = "images of 6 x 16 x 16 are stretched to the input of Sequential, 6 x 16 x 20, which has another"
    with pytest.warns(UserWarning, match=message):
        fv.render(video_model, "2", [0], steps=1, size=16)
