"""Loading an engine of several ranks: each process its own part, all at the same time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vlmforge.backends import Backend, DecoderSession, LoadOptions, onnxruntime
from vlmforge.backends.chained import room_of
from vlmforge.backends.ranks.calls import RankedDecoder
from vlmforge.backends.ranks.processes import Processes
from vlmforge.engine.manifest import Manifest


def load_ranked(
    backend: Backend, folder: Path, manifest: Manifest, options: LoadOptions
) -> DecoderSession:
    """The decoder of an engine that was built for several ranks; the others are started.

    Raises:
        EngineError: a part cannot be loaded, or a rank failed (RankError).
    """
    size = manifest.parallel.tp
    threads = shares(options.threads or onnxruntime.physical_cores(), size)
    tokens = max(options.chunk, options.slots)
    others = Processes(size, room_of(manifest.part("decoder"), tokens, size))
    try:
        others.begin(folder, options, threads)
        own = dataclasses.replace(options, threads=threads[0])
        first = backend.load_rank(folder, manifest, own, others.communicator)
        others.wait_until_loaded()
    except BaseException:
        others.close()
        raise
    return RankedDecoder(first, others)


def shares(threads: int, size: int) -> list[int]:
    """Threads of each rank: as even as they can be, and one at least."""
    return [max(1, threads // size + (rank < threads % size)) for rank in range(size)]
