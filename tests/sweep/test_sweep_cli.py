"""``featvis sweep``, ``status`` and ``validate``: what they print, how they exit, and how they are stopped."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from featvis_func.cli import main as cli
from featvis_func.sweep import api as running
from featvis_func.sweep import launchers as engines
from featvis_func.sweep import open_store, validate, worker
from featvis_func.sweep.layout import open_folder
from featvis_func.sweep.shard import read_commit

LAYERS = ["--layers", "block1.conv,head"]
QUICK = ["--steps", "1", "--size", "32"]
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits are POSIX")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert cli.main(["sweep", *LAYERS, *QUICK, "--out", str(out)]) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def results(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith("units")}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_a_sweep_fills_a_folder_and_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(finished)]) == 0
    assert capsys.readouterr().out == "7 of 7 units done, 56 of 56 filters\n"
    assert cli.main(["validate", str(finished)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "sound"
    store = open_store(finished)
    assert store.layers == ("block1.conv", "head")
    assert [len(store.filters(layer)) for layer in store.layers] == [24, 32]


@pytest.mark.parametrize("flags", [[], ["--resume"]], ids=str)
def test_a_finished_sweep_renders_nothing(finished: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("something was rendered")

    monkeypatch.setattr(worker, "make_renderer", fail)
    before = results(finished)
    assert cli.main(["sweep", *LAYERS, *QUICK, "--out", str(finished), *flags]) == 0
    assert results(finished) == before


def test_a_sweep_keeps_snapshots(tmp_path: Path) -> None:
    flags = ["--layers", "head", "--filters", "3,5", *QUICK, "--steps", "2", "--snapshots", "2"]
    assert cli.main(["sweep", *flags, "--out", str(tmp_path / "out")]) == 0
    film = open_store(tmp_path / "out")["head", 5].snapshots
    assert film is not None
    assert film.shape == (2, 3, 32, 32)


def test_another_configuration_is_refused_and_shown(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(finished)
    assert cli.main(["sweep", *LAYERS, "--steps", "2", "--size", "32", "--seed", "1", "--out", str(finished)]) == 2
    error = capsys.readouterr().err
    assert "holds another sweep" in error
    assert "render.steps: 1 there, 2 asked for" in error
    assert "render.seed: 0 there, 1 asked for" in error
    assert "render.size" not in error
    assert results(finished) == before


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["sweep", *LAYERS, *QUICK, "--filters", "0-9", "--out", str(out), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["block1.conv", "10", "2", "8"],
        ["head", "10", "2", "8"],
        ["total", "20", "4"],
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
        (["--views", "sideways"], "unknown views 'sideways'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--unit-size", "0"], "unit_size must be at least 1, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--tolerance", "-1"], "tolerance"),
        (["--redirect", "-1"], "redirect must be at least 0, got -1"),
        (["--size", "0"], "0"),
        (["--steps", "2", "--snapshots", "4"], "snapshots must be 0 to 3, as 2 steps have so many images, got 4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_error_and_leaves_nothing(
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
def test_a_folder_of_something_else(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(tmp_path / "none")]) == 2
    assert "is not the folder of a sweep" in capsys.readouterr().err


def test_what_is_not_sound_is_named_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "head/00000-00007 is not sound" in printed
    assert "notes.txt belongs to no unit" in printed
    (out / "notes.txt").unlink()
    assert cli.main(arguments) == 0
    assert cli.main(["validate", str(out)]) == 0
    assert {name: data for name, data in results(out).items() if name.endswith(".safetensors")} == before
    assert [p.name for p in (out / "damaged").rglob("*.safetensors.0")] == [f"{shard.name}.0"]


def test_units_that_fail_are_named_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", "--layers", "block2.conv", *QUICK, "--unit-size", "2", "--out", str(out)]
    real = worker.commit

    def fail(folder, unit, *args, **options):
        if 5 in unit.filters:
            raise RuntimeError("no luck with filter 5")
        return real(folder, unit, *args, **options)

    monkeypatch.setattr(worker, "commit", fail)
    assert cli.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "23 of 24 units done" in printed
    assert "block2.conv/00004-00005 failed: RuntimeError: no luck with filter 5" in printed
    assert cli.main(["status", str(out)]) == 1
    monkeypatch.undo()
    assert cli.main(arguments) == 0
    assert validate(out).sound


def test_a_sweep_gives_up_where_too_many_units_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the model is broken")

    monkeypatch.setattr(worker, "make_renderer", fail)
    out = tmp_path / "out"
    assert cli.main(["sweep", *LAYERS, *QUICK, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "1 of 7 units failed, which is more than 5%; giving up" in printed.err
    assert "block1.conv/00000-00007 failed: RuntimeError: the model is broken" in printed.out
    logged = [json.loads(line) for p in (out / "events").iterdir() for line in p.read_text().splitlines()]
    assert [entry["event"] for entry in logged][-1] == "gave up"


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_ends_a_sweep_and_what_was_committed_stays(
    number: signal.Signals, code: int, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    script = (
        "import sys\n"
        "from featvis_func.cli import main as cli\n"
        "from featvis_func.sweep import worker\n"
        "real, count = worker.commit, []\n"
        "def commit(*args, **options):\n"
        "    real(*args, **options)\n"
        "    count.append(0)\n"
        "    print(len(count), flush=True)\n"
        "worker.commit = commit\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    arguments = ["sweep", *LAYERS, *QUICK, "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        process.send_signal(number)
        _, error = process.communicate(timeout=30)  # what batch systems wait before they kill
    assert process.returncode == code
    assert error.strip().endswith("featvis: interrupted; nothing unfinished was written")
    folder = open_folder(out)
    done = [unit for unit in folder.run.units if read_commit(folder, unit, thorough=True) is not None]
    assert 2 <= len(done) < 7
    assert not list(out.rglob(".*"))
    assert cli.main(arguments) == 0
    assert validate(out).sound
    shards = {name: data for name, data in results(out).items() if name.endswith(".safetensors")}
    assert shards == {name: data for name, data in results(finished).items() if name.endswith(".safetensors")}


@posix
def test_a_full_disk_is_one_error_and_leaves_nothing_partial(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", "--layers", "head", *QUICK, "--out", str(out)]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # bytes of one file; a shard has 25,000

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


def test_help_does_not_wait_for_torch() -> None:
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


def test_an_option_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepz'"):
        running.sweep("texturenet", out=tmp_path / "out", stepz=3)  # pyright: ignore[reportCallIssue]
    assert not (tmp_path / "out").exists()


def test_the_bar_counts_the_filters_of_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    running.sweep("texturenet", ["head"], out=out, steps=1, size=32, progress=True)
    assert "32/32" in capsys.readouterr().err
    assert engines.rank_of("local") == engines.Rank()
