"""Decoders as the exporter gives them, made without it: a trace takes seconds, these nothing.

`test_shard.py` compares them with traced ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from vlmforge.engine.interface import DecoderInterface
from vlmforge.engine.manifest import KVLayout
from vlmforge_builder.blocks.decoder import Decoder, DecoderConfig, rotary_tables
from vlmforge_builder.checkpoint.store import TensorInfo, TensorStore
from vlmforge_builder.export import OPSET, Traced
from vlmforge_builder.onnx_file import add_input, unread
from vlmforge_builder.ops import DOMAIN, VERSION
from vlmforge_builder.recipe import PartSpec
from vlmforge_builder.weights import Computed, Stacked, Stored, Transposed, Weight

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@dataclass(frozen=True)
class Random(TensorStore):
    """Tensors that are drawn when they are read, the same each time."""

    shapes: Mapping[str, tuple[int, ...]]

    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(name, "float32", self.shapes[name], None)  # type: ignore[arg-type]

    def read(self, name: str) -> torch.Tensor:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return torch.from_numpy(rng.standard_normal(self.shapes[name], np.float32) / 4)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes


def weights_of(
    config: DecoderConfig, *, tied: bool, normed: bool
) -> tuple[dict[str, Weight], Random]:
    """Weights by the names of the block's parameters, in an order of stored tensors like theirs."""
    c, width, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"e": (c.vocab_size, c.hidden_size), "n": (c.hidden_size,)}
    if not tied:
        shapes["h"] = shapes["e"]
    weights: dict[str, Weight] = {
        "embed": Stored("e"),
        "cos": Computed(lambda: rotary_tables(config)[0]),
        "sin": Computed(lambda: rotary_tables(config)[1]),
    }
    for i in range(c.layers):
        layer, inner, hidden = f"layers.{i}.", c.intermediate_size, c.hidden_size
        own = {"q": (width, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, width)}
        own |= {"g": (inner, hidden), "u": (inner, hidden), "d": (hidden, inner)}
        own |= {
            "qn": (c.head_dim,),
            "kn": (c.head_dim,),
            "a": (hidden,),
            "m": (hidden,),
            "qb": (width,),
            "kb": (kv,),
            "vb": (kv,),
        }
        shapes |= {f"{i}.{name}": shape for name, shape in own.items()}
        weights[f"{layer}attn_norm.weight"] = Stored(f"{i}.a")
        qkv = tuple(f"{i}.{name}" for name in "qkv")
        weights[f"{layer}attn.qkv.weight"] = Transposed(qkv, (width, kv, kv))
        if c.qkv_bias:
            biases = tuple(f"{name}b" for name in qkv)
            weights[f"{layer}attn.qkv.bias"] = Stacked(biases, (width, kv, kv))
        if normed:
            weights[f"{layer}attn.q_norm.weight"] = Stored(f"{i}.qn")
            weights[f"{layer}attn.k_norm.weight"] = Stored(f"{i}.kn")
        weights[f"{layer}attn.out.weight"] = Transposed((f"{i}.o",), (hidden,))
        weights[f"{layer}mlp_norm.weight"] = Stored(f"{i}.m")
        weights[f"{layer}mlp.gate_up.weight"] = Transposed((f"{i}.g", f"{i}.u"), (inner, inner))
        weights[f"{layer}mlp.down.weight"] = Transposed((f"{i}.d",), (hidden,))
    weights["norm.weight"] = Stored("n")
    weights["lm_head.weight"] = Transposed(("e" if tied else "h",), (c.vocab_size,))
    return weights, Random(shapes)


def part_of(config: DecoderConfig, weights: Mapping[str, Weight]) -> PartSpec:
    kv = KVLayout(config.layers, config.kv_heads, config.head_dim, "float32", None)
    interface = DecoderInterface(config.vocab_size, config.hidden_size, kv)
    return PartSpec("decoder", partial(Decoder, config), interface, weights)


