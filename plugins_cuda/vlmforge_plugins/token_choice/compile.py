"""Compiles the choice of tokens: for every kind of GPU, and PTX for others."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlmforge_plugins.cached_attention import compile as compiling
from vlmforge_plugins.cached_attention.compile import Binary, Compiler, Source, compile_source
from vlmforge_plugins.cached_attention.config import PTX_TARGETS, TARGETS, Target
from vlmforge_plugins.token_choice.launcher import overlaps

KERNELS = Path(__file__).parent / "kernels"


def source_of(target: Target) -> Source:
    """The kernel as it is compiled for a kind of GPU."""
    folders, defines = (KERNELS, compiling.SOURCES), (f"VF_OVERLAP={int(overlaps(target))}",)
    return Source("token_choice", KERNELS / "token_choice.cu", folders, defines)


def compile_set(by: Compiler, cache: Path | None = None) -> tuple[Binary, ...]:
    """A cubin for every kind of GPU, then PTX for all others (CompileError: see `Compiler`)."""

    def compiled(target: Target) -> Binary:
        return compile_source(source_of(target), target, by, cache)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(pool.map(compiled, (*TARGETS, PTX_TARGETS[False])))
