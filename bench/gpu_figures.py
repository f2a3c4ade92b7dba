"""All figures of engines on one GPU by one command: parts by name, each in a process of its own.

    python3 bench/gpu_figures.py all --engines FOLDER --out results.jsonl
    python3 bench/gpu_figures.py card decode yardsticks --engines FOLDER --out results.jsonl
    python3 bench/gpu_figures.py --list

FOLDER has engines called SIZE.KIND, such as 7b.float16 (`hollow.py`; filled when a part needs it,
and from then on random), and demo.float16. Rows are appended to the results as they come, so a run
that is cut loses little and may go on later; `gpu_engines.py report` makes the tables. A part that
fails, or takes three times what it should, ends no other. Beside the parts' names are the seconds
that they take on an H100, engines filled.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
_LARGE, _HOLES = "7b.float16", "holes.json"
_FILLED = ".filled"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the whole.

    Attributes:
        seconds: It should take.
        what: In words.
        commands: Each a script of this folder and its arguments; `{NAME}` is an engine.
        filled: Engines that must have numbers.
        trusted: Engines whose weights may be zeros.
    """

    seconds: int
    what: str
    commands: tuple[tuple[str, ...], ...]
    filled: tuple[str, ...] = ()
    trusted: tuple[str, ...] = ()

    def possible(self, engines: Path) -> bool:
        """Whether its engines are there."""
        named = re.findall(r"{(\w+\.\w+)}", str(self.commands))
        return all((engines / name).is_dir() for name in named)


def _decode(engine: str, *batches: str) -> tuple[str, ...]:
    return ("gpu_steps.py", "decode", f"{{{engine}}}", *(("--batch", *batches) if batches else ()))


def _planned(seconds: int, *engines: str) -> Part:
    commands = tuple(("gpu_fit.py", "planned", f"{{{name}}}") for name in engines)
    return Part(seconds, "memory planned and taken", commands, trusted=engines)


_FEW = ("1:640", "8:1024", "32:1024")
_GQA = (*("gpu_yardsticks.py", "onnxruntime", "--like", "{out}"), "--work", "{work}/yardstick")
PARTS = {
    "card": Part(12, "what the card itself can do", (("gpu_steps.py", "card"),)),
    "soak": Part(
        90,
        "64 mixed requests, batches, 1,000 cancels, 20 loads of the demo model",
        (("gpu_soak.py", "{demo.float16}"),),
    ),
    "decode": Part(40, "steps of 1, 8, 32 and 64 rows", (_decode(_LARGE),), (_LARGE,)),
    "yardsticks": Part(
        60,
        "the same steps by torch and by one session of ONNX Runtime",
        (("gpu_yardsticks.py", "torch", "--like", "{out}"), _GQA),
    ),
    "prompts": Part(
        20,
        "prefill, and first tokens with an image",
        (("gpu_steps.py", "prompts", f"{{{_LARGE}}}"),),
        (_LARGE,),
    ),
    "serving": Part(
        85,
        "8 to 128 requests at once, 64 with images, start-up",
        (("gpu_serving.py", "text", "images", "start", f"{{{_LARGE}}}"),),
        (_LARGE,),
    ),
    "load": Part(
        60,
        "where the time goes from a process's start",
        (("gpu_load.py", f"{{{_LARGE}}}", "--ways", "0:1", "4:1"),),
        (_LARGE,),
    ),
    "int8": Part(25, "steps of whole numbers", (_decode("7b.int8", *_FEW),), ("7b.int8",)),
    "int4": Part(25, "steps of whole numbers", (_decode("7b.int4", *_FEW),), ("7b.int4",)),
    "fp8": Part(30, "steps over a cache in fp8", (_decode("7b.fp8"),), (_LARGE, "7b.fp8")),
    "pool": Part(
        45,
        "a full pool, a full GPU, a long prompt",
        (
            ("gpu_fit.py", "full", f"{{{_LARGE}}}"),
            ("gpu_fit.py", "refused", f"{{{_LARGE}}}"),
        ),
        trusted=(_LARGE,),
    ),
    "7b": _planned(60, "7b.float16", "7b.int8", "7b.int4"),
    "13b": _planned(35, "13b.float16"),
    "34b": _planned(70, "34b.int4", "34b.int8"),
    "34b.float16": _planned(80, "34b.float16"),
}


