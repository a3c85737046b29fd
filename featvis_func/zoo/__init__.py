"""TextureNet, a small classifier of procedural textures shipped with the package, and its data set."""

from featvis_func.zoo.texturenet import MEAN, SIZE, STD, TextureNet, normalise, texturenet
from featvis_func.zoo.textures import CLASSES, texture, texture_batch

__all__ = [
    "CLASSES",
    "MEAN",
    "SIZE",
    "STD",
    "TextureNet",
    "normalise",
    "texture",
    "texture_batch",
    "texturenet",
]
