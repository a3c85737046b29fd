"""What the errors of all modules are made of."""

import difflib
from collections.abc import Iterable, Sequence


def suggest(name: str, known: Sequence[str]) -> str:
    """``"; did you mean 'a' or 'b'?"``, or nothing where nothing is near.

    >>> suggest("resnet81", ["resnet18", "vgg11"])
    "; did you mean 'resnet18'?"
    """
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def check_name(kind: str, name: object, known: Iterable[str]) -> None:
    """Raises ValueError if a name is not among those known.

    >>> check_name("views", "sideways", ["default", "none"])
    Traceback (most recent call last):
        ...
    ValueError: unknown views 'sideways'; expected one of default, none
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
