"""Divide a decoder among tensor-parallel ranks (https://arxiv.org/abs/1909.08053).

Two products between which each column goes its own way are divided together: the first by columns,
the second by rows, and a sum over the ranks behind it. That is query, key and value, the attention
of some heads, and the product behind it; and it is an MLP. The matrix that makes the logits is
divided by columns, a large table of embeddings by rows. All else is the same on every rank.

Beside whole numbers a kernel may round activations too, block by block. A border inside a block has
them rounded otherwise, and so has a sum in another order, now and then. There the second product is
divided by columns as well, and what it takes is gathered before it: ranks give the bits of one.

Where there are fewer heads of keys and values than ranks, or a rank's queries would share some of
them unevenly, ranks hold the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmforge.errors import BuildError
from vlmforge_builder.onnx_file import unread
from vlmforge_builder.ops.all_gather import AllGatherNode
from vlmforge_builder.ops.all_reduce import AllReduceNode
from vlmforge_builder.ops.cached_attention import CachedAttentionNode
from vlmforge_builder.ranks import Rank, even_share, heads_of
from vlmforge_builder.shares import Ranges, Share, joined, shifted, width_of

# Elements from which a table of embeddings is worth a sum over the ranks in each step: 256 MiB in
# 16 bits.
LARGE_TABLE = 1 << 27
# Each column of what they give depends on the same column of what they take.
_BY_COLUMN = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Erf", "Tanh"}
    | {"Sigmoid", "Relu", "Gelu", "Swish", "Softplus", "Cast", "Identity"}
)


def shard(
    graph: ir.Graph,
    weights: Collection[str],
    rank: Rank,
    blocks: Mapping[str, int],
    *,
    rounded: bool,
) -> dict[str, Share]:
    """Leave `rank`'s part of a traced decoder in `graph`; what it has of which weight.

    Args:
        graph: Its attention over the cache is neutral still. Key/value caches become the rank's.
        weights: Names of the initialisers that may be divided.
        rank: Whose part.
        blocks: Rows of a block of those that will be whole numbers. An MLP is divided where blocks
            end, and then not quite evenly, if every rank gets some.
        rounded: Whether products with those round what they take. Then no block is cut.

    Raises:
        ConfigError: heads or inner columns that the ranks cannot have the same number of.
        BuildError: attention whose products are of a form that is not known here.
    """
    work = _Work(graph, frozenset(weights), rank, blocks, rounded)
    for node in tuple(graph):
        if not work.is_product(node):
            continue
        if (between := work.between(node)) is not None:
            work.divide(node, between)
        elif any(value.is_graph_output() for value in node.outputs):
            work.divide_columns(node)
    for node in tuple(graph):
        if CachedAttentionNode.is_of(node) and node not in work.divided:
            raise _unknown_form(node, "an attention between two products of weights")
        if node.op_type == "Gather" and work.is_table(node):
            work.divide_table(node)
    return work.shares


def _unknown_form(node: ir.Node, expected: str) -> BuildError:
    return BuildError(
        f"The decoder cannot be divided among ranks at the node {node.name!r}.",
        found=f"{node.op_type} of {', '.join(v.name or '' for v in node.inputs if v)}"[:200],
        expected=expected,
        fix="teach it to vlmforge_builder/passes/shard.py, or build without --tp",
    )


def _features(value: ir.Value) -> int:
    """Columns of a value `[batch, tokens, columns]`, or `[batch, tokens, heads, head_dim]`."""
    assert value.shape is not None
    return math.prod(int(n) for n in tuple(value.shape)[2:] if isinstance(n, int))


@dataclass(slots=True)
class _Work:
    """One graph, one rank: what is divided already."""

    graph: ir.Graph
    weights: frozenset[str]
    rank: Rank
    blocks: Mapping[str, int]
    rounded: bool
    shares: dict[str, Share] = field(default_factory=dict)
    divided: set[ir.Node] = field(default_factory=set)

    # --- what there is to divide ----------------------------------------------------------------

    def is_product(self, node: ir.Node) -> bool:
        """Whether it multiplies by a matrix that may be divided."""
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        return weight is not None and self._is_weight(weight, axes=2)

    def _is_weight(self, value: ir.Value, axes: int) -> bool:
        known = value.is_initializer() and value.name in self.weights
        return known and value.shape is not None and len(value.shape) == axes

    def is_table(self, node: ir.Node) -> bool:
        """Whether it takes rows of a table that is worth dividing."""
        table = node.inputs[0]
        if table is None or not self._is_weight(table, axes=2) or len(table.uses()) > 1:
            return False
        assert table.shape is not None
        return math.prod(table.shape.numpy()) >= LARGE_TABLE and _axis(node) == 0

    def between(self, product: ir.Node) -> tuple[ir.Node, ...] | None:
        """Products by columns and all between them and `product`, in order; None: other things."""
        found: dict[ir.Node, None] = {}
        first = product.inputs[0]
        if first is None or not self._collect(first, found):
            return None
        inside = {*found, product}
        escapes = [
            value
            for node in found
            for value in (node.outputs[:1] if CachedAttentionNode.is_of(node) else node.outputs)
            if value.is_graph_output() or any(user not in inside for user, _ in value.uses())
        ]
        return None if escapes else tuple(found)

    def _collect(self, value: ir.Value, found: dict[ir.Node, None]) -> bool:
        node = value.producer()
        if node is None:
            return False
        if node in found:
            return True
        if not self.is_product(node):
            taken = self._taken(node)
            if not taken or not all(self._collect(v, found) for v in taken):
                return False
        found[node] = None
        return True

    def _taken(self, node: ir.Node) -> tuple[ir.Value, ...]:
        """The inputs whose columns are those of the outputs; none: not that kind of node."""
        given = [value for value in node.inputs if value is not None]
        if CachedAttentionNode.is_of(node):
            return tuple(given[:3])
        kind = node.op_type
        if kind in _BY_COLUMN:
            return tuple(v for v in given if not self._is_vector(v) and not _is_scalar(v))
        apart = given[0].shape is not None and len(given[0].shape) == 4
        last = given[0].shape is not None and _axis(node) in (-1, len(given[0].shape) - 1)
        if (
            kind in ("RotaryEmbedding", "Reshape")
            or (kind == "Split" and last)
            or (kind == "RMSNormalization" and apart)
        ):
            return (given[0],)
        return ()

    def _is_vector(self, value: ir.Value) -> bool:
        return self._is_weight(value, axes=1)

    # --- dividing -------------------------------------------------------------------------------

    def divide(self, product: ir.Node, between: tuple[ir.Node, ...]) -> None:
        """Leave the rank's columns of `between` and rows of `product`; sum behind it.

        Or the rank's columns of both, and gather before and behind the product.
        """
        taken, weight = product.inputs
        assert taken is not None and weight is not None and weight.shape is not None
        attentions = [CachedAttentionNode.read(n) for n in between if CachedAttentionNode.is_of(n)]
        rows = weight.shape.numpy()[0]
        if attentions:
            dim, heads = attentions[0].head_dim, attentions[0].num_heads
            if len(attentions) > 1 or rows != heads * dim:
                raise _unknown_form(product, "one attention, whose heads are its rows")
            own, _ = heads_of(heads, attentions[0].kv_num_heads, self.rank)
            first = self.rank.index * own
            kept: Ranges = ((first * dim, (first + own) * dim),)
        else:
            kept = (self._rows(weight.name or "", rows),)
        layouts = {taken: kept}
        for node in reversed(between):
            self._divide_node(node, layouts)
        self.divided.update(between)
        if self.rounded and weight.name in self.blocks:
            self._gather(taken, rows)
            self.divide_columns(product)
        else:
            self._share(weight, Share(0, kept))
            self._sum(product)

    def _rows(self, name: str, count: int) -> tuple[int, int]:
        """The rank's rows of the second matrix of an MLP."""
        even = even_share(count, self.rank, f"rows of {name}")
        size, (index, of) = self.blocks.get(name, 1), (self.rank.index, self.rank.of)
        number = count // size
        if number < of or self.rounded:
            return even.start, even.start + even.size
        return number * index // of * size, number * (index + 1) // of * size

    def divide_columns(self, product: ir.Node) -> None:
        """Leave the rank's columns of a matrix, and gather all behind it."""
        weight, out = product.inputs[1], product.outputs[0]
        assert weight is not None and weight.shape is not None
        width = weight.shape.numpy()[1]
        self._share(weight, self._padded(width, axis=1))
        self._set_features(out, -(-width // self.rank.of))
        self._gather(out, width)

    def divide_table(self, gather: ir.Node) -> None:
        """Leave the rank's rows of a table; rows that others have are zeroes, and all are summed.

        The rank's rows are padded: the table of none is empty.
        """
        table, ids, rows = gather.inputs[0], gather.inputs[1], gather.outputs[0]
        assert table is not None and ids is not None and table.shape is not None
        share = self._padded(table.shape.numpy()[0], axis=0)
        self._share(table, share)
        tape, name = Tape(), gather.name
        start, stop = share.ranges[0]
        first, count = (
            self._constant(f"{name}_first", start),
            self._constant(f"{name}_count", stop - start),
        )
        zero, last = self._constant(f"{name}_zero", 0), self._constant(f"{name}_last", [-1])
        nothing = self._constant(f"{name}_nothing", 0.0)
        own = tape.op("Sub", [ids, first])
        there = tape.op(
            "And", [tape.op("GreaterOrEqual", [own, zero]), tape.op("Less", [own, count])]
        )
        safe = tape.op("Where", [there, own, zero])
        columns = tape.op("Unsqueeze", [there, last])
        for index, node in enumerate(tape.nodes):
            node.name = node.outputs[0].name = f"{name}_own_{index}"
        self.graph.insert_before(gather, tape.nodes)
        gather.replace_input_with(1, safe)
        kept = ir.node("Where", [columns, rows, nothing], name=f"{name}_kept")
        made = kept.outputs[0]
        made.name, made.type, made.shape = kept.name, rows.type, rows.shape
        rows.replace_all_uses_with(made)
        kept.replace_input_with(1, rows)
        self.graph.insert_after(gather, kept)
        self._sum(kept)

    def _padded(self, count: int, axis: int) -> Share:
        size = -(-count // self.rank.of)
        start, stop = (min((self.rank.index + i) * size, count) for i in (0, 1))
        return Share(axis, ((start, stop),), size - (stop - start))

    def _sum(self, node: ir.Node) -> None:
        share = node.outputs[0]
        total = self._met(share)
        made = AllReduceNode(share=share, out=total).write(f"{total.name}_sum")
        self.graph.insert_after(node, made)

    def _gather(self, share: ir.Value, width: int) -> None:
        node, whole = share.producer(), self._met(share)
        assert node is not None
        self._set_features(whole, width)
        made = AllGatherNode(share=share, width=width, out=whole).write(f"{whole.name}_gather")
        self.graph.insert_after(node, made)

    def _met(self, share: ir.Value) -> ir.Value:
        """What the ranks have of their shares: it has a share's name, users and shape."""
        met = ir.Value(name=share.name, type=share.type, shape=share.shape)
        share.name = f"{met.name}_share"
        share.replace_all_uses_with(met, replace_graph_outputs=True)
        return met

    def _divide_node(self, node: ir.Node, layouts: dict[ir.Value, Ranges]) -> None:
        """Leave the columns that `layouts` says of the outputs, and say those of the inputs."""
        if self.is_product(node):
            _, weight = node.inputs
            assert weight is not None
            self._share(weight, Share(1, layouts[node.outputs[0]]))
        elif CachedAttentionNode.is_of(node):
            self._divide_attention(CachedAttentionNode.read(node), layouts)
        elif node.op_type == "Split":
            self._divide_split(node, layouts)
        else:
            kept = layouts[node.outputs[0]]
            for value in node.inputs:
                if value is not None and self._is_vector(value) and node.op_type in _BY_COLUMN:
                    self._share(value, Share(0, kept))
            for value in self._taken(node):
                _agree(node, layouts, value, kept)
        for value in node.outputs:
            if value in layouts:
                self._set_features(value, width_of(layouts[value]), node)

    def _divide_attention(
        self, attention: CachedAttentionNode, layouts: dict[ir.Value, Ranges]
    ) -> None:
        node, dim = attention.node, attention.head_dim
        own, kv = heads_of(attention.num_heads, attention.kv_num_heads, self.rank)
        _agree(node, layouts, attention.query, layouts[attention.out])
        for value in (attention.key, attention.value):
            _agree(node, layouts, value, joined((i * dim, (i + 1) * dim) for i in kv))
        node.attributes["num_heads"] = ir.AttrInt64("num_heads", own)
        node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", len(kv))
        for cache in (value for pair in attention.caches for value in pair):
            assert cache.shape is not None
            sequences, _, *rest = tuple(cache.shape)
            cache.shape = ir.Shape([sequences, len(kv), *rest])

    def _divide_split(self, node: ir.Node, layouts: dict[ir.Value, Ranges]) -> None:
        whole, offset, kept = node.inputs[0], 0, list[tuple[int, int]]()
        assert whole is not None
        for value in node.outputs:
            if value not in layouts:
                raise _unknown_form(node, "parts that are all used")
            kept += shifted(layouts[value], offset)
            offset += _features(value)
        sizes = [width_of(layouts[value]) for value in node.outputs]
        node.attributes.pop("num_outputs", None)
        constant = self._constant(f"{node.name}_sizes", sizes)
        if len(node.inputs) < 2:
            node.resize_inputs(2)
        node.replace_input_with(1, constant)
        _agree(node, layouts, whole, joined(iter(kept)))

    def _set_features(self, value: ir.Value, size: int, node: ir.Node | None = None) -> None:
        """Tell a value's columns, and the node what depends on them."""
        assert value.shape is not None
        batch, tokens, *rest = tuple(value.shape)
        before = _features(value)
        apart = [size // int(rest[-1]), rest[-1]] if len(rest) == 2 else [size]  # type: ignore[arg-type]
        value.shape = ir.Shape([batch, tokens, *apart])
        if node is not None and node.op_type == "RotaryEmbedding":
            heads = node.attributes["num_heads"].as_int() * size // before
            node.attributes["num_heads"] = ir.AttrInt64("num_heads", heads)
        elif node is not None and node.op_type == "Reshape":
            node.attributes.pop("allowzero", None)  # a zero is the input's size from here on
            shape = [0, 0, *(int(n) for n in apart)]  # type: ignore[arg-type]
            node.replace_input_with(1, self._constant(f"{node.name}_shape", shape))

    def _share(self, weight: ir.Value, share: Share) -> None:
        name = weight.name or ""
        if self.shares.setdefault(name, share) != share:
            raise BuildError(
                f"The weight {name} is used in ways that ranks would divide differently.",
                found=f"{self.shares[name]} and {share}",
                expected="one way",
                fix="build without --tp",
            )
        assert weight.shape is not None and weight.dtype is not None
        weight.shape = ir.Shape(share.shape(weight.shape.numpy()))
        weight.const_value = unread(weight.dtype, weight.shape)

    def _constant(self, name: str, values: object) -> ir.Value:
        array = np.array(values, np.float32 if isinstance(values, float) else np.int64)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value


def _axis(node: ir.Node) -> int:
    axis = node.attributes.get("axis")
    return 0 if axis is None else int(axis.as_int())


def _is_scalar(value: ir.Value) -> bool:
    constant = value.const_value
    return constant is not None and constant.size == 1


def _agree(node: ir.Node, layouts: dict[ir.Value, Ranges], value: ir.Value, kept: Ranges) -> None:
    if layouts.setdefault(value, kept) != kept:
        raise _unknown_form(node, "columns that are all divided in the same way")
