"""Kernels that only say what they are of: of a set, those of one GPU are compiled."""

from __future__ import annotations

from pathlib import Path

from vlmforge_plugins.cached_attention.compile import (
    Binary,
    Compiler,
    Nvrtc,
    Source,
    compile_source,
)
from vlmforge_plugins.cached_attention.config import TARGETS, Target

HOPPER = next(target for target in TARGETS if target.name == "sm_90")


class Named:
    """A compiler that only says what it is asked for, and has the same to say of all."""

    def __init__(self, version: str = "names", log: str = "") -> None:
        self.version, self._log = version, log

    @classmethod
    def for_nvrtc(cls) -> Named:
        """Whose results are taken for NVRTC's where they are kept."""
        return cls(Nvrtc().version)

    def compile(self, source: Source, target: Target) -> Binary:
        return Binary(target, named(source, target), self._log)


def named(source: Source, target: Target) -> bytes:
    """As large as a small kernel."""
    return f"{source.name} for {target.name}\0".encode() * 64


class OneGpu:
    """A compiler for `HOPPER`, by another one and kept as that one's; all others are `Named`."""

    def __init__(self, real: Compiler, cache: Path | None) -> None:
        self.version = f"{real.version}, names but for {HOPPER.name}"
        self._real, self._cache = real, cache

    def compile(self, source: Source, target: Target) -> Binary:
        if target == HOPPER:
            return compile_source(source, target, self._real, self._cache)
        return Named().compile(source, target)
