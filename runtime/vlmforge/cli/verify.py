"""`vlmforge verify`: are the files the built ones, and do they still give what they gave?"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from vlmforge.engine.bundle import Bundle, check_hashes
from vlmforge.engine.manifest import load_manifest
from vlmforge.engine.static_check import check_static
from vlmforge.errors import BuildError, ConfigError
from vlmforge.evaluation.verify import verify


def run_verify(folder: Path) -> int:
    """Print each stage's result; 1 when one differs (EngineError when the engine is unusable)."""
    _hashed(folder)
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


def run_static(folder: Path) -> int:
    """Print each check that runs nothing; 1 when one fails (EngineError when it is unusable)."""
    failed = 0
    for result in check_static(_hashed(folder)):
        mark = "ok  " if result.passed else "FAIL"
        print(f"{mark} {result.part:8} {result.check:9} {result.detail}", flush=True)
        failed += not result.passed
    if failed:
        print("The engine is not what build-engine writes.\n  fix:      rebuild it")
    return int(failed > 0)


def run_layers(folder: Path, against: str | None, limit: float | None) -> int:
    """Compare tensor by tensor, by the builder in a process of its own; 1 when one parts.

    Raises:
        ConfigError: there is nothing to compare with.
        BuildError: what it needs is not installed.
    """
    source = load_manifest(folder).provenance.source
    if against is None:
        raise ConfigError(
            "--layers needs something to compare with.",
            found="no --against",
            expected="the checkpoint that the engine was built of, or another engine of it",
            fix=f"vlmforge verify {folder} --layers --against {source}",
        )
    missing = [name for name in ("torch", "onnx", "polygraphy") if find_spec(name) is None]
    if missing:
        raise BuildError(
            "--layers needs what a build needs, and Polygraphy.",
            found="no " + ", ".join(missing),
            expected="the extra `build`",
            fix="pip install 'vlmforge[build]'",
        )
    # -P: a module in the working directory is never imported.
    command = [sys.executable, "-P", "-m", "vlmforge_builder.layers", str(folder)]
    command += ["--against", against, *(() if limit is None else ("--limit", str(limit)))]
    return subprocess.run(command, check=False).returncode


def _hashed(folder: Path) -> Bundle:
    bundle = Bundle(folder, load_manifest(folder))
    print(f"{folder}: hashing {len(bundle.manifest.files)} files ...", file=sys.stderr, flush=True)
    check_hashes(bundle)
    return bundle
