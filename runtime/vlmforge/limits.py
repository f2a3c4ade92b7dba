"""What this process may use of its machine: memory, and logical processors.

A container or a service manager sets limits far below the machine's own figures, and the kernel
enforces them by killing (memory) or by stalling (processors). All of them are read here: control
groups of version 2 and 1, each with its ancestors, and the limits of the process.

Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst,
scheduler/sched-bwc.rst, and proc_pid_mountinfo(5).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from msgspec import Struct

from vlmforge import env

_ROOT = Path("/")
# Where mounts are when /proc does not say so.
_USUAL_MOUNTS = {
    "": "/sys/fs/cgroup",
    "memory": "/sys/fs/cgroup/memory",
    "cpu": "/sys/fs/cgroup/cpu",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of <malloc.h>
_OF_ITS_OWN = 32 << 20
"""Bytes from which on a piece of memory is asked of the system, and goes back to it at once. glibc
takes no more: what a layer of a large model works with is smaller."""
_MOST_KEPT = 256 << 20
"""Bytes at the heap's end that may be free and kept: what one layer of a large vision part works
with in all. With less, each layer's memory goes back, and the next one gets it page by page."""
# Version 1 has no word for "unlimited", only a figure that no machine reaches.
_V1_UNLIMITED = 1 << 60


class Room(Struct, frozen=True):
    """Memory that this process may still take.

    Attributes:
        bytes: How much.
        limit: What sets it, in words: the machine, or the limit that is tighter.
    """

    bytes: int
    limit: str


def available_memory(root: Path = _ROOT) -> Room:
    """Memory that can be used without swapping and without passing any limit of this process.

    Caches of files that the kernel would drop are counted as free.

    Args:
        root: Where `/proc` and `/sys` are found.
    """
    rooms = [_machine(root), *_of_control_groups(root), *_of_process(root)]
    return min(rooms, key=lambda room: room.bytes)


def available_cpus(root: Path = _ROOT) -> int:
    """Logical processors that this process may keep busy: affinity, cpuset and quota; at least 1.

    A quota of 1.5 processors counts as 2: with one, a third of it would be wasted.

    Args:
        root: Where `/proc` and `/sys` are found. Affinity is always that of the calling thread.
    """
    # Affinity includes the cpuset of control groups: the kernel intersects them.
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [quota for quota in _quotas(root) if quota > 0]
    return max(1, min([affinity or 1, *(math.ceil(quota) for quota in quotas)]))


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once; no more than its quota of time.

    Falls back to the number of usable logical processors where the topology is not published.
    """
    allowed = available_cpus()
    cores = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text("ascii").strip())
        except OSError:
            return allowed
    return min(len(cores) or allowed, allowed)


def settle_heap() -> None:
    """Have the C library make one heap, from now on, and keep what was just freed at its end.

    glibc makes one for each of many threads and gives back what was freed only of the first:
    pictures that a dozen threads decoded would leave a dozen heaps of 64 MB. To be called before
    there are other threads. Nothing is done where MALLOC_* or GLIBC_TUNABLES say otherwise, or with
    another C library. See mallopt(3).
    """
    if (mallopt := _of_libc("mallopt")) is not None and not env.heap_chosen():
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _OF_ITS_OWN)
        keep_freed(0)


def keep_freed(weights: int) -> None:
    """Have the heap keep as much of what was freed at its end as is little beside an engine.

    What goes back to the system, whoever comes next gets page by page. Of several engines the last
    one counts. Otherwise as `settle_heap`.

    Args:
        weights: Bytes of the engine's.
    """
    if (mallopt := _of_libc("mallopt")) is not None and not env.heap_chosen():
        mallopt(_M_TRIM_THRESHOLD, min(max(2 * _OF_ITS_OWN, weights // 8), _MOST_KEPT))


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it.

    glibc keeps pieces of less than 32 MB, and large pictures are made of such pieces.
    """
    if (trim := _of_libc("malloc_trim")) is not None:
        trim(0)


def _of_libc(name: str) -> Callable[..., int] | None:
    import ctypes  # not at the top, for the time of `import vlmforge`

    found: Callable[..., int] | None = None
    if os.name == "posix":
        found = getattr(ctypes.CDLL(None), name, None)
    return found


