"""Compile a traced part for each of the ranks that have one."""

from __future__ import annotations

import dataclasses

from vlmforge.engine.manifest import ParallelLayout, Part
from vlmforge_builder.export import Traced
from vlmforge_builder.progress import Progress
from vlmforge_builder.ranks import Rank
from vlmforge_builder.targets import CompileJob, Target


def compile_ranks(
    target: Target, traced: Traced, job: CompileJob, progress: Progress
) -> tuple[Part, ...]:
    """The part of each rank of a decoder, or the one of another part; `job` is the first's."""
    tp, parts = job.settings.tp if job.is_decoder else 1, []
    for index in range(tp):
        own = dataclasses.replace(job, rank=Rank(index, tp))
        with progress.stage(f"{'lower' if job.described else 'write'} {own.name}"):
            copy = dataclasses.replace(traced, model=traced.model.clone())
            parts.append(target.compile(copy, own))
    return tuple(parts)


def parallel_layout(parts: tuple[Part, ...], tp: int) -> ParallelLayout:
    """What the ranks' parts say of themselves."""
    if tp == 1:
        return ParallelLayout(tp)
    caches = (spec for part in parts for spec in part.inputs if "." in spec.name)
    return ParallelLayout(tp, kv_heads=int(next(caches).shape[1]))
