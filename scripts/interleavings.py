"""Histories of requests beside each other on every golden family: is each answer the one alone?

    python scripts/interleavings.py [--seed 0] [--histories 100] [--family NAME ...] [--work DIR]

Builds the golden engines first, unless WORK has them. A history that fails is named by its seed;
status 1 then. See tests/histories.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> int:
    """Check histories `seed .. seed + histories` of each family."""
    from golden_models import FOLDERS

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--histories", type=int, default=100)
    parser.add_argument("--family", nargs="*", choices=FOLDERS, default=FOLDERS)
    parser.add_argument("--work", type=Path, default=ROOT / "out/interleavings")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    os.environ["VLMFORGE_CACHE"] = str(given.work / "cache")
    seeds = range(given.seed, given.seed + given.histories)
    return max([check_family(name, given.work, seeds) for name in given.family])


def check_family(name: str, work: Path, seeds: range) -> int:
    """Print what came of the histories; 1 if one failed."""
    from conftest import golden_engine
    from histories import SLOTS, Family, drawn
    from vlmforge import EngineConfig, pipeline

    failed, preempted, reused, requests = 0, 0, 0, 0
    with pipeline(golden_engine(work, name), EngineConfig(max_batch_size=SLOTS)) as pipe:
        family = Family(pipe)
        for seed in seeds:
            try:
                ran = family.check(drawn(seed))
            except AssertionError as error:
                failed += 1
                print(f"{name}: the history of seed {seed} failed: {error}", flush=True)
                continue
            requests += len(ran.asking)
            preempted += ran.preempted
            reused += ran.reused
    print(
        f"{name}: {len(seeds)} histories, {requests} requests, {preempted} places lost, "
        f"{reused} tokens found in the cache, {failed} histories failed",
        flush=True,
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
