"""What a gallery shows of a family of objectives, which it presents as it does a layer."""

from typing import Any, NamedTuple

from torch import Tensor

from featvis_func.objective import Family
from featvis_func.rendering.result import Result
from featvis_func.sweep import Store
from featvis_func.sweep.layout import DamagedError


class GalleryFamily(NamedTuple):
    """A family of objectives whose members are the filters of a section."""

    objective: str
    """The objective, as text."""
    layers: tuple[str, ...]
    """The layers whose activations it reads, the main one first."""
    copies: int
    """Images of each member: image ``i`` is one of member ``i // copies``."""
    names: dict[int, str]
    """Names of the members, by the number of the image; empty if they have none."""
    vectors: Tensor | None
    """``(n, d)``: the direction of each member, if the members are directions."""
    rows: dict[int, int]
    """Number of a member -> its row of ``vectors``, if these are not all members in order."""
    total: int | None
    """Number of images of all members, rendered or not; ``None`` if unknown."""

    def name_of(self, number: int) -> str:
        """The name of the member in an image; empty if it has none."""
        return self.names.get(number, "")

    @property
    def key(self) -> list[Any]:
        """What the pages of all members depend on, beside their names."""
        return [self.objective, self.layers, self.copies, self.vectors is not None, bool(self.names)]


def family_of_store(store: Store, label: str) -> tuple[GalleryFamily | None, str | None]:
    """Read a family of a sweep.

    Returns:
        The family, or ``None`` for a layer; and what is missing of it because its file is damaged.
    """
    record = store.config.get("families", {}).get(label)
    if record is None:
        return None, None
    problem, names, vectors, copies = None, None, None, int(record["group"])
    try:
        members = store.members(label)
    except DamagedError as error:
        members, problem = None, f"the names and directions of {label}: {error}"
    if members is not None:
        names, copies = members.names, members.copies
        vectors = None if members.vectors is None else members.tensors.get(members.vectors)
    sizes = [len(values) for values in (names, vectors) if values is not None]
    family = GalleryFamily(
        str(record["objective"]),
        tuple(record["layers"]),
        copies,
        _image_names(names or (), copies),
        vectors,
        {},
        sizes[0] * copies if sizes else None,
    )
    return family, problem


def family_of_result(result: Result) -> GalleryFamily | None:
    """The family of a result; ``None`` if its filters are channels of a layer."""
    record = result.config.get("family")
    if record is None:
        return None
    copies = int(record["group"])
    rows = {} if result.vectors is None else {n // copies: row for row, n in enumerate(result.filters)}
    return GalleryFamily(
        str(result.config.get("objective", "")),
        tuple(record["layers"]),
        copies,
        {int(number): str(name) for number, name in (result.config.get("names") or {}).items()},
        result.vectors,
        rows,
        None,
    )


def _image_names(names: tuple[str, ...], copies: int) -> dict[int, str]:
    """The names of all images of named members.

    >>> _image_names(("cat",), 2)
    {0: 'cat, facet 0', 1: 'cat, facet 1'}
    """
    named = Family("", {}, names, copies=copies)
    return {number: named.name_of(number) or "" for number in range(len(names) * copies)}
