"""Do the GPUs of one machine meet as they should, and how long does it take?

    python3 bench/gpu_meetings.py --ranks 2

All ranks, a process each, sum and gather by our kernels and by NCCL, in a captured graph that is
replayed, and compare with sums in float64 and with each other, bit by bit. Sums with the norm
behind them are made by one kernel and by two (`--norms`: nothing else). Needs what serving needs,
and NVRTC.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import structs

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("bench", "runtime", "plugins_cuda")]

from vlmforge.backends import Communicator  # noqa: E402
from vlmforge.backends.cuda.device import ITEM_BYTES, Tensor, Work  # noqa: E402
from vlmforge.backends.number_formats import DTYPES, decode, encode  # noqa: E402
from vlmforge.backends.ranks import child, exchange, processes  # noqa: E402
from vlmforge_plugins.errors import PluginError  # noqa: E402

if TYPE_CHECKING:
    from vlmforge.backends.cuda.gpu import Gpu

PROGRAM, TASK = "gpu_meetings", "VLMFORGE_BENCH_MEETINGS"
KINDS = ("float16", "bfloat16", "float32")
ITEMS = (1, 7, 1000, 2048, 4096, 8192, 32768, 65536, 131072, 262144, 524288, 1 << 20, 1 << 21)
NORMS = (
    *(("float16", rows, 4096) for rows in (1, 2, 4, 8, 16, 64, 200)),
    *(("float16", 1, width) for width in (64, 2048, 5120, 7168, 8192)),
    *(("bfloat16", rows, 5120) for rows in (1, 8, 64)),
)
ROOM, LINKS = 1 << 12, 16  # floats of a meeting on the host; meetings of a graph


def check(ranks: Communicator, folder: Path, replays: int, norms: bool) -> int:
    """On every rank; prints on the first. The number of wrong sums."""
    from vlmforge.backends.cuda.gpu import Gpu
    from vlmforge.backends.cuda.nccl import Nccl
    from vlmforge.backends.cuda.peers import Peers

    gpu = Gpu(ranks.rank)
    files = {path.stem: path for path in folder.iterdir()}
    ways: dict[str, Any] = {"ours": Peers.made(gpu, ranks, files), "nccl": Nccl.made(gpu, ranks)}
    say = print if ranks.rank == 0 else _silent
    if not isinstance(ways["nccl"], str):
        say("NCCL", ways["nccl"]._nccl.get_version())
    wrong = 0
    for name, way in ways.items():
        if isinstance(way, str):
            say(f"{name}: cannot be had: {way}", flush=True)
            continue
        for kind in () if norms else KINDS:
            for items in ITEMS:
                words, fine = _checked(gpu, ranks, way, name, kind, items, replays)
                wrong += not fine
                say(f"{name} {kind} {items:8d}: {words}", flush=True)
        if norms:
            continue
        wrong += _gathers(gpu, ranks, way, name, say)
        wrong += _broadcasts(gpu, ranks, way, name, say)
    if isinstance(ways["ours"], Peers):
        wrong += _norms(gpu, ranks, ways["ours"], replays, say)
    say(f"{wrong} wrong", flush=True)
    return wrong


def _silent(*words: object, flush: bool = False) -> None:
    del words, flush


def _checked(
    gpu: Gpu, ranks: Communicator, way: Any, name: str, kind: str, items: int, replays: int
) -> tuple[str, bool]:
    """Sums of different numbers, one after the other in a graph, again and again."""
    rng = np.random.default_rng(items)
    shares = rng.standard_normal((LINKS, ranks.size, items), np.float32)
    given = [_put(gpu, kind, share[ranks.rank]) for share in shares]
    outs = [_put(gpu, kind, np.zeros(items, np.float32)) for _ in shares]
    works = [way.all_reduce(a[0], b[0]) for a, b in zip(given, outs, strict=True)]
    graph = _captured(gpu, ranks, works)
    times = [_milliseconds(gpu, graph) for _ in range(max(1, replays))]
    got = [_got(gpu, out[0]) for out in outs]
    digest = hashlib.sha256(b"".join(bits.tobytes() for bits in got)).digest()
    same = len(set(exchange(ranks, digest))) == 1
    rounded = shares if kind == "float32" else decode(encode(shares, kind), kind)
    in_order = rounded[:, 0].astype(np.float32)
    for rank in range(1, ranks.size):
        in_order = in_order + rounded[:, rank].astype(np.float32)
    exact = rounded.astype(np.float64).sum(1)
    found = np.stack(got) if kind == "float32" else decode(np.stack(got), kind).astype(np.float64)
    off = float(np.abs(found - exact).max() / max(1e-9, np.abs(exact).max()))
    expected = in_order if kind == "float32" else encode(in_order, kind)
    bitwise = name != "ours" or all(
        np.array_equal(a, b) for a, b in zip(got, expected, strict=True)
    )
    limit = {"float32": 1e-6, "float16": 1e-3 * ranks.size, "bfloat16": 8e-3 * ranks.size}[kind]
    fine = same and bitwise and off <= limit
    size = items * ITEM_BYTES[kind]
    words = f"{statistics.median(times) / LINKS * 1e3:7.2f} us of {size:8d} B, off by {off:.1e}"
    return words + ("" if fine else f"  WRONG (same {same}, in order {bitwise})"), fine


def _gathers(gpu: Gpu, ranks: Communicator, way: Any, name: str, say: Callable[..., None]) -> int:
    """The ranks' columns side by side, padded ones and such that are not."""
    wrong = 0
    for kind, rows, width, padded in (
        ("float32", 1, 16000, 0),
        ("float32", 64, 16000, 0),
        ("float32", 3, 1001, 1),
        ("float16", 5, 333, 2),
        ("float32", 512, 16000, 0),
    ):
        rng = np.random.default_rng(rows)
        shares = rng.standard_normal((ranks.size, rows, width), np.float32)
        kept = ranks.size * width - padded
        given, keep = _put(gpu, kind, shares[ranks.rank])
        out, keep_too = _put(gpu, kind, np.zeros((rows, kept), np.float32))
        graph = _captured(gpu, ranks, [way.all_gather(given, out)])
        took = statistics.median(_milliseconds(gpu, graph) for _ in range(20))
        rounded = shares if kind == "float32" else encode(shares, kind)
        fine = np.array_equal(_got(gpu, out), np.concatenate(list(rounded), -1)[:, :kept])
        del keep, keep_too
        wrong += not all(answer == b"\1" for answer in exchange(ranks, bytes([fine])))
        say(f"{name} gather {kind} {rows} x {width}: {took * 1e3:.1f} us{'' if fine else ' WRONG'}")
    return wrong


