"""What a user writes for an option, as what the library computes with."""

import operator
from collections.abc import Iterable
from typing import Any

from featvis_func import image as images
from featvis_func.random import key
from featvis_func.rendering.presets import OPTIMIZERS, default_optimizer, plain_optimizer, published_optimizer
from featvis_func.types import Optimizer
from featvis_func.validation import check_name

IMAGES = {
    "fourier": images.fourier,
    "pixel": images.pixel,
    "phase": images.phase,
    "laplacian_pyramid": images.laplacian_pyramid,
    "cppn": images.cppn,
    "alpha": images.alpha,
}
"""The parameterisations known by name."""


def whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number, of whatever integer type, as Python's own."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from error
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def seed_number(value: Any) -> int:
    """A seed that :func:`~featvis_func.random.key` takes."""
    seed = whole("seed", value)
    key(seed)  # which checks its range
    return seed


def whole_filters(filters: Iterable[int] | int) -> list[int]:
    """The filter numbers, of whatever kind, as a list."""
    try:
        # An array of no axes is a number, though it has the looks of an iterable.
        many = isinstance(filters, Iterable) and getattr(filters, "ndim", 1) != 0
        numbers = [operator.index(f) for f in (filters if many else [filters])]  # pyright: ignore
    except TypeError as error:
        raise ValueError(f"filters must be whole numbers, got {filters!r}") from error
    if not numbers:
        raise ValueError("no filters were asked for: the list is empty")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"filter {next(f for f in numbers if numbers.count(f) > 1)} is asked for more than once")
    return numbers


def optimizer_for(optimizer: str | Optimizer, lr: float | None, steps: int) -> Optimizer:
    """A preset by its name, or the user's own."""
    if isinstance(optimizer, Optimizer):
        if lr is not None:
            raise ValueError("lr= goes with an optimiser's name; give your own optimiser its learning rate yourself")
        return optimizer
    check_name("optimizer", optimizer, OPTIMIZERS)
    if optimizer == "default":
        return default_optimizer(steps, lr=lr)
    if optimizer == "published":
        return published_optimizer(lr=0.05 if lr is None else lr)
    return plain_optimizer(optimizer, lr=lr)
