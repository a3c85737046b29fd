"""Galleries of any number of channels, videos and signals: the files, read with Pillow."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from featvis_func.gallery import build_gallery
from featvis_func.gallery.images import activation_map, describe, encode_image, encode_video, map_values, snapshot_sheet
from featvis_func.gallery.reproduce import describe as describe_config
from featvis_func.gallery.reproduce import reproduce
from featvis_func.io.animation import animation_bytes
from featvis_func.io.display import Display
from featvis_func.io.pil import picture
from featvis_func.io.plot import plot
from featvis_func.rendering.result import Result, read_result
from tests.gallery_sites import shown_site
from tests.sweep_toys import toy_result


def opened(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(opened(data).convert("RGB")).astype(int)


# --- encoded images -------------------------------------------------------------------------------------------------


def test_a_thumbnail_of_a_signal_is_drawn_at_128_pixels() -> None:
    signal = torch.rand(3, 400)
    encoded = encode_image(signal)
    np.testing.assert_array_equal(pixels(encoded.thumb), np.asarray(plot(signal, size=(128, 128))))
    np.testing.assert_array_equal(pixels(encoded.full), np.asarray(plot(signal, scale=2)))
    assert (encoded.size, encoded.thumb_size) == (opened(encoded.full).size, (128, 128))
    assert encode_video(signal, "webp") is None


def test_a_video_has_a_still_an_animation_and_a_strip() -> None:
    video = torch.rand(3, 5, 20, 30)
    encoded = encode_image(video)
    assert (encoded.size, encoded.thumb_size) == ((30, 20), (30, 20))
    assert abs(pixels(encoded.full).mean((0, 1)) - (video[:, 2] * 255).mean((1, 2)).numpy()).max() < 3
    moving = encode_video(video, "gif")
    assert moving is not None
    assert moving.moving == animation_bytes(video.movedim(1, 0), "gif", seconds=5 / 8, hold=0.0)
    assert opened(moving.strip).size == moving.strip_size == (5 * 31 - 1, 20)
    assert encode_video(video[:, 0], "gif") is None


@pytest.mark.parametrize(
    ("display", "mode"), [(Display(), "RGB"), (Display(alpha=True), "RGBA"), (Display(bands=(3, 2, 1)), "RGB")]
)
def test_images_are_encoded_as_their_pictures_are(display: Display, mode: str) -> None:
    image = torch.rand(5, 12, 12).round()
    encoded = encode_image(image, display)
    assert opened(encoded.full).mode == mode
    if mode == "RGB":
        expected = np.asarray(picture(image, display)).astype(int)
        assert abs(pixels(encoded.full).mean((0, 1)) - expected.mean((0, 1))).max() < 12


@pytest.mark.parametrize(
    ("shape", "display", "words"),
    [
        ((3, 4, 5), Display(), "Image, 5 × 4 pixels"),
        ((4, 4, 5), Display(alpha=True), "Image, 5 × 4 pixels"),
        ((2, 4, 5), Display(), "Image, 5 × 4 pixels; 2 channels side by side"),
        ((7, 4, 5), Display(alpha=True, bands=(5,)), "Image, 5 × 4 pixels; channel 5 of 6"),
        ((6, 9, 4, 5), Display(), "Video, 9 frames of 5 × 4 pixels; channels 0, 1, 2 of 6 as red, green, blue"),
        ((1, 9), Display(), "Signal, 9 samples, from 0 to 1"),
        ((13, 9), Display(alpha=True), "Signal, 9 samples; 12 channels as lines from 0 to 1, channel 0 on top"),
        ((20, 9), Display(), "Signal, 9 samples; 20 channels as rows from dark for 0 to light for 1, channel 0 on top"),
    ],
    ids=str,
)
def test_captions(shape: tuple[int, ...], display: Display, words: str) -> None:
    assert describe(torch.zeros(shape), display) == words


# --- activation maps ------------------------------------------------------------------------------------------------


def test_maps_of_several_time_steps_are_side_by_side_in_common_colours() -> None:
    values = torch.zeros(10, 2, 3)
    values[9], values[0] = 1.0, -1.0
    drawn = activation_map(values, torch.zeros(3, 10, 8, 12))
    assert drawn is not None
    assert (drawn.shape, drawn.low, drawn.high) == ((10, 2, 3), "-1", "1")
    image = opened(drawn.data)
    assert image.size == drawn.size == (8 * 51 - 3, 2 * 35 - 3)
    colours = np.asarray(image.convert("RGBA")).astype(int)
    assert (colours[:32, :48] == [13, 8, 45, 255]).all()
    assert (colours[35:67, 51:99] == [250, 240, 160, 255]).all()
    assert (colours[:32, 48:51, 3] == 0).all()
    assert (colours[35:, 99:, 3] == 0).all()
    assert (colours[:32, 51:99] == colours[:32, 102:150]).all()


def test_positions_of_a_signal_are_a_bar_below_its_lines() -> None:
    """16 positions in time are no square of 4 by 4."""
    values = torch.arange(16.0)
    signal = torch.rand(3, 100)
    drawn = activation_map(values, signal)
    assert drawn is not None
    assert drawn.shape == (1, 16)
    bar = np.asarray(opened(drawn.data).convert("RGBA")).astype(int)
    assert drawn.size == (bar.shape[1], 48)
    assert bar.shape[1] == encode_image(signal).size[0]
    assert (bar[:, :44, 3] == 0).all(), "the margin with the numbers of the channels"
    assert (bar == bar[:1]).all()
    assert (np.diff(bar[0, 44:].sum(-1)) >= 0).all()
    assert (bar[0, 44:64] == bar[0, 44]).all()
    longer = torch.zeros(5000)
    longer[2500] = 1.0
    drawn = activation_map(longer, signal)
    assert drawn is not None
    assert (pixels(drawn.data) == [250, 240, 160]).all(-1).any(), "the highest value is not lost"
    alone = activation_map(values)
    assert alone is not None
    assert alone.shape == (4, 4), "tokens of an image"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 3, 4), (3, 4)), ((1, 1, 1), None), ((2, 1, 1), (2, 1, 1)), ((5, 1, 4), (5, 1, 4)), ((), None), ((1,), None)],
)
def test_map_values_of_up_to_three_axes(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    values = map_values(torch.rand(shape))
    assert (None if values is None else tuple(values.shape)) == expected


# --- the site -------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", ["six", "video", "signal"])
def test_files_of_every_kind_of_image(kind: str, tmp_path: Path) -> None:
    files = files_of(shown_site(tmp_path, kind) / "layers/conv")
    for number in range(12):
        names = {"images", "thumbs", "maps", "films"} | ({"videos"} if kind == "video" else set())
        assert {f"{name}/{number}.webp" for name in names} <= files.keys()
    assert any(name.startswith("videos") for name in files) == (kind == "video")
    assert max(opened(files["thumbs/1.webp"]).size) <= 128
    data = files["data.js"].decode()
    assert ('"video":"webp"' in data) == (kind == "video")


def six(**changes: Any) -> Result:
    images = torch.zeros(2, 6, 8, 8)
    images[:, 4] = 1.0
    config = {"layer": "conv", "model": "texturenet", "mean": [0.0] * 6, "input_size": [8, 8], **changes}
    return replace(toy_result("conv", [0, 1], 7), images=images, config=config)


def colour(site: Path, kind: str = "images") -> list[int]:
    return pixels((site / f"layers/conv/{kind}/1.webp").read_bytes()).mean((0, 1)).round().astype(int).tolist()


def test_bands_of_a_saved_result_and_of_the_build(tmp_path: Path) -> None:
    six().save(tmp_path / "result", bands=(4, 2, 1))
    site = build_gallery(tmp_path / "result").path.parent
    for kind in ("images", "thumbs"):
        assert abs(np.subtract(colour(site, kind), [255, 0, 0])).max() < 5
    assert build_gallery(tmp_path / "result").made == 0
    again = build_gallery(tmp_path / "result", bands=(0, 1, 4))
    assert again.made == 2
    assert abs(np.subtract(colour(site), [0, 0, 255])).max() < 5
    assert "--bands 0,1,4" in (site / "layers/conv/1.html").read_text()
    assert read_result(tmp_path / "result").config["bands"] == [4, 2, 1], "the result is as it was"


@pytest.mark.parametrize("bands", [(6,), (0, 1), "0"])
def test_bands_that_cannot_be_shown_leave_no_trace(tmp_path: Path, bands: Any) -> None:
    with pytest.raises(ValueError, match="bands"):
        build_gallery(six(), tmp_path / "site", bands=bands)
    assert not (tmp_path / "site").exists()


def test_opacity_shows_in_the_gallery(tmp_path: Path) -> None:
    images = torch.cat([torch.ones(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)], 1)
    for alpha in (True, False):
        result = replace(six(alpha=True) if alpha else six(), images=images)
        site = build_gallery(result, tmp_path / str(alpha)).path.parent
        mode = PIL.Image.open(site / "layers/conv/images/1.webp").convert("RGBA").getpixel((4, 4))
        assert isinstance(mode, tuple)
        assert mode[3] == (0 if alpha else 255)


def test_settings_say_which_channels_are_shown() -> None:
    assert dict(describe_config(six().config))["Bands"] == "channels 0, 1, 2 of 6 as red, green, blue"
    assert dict(describe_config(six(bands=[5]).config))["Bands"] == "channel 5 of 6"
    assert "Bands" not in dict(describe_config({**six().config, "mean": [0.0] * 3}))
    assert "Bands" not in dict(describe_config({**six().config, "input_size": [100]}))


def test_the_command_repeats_the_bands() -> None:
    assert reproduce({"model": "texturenet", "render": {"bands": [3, 2, 1]}}, "head", 3, 0).command == (
        "featvis render texturenet --layer head --filters 3 --bands 3,2,1"
    )
    override = {"model": "texturenet", "render": {"bands": [3, 2, 1]}, "bands": [4]}
    assert "bands=(4,)" in reproduce(override, "head", 3, 0).call


def test_snapshots_lack_the_opacity_of_a_transparent_result(tmp_path: Path) -> None:
    result = replace(six(), images=torch.rand(2, 3, 8, 8), saliency=torch.rand(2, 8, 8))
    result = replace(result, snapshots=torch.full((2, 2, 3, 8, 8), 255, dtype=torch.uint8))
    site = build_gallery(result.transparent(), tmp_path).path.parent
    sheet = pixels((site / "layers/conv/films/1.webp").read_bytes())
    assert sheet.shape == (8, 16, 3)
    assert sheet.min() > 250
    assert snapshot_sheet(torch.zeros(2, 3, 40, dtype=torch.uint8)).frames == 2
