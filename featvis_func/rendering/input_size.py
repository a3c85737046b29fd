"""The size of the images and the model's input size, of as many sides as the model's input has."""

import warnings
from typing import NamedTuple

from featvis_func.backbone.features import Features
from featvis_func.models import Model


class Kind(NamedTuple):
    """What a model takes, by the number of sides of its input."""

    plural: str
    axes: str
    """The sides by their letters."""
    forms: str
    """What ``size=`` may be."""


KINDS = {
    1: Kind("signals", "t", "N samples or (t,)"),
    2: Kind("images", "h, w", "N pixels or (h, w)"),
    3: Kind("videos", "t, h, w", "N pixels, (h, w) or (t, h, w)"),
}


def by(sides: tuple[int, ...]) -> str:
    """A size for people.

    >>> by((16, 112, 112))
    '16 x 112 x 112'
    """
    return " x ".join(map(str, sides))


def image_size(size: int | tuple[int, ...] | None, model: Model) -> tuple[int, ...]:
    """The size of the images that ``size=`` means for a model.

    One number is the side of a square, or the length of a signal; for a video, one number and ``(h, w)`` leave out the
    number of frames, which is the model's.

    Raises:
        ValueError: a size of another number of sides than the model's input.

    >>> from featvis_func.models import load_model
    >>> video = load_model("texturenet")._replace(size=(16, 112, 112))
    >>> image_size(64, video), image_size((48, 64), video), image_size((8, 64, 64), video), image_size(None, video)
    ((16, 64, 64), (16, 48, 64), (8, 64, 64), (16, 112, 112))
    """
    if size is None:
        return model.size
    axes = len(model.size)
    sides = size if isinstance(size, tuple) else (size,) * min(axes, 2)
    if axes == 3 and len(sides) == 2:
        sides = (model.size[0], *sides)
    if len(sides) != axes:
        kind = KINDS[axes]
        raise ValueError(f"{model.name} takes {kind.plural}, whose size is {kind.forms}, got size={size}")
    return sides


def with_input_size(
    model: Model, size: int | tuple[int, ...] | None, features: Features | None = None, *, stacklevel: int = 4
) -> Model:
    """The model with the input size that it is rendered at, where none was known.

    A size that was assumed when the model was loaded is replaced by that for which the features were made, or else by
    ``size=``. What is neither known nor stated stays as it was assumed, with one warning.

    Args:
        model: from :func:`~featvis_func.load_model`.
        size: ``size=`` of the rendering, checked.
        features: of the model, if they were made before: the size for which they hold is that of the input.
        stacklevel: for the warning: 1 is this function.

    Returns:
        A model whose size counts as known.
    """
    if features is not None and features.size is not None:
        return _known(model, features.size)
    if "size" not in model.assumed:
        return model
    axes = len(model.size)
    if axes == 3 and size is not None and not (isinstance(size, tuple) and len(size) != 2):
        warnings.warn(
            f"the number of frames that {model.name} takes is not known: {model.size[0]} was assumed; state it by"
            f" size=(t, h, w)",
            stacklevel=stacklevel,
        )
        return _known(model, image_size(size, model))
    if size is None:
        warnings.warn(
            f"the input size of {model.name} is not known: {by(model.size)} was assumed; state it by size=, here or of"
            f" load_model",
            stacklevel=stacklevel,
        )
        return _known(model, model.size)
    # A tuple states the number of sides as well, which was also only assumed.
    return _known(model, size if isinstance(size, tuple) else image_size(size, model))


def _known(model: Model, size: tuple[int, ...]) -> Model:
    return model._replace(size=tuple(size), assumed=tuple(what for what in model.assumed if what != "size"))


def warn_if_stretched(image: tuple[int, ...], model: Model, *, stacklevel: int = 4) -> None:
    """Warn if resizing images to the model's input size changes their aspect ratio by more than rounding to pixels.

    Args:
        image: size of the images, of as many sides as the model's input.
        model: for its name and input size.
        stacklevel: for the warning: 1 is this function.
    """
    (h, w), (input_h, input_w) = image[-2:], model.size[-2:]
    # By how many pixels a side, the one for which this is less, differs from that of the model's aspect ratio.
    if abs(h * input_w - w * input_h) / max(input_h, input_w) > 1:
        warnings.warn(
            f"images of {by(image)} are stretched to the input of {model.name}, {by(model.size)}, which has another"
            f" aspect ratio",
            stacklevel=stacklevel,
        )
