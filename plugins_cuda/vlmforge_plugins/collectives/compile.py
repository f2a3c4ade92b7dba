"""Compiles the collectives: for every kind of GPU, and PTX for others."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlmforge_plugins.cached_attention import compile as compiling
from vlmforge_plugins.cached_attention.compile import Binary, Compiler, Source, compile_source
from vlmforge_plugins.cached_attention.config import PTX_TARGETS, TARGETS

_KERNELS = Path(__file__).parent / "kernels"
SOURCE = Source("collectives", _KERNELS / "collectives.cu", (_KERNELS, compiling.SOURCES))


def compile_set(by: Compiler, cache: Path | None = None) -> tuple[Binary, ...]:
    """A cubin for every kind of GPU, then PTX for all others (CompileError: see `Compiler`)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wanted = (*TARGETS, PTX_TARGETS[False])
        return tuple(pool.map(lambda target: compile_source(SOURCE, target, by, cache), wanted))
