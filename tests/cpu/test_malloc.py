"""Memory that stays with the process while steps run."""

import os
import platform
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from featvis_func.cpu import malloc as memory
from featvis_func.cpu.malloc import kept_memory
from featvis_func.models import Model
from featvis_func.rendering.renderer import make_renderer

GLIBC = platform.libc_ver()[0] == "glibc"


class Library:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, ...]] = []

    def mallopt(self, parameter: int, value: int) -> None:
        self.told.append((parameter, value))

    def malloc_trim(self, pad: int) -> None:
        self.told.append((pad,))


KEPT = [(-4, 0), (-1, -1)]
USUAL = [(-4, 65536), (-3, 2**25), (-1, 2**26), (0,)]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    found = Library()
    monkeypatch.setattr(memory, "_glibc", lambda: found)
    yield found
    assert memory._blocks == 0


def test_settings_are_put_back_after_the_last_of_several_blocks(library: Library) -> None:
    with kept_memory():
        assert library.told == KEPT
        with kept_memory(), kept_memory(False):
            pass
        assert library.told == KEPT
    assert library.told == KEPT + USUAL


def test_settings_are_put_back_after_an_error(library: Library) -> None:
    with pytest.raises(KeyError), kept_memory():
        raise KeyError
    assert library.told == KEPT + USUAL


def test_threads_that_overlap_share_the_setting(library: Library) -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with kept_memory():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with kept_memory():
        thread.start()
        inside.wait()
    assert library.told == KEPT
    leave.set()
    thread.join()
    assert library.told == KEPT + USUAL


def test_nothing_is_changed_where_it_is_not_wanted(library: Library) -> None:
    with kept_memory(False):
        pass
    assert not library.told


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX_", "GLIBC_TUNABLES"])
def test_an_allocator_set_by_the_environment_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert memory._glibc() is None


@pytest.mark.parametrize("error", [AttributeError, ValueError, OSError, None])
def test_another_library_is_left_alone(error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def confstr(name: str) -> None:
        if error:
            raise error(name)

    monkeypatch.setattr(memory.os, "confstr", confstr)
    assert memory._glibc() is None


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_pages_are_not_fetched_again() -> None:
    """In a process of its own: one that was once refused memory takes large pieces from elsewhere ever after."""
    code = """
        import resource
        import torch
        from featvis_func.cpu.malloc import kept_memory

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(8):
                torch.ones(2**26, dtype=torch.uint8)  # 64 MiB: more than glibc keeps by itself
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        with kept_memory():
            faults()
            print(faults())
        print(faults())
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=True
    )
    kept, usual = map(int, process.stdout.split())
    assert kept * 10 < usual


def test_a_run_on_the_cpu_keeps_memory_and_lets_go_of_it(library: Library, tiny: Model) -> None:
    seen: list[Any] = []
    make_renderer(tiny, "5", [0, 1], steps=2)(progress=lambda _: seen.append(list(library.told)))
    assert seen
    assert all(told[-len(KEPT) :] == KEPT for told in seen)
    assert library.told[-len(USUAL) :] == USUAL
