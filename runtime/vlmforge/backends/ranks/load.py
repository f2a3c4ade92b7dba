"""Loading an engine of several ranks: each process its own part, all at the same time."""

from __future__ import annotations

from pathlib import Path

from vlmforge.backends import Backend, DecoderSession, LoadOptions, one_rank_only
from vlmforge.backends.chained import room_of
from vlmforge.backends.ranks.mpi import MpiRanks, world
from vlmforge.backends.ranks.overlapping import ranked
from vlmforge.backends.ranks.processes import Processes
from vlmforge.engine.manifest import Manifest
from vlmforge.errors import BackendUnavailableError


def load_ranked(
    backend: Backend, folder: Path, manifest: Manifest, options: LoadOptions
) -> DecoderSession:
    """The decoder of an engine that was built for several ranks; the others are started.

    Raises:
        BackendUnavailableError: the backend has no ranks, or not of that kind.
        EngineError: a part cannot be loaded, or a rank failed (RankError).
    """
    if manifest.part("decoder").chain is None:  # plans, inside which ranks would meet
        raise one_rank_only(manifest)
    if options.mpi and manifest.kv.page_size is not None:
        raise BackendUnavailableError(
            "Ranks that mpirun has started have no GPUs.",
            found=f"communicator='mpi' for an engine of {manifest.backend}",
            expected="ranks that the pipeline starts, one for each GPU of its host",
            fix="leave communicator out, and mpirun",
        )
    size, tokens = manifest.parallel.tp, max(options.chunk, options.slots)
    room = room_of(manifest.part("decoder"), tokens, size)
    others = MpiRanks(world(size), room) if options.mpi else Processes(size, room)
    try:
        own = others.begin(folder, options)
        first = backend.load_rank(folder, manifest, own, others.communicator)
        others.wait_until_loaded()
    except BaseException:
        others.close()
        raise
    return ranked(first, others)
