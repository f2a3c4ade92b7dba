"""A pre-norm transformer decoder with rotary positions, grouped-query attention and gated MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmforge.engine.positions import absolute
from vlmforge_builder.blocks.layers import Linear, RMSNorm, activation
from vlmforge_builder.blocks.long_context import LevelPositions, LongContext, Rotation, rotate
from vlmforge_builder.ops.cached_attention import cached_attention


@dataclass(frozen=True, slots=True)
class BandScaling:
    """Rotary positions whose slow turns are slowed down further, and fast ones are not.

    Turns between the two bounds are slowed down by a share that falls in a straight line, as where
    transformers computes the frequencies of this kind (modeling_rope_utils.py).

    Attributes:
        factor: How much slower.
        low, high: Turns in `original` positions below which all of it is done, and above which
            nothing.
        original: Positions that the model was trained with before.
    """

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Geometry of a decoder. `max_positions` is how many tokens one sequence may hold.

    With `qkv_bias` the projections to query, key and value have biases; with `qk_norm` each head of
    query and key is normalised before it is rotated. `rope_scaling` changes its frequencies.
    With `turned_outside` the cosines and sines of the tokens are an input. Each of the first
    `feature_layers` layers takes features of an image that are its own: the first the tokens'
    embeddings, of the others what is added behind the layer before.
    `long_context` is None where positions are plain rotary ones at every length. The attention is
    that of the model up to `attention_window` tokens; None: at every length.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    activation: str
    max_positions: int
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: BandScaling | None = None
    long_context: LongContext | None = None
    attention_window: int | None = None
    turned_outside: bool = False
    feature_layers: int = 1

    @property
    def turn_width(self) -> int:
        """Cosines and sines of a token that are given; 0: none."""
        return self.head_dim if self.turned_outside else 0


def inverse_frequencies(config: DecoderConfig) -> tuple[float, ...]:
    """Radians a position, `head_dim / 2` of them (https://arxiv.org/abs/2104.09864).

    Computed in fp32, as the original implementations do.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    plain = 1.0 / (config.rope_theta**exponent)
    if (scaling := config.rope_scaling) is None:
        return tuple(plain.tolist())
    turns = scaling.original / (2 * math.pi / plain)
    kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return tuple(((1 - kept) * plain / scaling.factor + kept * plain).tolist())


def rotary_tables(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[max_positions, head_dim / 2]`, fp32: the runtime's, to continue them."""
    tables = absolute.rotary_tables(inverse_frequencies(config), config.max_positions)
    return torch.from_numpy(tables.cos), torch.from_numpy(tables.sin)


# The tables of all positions, or the rows of a step's own tokens.
Rotary: TypeAlias = tuple[Tensor, Tensor] | Rotation


class Attention(nn.Module):
    """Causal self-attention over the key/value cache. `qkv` holds the three projections."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.out = Linear(config.heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor], rotary: Rotary, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x [B, S, hidden]` to the same shape, and the two caches."""
        kv_width = self.kv_heads * self.head_dim
        q, k, v = self.qkv(x).split((self.heads * self.head_dim, kv_width, kv_width), dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.unflatten(-1, (self.heads, -1))).flatten(2)
            k = self.k_norm(k.unflatten(-1, (self.kv_heads, -1))).flatten(2)
        heads, kv_heads, scale = self.heads, self.kv_heads, self.head_dim**-0.5
        tables = None if isinstance(rotary, Rotation) else rotary
        if isinstance(rotary, Rotation):
            q = rotate(q, rotary.query_cos, rotary.query_sin)
            k = rotate(k, rotary.key_cos, rotary.key_sin)
        mixed, key, value = cached_attention(
            *(q, k, v, *past, lengths, tables),
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=scale,
        )
        return self.out(mixed), key, value


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` (https://arxiv.org/abs/2002.05202); `gate_up` holds both."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.act = config.activation
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, S, hidden]` to the same shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(activation(self.act, gate) * up)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor], rotary: Rotary, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x [B, S, hidden]` to the same shape, and the two caches."""
        mixed, key, value = self.attn(self.attn_norm(x), past, rotary, lengths)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), key, value


class Decoder(nn.Module):
    """Token ids and image features to logits, with the key/value cache as inputs and outputs."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        positions, head_dim, context = config.max_positions, config.head_dim, config.long_context
        self.positions = self.cos = self.sin = None
        self.turned_outside, self.feature_layers = config.turned_outside, config.feature_layers
        if config.turned_outside:
            pass
        elif context is None:
            self.cos = nn.Parameter(torch.empty(positions, head_dim // 2))
            self.sin = nn.Parameter(torch.empty(positions, head_dim // 2))
        else:
            self.positions = LevelPositions(context, positions, head_dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        image_features: Tensor,
        past_lengths: Tensor,
        logits_indices: Tensor,
        past_keys: list[Tensor],
        past_values: list[Tensor],
        by_sequence: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run S tokens of B sequences.

        Args:
            input_ids: int64 `[B, S]`. An id >= vocab_size is row `id - vocab_size` of the features.
            image_features: `[R, feature_layers * hidden]`, R >= 1 (arbitrary when no id refers to a
                row).
            past_lengths: int64 `[B]`, tokens already in the cache.
            logits_indices: int64 `[B, K]`, positions in 0..S-1 to return logits of.
            past_keys, past_values: Per layer `[B, kv_heads, C, head_dim]`.
            by_sequence: With `long_context` the levels, int64 `[B]` (see `LevelPositions`); if
                `turned_outside` cosines and then sines, float32 `[B, S, head_dim]`.

        Returns:
            Logits `[B, K, vocab_size]` and the caches after the step.
        """
        x, added = self._embed(input_ids, image_features)
        rotary = self._rotary(input_ids, past_lengths, by_sequence)
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            x, key, value = layer(x, (past_keys[index], past_values[index]), rotary, past_lengths)
            keys.append(key)
            values.append(value)
            if index < len(added):
                x = x + added[index]
        wanted = logits_indices.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return self.lm_head(self.norm(x.gather(1, wanted))), keys, values

    def _rotary(self, ids: Tensor, past_lengths: Tensor, by_sequence: Tensor | None) -> Rotary:
        if self.turned_outside and by_sequence is not None:
            cos, sin = by_sequence.chunk(2, dim=-1)
            return Rotation(cos, sin, cos, sin)
        if self.positions is not None and by_sequence is not None:
            return self.positions(past_lengths, by_sequence, ids)  # type: ignore[no-any-return]
        assert self.cos is not None
        assert self.sin is not None
        return self.cos, self.sin

    def _embed(self, input_ids: Tensor, image_features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the layers start from, and what is added behind the first of them."""
        is_image = input_ids >= self.vocab_size
        zero = torch.zeros_like(input_ids)
        text = F.embedding(torch.where(is_image, zero, input_ids), self.embed)
        rows = torch.where(is_image, input_ids - self.vocab_size, zero)
        image = F.embedding(rows, image_features)
        there = is_image.unsqueeze(-1)
        if self.feature_layers == 1:
            return torch.where(there, image, text), []
        first, *others = image.chunk(self.feature_layers, dim=-1)
        return torch.where(there, first, text), [torch.where(there, o, 0.0) for o in others]
