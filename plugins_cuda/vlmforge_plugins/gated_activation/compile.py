"""Compiles the gated activations: for every kind of GPU, and PTX for others."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlmforge_plugins.cached_attention import compile as compiling
from vlmforge_plugins.cached_attention.compile import Binary, Compiler, Source, compile_source
from vlmforge_plugins.cached_attention.config import PTX_TARGETS, TARGETS, Target
from vlmforge_plugins.gated_activation.launcher import overlaps

KERNELS = Path(__file__).parent / "kernels"


def source_of(target: Target) -> Source:
    """The kernels as they are compiled for a kind of GPU."""
    overlap = f"VF_OVERLAP={int(overlaps(target))}"
    folders = (KERNELS, compiling.SOURCES)
    return Source("gated_activation", KERNELS / "gated_activation.cu", folders, (overlap,))


def compile_set(by: Compiler, cache: Path | None = None) -> tuple[Binary, ...]:
    """A cubin for every kind of GPU, then PTX for all others (CompileError: see `Compiler`)."""

    def compiled(target: Target) -> Binary:
        return compile_source(source_of(target), target, by, cache)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(pool.map(compiled, (*TARGETS, PTX_TARGETS[False])))