def _machine(root: Path) -> Room:
    rows = _table(root / "proc/meminfo")
    if "MemAvailable" in rows:
        return Room(rows["MemAvailable"] * 1024, "the machine's free memory")
    if "MemFree" in rows:  # kernels before 3.14
        return Room((rows["MemFree"] + rows.get("Cached", 0)) * 1024, "the machine's free memory")
    # Without /proc the kernel's own count is left, which takes caches for used.
    name = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return Room(os.sysconf(name) * os.sysconf("SC_PAGE_SIZE"), "the machine's memory")


def _of_process(root: Path) -> Iterator[Room]:
    """RLIMIT_AS and RLIMIT_DATA, less what is used of them."""
    used = _table(root / "proc/self/status")
    text = _text(root / "proc/self/limits")
    for name, key, what in (
        ("Max address space", "VmSize", "RLIMIT_AS (ulimit -v)"),
        ("Max data size", "VmData", "RLIMIT_DATA (ulimit -d)"),
    ):
        if found := re.search(rf"^{name}\s+(\d+)\s", text, re.MULTILINE):
            yield Room(max(0, int(found[1]) - used.get(key, 0) * 1024), what)


def _of_control_groups(root: Path) -> Iterator[Room]:
    for folder in _groups(root, ""):
        limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
        used = _number(folder / "memory.current")
        cached = _table(folder / "memory.stat").get("inactive_file", 0)
        yield from _room(folder, root, limits, used, cached)
    for folder in _groups(root, "memory"):
        stat = _table(folder / "memory.stat")
        # An ancestor that is not mounted here still tells its limit by the second of them.
        limits = [_number(folder / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
        limits = [limit for limit in limits if limit is not None and limit < _V1_UNLIMITED]
        used = _number(folder / "memory.usage_in_bytes")
        yield from _room(folder, root, limits, used, stat.get("total_inactive_file", 0))


def _room(
    folder: Path, root: Path, limits: list[int | None], used: int | None, cached: int
) -> Iterator[Room]:
    known = [limit for limit in limits if limit is not None]
    if known:
        free = min(known) - max(0, (used or 0) - cached)
        where = PurePosixPath("/") / folder.relative_to(root).as_posix()
        yield Room(max(0, free), f"the limit of {min(known) / 1e9:.2f} GB of {where}")


def _quotas(root: Path) -> Iterator[float]:
    """Processors' worth of time that each control group grants."""
    for folder in _groups(root, ""):
        if found := re.match(r"(\d+) (\d+)", _text(folder / "cpu.max")):
            yield int(found[1]) / max(1, int(found[2]))
    for folder in _groups(root, "cpu"):
        quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and period:
            yield quota / period


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of its ancestors, as far as they are mounted.

    `controller` is one of version 1, or empty for version 2.
    """
    group = _own_group(root, controller)
    mounts = [*_mounts(root, controller), (PurePosixPath("/"), _USUAL_MOUNTS[controller])]
    for mounted, mount in dict.fromkeys(mounts):
        top = root / mount.lstrip("/")
        # A group above the mounted one, or outside of our namespace, has no folder here; its
        # limits are seen in the mounted one, which is then that of the container.
        inside = group.relative_to(mounted) if group.is_relative_to(mounted) else PurePosixPath()
        own = top / (PurePosixPath() if ".." in inside.parts else inside)
        for folder in (own, *own.parents):
            if folder.is_dir():
                yield folder
            if folder == top:
                break


def _own_group(root: Path, controller: str) -> PurePosixPath:
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, names, path = (*line.split(":", 2), "", "")[:3]
        if (controller in names.split(",")) if controller else number == "0":
            return PurePosixPath(path or "/")
    return PurePosixPath("/")


def _mounts(root: Path, controller: str) -> Iterator[tuple[PurePosixPath, str]]:
    """What is mounted of the hierarchy, and where."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        hierarchy = controller in kind[2].split(",") if controller else True
        if kind[0] == ("cgroup" if controller else "cgroup2") and hierarchy:
            yield PurePosixPath(_unescaped(fields[3])), _unescaped(fields[4])


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _table(path: Path) -> Mapping[str, int]:
    """Rows of a name and a number, with or without a colon and a unit."""
    rows = re.findall(r"^([\w()]+):?[ \t]+(\d+)", _text(path), re.MULTILINE)
    return {name: int(number) for name, number in rows}


def _number(path: Path) -> int | None:
    """The number in a file; None: no file, or "max"."""
    text = _text(path).strip()
    return int(text) if re.fullmatch(r"\d+", text) else None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
