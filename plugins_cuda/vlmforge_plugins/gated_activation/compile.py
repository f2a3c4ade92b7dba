"""Compiles a gated activation: for every kind of GPU, and PTX for others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlmforge_plugins.cached_attention import compile as compiling
from vlmforge_plugins.cached_attention.compile import Binary, Compiler, Source, compile_source
from vlmforge_plugins.cached_attention.config import PTX_TARGETS, TARGETS, Target
from vlmforge_plugins.gated_activation.launcher import DTYPES, name_of, overlaps

KERNELS = Path(__file__).parent / "kernels"
_FUNCTORS: Mapping[str, str] = {"silu": "Silu", "gelu": "Gelu", "gelu_tanh": "GeluTanh"}


def source_of(activation: str, dtype: str, target: Target) -> Source:
    """A kernel as it is compiled for a kind of GPU (UnsupportedError: there is none)."""
    name = name_of(activation, dtype)
    defines = (
        f"VF_NAME={name}",
        f"VF_TYPE={DTYPES[dtype]}",
        f"VF_ACTIVATION={_FUNCTORS[activation]}",
        f"VF_OVERLAP={int(overlaps(target))}",
    )
    return Source(name, KERNELS / "gated_activation.cu", (KERNELS, compiling.SOURCES), defines)


def compile_set(
    activation: str, dtype: str, by: Compiler, cache: Path | None = None
) -> tuple[Binary, ...]:
    """A cubin for every kind of GPU, then PTX for all others.

    Raises:
        UnsupportedError: There is no such kernel.
        CompileError: The compiler refused.
    """

    def compiled(target: Target) -> Binary:
        return compile_source(source_of(activation, dtype, target), target, by, cache)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(pool.map(compiled, (*TARGETS, PTX_TARGETS[False])))
