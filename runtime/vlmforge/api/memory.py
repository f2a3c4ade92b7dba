"""How an engine is laid out in memory: exact arithmetic before anything is loaded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from vlmforge.api.config import MAX_CHUNK, MAX_GPU_CHUNK, USUAL_GPU_CHUNK, EngineConfig
from vlmforge.backends import LoadOptions
from vlmforge.backends.features import device_features
from vlmforge.engine.bundle import Bundle
from vlmforge.engine.interface import TOKENS, packs
from vlmforge.engine.manifest import Manifest, Part
from vlmforge.engine.tensors import TensorSpec
from vlmforge.errors import BackendUnavailableError, ConfigError
from vlmforge.field_rules import shown
from vlmforge.limits import available_cpus, available_memory
from vlmforge.runner.features import USUAL_BUDGET

if TYPE_CHECKING:
    from vlmforge.engine.chain import PartChain

logger = logging.getLogger("vlmforge")

# Weights are packed (copied) only when they leave this share of the free memory to the cache.
_PACK_SHARE = 0.7
# At most this share of the free memory is for the features of images, unless more is asked for.
_FEATURES_SHARE = 0.05
# At most this share of a GPU's free memory is for what prompts take, unless more is asked for.
_PROMPTS_SHARE = 0.1
# Of each rank but the first: Python, the libraries, and what they allocate as they run.
_RANK_BYTES = 120 << 20
# Sequences rarely fill their windows: address space is kept for this many times what memory holds.
_OVERCOMMIT = 4
# Of a graph on a GPU, and of a segment of a chain: the library's own; and what allocations lose.
# (cuBLAS takes 67 MB and cuDNN 9 MB in each session, of which there is one a file.)
_GRAPH_BYTES, _SEGMENT_BYTES, _ROOM = 600 << 20, 76_000_000, 1.2
# Where GPUs meet: NCCL's buffers, and ours.
_MEETING_BYTES = 640 << 20


def load_options(
    bundle: Bundle, config: EngineConfig, free: float, features: int = USUAL_BUDGET
) -> LoadOptions:
    """Slots and window that fit `free` bytes, so that nothing dies for want of memory later.

    `features`: bytes for those of images that were seen, where they stay on a device.

    Raises:
        ConfigError: the engine cannot be given a window of this size.
        BackendUnavailableError: not even one sequence fits.
    """
    manifest = bundle.manifest
    capacity = _window(bundle, config)
    if manifest.kv.page_size is not None:
        return _paged(manifest, config, capacity, free, features)
    ranks = manifest.parallel.tp  # all of them lie in what this process may use
    weights = sum(part.loaded_bytes for part in manifest.parts)
    weights += ranks * _longer_tables(manifest, capacity) + (ranks - 1) * _RANK_BYTES
    token = ranks * manifest.rank_kv.bytes_per_token
    pack = weights <= _PACK_SHARE * free
    if not pack:
        logger.warning(
            "the weights take %.1f GB of %.1f GB of free memory: they are mapped from the file "
            "instead of packed, which is slower for batches",
            weights / 1e9,
            free / 1e9,
        )
    budget = config.cache_max_entry_count * max(free - weights, 0.1 * free)
    block = config.cache_block_seq_len
    blocks = int(budget // (block * token))
    longest = -(-capacity // block)
    if blocks < longest:
        raise _too_small(budget, capacity, longest * block * token)
    wanted = slots_of(manifest, config)
    slots = min(wanted, _OVERCOMMIT * blocks // longest)
    if blocks < wanted * longest:
        logger.warning(
            "memory for %d of %s tokens that %s sequences may have in all; others wait",
            blocks * block,
            shown(wanted * capacity),
            shown(wanted),
        )
    return LoadOptions(
        slots,
        capacity,
        _threads(config.threads),
        pack,
        blocks,
        block,
        prompts=slots,
        apart=True,
        packs=True,
    )


def _paged(
    manifest: Manifest, config: EngineConfig, capacity: int, free: float, features: int
) -> LoadOptions:
    """Of a GPU: a pool of pages in what weights and activations leave of its free memory."""
    page, slots = manifest.kv.page_size or 0, slots_of(manifest, config)
    page_bytes = page * manifest.rank_kv.bytes_per_token
    chunk = prompt_tokens(manifest, config, capacity, free)
    taken = sum(part.total for part in parts_memory(manifest, slots, chunk, features))
    budget = config.cache_max_entry_count * (free - taken)
    longest = -(-capacity // page)
    # No more than all sequences can ever fill.
    blocks = min(int(budget // page_bytes), slots * longest)
    if blocks < longest:
        needed = longest * page_bytes
        raise BackendUnavailableError(
            "The engine does not fit the memory of this GPU.",
            found=f"{free / 1e9:.2f} GB free, of which {taken / 1e9:.2f} GB go to weights and "
            f"activations, and {config.cache_max_entry_count} of the rest to the cache",
            expected=f"{needed / 1e9:.2f} GB for a cache of {capacity} tokens",
            fix="EngineConfig(session_len=...) with a smaller window, a larger "
            "cache_max_entry_count, a GPU with more memory, or what else is on it ended",
        )
    return LoadOptions(
        slots,
        capacity,
        budget=blocks,
        block_size=page,
        paged=True,
        chunk=chunk,
        prompts=slots,
        packs=packs(manifest.first_parts[-1]),
        features=features,
    )


def prompt_tokens(manifest: Manifest, config: EngineConfig, capacity: int, free: float) -> int:
    """Tokens of prompts that are run at once, where `free` bytes are free.

    Where prompts are packed they are not bound to a window of `capacity` tokens: matrices are used
    well by no less than 2048 tokens or so.
    """
    asked, most = config.max_prefill_token_num, most_chunk(manifest)
    if manifest.kv.page_size is None:
        return min(MAX_CHUNK if asked is None else int(asked), most)
    slots, packed = slots_of(manifest, config), packs(manifest.first_parts[-1])
    most = min(most, slots * capacity if packed else capacity)
    if asked is not None:
        return min(int(asked), most)
    chunk = USUAL_GPU_CHUNK

    def activations() -> float:
        return sum(part.activations for part in parts_memory(manifest, slots, chunk, None))

    while chunk > MAX_CHUNK and activations() > _PROMPTS_SHARE * free:
        chunk //= 2
    return min(chunk, most)


def most_chunk(manifest: Manifest) -> int:
    """Tokens of prompts that may be run at once."""
    profiles = manifest.first_parts[-1].profiles
    if manifest.kv.page_size is None:
        return MAX_CHUNK
    return max((p.dims[TOKENS].most for p in profiles), default=MAX_GPU_CHUNK)


class PartMemory(Struct, frozen=True):
    """Bytes that a part takes of a GPU's memory.

    Attributes:
        weights: As they are in its files.
        activations: What is calculated in between, matrices of whole numbers made whole too; and
            features of images, where they stay there.
        library: The library's own.
    """

    weights: float
    activations: float
    library: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.activations + self.library


def parts_memory(
    manifest: Manifest, slots: int, chunk: int, features: int | None = USUAL_BUDGET
) -> tuple[PartMemory, ...]:
    """What an engine's parts take of its first GPU's memory, for `chunk` tokens of prompts.

    `features`: bytes for those of images that were seen, where they stay there; None: without what
    images take.
    """
    tokens = chunk + slots if packs(manifest.first_parts[-1]) else max(chunk, slots)
    kept = None if features is None else device_features(manifest, features)
    images = 0 if kept is None else kept.total

    def taken(part: Part) -> PartMemory:
        found = part_memory(part, tokens, slots)
        own = images if part.name == "vision" else 0
        return structs.replace(found, activations=found.activations + own)

    return tuple(map(taken, manifest.first_parts))


def part_memory(part: Part, tokens: int, rows: int) -> PartMemory:
    """What a part takes of a GPU's memory when at most so many tokens, or sequences, run at once.

    The factors were measured.
    """
    if part.chain is None:
        return PartMemory(part.loaded_bytes, 0, _GRAPH_BYTES)
    kinds, sampler = part.chain.kinds.values(), part.chain.sampler
    # Each graph keeps what it took once, whichever of its segments ran.
    whole = sum(max(segment.matrix_bytes for segment in kind) for kind in kinds)
    taken = tokens * sum(max(segment.token_bytes for segment in kind) for kind in kinds)
    taken += 0 if sampler is None else rows * sampler.token_bytes
    sessions = len(kinds) + (sampler is not None)
    library = _SEGMENT_BYTES * sessions + (_MEETING_BYTES if part.chain.collectives else 0)
    between = tokens * between_steps(part.chain)
    return PartMemory(part.loaded_bytes, whole + _ROOM * taken + between, library)


def between_steps(chain: PartChain) -> int:
    """Bytes for each token of a step of what is between steps of a chain at once, at most."""
    rows = {name: _row_bytes(spec) for name, spec in chain.tensors.items()}
    last = {name: at for at, step in enumerate(chain.steps) for name in step.taken}
    alive, most = dict[str, int](), 0
    for at, step in enumerate(chain.steps):
        alive = {name: size for name, size in alive.items() if last.get(name, 0) >= at}
        alive |= {name: rows.get(name, 0) for name in step.given}
        most = max(most, sum(alive.values()))
    return most


def _row_bytes(spec: TensorSpec) -> int:
    """Of a tensor `[batch, tokens, width]`; 0 of what has another form."""
    if len(spec.shape) != 3 or spec.shape[1] != TOKENS or not isinstance(spec.shape[2], int):
        return 0
    return spec.shape[2] * (4 if spec.dtype == "float32" else 2)


def slots_of(manifest: Manifest, config: EngineConfig) -> int:
    """Sequences at once, as asked for or as the engine was built."""
    return config.max_batch_size or manifest.decode.max_batch_size


def feature_bytes(asked: int | None, free: float) -> int:
    """Bytes of `free` that are set apart for the features of images seen before.

    Raises:
        BackendUnavailableError: what was asked for leaves nothing for anything else.
    """
    if asked is None:
        return min(USUAL_BUDGET, int(_FEATURES_SHARE * free))
    if asked >= free:
        raise BackendUnavailableError(
            "The cache of image features does not fit the memory.",
            found=f"{free / 1e9:.2f} GB, by {available_memory().limit}",
            expected=f"more than feature_cache_bytes={shown(asked)}",
            fix="VisionConfig(feature_cache_bytes=...) with less, or leave it out",
        )
    return int(asked)


def window_is_fixed(manifest: Manifest) -> bool:
    """Whether the engine's window can only be shorter than the one that it was built for."""
    part, positions = manifest.part("decoder"), manifest.decode.positions
    in_tables = part.rotary_tables is None and not positions.turn_width
    return in_tables or bool(part.profiles) or not positions.extends


