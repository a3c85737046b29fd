"""A sweep's folder outlives kills, failing and full disks, damage and company; and what can be read from it."""

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
import time
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
from featvis_func.sweep import shard as store
from featvis_func.sweep.launchers import Rank, TooManyFailedError
from featvis_func.sweep.layout import Folder, Run, open_folder, set_aside, start_folder
from featvis_func.sweep.plan import Unit, folder_of
from featvis_func.sweep.shard import commit, read_commit
from featvis_func.sweep.store import open_store
from featvis_func.sweep.validate import read_status, validate
from featvis_func.sweep.worker import Worker
from tests.sweep_toys import PROCESSES, STEPS, Toy, content, fill, filling, join, ready, start, toy_result, toy_run

KILLS = 200


def committed(folder: Folder) -> set[Unit]:
    """The units that are done; every byte of these is checked."""
    return {unit for unit in folder.run.units if read_commit(folder, unit, thorough=True) is not None}


def sound_units(folder: Folder) -> set[Unit]:
    """The same where some are known to be damaged."""
    found = set()
    for unit in folder.run.units:
        try:
            found |= {unit} if read_commit(folder, unit, thorough=True) is not None else set()
        except ValueError:
            continue
    return found


def temporaries(path: Path) -> set[Path]:
    return {file for file in path.rglob("*") if files.is_temporary(file)}


def loose_shards(path: Path) -> set[str]:
    """Shards that no sidecar names."""
    named = {json.loads(file.read_bytes())["sha256"][:12] for file in path.glob("units/*/*[0-9].json")}
    return {file.name for file in path.glob("units/*/*.safetensors") if file.stem[-12:] not in named}


