"""The tensors of a synthetic checkpoint: names, shapes, and the law of their values.

Values are scaled so that activations stay O(1) at any depth and logits have a standard deviation
of about 3. They depend on the seed and the neutral name only, not on layout, dtype or shards.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmforge_recipes.llava.synthetic.spec import SyntheticSpec, TextSpec, VisionSpec

# Values drawn at a time; a multiple of the four that one 64-bit draw gives.
BLOCK = 1 << 22
EMBEDDING_STD = 0.8
LOGITS_STD = 3.0
# Queries and keys a little larger than the rest, so that attention is far from uniform.
ATTENTION_GAIN = 1.6
# Below this, float16 is subnormal and could not hold every bfloat16.
SMALLEST_NORMAL = 2.0**-14


@dataclass(frozen=True, slots=True)
class Random:
    """Normal values with `mean` and `std`, as a function of the seed and `name`."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    def blocks(self, seed: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """The values, flat, in order, at most `BLOCK` at a time.

        Each is one of 65536 quantiles of the normal law, rounded to bfloat16, or zero where
        float16 would be subnormal: so every dtype holds it exactly. A 16-bit draw picks one.
        """
        key = hashlib.blake2b(f"{seed}/{self.name}".encode(), digest_size=16).digest()
        bits = np.random.SFC64(int.from_bytes(key, "little"))
        table = (_quantiles() * self.std + self.mean).bfloat16()
        table = table.masked_fill(table.abs() < SMALLEST_NORMAL, 0.0).to(dtype)
        # numpy has no bfloat16: look its bit patterns up instead.
        raw = table.view(torch.int16 if table.itemsize == 2 else torch.int32).numpy()
        for start in range(0, math.prod(self.shape), BLOCK):
            size = min(BLOCK, math.prod(self.shape) - start)
            picks = bits.random_raw(-(-size // 4)).view(np.uint16)[:size]
            yield torch.from_numpy(raw[picks]).view(dtype)


@dataclass(frozen=True, slots=True)
class Fixed:
    """A buffer that published checkpoints carry: stored with its own dtype."""

    name: str
    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the buffer."""
        return tuple(self.values.shape)

    def blocks(self, _seed: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """The values, flat, in one block."""
        yield self.values.to(dtype).reshape(-1)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as a file holds it: published name, dtype, and where the values come from."""

    name: str
    dtype: torch.dtype
    source: Random | Fixed

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.source.shape) * self.dtype.itemsize

    def blocks(self, seed: int) -> Iterator[Tensor]:
        """The values, flat, in order, in pieces of bounded size."""
        return self.source.blocks(seed, self.dtype)


@functools.cache
def _quantiles() -> Tensor:
    grid = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    values: Tensor = torch.special.ndtri(grid)
    return values


HF_OLD: Mapping[str, str] = {
    "tower.": "vision_tower.vision_model.",
    "projector.first.": "multi_modal_projector.linear_1.",
    "projector.second.": "multi_modal_projector.linear_2.",
    "decoder.": "language_model.model.",
    "head.": "language_model.lm_head.",
}
HF_NEW: Mapping[str, str] = {
    "tower.": "model.vision_tower.",
    "projector.first.": "model.multi_modal_projector.linear_1.",
    "projector.second.": "model.multi_modal_projector.linear_2.",
    "decoder.": "model.language_model.",
    "head.": "lm_head.",
}
ORIGINAL: Mapping[str, str] = {
    "projector.first.": "model.mm_projector.0.",
    "projector.second.": "model.mm_projector.2.",
    "decoder.": "model.",
    "head.": "lm_head.",
}
STOCK_TOWER: Mapping[str, str] = {"tower.": "vision_model."}


def checkpoint_entries(spec: SyntheticSpec) -> list[Entry]:
    """The tensors of the checkpoint folder itself, in file order."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    body = [*_projector(spec), *_decoder(spec.text)]
    if spec.layout == "original":
        buffers = [Entry(f.name, torch.float32, f) for f in _inverse_frequencies(spec.text)]
        return [*_published(body, dtype, ORIGINAL), *buffers]
    names = HF_OLD if spec.keys == "old" else HF_NEW
    return _published([*_tower(spec.vision), *body], dtype, names)


def tower_entries(spec: SyntheticSpec) -> list[Entry]:
    """The tensors of the sibling tower of the `original` layout: always float32, as published.

    That repository is a whole two-tower model: its text tower is here too, for loaders to ignore.
    """
    positions = torch.arange(spec.vision.positions)[None]
    return [
        *_published([*_tower(spec.vision)], torch.float32, STOCK_TOWER),
        *_published([*_ignored(spec.vision)], torch.float32, {}),
        Entry("logit_scale", torch.float32, Fixed("logit_scale", torch.tensor(2.6592))),
        *(
            Entry(name, torch.int64, Fixed(name, ids))
            for name, ids in (
                ("vision_model.embeddings.position_ids", positions),
                ("text_model.embeddings.position_ids", torch.arange(IGNORED.positions)[None]),
            )
        ),
    ]


def _published(
    tensors: list[Random], dtype: torch.dtype, prefixes: Mapping[str, str]
) -> list[Entry]:
    def rename(name: str) -> str:
        for ours, theirs in prefixes.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    return [Entry(rename(tensor.name), dtype, tensor) for tensor in tensors]


def _linear(
    name: str, rows: int, columns: int, *, gain: float = 1.0, bias: bool = True
) -> Iterator[Random]:
    yield Random(f"{name}.weight", (rows, columns), gain / math.sqrt(columns))
    if bias:
        yield Random(f"{name}.bias", (rows,), 0.1)


def _norm(name: str, width: int, *, bias: bool = True) -> Iterator[Random]:
    yield Random(f"{name}.weight", (width,), 0.15, 1.0)
    if bias:
        yield Random(f"{name}.bias", (width,), 0.1)


def _residual_gain(layers: int) -> float:
    """Keeps the sum of what all layers add to the residual stream O(1)."""
    return min(1.0, math.sqrt(2 / layers))


def _decoder(text: TextSpec) -> Iterator[Random]:
    hidden, inner = text.hidden, text.intermediate
    keys = hidden // text.heads * text.kv_heads
    residual = _residual_gain(text.layers)
    # A tied table is also the head, and is scaled as one.
    std = LOGITS_STD / math.sqrt(hidden) if text.tied else EMBEDDING_STD
    yield Random("decoder.embed_tokens.weight", (text.vocab, hidden), std)
    for index in range(text.layers):
        at = f"decoder.layers.{index}"
        yield from _linear(
            f"{at}.self_attn.q_proj", hidden, hidden, gain=ATTENTION_GAIN, bias=False
        )
        yield from _linear(f"{at}.self_attn.k_proj", keys, hidden, gain=ATTENTION_GAIN, bias=False)
        yield from _linear(f"{at}.self_attn.v_proj", keys, hidden, bias=False)
        yield from _linear(f"{at}.self_attn.o_proj", hidden, hidden, gain=residual, bias=False)
        yield from _linear(f"{at}.mlp.gate_proj", inner, hidden, bias=False)
        yield from _linear(f"{at}.mlp.up_proj", inner, hidden, bias=False)
        yield from _linear(f"{at}.mlp.down_proj", hidden, inner, gain=residual, bias=False)
        yield from _norm(f"{at}.input_layernorm", hidden, bias=False)
        yield from _norm(f"{at}.post_attention_layernorm", hidden, bias=False)
    yield from _norm("decoder.norm", hidden, bias=False)
    if not text.tied:
        yield from _linear("head", text.vocab, hidden, gain=LOGITS_STD, bias=False)


def _projector(spec: SyntheticSpec) -> Iterator[Random]:
    yield from _linear("projector.first", spec.text.hidden, spec.vision.hidden)
    yield from _linear("projector.second", spec.text.hidden, spec.text.hidden)


def _encoder(root: str, layers: int, hidden: int, inner: int) -> Iterator[Random]:
    residual = _residual_gain(layers)
    for index in range(layers):
        at = f"{root}.encoder.layers.{index}"
        yield from _linear(f"{at}.self_attn.q_proj", hidden, hidden, gain=ATTENTION_GAIN)
        yield from _linear(f"{at}.self_attn.k_proj", hidden, hidden, gain=ATTENTION_GAIN)
        yield from _linear(f"{at}.self_attn.v_proj", hidden, hidden)
        yield from _linear(f"{at}.self_attn.out_proj", hidden, hidden, gain=residual)
        yield from _norm(f"{at}.layer_norm1", hidden)
        yield from _linear(f"{at}.mlp.fc1", inner, hidden)
        yield from _linear(f"{at}.mlp.fc2", hidden, inner, gain=residual)
        yield from _norm(f"{at}.layer_norm2", hidden)


def _tower(vision: VisionSpec) -> Iterator[Random]:
    hidden, patch = vision.hidden, vision.patch_size
    yield Random("tower.embeddings.class_embedding", (hidden,), 0.7)
    yield Random(
        "tower.embeddings.patch_embedding.weight",
        (hidden, 3, patch, patch),
        1.5 / math.sqrt(3 * patch * patch),
    )
    yield Random("tower.embeddings.position_embedding.weight", (vision.positions, hidden), 0.4)
    yield from _norm("tower.pre_layrnorm", hidden)  # the published spelling
    yield from _encoder("tower", vision.layers, hidden, vision.intermediate)
    yield from _norm("tower.post_layernorm", hidden)


@dataclass(frozen=True, slots=True)
class IgnoredText:
    """The text tower that rides along with the stock vision tower; kept as small as can be."""

    hidden: int = 32
    intermediate: int = 64
    layers: int = 1
    heads: int = 2
    vocab: int = 99
    positions: int = 77
    projection: int = 32


IGNORED = IgnoredText()


def _ignored(vision: VisionSpec) -> Iterator[Random]:
    text = IGNORED
    at = "text_model.embeddings"
    yield Random(f"{at}.token_embedding.weight", (text.vocab, text.hidden), 0.02)
    yield Random(f"{at}.position_embedding.weight", (text.positions, text.hidden), 0.02)
    yield from _encoder("text_model", text.layers, text.hidden, text.intermediate)
    yield from _norm("text_model.final_layer_norm", text.hidden)
    yield from _linear("visual_projection", text.projection, vision.hidden, bias=False)
    yield from _linear("text_projection", text.projection, text.hidden, bias=False)


def _inverse_frequencies(text: TextSpec) -> Iterator[Fixed]:
    """The rotary buffers that old releases saved with every layer."""
    width = text.hidden // text.heads
    values = text.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    for index in range(text.layers):
        yield Fixed(f"model.layers.{index}.self_attn.rotary_emb.inv_freq", values)
