"""Plots of signals: what is where, read from the pixels."""

import numpy as np
import pytest
import torch
from torch import Tensor

from featvis_func.io.plot import COLORS, MOST_LINES, WIDTH, margin_of, plot


def heights(signal: Tensor, *, size: tuple[int, int] = (128, 128)) -> list[np.ndarray]:
    """For each channel, the height of its line in its lane at each column: 0 at the lower edge, 1 at the upper."""
    drawn = np.asarray(plot(signal, size=size)).astype(float)
    lanes = np.array_split(drawn, len(signal)) if size[1] % len(signal) == 0 else []
    assert lanes, "the lanes have no whole number of pixels"
    result = []
    for channel, lane in enumerate(lanes):
        color = np.array(COLORS[channel % len(COLORS)], float)
        # Of a pixel that is a mixture of white and a colour: how much of the colour; lines of the axis have little.
        share = ((255 - lane) @ (255 - color)) / ((255 - color) @ (255 - color))
        share = np.where(share > 0.35, share, 0)
        rows = np.arange(len(lane)) + 0.5
        middle = (share * rows[:, None]).sum(0) / share.sum(0).clip(1e-9)
        result.append(1 - middle / len(lane))
    return result


@pytest.mark.parametrize("channels", [1, 2, 4, 8, 16])
def test_values_are_shown_from_0_to_1_in_lanes_from_top_to_bottom(channels: int) -> None:
    """Constant lines at 128 pixels: the axis of a lane ends an eighth of its height within it."""
    for value in (0.0, 0.5, 1.0):
        lanes = heights(torch.full((channels, 40), value))
        margin = min(1 / 8, 6 * channels / 128)
        for lane in lanes:
            inner = lane[4:-4]
            assert abs(inner - (margin + value * (1 - 2 * margin))).max() < 0.1, value
    rising = torch.linspace(0, 1, 40).expand(channels, 40)
    for lane in heights(rising):
        assert lane[8] < 0.35
        assert lane[-8] > 0.65


def test_each_channel_has_a_lane_and_a_color_of_its_own() -> None:
    signal = torch.full((4, 20), 0.5)
    signal[2] = 1.0
    lanes = heights(signal)
    assert [bool(lane[10:-10].mean() > 0.75) for lane in lanes] == [False, False, True, False]
    assert len(set(COLORS)) == len(COLORS) >= 5
    for color in COLORS:  # contrast with white of at least 3 to 1, as WCAG asks of graphics
        linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c / 255 > 0.04045 else c / 255 / 12.92 for c in color]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) > 3


@pytest.mark.parametrize("samples", [1, 2, 7, 128, 5000, 100_000])
def test_any_number_of_samples_fits(samples: int) -> None:
    signal = torch.full((2, samples), 0.5)
    assert plot(signal).size == (WIDTH + margin_of(2), 192)
    assert plot(signal, size=(128, 128)).size == (128, 128)
    middle = heights(signal)[0]
    assert abs(middle[2:-2] - 0.5).max() < 0.05


def test_a_single_sample_of_a_long_signal_is_seen() -> None:
    signal = torch.zeros(1, 50_000)
    signal[0, 25_000] = 1.0
    drawn = np.asarray(plot(signal, size=(128, 128))).astype(int)
    column = drawn[30:90, 60:68]
    assert (column[..., 0] < 150).any(1).all(), "the peak is a line from the bottom to the top"


def test_many_channels_are_a_heat_map() -> None:
    signal = torch.zeros(MOST_LINES + 4, 10)
    signal[0], signal[:, -1] = 1.0, 0.5
    drawn = np.asarray(plot(signal)).astype(int)
    height = drawn.shape[0] // len(signal)
    assert drawn.shape[1] == WIDTH
    assert (drawn[:height, : WIDTH * 9 // 10 - 1] == 255).all()
    assert (drawn[height:, : WIDTH * 9 // 10 - 1] == 0).all()
    assert (abs(drawn[:, -WIDTH // 10 + 1 :] - 127) <= 1).all()
    assert plot(torch.rand(5000, 3)).size[1] == 1024
    assert plot(signal, size=(128, 128)).size == (128, 128)


def test_lines_fade_where_the_opacity_is_0() -> None:
    signal = torch.full((2, 40), 0.5)
    signal[1] = torch.linspace(0, 1, 40)
    plain, faded = (np.asarray(image).astype(float) for image in (plot(signal[:1]), plot(signal, alpha=True)))
    darkness = [(255 - image).sum((0, 2)) for image in (plain, faded)]
    assert darkness[1][1] < 0.05 * darkness[0][1]
    assert darkness[1][-2] > 0.9 * darkness[0][-2]
    assert darkness[1][160] == pytest.approx(0.5 * darkness[0][160], rel=0.1)


def test_scale_enlarges_and_uint8_equals_float() -> None:
    signal = torch.randint(0, 256, (3, 60)).to(torch.uint8)
    assert plot(signal, scale=2).size == tuple(2 * side for side in plot(signal).size)
    assert plot(signal).tobytes() == plot(signal.double() / 255).tobytes()
    assert plot(torch.full((1, 4), torch.nan)).size == (WIDTH, 128)
