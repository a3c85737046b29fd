"""The normalisation of a model's input: what the user states, what a module does itself, and what is assumed."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from featvis_func.models.base import IMAGENET_MEAN, IMAGENET_STD, Model
from featvis_func.validation import warn_caller

# Names under which modules keep the mean and the standard deviation that they normalise images with.
_NAMES = (("mean", "std"), ("image_mean", "image_std"), ("pixel_mean", "pixel_std"))
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def default_normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation that are assumed: ImageNet's for 3 channels, otherwise 0 and 1.

    >>> default_normalisation(1)
    ((0.0,), (1.0,))
    """
    return (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.0,) * channels, (1.0,) * channels)


def warn_assumed(name: str, mean: Sequence[float], std: Sequence[float], reason: str = "") -> None:
    """Warn that the normalisation of a model is not known, with what is assumed instead."""
    whose = "ImageNet's " if (tuple(mean), tuple(std)) == (IMAGENET_MEAN, IMAGENET_STD) else ""
    warn_caller(
        f"{reason or f'{name} does not say how its input is normalised'}: assuming {whose}mean {_write(mean)} and std"
        f" {_write(std)}; state mean= and std= (--mean and --std), or value_range=(0, 1) where it takes images in"
        f" [0, 1] as they are"
    )


class Stated(NamedTuple):
    """The normalisation as a user states it. Make one with :func:`check_normalisation`."""

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    value_range: tuple[float, float] | None

    @property
    def any(self) -> bool:
        """Whether anything is stated."""
        return self != (None, None, None)

    @property
    def channels(self) -> int | None:
        """The number of channels, if ``mean`` or ``std`` tells it."""
        return next((len(values) for values in (self.mean, self.std) if values is not None), None)


def check_normalisation(mean: Any, std: Any, value_range: Any) -> Stated:
    """Check a normalisation.

    Args:
        mean: mean per channel, or ``None``.
        std: standard deviation per channel, or ``None``.
        value_range: ``(lo, hi)``, or ``None``.

    Raises:
        ValueError: If ``mean`` and ``std`` differ in length, are empty or not finite, if a ``std`` is not positive, or
            if ``value_range`` is not an increasing pair.

    >>> check_normalisation(None, None, (1, -1))
    Traceback (most recent call last):
        ...
    ValueError: value_range must be two numbers (lo, hi) with lo < hi, got (1, -1)
    """
    means, stds, bounds = (_numbers(values) for values in (mean, std, value_range))
    given = [values for values in (means, stds) if values is not None]
    if (
        (mean is not None and means is None)
        or (std is not None and stds is None)
        or len({len(values) for values in given}) > 1
        or not all(given)
        or not all(s > 0 for s in stds or ())
    ):
        raise ValueError(
            f"the normalisation needs one mean and one std above 0 per channel, got mean {mean}, std {std}"
        )
    if value_range is not None and (bounds is None or len(bounds) != 2 or not bounds[0] < bounds[1]):
        raise ValueError(f"value_range must be two numbers (lo, hi) with lo < hi, got {value_range!r}")
    return Stated(means, stds, None if bounds is None else (bounds[0], bounds[1]))


def with_normalisation(model: Model, stated: Stated) -> Model:
    """Replace what a user states of the normalisation of a model.

    If only one of ``mean`` and ``std`` is stated, the model keeps the other. Where that is not known, it is assumed,
    and a warning says so. With a ``value_range``, in whose units they are, the module receives
    ``(lo + (hi - lo) * image - mean) / std``, and they are 0 and 1 unless stated.

    Returns:
        The model with the new normalisation, for images in ``[0, 1]``.

    >>> model = Model(nn.Identity(), "one", (0.5,), (0.5,), (8, 8))
    >>> with_normalisation(model, Stated(None, None, (-1.0, 1.0)))[2:4]
    ((0.5,), (0.5,))
    >>> with_normalisation(model, Stated((51.0,), (51.0,), (0.0, 255.0)))[2:4]
    ((0.2,), (0.2,))
    """
    if not stated.any:
        return model
    channels = stated.channels or model.channels
    neutral = (0.0,) * channels, (1.0,) * channels
    assumed = [name for name in model.assumed if name != "normalisation"]
    if stated.channels is not None:
        assumed = [name for name in assumed if name != "channels"]
    if stated.value_range is not None:
        low, high = stated.value_range
        mean = tuple((m - low) / (high - low) for m in stated.mean or neutral[0])
        std = tuple(s / (high - low) for s in stated.std or neutral[1])
        return model._replace(mean=mean, std=std, assumed=tuple(assumed))
    present = (model.mean, model.std) if model.channels == channels else neutral
    mean, std = stated.mean or present[0], stated.std or present[1]
    known = model.channels == channels and "normalisation" not in model.assumed
    if not known and (stated.mean is None or stated.std is None):
        assumed.append("normalisation")
        half, other, value = ("mean", "std", std) if stated.std is None else ("std", "mean", mean)
        warn_caller(f"{model.name} is given {half}= without {other}=: assuming {other} {_write(value)}; state both")
    return model._replace(mean=mean, std=std, assumed=tuple(assumed))


def normalises_itself(module: nn.Module, channels: int) -> bool:
    """Return whether a module holds the mean and the standard deviation of images of so many channels.

    Such modules, among them torchvision's detectors and ``torchvision.transforms.Normalize``, take images in
    ``[0, 1]``. Parameters that are trained belong to a normalisation layer.

    >>> from torchvision.transforms import Normalize
    >>> normalises_itself(nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), nn.Conv2d(3, 4, 3)), 3)
    True
    """
    return any(True for child in module.modules() if not isinstance(child, _NORMS) for _ in _held(child, channels))


def _held(module: nn.Module, channels: int) -> Iterator[tuple[str, str]]:
    for names in _NAMES:
        try:
            values = [getattr(module, name, None) for name in names]
        except Exception:  # A property of the user's module may raise any.
            continue
        if all(_is_per_channel(value, channels) for value in values):
            yield names


def _is_per_channel(value: Any, channels: int) -> bool:
    if isinstance(value, nn.Parameter) and value.requires_grad:
        return False
    if isinstance(value, tuple | list):
        return len(value) == channels and all(isinstance(v, int | float) for v in value)
    if hasattr(value, "shape") and not isinstance(value, nn.Module):
        shape = tuple(value.shape)
        return len(shape) > 0 and math.prod(shape) == max(shape) == channels
    return False


def _numbers(values: Any) -> tuple[float, ...] | None:
    """Return finite numbers of any type as floats, or ``None`` for anything else."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, RuntimeError):
        return None
    return numbers if all(map(math.isfinite, numbers)) and not isinstance(values, str) else None


def _write(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)}{',' if len(values) == 1 else ''})"
