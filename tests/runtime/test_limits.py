"""What a process may use: machines, containers and services, as trees of the kernel's files."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from vlmforge.api import load as api
from vlmforge.api import memory
from vlmforge.api.config import EngineConfig
from vlmforge.engine.bundle import Bundle
from vlmforge.engine.manifest import ParallelLayout, load_manifest
from vlmforge.engine.positions.absolute import Absolute
from vlmforge.errors import BackendUnavailableError, ConfigError
from vlmforge.limits import Room, available_cpus, available_memory

GIB = 1 << 30
MACHINE = 64 * GIB
# As a machine with version 2 has them, with version 1, and with both.
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
)
MEMINFO = f"MemTotal: {2 * MACHINE // 1024} kB\nMemAvailable:   {MACHINE // 1024} kB\n"


def machine(root: Path, files: Mapping[str, object]) -> Path:
    """Write the files of a machine below `root`."""
    for name, content in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", "ascii")
    return root


def test_without_limits_it_is_what_the_machine_has_free(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2})
    assert available_memory(root).bytes == MACHINE
    assert available_memory(root).limit == "the machine's free memory"


def test_kernels_that_do_not_say_what_is_available(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 1000 kB\nCached: 50 kB"})
    assert available_memory(root).bytes == 1050 * 1024


def test_without_proc_the_kernel_is_asked_and_never_the_disk(tmp_path: Path) -> None:
    room = available_memory(tmp_path)
    assert 0 < room.bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert room.limit == "the machine's memory"


def test_a_container_of_version_2(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "proc/self/mountinfo": V2,
        "sys/fs/cgroup/memory.max": 4 * GIB,
        "sys/fs/cgroup/memory.high": "max",
        "sys/fs/cgroup/memory.current": 3 * GIB,
        "sys/fs/cgroup/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file 5",
    }
    room = available_memory(machine(tmp_path, files))
    assert room.bytes == 2 * GIB
    assert room.limit == "the limit of 4.29 GB of /sys/fs/cgroup"


def test_high_is_a_limit_too(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": 4 * GIB, "sys/fs/cgroup/memory.high": 3 * GIB}
    assert available_memory(machine(tmp_path, files)).bytes == 3 * GIB


def test_no_mounts_are_told(tmp_path: Path) -> None:
    root = machine(tmp_path, {"sys/fs/cgroup/memory.max": GIB})
    assert available_memory(root).bytes == GIB


def test_more_in_use_than_the_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": 2 * GIB}
    assert available_memory(machine(tmp_path, files)).bytes == 0


def test_caches_beyond_what_is_used_are_no_gift(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory.max": GIB,
        "sys/fs/cgroup/memory.current": 10,
        "sys/fs/cgroup/memory.stat": "inactive_file 500",
    }
    assert available_memory(machine(tmp_path, files)).bytes == GIB


@given(
    limits=st.lists(
        st.tuples(st.none() | st.integers(0, 9 * GIB), st.integers(0, GIB)), min_size=1, max_size=5
    )
)
def test_the_tightest_of_all_ancestors(limits: list[tuple[int | None, int]]) -> None:
    """Each level is a folder within the one before it: a limit, or none, and what is used."""
    folder, files = "sys/fs/cgroup", {}
    for level, (limit, used) in enumerate(limits):
        folder += f"/level{level}.slice"
        files[f"{folder}/memory.max"] = "max" if limit is None else str(limit)
        files[f"{folder}/memory.current"] = str(used)
    group = folder.removeprefix("sys/fs/cgroup")
    files |= {"proc/self/cgroup": f"0::{group}", "proc/self/mountinfo": V2}
    expected = [max(0, limit - used) for limit, used in limits if limit is not None]
    with tempfile.TemporaryDirectory() as place:
        room = available_memory(machine(Path(place), files))
    assert room.bytes == min([MACHINE, *expected])


def test_a_service_of_version_1(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/system.slice"
    files = {
        "proc/self/cgroup": "4:memory:/system.slice/it.service\n1:cpu:/\n0::/",
        "proc/self/mountinfo": V1,
        f"{group}/memory.limit_in_bytes": 2 * GIB,
        f"{group}/memory.usage_in_bytes": GIB,
        f"{group}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}",
        f"{group}/it.service/memory.limit_in_bytes": 9223372036854771712,  # "unlimited"
        f"{group}/it.service/memory.usage_in_bytes": 5,
    }
    assert available_memory(machine(tmp_path, files)).bytes == 3 * GIB // 2


def test_version_1_tells_the_limit_of_an_ancestor_that_is_not_mounted(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/memory/memory.stat": f"hierarchical_memory_limit {GIB}",
    }
    assert available_memory(machine(tmp_path, files)).bytes == GIB


@pytest.mark.parametrize(
    ("group", "mounted"),
    [
        ("/docker/abc", "/docker/abc"),  # bound into the container, without a namespace
        ("/docker/abc", "/docker/other"),  # a group that is not below the mounted one
        ("/../../user.slice", "/"),  # outside of our namespace
        ("/docker/abc/gone", "/docker/abc"),
    ],
)
def test_the_mounted_group_stands_for_those_that_are_not_seen(
    tmp_path: Path, group: str, mounted: str
) -> None:
    files = {
        "proc/self/cgroup": f"0::{group}",
        "proc/self/mountinfo": V2.replace(" / ", f" {mounted} ", 1),
        "sys/fs/cgroup/memory.max": GIB,
    }
    assert available_memory(machine(tmp_path, files)).bytes == GIB


def test_a_mount_with_a_blank_in_its_name(tmp_path: Path) -> None:
    mount = V2.replace("/sys/fs/cgroup", "/my\\040groups")
    files = {"proc/self/mountinfo": mount, "my groups/memory.max": GIB}
    assert available_memory(machine(tmp_path, files)).bytes == GIB


def test_limits_of_the_process(tmp_path: Path) -> None:
    limits = (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        f"Max data size             {2 * GIB}           unlimited            bytes     \n"
        f"Max address space         {3 * GIB}           unlimited            bytes     \n"
    )
    used = f"VmSize:\t {2 * GIB // 1024} kB\nVmData:\t {GIB // 2 // 1024} kB"
    root = machine(tmp_path, {"proc/self/limits": limits, "proc/self/status": used})
    room = available_memory(root)
    assert room.bytes == GIB
    assert room.limit == "RLIMIT_AS (ulimit -v)"


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
from vlmforge.limits import available_memory
room = available_memory()
print(0 < room.bytes < 1 << 30, room.limit)
"""


