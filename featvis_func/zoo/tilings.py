"""Texture patterns that fill the plane: bands, nets, tiles and random fields; see :mod:`featvis_func.zoo.plane`."""

import numpy as np

from featvis_func.zoo.plane import (
    ACCENT,
    DARK,
    FORE,
    LIGHT,
    Field,
    Layers,
    Plane,
    inside,
    lattice,
    nearest,
    triangle_wave,
    waves,
)


def _bands(p: Plane, x: Field) -> Layers:
    """Bands perpendicular to ``x``, in some images with thin lines between them."""
    duty = p.rng.uniform(0.16, 0.3)
    layers = [(inside(p, duty - triangle_wave(x)), FORE)]
    if p.rng.random() < 0.35:
        layers.append((inside(p, 0.06 - triangle_wave(x + 0.5)), ACCENT))
    return layers


def stripes(p: Plane) -> Layers:
    """Straight bands."""
    return _bands(p, p.x)


def ripples(p: Plane) -> Layers:
    """Bands bent to sine waves."""
    bend = p.rng.uniform(0.25, 0.45) * np.sin(2 * np.pi * p.y / p.rng.uniform(1.6, 2.4))
    return _bands(p, p.x + bend)


def zigzag(p: Plane) -> Layers:
    """Bands bent to chevrons."""
    return _bands(p, p.x + p.rng.uniform(1.2, 2.2) * triangle_wave(p.y / p.rng.uniform(1.4, 2.0)))


def checks(p: Plane) -> Layers:
    """A chessboard."""
    return [(inside(p, 0.32 * np.sin(np.pi * p.x) * np.sin(np.pi * p.y)), FORE)]


def plaid(p: Plane) -> Layers:
    """Crossing half-transparent bands with thin lines between them."""
    duty, thin = p.rng.uniform(0.16, 0.24), np.float32(0.9)
    layers: Layers = [(0.5 * inside(p, duty - triangle_wave(c)), FORE) for c in (p.x, p.y)]
    return layers + [(thin * inside(p, 0.035 - triangle_wave(c + 0.5)), ACCENT) for c in (p.x, p.y)]


def mesh(p: Plane) -> Layers:
    """A square net."""
    width = p.rng.uniform(0.06, 0.1)
    return [(inside(p, width - np.minimum(triangle_wave(p.x), triangle_wave(p.y))), FORE)]


def diamonds(p: Plane) -> Layers:
    """Argyle: a slanted chessboard under thin lines."""
    u, v = p.x + 0.6 * p.y, p.x - 0.6 * p.y
    line = np.minimum(triangle_wave(u + 0.25), triangle_wave(v + 0.25))
    return [
        (inside(p, 0.3 * np.sin(np.pi * u) * np.sin(np.pi * v)), FORE),
        (inside(p, 0.03 - line), ACCENT),
    ]


def triangles(p: Plane) -> Layers:
    """Equilateral triangles in two colours."""
    h = p.y / 0.866
    a, b = p.x + 0.5 * h, p.x - 0.5 * h
    parity = np.mod(np.floor(h) + np.floor(a) + np.floor(b), 2) * 2 - 1
    near = np.minimum(np.minimum(triangle_wave(h), triangle_wave(a)), triangle_wave(b))
    return [(inside(p, parity * near), FORE)]


def honeycomb(p: Plane) -> Layers:
    """Hexagonal cells, each with a fainter core."""
    best, second = np.full_like(p.x, 9.0), np.full_like(p.x, 9.0)
    for shift in (0.0, 0.5):  # a hexagonal lattice is two rectangular ones
        dx = p.x - shift - np.round(p.x - shift)
        y = p.y - shift * 1.732
        dy = y - 1.732 * np.round(y / 1.732)
        ax, ay = np.abs(dx), np.abs(dy)
        d = np.maximum(ax, 0.5 * ax + 0.866 * ay)
        second = np.minimum(second, np.maximum(d, best))
        best = np.minimum(best, d)
    width = p.rng.uniform(0.06, 0.1)
    return [(inside(p, width - (0.5 - best)), FORE), (0.5 * inside(p, 0.14 - best), ACCENT)]


def bricks(p: Plane) -> Layers:
    """Staggered bricks of varying darkness in light mortar."""
    c = lattice(p._replace(x=p.x / 1.9))
    joint = np.minimum((0.5 - np.abs(c.x)) * 1.9, 0.5 - np.abs(c.y)) - p.rng.uniform(0.06, 0.1)
    face = inside(p, joint)
    return [(face, FORE), (0.5 * c.random * face, DARK)]