@pytest.fixture
def unsynchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process counts as one that is no more, where its own temporary files are concerned."""
    monkeypatch.setattr(files, "_runs", lambda process: False)


# Kills.


def test_two_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    chance = random.Random(0)
    run = toy_run({"a.conv": 40, "b.conv": 41})
    fill(tmp_path / "whole", run, Toy())
    whole = content(tmp_path / "whole")
    toy = Toy(tmp_path / "log", pause=0.001)
    seen: Counter[str] = Counter()
    cycles = 0
    folder = Folder(tmp_path / "0", run)
    before: set[Unit] = set()
    while cycles < KILLS:
        workers = 1 + cycles % 2
        first = len(toy.rendered())
        torn = temporaries(folder.path)
        arguments = (folder.path, run, toy)
        running = [start(filling, *arguments, Rank(number, workers), False, True) for number in range(workers)]
        for _, connection in running:
            connection.send("go")
        for process, _ in running:
            time.sleep(chance.uniform(0, 0.06 / workers))
            process.kill()
        codes = []
        for process, connection in running:
            process.join()
            codes.append(process.exitcode)
            connection.close()
            process.close()
        assert set(codes) <= {-signal.SIGKILL, 0}
        cycles += -signal.SIGKILL in codes
        seen["processes killed"] += codes.count(-signal.SIGKILL)

        after = committed(folder)
        assert before <= after, "lost"
        lines = toy.rendered()[first:]
        redone = len(lines) - len(after - before)
        assert 0 <= redone <= workers
        assert not set(lines) & {f"{unit.layer} {unit.filters[0]}" for unit in before}, "done again"
        if after > before:
            assert not torn & temporaries(folder.path), "abandoned files stay"
            seen["temporary files removed"] += len(torn)
        seen["units rendered twice"] += redone
        seen["kills that left temporary files"] += bool(temporaries(folder.path))
        seen["kills between a shard and its sidecar"] += bool(loose_shards(folder.path))
        seen["units committed"] += len(after - before)
        before = after
        if len(after) == len(run.units):
            assert fill(folder.path, run, toy).complete
            assert content(folder.path) == whole
            seen["runs completed"] += 1
            folder, before = Folder(tmp_path / str(cycles), run), set()
    assert fill(folder.path, run, toy).complete
    assert content(folder.path) == whole
    assert validate(folder.path).sound
    print(f"{cycles} times killed:", dict(seen))
    assert seen["kills that left temporary files"]
    assert seen["kills between a shard and its sidecar"]
    assert seen["runs completed"]


# A disk that fails.

Kind = Literal["once", "after", "for good", "full"]
"""The call fails; it fails, though it did what it should; it and all later ones fail; from there on, the disk is full,
and the first write still finds room for half of its bytes."""


class Disk:
    """Counts the calls that concern the files below a folder, and lets the n-th fail."""

    def __init__(self, folder: Path, number: int, kind: Kind = "once") -> None:
        self.calls: list[str] = []
        self.number = number
        self.kind = kind
        self.handles: set[int] = set()
        self.folder = str(folder)

    def concerns(self, *names: Any) -> bool:
        return any(str(name).startswith(self.folder) for name in names if isinstance(name, str | os.PathLike))

    def fails(self, call: str) -> bool:
        """Whether the call that is next does."""
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
        """Stands between Python and the disk; fsync is counted, and not done."""
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
    """Damages what can be; returns what the bad files hold."""
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
@pytest.mark.parametrize("scene", ["new", "damaged", "failing"])
@pytest.mark.usefixtures("gone", "unsynchronised")
def test_a_failure_at_each_call_in_turn_commits_nothing_bad(tmp_path: Path, scene: str, kind: Kind) -> None:
    run = toy_run({"a": 3, "b": 4} if scene == "damaged" else {"a": 2, "b": 1})
    fill(tmp_path / "whole", run, Toy())
    whole = content(tmp_path / "whole")
    origin = tmp_path / "origin"
    bad: set[bytes] = set()
    if scene == "damaged":
        shutil.copytree(tmp_path / "whole", origin)
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
            assert second in ("rendered", "found")  # it was, though the disk said that it could not be
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
            assert good <= sound_units(folder), "lost"
        else:
            committed(folder)
        assert disk.calls[:number] == calls[:number]
        assert fill(folder.path, run, Toy()).complete
        assert content(folder.path) == whole, disk.calls
        assert validate(folder.path).sound
        aside = {file.read_bytes() for file in (folder.path / "damaged").rglob("*") if file.is_file()}
        assert bad <= aside, disk.calls
        shutil.rmtree(folder.path)
    print(f"{scene}, {kind}: {len(calls)} calls: {dict(Counter(calls))}; runs that failed: {dict(outcomes)}")
    assert len(calls) > 50
    assert outcomes["ended"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_call_returns(tmp_path: Path) -> None:
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
def test_a_disk_that_writes_some_bytes_at_a_time_gets_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_run()
    fill(tmp_path / "whole", run, Toy())
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data[:100])))
    fill(tmp_path / "slow", run, Toy())
    monkeypatch.undo()
    assert content(tmp_path / "slow") == content(tmp_path / "whole")


# A disk that is full.


def filling_a_little(connection: Connection, path: Path, run: Run, toy: Toy, most: int | None) -> None:
    """Tells of the error, and ends with it; no file may be larger than ``most``."""
    ready(connection)
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        fill(path, run, toy)
    except OSError as error:
        connection.send(str(error))
        raise SystemExit(1) from error
    connection.send("")


def test_files_that_grow_too_large_end_the_run_and_nothing_is_partial(tmp_path: Path) -> None:
    run = toy_run()
    fill(tmp_path / "whole", run, Toy(side=64))
    toy = Toy(tmp_path / "log", side=64)
    process, connection = start(filling_a_little, tmp_path / "out", run, toy, 20_000)
    message = connection.recv()
    join(process, connection, code=1)
    print(message)
    assert "File too large" in message
    assert len(toy.rendered()) == 1, "went on, though there was no use"
    assert not content(tmp_path / "out").keys() - {"run.json"}
    process, connection = start(filling_a_little, tmp_path / "out", run, toy, None)
    assert connection.recv() == ""
    join(process, connection)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where one may be mounted."""
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


