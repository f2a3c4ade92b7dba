"""Decoders of Llama's form: their configuration and their weights' names.

Llama (https://arxiv.org/abs/2302.13971), Mistral (https://arxiv.org/abs/2310.06825) as far as a
sequence fits its sliding window, Qwen2 (https://arxiv.org/abs/2407.10671), whose query, key and
value have biases, and Qwen3 (https://arxiv.org/abs/2505.09388), whose query and key have norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.blocks.decoder import BandScaling, DecoderConfig, rotary_tables
from vlmforge_builder.blocks.layers import ACTIVATIONS
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.recipe import PartSpec
from vlmforge_builder.weights import Computed, Stacked, Stored, Transposed, Weight
from vlmforge_recipes.cached_decoder import cached_decoder_part


@dataclass(frozen=True, slots=True)
class TextDefaults:
    """What a text configuration means by the keys that it leaves out, and what it cannot say.

    `sliding_window` is None where the architecture has none, or none that the recipe allows;
    `head_dim` where the heads lie side by side in the hidden size. `qkv_bias` and `qk_norm` are of
    the architecture (see `DecoderConfig`); `rope_types` are those that are known of it.
    """

    intermediate_size: int
    kv_heads: int | None
    max_positions: int
    sliding_window: int | None = None
    vocab_size: int = 32000
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    rope_types: tuple[str, ...] = ("default", "llama3", "dynamic")


_QWEN2_VL = TextDefaults(
    *(29568, 8, 32768),
    vocab_size=152064,
    qkv_bias=True,
    rope_theta=1000000.0,
    rope_types=("default", "mrope"),
)
# By `model_type`: those of `LlamaConfig`, `MistralConfig`, `Qwen2Config` and `Qwen3Config`, and of
# the text models of Qwen's vision-language models.
TEXT_DEFAULTS: Mapping[str, TextDefaults] = {
    "llama": TextDefaults(11008, None, 2048),
    "mistral": TextDefaults(14336, 8, 131072, 4096),
    "qwen2": TextDefaults(22016, 32, 32768, vocab_size=151936, qkv_bias=True),
    "qwen3": TextDefaults(22016, 32, 32768, vocab_size=151936, head_dim=128, qk_norm=True),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_vl_text": TextDefaults(
        *(22016, 32, 128000),
        vocab_size=151936,
        head_dim=128,
        qk_norm=True,
        rope_theta=500000.0,
        rope_types=("default",),
    ),
}


# In the order in which transformers takes one of them.
_ROPE = ("rope_scaling", "rope_parameters")
_FULL = "full_attention"


def read_decoder_config(
    text: ConfigReader, *, session_len: int | None, kind: str = "llama"
) -> DecoderConfig:
    """Geometry from the configuration of a decoder of Llama's form.

    Args:
        text: The configuration.
        session_len: Tokens that one sequence may hold; None: see `trained_length`.
        kind: A key of `TEXT_DEFAULTS`.

    Raises:
        CheckpointError: a number out of its range, or sizes that do not divide.
        UnsupportedModelError: scaled rotary positions, another activation, or a sequence that is
            longer than the attention's sliding window.
    """
    defaults = TEXT_DEFAULTS[kind]
    heads = text.int("num_attention_heads", 32, within=limits.HEADS)
    hidden = text.int("hidden_size", 4096, within=limits.WIDTH)
    _refuse_variants(text, defaults)
    max_positions = session_len or trained_length(text, kind=kind)
    window = _sliding_window(text, defaults)
    if window is not None and max_positions > window:
        found = f"sliding_window {window} and a session_len of {max_positions}"
        raise _unsupported(text, found, f"a session_len of at most {window}")
    if (rope := rope_section(text)) is not None and _rope_type(rope) == "dynamic":
        # Dynamic NTK: plain positions up to the trained length, others beyond.
        trained = trained_length(text, kind=kind)
        window = min(window or trained, trained)
        if max_positions > window:
            found = f"{rope.place} of type 'dynamic' and a session_len of {max_positions}"
            raise _unsupported(text, found, f"a session_len of at most {window}")
    return DecoderConfig(
        vocab_size=text.int("vocab_size", defaults.vocab_size, within=limits.VOCABULARY),
        hidden_size=hidden,
        intermediate_size=text.int(
            "intermediate_size", defaults.intermediate_size, within=limits.WIDTH
        ),
        layers=text.int("num_hidden_layers", 32, within=limits.LAYERS),
        heads=heads,
        kv_heads=_kv_heads(text, defaults, heads),
        head_dim=_head_dim(text, defaults, hidden, heads),
        norm_eps=text.float("rms_norm_eps", 1e-6, within=limits.EPSILON),
        rope_theta=_rope_theta(text, defaults.rope_theta),
        activation=text.str("hidden_act", "silu"),
        max_positions=max_positions,
        qkv_bias=defaults.qkv_bias,
        qk_norm=defaults.qk_norm,
        rope_scaling=_rope_scaling(rope),
        attention_window=window,
    )


def trained_length(text: ConfigReader, *, kind: str = "llama") -> int:
    """Tokens of the longest sequence that the model was trained for, and can attend to."""
    defaults = TEXT_DEFAULTS[kind]
    length = text.int("max_position_embeddings", defaults.max_positions, within=limits.POSITIONS)
    return min(length, _sliding_window(text, defaults) or length)


def _kv_heads(text: ConfigReader, defaults: TextDefaults, heads: int) -> int:
    # A null means as many as heads, an absent key the default.
    key, found = "num_key_value_heads", defaults.kv_heads
    if key in text.values:
        found = text.opt_int(key, within=limits.HEADS)
    kv_heads = heads if found is None else found
    if heads % kv_heads:
        raise _unfit(text, f"{key} {kv_heads}", f"a divisor of num_attention_heads {heads}")
    return kv_heads


def _head_dim(text: ConfigReader, defaults: TextDefaults, hidden: int, heads: int) -> int:
    named = text.opt_int("head_dim", within=limits.HEAD_DIM)
    if named is not None:
        return named
    if defaults.head_dim is not None and "head_dim" not in text.values:
        return defaults.head_dim
    if hidden % heads or hidden // heads not in limits.HEAD_DIM:
        found = f"hidden_size {hidden} and num_attention_heads {heads}"
        raise _unfit(text, found, "heads of one even width, side by side in hidden_size")
    return hidden // heads


def _unfit(text: ConfigReader, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{text.file} does not fit itself.",
        found=found,
        expected=expected,
        fix=f"check {text.file.name} against the published one",
    )


def _sliding_window(text: ConfigReader, defaults: TextDefaults) -> int | None:
    if defaults.sliding_window is None or "sliding_window" not in text.values:
        return defaults.sliding_window
    return text.opt_int("sliding_window", within=limits.UNBOUNDED)


def _rope_theta(text: ConfigReader, default: float) -> float:
    # transformers 5 writes {"rope_theta": ..., "rope_type": ...}; before it was a plain key.
    plain = text.float("rope_theta", default, within=limits.ROTARY_BASE)
    for key in _ROPE:
        if text.get(key):
            return text.section(key).float("rope_theta", plain, within=limits.ROTARY_BASE)
    return plain


def rope_section(text: ConfigReader) -> ConfigReader | None:
    """What says how positions turn, in the place where transformers looks; None: nothing does."""
    return next((text.section(key) for key in _ROPE if text.get(key)), None)


def _rope_type(rope: ConfigReader) -> object:
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_scaling(rope: ConfigReader | None) -> BandScaling | None:
    if rope is None or _rope_type(rope) != "llama3":
        return None
    low = rope.float("low_freq_factor", within=limits.RATIO)
    return BandScaling(
        factor=rope.float("factor", within=limits.SCALE),
        low=low,
        high=rope.float("high_freq_factor", within=(math.nextafter(low, math.inf), 1e6)),
        original=rope.int("original_max_position_embeddings", within=limits.POSITIONS),
    )


def _refuse_variants(text: ConfigReader, defaults: TextDefaults) -> None:
    known = defaults.rope_types
    for key in _ROPE:
        if text.get(key) and (kind := _rope_type(text.section(key))) not in known:
            raise _unsupported(text, f"{key} of type {kind!r}", "one of: " + ", ".join(known))
    if text.get("layer_types") and set(_items(text.get("layer_types"))) != {_FULL}:
        raise _unsupported(text, f"layer_types {text.get('layer_types')!r}"[:80], f"{_FULL!r} only")
    act = text.str("hidden_act", "silu")
    if act not in ACTIVATIONS:
        raise _unsupported(text, f"hidden_act {act!r}", "one of: " + ", ".join(sorted(ACTIVATIONS)))


def _items(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [repr(value)]


def _unsupported(text: ConfigReader, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The decoder of {text.file} is a variant that is not supported.",
        found=found,
        expected=expected,
        fix="choose a checkpoint without it, or add it to the decoder block and this recipe",
    )


def decoder_part(config: DecoderConfig, *, prefix: str, head: str) -> PartSpec:
    """The decoder as a part.

    Args:
        config: Geometry.
        prefix: What the names of the decoder's tensors begin with, such as "model.".
        head: Name of the output projection's tensor; for tied weights, that of the embedding.
    """
    return cached_decoder_part(config, _weights(config, prefix, head))


def _weights(config: DecoderConfig, prefix: str, head: str) -> dict[str, Weight]:
    tables: dict[str, Weight] = {
        "cos": Computed(lambda: rotary_tables(config)[0]),
        "sin": Computed(lambda: rotary_tables(config)[1]),
    }
    weights: dict[str, Weight] = {
        "embed": Stored(f"{prefix}embed_tokens.weight"),
        **({} if config.turned_outside else tables),
        "norm.weight": Stored(f"{prefix}norm.weight"),
        "lm_head.weight": Transposed((head,), (config.vocab_size,)),
    }
    for i in range(config.layers):
        weights |= _layer_weights(config, f"layers.{i}.", f"{prefix}layers.{i}.")
    return weights


def _layer_weights(config: DecoderConfig, ours: str, theirs: str) -> dict[str, Weight]:
    width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attn, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
    qkv = tuple(f"{attn}{name}_proj.weight" for name in "qkv")
    inner = config.intermediate_size
    weights: dict[str, Weight] = {
        f"{ours}attn_norm.weight": Stored(f"{theirs}input_layernorm.weight"),
        f"{ours}attn.qkv.weight": Transposed(qkv, (width, kv_width, kv_width)),
        f"{ours}attn.out.weight": Transposed((f"{attn}o_proj.weight",), (config.hidden_size,)),
        f"{ours}mlp_norm.weight": Stored(f"{theirs}post_attention_layernorm.weight"),
        f"{ours}mlp.gate_up.weight": Transposed(
            (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), (inner, inner)
        ),
        f"{ours}mlp.down.weight": Transposed((f"{mlp}down_proj.weight",), (config.hidden_size,)),
    }
    if config.qkv_bias:
        biases = tuple(f"{attn}{name}_proj.bias" for name in "qkv")
        weights[f"{ours}attn.qkv.bias"] = Stacked(biases, (width, kv_width, kv_width))
    if config.qk_norm:
        for name in "qk":
            weights[f"{ours}attn.{name}_norm.weight"] = Stored(f"{attn}{name}_norm.weight")
    return weights
