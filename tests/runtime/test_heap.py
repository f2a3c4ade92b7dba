"""Memory that was freed: how the C library keeps it, and what goes back to the system."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import resident
from vlmforge import env
from vlmforge.limits import return_freed_memory

# Threads that all have memory at once, and how many heaps it came from.
HEAPS = """
import ctypes, sys, threading
from vlmforge.limits import settle_heap
settle_heap()
everybody = threading.Barrier(6)
def allocate():
    kept = [bytearray(50_000) for _ in range(20)]
    everybody.wait()
threads = [threading.Thread(target=allocate) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.parametrize(
    ("environment", "single"),
    [
        ({}, True),
        ({"MALLOC_ARENA_MAX": "4"}, False),
        ({"MALLOC_TRIM_THRESHOLD_": "4096"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, True),
    ],
)
def test_one_heap_unless_somebody_chose(
    tmp_path: Path, environment: dict[str, str], single: bool
) -> None:
    command = [sys.executable, "-c", HEAPS, str(tmp_path / "heaps.xml")]
    subprocess.run(command, env={**os.environ, **environment}, check=True)
    heaps = (tmp_path / "heaps.xml").read_text("ascii").count("<heap ")
    assert (heaps == 1) == single


CHOSEN = [
    *((f"MALLOC_{name}", "1") for name in ("ARENA_MAX", "MMAP_THRESHOLD_", "TRIM_THRESHOLD_")),
    *(
        ("GLIBC_TUNABLES", f"glibc.malloc.hugetlb=1:glibc.malloc.{name}=1")
        for name in ("arena_max", "arena_test", "mmap_threshold", "mmap_max", "trim_threshold")
    ),
]
OTHERS = [
    ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
    ("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=2048:glibc.malloc.hugetlb=2"),
    ("GLIBC_TUNABLES", ""),
    ("MALLOC_CONF", "background_thread:true"),
]


@pytest.mark.parametrize(
    ("name", "value", "chosen"),
    [*((*pair, True) for pair in CHOSEN), *((*pair, False) for pair in OTHERS)],
)
def test_whose_settings_of_the_heap_hold(
    name: str, value: str, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in [*os.environ]:
        if variable.startswith("MALLOC_") or variable == "GLIBC_TUNABLES":
            monkeypatch.delenv(variable)
    assert not env.heap_chosen()
    monkeypatch.setenv(name, value)
    assert env.heap_chosen() == chosen


# Memory in some pieces that is freed and taken again: how often the system gave a page.
FAULTS = """
import resource, sys
from vlmforge.limits import keep_freed, settle_heap
pieces, size, weights = map(int, sys.argv[1:])
settle_heap()
keep_freed(weights)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    before = faults()
    kept = [b"1" * size for _ in range(pieces)]
    del kept
print(faults() - before)
"""


PICTURE, LAYER = (5, 1_200_000), (8, 25_000_000)


@pytest.mark.parametrize(
    ("environment", "pieces", "weights", "kept"),
    [
        ({}, PICTURE, 0, True),
        ({}, LAYER, 4 << 30, True),
        ({}, LAYER, 64 << 20, False),  # it would be more than the engine
        ({"MALLOC_ARENA_MAX": "1"}, PICTURE, 4 << 30, False),
    ],
)
def test_what_was_freed_last_is_there_for_the_next_one(
    environment: dict[str, str], pieces: tuple[int, int], weights: int, kept: bool
) -> None:
    command = [sys.executable, "-c", FAULTS, *map(str, (*pieces, weights))]
    found = subprocess.run(
        command, env={**os.environ, **environment}, check=True, capture_output=True
    )
    pages = pieces[0] * pieces[1] // resource.getpagesize()
    assert (int(found.stdout) < pages / 10) == kept


def test_freed_memory_goes_back() -> None:
    """Blocks between others that stay: the C library would keep them.

    They lie in a hundred groups of a megabyte, so that pages of 64 KB are free too.
    """
    groups = [[bytearray(b"1" * 100_000) for _ in range(10)] for _ in range(100)]
    del groups[::2]
    before = resident()
    return_freed_memory()
    assert before - resident() > 40_000_000
    assert len(groups) == 50