def test_a_full_disk_ends_the_run_and_with_room_it_goes_on(tmp_path: Path, small_disk: Path) -> None:
    run = toy_run({"a": 60, "b": 60})
    fill(tmp_path / "whole", run, Toy(side=64))
    toy = Toy(tmp_path / "log", side=64)
    folder = Folder(small_disk / "out", run)
    process, connection = start(filling_a_little, folder.path, run, toy, None)
    message = connection.recv()
    join(process, connection, code=1)
    done = committed(folder)
    print(f"{message}; {len(done)} of {len(run.units)} units were committed")
    assert "No space left on device" in message
    assert 0 < len(done) < len(run.units)
    assert len(toy.rendered()) == len(done) + 1
    assert not temporaries(folder.path)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    process, connection = start(filling_a_little, folder.path, run, toy, None)
    assert connection.recv() == ""
    join(process, connection)
    assert content(folder.path) == content(tmp_path / "whole")


# Damage.


def change(path: Path, edit: Callable[[bytearray], None], *, keep_time: bool = False) -> list[bytes]:
    """Edits a file in its place, and returns what it holds then."""
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
    """Changes one digit of a number, so that the file is still JSON."""
    place = data.index(b'"score": ') + 13
    data[place] = ord("0") + (data[place] - ord("0") + 1) % 10
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
    "sidecar with no number": lambda f, u: change(f.sidecar(u), not_a_number),
    "sidecar that is no object": lambda f, u: change(f.sidecar(u), lambda data: data.__init__(b"[1]")),
    "sidecar of another unit": lambda f, u: change(
        f.sidecar(u), lambda data: data.__init__(f.sidecar(f.run.units[0]).read_bytes())
    ),
    "both": lambda f, u: change(shard_of(f, u), flip) + change(f.sidecar(u), flip),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.usefixtures("unsynchronised")
def test_damage_is_found_and_mended_and_what_was_damaged_is_kept(tmp_path: Path, kind: str) -> None:
    run = toy_run()
    toy = Toy(tmp_path / "log")
    fill(tmp_path / "out", run, toy)
    folder = Folder(tmp_path / "out", run)
    assert validate(folder.path).sound
    whole, rendered = content(folder.path), toy.rendered()
    unit = run.units[2]
    bad = DAMAGES[kind](folder, unit)
    report = validate(folder.path)
    assert set(report.status.damaged) == {unit.name}
    assert not report.sound
    assert not report.status.complete
    assert not report.orphans
    print(report.status.damaged)
    status = fill(folder.path, run, toy)
    assert status.complete
    assert not status.damaged
    assert toy.rendered()[len(rendered) :] == ["block1.conv 4"]
    assert validate(folder.path).sound
    assert content(folder.path) == whole
    aside = [file.read_bytes() for file in (folder.path / "damaged").rglob("*") if file.is_file()]
    assert all(data in aside for data in bad)


@pytest.mark.parametrize(
    "edit",
    [shorten, flip, empty, lambda data: data.replace(b"7", b"NaN"), lambda data: data.__init__(b"7")],
    ids=["truncated", "flipped", "empty", "no number", "no object"],
)
@pytest.mark.usefixtures("unsynchronised")
def test_a_damaged_run_json_is_found_and_written_anew_and_kept(
    tmp_path: Path, edit: Callable[[bytearray], bytearray | None]
) -> None:
    run = toy_run()
    toy = Toy(tmp_path / "log")
    path = tmp_path / "out"
    fill(path, run, toy)
    whole, rendered = content(path), toy.rendered()
    data = bytearray((path / "run.json").read_bytes())
    bad = bytes(edit(data) or data)
    (path / "run.json").write_bytes(bad)
    for read in (validate, open_store):
        with pytest.raises(ValueError, match=r"run\.json is damaged"):
            read(path)
    assert fill(path, run, toy).complete
    assert toy.rendered() == rendered
    assert content(path) == whole
    assert (path / "damaged" / "run.json.0").read_bytes() == bad
    assert validate(path).sound


