"""Building blocks of the texture patterns: a plane, soft edges, random fields, lattices, random points.

A pattern is a function of a ``Plane`` that returns layers ``(mask, role)``. A mask is ``(h, w)`` in [0, 1]; its role
selects the colour of the palette. The layers are composited in order over the background.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating]
FORE, ACCENT, DARK, LIGHT = 1, 2, 3, 4
Layers = list[tuple[Field, int]]


class Plane(NamedTuple):
    """Coordinates at which a pattern is evaluated, and its random generator."""

    x: Field  # (h, w), in periods of the pattern
    y: Field
    edge: float  # width of a soft edge, in periods
    rng: np.random.Generator  # advanced in place; the only source of randomness of a pattern


def inside(p: Plane, distance: Field) -> Field:
    """Compute the anti-aliased indicator of ``distance > 0``, which rises from 0 to 1 over the edge width of the plane.

    Args:
        p: the plane.
        distance: ``(h, w)``, signed distance to the outline in periods, positive inside.

    Returns:
        ``(h, w)`` in [0, 1].

    >>> axis = np.zeros((1, 1), np.float32)
    >>> plane = Plane(axis, axis, 0.1, np.random.default_rng(0))
    >>> inside(plane, np.array([[-0.05, 0.0, 0.05]], np.float32)).tolist()
    [[0.0, 0.5, 1.0]]
    """
    t = np.clip(distance / p.edge + 0.5, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def triangle_wave(x: Field) -> Field:
    """Compute the distance to the nearest integer, in [0, 0.5].

    >>> triangle_wave(np.array([0.25, 0.5, 1.75], np.float32)).tolist()
    [0.25, 0.5, 0.25]
    """
    return np.abs(x - np.round(x))


def waves(p: Plane, count: int, low: float, high: float, stretch: float = 1.0) -> Field:
    """Draw a random field of unit variance: a sum of plane waves with amplitudes proportional to ``1 / f``.

    Args:
        p: the plane.
        count: number of plane waves.
        low: lowest frequency, in cycles per period.
        high: highest frequency, in cycles per period.
        stretch: factor by which the features of the field are longer along ``x`` than along ``y``.

    Returns:
        ``(h, w)``, with mean 0 and variance 1 over the random draws.
    """
    frequency = p.rng.uniform(low, high, count)
    angle = p.rng.uniform(0, np.pi, count)
    amplitude = low / frequency
    kx = (2 * np.pi * frequency * np.cos(angle) / stretch).astype(np.float32)[:, None, None]
    ky = (2 * np.pi * frequency * np.sin(angle)).astype(np.float32)[:, None, None]
    phase = p.rng.uniform(0, 2 * np.pi, count).astype(np.float32)[:, None, None]
    weight = (amplitude * np.sqrt(2 / np.sum(amplitude**2))).astype(np.float32)
    return np.tensordot(weight, np.cos(kx * p.x + ky * p.y + phase), 1)


class Cell(NamedTuple):
    """Coordinates of each pixel relative to its lattice cell; all ``(h, w)``."""

    x: Field  # from the cell's centre, -0.5 to 0.5
    y: Field
    r: Field  # distance from the centre
    angle: Field  # radians
    random: Field  # in [0, 1), the same for all pixels of a cell


def lattice(p: Plane, stagger: float = 0.5, turn: float = 0.0, wobble: float = 0.0) -> Cell:
    """Divide the plane into unit cells in rows, with the coordinates in each cell rotated and shifted at random.

    Args:
        p: the plane.
        stagger: shift of every second row, in periods.
        turn: largest rotation of a cell in either direction, in radians.
        wobble: range of the random shift of a cell, in periods.

    Returns:
        The coordinates in the cells.
    """
    row = np.floor(p.y)
    shifted = p.x + stagger * np.mod(row, 2)
    column = np.floor(shifted)
    at = np.mod(row, 64).astype(np.intp), np.mod(column, 64).astype(np.intp)
    table = p.rng.random((4, 64, 64), dtype=np.float32)
    x = shifted - column - 0.5 + wobble * (table[1][at] - 0.5)
    y = p.y - row - 0.5 + wobble * (table[2][at] - 0.5)
    theta = turn * (2 * table[3][at] - 1)
    x, y = x * np.cos(theta) + y * np.sin(theta), y * np.cos(theta) - x * np.sin(theta)
    return Cell(x, y, np.hypot(x, y), np.arctan2(y, x), table[0][at])


def nearest(p: Plane) -> tuple[Field, Field, Field]:
    """Find the two nearest of random points, of which each unit square holds one.

    Args:
        p: the plane.

    Returns:
        The distance to the nearest point, the distance to the second nearest, and a random number in [0, 1) that
        belongs to the nearest point; all ``(h, w)``.
    """
    table = p.rng.random((3, 64, 64), dtype=np.float32)
    row, column = np.floor(p.y), np.floor(p.x)
    first, second, value = np.full_like(p.x, 9.0), np.full_like(p.x, 9.0), np.zeros_like(p.x)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            at = np.mod(row + i, 64).astype(np.intp), np.mod(column + j, 64).astype(np.intp)
            dx = column + j + 0.1 + 0.8 * table[0][at] - p.x
            dy = row + i + 0.1 + 0.8 * table[1][at] - p.y
            d = np.hypot(dx, dy)
            second = np.minimum(second, np.maximum(d, first))
            value = np.where(d < first, table[2][at], value)
            first = np.minimum(first, d)
    return first, second, value
