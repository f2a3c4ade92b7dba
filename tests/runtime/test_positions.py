"""Position policies: the level of a prompt against the formula that it stands for, and tables."""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vlmforge.engine.positions.absolute import Absolute
from vlmforge.engine.positions.dynamic_ntk import DynamicNTK, level_of
from vlmforge.engine.schema import from_json, to_json
from vlmforge_builder.blocks.decoder import DecoderConfig, inverse_frequencies, rotary_tables


def alpha(tokens: int, trained: int) -> int:
    """The published formula."""
    return max(2 ** math.ceil(math.log(tokens / trained, 2) + 1) - 1, 1)


@given(st.integers(1, 70_000), st.integers(2, 5000))
@example(2048, 2048)
@example(2049, 2048)
@example(4096, 2048)
@example(4097, 2048)
@example(8192, 2048)
@example(1, 2048)
@example(330, 330)
@example(331, 330)
def test_a_level_stands_for_its_alpha(tokens: int, trained: int) -> None:
    assert 2 ** (level_of(tokens, trained) + 1) - 1 == alpha(tokens, trained)


def test_levels_of_a_policy() -> None:
    policy = DynamicNTK(100, 3)
    assert policy.has_levels
    found = [policy.level(n) for n in (1, 99, 100, 101, 200, 201, 400, 401, 10**6)]
    assert found == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert not Absolute().has_levels
    assert {Absolute().level(n) for n in (1, 10**6)} == {0}


# --- tables that are made at load ---------------------------------------------------------------


def config(positions: int, head_dim: int = 32, theta: float = 10000.0) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=8,
        hidden_size=head_dim,
        intermediate_size=8,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=head_dim,
        norm_eps=1e-6,
        rope_theta=theta,
        activation="silu",
        max_positions=positions,
    )


THETAS = st.sampled_from([100.0, 10000.0, 1e6, 5e6])


@given(THETAS, st.sampled_from([2, 16, 64, 128]), st.integers(1, 300), st.integers(0, 300))
def test_longer_tables_continue_the_built_ones(
    theta: float, head_dim: int, built: int, more: int
) -> None:
    built_tables = rotary_tables(config(built, head_dim, theta))
    policy = Absolute(inverse_frequencies=inverse_frequencies(config(built, head_dim, theta)))
    # What is read from JSON is what was written, to the last bit.
    stored = from_json(Absolute, json.loads(to_json(policy)), "x")
    longer = stored.longer_tables(built + more)
    assert longer is not None
    for made, table in zip(longer, built_tables, strict=True):
        assert made.dtype == np.float32
        assert made.shape == (built + more, head_dim // 2)
        np.testing.assert_array_equal(made[:built].view(np.uint32), table.numpy().view(np.uint32))
    assert stored.table_bytes(built + more) == sum(made.nbytes for made in longer)


@given(THETAS, st.sampled_from([16, 64, 128]))
def test_tables_are_those_of_transformers(theta: float, head_dim: int) -> None:
    rows = 700
    llama = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
    )
    angles = LlamaRotaryEmbedding(llama)
    cos, sin = angles(torch.zeros(1, rows, head_dim), torch.arange(rows)[None])
    made = rotary_tables(config(rows, head_dim, theta))
    for ours, theirs in zip(made, (cos, sin), strict=True):
        # Theirs are float32 functions: within one unit in the last place of the exact value.
        torch.testing.assert_close(ours, theirs[0, :, : head_dim // 2], atol=6e-8, rtol=1.2e-7)


def test_which_tables_can_be_longer() -> None:
    for fixed in (Absolute(), Absolute(trained_length=9, attention_window=9), DynamicNTK(10, 3)):
        assert not fixed.extends
        assert fixed.longer_tables(128) is None
        assert fixed.table_bytes(128) == 0
    assert Absolute(inverse_frequencies=(1.0,)).extends