@dataclass
class _Graph:
    """Nodes as they are added."""

    values: dict[str, ir.Value]
    nodes: list[ir.Node] = field(default_factory=list)

    def add(
        self,
        kind: str,
        inputs: Sequence[str],
        shapes: Sequence[Sequence[int | str]],
        dtype: ir.DataType = FLOAT,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[str, ...]:
        given = [self.values[name] for name in inputs]
        name = f"{kind}_{len(self.nodes)}"
        node = ir.node(kind, given, attributes, domain=domain, num_outputs=len(shapes), name=name)
        for index, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
            value.name, value.shape = f"{name}_{index}", ir.Shape(shape)
            value.type = ir.TensorType(dtype)
            self.values[value.name] = value
        self.nodes.append(node)
        return tuple(value.name or "" for value in node.outputs)

    def constant(self, name: str, values: object) -> str:
        tensor = ir.tensor(np.array(values, np.int64), name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(INT64),
            shape=ir.Shape(tensor.shape),
            const_value=tensor,
        )
        self.values.setdefault(name, value)
        return name


def drawn(
    config: DecoderConfig, *, tied: bool = False, normed: bool = False
) -> tuple[Traced, PartSpec, Random]:
    """A decoder's graph without values, its part, and its weights.

    `tied`: the output matrix is the embedding; `normed`: heads of queries and keys are normalised.
    """
    weights, store = weights_of(config, tied=tied, normed=normed)
    part = part_of(config, weights)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in Decoder(config).named_parameters()}
    norms = [name for name in weights if "q_norm" in name or "k_norm" in name]
    shapes |= dict.fromkeys(norms, (config.head_dim,))
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: VERSION}, name="main")
    made = _Graph({spec.name: add_input(graph, spec) for spec in part.interface.inputs})
    for name, shape in shapes.items():
        value = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(shape))
        value.const_value = unread(FLOAT, ir.Shape(shape))
        made.values[name] = value
    outputs = _nodes(made, config, normed=normed)
    graph.extend(made.nodes)
    for value in made.values.values():
        if value.producer() is None and not value.is_graph_input():
            graph.register_initializer(value)
    for spec, name in zip(part.interface.outputs, outputs, strict=True):
        made.values[name].name = spec.name
        graph.outputs.append(made.values[name])
    return Traced(ir.Model(graph, ir_version=10), shapes), part, store


def _nodes(g: _Graph, c: DecoderConfig, *, normed: bool) -> list[str]:
    hidden = ("batch", "tokens", c.hidden_size)
    vocab, zero, last = (
        g.constant("vocab", c.vocab_size),
        g.constant("zero", 0),
        g.constant("last", [-1]),
    )
    (image,) = g.add(
        "GreaterOrEqual", ["input_ids", vocab], [("batch", "tokens")], ir.DataType.BOOL
    )
    (safe,) = g.add("Where", [image, zero, "input_ids"], [("batch", "tokens")], INT64)
    (text,) = g.add("Gather", ["embed", safe], [hidden], axis=0)
    (row,) = g.add("Sub", ["input_ids", vocab], [("batch", "tokens")], INT64)
    (own,) = g.add("Where", [image, row, zero], [("batch", "tokens")], INT64)
    (rows,) = g.add("Gather", ["image_features", own], [hidden], axis=0)
    (there,) = g.add("Unsqueeze", [image, last], [("batch", "tokens", 1)], ir.DataType.BOOL)
    (x,) = g.add("Where", [there, rows, text], [hidden])
    presents = []
    for i in range(c.layers):
        x, present = _layer(g, c, x, i, normed=normed)
        presents.append(present)
    (index,) = g.add("Unsqueeze", ["logits_indices", last], [("batch", "outputs", 1)], INT64)
    size = g.constant("size", [1, 1, c.hidden_size])
    picked = ("batch", "outputs", c.hidden_size)
    (index,) = g.add("Expand", [index, size], [picked], INT64)
    (x,) = g.add("GatherElements", [x, index], [picked], axis=1)
    (x,) = _norm(g, c, x, "norm.weight", picked)
    logits = g.add("MatMul", [x, "lm_head.weight"], [("batch", "outputs", c.vocab_size)])
    return [*logits, *(key for key, _ in presents), *(value for _, value in presents)]


