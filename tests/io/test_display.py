"""Which channels are shown, taken from the configuration of a result or a sweep."""

from typing import Any

import pytest

from featvis_func.io.display import Display, bands_of, check_shown, describe_bands, display_of


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Display()),
        ({"image": "fourier", "bands": None}, Display()),
        ({"image": "alpha"}, Display(alpha=True)),
        ({"image": "custom", "alpha": True}, Display(alpha=True)),
        ({"bands": [3, 2, 1]}, Display(bands=(3, 2, 1))),
        ({"render": {"image": "alpha", "bands": [4]}}, Display(alpha=True, bands=(4,))),
        ({"render": {"image": "pixel", "bands": [4]}, "bands": [0, 1, 2]}, Display(bands=(0, 1, 2))),
        ({"render": {}, "image_dtype": "uint8"}, Display()),
    ],
    ids=str,
)
def test_display_is_read_from_the_configuration(config: dict[str, Any], expected: Display) -> None:
    assert display_of(config) == expected
    assert display_of(config, (1,)) == expected._replace(bands=(1,))


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ((0, 1), r"bands must be 1 channel \(grey\) or 3 \(red, green, blue\), got \(0, 1\)"),
        ((), r"got \(\)"),
        (3, r"bands must be channel numbers such as \(3, 2, 1\), got 3"),
        ("3,2,1", "bands must be channel numbers such as .* got '3,2,1'"),
        ((0.5,), "bands must be channel numbers"),
        ((0, -1, 2), r"bands has channel -1, but the channels are numbered from 0; got \(0, -1, 2\)"),
    ],
)
def test_bands_that_cannot_be_shown_raise(bands: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        display_of({}, bands)


def test_bands_are_checked_against_the_channels_that_exist() -> None:
    check_shown((5, 0, 5), 6, 2)
    check_shown(None, 1, 1)
    with pytest.raises(ValueError, match=r"bands has channel 6, but the channels are 0 to 5; got \(6,\)"):
        check_shown((6,), 6, 3)
    with pytest.raises(ValueError, match="the channels are 0 only"):
        check_shown((1,), 1, 2)
    with pytest.raises(ValueError, match=r"bands are channels of images and videos, got \(0,\) for signals"):
        check_shown((0,), 6, 1)


@pytest.mark.parametrize(
    ("channels", "bands", "expected", "words"),
    [
        (1, None, (0,), ""),
        (2, None, None, "2 channels side by side"),
        (3, None, (0, 1, 2), ""),
        (4, None, (0, 1, 2), "channels 0, 1, 2 of 4 as red, green, blue"),
        (13, (3, 2, 1), (3, 2, 1), "channels 3, 2, 1 of 13 as red, green, blue"),
        (3, (2, 1, 0), (2, 1, 0), "channels 2, 1, 0 of 3 as red, green, blue"),
        (2, (1,), (1,), "channel 1 of 2"),
        (1, (0, 0, 0), (0, 0, 0), "channels 0, 0, 0 of 1 as red, green, blue"),
    ],
)
def test_default_and_stated_bands(
    channels: int, bands: tuple[int, ...] | None, expected: tuple[int, ...] | None, words: str
) -> None:
    assert bands_of(Display(bands=bands), channels) == expected
    assert describe_bands(Display(bands=bands), channels) == words
