"""Whether an engine fits a memory, before it is built or loaded: the arithmetic of its loading."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct, structs

from vlmforge.api.config import EngineConfig
from vlmforge.api.memory import load_options, parts_memory, prompt_tokens, slots_of
from vlmforge.backends import LoadOptions
from vlmforge.engine.bundle import Bundle
from vlmforge.engine.manifest import Manifest
from vlmforge.errors import BackendUnavailableError

CONTEXT_BYTES = 600 << 20
"""What the driver and the libraries take of a GPU before an engine does."""
_PRECISE = 1 << 20


class PartPlan(Struct, frozen=True):
    """Bytes of a part: see `PartMemory`."""

    name: str
    weights: int
    activations: int
    library: int


class CachePlan(Struct, frozen=True):
    """The key/value cache.

    Attributes:
        dtype: What it is stored in.
        bytes_per_token: Of one token of one sequence.
        block_tokens: Tokens of a block, by which it is given out.
        blocks: How many there are.
        bytes: Of all of them.
        sequences: That may run at once.
        window: Tokens that each of them may have.
        full_windows: Sequences of full windows that it holds.
    """

    dtype: str
    bytes_per_token: int
    block_tokens: int
    blocks: int
    bytes: int
    sequences: int
    window: int
    full_windows: int

    @property
    def tokens(self) -> int:
        """Of all sequences together."""
        return self.blocks * self.block_tokens


class Refusal(Struct, frozen=True):
    """Why it does not fit: the error that loading would end with, and what would fit instead."""

    summary: str
    found: str
    expected: str
    changes: tuple[str, ...]


class Plan(Struct, frozen=True):
    """An engine in a memory.

    Attributes:
        model: Its source.
        backend, dtype, quantisation: As in its manifest.
        memory: Bytes that there are.
        context: Bytes of them that are taken before anything is loaded.
        parts: What its parts take.
        cache: What is left for the cache; None where it does not fit.
        refusal: None where it fits.
    """

    model: str
    backend: str
    dtype: str
    quantisation: str | None
    memory: int
    context: int
    parts: tuple[PartPlan, ...]
    cache: CachePlan | None
    refusal: Refusal | None

    @property
    def fits(self) -> bool:
        """Whether it can be loaded."""
        return self.refusal is None


def plan(manifest: Manifest, config: EngineConfig, memory: int) -> Plan:
    """What an engine takes of `memory` bytes of a GPU, or of a machine, and what it holds then.

    Raises:
        ConfigError: the engine cannot be given a window of this size.
    """
    paged = manifest.kv.page_size is not None
    context = CONTEXT_BYTES if paged else 0
    cache, refusal = None, None
    try:
        cache = _cache(manifest, _options(manifest, config, memory - context))
    except BackendUnavailableError as error:
        changes = tuple(_changes(manifest, config, memory - context))
        refusal = Refusal(error.summary, error.found, error.expected, changes)
    provenance = manifest.provenance
    return Plan(
        provenance.source,
        manifest.backend,
        manifest.dtype,
        manifest.quantisation,
        memory,
        context,
        tuple(_parts(manifest, config, memory - context)),
        cache,
        refusal,
    )


def _options(manifest: Manifest, config: EngineConfig, free: float) -> LoadOptions:
    with _silent():
        return load_options(Bundle(Path("ENGINE"), manifest), config, free)


@contextmanager
def _silent() -> Iterator[None]:
    """Loading would warn of what a plan says in its own way."""
    logger = logging.getLogger("vlmforge")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _parts(manifest: Manifest, config: EngineConfig, free: float) -> Iterator[PartPlan]:
    if manifest.kv.page_size is None:
        for part in manifest.parts:
            yield PartPlan(part.name, part.loaded_bytes, 0, 0)
        return
    window = config.session_len or manifest.decode.session_len
    chunk = prompt_tokens(manifest, config, window, free)
    found = parts_memory(manifest, slots_of(manifest, config), chunk)
    for part, taken in zip(manifest.first_parts, found, strict=True):
        yield PartPlan(part.name, int(taken.weights), int(taken.activations), int(taken.library))


def _cache(manifest: Manifest, options: LoadOptions) -> CachePlan:
    kv = manifest.rank_kv
    return CachePlan(
        kv.dtype,
        kv.bytes_per_token,
        options.block_size,
        options.blocks,
        options.blocks * options.block_size * kv.bytes_per_token,
        options.slots,
        options.capacity,
        options.blocks // -(-options.capacity // options.block_size),
    )


def _changes(manifest: Manifest, config: EngineConfig, free: float) -> Iterator[str]:
    """What would make it fit, each by the same arithmetic."""
    window = config.session_len or manifest.decode.session_len
    if longest := _longest(manifest, config, free, window):
        yield f"--session-len {longest}"
    if manifest.kv.dtype in ("float16", "bfloat16") and manifest.kv.page_size is not None:
        kv = structs.replace(manifest.kv, dtype="float8_e4m3fn")
        halved = structs.replace(manifest, kv=kv)
        if _fits(halved, config, free):
            yield "--kv-dtype fp8"
        elif longest := _longest(halved, config, free, window):
            yield f"--kv-dtype fp8 --session-len {longest}"
    parts = _parts(manifest, config, free)
    most = sum(part.weights for part in parts if part.name != "vision")
    if manifest.quantisation is None and _fits(manifest, config, free + most):
        yield "--weights int8 or int4, which take a half or a quarter of what the decoder does"
    yield f"a memory of {_least(manifest, config) / 1e9:.1f} GB"


def _fits(manifest: Manifest, config: EngineConfig, free: float) -> bool:
    try:
        _options(manifest, config, free)
    except BackendUnavailableError:
        return False
    return True


def _longest(manifest: Manifest, config: EngineConfig, free: float, window: int) -> int:
    """The longest window that fits, rounded down to blocks; 0: none."""
    step = manifest.kv.page_size or config.cache_block_seq_len
    low, high = 0, window // step
    while low < high:
        middle = (low + high + 1) // 2
        shorter = dataclasses.replace(config, session_len=middle * step)
        low, high = (middle, high) if _fits(manifest, shorter, free) else (low, middle - 1)
    return low * step


def _least(manifest: Manifest, config: EngineConfig) -> int:
    """The least memory that holds it as it is asked for, to a megabyte."""
    low, high = 0, _PRECISE
    while not _fits(manifest, config, high):
        low, high = high, 2 * high
    while high - low > _PRECISE:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(manifest, config, middle) else (middle, high)
    return high + (CONTEXT_BYTES if manifest.kv.page_size is not None else 0)
