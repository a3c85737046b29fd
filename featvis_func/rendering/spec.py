"""Objectives and families of objectives in one line of text, as the command line takes them.

::

    channel:LAYER[:NUMBERS]                          channels of a layer
    neuron:LAYER:CHANNELS@POSITION[;POSITION...]     channels at positions, such as 12@3,4;5,6 or (of tokens) 12@0
    logit:[LAYER:]CLASSES                            classes, by number or by name
    directions:LAYER:FILE[TENSOR][@POSITION][:NUMBERS]     the rows of a matrix in a file
    sae:LAYER:FILE[@POSITION][:NUMBERS]              the features of a sparse autoencoder, by its encoder

``NUMBERS`` are those of channels, rows or features, such as ``0-31,40``; without them, all. ``[TENSOR]`` is the name of
the tensor in a file of several. See :func:`~featvis_func.io.dictionary.read_dictionary` for the files.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from featvis_func.backbone.layers import OUTPUT
from featvis_func.backbone.listing import layer_shapes
from featvis_func.io.dictionary import Dictionary, read_dictionary
from featvis_func.io.filter_spec import filter_numbers
from featvis_func.models import Model
from featvis_func.models.copying import layer_modules
from featvis_func.objective import (
    Family,
    Objective,
    channel,
    directions,
    facets,
    feature_axis,
    logits,
    member,
    neurons,
    sae,
)
from featvis_func.objective.directions import SIMILARITIES
from featvis_func.validation import check_float, check_name, suggest

KINDS = ("channel", "neuron", "logit", "directions", "sae")
_NUMBERS = re.compile(r"all|\*|\d+(-\d+)?(\s*,\s*\d+(-\d+)?)*")
_POSITION = r"\d+(?:,\d+)*"
_FILE = re.compile(rf"(?P<file>.+?)(?:\[(?P<tensor>[^\[\]]*)\])?(?:@(?P<position>{_POSITION}))?")


class Selection(NamedTuple):
    """A family of objectives, and which of its members are meant."""

    objective: Objective
    filters: list[int] | None = None
    """``None``: all."""
    label: str | None = None
    """Under which a sweep stores them. Default: the family's own."""


def is_spec(text: str, model: Model) -> bool:
    """Whether a text is an objective rather than the name of a layer."""
    kind, colon, _ = text.partition(":")
    return bool(colon) and kind in KINDS and not any(name.endswith(kind) for name in layer_modules(model.module))


def parse_spec(
    text: str,
    model: Model,
    *,
    minus: str | None = None,
    copies: int | None = None,
    similarity: str | None = None,
) -> Selection:
    """Read an objective.

    Args:
        text: as above.
        model: that it belongs to.
        minus: what is subtracted: another objective, also with a factor, as in ``"0.5*channel:LAYER:7"``. With one
            number it is the same for all members, without any it has a member for each.
        copies: the number of different images of each member, see :func:`~featvis_func.objective.facets`.
        similarity: of directions, see :func:`~featvis_func.objective.direction`.

    Raises:
        ValueError: a text of another form, a file that cannot be read, or parts that do not fit the model's layers.

    >>> from featvis_func.models import load_model
    >>> parse_spec("neuron:head:3-4@0", load_model("texturenet")).objective.family.names
    ('3 at 0', '4 at 0')
    """
    weight, subtracted = (1.0, "") if minus is None else _split_factor(minus)
    objective, numbers = _read(text, model, similarity)
    words = ["--objective", _without_numbers(text, numbers)]
    if similarity is not None:
        if not any(spec.startswith("directions:") for spec in (text, subtracted)):
            raise ValueError(f"--similarity goes with directions, got {text!r}")
        words += ["--similarity", similarity]
    if minus is not None:
        other, which = _read(subtracted, model, similarity)
        if which is None and other.variants == 1:
            which = [0]
        if which is not None and len(which) > 1:
            raise ValueError(f"--minus takes one number, or none for a member each, got {minus!r}")
        other = other if which is None else member(other, which[0])
        objective = objective - (other if weight == 1.0 else weight * other)
        words += [f"--minus={minus}"] if minus.startswith("-") else ["--minus", minus]
    if copies is not None:
        objective = facets(objective, copies)
        words += ["--facets", str(copies)]
        numbers = None if numbers is None else [n * copies + i for n in numbers for i in range(copies)]
    if len(words) > 2 and objective.family is None:
        objective = replace(objective, family=Family(str(objective), {}))
    if objective.family is not None:
        objective = replace(objective, family=objective.family._replace(command=tuple(words)))
    return Selection(objective, numbers)


def _split_factor(text: str) -> tuple[float, str]:
    """The factor before an objective, or 1, and the objective.

    >>> _split_factor("0.5*channel:conv:7"), _split_factor("channel:conv")
    ((0.5, 'channel:conv:7'), (1.0, 'channel:conv'))
    """
    factor, star, rest = (part.strip() for part in text.partition("*"))
    if not star or factor.startswith(KINDS):  # a star among the numbers
        return 1.0, text.strip()
    return check_float("--minus: factor", factor), rest


