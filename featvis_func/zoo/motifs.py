"""Texture patterns that repeat one motif in the cells of a lattice; see :mod:`featvis_func.zoo.plane`."""

import numpy as np

from featvis_func.zoo.plane import ACCENT, DARK, FORE, LIGHT, Layers, Plane, inside, lattice, triangle_wave


def dots(p: Plane) -> Layers:
    """Discs of one radius."""
    c = lattice(p)
    return [(inside(p, p.rng.uniform(0.24, 0.36) - c.r), FORE)]


def targets(p: Plane) -> Layers:
    """Concentric rings."""
    c = lattice(p)
    rings = 0.08 * np.sin(2 * np.pi * (c.r * p.rng.uniform(5.0, 6.5) + p.rng.random()))
    return [(inside(p, rings) * inside(p, 0.5 - c.r), FORE)]


def spirals(p: Plane) -> Layers:
    """One-armed spirals, all with the same handedness."""
    c = lattice(p, turn=3.1)
    hand = 1.0 if p.rng.random() < 0.5 else -1.0
    arm = 0.09 * np.sin(hand * c.angle + 2 * np.pi * c.r * p.rng.uniform(4.5, 5.5))
    return [(inside(p, arm) * inside(p, 0.5 - c.r), FORE)]


def rays(p: Plane) -> Layers:
    """Sunbursts: wedges around a hub."""
    c = lattice(p, turn=0.3)
    fan = c.r * np.sin(c.angle * int(p.rng.integers(8, 11))) * 0.15
    return [(inside(p, fan) * inside(p, 0.52 - c.r), FORE), (inside(p, 0.09 - c.r), ACCENT)]


def stars(p: Plane) -> Layers:
    """Five-pointed stars."""
    c = lattice(p, turn=0.5, wobble=0.1)
    sector = np.abs(np.mod(c.angle + np.pi / 2, 2 * np.pi / 5) - np.pi / 5)  # 0 between points, pi/5 on one
    # The edge of a star runs from the tip (radius 0.44) to the notch (radius 0.18): a line in the sector.
    u, v = c.r * np.cos(np.pi / 5 - sector), c.r * np.sin(np.pi / 5 - sector)
    notch_u, notch_v = 0.18 * np.cos(np.pi / 5), 0.18 * np.sin(np.pi / 5)
    d = (notch_v * (0.44 - u) - v * (0.44 - notch_u)) / np.hypot(notch_v, 0.44 - notch_u)
    return [(inside(p, d), FORE)]


def crosses(p: Plane) -> Layers:
    """Plus signs."""
    c = lattice(p, turn=0.2)
    short, long = np.minimum(np.abs(c.x), np.abs(c.y)), np.maximum(np.abs(c.x), np.abs(c.y))
    return [(inside(p, np.minimum(p.rng.uniform(0.09, 0.13) - short, 0.38 - long)), FORE)]


def hearts(p: Plane) -> Layers:
    """Heart shapes."""
    c = lattice(p, turn=0.25)
    x, y = c.x * 2.6, -c.y * 2.6 + 0.12
    lobe = y - 0.75 * np.sqrt(np.abs(x) + 1e-4)
    return [(inside(p, (0.85 - np.hypot(x, lobe + 0.1)) * 0.3), FORE)]


def flowers(p: Plane) -> Layers:
    """Flowers of five to seven petals around a centre."""
    c = lattice(p, turn=3.1)
    petals = int(p.rng.integers(5, 8))
    d = 0.33 + 0.11 * np.cos(c.angle * petals) - c.r
    return [(inside(p, d), FORE), (0.6 * inside(p, 0.2 - c.r), DARK), (inside(p, 0.12 - c.r), ACCENT)]


def leaves(p: Plane) -> Layers:
    """Pointed leaves with veins."""
    c = lattice(p, turn=0.5)
    half = np.hypot(np.abs(c.x) + 0.3, c.y)
    blade = inside(p, 0.54 - half)
    side = triangle_wave((c.y + 0.7 * np.abs(c.x)) * 7.0) / 7.0
    vein = np.maximum(inside(p, 0.018 - np.abs(c.x)), inside(p, 0.012 - side))
    return [(blade, FORE), (0.8 * blade * vein, LIGHT)]


def moons(p: Plane) -> Layers:
    """Crescents."""
    c = lattice(p, turn=0.5)
    bite = np.hypot(c.x - 0.17, c.y - 0.05)
    return [(inside(p, np.minimum(0.4 - c.r, bite - 0.32)), FORE)]


def eyes(p: Plane) -> Layers:
    """Lidded eyes: white, iris, pupil and glint."""
    c = lattice(p._replace(y=p.y * 1.4), turn=0.15)
    y, iris = c.y / 1.4, p.rng.uniform(0.2, 0.25)
    lid = 0.56 - np.hypot(c.x, np.abs(y) + 0.28)
    white = inside(p, lid)
    r = np.hypot(c.x, y)
    return [
        (inside(p, lid + 0.05), DARK),
        (white, LIGHT),
        (white * inside(p, iris - r), FORE),
        (0.5 * white * inside(p, 0.03 - np.abs(r - iris)), DARK),
        (white * inside(p, 0.11 - r), DARK),
        (white * inside(p, 0.04 - np.hypot(c.x + 0.06, y + 0.07)), LIGHT),
    ]


def bubbles(p: Plane) -> Layers:
    """Balls with a shaded rim and a glint."""
    c = lattice(p, wobble=0.1)
    radius = 0.36 + 0.1 * c.random
    ball = inside(p, radius - c.r)
    shade = np.clip(np.hypot(c.x + 0.12, c.y + 0.14) / radius - 0.2, 0.0, 1.0)
    glint = np.clip(1.0 - np.hypot(c.x + 0.13, c.y + 0.15) / 0.13, 0.0, 1.0)
    return [(ball, FORE), (0.85 * ball * shade, DARK), (ball * np.sqrt(glint), LIGHT)]
