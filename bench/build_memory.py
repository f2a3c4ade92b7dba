"""Build checkpoints and print the seconds and the peak memory of each build.

python bench/build_memory.py --size 7b --work out/bench
python bench/build_memory.py --checkpoint tests/data/*/checkpoint --dtype float32 --work out/bench
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from vlmforge_recipes.llava.synthetic import PRESETS, write_checkpoint


def main() -> None:
    """Make the checkpoint if it is not there, build it, print the figures of its last event."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--size", default="7b", choices=tuple(PRESETS))
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument(
        "--checkpoint", type=Path, nargs="+", help="those that are there already"
    )
    arguments.add_argument("--dtype", default="float16")
    arguments.add_argument("--target", default="onnxruntime")
    arguments.add_argument("--attention", help="of a GPU target: plugin or native")
    values = arguments.parse_args()
    values.work.mkdir(parents=True, exist_ok=True)
    for checkpoint in values.checkpoint or [random_checkpoint(values.work, values.size)]:
        build(checkpoint, values.work, values.dtype, values.target, values.attention)


def random_checkpoint(work: Path, size: str) -> Path:
    """The checkpoint of a preset, written unless it is there."""
    folder = work / f"{size}.checkpoint"
    if not folder.exists():
        write_checkpoint(folder, PRESETS[size])
    return folder


def build(checkpoint: Path, work: Path, dtype: str, target: str, attention: str | None) -> None:
    """Build one engine in a process of its own and print what it took."""
    name = checkpoint.parent.name if checkpoint.name == "checkpoint" else checkpoint.stem
    engine, events = work / f"{name}.{target}.{dtype}.engine", work / "events.jsonl"
    events.unlink(missing_ok=True)
    program = Path(sys.executable).with_name("build-engine")
    command = [program, checkpoint, "-o", engine, "--dtype", dtype, "--force", "--target", target]
    command += ["--session-len", "2048"] if target != "onnxruntime" else []
    command += ["--attention", attention] if attention else []
    subprocess.run([*command, "--json-events", events], check=True)
    rows = [json.loads(line) for line in events.read_text("utf-8").splitlines()]
    files = [*checkpoint.rglob("*.safetensors"), *checkpoint.rglob("*.bin")]
    size = sum(path.stat().st_size for path in files)
    last = rows[-1]
    for row in rows:
        if row["event"] == "end":
            print(f"{row['stage']:24} {row['seconds']:8.1f} s")
        if "compiled by" in str(row.get("text")):
            print(row["text"])
    print(
        f"{name}: built in {last['elapsed_s']:.1f} s; "
        f"peak anonymous memory {last['peak_anonymous_bytes'] / 2**30:.2f} GiB "
        f"for a checkpoint of {size / 1e9:.3f} GB, "
        f"peak RSS with mapped files {last['peak_rss_bytes'] / 2**30:.2f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
