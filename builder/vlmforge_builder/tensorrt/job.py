"""What the compiling process is told: plain data, as JSON in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Range = tuple[int, int, int]
"""Least, usual and most of a dimension."""


@dataclass(frozen=True, slots=True)
class KernelSet:
    """Attention kernels that a graph's plugins need; see `Config` of `vlmforge_plugins`."""

    head_size: int
    activation: str
    stored: str


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """One graph to compile.

    Attributes:
        module: The library's module.
        graph: Path of the ONNX file; its weights are beside it.
        plan: Path of the plan to write.
        layers: Path of the report to write: the network's layers as the parser made them.
        profiles: For each optimisation profile, the range of every symbolic dimension.
        capability: The library's word for a compute capability; None: its default.
        kernels: What the plugins of the graph run; None: it has none.
        cache: Folder of compiled kernels.
    """

    module: str
    graph: str
    plan: str
    layers: str
    profiles: tuple[Mapping[str, Range], ...]
    capability: str | None
    kernels: KernelSet | None
    cache: str
