"""Columns of a user's CSV file, by which the pages of a layer or family can be sorted."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from featvis_func.gallery.source import Section
from featvis_func.io.filter_spec import ranges
from featvis_func.objective import feature_axis
from featvis_func.validation import first_line, suggest

KEYS = ("filter", "member", "number", "name")
"""Headers of the column that says which filter or member a row is of; without one of them, it is the first column."""
LAYER = "layer"
"""Header of the column that says which layer or family a row is of."""
_MISSING = ("", "na", "n/a", "nan", "none", "null")  # in a column of numbers; in one of text only the first
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?inf(inity)?", re.IGNORECASE)
_WHOLE = re.compile(r"(\d+)(\.0*)?")


class Column(NamedTuple):
    """One column of the file, for one layer or family."""

    name: str
    numeric: bool
    """Whether all values are numbers; text otherwise."""
    values: dict[int, float | str]
    """By the number of the image; those without a value are left out."""


class _Table(NamedTuple):
    path: str
    header: list[str]
    rows: list[tuple[int, list[str]]]
    """The number of the line, and the values."""


def read_columns(path: str | Path, sections: Sequence[Section]) -> dict[str, tuple[Column, ...]]:
    """Read a CSV file with a row for each filter or member, and a header.

    A row is of the filter whose number it holds, or of the member whose name it holds, in the column ``filter``,
    ``member``, ``number`` or ``name``, or else in the first column. A column ``layer`` says which layer or family a row
    is of; without one, the gallery must have only one. All other columns are values. Rows of filters that the layer
    has, but the gallery does not show, are ignored.

    Args:
        path: The file.
        sections: The layers and families of the gallery.

    Returns:
        The columns by the name of the section.

    Raises:
        ValueError: If the file cannot be read, has no column of values or a row of another length, or names a layer or
            a member that does not exist, or one twice.
    """
    table = _read_table(path)
    where = repr(table.path)
    header = [name.casefold() for name in table.header]
    layer = header.index(LAYER) if LAYER in header else None
    if layer is None and len(sections) > 1:
        names = ", ".join(section.name for section in sections[:8])
        raise ValueError(
            f"{where} needs a column {LAYER!r}, since the gallery has {len(sections)} layers: {names}"
            f"{', ...' if len(sections) > 8 else ''}"
        )
    others = [i for i in range(len(header)) if i != layer]
    key = next((header.index(name) for name in KEYS if name in header), others[0] if others else 0)
    used = [i for i in others if i != key]
    finders = {section.name: _Finder(section, table, by_name=header[key] == "name") for section in sections}
    found: dict[str, dict[int, list[str]]] = {section.name: {} for section in sections}
    lines: dict[tuple[str, int], int] = {}
    for line, row in table.rows:
        section = sections[0].name if layer is None else _find_section(row[layer], sections, f"{where}, line {line}")
        for number in finders[section].numbers(row[key], line):
            if (section, number) in lines:
                raise ValueError(
                    f"{where}, line {line}: {row[key]!r} was in line {lines[section, number]} already; expected one row"
                    " for each filter or member"
                )
            lines[section, number] = line
            if number in finders[section].shown:
                found[section][number] = row
    if not any(found.values()):
        raise ValueError(f"{where} has no row of a filter or member that the gallery shows")
    columns = {i: [row[i] for _, row in table.rows if row[i].casefold() not in _MISSING] for i in used}
    used = [i for i in used if columns[i]]
    if not used:
        raise ValueError(
            f"{where} has no column of values beside {table.header[key]!r}; expected a CSV file with a header, and"
            " commas between the columns"
        )
    numeric = {i: all(_NUMBER.fullmatch(value) for value in columns[i]) for i in used}
    return {
        name: tuple(Column(table.header[i], numeric[i], _values(rows, i, numeric[i])) for i in used)
        for name, rows in found.items()
        if rows
    }


def _read_table(path: str | Path) -> _Table:
    """Read the header and the rows of a CSV file.

    Raises:
        ValueError: If the file cannot be read, is empty, or has a row of another length than the header.
    """
    where = repr(str(path))
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, [value.strip() for value in row]) for row in reader if any(row)]
    except FileNotFoundError as error:
        raise ValueError(f"no file {where}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise ValueError(f"{where} cannot be read as CSV: {reason}") from error
    if len(rows) < 2:
        raise ValueError(f"{where} has no rows; expected a header, and a row for each filter or member")
    header = rows[0][1]
    if "" in header:
        raise ValueError(f"{where}: column {header.index('') + 1} has no name; the first line must name all columns")
    twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
    if twice is not None:
        raise ValueError(f"{where} has two columns {twice!r}")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise ValueError(f"{where}, line {line}: expected {len(header)} values, as in the header, got {len(row)}")
    return _Table(str(path), header, rows[1:])


class _Finder:
    """Finds the images that a row is of, by the number or the name in its key column."""

    def __init__(self, section: Section, table: _Table, *, by_name: bool) -> None:
        self._section, self._where, self._by_name = section, repr(table.path), by_name
        self.shown = frozenset(section.filters)
        self._named: dict[str, list[int]] = {}
        family = section.family
        if family is None:
            self._count = section.shape[feature_axis(section.shape)] if section.shape else None
            return
        self._count = family.total
        for number, name in family.names.items():
            # The name of a member stands for all its facets, that of a facet for one.
            own = name.removesuffix(f", facet {number % family.copies}") if family.copies > 1 else name
            for known in {name.strip(), own.strip()} - {""}:
                self._named.setdefault(known, []).append(number)

    def numbers(self, key: str, line: int) -> list[int]:
        """The numbers of the images that a row is of; none, if it is of a member that is not in the gallery.

        Raises:
            ValueError: If there is no such filter or member, or several have this name.
        """
        where, name = f"{self._where}, line {line}", self._section.name
        whole = _WHOLE.fullmatch(key)
        if whole is not None and not (self._by_name and key in self._named):
            number = int(whole[1])
            if self._count is not None and number >= self._count:
                raise ValueError(f"{where}: {name} has no number {number}; it has {ranges(tuple(range(self._count)))}")
            return [number]
        family = self._section.family
        if family is None or not self._named:
            raise ValueError(f"{where}: {key!r} is not the number of a filter, and {name} has no names")
        numbers = self._named.get(key, [])
        if len({number // family.copies for number in numbers}) > 1:
            raise ValueError(
                f"{where}: {len(numbers)} members of {name} are called {key!r}, such as {numbers[0]} and"
                f" {numbers[1]}; give their numbers"
            )
        if not numbers and family.total is not None:
            raise ValueError(f"{where}: {name} has no member {key!r}{suggest(key, list(self._named))}")
        return numbers


def _find_section(text: str, sections: Sequence[Section], where: str) -> str:
    """The name of the section that a text names: by its own name, or by the main layer of a family.

    Raises:
        ValueError: If there is no such section, or several families of this layer.
    """
    names = [section.name for section in sections]
    if text in names:
        return text
    of_layer = [section.name for section in sections if section.family is not None and section.family.layers[0] == text]
    if len(of_layer) == 1:
        return of_layer[0]
    if of_layer:
        raise ValueError(f"{where}: layer {text!r} may be {' or '.join(of_layer)}; give one of these")
    raise ValueError(f"{where}: the gallery has no layer {text!r}{suggest(text, names)}")


def _values(rows: Mapping[int, list[str]], column: int, numeric: bool) -> dict[int, float | str]:
    """The values of a column that are not missing."""
    missing = _MISSING if numeric else ("",)
    present = {number: row[column] for number, row in rows.items() if row[column].casefold() not in missing}
    return {number: float(value) if numeric else value for number, value in present.items()}