def run(names: Sequence[str], engines: Path, out: Path, limit: float) -> int:
    """The parts, one after the other; how many had something that failed.

    Parts that should not end within `limit` seconds from now are left out.
    """
    failed, until = 0, time.monotonic() + limit
    for name in names:
        part, began = PARTS[name], time.monotonic()
        if began + part.seconds > until:
            print(f"== {name}: left out, it takes {part.seconds} s", flush=True)
            continue
        print(f"== {name}: {part.what}, about {part.seconds} s", flush=True)
        bad = 0
        for engine in part.filled:
            bad += fill(engines, engine)
        for engine in part.trusted:
            bad += _hollow("trust", engines / engine)
        for command in part.commands:
            bad += _run(command, engines, out, min(3 * part.seconds + 60, until - began))
        failed += bool(bad)
        took = time.monotonic() - began
        print(f"== {name}: {'FAILED in part, ' if bad else ''}{took:.1f} s", flush=True)
    return failed


def _run(command: Sequence[str], engines: Path, out: Path, limit: float) -> int:
    """A script in a process of its own, which gives back its memory; 1 where it failed."""
    script, *arguments = command
    names = {"{out}": str(out), "{work}": str(engines)}
    for item in engines.iterdir():
        names[f"{{{item.name}}}"] = str(item)
    for name, value in names.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    whole = [sys.executable, str(BENCH / script), *arguments, "--out", str(out)]
    try:
        return min(1, subprocess.run(whole, check=False, timeout=limit).returncode & 0xFF)
    except subprocess.TimeoutExpired:
        print(f"  {script}: stopped after {limit:.0f} s", flush=True)
        return 1


def fill(engines: Path, name: str) -> int:
    """Numbers into an engine's holes, once."""
    engine, done = engines / name, engines / f"{name}{_FILLED}"
    if done.exists() or not (engine / _HOLES).exists():
        return 0
    began = time.monotonic()
    is_there = name != _LARGE and (engines / f"{_LARGE}{_FILLED}").exists()
    like = ("--like", str(engines / _LARGE)) if is_there else ()
    failed = _hollow("fill", engine, *like)
    done.touch()
    size = sum(path.stat().st_size for path in engine.iterdir() if path.is_file())
    print(f"  {name}: {size / 1e9:.1f} GB filled in {time.monotonic() - began:.1f} s", flush=True)
    return failed


def _hollow(kind: str, engine: Path, *more: str) -> int:
    command = [sys.executable, str(BENCH / "hollow.py"), kind, str(engine), *more]
    return subprocess.run(command, check=False).returncode


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="see --list; `all`, or `there`")
    parser.add_argument("--list", action="store_true", help="the parts, and what they take")
    parser.add_argument("--engines", type=Path, default=ROOT / "out" / "gpu_engines")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu" / "figures.jsonl")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for all of it")
    given = parser.parse_args()
    if given.list or not given.parts:
        for name, part in PARTS.items():
            print(f"{name:12} {part.seconds:4} s  {part.what}")
        return
    names = given.parts
    if names == ["all"]:
        names = list(PARTS)
    elif names == ["there"]:
        names = [name for name, part in PARTS.items() if part.possible(given.engines)]
    if unknown := set(names) - set(PARTS):
        parser.error(f"not one of {', '.join(PARTS)}: {', '.join(sorted(unknown))}")
    engines, out = given.engines.resolve(), given.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(engines)
    print(f"{engines}: {room.free / 1e9:.0f} GB free of {room.total / 1e9:.0f} GB", flush=True)
    failed = run(names, engines, out, given.limit)
    print(f"{len(names)} parts, {failed} with failures; rows in {out}", flush=True)
    sys.exit(min(1, failed))


if __name__ == "__main__":
    main()