def _broadcasts(
    gpu: Gpu, ranks: Communicator, way: Any, name: str, say: Callable[..., None]
) -> int:
    """Ids of the first rank's, on all."""
    wrong = 0
    for count in (1, 64, 1024):
        ids = np.arange(count) ** 3 - 5
        memories = [gpu.allocate(8 * count) for _ in range(2)]
        gpu.upload(memories[0].address, ids if ranks.rank == 0 else 0 * ids)
        graph = _captured(gpu, ranks, [way.broadcast(*(m.address for m in memories), count)])
        took = statistics.median(_milliseconds(gpu, graph) for _ in range(20))
        found = gpu.download(memories[1].address, (count,), np.dtype(np.int64))
        answers = exchange(ranks, bytes([np.array_equal(found, ids)]))
        wrong += not all(answer == b"\1" for answer in answers)
        say(f"{name} broadcast of {count} ids: {took * 1e3:.1f} us, {answers}", flush=True)
    return wrong


def _norms(gpu: Gpu, ranks: Communicator, way: Any, replays: int, say: Callable[..., None]) -> int:
    """Sums with the residual and the norm behind them."""
    wrong = 0
    for kind, rows, width in NORMS:
        try:
            words, fine = _normed(gpu, ranks, way, kind, rows, width, replays)
        except PluginError as error:
            words, fine = str(error), False
        answers = exchange(ranks, bytes([fine]))
        wrong += not all(answer == b"\1" for answer in answers)
        say(f"norms of {kind} {rows:4d} x {width}: {words}", flush=True)
    return wrong


def _normed(
    gpu: Gpu, ranks: Communicator, way: Any, kind: str, rows: int, width: int, replays: int
) -> tuple[str, bool]:
    """By one launch and by two: bit by bit the same, also as numpy's."""
    from vlmforge.backends.cuda.device import SumAndNorm
    from vlmforge.backends.cuda.peers import norm_alone

    rng = np.random.default_rng(rows)
    shares = rng.standard_normal((LINKS, ranks.size, rows, width), np.float32)
    more, scale = rng.standard_normal((rows, width), np.float32), rng.random(width, np.float32)
    (added, keep), (factor, keep_too) = _put(gpu, kind, more), _put(gpu, kind, scale)
    given = [_put(gpu, kind, share[ranks.rank]) for share in shares]
    outs = [[_put(gpu, kind, 0 * more) for _ in range(2)] for _ in shares]
    calls = [
        SumAndNorm(one, added, total, normed, factor.address, 1e-5)
        for (one, _), ((total, _), (normed, _)) in zip(given, outs, strict=True)
    ]
    apart: list[Work] = []
    for call in calls:
        apart += [way.all_reduce(call.given, call.total)]
        apart += [norm_alone(gpu, structs.replace(call, given=call.total), way.kernels)]
    ways = {"apart": apart, "one": [way.sum_and_norm(call) for call in calls]}
    times, found = {}, {}
    for name, works in ways.items():
        graph = _captured(gpu, ranks, works)
        times[name] = [_milliseconds(gpu, graph) for _ in range(max(1, replays))]
        got = [_got(gpu, out) for call in calls for out in (call.total, call.normed)]
        found[name] = b"".join(bits.tobytes() for bits in got)
        for call in calls:
            for out in (call.total, call.normed):
                gpu.upload(out.address, np.zeros(rows * width * ITEM_BYTES[kind], np.uint8))
    digests = exchange(ranks, hashlib.sha256(found["one"]).digest())
    same = len(set(digests)) == len(set(found.values())) == 1
    bitwise, off = _as_numpy_has_it(kind, shares, more, scale, got)
    took = ", ".join(
        f"{name} {statistics.median(t) / LINKS * 1e3:.2f} us" for name, t in times.items()
    )
    fine = same and bitwise and off < (8e-3 if kind == "float16" else 6e-2)
    del keep, keep_too
    words = f"{took}, off by {off:.1e}"
    return words + ("" if fine else f"  WRONG (same {same}, in order {bitwise})"), fine


