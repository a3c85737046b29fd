"""Tests of ``featvis sweep``, ``status`` and ``validate``: output, exit codes, signals and full disks."""

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featvis_func import models
from featvis_func.cli import main as cli
from featvis_func.models import load_model
from featvis_func.sweep import api as running
from featvis_func.sweep import launchers as engines
from featvis_func.sweep import open_store, renderers, validate, worker
from featvis_func.sweep.layout import open_folder
from featvis_func.sweep.shard import read_commit
from tests.sweep_toys import join, ready, receive, start
from tests.toys import load_toy

LAYERS = ["--layers", "block1.conv,head"]
QUICK = ["--steps", "1", "--size", "32", "--precision", "float32", "--compile", "no", "--threads", "1"]
pytestmark = pytest.mark.usefixtures("cached_tracing", "one_thread")
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits are POSIX")


class SmallNet(nn.Module):
    """Network with two of TextureNet's layers, whose tracing takes less time."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 24, 3, stride=2), relu=nn.ReLU()))
        self.head = nn.Linear(24, 32)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block1(images).mean((2, 3)))


def small_model(*_: Any, **__: Any) -> models.Model:
    """Return the small network in place of TextureNet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_toy(SmallNet().eval(), size=32)._replace(name="texturenet")


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Use the small network for all commands of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_model", small_model)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a complete sweep of two layers."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert cli.main(["sweep", *LAYERS, *QUICK, "--out", str(out)]) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def results(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith("units")}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_status_and_validate_describe_a_complete_sweep(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(finished)]) == 0
    assert capsys.readouterr().out == "4 of 4 units done, 56 of 56 filters\n"
    assert cli.main(["validate", str(finished)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "sound"
    store = open_store(finished)
    assert store.layers == ("block1.conv", "head")
    assert [len(store.filters(layer)) for layer in store.layers] == [24, 32]


@pytest.mark.parametrize("flags", [[], ["--resume"]], ids=str)
def test_complete_sweep_renders_nothing_again(
    finished: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("something was rendered")

    monkeypatch.setattr(renderers, "make_renderer", fail)
    before = results(finished)
    assert cli.main(["sweep", *LAYERS, *QUICK, "--out", str(finished), *flags]) == 0
    assert results(finished) == before


def test_snapshots_option_stores_snapshots(tmp_path: Path) -> None:
    flags = ["--layers", "head", "--filters", "3,5", *QUICK, "--steps", "2", "--snapshots", "2"]
    assert cli.main(["sweep", *flags, "--out", str(tmp_path / "out")]) == 0
    snapshots = open_store(tmp_path / "out")["head", 5].snapshots
    assert snapshots is not None
    assert snapshots.shape == (2, 3, 32, 32)


def test_other_options_are_rejected_with_their_differences(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(finished)
    assert cli.main(["sweep", *LAYERS, *QUICK, "--steps", "2", "--seed", "1", "--out", str(finished)]) == 2
    error = capsys.readouterr().err
    assert "holds a sweep with other options" in error
    assert "render.steps: 1 in the folder, 2 requested" in error
    assert "render.seed: 0 in the folder, 1 requested" in error
    assert "render.size" not in error
    assert results(finished) == before


def test_dry_run_prints_a_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["sweep", *LAYERS, *QUICK, "--filters", "0-9", "--out", str(out), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["block1.conv", "10", "1", "10"],
        ["head", "10", "1", "10"],
        ["total", "20", "2"],
    ]
    assert "on one worker like this" in lines[4]
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--layers", "hed"], "did you mean 'head'"),
        (["--layers", "nothing*"], "fits the pattern 'nothing*'"),
        (["--layers", "head", "--filters", "40"], "filter 40"),
        (["--engine", "slurm"], "unknown engine 'slurm'; expected one of local, torchrun, srun, array, ray"),
        (["--engine", "torchrun"], "RANK"),
        (["--image-dtype", "png"], "unknown image_dtype 'png'; expected one of uint8, float16"),
        (["--transforms", "sideways"], "unknown transforms 'sideways'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--unit-size", "0"], "unit_size must be at least 1, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--tolerance", "-1"], "tolerance"),
        (["--redirect", "-1"], "redirect must be at least 0, got -1"),
        (["--size", "0"], "0"),
        (
            ["--steps", "2", "--snapshots", "4"],
            "snapshots must be in [0, 3] for steps=2, got 4",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_input_prints_one_error_and_writes_nothing(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    assert cli.main(["sweep", *flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("featvis: error: ")
    assert error.count("\n") == 1
    assert says in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["status", "validate"])
def test_folder_that_is_not_a_sweep_is_rejected(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, str(tmp_path / "none")]) == 2
    assert "is not the folder of a sweep" in capsys.readouterr().err


def test_damaged_unit_and_orphan_are_reported_and_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", "--layers", "head", *QUICK, "--out", str(out)]
    assert cli.main(arguments) == 0
    before = {name: data for name, data in results(out).items() if name.endswith(".safetensors")}
    shard = next(iter(sorted(out.rglob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-1])
    (out / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert cli.main(["validate", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "head/00000-00015 is not sound" in printed
    assert "notes.txt belongs to no unit" in printed
    (out / "notes.txt").unlink()
    assert cli.main(arguments) == 0
    assert cli.main(["validate", str(out)]) == 0
    assert {name: data for name, data in results(out).items() if name.endswith(".safetensors")} == before
    assert [p.name for p in (out / "damaged").rglob("*.safetensors.0")] == [f"{shard.name}.0"]


@pytest.mark.slow
def test_failed_units_are_listed_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", "--layers", "block1.conv", *QUICK, "--unit-size", "1", "--out", str(out)]
    real = worker.commit

    def fail(folder, unit, *args, **options):
        if 5 in unit.filters:
            raise RuntimeError("cannot write filter 5")
        return real(folder, unit, *args, **options)

    monkeypatch.setattr(worker, "commit", fail)
    assert cli.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "23 of 24 units done" in printed
    assert "block1.conv/00005-00005 failed: RuntimeError: cannot write filter 5" in printed
    assert cli.main(["status", str(out)]) == 1
    monkeypatch.undo()
    assert cli.main(arguments) == 0
    assert validate(out).sound


def test_sweep_stops_when_too_many_units_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the model is broken")

    monkeypatch.setattr(renderers, "make_renderer", fail)
    out = tmp_path / "out"
    assert cli.main(["sweep", *LAYERS, *QUICK, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "1 of 4 units failed, which is more than 5%; giving up" in printed.err
    assert "block1.conv/00000-00011 failed: RuntimeError: the model is broken" in printed.out
    logged = [json.loads(line) for p in (out / "events").iterdir() for line in p.read_text().splitlines()]
    assert [entry["event"] for entry in logged][-1] == "gave up"


def run_until_third_commit(connection: Connection, arguments: list[str]) -> None:
    """Run the command line in a child process, and wait for a signal before the third unit is committed."""
    ready(connection)
    models.load_model = small_model
    real, commits = worker.commit, []

    def commit(*args: Any, **options: Any) -> Any:
        if len(commits) == 2:
            connection.send("third unit is rendered")
            receive(connection)
        commits.append(real(*args, **options))
        return commits[-1]

    worker.commit = commit
    with contextlib.redirect_stderr(io.StringIO()) as error:
        code = cli.main(arguments)
    connection.send(error.getvalue())
    sys.exit(code)


@pytest.mark.slow
@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_signal_stops_a_sweep_and_keeps_committed_units(
    number: signal.Signals, code: int, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", *LAYERS, *QUICK, "--out", str(out)]
    process, connection = start(run_until_third_commit, arguments)
    assert receive(connection) == "third unit is rendered"
    assert process.pid is not None
    os.kill(process.pid, number)
    error = receive(connection)
    assert join(process, connection) == code
    assert error.strip().endswith("featvis: interrupted; nothing unfinished was written")
    folder = open_folder(out)
    done = [unit for unit in folder.run.units if read_commit(folder, unit, thorough=True) is not None]
    assert done == list(folder.run.units[:2])
    assert not list(out.rglob(".*"))
    assert cli.main(arguments) == 0
    assert validate(out).sound
    shards = {name: data for name, data in results(out).items() if name.endswith(".safetensors")}
    assert shards == {name: data for name, data in results(finished).items() if name.endswith(".safetensors")}


@pytest.mark.slow
@posix
def test_full_disk_prints_one_error_and_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``python -m featvis_func`` on TextureNet with default options, and limit the size of its files."""
    monkeypatch.setattr(models, "load_model", load_model)
    out = tmp_path / "out"
    arguments = ["sweep", "--layers", "head", "--filters", "0-7", "--steps", "1", "--size", "32", "--out", str(out)]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # bytes per file; a shard has 25,000

    done = subprocess.run(
        [sys.executable, "-m", "featvis_func", *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("featvis: error: [Errno 27] File too large")
    assert not list(out.rglob("*.safetensors"))
    assert not list(out.rglob(".*"))
    assert cli.main(arguments) == 0
    assert validate(out).sound


def test_help_does_not_import_torch() -> None:
    for command in ("sweep", "status", "validate"):
        script = (
            "import sys\n"
            "from featvis_func.cli import main as cli\n"
            "try:\n"
            f"    cli.main([{command!r}, '--help'])\n"
            "except SystemExit:\n"
            "    sys.exit('torch' in sys.modules)\n"
        )
        done = python("-c", script)
        assert (done.returncode, done.stderr) == (0, "")


def test_unknown_option_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="has no option 'stepz'; did you mean 'steps'"):
        running.sweep("texturenet", out=tmp_path / "out", stepz=3)  # pyright: ignore[reportCallIssue]
    assert not (tmp_path / "out").exists()


def test_progress_bar_counts_all_filters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    running.sweep(small_model(), ["head"], out=out, steps=1, size=32, precision="float32", compile="no", progress=True)
    assert "32/32" in capsys.readouterr().err
    assert engines.rank_of("local") == engines.Rank()
