"""Timing, fits and pictures of the benchmarks."""

import sys

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.common import interleave, timing
from benchmarks.dead import evenly_spaced
from benchmarks.hero import GAP, SIDE, row
from benchmarks.scaling import Measurement, fit_line


def test_interleave_calls_each_function_in_every_round() -> None:
    calls: list[str] = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4)
    assert [sorted(calls[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5  # the first round is a warm-up
    assert len({tuple(calls[i : i + 3]) for i in range(0, 15, 3)}) > 1  # the order varies
    assert [len(t.samples) for t in times.values()] == [4, 4, 4]


def test_interleave_rejects_zero_rounds() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        interleave({"a": lambda: None}, rounds=0)


def test_timing_is_the_median_and_the_interquartile_range() -> None:
    assert timing([5.0, 1.0, 2.0, 4.0, 3.0])[:2] == (3.0, 2.0)
    assert timing([7.0])[:2] == (7.0, 0.0)


def test_fit_line_recovers_slope_and_intercept() -> None:
    points = [Measurement(n, n, 0.1, 800 + 60 * n, 0.0) for n in (4, 8, 16)]
    assert fit_line(points) == pytest.approx((800, 60, 0))


def test_evenly_spaced_returns_at_most_the_requested_number() -> None:
    assert evenly_spaced(range(10), 3) == [0, 3, 6]
    assert evenly_spaced([4, 7], 3) == [4, 7]


def test_hero_row_has_white_gaps() -> None:
    sheet = row(torch.zeros(8, 3, 20, 20))
    assert sheet.size == (8 * SIDE + 7 * GAP, SIDE)
    assert [sheet.getpixel((x, 5)) for x in (SIDE - 1, SIDE, SIDE + GAP)] == [(0,) * 3, (255,) * 3, (0,) * 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "unknown benchmark 'speed'; expected one of step, quality"),
        (["step", "--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_command_rejects_invalid_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert message in capsys.readouterr().err