def _as_numpy_has_it(
    kind: str, shares: Any, more: Any, scale: Any, got: list[Any]
) -> tuple[bool, float]:
    """Whether sums with residuals are to the bit, and by how much norms are off, at most."""

    def rounded(values: Any) -> Any:
        return decode(encode(values, kind), kind).astype(np.float32)

    bitwise, off = True, 0.0
    for share, total, normed in zip(rounded(shares), got[::2], got[1::2], strict=True):
        whole = share[0]
        for other in share[1:]:
            whole = whole + other
        bitwise &= np.array_equal(total, encode(rounded(whole) + rounded(more), kind))
        exact = decode(total, kind).astype(np.float64)
        norm = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * rounded(scale)
        off = max(off, float(np.abs(decode(normed, kind).astype(np.float64) - norm).max()))
    return bitwise, off


def _put(gpu: Gpu, kind: str, values: Any) -> tuple[Tensor, Any]:
    """On the GPU, and what keeps it there."""
    bits = values if kind == "float32" else encode(values, kind)
    memory = gpu.allocate(bits.nbytes)
    gpu.upload(memory.address, np.ascontiguousarray(bits))
    return Tensor("bench", kind, values.shape, memory.address), memory


def _got(gpu: Gpu, tensor: Tensor) -> Any:
    """The bits there."""
    dtype = np.dtype(DTYPES.get(tensor.dtype, tensor.dtype))
    return gpu.download(tensor.address, tensor.shape, dtype).copy()


def _captured(gpu: Gpu, ranks: Communicator, works: list[Work]) -> Work:
    def all_of_them() -> None:
        for work in works:
            work()

    all_of_them()
    gpu.wait()
    graph = gpu.captured(all_of_them)
    ranks.meet(np.zeros(1, np.float32))
    return graph


def _milliseconds(gpu: Gpu, work: Work) -> float:
    """Of the GPU, for one launch behind another: so all ranks are there."""
    from cuda.bindings import driver

    from vlmforge_plugins.cached_attention.driver import call

    begin, end = (call(driver.cuEventCreate, 0) for _ in range(2))
    work()
    call(driver.cuEventRecord, begin, gpu.stream)
    work()
    call(driver.cuEventRecord, end, gpu.stream)
    gpu.wait()
    took = float(call(driver.cuEventElapsedTime, begin, end))
    for event in (begin, end):
        call(driver.cuEventDestroy, event)
    return took


def compiled(folder: Path) -> None:
    """The kernels for this machine's GPUs."""
    from vlmforge.backends.cuda.gpu import enter
    from vlmforge_plugins.cached_attention.compile import Nvrtc, compile_source
    from vlmforge_plugins.cached_attention.config import TARGETS
    from vlmforge_plugins.cached_attention.driver import capability
    from vlmforge_plugins.cached_attention.kernel_store import newest_target
    from vlmforge_plugins.collectives.compile import SOURCE

    enter()
    target = newest_target(TARGETS, capability())
    assert target is not None, capability()
    (folder / f"{target.name}.cubin").write_bytes(compile_source(SOURCE, target, Nvrtc()).code)


def check_all(size: int, replays: int, norms: bool) -> int:
    """The first rank, and the processes of the others."""
    with TemporaryDirectory() as folder:
        compiled(Path(folder))
        os.environ[TASK] = json.dumps([folder, replays, norms])
        processes.CHILD = PROGRAM
        others = processes.Processes(size, ROOM)
        try:
            return check(others.communicator, Path(folder), replays, norms)
        finally:
            others.close()


def follow(place: processes.Place) -> None:
    """What the other ranks do."""
    ranks = child.joined(place)
    folder, replays, norms = json.loads(os.environ[TASK])
    check(ranks, Path(folder), replays, norms)


def main() -> int:
    """The command line."""
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        follow(processes.Place.parsed(sys.argv[1]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--norms", action="store_true", help="of sums alone")
    given = parser.parse_args()
    return min(1, check_all(given.ranks, given.replays, given.norms))


if __name__ == "__main__":
    sys.exit(main())
