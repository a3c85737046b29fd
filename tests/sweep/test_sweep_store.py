"""Tests of a sweep's folder: kills, failing and full disks, damage, concurrent runs, and reading of the results."""

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from PIL import Image

from featvis_func.io import atomic as files
from featvis_func.sweep import shard
from featvis_func.sweep.launchers import Rank, TooManyFailedError
from featvis_func.sweep.layout import FORMAT, DamagedError, Folder, Run, open_folder, sealed, set_aside, start_folder
from featvis_func.sweep.plan import Unit, folder_of
from featvis_func.sweep.shard import commit, read_commit
from featvis_func.sweep.store import open_store
from featvis_func.sweep.validate import read_status, validate
from featvis_func.sweep.worker import Worker
from tests.sweep_toys import (
    HANG_SECONDS,
    PROCESSES,
    STEPS,
    Toy,
    content,
    fill,
    fill_in_child,
    join,
    ready,
    receive,
    start,
    toy_result,
    toy_run,
)

pytestmark = pytest.mark.usefixtures("one_thread")
KILLS = 60


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: these tests create and delete thousands of small files."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="featvis-", dir="/dev/shm") as folder:
        yield Path(folder)


def committed(folder: Folder) -> set[Unit]:
    """Return the units that are done, after verifying every checksum."""
    return {unit for unit in folder.run.units if read_commit(folder, unit, thorough=True) is not None}


def sound_units(folder: Folder) -> set[Unit]:
    """Return the units that are done and undamaged."""
    units = set()
    for unit in folder.run.units:
        try:
            units |= {unit} if read_commit(folder, unit, thorough=True) is not None else set()
        except DamagedError:
            continue
    return units


def temporaries(path: Path) -> set[Path]:
    return {file for file in path.rglob("*") if files.is_temporary(file)}


def loose_shards(path: Path) -> set[str]:
    """Return the names of the shards that no sidecar names."""
    named = {json.loads(file.read_bytes())["sha256"][:12] for file in path.glob("units/*/*[0-9].json")}
    return {file.name for file in path.glob("units/*/*.safetensors") if file.stem[-12:] not in named}