def weave(p: Plane) -> Layers:
    """Interwoven strands, lightest where they pass over others."""
    c = lattice(p, stagger=0.0)
    odd = np.mod(np.floor(p.x) + np.floor(p.y), 2) > 0.5
    transverse, along = np.where(odd, c.x, c.y), np.where(odd, c.y, c.x)
    strand = inside(p, 0.42 - np.abs(transverse))
    shade = np.clip(1.0 - 2.2 * np.abs(along), 0.0, 1.0)
    return [(np.ones_like(p.x), DARK), (strand, FORE), (0.6 * strand * shade, LIGHT)]


def scales(p: Plane) -> Layers:
    """Overlapping round scales, with a dark rim and a light core."""
    radius = 0.57
    covered, rim, glow = np.zeros_like(p.x), np.zeros_like(p.x), np.zeros_like(p.x)
    row = np.floor(2 * p.y)
    for k in (-1, 0, 1):  # upper rows lie over lower ones
        shift = 0.5 * np.mod(row + k, 2)
        dx = p.x - shift - np.round(p.x - shift)
        r = np.hypot(dx, p.y - (row + k) / 2)
        own = np.where(covered > 0.5, 0.0, (r < radius).astype(np.float32))
        rim = rim + own * inside(p, r - (radius - 0.09))
        glow = glow + own * np.clip(1.0 - r / radius, 0.0, 1.0)
        covered = covered + own
    return [(np.ones_like(p.x), FORE), (0.8 * glow, LIGHT), (rim, DARK)]


def chain(p: Plane) -> Layers:
    """Interlocking rings."""
    layers: Layers = []
    for shift in (0.0, 0.5):
        x, y = p.x - shift, p.y - shift
        r = np.hypot(x - np.round(x), y - np.round(y))
        layers += [(inside(p, 0.1 - np.abs(r - 0.38)), DARK), (inside(p, 0.06 - np.abs(r - 0.38)), FORE)]
    return layers


def voronoi(p: Plane) -> Layers:
    """Voronoi cells of random points, with dark joints."""
    first, second, value = nearest(p)
    return [(value, FORE), (inside(p, p.rng.uniform(0.08, 0.13) - (second - first)), DARK)]


def leopard(p: Plane) -> Layers:
    """Rosettes: broken rings around spots."""
    first, _, value = nearest(p)
    uneven = 0.35 * waves(p, 6, 0.8, 1.6)
    r = first * (1.0 + 0.4 * uneven)
    ring = inside(p, 0.1 - np.abs(r - 0.29)) * inside(p, uneven + 0.3)
    return [(inside(p, 0.27 - r), FORE), (ring, DARK), (0.2 * value, LIGHT)]


def labyrinth(p: Plane) -> Layers:
    """Labyrinth stripes: the sign of a random field with a narrow band of wavelengths."""
    return [(inside(p, 0.25 * waves(p, 16, 0.75, 0.9)), FORE)]


def fur(p: Plane) -> Layers:
    """Long wavy strands."""
    bent = p._replace(x=p.x + 0.35 * waves(p, 3, 0.12, 0.25), y=p.y)
    hair = waves(bent._replace(x=bent.y, y=bent.x * 2.0), 24, 0.9, 2.4, stretch=9.0)
    return [(np.clip(0.5 + 0.55 * hair, 0, 1), FORE), (np.clip(0.8 * hair - 0.9, 0, 1), LIGHT)]


def wood(p: Plane) -> Layers:
    """Wood grain: annual rings cut lengthwise, with pores."""
    rings = p.x + 0.9 * waves(p._replace(x=p.y, y=p.x), 5, 0.1, 0.3, stretch=4.0)
    saw = np.mod(rings, 1.0)
    pores = waves(p._replace(x=p.y, y=p.x), 8, 2.5, 4.0, stretch=12.0)
    return [(saw * saw, FORE), (np.clip(0.25 * pores, 0, 0.4), DARK)]


def clouds(p: Plane) -> Layers:
    """A random field over a wide range of wavelengths."""
    return [(np.clip(0.5 + 0.5 * waves(p, 24, 0.2, 2.2), 0, 1), FORE)]


def marble(p: Plane) -> Layers:
    """Thin veins along the zeros of a random field over a wide range of wavelengths."""
    vein = np.abs(waves(p, 20, 0.3, 1.6))
    return [(np.clip(1.0 - vein * 3.0, 0, 1) ** 2, FORE), (np.clip(0.3 - 0.2 * vein, 0, 1), ACCENT)]