@pytest.mark.usefixtures("unsynchronised")
def test_no_flipped_bit_in_a_sidecar_or_in_run_json_goes_unseen(tmp_path: Path) -> None:
    run = toy_run({"a": 2})
    fill(tmp_path, run, Toy())
    (unit,) = run.units
    folder = Folder(tmp_path, run)
    read: dict[Path, Callable[[], Any]] = {
        folder.sidecar(unit): lambda: read_commit(folder, unit),
        tmp_path / "run.json": lambda: open_folder(tmp_path),
    }
    chance = random.Random(0)
    flips = 0
    for path, function in read.items():
        data, value = path.read_bytes(), function()
        for place in range(len(data)):
            bad = bytearray(data)
            bad[place] ^= 1 << chance.randrange(8)
            path.write_bytes(bad)
            try:
                assert function() == value, bad
                assert json.loads(bad) == json.loads(data), bad  # as 1e-05 and 1E-05
            except ValueError as error:
                assert "damaged" in str(error)  # noqa: PT017
            flips += 1
        path.write_bytes(data)
    print(f"{flips} flipped bits")


def test_what_is_set_aside_replaces_nothing(tmp_path: Path) -> None:
    for text in ("first", "second", "third"):
        (tmp_path / "a").write_text(text)
        moved = set_aside(tmp_path, tmp_path / "a", tmp_path / "missing")
        assert [path.read_text() for path in moved] == [text]
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["a.0", "a.1", "a.2"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
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


# Company.


@pytest.mark.parametrize("jitter", [False, True], ids=["equal numbers", "numbers of its own"])
@pytest.mark.parametrize("backwards", [False, True], ids=["same order", "from both ends"])
@pytest.mark.parametrize("damaged", [False, True], ids=["new folder", "all damaged"])
def test_two_runs_in_one_folder_do_no_damage(tmp_path: Path, jitter: bool, backwards: bool, damaged: bool) -> None:
    run = toy_run({"a": 31, "b/c": 20})
    fill(tmp_path / "whole", run, Toy())
    whole = content(tmp_path / "whole")
    folder = Folder(tmp_path / "out", run)
    if damaged:
        shutil.copytree(tmp_path / "whole", folder.path)
        for unit in run.units:
            change(folder.sidecar(unit), shorten)
    toy = Toy(tmp_path / "log", jitter=jitter, pause=0.002)
    running = [start(filling, folder.path, run, toy, Rank(), back, True) for back in (False, backwards)]
    numbers = [process.pid for process, _ in running]
    for _, connection in running:
        connection.send("go")
    for process, connection in running:
        join(process, connection)
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
        assert content(folder.path) == whole
        assert validate(folder.path).sound
    lines = Counter(toy.rendered())
    print(f"{sum(n > 1 for n in lines.values())} of {len(lines)} units were rendered twice,", end=" ")
    print(f"{len(loose_shards(folder.path))} shards are not the ones that count")
    assert set(lines) == {f"{unit.layer} {unit.filters[0]}" for unit in run.units}


def starting(connection: Connection, path: Path, runs: list[Run], meet: Any) -> None:
    """Starts a folder after another, each at the same moment as others do."""
    ready(connection)
    told = []
    for number, run in enumerate(runs):
        meet.wait()
        try:
            told.append(start_folder(path / str(number), run).run.hash)
        except ValueError as error:
            told.append(str(error))
    connection.send(told)


@pytest.mark.parametrize("others", [False, True], ids=["one sweep", "two sweeps"])
def test_who_starts_at_once_agrees_on_one_configuration(tmp_path: Path, others: bool) -> None:
    meet = PROCESSES.Barrier(4)
    runs = [[toy_run(seed=number % 2 if others else 0)] * 20 for number in range(4)]
    running = [start(starting, tmp_path, own, meet) for own in runs]
    told = [connection.recv() for _, connection in running]
    for process, connection in running:
        join(process, connection)
    first = Counter()
    for number in range(20):
        path = tmp_path / str(number)
        kept = open_folder(path).run
        assert [file.name for file in path.rglob("*")] == ["run.json"]
        for own, answers in zip(runs, told, strict=True):
            if own[number].config == kept.config:
                assert answers[number] == kept.hash
            else:
                assert "holds another sweep:\n  seed: " in answers[number]
        first[kept.config["seed"]] += 1
    print(f"the seeds that were first: {dict(first)}")


@pytest.mark.usefixtures("unsynchronised")
def test_another_configuration_is_refused_and_the_difference_shown(tmp_path: Path) -> None:
    fill(tmp_path, toy_run(), Toy())
    before = content(tmp_path)
    other = toy_run({"block1.conv": 5, "tail": 4}, model="toyer", render={"seed": 7, "steps": 6})
    with pytest.raises(ValueError, match=r"holds another sweep") as caught:
        fill(tmp_path, other, Toy())
    assert str(caught.value).splitlines()[1:-1] == [
        "  layers.head: 4 there, null asked for",
        "  layers.tail: null there, 4 asked for",
        '  model: "toy" there, "toyer" asked for',
        "  render.steps: 5 there, 6 asked for",
    ]
    assert content(tmp_path) == before


# Size.


@pytest.mark.usefixtures("unsynchronised")
def test_a_finished_run_of_ten_thousand_units_renders_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "pack", lambda unit, *_, **__: unit.name.encode())  # which is what takes time
    run = toy_run({f"layer{number}": 100 for number in range(100)}, unit_size=1)
    assert len(run.units) == 10_000
    folder = start_folder(tmp_path / "out", run)
    for unit in run.units:
        commit(folder, unit, toy_result("", unit.filters, 7, side=2), [7], seconds=0.0)
    again = Toy(tmp_path / "log", side=2)
    begun = time.perf_counter()
    assert fill(tmp_path / "out", run, again).complete
    answered = time.perf_counter() - begun
    begun = time.perf_counter()
    assert validate(tmp_path / "out").sound
    validated = time.perf_counter() - begun
    print(f"10,000 units, started again: {answered:.2f} s; validated: {validated:.2f} s")
    assert again.rendered() == []