@pytest.fixture
def unsynchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, to save time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the temporary files of this process as those of a process that has ended."""
    monkeypatch.setattr(files, "_is_running", lambda process: False)


# Kills.


@pytest.mark.slow
def test_kills_at_any_event_lose_no_committed_unit(tmp_path: Path) -> None:
    """Kill one process, or two at work in one folder, at random events until several runs are complete."""
    chance = random.Random(0)
    run = toy_run({"a.conv": 10, "b.conv": 11})
    fill(tmp_path / "undisturbed", run, Toy())
    expected = content(tmp_path / "undisturbed")
    toy = Toy(tmp_path / "log")
    seen: Counter[str] = Counter()
    folder = Folder(tmp_path / "0", run)
    before: set[Unit] = set()
    while seen["kills"] < KILLS:
        ranks = 1 + chance.randrange(2)
        lines_before = len(toy.rendered())
        abandoned = temporaries(folder.path)
        running = [
            start(fill_in_child, folder.path, run, toy, Rank(number, ranks), False, chance.randrange(1, 40 // ranks))
            for number in range(ranks)
        ]
        for _, connection in running:
            connection.send("go")
        codes = [join(*child) for child in running]
        assert set(codes) <= {-signal.SIGKILL, 0}  # 0: its share had fewer events
        after = committed(folder)
        assert before <= after, "a committed unit is lost"
        lines = toy.rendered()[lines_before:]
        redone = len(lines) - len(after - before)
        assert 0 <= redone <= codes.count(-signal.SIGKILL), "more than one unit per killed process has to be redone"
        assert not set(lines) & {f"{unit.layer} {unit.filters[0]}" for unit in before}, "a committed unit is redone"
        if after > before:
            assert not abandoned & temporaries(folder.path), "abandoned temporary files are not removed"
            seen["temporary files removed"] += len(abandoned)
        seen["kills"] += codes.count(-signal.SIGKILL)
        seen["units rendered and not committed"] += redone
        seen["kills that left temporary files"] += bool(temporaries(folder.path))
        seen["kills between a shard and its sidecar"] += bool(loose_shards(folder.path))
        seen["kills before run.json was written"] += not (folder.path / "run.json").exists()
        seen["units committed"] += len(after - before)
        before = after
        if len(after) == len(run.units):
            assert fill(folder.path, run, toy).complete
            assert content(folder.path) == expected
            seen["runs completed"] += 1
            folder, before = Folder(tmp_path / str(seen["runs completed"]), run), set()
    assert fill(folder.path, run, toy).complete
    assert content(folder.path) == expected
    assert validate(folder.path).sound
    print(dict(seen))
    for what in ("temporary files", "between a shard", "before run.json", "runs completed", "files removed"):
        assert any(count for name, count in seen.items() if what in name), f"no kill tested: {what}"


@pytest.mark.slow
def test_kill_at_each_event_in_turn_leaves_a_folder_that_can_be_completed(tmp_path: Path) -> None:
    run = toy_run({"a": 2, "b": 1})
    fill(tmp_path / "undisturbed", run, Toy())
    expected = content(tmp_path / "undisturbed")
    code, number = -signal.SIGKILL, 0
    while code:
        number += 1
        folder = Folder(tmp_path / str(number), run)
        process, connection = start(fill_in_child, folder.path, run, Toy(), Rank(), False, number)
        connection.send("go")
        code = join(process, connection)
        assert code in (-signal.SIGKILL, 0)
        committed(folder)
        shutil.copytree(folder.path, folder.path.with_suffix(".killed"), dirs_exist_ok=True)
        assert fill(folder.path, run, Toy()).complete
        assert content(folder.path) == expected
        assert validate(folder.path).sound
    assert number > 2 * 7, "each unit has seven events"


# A disk that fails.

Kind = Literal["once", "after", "for good", "full"]
"""``once``: one call fails. ``after``: one call takes effect and then fails. ``for good``: this and all later calls
fail. ``full``: from this call on the disk is full; the first write still has room for half of its bytes."""


class Disk:
    """Count the calls that concern the files below a folder, and make the n-th fail."""

    def __init__(self, folder: Path, number: int, kind: Kind = "once") -> None:
        self.calls: list[str] = []
        self.number = number
        self.kind = kind
        self.handles: set[int] = set()
        self.folder = str(folder)

    def concerns(self, *names: Any) -> bool:
        return any(str(name).startswith(self.folder) for name in names if isinstance(name, str | os.PathLike))

    def fails(self, call: str) -> bool:
        """Record a call, and return whether it fails."""
        self.calls.append(call)
        late = len(self.calls) > self.number
        if self.kind == "full":
            return call in ("write", "make") and (late or len(self.calls) == self.number)
        return len(self.calls) == self.number or (late and self.number > 0 and self.kind == "for good")

    def error(self) -> OSError:
        code = errno.ENOSPC if self.kind == "full" else errno.EIO
        return OSError(code, os.strerror(code), "a stand-in for a disk")

    def call(self, name: str, real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if not self.fails(name):
            return real(*arguments, **options)
        if (self.kind == "after" and name != "scandir") or name == "close":
            real(*arguments, **options)
        raise self.error()

    @contextmanager
    def attached(self) -> Iterator["Disk"]:
        """Intercept the calls of Python to the file system; fsync is counted but skipped."""
        real = {name: getattr(os, name) for name in ("open", "write", "close", "fsync")}

        def of_path(name: str) -> Callable[..., Any]:
            function = getattr(os, name)

            def wrapped(*arguments: Any, **options: Any) -> Any:
                if self.concerns(*arguments[:2]):
                    return self.call("make" if name == "mkdir" else name, function, *arguments, **options)
                return function(*arguments, **options)

            return wrapped

        def open_handle(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if not self.concerns(path):
                return real["open"](path, flags, *arguments, **options)
            handle = None

            def opened() -> int:
                nonlocal handle
                handle = real["open"](path, flags, *arguments, **options)
                return handle

            try:
                self.call("make" if flags & os.O_CREAT else "open", opened)
            except OSError:
                if handle is not None:
                    real["close"](handle)
                raise
            assert handle is not None
            self.handles.add(handle)
            return handle

        def write(handle: int, data: Any) -> int:
            if handle not in self.handles:
                return real["write"](handle, data)
            if self.kind == "full" and len(self.calls) + 1 == self.number:
                self.calls.append("write")
                return real["write"](handle, bytes(data)[: len(data) // 2])
            return self.call("write", real["write"], handle, data)

        def close(handle: int) -> None:
            if handle not in self.handles:
                return real["close"](handle)
            self.handles.discard(handle)
            return self.call("close", real["close"], handle)

        def fsync(handle: int) -> None:
            assert handle in self.handles
            self.call("fsync", lambda: None)

        def open_file(path: Any, *arguments: Any, **options: Any) -> Any:
            file = real_open(path, *arguments, **options)
            if not self.concerns(path):
                return file
            data = file.read()
            file.close()
            for name in ("open", "read"):
                self.call(name, lambda: None)
            return io.BytesIO(data)

        real_open = io.open
        with pytest.MonkeyPatch.context() as patch:
            for name in ("stat", "mkdir", "unlink", "replace", "link", "scandir", "utime"):
                patch.setattr(os, name, of_path(name))
            for name, function in {"open": open_handle, "write": write, "close": close, "fsync": fsync}.items():
                patch.setattr(os, name, function)
            patch.setattr(io, "open", open_file)
            yield self
        for handle in self.handles:
            real["close"](handle)


def damage(folder: Folder) -> set[bytes]:
    """Damage files of each kind; return the content of the damaged files."""
    first, second, third, *_ = folder.run.units
    bad = set()
    for path in (folder.path / "run.json", folder.sidecar(first), shard_of(folder, first), shard_of(folder, second)):
        data = path.read_bytes()
        bad.add(data[: len(data) // 2])
        path.write_bytes(data[: len(data) // 2])
    shard_of(folder, third).unlink()
    abandoned = folder.sidecar(first).with_name(f".x.json.{files._HOST}.{2**22 + 1}.abcd.tmp")
    abandoned.write_bytes(b"abandoned")
    return bad


def shard_of(folder: Folder, unit: Unit) -> Path:
    return next((folder.path / "units").glob(f"{unit.name}-*.safetensors"))


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(
    "scene", ["new", *(pytest.param(name, marks=pytest.mark.slow) for name in ("damaged", "failing"))]
)
@pytest.mark.usefixtures("gone", "unsynchronised")
def test_error_at_each_file_system_call_commits_no_bad_unit(tmp_path: Path, scene: str, kind: Kind) -> None:
    """Let each call fail in turn: nothing bad is committed, nothing is lost, and the next run completes the folder."""
    run = toy_run({"a": 3, "b": 4} if scene == "damaged" else {"a": 2, "b": 1})
    fill(tmp_path / "undisturbed", run, Toy())
    expected = content(tmp_path / "undisturbed")
    origin = tmp_path / "origin"
    bad: set[bytes] = set()
    if scene == "damaged":
        shutil.copytree(tmp_path / "undisturbed", origin)
        bad = damage(Folder(origin, run))
    else:
        origin.mkdir()
    good = sound_units(Folder(origin, run))
    assert len(good) == (1 if scene == "damaged" else 0)

    def first_run(path: Path) -> None:
        if scene == "failing":
            work = Worker(start_folder(path, run), Toy(broken=(1,)), seed=7)
            first, second = (work(unit).outcome for unit in run.units)
            assert first == "failed"
            assert second in ("rendered", "found")  # found: its commit took effect although a call failed
        else:
            fill(path, run, Toy())

    shutil.copytree(origin, tmp_path / "0")
    with Disk(tmp_path / "0", 0).attached() as disk:
        first_run(tmp_path / "0")
    calls = disk.calls
    outcomes: Counter[str] = Counter()
    for number, call in enumerate(calls, 1):
        if kind == "full" and call not in ("make", "write"):
            continue
        folder = Folder(tmp_path / f"{number}", run)
        shutil.copytree(origin, folder.path)
        disk = Disk(folder.path, number, kind)
        with disk.attached():
            try:
                first_run(folder.path)
                failure = None
            except (OSError, TooManyFailedError) as error:
                failure = error
        assert not isinstance(failure, OSError) or "a stand-in for a disk" in str(failure)
        outcomes["went on" if failure is None else "ended"] += 1
        present = {file.read_bytes() for file in folder.path.rglob("*") if file.is_file()}
        assert bad <= present, disk.calls
        if scene == "damaged":
            assert good <= sound_units(folder), "an undamaged unit is lost"
        else:
            committed(folder)
        assert disk.calls[:number] == calls[:number]
        assert fill(folder.path, run, Toy()).complete
        assert content(folder.path) == expected, disk.calls
        assert validate(folder.path).sound
        aside = {file.read_bytes() for file in (folder.path / "damaged").rglob("*") if file.is_file()}
        assert bad <= aside, disk.calls
        shutil.rmtree(folder.path)
    print(f"{scene}, {kind}: {len(calls)} calls: {dict(Counter(calls))}; runs that failed: {dict(outcomes)}")
    assert len(calls) > 50
    assert outcomes["ended"]


def test_write_file_syncs_the_data_before_renaming_and_the_folder_before_returning(tmp_path: Path) -> None:
    with Disk(tmp_path, 0).attached() as disk:
        files.write_file(tmp_path / "a", b"new")
        replacing, disk.calls = disk.calls, []
        files.write_file(tmp_path / "b", b"new", replace=False)
    written, named = ["make", "write", "fsync", "close"], ["open", "fsync", "close"]
    assert replacing == [*written, "replace", *named]
    assert disk.calls == [*written, "link", "unlink", *named]
    with pytest.raises(FileExistsError):
        files.write_file(tmp_path / "a", b"newer", replace=False)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.usefixtures("unsynchronised")
def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_run()
    fill(tmp_path / "undisturbed", run, Toy())
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data[:100])))
    fill(tmp_path / "slow", run, Toy())
    monkeypatch.undo()
    assert content(tmp_path / "slow") == content(tmp_path / "undisturbed")


# A disk that is full.


def fill_and_send_error(connection: Connection, path: Path, run: Run, toy: Toy, max_bytes: int | None) -> None:
    """Call :func:`fill` in a child process in which no file may exceed ``max_bytes``, and send its error message."""
    ready(connection)
    if max_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    try:
        fill(path, run, toy)
    except OSError as error:
        connection.send(str(error))
        raise SystemExit(1) from error
    connection.send("")


@pytest.mark.slow
def test_file_size_limit_ends_the_run_without_partial_files(tmp_path: Path) -> None:
    run = toy_run()
    fill(tmp_path / "undisturbed", run, Toy(side=64))
    toy = Toy(tmp_path / "log", side=64)
    process, connection = start(fill_and_send_error, tmp_path / "out", run, toy, 20_000)
    assert "File too large" in receive(connection)
    assert join(process, connection) == 1
    assert len(toy.rendered()) == 1, "other units are tried although they cannot be written either"
    assert not content(tmp_path / "out").keys() - {"run.json"}
    assert fill(tmp_path / "out", run, toy).complete
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, if this user may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no mount")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_full_disk_ends_the_run_which_can_be_resumed_with_more_space(tmp_path: Path, small_disk: Path) -> None:
    run = toy_run({"a": 60, "b": 60})
    fill(tmp_path / "undisturbed", run, Toy(side=64))
    toy = Toy(tmp_path / "log", side=64)
    folder = Folder(small_disk / "out", run)
    process, connection = start(fill_and_send_error, folder.path, run, toy, None)
    assert "No space left on device" in receive(connection)
    assert join(process, connection) == 1
    done = committed(folder)
    assert 0 < len(done) < len(run.units)
    assert len(toy.rendered()) == len(done) + 1
    assert not temporaries(folder.path)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert fill(folder.path, run, toy).complete
    assert content(folder.path) == content(tmp_path / "undisturbed")


# Damage.


def change(path: Path, edit: Callable[[bytearray], None], *, keep_time: bool = False) -> list[bytes]:
    """Edit a file in place, and return its new content."""
    state = path.stat()
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    return [bytes(data)]


def shorten(data: bytearray) -> None:
    del data[-7:]


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 4


def lengthen(data: bytearray) -> None:
    data.extend(b"\0")


def empty(data: bytearray) -> None:
    data.clear()


def next_digit(data: bytearray) -> None:
    """Change one digit of a number, so that the file is still valid JSON."""
    index = data.index(b'"score": ') + 13
    data[index] = ord("0") + (data[index] - ord("0") + 1) % 10
    json.loads(data)


def not_a_number(data: bytearray) -> None:
    start = data.index(b'"seed": ') + 8
    data[start : start + 1] = b"NaN"


def remove(path: Path) -> list[bytes]:
    path.unlink()
    return []


DAMAGES: dict[str, Callable[[Folder, Unit], list[bytes]]] = {
    "truncated shard": lambda f, u: change(shard_of(f, u), shorten),
    "empty shard": lambda f, u: change(shard_of(f, u), empty),
    "flipped shard": lambda f, u: change(shard_of(f, u), flip),
    "shard flipped behind the file system's back": lambda f, u: change(shard_of(f, u), flip, keep_time=True),
    "over-long shard": lambda f, u: change(shard_of(f, u), lengthen),
    "missing shard": lambda f, u: remove(shard_of(f, u)),
    "truncated sidecar": lambda f, u: change(f.sidecar(u), shorten),
    "empty sidecar": lambda f, u: change(f.sidecar(u), empty),
    "sidecar with another digit": lambda f, u: change(f.sidecar(u), next_digit),
    "sidecar with NaN": lambda f, u: change(f.sidecar(u), not_a_number),
    "sidecar that is not an object": lambda f, u: change(f.sidecar(u), lambda data: data.__init__(b"[1]")),
    "sidecar of another unit": lambda f, u: change(
        f.sidecar(u), lambda data: data.__init__(f.sidecar(f.run.units[0]).read_bytes())
    ),
    "both": lambda f, u: change(shard_of(f, u), flip) + change(f.sidecar(u), flip),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.usefixtures("unsynchronised")
def test_damaged_unit_is_detected_rendered_again_and_kept_aside(tmp_path: Path, kind: str) -> None:
    run = toy_run()
    toy = Toy(tmp_path / "log")
    fill(tmp_path / "out", run, toy)
    folder = Folder(tmp_path / "out", run)
    assert validate(folder.path).sound
    expected, rendered = content(folder.path), toy.rendered()
    unit = run.units[2]
    bad = DAMAGES[kind](folder, unit)
    report = validate(folder.path)
    assert set(report.status.damaged) == {unit.name}
    assert not report.sound
    assert not report.status.complete
    assert not report.orphans
    status = fill(folder.path, run, toy)
    assert status.complete
    assert not status.damaged
    assert toy.rendered()[len(rendered) :] == ["block1.conv 4"]
    assert validate(folder.path).sound
    assert content(folder.path) == expected
    aside = [file.read_bytes() for file in (folder.path / "damaged").rglob("*") if file.is_file()]
    assert all(data in aside for data in bad)


@pytest.mark.parametrize(
    "edit",
    [shorten, flip, empty, lambda data: data.replace(b"7", b"NaN"), lambda data: data.__init__(b"7")],
    ids=["truncated", "flipped", "empty", "NaN", "not an object"],
)
@pytest.mark.usefixtures("unsynchronised")
def test_damaged_run_json_is_detected_written_again_and_kept_aside(
    tmp_path: Path, edit: Callable[[bytearray], bytearray | None]
) -> None:
    run = toy_run()
    toy = Toy(tmp_path / "log")
    path = tmp_path / "out"
    fill(path, run, toy)
    expected, rendered = content(path), toy.rendered()
    data = bytearray((path / "run.json").read_bytes())
    bad = bytes(edit(data) or data)
    (path / "run.json").write_bytes(bad)
    for read in (validate, open_store):
        with pytest.raises(DamagedError, match=r"run\.json is damaged"):
            read(path)
    assert fill(path, run, toy).complete
    assert toy.rendered() == rendered
    assert content(path) == expected
    assert (path / "damaged" / "run.json.0").read_bytes() == bad
    assert validate(path).sound


@pytest.mark.usefixtures("unsynchronised")
def test_error_that_mentions_damage_in_another_context_is_not_taken_for_damage(tmp_path: Path) -> None:
    path = tmp_path / "run.json is damaged"
    fill(path, toy_run(), Toy())
    before = (path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"is damaged' holds a sweep with other options") as caught:
        start_folder(path, toy_run(model="the weights is damaged"))
    assert not isinstance(caught.value, DamagedError)
    (path / "run.json").write_bytes(sealed({"format": 99}))
    with pytest.raises(ValueError, match=r"run\.json is damaged/run\.json' has format 99") as caught:
        start_folder(path, toy_run())
    assert not isinstance(caught.value, DamagedError)
    (path / "run.json").write_bytes(before)
    assert not (path / "damaged").exists()
    assert validate(path).sound
    not_a_folder = tmp_path / "this is damaged"
    not_a_folder.touch()
    with pytest.raises(ValueError, match="is a file") as caught:
        start_folder(not_a_folder, toy_run())
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.usefixtures("unsynchronised")
def test_every_flipped_bit_in_a_sidecar_or_run_json_is_detected(tmp_path: Path) -> None:
    run = toy_run({"a": 2})
    fill(tmp_path, run, Toy())
    (unit,) = run.units
    folder = Folder(tmp_path, run)
    read: dict[Path, Callable[[], Any]] = {
        folder.sidecar(unit): lambda: read_commit(folder, unit),
        tmp_path / "run.json": lambda: open_folder(tmp_path),
    }
    chance = random.Random(0)
    for path, function in read.items():
        data, value = path.read_bytes(), function()
        for index in range(len(data)):
            bad = bytearray(data)
            bad[index] ^= 1 << chance.randrange(8)
            path.write_bytes(bad)
            with contextlib.suppress(DamagedError):
                assert function() == value, bad
                assert json.loads(bad) == json.loads(data), bad  # an equal value in another form, such as 1E-05
        path.write_bytes(data)


def test_set_aside_replaces_no_file(tmp_path: Path) -> None:
    for text in ("first", "second", "third"):
        (tmp_path / "a").write_text(text)
        moved = set_aside(tmp_path, tmp_path / "a", tmp_path / "missing")
        assert [path.read_text() for path in moved] == [text]
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["a.0", "a.1", "a.2"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_file_system_without_hard_links_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    run = toy_run()
    fill(tmp_path, run, Toy())
    folder = Folder(tmp_path, run)
    for _ in range(2):
        change(folder.sidecar(run.units[0]), shorten)
        assert fill(tmp_path, run, Toy()).complete
    assert validate(tmp_path).sound
    assert len(list((tmp_path / "damaged").rglob("*.json.*"))) == 2


# Concurrent processes.


class MeetOnce:
    """Let each process wait for the other one when it begins its first unit."""

    def __init__(self, barrier: Any) -> None:
        self.barrier = barrier
        self.met = False

    def __call__(self) -> None:
        if not self.met:
            self.met = True
            self.barrier.wait(HANG_SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("jitter", [False, True], ids=["equal results", "other rounding"])
@pytest.mark.parametrize("backwards", [False, True], ids=["same order", "from both ends"])
@pytest.mark.parametrize("damaged", [False, True], ids=["new folder", "all damaged"])
def test_two_concurrent_runs_complete_one_folder(tmp_path: Path, jitter: bool, backwards: bool, damaged: bool) -> None:
    run = toy_run({"a": 21, "b/c": 10})
    fill(tmp_path / "undisturbed", run, Toy())
    expected = content(tmp_path / "undisturbed")
    folder = Folder(tmp_path / "out", run)
    if damaged:
        shutil.copytree(tmp_path / "undisturbed", folder.path)
        for unit in run.units:
            change(folder.sidecar(unit), shorten)
    toy = Toy(tmp_path / "log", jitter=jitter, begin=MeetOnce(PROCESSES.Barrier(2)))
    running = [start(fill_in_child, folder.path, run, toy, Rank(), back, None) for back in (False, backwards)]
    numbers = [process.pid for process, _ in running]
    for _, connection in running:
        connection.send("go")
    assert [join(*child) for child in running] == [0, 0]
    assert committed(folder) == set(run.units)
    assert read_status(folder, thorough=True).complete
    assert not temporaries(folder.path)
    if jitter:
        results = open_store(folder.path)
        for unit in run.units:
            noises = [(number or 0) % 97 / 97 for number in numbers]
            possible = [toy_result(unit.layer, unit.filters, 7, noise=noise).images for noise in noises]
            if damaged:
                possible.append(toy_result(unit.layer, unit.filters, 7).images)
            stored = torch.stack([results[unit.layer, number].image for number in unit.filters])
            assert any(torch.allclose(stored, images, atol=0.51 / 255) for images in possible)
    else:
        assert content(folder.path) == expected
        assert validate(folder.path).sound
    lines = Counter(toy.rendered())
    assert set(lines) == {f"{unit.layer} {unit.filters[0]}" for unit in run.units}
    assert backwards or max(lines.values()) == 2, "both runs begin with the first unit, at the same time"


def start_folders(connection: Connection, path: Path, runs: list[Run], barrier: Any) -> None:
    """Start one folder after another, each at the same time as the other processes do; send the hashes or errors."""
    ready(connection)
    answers = []
    for number, run in enumerate(runs):
        barrier.wait(HANG_SECONDS)
        try:
            answers.append(start_folder(path / str(number), run).run.hash)
        except ValueError as error:
            answers.append(str(error))
    connection.send(answers)


@pytest.mark.parametrize("different", [False, True], ids=["one configuration", "two configurations"])
@pytest.mark.slow
def test_processes_that_start_at_the_same_time_agree_on_one_configuration(tmp_path: Path, different: bool) -> None:
    barrier = PROCESSES.Barrier(4)
    runs = [[toy_run(seed=number % 2 if different else 0)] * 20 for number in range(4)]
    running = [start(start_folders, tmp_path, own, barrier) for own in runs]
    answers = [receive(connection) for _, connection in running]
    assert [join(*child) for child in running] == [0] * 4
    for number in range(20):
        path = tmp_path / str(number)
        kept = open_folder(path).run
        assert [file.name for file in path.rglob("*")] == ["run.json"]
        for own, answer in zip(runs, answers, strict=True):
            if own[number].config == kept.config:
                assert answer[number] == kept.hash
            else:
                assert "holds a sweep with other options:\n  seed: " in answer[number]


@pytest.mark.usefixtures("unsynchronised")
def test_other_configuration_is_rejected_with_its_differences(tmp_path: Path) -> None:
    fill(tmp_path, toy_run(), Toy())
    before = content(tmp_path)
    other = toy_run({"block1.conv": 5, "tail": 4}, model="toyer", render={"seed": 7, "steps": 6})
    with pytest.raises(ValueError, match=r"holds a sweep with other options") as caught:
        fill(tmp_path, other, Toy())
    assert str(caught.value).splitlines()[1:-1] == [
        "  layers.head: 4 in the folder, null requested",
        "  layers.tail: null in the folder, 4 requested",
        '  model: "toy" in the folder, "toyer" requested',
        "  render.steps: 5 in the folder, 6 requested",
    ]
    assert content(tmp_path) == before


# Size.


@pytest.mark.usefixtures("unsynchronised")
def test_finished_run_reads_each_sidecar_twice_and_renders_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work of restarting a finished run is linear in the number of units."""
    monkeypatch.setattr(shard, "pack", lambda folder, unit, *_: unit.name.encode())
    run = toy_run({f"layer{number}": 40 for number in range(10)}, unit_size=1)
    folder = start_folder(tmp_path / "out", run)
    for unit in run.units:
        commit(folder, unit, toy_result("", unit.filters, 7, side=2), [7], seconds=0.0)
    reads: Counter[str] = Counter()
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        reads[str(path)] += 1
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    toy = Toy(tmp_path / "log", side=2)
    assert fill(tmp_path / "out", run, toy).complete
    assert toy.rendered() == []
    assert [reads[str(folder.sidecar(unit))] for unit in run.units] == [2] * 400
    assert validate(tmp_path / "out").sound
    assert [reads[str(folder.sidecar(unit))] for unit in run.units] == [4] * 400


