"""What `import vlmforge` costs, against the libraries it stands on; median of interleaved runs.

python bench/import_cost.py --runs 15
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

LIBRARIES = "onnxruntime, PIL, tokenizers"
SUBJECTS = {
    "the libraries": LIBRARIES,
    "vlmforge": "vlmforge",
    # What the first use of `pipeline` loads as well.
    "vlmforge, all of it": f"vlmforge.api.load, vlmforge.backends.onnxruntime, {LIBRARIES}",
}
# As when vlmforge imports it: without its telemetry, which costs time and writes to HOME.
QUIET = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
PROGRAM = "from time import perf_counter as now; t = now(); import {}; print(now() - t)"


def seconds(modules: str) -> float:
    """Seconds that importing `modules` takes in a fresh interpreter."""
    command = [sys.executable, "-c", PROGRAM.format(modules)]
    done = subprocess.run(command, env=QUIET, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(runs: int) -> dict[str, float]:
    """Median seconds of each subject; one run of each in turn, so that load hits all alike."""
    for modules in SUBJECTS.values():
        seconds(modules)  # compiles, and fills the page cache
    rounds = [{name: seconds(modules) for name, modules in SUBJECTS.items()} for _ in range(runs)]
    return {name: statistics.median(times[name] for times in rounds) for name in SUBJECTS}


def main() -> None:
    """Print seconds, and their ratio to the libraries'."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=15)
    medians = measure(arguments.parse_args().runs)
    for name, value in medians.items():
        ratio = value / medians["the libraries"]
        print(f"{name:<20} {value:6.3f} s {ratio:5.2f} x   import {SUBJECTS[name]}")


if __name__ == "__main__":
    main()