def test_a_real_process_with_a_limit() -> None:
    command = [sys.executable, "-c", LIMITED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "True RLIMIT_DATA (ulimit -d)\n"


# --- processors -------------------------------------------------------------------------------


@pytest.fixture
def _eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.usefixtures("_eight")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"sys/fs/cgroup/cpu.max": "1000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "99900000 100000"}, 8),
        ({"sys/fs/cgroup/a/cpu.max": "max 100000", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": 50000}, 8),  # no period: says nothing
        (
            {
                "proc/self/mountinfo": V1,
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": 400000,
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100000,
            },
            4,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
            },
            8,
        ),
    ],
)
def test_processors(tmp_path: Path, files: Mapping[str, object], expected: int) -> None:
    both = {"proc/self/cgroup": "2:cpu,cpuacct:/\n0::/a", **files}
    assert available_cpus(machine(tmp_path, both)) == expected


def test_affinity_is_honoured() -> None:
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from vlmforge.limits import available_cpus; print(available_cpus())"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"


# --- what is done with it ---------------------------------------------------------------------


def test_an_engine_is_planned_within_what_is_free(
    hf_engine: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(hf_engine, load_manifest(hf_engine))
    manifest = bundle.manifest
    row = 1024 * manifest.kv.bytes_per_token
    weights = sum(part.loaded_bytes for part in manifest.parts)
    config = EngineConfig(max_batch_size=4, cache_max_entry_count=1.0)
    assert memory.load_options(bundle, config, 64 * GIB).slots == 4
    with caplog.at_level(logging.WARNING, "vlmforge"):
        planned = memory.load_options(bundle, config, weights + 2.5 * row)
    assert (planned.slots, planned.blocks) == (4, 2.5 * 1024 // 64)
    assert "memory for 2560 of 4096 tokens that 4 sequences may have in all" in caplog.text
    many = EngineConfig(max_batch_size=10**4, cache_max_entry_count=1.0)
    assert memory.load_options(bundle, many, weights + 2.5 * row).slots == 10
    small = EngineConfig(cache_max_entry_count=1.0, cache_block_seq_len=16)
    assert memory.load_options(bundle, small, weights + 2.5 * row).block_size == 16
    # Of more ranks, which hold two of the four heads each: a process, and two heads twice.
    monkeypatch.setattr(memory, "_RANK_BYTES", 1000)
    for parallel, heads in ((ParallelLayout(2, 2), 4), (ParallelLayout(3, 2), 6)):
        ranks = Bundle(hf_engine, structs.replace(manifest, parallel=parallel))
        taken = weights + (parallel.tp - 1) * 1000
        planned = memory.load_options(ranks, config, taken + 2.5 * row * heads / 4)
        assert planned.blocks == 2.5 * 1024 // 64


def test_what_does_not_fit_names_who_limits_it(hf_engine: Path) -> None:
    bundle = Bundle(hf_engine, load_manifest(hf_engine))
    with pytest.raises(BackendUnavailableError) as caught:
        memory.load_options(bundle, EngineConfig(), 1000.0)
    assert caught.value.found == f"0.00 GB for the cache, by {available_memory().limit}"
    assert "raise the limit" in caught.value.fix


def test_a_window_that_is_too_large_names_the_checkpoint(hf_engine: Path) -> None:
    """Of plans, and of engines of before, whose tables nobody knows."""
    manifest = load_manifest(hf_engine)
    vision, decoder = manifest.parts
    plan = structs.replace(decoder, rotary_tables=None)
    unknown = structs.replace(manifest.decode, positions=Absolute())
    for fixed in (
        structs.replace(manifest, parts=(vision, plan)),
        structs.replace(manifest, decode=unknown),
    ):
        with pytest.raises(ConfigError) as caught:
            memory.load_options(Bundle(hf_engine, fixed), EngineConfig(session_len=5000), 1e12)
        assert caught.value.summary == "session_len is larger than the engine's window."
        assert caught.value.expected == "at most 1024"
        assert caught.value.fix == (
            f"build-engine CHECKPOINT -o {hf_engine} --session-len 5000 --force, "
            f"where CHECKPOINT is {manifest.provenance.source}"
        )


def test_a_window_beyond_what_the_model_attends_to_is_refused(hf_engine: Path) -> None:
    manifest = load_manifest(hf_engine)
    positions = structs.replace(manifest.decode.positions, attention_window=3000)
    narrow = structs.replace(manifest, decode=structs.replace(manifest.decode, positions=positions))
    bundle = Bundle(hf_engine, narrow)
    assert memory.load_options(bundle, EngineConfig(session_len=3000), 1e12).capacity == 3000
    with pytest.raises(ConfigError, match="what the model attends to") as caught:
        memory.load_options(bundle, EngineConfig(session_len=3001), 1e12)
    assert caught.value.fix == "EngineConfig(session_len=3000)"


def test_longer_tables_are_counted(hf_engine: Path) -> None:
    """A window that fits to the byte as it was built, and as it is made at load."""
    manifest = load_manifest(hf_engine)
    bundle = Bundle(hf_engine, manifest)
    weights = sum(part.loaded_bytes for part in manifest.parts)
    length = 64 * 100
    config = EngineConfig(session_len=length, cache_max_entry_count=1.0, max_batch_size=1)
    tables = 2 * 4 * length * manifest.kv.head_dim // 2
    exact = weights + tables + length * manifest.kv.bytes_per_token
    assert memory.load_options(bundle, config, exact).capacity == length
    with pytest.raises(BackendUnavailableError, match="does not fit the memory"):
        memory.load_options(bundle, config, exact - 1)


def test_a_pipeline_is_planned_within_the_limits(
    hf_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "available_memory", lambda: Room(1000, "a limit"))
    with pytest.raises(BackendUnavailableError, match="does not fit the memory"):
        api.pipeline(hf_engine)
