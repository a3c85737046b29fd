"""How the channels of images are shown: the one place that every picture takes it from. Imports no torch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from featvis_func.validation import check_bands


class Display(NamedTuple):
    """How the channels of an image, a video or a signal are shown."""

    alpha: bool = False
    """Whether the last channel is an opacity and not one of the model's channels."""
    bands: tuple[int, ...] | None = None
    """One channel, shown as grey, or three, shown as red, green and blue; ``None``: see :func:`bands_of`."""


def display_of(config: Mapping[str, Any], bands: Any = None) -> Display:
    """How the images of a :class:`~featvis_func.Result` or of a sweep are shown.

    Args:
        config: of the result or of the sweep, whose options are in ``config["render"]``.
        bands: shown instead of the recorded ones.

    Raises:
        ValueError: neither one nor three bands, or something else than numbers.

    >>> display_of({"alpha": True}), display_of({"render": {"image": "fourier", "bands": [3, 2, 1]}})
    (Display(alpha=True, bands=None), Display(alpha=False, bands=(3, 2, 1)))
    """
    options = config.get("render", config)
    chosen = config.get("bands", options.get("bands")) if bands is None else bands
    # The parameterisation "alpha" has an opacity for every model; an Image of the user's own is recorded as "alpha".
    alpha = bool(config.get("alpha")) or options.get("image") == "alpha"
    return Display(alpha, None if chosen is None else check_bands(chosen))


def check_shown(bands: tuple[int, ...] | None, channels: int, axes: int) -> None:
    """Check that images can be shown in these bands.

    Args:
        bands: as for :class:`Display`.
        channels: number of channels, without an opacity.
        axes: number of position axes: 1 for signals, 2 for images, 3 for videos.

    Raises:
        ValueError: a channel that does not exist, or bands for signals.

    >>> check_shown((0,), 2, 1)
    Traceback (most recent call last):
        ...
    ValueError: bands are channels of images and videos, got (0,) for signals, whose plots show every channel
    """
    if bands is None:
        return
    if axes == 1:
        raise ValueError(
            f"bands are channels of images and videos, got {bands} for signals, whose plots show every channel"
        )
    check_bands(bands, channels)


def bands_of(display: Display, channels: int) -> tuple[int, ...] | None:
    """The channels that are shown in one picture, by default the first three.

    Args:
        display: how they are shown.
        channels: number of channels of an image or video, without an opacity.

    Returns:
        One channel (grey) or three (red, green, blue); ``None`` for two channels, which are shown side by side in grey.

    Raises:
        ValueError: a channel that does not exist.

    >>> [bands_of(Display(), channels) for channels in (1, 2, 3, 6)]
    [(0,), None, (0, 1, 2), (0, 1, 2)]
    """
    if display.bands is not None:
        return check_bands(display.bands, channels)
    return {1: (0,), 2: None}.get(channels, (0, 1, 2))


def describe_bands(display: Display, channels: int) -> str:
    """Which channels of an image or video are shown, for people; empty where that goes without saying.

    >>> describe_bands(Display(), 6)
    'channels 0, 1, 2 of 6 as red, green, blue'
    >>> describe_bands(Display(bands=(4,)), 6), describe_bands(Display(), 2), describe_bands(Display(), 3)
    ('channel 4 of 6', '2 channels side by side', '')
    """
    bands = bands_of(display, channels)
    if bands is None:
        return f"{channels} channels side by side"
    if bands == (0, 1, 2)[:channels]:
        return f"channels 0, 1, 2 of {channels} as red, green, blue" if channels > 3 else ""
    if len(bands) == 1:
        return f"channel {bands[0]} of {channels}"
    return f"channels {', '.join(map(str, bands))} of {channels} as red, green, blue"