def weighing(connection: Connection, path: Path, run: Run) -> None:
    """Tells how much memory the process takes after each unit, and after each filter that is read."""
    ready(connection)
    os.fsync = lambda fd: None
    side, page = 64, os.sysconf("SC_PAGE_SIZE")

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20

    work = Worker(start_folder(path, run), Toy(side=side), seed=7)
    weights = []
    for unit in run.units:
        assert work(unit).outcome == "rendered"
        weights.append(resident())
    connection.send(weights)
    connection.send([resident() for entry in open_store(path) if entry.image.sum() > 0])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_a_long_sweep_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    run = toy_run({"a": 1000, "b": 1000})
    assert len(run.units) == 1000
    process, connection = start(weighing, tmp_path, run)
    written, read = connection.recv(), connection.recv()
    join(process, connection)
    assert len(written) == 1000
    assert len(read) == 2000
    print(f"MiB after 200 and 1000 units: {written[200]:.1f}, {written[-1]:.1f};", end=" ")
    print(f"after 400 and 2000 filters were read: {read[400]:.1f}, {read[-1]:.1f}")
    assert written[-1] - written[200] < 5  # the images of the 800 between them are 75 MiB
    assert read[-1] - read[400] < 5


# Reading.


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.usefixtures("unsynchronised")
def test_what_is_read_is_what_was_rendered(tmp_path: Path, dtype: str) -> None:
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
        found = results.layer(layer)
        assert found.images.dtype == torch.float32
        torch.testing.assert_close(found.images, expected.images, atol=tolerance, rtol=0)
        for name in ("activations", "scores", "best_step", "history", "steps"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=0, rtol=0)
        assert (found.filters, found.status) == (expected.filters, expected.status)
        assert found.config == {**run.config, "layer": layer}
        for row, number in enumerate(numbers):
            entry = results[layer, number]
            torch.testing.assert_close(entry.image, found.images[row], atol=0, rtol=0)
            torch.testing.assert_close(entry.activation, found.activations[row], atol=0, rtol=0)
            torch.testing.assert_close(entry.history, found.history[:, row], atol=0, rtol=0)
            assert (entry.layer, entry.filter, entry.steps, entry.seed) == (layer, number, STEPS, 7)
            assert (entry.score, entry.best_step) == (found.scores[row].item(), found.best_step[row].item())
            assert entry.status == found.status[row]
            assert any(torch.equal(entry.image, other.image) for other in entries)
    assert read_status(Folder(tmp_path, run)).odd == {"dead": 2}


