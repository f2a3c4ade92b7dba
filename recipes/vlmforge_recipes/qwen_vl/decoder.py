"""The decoder: its configuration and its weights' names (`modeling_qwen.py`)."""

from __future__ import annotations

from vlmforge_builder.blocks.decoder import DecoderConfig
from vlmforge_builder.blocks.long_context import LongContext, level_tables, log_scales
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.weights import Computed, Stacked, Stored, Transposed, Weight

_PREFIX = "transformer."
EMBEDDING = f"{_PREFIX}wte.weight"
# The width of both branches of an MLP together.
_BRANCHES = range(2, limits.WIDTH.stop)


def read_decoder_config(config: ConfigReader, *, session_len: int | None) -> DecoderConfig:
    """Geometry; absent keys have the defaults of the original `QWenConfig`."""
    heads = config.int("num_attention_heads", 32, within=limits.HEADS)
    hidden = config.int("hidden_size", 4096, within=limits.WIDTH)
    return DecoderConfig(
        vocab_size=config.int("vocab_size", 151936, within=limits.VOCABULARY),
        hidden_size=hidden,
        # The original halves it: this is the width of both branches together.
        intermediate_size=config.int("intermediate_size", 22016, within=_BRANCHES) // 2,
        layers=config.int("num_hidden_layers", 32, within=limits.LAYERS),
        heads=heads,
        kv_heads=heads,
        head_dim=config.int("kv_channels", 128, within=limits.HEAD_DIM),
        norm_eps=config.float("layer_norm_epsilon", 1e-6, within=limits.EPSILON),
        rope_theta=config.float("rotary_emb_base", 10000, within=limits.ROTARY_BASE),
        activation="silu",
        max_positions=session_len or longest(config),
        qkv_bias=True,
        long_context=LongContext(
            trained_length=config.int("seq_length", 2048, within=limits.POSITIONS),
            dynamic_ntk=config.bool("use_dynamic_ntk", default=True),
            log_scaled=config.bool("use_logn_attn", default=True),
        ),
    )


def longest(config: ConfigReader) -> int:
    """Tokens of the longest sequence that the model is published for."""
    return config.int("max_position_embeddings", 8192, within=limits.POSITIONS)


def decoder_weights(config: DecoderConfig, *, head: str) -> dict[str, Weight]:
    """Where the values of the decoder's parameters are; `head` is the output projection's name."""
    weights: dict[str, Weight] = {
        "embed": Stored(EMBEDDING),
        **_position_weights(config),
        "norm.weight": Stored(f"{_PREFIX}ln_f.weight"),
        "lm_head.weight": Transposed((head,), (config.vocab_size,)),
    }
    for i in range(config.layers):
        weights |= _layer_weights(config, f"layers.{i}.", f"{_PREFIX}h.{i}.")
    return weights


def _position_weights(config: DecoderConfig) -> dict[str, Weight]:
    context, positions = config.long_context, config.max_positions
    assert context is not None
    levels = context.levels(positions)

    def tables(index: int) -> Computed:
        return Computed(
            lambda: level_tables(config.rope_theta, config.head_dim, positions, levels)[index]
        )

    weights: dict[str, Weight] = {"positions.cos": tables(0), "positions.sin": tables(1)}
    if context.log_scaled:
        weights["positions.scale"] = Computed(lambda: log_scales(context.trained_length, positions))
    return weights


def _layer_weights(config: DecoderConfig, ours: str, theirs: str) -> dict[str, Weight]:
    width, inner = config.heads * config.head_dim, config.intermediate_size
    attn, mlp = f"{theirs}attn.", f"{theirs}mlp."
    return {
        f"{ours}attn_norm.weight": Stored(f"{theirs}ln_1.weight"),
        f"{ours}attn.qkv.weight": Transposed((f"{attn}c_attn.weight",), (3 * width,)),
        f"{ours}attn.qkv.bias": Stacked((f"{attn}c_attn.bias",), (3 * width,)),
        f"{ours}attn.out.weight": Transposed((f"{attn}c_proj.weight",), (config.hidden_size,)),
        f"{ours}mlp_norm.weight": Stored(f"{theirs}ln_2.weight"),
        # The gate is the second branch: w1(x) * silu(w2(x)).
        f"{ours}mlp.gate_up.weight": Transposed(
            (f"{mlp}w2.weight", f"{mlp}w1.weight"), (inner, inner)
        ),
        f"{ours}mlp.down.weight": Transposed((f"{mlp}c_proj.weight",), (config.hidden_size,)),
    }
