"""Targets: how an exported graph becomes a part of an engine. One module per target, one line each.

A target shares its stem with the backend of the runtime that runs what it makes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from vlmforge.errors import ConfigError
from vlmforge.manifest import Part

if TYPE_CHECKING:
    from vlmforge_builder.checkpoint.store import TensorStore
    from vlmforge_builder.export import Traced
    from vlmforge_builder.recipe import PartSpec


@dataclass(frozen=True, slots=True)
class CompileJob:
    """What a target needs to compile one part into `folder`; `report` takes (done, total) bytes."""

    part: PartSpec
    store: TensorStore
    dtype: str
    folder: Path
    report: Callable[[int, int], None]


class Target(Protocol):
    """Compiles parts for one backend."""

    @property
    def name(self) -> str:
        """Stem shared with the backend."""

    @property
    def compute_dtype(self) -> str:
        """What the backend calculates in."""

    def compile(self, traced: Traced, job: CompileJob) -> Part:
        """Write the part's files into `job.folder` and describe them."""


_MODULES = {"onnxruntime": "vlmforge_builder.targets.onnxruntime"}
TARGETS = tuple(_MODULES)


def load_target(name: str) -> Target:
    """The target called `name` (ConfigError otherwise)."""
    if name not in _MODULES:
        raise ConfigError(
            "Unknown target.",
            found=repr(name),
            expected="one of: " + ", ".join(TARGETS),
            fix="--target onnxruntime",
        )
    return cast("Target", importlib.import_module(_MODULES[name]).TARGET)
