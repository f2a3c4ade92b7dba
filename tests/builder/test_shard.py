"""The ranks of a divided decoder give together what one rank gives: drawn decoders, golden ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drawn_decoder import drawn
from rank_chains import Ranks
from vlmforge.engine.manifest import Part
from vlmforge_builder.blocks.decoder import DecoderConfig
from vlmforge_builder.checkpoint.store import TensorStore
from vlmforge_builder.export import Traced
from vlmforge_builder.passes import shard as shard_pass
from vlmforge_builder.ranks import Rank
from vlmforge_builder.recipe import PartSpec
from vlmforge_builder.targets import CompileJob, Settings, load_target

SETTINGS = Settings("float32", None, 64, 2, None, None, None)
CONFIG = DecoderConfig(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=64,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    rope_theta=1e4,
    activation="silu",
    max_positions=64,
)


def compiled(
    traced: Traced, part: PartSpec, store: TensorStore, folder: Path, tp: int, settings: Settings
) -> tuple[Part, ...]:
    """The decoders of all ranks."""
    target, parts = load_target("onnxruntime"), []
    for index in range(tp):
        own = replace(traced, model=traced.model.clone())
        job = CompileJob(
            part, store, settings, folder, lambda *_: None, lambda _: None, Rank(index, tp)
        )
        parts.append(target.compile(own, job))
    return tuple(parts)


@contextmanager
def ranks_of(
    traced: Traced, part: PartSpec, store: TensorStore, tp: int, settings: Settings = SETTINGS
) -> Iterator[Ranks]:
    with tempfile.TemporaryDirectory() as folder:
        parts = compiled(traced, part, store, Path(folder), tp, settings)
        yield Ranks.load(Path(folder), parts, batch=2, capacity=24)


def prompts(vocab: int, hidden: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of two sequences, with rows of images in one, and the rows."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (2, 9))
    ids[0, 2:4] = [vocab, vocab + 1]
    return ids, rng.standard_normal((2, hidden), np.float32)


# --- drawn decoders -----------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> tuple[DecoderConfig, int]:
    tp = draw(st.sampled_from([2, 3, 4]))
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    heads = kv_heads * draw(st.sampled_from([n for n in range(1, 13) if n * kv_heads % tp == 0]))
    return replace(
        CONFIG,
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=tp * draw(st.integers(1, 20)),
        vocab_size=draw(st.integers(5, 99)),
        layers=draw(st.integers(1, 2)),
        qkv_bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", "gelu"])),
    ), tp


@settings(max_examples=12)
@given(configs(), st.booleans(), st.booleans(), st.booleans())
@example((replace(CONFIG, heads=6, kv_heads=2, intermediate_size=66), 3), True, True, True)
@example((replace(CONFIG, heads=8, kv_heads=1, qkv_bias=True), 4), False, True, False)
def test_ranks_together_are_the_whole(
    drawn_config: tuple[DecoderConfig, int], tied: bool, normed: bool, table: bool
) -> None:
    config, tp = drawn_config
    made = drawn(config, tied=tied, normed=normed)
    ids, features = prompts(config.vocab_size, config.hidden_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_pass, "LARGE_TABLE", 0 if table else 1 << 40)
        with ranks_of(*made, 1) as whole, ranks_of(*made, tp) as ranks:
            expected, tokens = whole.greedy(ids, features, 4)
            found, same = ranks.greedy(ids, features, 4)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)
    np.testing.assert_array_equal(same, tokens)