def _norm(
    g: _Graph, c: DecoderConfig, x: str, weight: str, shape: Sequence[int | str]
) -> tuple[str, ...]:
    attributes = {"stash_type": 1, "epsilon": c.norm_eps, "axis": -1}
    return g.add("RMSNormalization", [x, weight], [shape], **attributes)


def _layer(
    g: _Graph, c: DecoderConfig, x: str, i: int, *, normed: bool
) -> tuple[str, tuple[str, str]]:
    def rows(size: int) -> tuple[str, str, int]:
        return ("batch", "tokens", size)

    layer, hidden, inner = f"layers.{i}.", c.hidden_size, c.intermediate_size
    width, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    (y,) = _norm(g, c, x, f"{layer}attn_norm.weight", rows(hidden))
    (qkv,) = g.add("MatMul", [y, f"{layer}attn.qkv.weight"], [rows(width + 2 * kv)])
    if c.qkv_bias:
        (qkv,) = g.add("Add", [qkv, f"{layer}attn.qkv.bias"], [rows(width + 2 * kv)])
    sizes = g.constant("sizes", [width, kv, kv])
    q, k, v = g.add("Split", [qkv, sizes], [rows(width), rows(kv), rows(kv)], axis=2)
    if normed:
        q = _by_head(g, c, q, f"{layer}attn.q_norm.weight")
        k = _by_head(g, c, k, f"{layer}attn.k_norm.weight")
    cache = ("batch", c.kv_heads, "capacity", c.head_dim)
    mixed, *present = g.add(
        "CachedAttention",
        [q, k, v, f"past_key.{i}", f"past_value.{i}", "past_lengths", "cos", "sin"],
        [rows(width), cache, cache],
        domain=DOMAIN,
        num_heads=c.heads,
        kv_num_heads=c.kv_heads,
        scale=c.head_dim**-0.5,
    )
    (out,) = g.add("MatMul", [mixed, f"{layer}attn.out.weight"], [rows(hidden)])
    (x,) = g.add("Add", [x, out], [rows(hidden)])
    (y,) = _norm(g, c, x, f"{layer}mlp_norm.weight", rows(hidden))
    (both,) = g.add("MatMul", [y, f"{layer}mlp.gate_up.weight"], [rows(2 * inner)])
    gate, up = g.add("Split", [both], [rows(inner)] * 2, axis=2, num_outputs=2)
    if c.activation == "gelu":
        (acted,) = g.add("Gelu", [gate], [rows(inner)], approximate="none")
    else:
        (sigmoid,) = g.add("Sigmoid", [gate], [rows(inner)])
        (acted,) = g.add("Mul", [gate, sigmoid], [rows(inner)])
    (product,) = g.add("Mul", [acted, up], [rows(inner)])
    (down,) = g.add("MatMul", [product, f"{layer}mlp.down.weight"], [rows(hidden)])
    (x,) = g.add("Add", [x, down], [rows(hidden)])
    return x, (present[0], present[1])


def _by_head(g: _Graph, c: DecoderConfig, x: str, weight: str) -> str:
    """Normalise the heads of queries or keys one by one, as the exporter writes it."""
    width = int(g.values[x].shape[2])  # type: ignore[index]
    apart = ("batch", "tokens", width // c.head_dim, c.head_dim)
    (batch,) = g.add("Shape", ["past_lengths"], [(1,)], INT64, start=0, end=1)
    (tokens,) = g.add("Shape", ["input_ids"], [(1,)], INT64, start=1, end=2)
    split = [g.constant(f"n{n}", [n]) for n in apart[2:]]
    (shape,) = g.add("Concat", [batch, tokens, *split], [(4,)], INT64, axis=0)
    (x,) = g.add("Reshape", [x, shape], [apart], allowzero=1)
    (x,) = _norm(g, c, x, weight, apart)
    (shape,) = g.add(
        "Concat", [batch, tokens, g.constant(f"n{width}", [width])], [(3,)], INT64, axis=0
    )
    return g.add("Reshape", [x, shape], [("batch", "tokens", width)], allowzero=1)[0]