def _width(layer: str, model: Model) -> int:
    shape = layer_shapes(model, [layer])[layer]
    return shape[feature_axis(shape)]


def _read(text: str, model: Model, similarity: str | None) -> tuple[Objective, list[int] | None]:
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS:
        hint = (
            suggest(kind, KINDS) if kind not in KINDS else f"; expected {kind}:..."
        ) or f"; expected one of {', '.join(f'{k}:...' for k in KINDS)}"
        raise ValueError(f"objective {text!r} has no kind {kind!r}{hint}")
    if similarity is not None:
        check_name("similarity", similarity, SIMILARITIES)
    if kind == "logit":
        return _read_logits(rest, model), None
    layer, rest = _split_layer(rest, model)
    if kind == "channel":
        return channel(layer), _numbers(text, rest) if rest else None
    if kind == "neuron":
        channels, at, places = rest.partition("@")
        positions = places.split(";")
        if not at or not all(re.fullmatch(_POSITION, place) for place in positions):
            raise ValueError(f"objective {text!r} must be neuron:LAYER:CHANNELS@POSITION, such as neuron:conv:12@3,4")
        numbers = _numbers(text, channels)
        numbers = range(_width(layer, model)) if numbers is None else numbers
        return neurons(layer, numbers, [_position(place) for place in positions]), None
    head, colon, tail = rest.rpartition(":")
    numbered = bool(colon) and _NUMBERS.fullmatch(tail.strip()) is not None
    numbers = _numbers(text, tail) if numbered else None
    parts = _FILE.fullmatch(head if numbered else rest)
    if parts is None:
        raise ValueError(
            f"objective {text!r} names no file; expected {kind}:LAYER:FILE, such as {kind}:conv:dict.safetensors"
        )
    dictionary = read_dictionary(parts["file"], parts["tensor"], width=_width(layer, model), layer=layer)
    position = None if parts["position"] is None else _position(parts["position"])
    if kind == "sae":
        return sae_of(layer, dictionary, position=position), numbers
    return directions(
        layer,
        dictionary.directions,
        similarity=similarity or "dot",  # type: ignore[arg-type]
        position=position,
        names=dictionary.names,
    ), numbers


def sae_of(layer: str, dictionary: Dictionary, *, position: tuple[int, ...] | None = None) -> Objective:
    """The features of a sparse autoencoder from a file, each by its own pre-activation.

    Raises:
        ValueError: the dictionary has no encoder.
    """
    if dictionary.encoder is None:
        raise ValueError(f"{dictionary.source} has no encoder; 'directions:' shows the rows of a dictionary")
    return sae(
        layer,
        dictionary.encoder,
        dictionary.encoder_bias,
        center=dictionary.center,
        normalize=dictionary.normalize,  # type: ignore[arg-type]
        position=position,
        names=dictionary.names,
    )


def _read_logits(rest: str, model: Model) -> Objective:
    """Classes: all of the text is one name, or names and numbers with commas between them."""
    layer, classes = OUTPUT, rest
    if rest not in model.categories and ":" in rest:
        layer, classes = _split_layer(rest, model)
    if classes in model.categories:
        return logits(layer, [classes], categories=model.categories)
    if _NUMBERS.fullmatch(classes.strip()) and classes.strip() not in ("all", "*"):
        return logits(layer, _numbers(rest, classes) or [], categories=model.categories)
    words = [word.strip() for word in classes.split(",")]
    names = [int(word) if word.isdecimal() and word not in model.categories else word for word in words]
    if not model.categories and not all(isinstance(name, int) for name in names):
        raise ValueError(f"{model.name} has no names of classes; give their numbers, got {classes!r}")
    return logits(layer, names, categories=model.categories)


def _split_layer(text: str, model: Model) -> tuple[str, str]:
    """The layer at the beginning of a text, which may contain colons itself, and the rest."""
    known = list(layer_modules(model.module))
    places = [i for i, letter in enumerate(text) if letter == ":"]
    for place in reversed(places):
        if any(name.endswith(text[:place]) for name in known):
            return text[:place], text[place + 1 :]
    layer, _, rest = text.partition(":")
    return layer, rest


def _numbers(text: str, numbers: str) -> list[int] | None:
    if not _NUMBERS.fullmatch(numbers.strip()):
        raise ValueError(f"objective {text!r}: {numbers!r} must be numbers and ranges such as '0-7,12', or 'all'")
    return None if numbers.strip() == "*" else filter_numbers(numbers.strip())


def _position(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _without_numbers(text: str, numbers: Sequence[int] | None) -> str:
    """A spec without the numbers at its end."""
    return text if numbers is None else text.rpartition(":")[0]
