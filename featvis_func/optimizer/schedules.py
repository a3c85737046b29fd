"""Learning rate schedules, as functions of the step."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from featvis_func.validation import check_float, check_int

Schedule = Callable[[Tensor], Tensor]
"""Step, int64 counted from 0 -> learning rate, float of the same shape."""


def constant(rate: float) -> Schedule:
    """Constant learning rate.

    Args:
        rate: above 0.

    Raises:
        ValueError: if ``rate`` is not above 0 or not finite.

    >>> constant(0.5)(torch.tensor([0, 10]))
    tensor([0.5000, 0.5000])
    """
    rate = check_float("the learning rate", rate, above=0)
    return lambda step: torch.full_like(step, rate, dtype=torch.float32)


def linear_decay(start: float, end: float, steps: int) -> Schedule:
    """Linear decay from ``start`` to ``end``, and ``end`` after that.

    Args:
        start: learning rate at step 0, above 0.
        end: learning rate from step ``steps`` on, at least 0.
        steps: duration of the decay in steps, at least 1.

    Raises:
        ValueError: if an argument is outside of its range.

    >>> linear_decay(0.4, 0.2, 10)(torch.tensor([0, 5, 10, 20]))
    tensor([0.4000, 0.3000, 0.2000, 0.2000])
    """
    _check_decay(start, end, steps)
    return lambda step: start + (end - start) * (step.float() / steps).clamp_max(1.0)


def cosine_decay(start: float, end: float, steps: int) -> Schedule:
    """Cosine decay from ``start`` to ``end``, and ``end`` after that.

    ``end + (start - end) * (1 + cos(pi * step / steps)) / 2``.

    Args:
        start: learning rate at step 0, above 0.
        end: learning rate from step ``steps`` on, at least 0.
        steps: duration of the decay in steps, at least 1.

    Raises:
        ValueError: if an argument is outside of its range.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5, without restarts. Equal to torch's
    ``CosineAnnealingLR`` up to ``steps``, after which that one increases again.

    >>> cosine_decay(0.4, 0.2, 10)(torch.tensor([0, 5, 10, 20]))
    tensor([0.4000, 0.3000, 0.2000, 0.2000])
    """
    _check_decay(start, end, steps)
    return lambda step: end + (start - end) * 0.5 * (1.0 + torch.cos(math.pi * (step.float() / steps).clamp_max(1.0)))


def exponential_decay(start: float, factor: float, *, steps: int = 1) -> Schedule:
    """Exponential decay by ``factor`` every ``steps`` steps: ``start * factor**(step / steps)``.

    Args:
        start: learning rate at step 0, above 0.
        factor: in ``(0, 1]``.
        steps: number of steps over which the rate decays by ``factor``, at least 1.

    Raises:
        ValueError: if an argument is outside of its range.

    Source: with ``steps=1``, torch's ``ExponentialLR``.

    >>> exponential_decay(0.4, 0.5, steps=10)(torch.tensor([0, 10, 20]))
    tensor([0.4000, 0.2000, 0.1000])
    """
    if not (0 < start < math.inf and 0 < factor <= 1 and steps >= 1):
        raise ValueError(
            f"expected start > 0, 0 < factor <= 1 and steps >= 1, got start={start}, factor={factor} and steps={steps}"
        )
    return lambda step: start * torch.exp((step.float() / steps) * math.log(factor))


def warmup(rate: float | Schedule, steps: int) -> Schedule:
    """Linear warm-up to the initial rate of another schedule, followed by that schedule from its step 0.

    ``rate(0) * (step + 1) / (steps + 1)``, then ``rate(step - steps)``. The rate of the first step is above 0.

    Args:
        rate: the learning rate after the warm-up: a number above 0, or a schedule.
        steps: duration of the warm-up in steps, at least 1.

    Raises:
        ValueError: if an argument is outside of its range.

    >>> warmup(0.4, 3)(torch.tensor([0, 1, 2, 3, 4]))
    tensor([0.1000, 0.2000, 0.3000, 0.4000, 0.4000])
    """
    steps = check_int("warmup: steps", steps, 1)
    after = as_schedule(rate)

    def schedule(step: Tensor) -> Tensor:
        rising = after(torch.zeros_like(step)) * ((step + 1).float() / (steps + 1))
        return torch.where(step < steps, rising, after((step - steps).clamp_min(0)))

    return schedule


def piecewise(rates: Sequence[float | Schedule], boundaries: Sequence[int]) -> Schedule:
    """Sequence of learning rates or schedules: ``rates[i]`` from step ``boundaries[i - 1]`` on.

    Args:
        rates: numbers above 0, or schedules. Each schedule starts from its step 0 at the beginning of its segment.
        boundaries: steps at which the second, third, ... segment begins, strictly increasing, the first at least 1.

    Raises:
        ValueError: if there is not exactly one rate more than boundaries, the boundaries do not increase, or a rate is
            not above 0.

    Source: for numbers, torch's ``MultiStepLR``; for schedules, its ``SequentialLR``.

    >>> piecewise([0.4, 0.2, linear_decay(0.2, 0.1, 2)], [2, 4])(torch.tensor([1, 2, 4, 5, 6]))
    tensor([0.4000, 0.2000, 0.2000, 0.1500, 0.1000])
    """
    starts = (0, *boundaries)
    if len(rates) != len(starts):
        raise ValueError(
            f"piecewise expected one rate more than boundaries, got {len(rates)} rates and {len(boundaries)} boundaries"
        )
    if any(b <= a for a, b in itertools.pairwise(starts)):
        raise ValueError(f"boundaries must be at least 1 and strictly increasing, got {tuple(boundaries)}")
    parts = [as_schedule(rate) for rate in rates]

    def schedule(step: Tensor) -> Tensor:
        rate = parts[0](step)
        for start, part in zip(starts[1:], parts[1:], strict=True):
            rate = torch.where(step < start, rate, part((step - start).clamp_min(0)))
        return rate

    return schedule


def as_schedule(rate: float | Schedule) -> Schedule:
    """Return a schedule unchanged, and a number as a constant schedule."""
    return rate if callable(rate) else constant(rate)


def rate_at(rate: float | Schedule) -> Callable[[Tensor], Tensor | float]:
    """Return a function from step to learning rate, which for a fixed rate returns the Python number."""
    if callable(rate):
        return rate
    check_float("the learning rate", rate, above=0)
    return lambda step: rate


def _check_decay(start: float, end: float, steps: int) -> None:
    """Raise ValueError unless start and end are finite, start > 0, end >= 0 and steps >= 1."""
    if not (0 < start < math.inf and 0 <= end < math.inf and steps >= 1):
        raise ValueError(f"expected start > 0, end >= 0 and steps >= 1, got start={start}, end={end} and steps={steps}")