@pytest.mark.usefixtures("unsynchronised")
def test_equal_results_are_equal_bytes_and_every_shard_says_what_it_is(tmp_path: Path) -> None:
    import safetensors

    run = toy_run()
    for name in ("a", "b"):
        fill(tmp_path / name, run, Toy())
    assert content(tmp_path / "a") == content(tmp_path / "b")
    with safetensors.safe_open(shard_of(Folder(tmp_path / "a", run), run.units[0]), framework="pt") as shard:
        assert shard.metadata() == {
            "featvis": json.dumps(
                {
                    "config": run.hash,
                    "format": 1,
                    "layer": "block1.conv",
                    "status": ["ok", "dead", "nonfinite"],
                },
                separators=(",", ":"),
            )
        }
        assert shard.get_tensor("filters").tolist() == [0, 1]


@pytest.mark.usefixtures("unsynchronised")
def test_seeds_and_scores_at_their_limits_are_kept(tmp_path: Path) -> None:
    run = toy_run({"a": 3}, unit_size=3, render={"seed": 2**64 - 1})

    def make(plan: Any) -> Callable[..., Any]:
        def render(filters: Any, /, *, seed: int | None = None) -> Any:
            result = toy_result(plan.layer, filters, 0 if seed is None else seed + 1)
            if seed is None:
                object.__setattr__(result, "status", ("ok", "nonfinite", "nonfinite"))
                result.scores[:] = -torch.inf
            else:  # the second chance, which one of the two takes
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
def test_snapshots_are_kept_and_those_of_a_second_chance_are_its_own(tmp_path: Path) -> None:
    run = toy_run({"a": 3, "b": 2}, unit_size=3)

    def filmed(layer: str, filters: Any, seed: int) -> Any:
        films = [[[(f * 50 + k * 7 + seed) % 256] * 3 for k in range(4)] for f in filters]
        snapshots = torch.tensor(films, dtype=torch.uint8)[..., None, None].expand(-1, -1, -1, 8, 8)
        return replace(toy_result(layer, filters, seed), snapshots=snapshots)

    def make(plan: Any) -> Callable[..., Any]:
        def render(filters: Any, /, *, seed: int | None = None) -> Any:
            result = filmed(plan.layer, filters, 7 if seed is None else seed)
            return replace(result, status=("ok", "nonfinite", "ok")[: len(filters)]) if seed is None else result

        return render

    work = Worker(start_folder(tmp_path / "out", run), make, seed=7)
    assert {work(unit).outcome for unit in run.units} == {"rendered"}
    results = open_store(tmp_path / "out")
    for entry in results:
        expected = filmed(entry.layer, [entry.filter], 8 if entry.filter == 1 else 7).snapshots[0]
        assert entry.snapshots is not None
        assert entry.snapshots.dtype == torch.uint8
        assert torch.equal(entry.snapshots, expected)
    whole, ones = results.layer("a").snapshots, [results["a", number].snapshots for number in range(3)]
    assert whole is not None
    assert all(one is not None and torch.equal(one, own) for one, own in zip(ones, whole, strict=True))
    with Image.open(results.animate("a", 2, tmp_path / "two.gif")) as film:
        assert getattr(film, "n_frames", 1) == 4
    exported = {path.name for path in results.export(tmp_path / "png", "b")}
    assert {"filter-0000.webp", "filter-0001.webp"} <= exported


