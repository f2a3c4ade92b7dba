"""`vlmforge verify`: are the files the built ones, and do they still give what they gave?"""

from __future__ import annotations

import sys
from pathlib import Path

from vlmforge.bundle import Bundle, check_hashes
from vlmforge.manifest import load_manifest
from vlmforge.verify import verify


def run_verify(folder: Path) -> int:
    """Print each stage's result; 1 when one differs (EngineError when the engine is unusable)."""
    bundle = Bundle(folder, load_manifest(folder))
    print(f"{folder}: hashing {len(bundle.manifest.files)} files ...", file=sys.stderr, flush=True)
    check_hashes(bundle)
    first = None
    for result in verify(folder, lambda name: print(f"{name} ...", file=sys.stderr, flush=True)):
        mark = "ok  " if result.passed else "DIFF"
        print(f"{mark} {result.case:12} {result.stage:9} {result.detail}", flush=True)
        if first is None and not result.passed:
            first = result
    if first is None:
        print("The engine gives here what it gave when it was built.")
        return 0
    print(
        f"The first stage that diverges is {first.stage!r}, in the golden {first.case!r}.\n"
        "  fix:      compare `vlmforge doctor` with the versions in `vlmforge inspect`; "
        "rebuild the engine on this machine"
    )
    return 1
