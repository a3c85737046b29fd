"""Learning rates as functions of the step."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]
"""The number of the step, int64 from 0 -> learning rate, float of the same shape."""


def constant(rate: float) -> Schedule:
    """The same learning rate at every step.

    Args:
        rate: above 0.

    Raises:
        ValueError: ``rate`` is not above 0.

    >>> constant(0.5)(torch.tensor([0, 10]))
    tensor([0.5000, 0.5000])
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"the learning rate must be finite and above 0, got {rate}")
    return lambda step: torch.full_like(step, rate, dtype=torch.float32)


def linear_decay(start: float, end: float, steps: int) -> Schedule:
    """A learning rate that falls along a line, and stays at its end after that.

    Args:
        start: at the first step, above 0.
        end: from step ``steps`` on, at least 0.
        steps: how many steps the fall takes, at least 1.

    Raises:
        ValueError: a number outside of these.

    >>> linear_decay(0.4, 0.2, 10)(torch.tensor([0, 5, 10, 20]))
    tensor([0.4000, 0.3000, 0.2000, 0.2000])
    """
    _check_fall(start, end, steps)
    return lambda step: start + (end - start) * (step / steps).clamp_max(1.0)


def cosine_decay(start: float, end: float, steps: int) -> Schedule:
    """A learning rate that falls along half a cosine, and stays at its end after that.

    ``end + (start - end) * (1 + cos(pi * step / steps)) / 2``.

    Args:
        start: at the first step, above 0.
        end: from step ``steps`` on, at least 0.
        steps: how many steps the fall takes, at least 1.

    Raises:
        ValueError: a number outside of these.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5, without restarts; torch's ``CosineAnnealingLR`` up to
    ``steps``, where it turns and rises again.

    >>> cosine_decay(0.4, 0.2, 10)(torch.tensor([0, 5, 10, 20]))
    tensor([0.4000, 0.3000, 0.2000, 0.2000])
    """
    _check_fall(start, end, steps)
    return lambda step: end + (start - end) * 0.5 * (1.0 + torch.cos(math.pi * (step / steps).clamp_max(1.0)))


def exponential_decay(start: float, factor: float, *, steps: int = 1) -> Schedule:
    """A learning rate that shrinks by a factor in every ``steps`` steps: ``start * factor**(step / steps)``.

    Args:
        start: at the first step, above 0.
        factor: in ``(0, 1]``.
        steps: how many steps the factor takes, at least 1.

    Raises:
        ValueError: a number outside of these.

    Source: with one step, torch's ``ExponentialLR``.

    >>> exponential_decay(0.4, 0.5, steps=10)(torch.tensor([0, 10, 20]))
    tensor([0.4000, 0.2000, 0.1000])
    """
    if not (0 < start < math.inf and 0 < factor <= 1 and steps >= 1):
        raise ValueError(f"expected start > 0, a factor in (0, 1] and steps >= 1, got {start}, {factor} and {steps}")
    return lambda step: start * torch.exp((step / steps) * math.log(factor))


def warmup(rate: float | Schedule, steps: int) -> Schedule:
    """Rises along a line to where another schedule starts, and then follows it from its own first step.

    ``rate(0) * (step + 1) / (steps + 1)``, then ``rate(step - steps)``: the first step is not lost to a rate of 0.

    Args:
        rate: what follows: a number above 0, or a schedule.
        steps: how many steps the rise takes, at least 1.

    Raises:
        ValueError: a number outside of these.

    >>> warmup(0.4, 3)(torch.tensor([0, 1, 2, 3, 4]))
    tensor([0.1000, 0.2000, 0.3000, 0.4000, 0.4000])
    """
    if steps < 1:
        raise ValueError(f"the warm-up must take at least 1 step, got {steps}")
    after = as_schedule(rate)

    def schedule(step: Tensor) -> Tensor:
        rising = after(torch.zeros_like(step)) * ((step + 1) / (steps + 1))
        return torch.where(step < steps, rising, after((step - steps).clamp_min(0)))

    return schedule


def piecewise(rates: Sequence[float | Schedule], boundaries: Sequence[int]) -> Schedule:
    """One rate after another: ``rates[i]`` from step ``boundaries[i - 1]`` on.

    Args:
        rates: numbers above 0, or schedules, each of which counts from the step where its part begins.
        boundaries: the steps at which the second, third, ... part begins, rising, the first at least 1.

    Raises:
        ValueError: not one rate more than boundaries, boundaries that do not rise, or a rate that is not above 0.

    Source: of numbers, torch's ``MultiStepLR``; of schedules, its ``SequentialLR``.

    >>> piecewise([0.4, 0.2, linear_decay(0.2, 0.1, 2)], [2, 4])(torch.tensor([1, 2, 4, 5, 6]))
    tensor([0.4000, 0.2000, 0.2000, 0.1500, 0.1000])
    """
    starts = (0, *boundaries)
    if len(rates) != len(starts):
        raise ValueError(f"expected one rate more than boundaries, got {len(rates)} rates and {len(boundaries)}")
    if any(b <= a for a, b in itertools.pairwise(starts)):
        raise ValueError(f"the boundaries must rise from at least 1, got {tuple(boundaries)}")
    parts = [as_schedule(rate) for rate in rates]

    def schedule(step: Tensor) -> Tensor:
        rate = parts[0](step)
        for start, part in zip(starts[1:], parts[1:], strict=True):
            rate = torch.where(step < start, rate, part((step - start).clamp_min(0)))
        return rate

    return schedule


def as_schedule(rate: float | Schedule) -> Schedule:
    """A schedule as it is, a number as a constant one."""
    return rate if callable(rate) else constant(rate)


def rate_at(rate: float | Schedule) -> Callable[[Tensor], Tensor | float]:
    """The learning rate of a step: a schedule's, or the number, which stays a number."""
    if callable(rate):
        return rate
    constant(rate)  # which checks it
    return lambda step: rate


def _check_fall(start: float, end: float, steps: int) -> None:
    if not (0 < start < math.inf and 0 <= end < math.inf and steps >= 1):
        raise ValueError(f"expected start > 0, end >= 0 and steps >= 1, got {start}, {end} and {steps}")
