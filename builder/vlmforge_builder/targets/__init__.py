"""Targets: how an exported graph becomes a part of an engine. One module per target, one line each.

A target shares its stem with the backend of the runtime that runs what it makes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from vlmforge.engine.manifest import KVLayout, Part, decoder_name
from vlmforge.errors import ConfigError
from vlmforge_builder.ranks import WHOLE, Rank

if TYPE_CHECKING:
    from vlmforge_builder.checkpoint.store import TensorStore
    from vlmforge_builder.export import Traced
    from vlmforge_builder.recipe import PartSpec


@dataclass(frozen=True, slots=True)
class Settings:
    """How to compile.

    Attributes:
        dtype: What weights are stored in, but for the decoder's where `weights` says otherwise.
        weights: "int8" or "int4": whole numbers in blocks; None: as `dtype`.
        session_len, max_batch_size: Tokens of a sequence, and sequences at once.
        kv_dtype: "fp8": what the key/value cache is stored in; None: as the target calculates.
        attention: "plugin" or "native"; None: the target's default.
        compute_capability: Of the GPU to compile for, such as "8.9"; None: the target's default.
        tp: Ranks that the decoder is divided among.
    """

    dtype: str
    weights: str | None
    session_len: int
    max_batch_size: int
    kv_dtype: str | None
    attention: str | None
    compute_capability: str | None
    tp: int = 1


@dataclass(frozen=True, slots=True)
class CompileJob:
    """What a target needs to compile one part into `folder`: that of `rank`, of a decoder.

    `report` takes (done, total) of whatever the target counts; `note` takes a sentence. A part that
    is to be `described` only has no weights read, and nothing compiled.
    """

    part: PartSpec
    store: TensorStore
    settings: Settings
    folder: Path
    report: Callable[[int, int], None]
    note: Callable[[str], None]
    rank: Rank = WHOLE
    described: bool = False

    @property
    def stem(self) -> str:
        """What the names of the part's files begin with."""
        return f"decoder.rank{self.rank.index}" if self.is_decoder else self.part.name

    @property
    def name(self) -> str:
        """Name of the part that is made."""
        return decoder_name(self.rank.index) if self.is_decoder else self.part.name

    @property
    def is_decoder(self) -> bool:
        """Whether the part is one that ranks divide."""
        return self.part.name == "decoder"


class Target(Protocol):
    """Compiles parts for one backend."""

    @property
    def name(self) -> str:
        """Stem shared with the backend."""

    def stand_in(self) -> AbstractContextManager[None] | None:
        """Within it engines can be run here, to record their goldens; None: they cannot."""

    def check(self, settings: Settings) -> None:
        """Refuse settings that the target does not have, before any work (VlmforgeError)."""

    def compute_dtype(self, settings: Settings) -> str:
        """What the backend calculates in."""

    def kv_layout(self, kv: KVLayout, settings: Settings) -> KVLayout:
        """The cache of the compiled decoder, given the traced one's."""

    def compile(self, traced: Traced, job: CompileJob) -> Part:
        """Write the part's files into `job.folder` and describe them."""


TARGETS = ("onnxruntime", "cuda", "tensorrt", "tensorrt_rtx")


def load_target(name: str) -> Target:
    """The target called `name` (ConfigError otherwise)."""
    if name not in TARGETS:
        raise ConfigError(
            "Unknown target.",
            found=repr(name),
            expected="one of: " + ", ".join(TARGETS),
            fix="--target onnxruntime",
        )
    return cast("Target", importlib.import_module(f"vlmforge_builder.targets.{name}").TARGET)
