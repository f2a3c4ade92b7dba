"""Kill or stop the ranks of a pipeline at random: do callers hear of it, and is nothing left?

    python scripts/kill_ranks.py ENGINE [--kills 20] [--cycles 100] [--seed 0]

ENGINE is one of several ranks. Each time, a random rank gets a random signal at a random moment of
loading, prefill, decode or idleness: whoever waits must have a RankError that names it within five
seconds, no process, descriptor or shared memory may be left, and a new pipeline must give the
answer of before. The first rank is killed in a program of its own. Then pipelines are opened and
closed. Status 1 if anything was otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from vlmforge import EngineConfig, GenerationConfig, Pipeline, pipeline
from vlmforge.engine.manifest import load_manifest
from vlmforge.errors import RankError

LIMIT_S = 5.0
POINTS = ("load", "prefill", "decode", "idle")
PROMPT = "word " * 120
LONG = GenerationConfig(max_new_tokens=400, ignore_eos=True)
SHORT = GenerationConfig(max_new_tokens=8, ignore_eos=True)
LEADER = """
import sys
from kill_ranks import LONG, PROMPT, opened
pipe = opened(sys.argv[1])
print("loaded", flush=True)
while True:
    pipe(PROMPT, LONG)
"""


def opened(engine: str) -> Pipeline:
    """A pipeline with few threads and little cache."""
    return pipeline(engine, EngineConfig(max_batch_size=2, session_len=800))


def ranks_of(parent: int) -> Mapping[int, int]:
    """Processes of the other ranks that `parent` has started, by rank."""
    found: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            state, above = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if int(above) == parent and state != "Z" and b"vlmforge.backends.ranks.child" in words:
                found[json.loads(words[-2])["rank"]] = int(folder.name)
    return found


def held() -> tuple[int, int]:
    """Descriptors of this process, and files of ours in the host's shared memory."""
    files = [path for path in Path("/dev/shm").iterdir() if "vlmforge" in path.name]
    return len(list(Path("/proc/self/fd").iterdir())), len(files)


def strike(point: str, engine: str, signals: Callable[[], float], draw: random.Random) -> float:
    """Have `signals` sent at the point; seconds from there to the RankError that was raised."""
    if point == "load":
        timer = threading.Thread(target=_later, args=(draw.uniform(0.05, 1.5), signals))
        timer.start()
        try:
            with opened(engine) as pipe:  # it may have been loaded before
                timer.join()
                pipe(PROMPT, LONG)
        finally:
            timer.join()
        return 0.0
    with opened(engine) as pipe:
        pipe("hi", SHORT)
        if point == "idle":
            signals()
            pipe(PROMPT, LONG)
        stream = pipe.stream_infer(PROMPT, LONG)
        if point == "decode":
            for _ in range(draw.randrange(1, 30)):
                next(stream)
            signals()
        else:
            threading.Thread(target=_later, args=(draw.uniform(0, 0.05), signals)).start()
        for _ in stream:
            pass
    return 0.0


def _later(seconds: float, signals: Callable[[], float]) -> None:
    time.sleep(seconds)
    signals()


def one_kill(engine: str, size: int, draw: random.Random) -> str:
    """What was wrong of a kill of a rank that is not the first, or nothing."""
    point, rank = draw.choice(POINTS), draw.randrange(1, size)
    sent = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
    at: list[float] = []

    def signals() -> float:
        end = time.monotonic() + 60
        while rank not in (there := ranks_of(os.getpid())) and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(there[rank], sent)
        at.append(time.monotonic())
        return at[0]

    words = ""
    try:
        strike(point, engine, signals, draw)
        words = "no error was raised"
    except RankError as error:
        if not error.found.startswith(f"rank {rank}: "):
            words = f"the error names another: {error.found}"
    took = time.monotonic() - at[0]
    print(f"{sent.name} of rank {rank} at {point}: {took:.2f} s {words}", flush=True)
    return words or ("" if took <= LIMIT_S else f"{took:.1f} s")


def kill_the_first(engine: str, draw: random.Random) -> str:
    """What was left of a program that was killed, or nothing."""
    command = [sys.executable, "-c", LEADER, engine]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent)
    assert program.stdout is not None
    loading = draw.random() < 0.3
    if not loading:
        program.stdout.readline()
    while not (ranks := ranks_of(program.pid)):
        if program.poll() is not None:
            return f"the program ended with status {program.returncode} before it had ranks"
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 1))
    ranks = ranks_of(program.pid) or ranks
    program.kill()
    begun = time.monotonic()
    while any(alive(process) for process in ranks.values()):
        if time.monotonic() - begun > LIMIT_S:
            return f"ranks {ranks} live on"
        time.sleep(0.01)
    program.wait()
    program.stdout.close()
    point = "load" if loading else "work"
    print(f"SIGKILL of rank 0 at {point}: ranks ended in {time.monotonic() - begun:.2f} s")
    return ""


def alive(process: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@contextmanager
def nothing_left(wrong: list[str]) -> Iterator[None]:
    """Adds to `wrong` what the block leaves behind."""
    before = held()
    yield
    if ranks := ranks_of(os.getpid()):
        wrong.append(f"processes are left: {ranks}")
    if held() != before:
        wrong.append(f"descriptors and shared memory: {held()}, before {before}")


def answer(engine: str) -> list[int]:
    """The tokens that a new pipeline gives."""
    with opened(engine) as pipe:
        return list(pipe(PROMPT, SHORT).token_ids)


def main() -> int:
    """Kill, then open and close."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, wrong = random.Random(given.seed), []
    size = load_manifest(given.engine).parallel.tp
    engine = str(given.engine.resolve())
    expected = answer(engine)
    for _ in range(given.kills):
        with nothing_left(wrong):
            first = draw.randrange(size) == 0
            words = kill_the_first(engine, draw) if first else one_kill(engine, size, draw)
            wrong += [words] if words else []
            if answer(engine) != expected:
                wrong.append("a new pipeline gives another answer")
    with nothing_left(wrong):
        for _ in range(given.cycles):
            if answer(engine) != expected:
                wrong.append("another answer in a cycle")
    print(
        f"{given.kills} kills, {given.cycles} cycles: {len(wrong)} things wrong", *wrong, sep="\n"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
