"""What an engine with pages gets of a GPU's memory, by arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from sample_manifest import MANIFEST, RICH
from vlmforge.api import memory
from vlmforge.api.config import EngineConfig
from vlmforge.engine.bundle import Bundle
from vlmforge.engine.chain import ChainStep
from vlmforge.engine.manifest import Manifest
from vlmforge.errors import BackendUnavailableError


def paged(folder: Path) -> Bundle:
    """The sample manifest as that of an engine with pages."""
    kv = structs.replace(
        MANIFEST.kv, layers=32, kv_heads=32, head_dim=128, dtype="float16", page_size=64
    )
    decode = structs.replace(MANIFEST.decode, session_len=2048, max_batch_size=64)
    return Bundle(folder, structs.replace(MANIFEST, kv=kv, decode=decode))


def chained(token_bytes: int = 100) -> Manifest:
    """The same, of a chain whose tokens are told nothing of their row."""
    part = RICH.part("decoder")
    assert part.chain is not None
    segments = (step.segment for step in part.chain.steps if step.segment is not None)
    steps = tuple(
        ChainStep(
            segment=structs.replace(
                segment,
                token_bytes=token_bytes,
                inputs=tuple(spec for spec in segment.inputs if len(spec.shape) > 1),
            )
        )
        for segment in segments
    )
    chain = structs.replace(part.chain, steps=steps, sampler=None)
    return structs.replace(paged(Path()).manifest, parts=(structs.replace(part, chain=chain),))


def test_a_gpu_engine_gets_a_pool_of_what_is_free(tmp_path: Path) -> None:
    bundle = paged(tmp_path)
    page = 64 * bundle.manifest.kv.bytes_per_token
    config = EngineConfig(cache_max_entry_count=0.5)
    taken = sum(memory.part_memory(part, 2048, 64).total for part in bundle.manifest.parts)
    planned = memory.load_options(bundle, config, taken + 1000 * page)
    assert (planned.blocks, planned.block_size, planned.paged) == (500, 64, True)
    assert (planned.slots, planned.capacity, planned.chunk) == (64, 2048, 2048)
    # No more than all sequences can ever fill; and a prompt's chunk is no more than a window,
    # where prompts are not packed.
    few = EngineConfig(max_batch_size=2, session_len=100)
    planned = memory.load_options(bundle, few, taken + 1000 * page)
    assert (planned.blocks, planned.slots, planned.chunk) == (2 * 2, 2, 100)
    assert not planned.packs


@pytest.mark.parametrize(
    ("asked", "window", "slots", "chunk"),
    [(None, 1024, 16, 2048), (4096, 1024, 16, 4096), (9000, 2048, 16, 8192), (4096, 100, 3, 300)],
)
def test_prompts_that_are_packed_are_not_bound_to_a_window(
    asked: int | None, window: int, slots: int, chunk: int
) -> None:
    config = EngineConfig(max_prefill_token_num=asked, session_len=window, max_batch_size=slots)
    bundle = Bundle(Path(), chained())
    planned = memory.load_options(bundle, config, 80e9)
    assert (planned.packs, planned.chunk, planned.capacity) == (True, chunk, window)


def test_prompts_take_a_tenth_of_what_is_free_unless_more_is_asked_for() -> None:
    manifest = chained(token_bytes=1_000_000)
    row = 1.2 * sum(s.token_bytes for s in manifest.parts[-1].chain.segments)  # type: ignore[union-attr]
    for free, chunk in ((21130 * row, 2048), (21110 * row, 1024), (10000 * row, 512)):
        found = memory.prompt_tokens(manifest, EngineConfig(), 1024, free)
        assert found == chunk
    assert (
        memory.prompt_tokens(manifest, EngineConfig(max_prefill_token_num=4096), 1024, 1e9) == 4096
    )


def test_what_does_not_fit_a_gpu_says_what_to_change(tmp_path: Path) -> None:
    bundle = paged(tmp_path)
    taken = sum(memory.part_memory(part, 512, 64).total for part in bundle.manifest.parts)
    with pytest.raises(BackendUnavailableError, match="memory of this GPU") as caught:
        memory.load_options(bundle, EngineConfig(), taken + 1e9)
    needed = 2048 * bundle.manifest.kv.bytes_per_token
    assert caught.value.expected == f"{needed / 1e9:.2f} GB for a cache of 2048 tokens"
    assert f"{taken / 1e9:.2f} GB go to weights" in caught.value.found
    assert "EngineConfig(session_len=...)" in caught.value.fix


def test_a_chain_takes_more_the_more_tokens_are_run_at_once() -> None:
    part = RICH.part("decoder")
    assert part.chain is not None
    one, many = (memory.part_memory(part, tokens, 1).total for tokens in (1, 101))
    row = sum(segment.token_bytes for segment in part.chain.segments)
    between = memory.between_steps(part.chain)
    assert many - one == pytest.approx(100 * (1.2 * row + between))
    assert part.chain.sampler is not None
    several = memory.part_memory(part, 1, 11).total  # sequences, whose tokens are chosen
    assert several - one == pytest.approx(10 * 1.2 * part.chain.sampler.token_bytes)
    assert one > part.loaded_bytes


def test_segments_of_one_graph_have_one_session_and_one_arena() -> None:
    part = RICH.part("decoder")
    assert part.chain is not None
    first, *others = part.chain.steps
    assert first.segment is not None and others[1].segment is not None
    row = first.segment.token_bytes
    again = structs.replace(
        others[1], segment=structs.replace(others[1].segment, file=first.segment.file)
    )
    joined = structs.replace(
        part, chain=structs.replace(part.chain, steps=(first, others[0], again, *others[2:]))
    )
    apart, one = (memory.part_memory(each, 100, 1) for each in (part, joined))
    assert apart.library - one.library == 76e6
    assert apart.activations - one.activations == pytest.approx(100 * 1.2 * row)
    assert apart.weights == one.weights


def test_what_lies_between_steps_is_what_lives_at_once() -> None:
    chain = RICH.part("decoder").chain
    assert chain is not None
    # qkv0 (64) and hidden (16); hidden and mixed0 (64); with qkv1 (64) made of them, the most.
    assert memory.between_steps(chain) == 2 * (16 + 64 + 64)
    whole = chain.steps[-3]
    assert whole.gated is not None
    assert memory.between_steps(structs.replace(chain, steps=chain.steps[-4:])) == 2 * (64 + 32)
    # A rank's share, the sum that is only added to others, and its norm.
    assert memory.between_steps(structs.replace(chain, steps=chain.steps[4:6])) == 2 * 3 * 16


def test_a_chain_of_whole_numbers_takes_room_to_make_its_largest_matrices_whole() -> None:
    part = RICH.part("decoder")
    assert part.chain is not None
    plain = structs.replace(
        part.chain,
        steps=tuple(
            s
            if s.segment is None
            else structs.replace(s, segment=structs.replace(s.segment, matrix_bytes=0))
            for s in part.chain.steps
        ),
    )
    assert (
        memory.part_memory(part, 1, 1).total
        - memory.part_memory(structs.replace(part, chain=plain), 1, 1).total
        == 4096
    )
