"""Build a big random checkpoint and print the seconds and the peak memory of the build.

python bench/build_memory.py --size 7b --work out/bench
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
    arguments.add_argument("--checkpoint", type=Path, help="one that is there already")
    arguments.add_argument("--dtype", default="float16")
    values = arguments.parse_args()
    values.work.mkdir(parents=True, exist_ok=True)
    checkpoint = values.checkpoint or values.work / f"{values.size}.checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, PRESETS[values.size])
    engine = values.work / f"{values.size}.{values.dtype}.engine"
    events = values.work / "events.jsonl"
    build = Path(sys.executable).with_name("build-engine")
    command = [build, checkpoint, "-o", engine, "--dtype", values.dtype, "--force"]
    subprocess.run([*command, "--json-events", events], check=True)
    rows = [json.loads(line) for line in events.read_text("utf-8").splitlines()]
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    last = rows[-1]
    for row in rows:
        if row["event"] == "end":
            print(f"{row['stage']:24} {row['seconds']:8.1f} s")
    print(
        f"{values.size} checkpoint of {size / 1e9:.2f} GB built in {last['elapsed_s']:.1f} s; "
        f"peak anonymous memory {last['peak_anonymous_bytes'] / 2**30:.2f} GiB "
        f"({last['peak_anonymous_bytes'] / size:.2f}x the checkpoint), "
        f"peak RSS with mapped files {last['peak_rss_bytes'] / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
