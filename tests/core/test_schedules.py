"""Learning rate schedules compared with the schedulers of torch and explicit formulas."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch.func import vmap
from torch.optim import lr_scheduler

from featvis_func.optimizer import (
    Schedule,
    constant,
    cosine_decay,
    exponential_decay,
    linear_decay,
    piecewise,
    warmup,
)

Optimizer = torch.optim.Optimizer
Scheduler = lr_scheduler.LRScheduler


def rates_of_torch(make: Callable[[Optimizer], Scheduler], steps: int, start: float) -> list[float]:
    """Return the learning rates of a torch scheduler at each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=start)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


CASES: dict[str, tuple[Schedule, Callable[[Optimizer], Scheduler], int]] = {
    "constant": (constant(0.4), lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0), 5),
    "linear": (linear_decay(0.4, 0.1, 7), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.25, 7), 12),
    "cosine": (cosine_decay(0.4, 0.1, 7), lambda o: lr_scheduler.CosineAnnealingLR(o, 7, eta_min=0.1), 8),
    "cosine to zero": (cosine_decay(0.4, 0.0, 4), lambda o: lr_scheduler.CosineAnnealingLR(o, 4), 5),
    "exponential": (exponential_decay(0.4, 0.8), lambda o: lr_scheduler.ExponentialLR(o, 0.8), 12),
    "exponential over 5 steps": (
        exponential_decay(0.4, 0.5, steps=5),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5 ** (step / 5)),
        12,
    ),
    "warmup of a constant": (warmup(0.4, 4), lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 4), 8),
    "piecewise constant": (
        piecewise([0.4, 0.04, 0.004], [2, 5]),
        lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.1),
        8,
    ),
    "piecewise of schedules": (
        piecewise([exponential_decay(0.4, 0.5), linear_decay(0.4, 0.1, 3), 0.2], [3, 7]),
        lambda o: lr_scheduler.LambdaLR(
            o, lambda t: 0.5**t if t < 3 else 1 - 0.75 * min((t - 3) / 3, 1) if t < 7 else 0.5
        ),
        10,
    ),
    "warmup of a cosine": (
        warmup(cosine_decay(0.4, 0.1, 6), 3),
        lambda o: lr_scheduler.LambdaLR(
            o, lambda t: (t + 1) / 4 if t < 3 else 0.25 + 0.375 * (1 + math.cos(math.pi * min((t - 3) / 6, 1)))
        ),
        14,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_schedule_matches_torch(name: str) -> None:
    schedule, make, steps = CASES[name]
    numbers = torch.arange(steps)
    expected = torch.tensor(rates_of_torch(make, steps, 0.4))
    torch.testing.assert_close(schedule(numbers), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(vmap(schedule)(numbers), expected, rtol=1e-6, atol=1e-8)
    one = schedule(numbers[2])
    assert one.shape == ()
    assert one.dtype == torch.float32


@pytest.mark.parametrize("schedule", [linear_decay(0.4, 0.1, 7), cosine_decay(0.4, 0.1, 7)])
def test_decay_stays_at_its_end(schedule: Schedule) -> None:
    torch.testing.assert_close(schedule(torch.tensor([7, 8, 14, 10_000])), torch.full((4,), 0.1))


def test_warmup_starts_above_zero_and_continues_with_the_schedule() -> None:
    rates = warmup(linear_decay(0.4, 0.1, 2), 3)(torch.arange(6))
    torch.testing.assert_close(rates, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.25, 0.1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant(0.0), "the learning rate must be finite and above 0, got 0.0"),
        *(
            (lambda make=make, a=a: make(*a), "expected start > 0, end >= 0 and steps >= 1, got ")
            for make in (linear_decay, cosine_decay)
            for a in ((0.0, 0.1, 5), (0.1, -0.1, 5), (0.1, 0.1, 0), (math.inf, 0.1, 5))
        ),
        (
            lambda: exponential_decay(0.0, 0.5),
            "expected start > 0, 0 < factor <= 1 and steps >= 1, got start=0.0, factor=0.5 and steps=1",
        ),
        (
            lambda: exponential_decay(0.1, 1.1),
            "expected start > 0, 0 < factor <= 1 and steps >= 1, got start=0.1, factor=1.1 and steps=1",
        ),
        (lambda: exponential_decay(0.1, 0.5, steps=0), "expected start > 0, 0 < factor <= 1 and steps >= 1"),
        (lambda: warmup(0.1, 0), "warmup: steps must be at least 1, got 0"),
        (lambda: warmup(-0.1, 2), "the learning rate must be finite and above 0, got -0.1"),
        (
            lambda: piecewise([0.1], [1]),
            "piecewise expected one rate more than boundaries, got 1 rates and 1 boundaries",
        ),
        (lambda: piecewise([0.1, 0.2], [0]), "boundaries must be at least 1 and strictly increasing, got (0,)"),
        (
            lambda: piecewise([0.1, 0.2, 0.3], [4, 4]),
            "boundaries must be at least 1 and strictly increasing, got (4, 4)",
        ),
        (lambda: piecewise([0.1, 0.0], [4]), "the learning rate must be finite and above 0, got 0.0"),
    ],
)
def test_invalid_arguments_raise_value_error(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
