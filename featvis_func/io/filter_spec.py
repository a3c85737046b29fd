"""Parse and format filter numbers such as ``0-7,12``."""

from collections.abc import Iterable

_MAX_FILTERS = 1_000_000  # bounds the memory that a mistyped range takes


def filter_numbers(text: str) -> list[int] | None:
    """Parse a list of filter numbers.

    Args:
        text: comma-separated numbers and inclusive ranges, such as ``0-7,12``; or ``all``.

    Returns:
        The numbers in the order given, or ``None`` for ``all``.

    Raises:
        ValueError: If the text has another form.

    >>> filter_numbers("0-3,12")
    [0, 1, 2, 3, 12]
    """
    if text == "all":
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"filters {text!r} must be numbers and ranges such as '0-7,12', or 'all'")
        if int(last or first) - int(first) >= _MAX_FILTERS:
            raise ValueError(f"filters {part.strip()!r} must be a range of at most {_MAX_FILTERS} filters")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def split_layer(text: str, known: Iterable[str] = ()) -> tuple[str, list[int] | None, bool]:
    """Parse a layer name with optional filter numbers.

    Args:
        text: ``"layer"``, ``"layer:97"``, ``"layer:10-20"`` or ``"layer:*"``.
        known: names of layers, which may contain colons; a text that is the end of one states no filters.

    Returns:
        The layer name, its filters (``None``: all), and whether the text states filters.

    Raises:
        ValueError: If the text after the colon is not a list of filters.

    >>> split_layer("head:3-5"), split_layer("head:*"), split_layer("head")
    (('head', [3, 4, 5], True), ('head', None, True), ('head', None, False))
    """
    layer, colon, numbers = text.rpartition(":")
    if not colon or any(name.endswith(text) for name in known):
        return text, None, False
    return layer, None if numbers.strip() == "*" else filter_numbers(numbers), True


def ranges(numbers: tuple[int, ...]) -> str:
    """Format ascending numbers as text for :func:`filter_numbers`.

    >>> ranges((0, 1, 2, 3, 12))
    '0-3,12'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
