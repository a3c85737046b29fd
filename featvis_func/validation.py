"""Checks of what a user gives, and the parts of error messages. Imports neither torch nor the rest of the package.

A check returns the value in the library's own type, or raises one ``ValueError`` that names the value that was given,
what was expected and, where there is a choice, what exists.
"""

import difflib
import math
import operator
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any


def suggest(name: str, known: Sequence[str]) -> str:
    """``"; did you mean 'a' or 'b'?"``, or nothing where nothing is near.

    >>> suggest("resnet81", ["resnet18", "vgg11"])
    "; did you mean 'resnet18'?"
    """
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def check_name(kind: str, name: object, known: Iterable[str]) -> None:
    """Raises ValueError if a name is not among those known.

    >>> check_name("transforms", "sideways", ["default", "none"])
    Traceback (most recent call last):
        ...
    ValueError: unknown transforms 'sideways'; expected one of default, none
    """
    names = list(known)
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}; expected one of {', '.join(names)}")


def first_line(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters; its kind, where it says nothing.

    >>> first_line(ValueError("no such thing\\nand a page of details")), first_line(KeyError())
    ('no such thing', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: columns of one width each, the last one left as it is.

    >>> print(table([("layer", "filters"), ("conv", "8")]))
    layer  filters
    conv   8
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def check_int(name: str, value: Any, least: int | None = None) -> int:
    """An integer of any type (``int``, numpy, a tensor of one element) as a Python ``int``.

    >>> check_int("steps", 3, 1)
    3
    >>> check_int("steps", 0, 1)
    Traceback (most recent call last):
        ...
    ValueError: steps must be at least 1, got 0
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from error
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def check_float(name: str, value: Any, least: float | None = None, *, above: float | None = None) -> float:
    """A finite number of any type as a Python ``float``.

    >>> check_float("tolerance", 0.05, 0)
    0.05
    >>> check_float("lr", 0, above=0)
    Traceback (most recent call last):
        ...
    ValueError: lr must be finite and above 0, got 0
    """
    bound = f" and at least {least:g}" if least is not None else f" and above {above:g}" if above is not None else ""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number, got {value!r}") from error
    if not math.isfinite(number) or (least is not None and number < least) or (above is not None and number <= above):
        raise ValueError(f"{name} must be finite{bound}, got {value}")
    return number


def check_seed(value: Any) -> int:
    """A seed: an integer in ``[0, 2**64)``.

    >>> check_seed(-1)
    Traceback (most recent call last):
        ...
    ValueError: seed must be in [0, 2**64), got -1
    """
    seed = check_int("seed", value)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    return seed


def check_filters(filters: Iterable[int] | int) -> list[int]:
    """Filter numbers, in whatever container or integer type, as a list without repetitions.

    >>> check_filters(range(3)), check_filters(7)
    ([0, 1, 2], [7])
    """
    try:
        # An array without axes is a number, though it is an instance of Iterable.
        several = isinstance(filters, Iterable) and getattr(filters, "ndim", 1) != 0
        numbers = [operator.index(f) for f in (filters if several else [filters])]  # pyright: ignore
    except TypeError as error:
        raise ValueError(f"filters must be whole numbers, got {filters!r}") from error
    if not numbers:
        raise ValueError("no filters were asked for: the list is empty")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"filter {next(f for f in numbers if numbers.count(f) > 1)} is asked for more than once")
    return numbers


def check_size(size: Any) -> tuple[int, ...]:
    """A size as a tuple: one number for a square, ``(h, w)``, ``(t, h, w)`` for a video or ``(t,)`` for a signal.

    >>> check_size(64), check_size((48, 64)), check_size((16, 48, 64)), check_size((1000,))
    ((64, 64), (48, 64), (16, 48, 64), (1000,))
    """
    sides = _whole_sides(size)
    if not 1 <= len(sides) <= 3:
        raise ValueError(
            f"image size must be whole pixels, at least 1: one number, (h, w), (t, h, w) for videos or (t,) for"
            f" signals, got {size}"
        )
    return sides


def check_sides(size: Any) -> tuple[int, int]:
    """The size of a picture in pixels, one number for a square or ``(h, w)``, as ``(h, w)``.

    >>> check_sides(64), check_sides((48, 64))
    ((64, 64), (48, 64))
    """
    sides = _whole_sides(size)
    if len(sides) != 2:
        raise ValueError(f"image size must be whole pixels, at least 1, or (h, w) of such, got {size}")
    return sides[0], sides[1]


def _whole_sides(size: Any) -> tuple[int, ...]:
    """The sides of an image, of one number those of a square; empty if they are not whole numbers of at least 1."""
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    try:
        numbers = tuple(operator.index(side) for side in sides)
    except (TypeError, ValueError):
        return ()
    return () if any(n < 1 for n in numbers) or any(isinstance(side, bool) for side in sides) else numbers


def check_bands(bands: Any, channels: int | None = None) -> tuple[int, ...]:
    """Channels to show: one as grey, or three as red, green and blue, numbered from 0.

    Args:
        bands: the channels.
        channels: how many there are, if that is known.

    >>> check_bands([3, 2, 1])
    (3, 2, 1)
    >>> check_bands((3, 2, 6), 6)
    Traceback (most recent call last):
        ...
    ValueError: bands has channel 6, but the channels are 0 to 5; got (3, 2, 6)
    """
    try:
        numbers = tuple(operator.index(band) for band in bands)
    except TypeError as error:
        raise ValueError(f"bands must be channel numbers such as (3, 2, 1), got {bands!r}") from error
    if len(numbers) not in (1, 3):
        raise ValueError(f"bands must be 1 channel (grey) or 3 (red, green, blue), got {numbers}")
    missing = [band for band in numbers if band < 0 or (channels is not None and band >= channels)]
    if missing:
        last = "numbered from 0" if channels is None else "0 only" if channels == 1 else f"0 to {channels - 1}"
        raise ValueError(f"bands has channel {missing[0]}, but the channels are {last}; got {numbers}")
    return numbers


def warn_caller(message: str) -> None:
    """Warn about what a user gave, at the line of the user's code that called the package.

    However deep inside the package the warning arises, it names the first frame outside, and is shown once for each
    such line.
    """
    package = os.path.dirname(__file__) + os.sep
    frame, level = sys._getframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
