"""Filters as people write them."""

_MOST_FILTERS = 1_000_000


def filter_numbers(text: str) -> list[int] | None:
    """Reads a list of filters.

    Args:
        text: numbers and ranges, both ends included, such as ``0-7,12``; or ``all``.

    Returns:
        The numbers in the order given, or ``None`` for all.

    Raises:
        ValueError: anything else.

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
        if int(last or first) - int(first) >= _MOST_FILTERS:
            raise ValueError(f"filters {part.strip()!r} are more than any layer has")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def split_layer(text: str) -> tuple[str, list[int] | None, bool]:
    """Reads a layer with or without its filters.

    Args:
        text: ``"layer"``, ``"layer:97"``, ``"layer:10-20"`` or ``"layer:*"``.

    Returns:
        The layer, its filters (``None``: all), and whether any were written.

    Raises:
        ValueError: something else behind the colon.

    >>> split_layer("head:3-5"), split_layer("head:*"), split_layer("head")
    (('head', [3, 4, 5], True), ('head', None, True), ('head', None, False))
    """
    layer, colon, numbers = text.partition(":")
    if not colon:
        return text, None, False
    return layer, None if numbers.strip() == "*" else filter_numbers(numbers), True


def ranges(numbers: tuple[int, ...]) -> str:
    """Writes rising numbers, as :func:`filter_numbers` reads them.

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
