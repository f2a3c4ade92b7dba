"""How an engine is laid out in memory: exact arithmetic before anything is loaded."""

from __future__ import annotations

import logging

from vlmforge.api.config import EngineConfig
from vlmforge.backends import LoadOptions
from vlmforge.engine.bundle import Bundle
from vlmforge.engine.manifest import Manifest
from vlmforge.errors import BackendUnavailableError, ConfigError
from vlmforge.field_rules import shown
from vlmforge.limits import available_cpus, available_memory
from vlmforge.runner.features import USUAL_BUDGET

logger = logging.getLogger("vlmforge")

# Weights are packed (copied) only when they leave this share of the free memory to the cache.
_PACK_SHARE = 0.7
# At most this share of the free memory is for the features of images, unless more is asked for.
_FEATURES_SHARE = 0.05
# Sequences rarely fill their windows: address space is kept for this many times what memory holds.
_OVERCOMMIT = 4


def load_options(bundle: Bundle, config: EngineConfig, free: float) -> LoadOptions:
    """Slots and window that fit `free` bytes, so that nothing dies for want of memory later.

    Raises:
        ConfigError: the engine cannot be given a window of this size.
        BackendUnavailableError: not even one sequence fits.
    """
    manifest = bundle.manifest
    capacity = _window(bundle, config)
    weights = sum(part.loaded_bytes for part in manifest.parts) + _longer_tables(manifest, capacity)
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
    blocks = int(budget // (block * manifest.kv.bytes_per_token))
    longest = -(-capacity // block)
    if blocks < longest:
        raise _too_small(budget, capacity, longest * block * manifest.kv.bytes_per_token)
    wanted = config.max_batch_size or manifest.decode.max_batch_size
    slots = min(wanted, _OVERCOMMIT * blocks // longest)
    if blocks < wanted * longest:
        logger.warning(
            "memory for %d of %s tokens that %s sequences may have in all; others wait",
            blocks * block,
            shown(wanted * capacity),
            shown(wanted),
        )
    return LoadOptions(slots, capacity, _threads(config.threads), pack, blocks, block)


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
    compiled_in = manifest.part("decoder").rotary_tables is None
    return compiled_in or not manifest.decode.positions.extends


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
