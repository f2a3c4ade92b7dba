"""Decoders compiled for ranks into a folder, without an engine around them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from rank_chains import Array, Ranks
from vlmforge.engine.manifest import Part
from vlmforge_builder.checkpoint.store import TensorStore
from vlmforge_builder.export import Traced
from vlmforge_builder.ranks import Rank
from vlmforge_builder.recipe import PartSpec
from vlmforge_builder.targets import CompileJob, Settings, load_target

SETTINGS = Settings("float32", None, 64, 2, None, None, None)


def compiled(
    traced: Traced,
    part: PartSpec,
    store: TensorStore,
    folder: Path,
    tp: int,
    settings: Settings,
    backend: str = "onnxruntime",
    *,
    described: bool = False,
) -> tuple[Part, ...]:
    """The decoders of all ranks."""
    target, parts = load_target(backend), []
    for index in range(tp):
        own = replace(traced, model=traced.model.clone())
        report, note, rank = lambda *_: None, lambda _: None, Rank(index, tp)
        job = CompileJob(part, store, settings, folder, report, note, rank, described)
        parts.append(target.compile(own, job))
    return tuple(parts)


@contextmanager
def ranks_of(
    traced: Traced, part: PartSpec, store: TensorStore, tp: int, settings: Settings = SETTINGS
) -> Iterator[Ranks]:
    with tempfile.TemporaryDirectory() as folder:
        parts = compiled(traced, part, store, Path(folder), tp, settings)
        yield Ranks.load(Path(folder), parts, batch=2, capacity=24)


def prompts(vocab: int, hidden: int, seed: int = 0) -> tuple[Array, Array]:
    """Token ids of two sequences, with rows of images in one, and the rows."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (2, 9))
    ids[0, 2:4] = [vocab, vocab + 1]
    return ids, rng.standard_normal((2, hidden), np.float32)
