"""Table of the texture classes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from featvis_func.zoo import motifs, tilings
from featvis_func.zoo.plane import Layers, Plane


class Pattern(NamedTuple):
    """Definition of a texture class."""

    layers: Callable[[Plane], Layers]
    period: tuple[float, float]  # range, in pixels
    tilt: float  # largest rotation in either direction, in radians
    colours: str  # typical colours of background, foreground and accent, as hexadecimal RGB


PATTERNS: dict[str, Pattern] = {
    "stripes": Pattern(tilings.stripes, (8, 18), np.pi, "f4ead5 c0392b 2c3e50"),
    "ripples": Pattern(tilings.ripples, (10, 20), np.pi, "d7f0f5 1f78b4 0b3954"),
    "zigzag": Pattern(tilings.zigzag, (11, 20), np.pi, "fff3b0 e09f3e 9e2a2b"),
    "checks": Pattern(tilings.checks, (9, 18), np.pi, "f8f8f8 202020 888888"),
    "plaid": Pattern(tilings.plaid, (18, 32), 0.5, "a4161a 0b2d1f f5cb5c"),
    "mesh": Pattern(tilings.mesh, (10, 20), np.pi, "16324f 9fd3e8 ffffff"),
    "diamonds": Pattern(tilings.diamonds, (16, 28), 0.3, "5b8c5a e3d8b4 8e2f3c"),
    "triangles": Pattern(tilings.triangles, (14, 26), np.pi, "f2c14e 4d9078 5b1a18"),
    "honeycomb": Pattern(tilings.honeycomb, (13, 24), np.pi, "f6b01e 6b3e07 fde8a9"),
    "bricks": Pattern(tilings.bricks, (9, 16), 0.3, "e3d9cc a63c28 7a2b1c"),
    "weave": Pattern(tilings.weave, (9, 16), 0.4, "5c3d1e c99a5b 8a5a2b"),
    "scales": Pattern(tilings.scales, (16, 30), 0.4, "0b6e4f 139a74 e9f5db"),
    "dots": Pattern(motifs.dots, (11, 24), np.pi, "fdf0f0 e63973 333333"),
    "targets": Pattern(motifs.targets, (36, 56), np.pi, "ffffff d7263d 1b998b"),
    "spirals": Pattern(motifs.spirals, (34, 52), np.pi, "f7e9f5 7b2cbf 3c096c"),
    "rays": Pattern(motifs.rays, (34, 52), np.pi, "cfe8ff ff9f1c ffea00"),
    "stars": Pattern(motifs.stars, (20, 34), 0.5, "14213d fcd34d ffffff"),
    "crosses": Pattern(motifs.crosses, (16, 28), 0.8, "e8f1f2 13808a 006494"),
    "hearts": Pattern(motifs.hearts, (19, 32), 0.3, "ffe5ec e5095a ffffff"),
    "flowers": Pattern(motifs.flowers, (24, 38), np.pi, "2d6a4f ff8fc7 ffd60a"),
    "leaves": Pattern(motifs.leaves, (24, 38), 0.5, "e8f0d0 2f8f2f 1b4d1b"),
    "moons": Pattern(motifs.moons, (20, 32), 0.4, "240046 f1e3a4 ffffff"),
    "eyes": Pattern(motifs.eyes, (32, 50), 0.25, "d9a07e 3f8fd0 7a4b32"),
    "bubbles": Pattern(motifs.bubbles, (18, 32), 0.4, "d8f3ff 3aa0e0 ffffff"),
    "chain": Pattern(tilings.chain, (22, 34), np.pi, "3a3f47 c9ced6 ffffff"),
    "voronoi": Pattern(tilings.voronoi, (15, 28), np.pi, "c9b79c 7d8c5c 000000"),
    "leopard": Pattern(tilings.leopard, (15, 26), np.pi, "e0b15e 9a5b1f 000000"),
    "labyrinth": Pattern(tilings.labyrinth, (10, 18), np.pi, "101820 f2f2f2 888888"),
    "fur": Pattern(tilings.fur, (10, 16), np.pi, "6b3410 e08e3c 000000"),
    "wood": Pattern(tilings.wood, (10, 22), 0.3, "dba766 7c4a1e 000000"),
    "clouds": Pattern(tilings.clouds, (20, 40), np.pi, "3b7dd8 f4f8fc 000000"),
    "marble": Pattern(tilings.marble, (24, 40), np.pi, "eeeeea 4c5560 8f9aa0"),
}
