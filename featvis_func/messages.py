"""What the errors of all modules are made of."""

import difflib
from collections.abc import Sequence


def suggest(name: str, known: Sequence[str]) -> str:
    """``"; did you mean 'a' or 'b'?"``, or nothing where nothing is near.

    >>> suggest("resnet81", ["resnet18", "vgg11"])
    "; did you mean 'resnet18'?"
    """
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters; its kind, where it says nothing.

    >>> first_line(ValueError("no such thing\\nand a page of details")), first_line(KeyError())
    ('no such thing', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