def _window(bundle: Bundle, config: EngineConfig) -> int:
    """Tokens of a sequence: as asked for, or as the engine was built."""
    manifest, asked = bundle.manifest, config.session_len
    built, positions = manifest.decode.session_len, manifest.decode.positions
    if asked is None or asked <= built:
        return asked or built
    if window_is_fixed(manifest):
        rebuild = f"build-engine CHECKPOINT -o {bundle.folder} --session-len {asked} --force"
        raise ConfigError(
            "session_len is larger than the engine's window.",
            found=f"session_len={asked}",
            expected=f"at most {built}",
            fix=f"{rebuild}, where CHECKPOINT is {manifest.provenance.source}",
        )
    attended, trained = positions.attention_window, positions.trained_length
    if attended is not None and asked > attended:
        raise ConfigError(
            "session_len is larger than what the model attends to.",
            found=f"session_len={asked}",
            expected=f"at most {attended}",
            fix=f"EngineConfig(session_len={attended})",
        )
    if trained is not None and asked > trained:
        logger.warning(
            "session_len=%d is beyond the %d tokens that the model was trained for; answers to "
            "longer conversations may degrade",
            asked,
            trained,
        )
    return asked


def _longer_tables(manifest: Manifest, capacity: int) -> int:
    """Bytes of the rotary tables that are made for a longer window than the built one."""
    decode = manifest.decode
    return decode.positions.table_bytes(capacity) if capacity > decode.session_len else 0


def _threads(asked: int | None) -> int | None:
    """No more threads than processors: they would wait for each other, turn about."""
    cpus = available_cpus()
    if asked is None or asked <= cpus:
        return asked
    logger.warning(
        "threads=%s: this process may use %d processors, so it gets as many threads",
        shown(asked),
        cpus,
    )
    return cpus


def _too_small(budget: float, capacity: int, needed: int) -> BackendUnavailableError:
    return BackendUnavailableError(
        "The key/value cache of one sequence does not fit the memory.",
        found=f"{budget / 1e9:.2f} GB for the cache, by {available_memory().limit}",
        expected=f"{needed / 1e9:.2f} GB for {capacity} tokens",
        fix="EngineConfig(session_len=...) with a smaller window, or more memory: free some, or "
        "raise the limit",
    )
