"""Cut a decoder into a chain where its attention over the cache stands, and where ranks meet.

Where gated activations of ours are, too. Our kernels and the ranks' collectives run between the
pieces, which are graphs of their own; an attention that is lowered already stays inside. What one
piece calculates and later ones take goes through memory; shapes and indices, and what only weights
decide, are calculated anew in each piece instead, so that nothing is waited for on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from vlmforge.engine.chain import AttentionCall, Collective, GatedActivation, SumNorm
from vlmforge_builder.ops import DOMAIN
from vlmforge_builder.ops.all_gather import AllGatherNode
from vlmforge_builder.ops.all_reduce import AllReduceNode
from vlmforge_builder.ops.all_reduce_norm import AllReduceNormNode
from vlmforge_builder.ops.cached_attention import CachedAttentionNode
from vlmforge_builder.ops.gated_activation import GatedGeluNode, GatedSiluNode

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_SCALE = 1.0  # what one unit of an fp8 cache is worth: E4M3 reaches to 448
_CONSTANT = -1

Gate: TypeAlias = GatedSiluNode | GatedGeluNode
Meeting: TypeAlias = CachedAttentionNode | AllReduceNode | AllReduceNormNode | AllGatherNode | Gate
_MEETINGS: tuple[type[Meeting], ...] = (
    CachedAttentionNode,
    AllReduceNode,
    AllReduceNormNode,
    AllGatherNode,
    GatedSiluNode,
    GatedGeluNode,
)
Between: TypeAlias = AttentionCall | Collective | GatedActivation


@dataclass(frozen=True, slots=True)
class Cut:
    """Pieces, and what goes between them.

    There is one piece more than there are steps between, unless the last of those gives all that
    the last piece would.
    """

    pieces: tuple[ir.Model, ...]
    between: tuple[Between, ...]
    tables: tuple[str, str] | None  # names of the initialisers that attention rotates by

    @property
    def calls(self) -> tuple[AttentionCall, ...]:
        """The launches of attention."""
        return tuple(step for step in self.between if isinstance(step, AttentionCall))

    @property
    def gates(self) -> tuple[GatedActivation, ...]:
        """The launches of gated activations."""
        return tuple(step for step in self.between if isinstance(step, GatedActivation))


def cut_chain(model: ir.Model) -> Cut:
    """The pieces of a decoder whose other ops are lowered. The model is left of no further use.

    The interfaces of the first and the last piece keep the names of the model's. Key/value caches
    of attention that is cut out are nobody's inputs any more; others are those of the piece that
    holds the attention.
    """
    graph = model.graph
    found = [kind.read(node) for node in graph for kind in _MEETINGS if kind.is_of(node)]
    taken = [_taken(graph, meeting) for meeting in found]
    attentions = [meeting for meeting in found if isinstance(meeting, CachedAttentionNode)]
    caches = {present for attention in attentions for _, present in attention.caches}
    cutter = _Cutter(found)
    needed: list[dict[ir.Value, None]] = [{value: None} for value in taken]
    for added in (meeting.added for meeting in found if isinstance(meeting, AllReduceNormNode)):
        if cutter.is_of_piece(added):
            needed[cutter.level(added)][added] = None
    first, *others = (value for value in graph.outputs if value not in caches)
    needed.append({first: None})
    for value in others:
        needed[max(cutter.level(value), 0)][value] = None
    pieces = []
    for level in range(len(found), -1, -1):  # from the end: what later ones take is known then
        piece = cutter.piece(level, needed[level])
        for value in piece.taken:
            if (home := cutter.level(value)) < level and cutter.is_of_piece(value):
                needed[home][value] = None
        if piece.nodes or level < len(found):
            pieces.append(piece.model(model, f"piece{level}", tuple(needed[level])))
    layers = {attention.node: layer for layer, attention in enumerate(attentions)}
    between = tuple(
        _step(meeting, value, layers.get(meeting.node, 0))
        for meeting, value in zip(found, taken, strict=True)
    )
    rotary = next((a.rotary for a in attentions if a.rotary is not None), None)
    tables = None if rotary is None else (rotary[0].name or "", rotary[1].name or "")
    return Cut(tuple(reversed(pieces)), between, tables)


def _step(meeting: Meeting, taken: ir.Value, layer: int) -> Between:
    if isinstance(meeting, CachedAttentionNode):
        return _call(layer, meeting, taken)
    if isinstance(meeting, Gate):
        return GatedActivation(meeting.activation, taken.name or "", meeting.out.name or "")
    return _collective(meeting)


def _call(layer: int, attention: CachedAttentionNode, qkv: ir.Value) -> AttentionCall:
    return AttentionCall(
        layer=layer,
        qkv=qkv.name or "",
        out=attention.out.name or "",
        heads=attention.num_heads,
        kv_heads=attention.kv_num_heads,
        head_dim=attention.head_dim,
        scale=attention.scale,
        key_scale=_SCALE,
        value_scale=_SCALE,
        rotary=attention.rotary is not None,
    )


def _collective(meeting: AllReduceNode | AllReduceNormNode | AllGatherNode) -> Collective:
    tensor = meeting.share.name or ""
    if isinstance(meeting, AllReduceNormNode):
        return Collective("all_reduce", tensor, meeting.total.name or "", norm=_norm(meeting))
    out = meeting.out.name or ""
    if isinstance(meeting, AllGatherNode):
        return Collective("all_gather", tensor, out, meeting.width)
    return Collective("all_reduce", tensor, out)


def _norm(meeting: AllReduceNormNode) -> SumNorm:
    """What it multiplies by is read where it lies."""
    scale, names = meeting.scale.const_value, (meeting.added.name or "", meeting.normed.name or "")
    assert isinstance(scale, ir.ExternalTensor)
    return SumNorm(*names, str(scale.location), scale.offset or 0, meeting.epsilon)


def _taken(graph: ir.Graph, meeting: Meeting) -> ir.Value:
    if isinstance(meeting, CachedAttentionNode):
        return _joined(graph, meeting)
    return meeting.packed if isinstance(meeting, Gate) else meeting.share


def _joined(graph: ir.Graph, attention: CachedAttentionNode) -> ir.Value:
    """Query, key and value as the kernels take them: one after the other in each row."""
    node = attention.node
    if attention.packed is not None:
        return attention.packed
    inputs = [attention.query, attention.key, attention.value]
    concat = ir.node("Concat", inputs, attributes={"axis": -1}, name=f"{node.name}_qkv")
    made = concat.outputs[0]
    made.name, made.type = concat.name, attention.query.type
    assert attention.query.shape is not None
    width = (attention.num_heads + 2 * attention.kv_num_heads) * attention.head_dim
    made.shape = ir.Shape([*tuple(attention.query.shape)[:2], width])
    graph.insert_before(node, concat)
    return made


@dataclass(slots=True)
class _Piece:
    """Nodes in order, and the values that they take from outside: inputs and initialisers."""

    nodes: dict[ir.Node, None]
    taken: dict[ir.Value, None]
    weights: dict[ir.Value, None]

    def model(self, whole: ir.Model, name: str, outputs: Iterable[ir.Value]) -> ir.Model:
        """A model of copies; the values of weights are shared."""
        copies = {value: _copy(value) for value in (*self.taken, *self.weights)}
        nodes = [_copy_node(node, copies) for node in self.nodes]
        left = set() if any(node.domain == DOMAIN for node in nodes) else {DOMAIN}
        graph = ir.Graph(
            [copies[value] for value in self.taken],
            [copies[value] for value in outputs],
            nodes=nodes,
            initializers=[copies[value] for value in self.weights],
            opset_imports={n: v for n, v in whole.opset_imports.items() if n not in left},
            name=name,
        )
        return ir.Model(graph, ir_version=whole.ir_version, producer_name=whole.producer_name)


class _Cutter:
    """Says which piece a value belongs to: behind as many meetings as it depends on."""

    def __init__(self, found: Iterable[Meeting]) -> None:
        self._behind = {a.node: index + 1 for index, a in enumerate(found)}
        self._levels: dict[ir.Node, int] = {}

    def level(self, value: ir.Value) -> int:
        """`_CONSTANT` where nothing but weights is in it."""
        producer = value.producer()
        if producer is None:
            return 0 if value.is_graph_input() else _CONSTANT
        if producer in self._behind:
            return self._behind[producer]
        if producer not in self._levels:
            levels = [self.level(v) for v in producer.inputs if v is not None]
            self._levels[producer] = max(levels, default=_CONSTANT)
        return self._levels[producer]

    def is_of_piece(self, value: ir.Value) -> bool:
        """Whether a piece gives it, and not a meeting or the model's caller."""
        producer = value.producer()
        return producer is not None and producer not in self._behind

    def piece(self, level: int, outputs: Mapping[ir.Value, None]) -> _Piece:
        """What is needed to calculate `outputs`, all of this level."""
        piece = _Piece({}, {}, {})
        for value in outputs:
            self._take(value, level, piece, whole=True)
        return piece

    def _take(self, value: ir.Value, level: int, piece: _Piece, *, whole: bool = False) -> None:
        producer = value.producer()
        if producer is None:
            known = piece.taken if value.is_graph_input() else piece.weights
            known[value] = None
        elif producer in self._behind:
            piece.taken[value] = None
        elif producer not in piece.nodes:
            here = self.level(value)
            if not whole and 0 <= here < level and value.dtype in _FLOATS:
                piece.taken[value] = None
                return
            for taken in producer.inputs:
                if taken is not None:
                    self._take(taken, level, piece)
            piece.nodes[producer] = None


def _copy(value: ir.Value) -> ir.Value:
    return ir.Value(
        name=value.name, type=value.type, shape=value.shape, const_value=value.const_value
    )


def _copy_node(node: ir.Node, copies: dict[ir.Value, ir.Value]) -> ir.Node:
    for value in node.outputs:
        copies[value] = _copy(value)
    return ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else copies[value] for value in node.inputs],
        attributes=node.attributes.values(),
        outputs=[copies[value] for value in node.outputs],
        name=node.name,
    )
