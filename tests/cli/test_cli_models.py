"""Models on the command line: those that a function of the user's makes, and flags that say what a model takes."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from featvis_func import models
from featvis_func.cli import main as cli
from featvis_func.cli.arguments import join_negative_numbers, parse_input_size, parse_numbers
from featvis_func.gallery.reproduce import reproduce
from featvis_func.sweep import open_store

NETS = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, channels=1):
        super().__init__(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))


def make():
    return Net()
"""
INPUT = ["--value-range", "-1,1", "--input-size", "12"]
QUICK = ["--steps", "1", "--device", "cpu", "--precision", "float32", "--compile", "no"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with ``cli_nets.py``, which is not on the import path; forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "here"
    (folder / "deep").mkdir(parents=True)
    for path in (folder / "cli_nets.py", folder / "deep" / "cli_deep_nets.py"):
        path.write_text(NETS)
    monkeypatch.chdir(folder)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("cli_"):
            del sys.modules[name]


def run_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]


@pytest.mark.parametrize("spec", ["cli_nets:make", "deep/cli_deep_nets.py:make", "cli_nets.py:make"])
def test_layers_of_a_model_that_a_function_makes(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layers", spec, *INPUT]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [line.split() for line in printed.out.splitlines()] == [
        ["layer", "type", "output", "filters"],
        ["0", "Conv2d", "4", "x", "10", "x", "10", "4"],
        ["1", "ReLU", "4", "x", "10", "x", "10", "4"],
        ["2", "Conv2d", "3", "x", "8", "x", "8", "3"],
    ]


@pytest.mark.slow
def test_flags_say_what_the_model_takes(here: Path) -> None:
    flags = ["--mean", "0.5", "--std", "0.25", "--value-range", "-1,1", "--input-size", "12x14"]
    command = ["render", "cli_nets:make", "--layer", "2", "--filters", "1", *QUICK, "--no-gallery", "--out"]
    assert cli.main([*command, "first", *flags]) == 0
    config = run_json(here / "first")
    assert (config["model"], config["input_size"], config["mean"], config["std"]) == (
        "cli_nets:make",
        [12, 14],
        [0.75],
        [0.125],
    )
    # The command that the gallery shows renders the same image.
    again = reproduce(config, "2", 1, config["seed"])
    assert again.command is not None
    assert "--mean 0.75 --std 0.125 --input-size 12x14" in again.command
    assert "fv.load_model('cli_nets:make', mean=(0.75,), std=(0.125,), size=(12, 14))" in again.call
    assert cli.main([*shlex.split(again.command)[1:], "--device", "cpu", "--no-gallery", "--out", "again"]) == 0
    assert (here / "again" / "filter-0001.png").read_bytes() == (here / "first" / "filter-0001.png").read_bytes()


def test_flags_reach_named_models_and_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    class StopError(ValueError):
        pass

    def note(name: str, **options: Any) -> None:
        given.append((name, options))
        raise StopError

    monkeypatch.setattr(models, "load_model", note)
    flags = ["--mean", "-0.5,.5,1", "--std", "1,1,2", "--value-range", "0,255", "--input-size", "8x64x64"]
    flags += ["--weights", "w.pth"]
    for words in (["layers"], ["render", "--layer", "a"], ["sweep", "--out", "out"]):
        assert cli.main([words[0], "torchvision:r3d_18", *words[1:], *flags]) == 2
    expected = {"mean": (-0.5, 0.5, 1.0), "std": (1.0, 1.0, 2.0), "value_range": (0.0, 255.0), "size": (8, 64, 64)}
    assert given == [("torchvision:r3d_18", {**expected, "weights": "w.pth"})] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mean", "a"], "must be numbers such as '0.485,0.456,0.406', got 'a'"),
        (["--std", "1;2"], "must be numbers"),
        (["--input-size", "12x"], "must be whole numbers such as '224', '48x64' or '16x112x112', got '12x'"),
    ],
)
def test_flags_that_are_no_numbers_are_usage_errors(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["layers", "cli_nets:make", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cli_nets:mak"], "cli_nets has no 'mak'; did you mean 'make'?"),
        (["cli_net:make"], "there is no module 'cli_net' on Python's import path"),
        (["deep/cli_nets.py:make"], "no file 'deep/cli_nets.py'"),
        (
            ["cli_nets:Net", "--value-range", "1,-1"],
            "value_range must be two numbers (lo, hi) with lo < hi, got (1.0, -1.0)",
        ),
        (["cli_nets:Net", "--mean", "0", "--std", "0"], "one std above 0 per channel"),
        (["cli_nets:Net", "--input-size", "8x8x8", "--value-range", "0,1"], "fails on"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layers", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_negative_numbers_are_values() -> None:
    assert join_negative_numbers(["--mean", "-1,2", "--std", "-.5", "--value-range", "-1,1", "--layer", "-1"]) == [
        *("--mean=-1,2", "--std=-.5", "--value-range=-1,1", "--layer", "-1")
    ]
    assert join_negative_numbers(["--mean", "--std"]) == ["--mean", "--std"]
    assert (parse_numbers("-1,1e2"), parse_input_size("7")) == ((-1.0, 100.0), 7)


def test_the_import_path_is_left_alone_for_other_models() -> None:
    before = [*sys.path]
    assert cli.main(["layers", "texturenet"]) == 0
    assert sys.path == before


@pytest.mark.slow
def test_a_sweep_is_resumed_with_the_same_function(here: Path) -> None:
    """Random weights are the same in each process, so that the sweep continues."""
    sweep = ["sweep", "cli_nets:make", *INPUT, *QUICK, "--out", "out", "--layers"]
    assert cli.main([*sweep, "0,2"]) == 0
    unit = next(path for path in (here / "out" / "units").rglob("*.json"))
    unit.unlink()
    torch.rand(3)
    done = subprocess.run(
        [sys.executable, "-m", "featvis_func", *sweep, "0,2"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("error")) == (0, 0), done.stderr
    store = open_store("out")
    assert store.status().complete
    assert store.config["model"] == "cli_nets:make"
    (here / "cli_nets.py").write_text(NETS.replace("4, 3, 3", "4, 3, 1"))
    other = subprocess.run(
        [sys.executable, "-m", "featvis_func", *sweep, "0,2"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["cli_nets:make", "deep/cli_deep_nets.py:make"])
def test_actors_of_ray_find_the_class_of_the_model(spec: str) -> None:
    pytest.importorskip("ray", reason="the engine ray needs the extra ray")
    command = [sys.executable, "-W", "ignore", "-m", "featvis_func", "sweep", spec, *INPUT, *QUICK]
    command += ["--layers", "2", "--out", "out", "--engine", "ray", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert open_store("out").status().complete
