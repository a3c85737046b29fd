"""Memory that the process keeps while steps run."""

import os
import platform
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from featvis_func.cpu import malloc
from featvis_func.cpu.malloc import kept_memory
from featvis_func.models import Model
from featvis_func.rendering.plan import make_renderer

GLIBC = platform.libc_ver()[0] == "glibc"


class Library:
    """Stands in for glibc and records the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def mallopt(self, parameter: int, value: int) -> None:
        self.calls.append((parameter, value))

    def malloc_trim(self, pad: int) -> None:
        self.calls.append((pad,))


KEEP = [(-4, 0), (-1, -1)]
RESTORE = [(-4, 65536), (-3, 2**25), (-1, 2**26), (0,)]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    stub = Library()
    monkeypatch.setattr(malloc, "_glibc", lambda: stub)
    yield stub
    assert malloc._active == 0


def test_settings_are_restored_after_the_last_of_nested_blocks(library: Library) -> None:
    with kept_memory():
        assert library.calls == KEEP
        with kept_memory(), kept_memory(False):
            pass
        assert library.calls == KEEP
    assert library.calls == KEEP + RESTORE


def test_settings_are_restored_after_an_error(library: Library) -> None:
    with pytest.raises(KeyError), kept_memory():
        raise KeyError
    assert library.calls == KEEP + RESTORE


def test_settings_are_restored_after_the_last_of_overlapping_threads(library: Library) -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with kept_memory():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with kept_memory():
        thread.start()
        inside.wait()
    assert library.calls == KEEP
    leave.set()
    thread.join()
    assert library.calls == KEEP + RESTORE


def test_settings_do_not_change_with_false(library: Library) -> None:
    with kept_memory(False):
        pass
    assert not library.calls


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX_", "GLIBC_TUNABLES"])
def test_settings_do_not_change_where_the_environment_has_some(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert malloc._glibc() is None


@pytest.mark.parametrize("error", [AttributeError, ValueError, OSError, None])
def test_settings_do_not_change_for_another_c_library(
    error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confstr(name: str) -> None:
        if error:
            raise error(name)

    monkeypatch.setattr(malloc.os, "confstr", confstr)
    assert malloc._glibc() is None


@pytest.mark.slow
@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_pages_are_reused_within_the_block_only() -> None:
    """In a process of its own: after one failed allocation glibc takes large blocks from elsewhere."""
    code = """
        import resource
        import torch
        from featvis_func.cpu.malloc import kept_memory

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(8):
                torch.ones(2**26, dtype=torch.uint8)  # 64 MiB: more than glibc keeps by default
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        with kept_memory():
            faults()
            faults()  # the first allocations of a process may not leave enough memory in one piece
            print(faults())
        print(faults())
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=True
    )
    kept, default = map(int, process.stdout.split())
    assert kept * 10 < default


@pytest.mark.parametrize("retain_memory", [True, False])
def test_renderer_keeps_memory_during_its_run_if_asked_to(library: Library, tiny: Model, retain_memory: bool) -> None:
    during: list[Any] = []
    renderer = make_renderer(tiny, "5", [0, 1], steps=2, retain_memory=retain_memory)
    renderer(progress=lambda _: during.append(list(library.calls)))
    assert during
    expected = KEEP if retain_memory else []
    assert all(calls == expected for calls in during)
    assert library.calls == (KEEP + RESTORE if retain_memory else [])