@pytest.mark.usefixtures("unsynchronised")
def test_a_sweep_without_snapshots_has_none(tmp_path: Path) -> None:
    fill(tmp_path, toy_run(), Toy())
    results = open_store(tmp_path)
    assert results["head", 1].snapshots is None
    assert results.layer("head").snapshots is None
    with pytest.raises(ValueError, match="this sweep has no snapshots; sweep with snapshots="):
        results.animate("head", 1, tmp_path / "one.gif")


@pytest.mark.usefixtures("unsynchronised")
def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the folder of a sweep: it has no run\.json"):
        open_store(tmp_path)
    run = toy_run()
    folder = start_folder(tmp_path, run)
    results = open_store(tmp_path)
    with pytest.raises(ValueError, match=r"nothing of layer 'head' has been rendered yet"):
        results.layer("head")
    assert (len(results), list(results), results.filters("head"), results.export(tmp_path / "png")) == (0, [], (), [])
    work = Worker(folder, Toy(broken=(3,)), seed=7)
    outcomes = [work(unit) for unit in run.units if unit.layer == "head"]
    assert [done.outcome for done in outcomes] == ["rendered", "failed"]
    assert outcomes[1].error == "RuntimeError: these cannot be rendered"
    assert results.filters("head") == (0, 1), "the store looks again for what was not there"
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
def test_files_that_belong_to_no_unit_are_told(tmp_path: Path) -> None:
    path = tmp_path / "units" / "run"  # a folder's own name is no part of its files'
    run = toy_run()
    fill(path, run, Toy())
    folder = Folder(path, run)
    assert validate(path).sound
    shard = shard_of(folder, run.units[0])
    strangers = [
        path / "notes.txt",
        path / "units" / "tail" / "00000-00001.json",
        folder.sidecar(run.units[0]).with_name(".00000-00001.json.elsewhere.1.abcd.tmp"),
        shard.with_name(f"{run.units[0].name.split('/')[1]}-0123456789ab.safetensors"),
    ]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_bytes(b"?")
    report = validate(path)
    assert report.status.complete
    assert not report.sound
    assert set(report.orphans) == {str(stranger.relative_to(path)) for stranger in strangers}
    change(folder.sidecar(run.units[0]), shorten)
    report = validate(path)  # whose shard the others are cannot be told
    assert set(report.orphans) == {str(stranger.relative_to(path)) for stranger in strangers[:3]}
    assert set(report.status.damaged) == {run.units[0].name}


@pytest.mark.usefixtures("unsynchronised")
def test_a_whole_shard_that_no_sidecar_names_does_no_harm_and_is_told(tmp_path: Path) -> None:
    run = toy_run()
    fill(tmp_path, run, Toy())
    shard = shard_of(Folder(tmp_path, run), run.units[0])
    data = shard.read_bytes() + b"?"
    spare = shard.with_name(f"{shard.stem.rpartition('-')[0]}-{hashlib.sha256(data).hexdigest()[:12]}.safetensors")
    spare.write_bytes(data)
    report = validate(tmp_path)
    assert report.sound
    assert report.spares == (str(spare.relative_to(tmp_path)),)
    spare.write_bytes(data[:-1])  # another one than its name says
    assert validate(tmp_path).orphans == report.spares


@pytest.mark.usefixtures("unsynchronised")
def test_pngs_of_all_layers_or_of_some(tmp_path: Path) -> None:
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
def test_odd_names_of_layers_are_names_of_folders(tmp_path: Path) -> None:
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
def test_modes_are_those_of_any_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        run = toy_run({"a": 3})
        work = Worker(start_folder(tmp_path / "out", run), Toy(broken=(2,)), seed=7)
        assert [work(unit).outcome for unit in run.units] == ["rendered", "failed"]
    finally:
        os.umask(before)
    found = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    suffixes = Counter(path.suffix for path in found if path.is_file())
    assert suffixes == {".json": 3, ".safetensors": 1, ".jsonl": 1}
    for path in found:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask


@pytest.mark.usefixtures("unsynchronised")
def test_every_event_is_a_line_of_json(tmp_path: Path) -> None:
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