def measure_memory(connection: Connection, path: Path, run: Run) -> None:
    """Send the memory of the process in MiB after each unit that is written, and after each filter that is read."""
    ready(connection)
    os.fsync = lambda fd: None
    side, page = 64, os.sysconf("SC_PAGE_SIZE")

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20

    work = Worker(start_folder(path, run), Toy(side=side), seed=7)
    sizes = []
    for unit in run.units:
        assert work(unit).outcome == "rendered"
        sizes.append(resident())
    connection.send(sizes)
    connection.send([resident() for entry in open_store(path) if entry.image.sum() > 0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_memory_does_not_grow_with_the_number_of_units(tmp_path: Path) -> None:
    run = toy_run({"a": 300, "b": 300})
    process, connection = start(measure_memory, tmp_path, run)
    written, read = receive(connection), receive(connection)
    assert join(process, connection) == 0
    assert len(written) == 300
    assert len(read) == 600
    assert written[-1] - written[100] < 5  # the images of the 200 units between them are 19 MiB
    assert read[-1] - read[200] < 5


# Reading.


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.usefixtures("unsynchronised")
def test_store_returns_the_rendered_results(tmp_path: Path, dtype: str) -> None:
    run = toy_run(image_dtype=dtype)
    fill(tmp_path, run, Toy())
    results = open_store(tmp_path)
    tolerance = 0.5001 / 255 if dtype == "uint8" else 2**-12
    assert results.layers == ("block1.conv", "head")
    assert results.config == run.config
    assert len(results) == 9
    assert repr(results) == f"Store({str(tmp_path)!r}: 2 layers of toy)"
    entries = list(results)
    assert [(entry.layer, entry.filter) for entry in entries] == [
        *(("block1.conv", number) for number in range(5)),
        *(("head", number) for number in range(4)),
    ]
    for layer in results.layers:
        numbers = results.filters(layer)
        expected = toy_result(layer, numbers, 7)
        stored = results.layer(layer)
        assert stored.images.dtype == torch.float32
        torch.testing.assert_close(stored.images, expected.images, atol=tolerance, rtol=0)
        for name in ("activations", "scores", "best_step", "history", "steps"):
            torch.testing.assert_close(getattr(stored, name), getattr(expected, name), atol=0, rtol=0)
        assert (stored.filters, stored.status) == (expected.filters, expected.status)
        assert stored.config == {**run.config, "layer": layer}
        for row, number in enumerate(numbers):
            entry = results[layer, number]
            torch.testing.assert_close(entry.image, stored.images[row], atol=0, rtol=0)
            torch.testing.assert_close(entry.activation, stored.activations[row], atol=0, rtol=0)
            torch.testing.assert_close(entry.history, stored.history[:, row], atol=0, rtol=0)
            assert (entry.layer, entry.filter, entry.steps, entry.seed) == (layer, number, STEPS, 7)
            assert (entry.score, entry.best_step) == (stored.scores[row].item(), stored.best_step[row].item())
            assert entry.status == stored.status[row]
            assert any(torch.equal(entry.image, other.image) for other in entries)
    assert read_status(Folder(tmp_path, run)).odd == {"dead": 2}


@pytest.mark.usefixtures("unsynchronised")
def test_equal_results_give_equal_bytes_and_shards_describe_themselves(tmp_path: Path) -> None:
    import safetensors

    run = toy_run()
    for name in ("a", "b"):
        fill(tmp_path / name, run, Toy())
    assert content(tmp_path / "a") == content(tmp_path / "b")
    with safetensors.safe_open(shard_of(Folder(tmp_path / "a", run), run.units[0]), framework="pt") as file:
        assert file.metadata() == {
            "featvis": json.dumps(
                {
                    "config": run.hash,
                    "format": FORMAT,
                    "layer": "block1.conv",
                    "status": ["ok", "dead", "nonfinite", "flat"],
                },
                separators=(",", ":"),
            )
        }
        assert file.get_tensor("filters").tolist() == [0, 1]


@pytest.mark.usefixtures("unsynchronised")
def test_largest_seed_and_infinite_scores_are_stored(tmp_path: Path) -> None:
    run = toy_run({"a": 3}, unit_size=3, render={"seed": 2**64 - 1})

    def make(plan: Any) -> Callable[..., Any]:
        def render(filters: Any, /, *, seed: int | None = None) -> Any:
            result = toy_result(plan.layer, filters, 0 if seed is None else seed + 1)
            if seed is None:
                object.__setattr__(result, "status", ("ok", "nonfinite", "nonfinite"))
                result.scores[:] = -torch.inf
            else:  # with the next seed, one of the two filters succeeds
                object.__setattr__(result, "status", ("ok", "nonfinite"))
            return result

        return render

    folder = start_folder(tmp_path, run)
    assert Worker(folder, make, seed=2**64 - 1)(run.units[0]).outcome == "rendered"
    entries = list(open_store(tmp_path))
    assert [entry.seed for entry in entries] == [2**64 - 1, 0, 2**64 - 1]
    assert [entry.status for entry in entries] == ["ok", "ok", "nonfinite"]
    assert [entry.score == -torch.inf for entry in entries] == [True, False, True]
    again = toy_result("a", [1, 2], 1)
    torch.testing.assert_close(entries[1].image, again.images[0], atol=0.51 / 255, rtol=0)
    torch.testing.assert_close(open_store(tmp_path).layer("a").history[:, 1], again.history[:, 0], atol=0, rtol=0)
    assert validate(tmp_path).status.odd == {"nonfinite": 1}


@pytest.mark.usefixtures("unsynchronised")
def test_snapshots_are_stored_and_replaced_with_the_result_of_the_second_seed(tmp_path: Path) -> None:
    run = toy_run({"a": 3, "b": 2}, unit_size=3)

    def with_snapshots(layer: str, filters: Any, seed: int) -> Any:
        colors = [[[(f * 50 + k * 7 + seed) % 256] * 3 for k in range(4)] for f in filters]
        snapshots = torch.tensor(colors, dtype=torch.uint8)[..., None, None].expand(-1, -1, -1, 8, 8)
        return replace(toy_result(layer, filters, seed), snapshots=snapshots)

    def make(plan: Any) -> Callable[..., Any]:
        def render(filters: Any, /, *, seed: int | None = None) -> Any:
            result = with_snapshots(plan.layer, filters, 7 if seed is None else seed)
            return replace(result, status=("ok", "nonfinite", "ok")[: len(filters)]) if seed is None else result

        return render

    work = Worker(start_folder(tmp_path / "out", run), make, seed=7)
    assert {work(unit).outcome for unit in run.units} == {"rendered"}
    results = open_store(tmp_path / "out")
    for entry in results:
        expected = with_snapshots(entry.layer, [entry.filter], 8 if entry.filter == 1 else 7).snapshots[0]
        assert entry.snapshots is not None
        assert entry.snapshots.dtype == torch.uint8
        assert torch.equal(entry.snapshots, expected)
    stored, each = results.layer("a").snapshots, [results["a", number].snapshots for number in range(3)]
    assert stored is not None
    assert all(one is not None and torch.equal(one, other) for one, other in zip(each, stored, strict=True))
    with Image.open(results.animate("a", 2, tmp_path / "two.gif")) as animation:
        assert getattr(animation, "n_frames", 1) == 4
    exported = {path.name for path in results.export(tmp_path / "png", "b")}
    assert {"filter-0000.webp", "filter-0001.webp"} <= exported


@pytest.mark.usefixtures("unsynchronised")
def test_sweep_without_snapshots_cannot_be_animated(tmp_path: Path) -> None:
    fill(tmp_path, toy_run(), Toy())
    results = open_store(tmp_path)
    assert results["head", 1].snapshots is None
    assert results.layer("head").snapshots is None
    with pytest.raises(ValueError, match="this sweep has no snapshots; sweep with snapshots=N"):
        results.animate("head", 1, tmp_path / "one.gif")


@pytest.mark.usefixtures("unsynchronised")
def test_missing_layers_filters_and_units_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the folder of a sweep: it has no run\.json"):
        open_store(tmp_path)
    run = toy_run()
    folder = start_folder(tmp_path, run)
    results = open_store(tmp_path)
    with pytest.raises(ValueError, match=r"no filter of layer 'head' has been rendered yet"):
        results.layer("head")
    assert (len(results), list(results), results.filters("head"), results.export(tmp_path / "png")) == (0, [], (), [])
    work = Worker(folder, Toy(broken=(3,)), seed=7)
    outcomes = [work(unit) for unit in run.units if unit.layer == "head"]
    assert [done.outcome for done in outcomes] == ["rendered", "failed"]
    assert outcomes[1].error == "RuntimeError: these cannot be rendered"
    assert results.filters("head") == (0, 1), "the store does not look again for units that were not done"
    assert results.layer("head").filters == (0, 1)
    for function in (results.layer, results.filters):
        with pytest.raises(ValueError, match=r"the sweep has no layer 'haed'; did you mean 'head'\?"):
            function("haed")
    with pytest.raises(ValueError, match=r"the sweep has no filter 4 of layer 'head'; it has 0-3"):
        _ = results["head", 4]
    with pytest.raises(ValueError, match=r"filter 2 of layer 'head' has not been rendered yet"):
        _ = results["head", 2]
    report = validate(tmp_path)
    assert report.status.failed == {"head/00002-00003": "RuntimeError: these cannot be rendered"}
    assert (report.status.units, report.status.done, report.status.filters, report.status.filters_done) == (5, 1, 9, 2)
    assert not report.orphans
    assert not report.sound
    assert fill(tmp_path, run, Toy()).complete
    assert validate(tmp_path).sound


@pytest.mark.usefixtures("unsynchronised")
def test_files_that_belong_to_no_unit_are_reported_as_orphans(tmp_path: Path) -> None:
    path = tmp_path / "units" / "run"  # names above the folder must not be confused with names in it
    run = toy_run()
    fill(path, run, Toy())
    folder = Folder(path, run)
    assert validate(path).sound
    first = shard_of(folder, run.units[0])
    strangers = [
        path / "notes.txt",
        path / "units" / "tail" / "00000-00001.json",
        folder.sidecar(run.units[0]).with_name(".00000-00001.json.elsewhere.1.abcd.tmp"),
        first.with_name(f"{run.units[0].name.split('/')[1]}-0123456789ab.safetensors"),
    ]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_bytes(b"?")
    report = validate(path)
    assert report.status.complete
    assert not report.sound
    assert set(report.orphans) == {str(stranger.relative_to(path)) for stranger in strangers}
    change(folder.sidecar(run.units[0]), shorten)
    report = validate(path)  # without a sidecar, none of the unit's shards is known to be an orphan
    assert set(report.orphans) == {str(stranger.relative_to(path)) for stranger in strangers[:3]}
    assert set(report.status.damaged) == {run.units[0].name}


@pytest.mark.usefixtures("unsynchronised")
def test_undamaged_shard_that_no_sidecar_names_is_reported_as_spare(tmp_path: Path) -> None:
    run = toy_run()
    fill(tmp_path, run, Toy())
    path = shard_of(Folder(tmp_path, run), run.units[0])
    data = path.read_bytes() + b"?"
    spare = path.with_name(f"{path.stem.rpartition('-')[0]}-{hashlib.sha256(data).hexdigest()[:12]}.safetensors")
    spare.write_bytes(data)
    report = validate(tmp_path)
    assert report.sound
    assert report.spares == (str(spare.relative_to(tmp_path)),)
    spare.write_bytes(data[:-1])  # its checksum is not the one in its name
    assert validate(tmp_path).orphans == report.spares


@pytest.mark.usefixtures("unsynchronised")
def test_export_writes_pngs_of_all_or_some_layers(tmp_path: Path) -> None:
    run = toy_run({"a/b": 2, "head": 3})
    fill(tmp_path / "out", run, Toy())
    results = open_store(tmp_path / "out")
    paths = results.export(tmp_path / "png")
    assert {path.relative_to(tmp_path / "png").as_posix() for path in paths if "filter" in path.name} == {
        "a%2Fb/filter-0000.png",
        "a%2Fb/filter-0001.png",
        "head/filter-0000.png",
        "head/filter-0001.png",
        "head/filter-0002.png",
    }
    with Image.open(tmp_path / "png" / "head" / "filter-0001.png") as picture:
        pixels = torch.tensor(list(picture.tobytes())).reshape(8, 8, 3).permute(2, 0, 1)
    assert torch.equal(pixels, (results["head", 1].image * 255).round().long())
    some = results.export(tmp_path / "some", "head")
    assert {path.parent.name for path in some} == {"head"}
    with pytest.raises(ValueError, match="the sweep has no layer 'heads'"):
        results.export(tmp_path / "some", "heads")


# Names and modes.

ODD = (
    '<script>alert("x")</script>',
    "it's",
    "a/b",
    "a%2Fb",
    "a\\b",
    "a:b|c?d*e",
    "[0-9]",
    "Übergröße 畳み込み",
    "x" * 300,
    "x" * 299 + "y",
    "line\nbreak",
    "layer.0.conv",
)


@pytest.mark.usefixtures("unsynchronised")
def test_unusual_layer_names_give_valid_folder_names(tmp_path: Path) -> None:
    assert len({folder_of(name) for name in ODD}) == len(ODD)
    assert folder_of("layer.0.conv") == "layer.0.conv"
    assert (folder_of("."), folder_of("..")) == ("%2E", "%2E%2E")
    for name in ODD:
        assert re.fullmatch(r"[-\w.~% ,=@+]{1,110}", folder_of(name), re.ASCII), name
    run = toy_run(dict.fromkeys(ODD, 3))
    assert fill(tmp_path / "out", run, Toy()).complete
    assert validate(tmp_path / "out").sound
    for unit in run.units:
        change(Folder(tmp_path / "out", run).sidecar(unit), shorten)
    assert fill(tmp_path / "out", run, Toy()).complete
    assert validate(tmp_path / "out").sound
    results = open_store(tmp_path / "out")
    assert results.layers == ODD
    for name in ODD:
        expected = toy_result(name, range(3), 7).images
        torch.testing.assert_close(results.layer(name).images, expected, atol=0.51 / 255, rtol=0)
    assert {path.parent.parent for path in results.export(tmp_path / "png")} == {tmp_path / "png"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "png"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077], ids=oct)
def test_file_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        run = toy_run({"a": 3})
        work = Worker(start_folder(tmp_path / "out", run), Toy(broken=(2,)), seed=7)
        assert [work(unit).outcome for unit in run.units] == ["rendered", "failed"]
    finally:
        os.umask(before)
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    suffixes = Counter(path.suffix for path in paths if path.is_file())
    assert suffixes == {".json": 3, ".safetensors": 1, ".jsonl": 1}
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask


@pytest.mark.usefixtures("unsynchronised")
def test_event_log_has_one_json_object_per_line(tmp_path: Path) -> None:
    run = toy_run({'a"\n': 3})
    fill(tmp_path, run, Toy())
    change(Folder(tmp_path, run).sidecar(run.units[1]), shorten)
    fill(tmp_path, run, Toy())
    (log,) = (tmp_path / "events").iterdir()
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in events] == [
        *("start", "unit", "unit", "end"),
        *("start", "damaged", "unit", "end"),
    ]
    assert events[6]["unit"] == run.units[1].name
    assert events[6]["outcome"] == "rendered"


@pytest.mark.parametrize(
    ("optimizer", "pools", "same"),
    [
        ("activation", "auto", True),
        ("activation", "no", True),
        ("activation", "yes", False),
        ("default", "auto", False),
    ],
)
def test_folder_of_a_version_that_did_not_smooth_pools(tmp_path: Path, optimizer: str, pools: str, same: bool) -> None:
    render = {"seed": 7, "optimizer": optimizer}
    start_folder(tmp_path, toy_run(render=render))
    run = toy_run(render={**render, "smooth_pools": pools})
    if same:
        assert start_folder(tmp_path, run).run == toy_run(render=render)
    else:
        with pytest.raises(ValueError, match=r"render\.smooth_pools: null in the folder"):
            start_folder(tmp_path, run)
