"""Still pictures of images, videos and signals."""

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from featvis_func.io.display import Display
from featvis_func.io.pil import arrange, middle_frame, picture, strip_frames
from featvis_func.io.plot import plot


def pixels(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def random_image(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(len(shape))).to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
def test_all_dtypes_show_the_same(dtype: torch.dtype) -> None:
    image = random_image(6, 4, 5)
    given = image if dtype == torch.uint8 else image.to(dtype) / 255
    assert (pixels(picture(given)) == pixels(picture(image))).all()


@pytest.mark.parametrize("channels", [3, 4, 5, 13])
def test_the_first_three_channels_are_shown_by_default(channels: int) -> None:
    image = random_image(channels, 4, 5)
    shown = picture(image)
    assert shown.mode == "RGB"
    assert (pixels(shown) == image[:3].permute(1, 2, 0).numpy()).all()


def test_near_infrared_is_no_opacity() -> None:
    """A fourth channel of 0 would make the image invisible if it were taken for one."""
    image = torch.cat([torch.ones(3, 4, 5), torch.zeros(1, 4, 5)])
    assert (pixels(picture(image)) == 255).all()
    assert pixels(picture(image)).shape == (4, 5, 3)
    assert (pixels(picture(image, Display(bands=(3,)))) == 0).all()
    assert (pixels(picture(image, Display(alpha=True))) == [255, 255, 255, 0]).all()


def test_one_channel_is_grey_and_two_are_side_by_side() -> None:
    image = random_image(2, 4, 5)
    assert picture(image[:1]).mode == picture(image).mode == "L"
    assert (pixels(picture(image)) == torch.cat([*image], dim=1).numpy()).all()


def test_bands_select_channels() -> None:
    image = random_image(7, 4, 5)
    for bands in ((3, 2, 1), (5, 5, 0)):
        shown = picture(image, Display(bands=bands))
        assert (pixels(shown) == image[list(bands)].permute(1, 2, 0).numpy()).all()
        with_opacity = picture(image, Display(alpha=True, bands=bands))
        assert with_opacity.mode == "RGBA"
        assert (pixels(with_opacity) == image[[*bands, 6]].permute(1, 2, 0).numpy()).all()
    grey = picture(image, Display(bands=(6,)))
    assert (pixels(grey) == image[6].numpy()).all()
    with pytest.raises(ValueError, match="bands has channel 6, but the channels are 0 to 5"):
        picture(image, Display(alpha=True, bands=(6,)))


@pytest.mark.parametrize("colors", [1, 2, 3, 6])
def test_an_opacity_covers_all_that_is_shown(colors: int) -> None:
    image = random_image(colors + 1, 4, 5)
    shown = picture(image, Display(alpha=True))
    assert shown.mode == "RGBA"
    width = 10 if colors == 2 else 5
    assert shown.size == (width, 4)
    opacity = pixels(shown)[..., 3]
    assert (opacity.reshape(4, -1, 5) == image[-1].numpy()[:, None]).all()
    without = picture(image[:-1]).convert("RGB")
    assert (pixels(shown)[..., :3] == pixels(without)).all()


@pytest.mark.parametrize(("count", "shown"), [(1, [0]), (8, [*range(8)]), (9, [0, 1, 2, 3, 5, 6, 7, 8])])
def test_a_video_is_a_strip_from_its_first_to_its_last_frame(count: int, shown: list[int]) -> None:
    assert strip_frames(count) == shown
    video = random_image(3, count, 4, 5)
    strip = pixels(picture(video))
    assert strip.shape == (4, 6 * len(shown) - 1, 3)
    for i, frame in enumerate(shown):
        assert (strip[:, 6 * i : 6 * i + 5] == video[:, frame].permute(1, 2, 0).numpy()).all()
        assert (strip[:, 6 * i + 5 : 6 * i + 6] == 255).all()


def test_bands_and_opacity_of_a_video() -> None:
    video = random_image(7, 2, 4, 5)
    strip = pixels(picture(video, Display(alpha=True, bands=(3, 2, 1))))
    assert (strip[:, :5] == video[[3, 2, 1, 6], 0].permute(1, 2, 0).numpy()).all()
    grey = picture(video, Display(bands=(4,)))
    assert (grey.mode, grey.size) == ("L", (11, 4))


def test_middle_frame() -> None:
    video = random_image(3, 5, 4, 6)
    assert torch.equal(middle_frame(video), video[:, 2])
    assert middle_frame(video[:, 0]).shape == (3, 4, 6)
    assert middle_frame(video[:, 0, 0]).shape == (3, 6)


def test_a_signal_is_a_plot() -> None:
    signal = torch.rand(3, 50)
    assert (pixels(picture(signal)) == pixels(plot(signal))).all()
    with pytest.raises(ValueError, match=r"bands are channels of images and videos, got \(0,\) for signals"):
        picture(signal, Display(bands=(0,)))


@pytest.mark.parametrize("shape", [(5,), (1, 2, 3, 4, 5), (0, 4, 5), (3, 0)], ids=str)
def test_other_shapes_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected an image \(c, h, w\), a video .* or a signal .* got \("):
        picture(torch.zeros(shape))


def test_a_grid_of_wide_pictures_comes_near_to_a_square() -> None:
    tiles = [PIL.Image.new("L", (80, 10))] * 16
    w, h = arrange(tiles, square=False).size
    assert (w, h) == (2 * 82 + 2, 8 * 12 + 2)
    assert arrange(tiles, 3, gap=5).size == (3 * 85 + 5, 6 * 15 + 5)
