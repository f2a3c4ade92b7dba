"""A part that is a chain: segments that a library runs, and between them what we launch ourselves.

Plain data of the manifest. Tensors are told by their names: what one step gives, later ones take.
Between segments are calls of attention, gated activations, collectives of tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from msgspec import Struct, field, structs
from typing_extensions import override

from vlmforge.engine.fields import ByteCount, Count, FilePath, ImageTokens, Name
from vlmforge.engine.schema import Agreeing
from vlmforge.engine.tensors import TensorSpec
from vlmforge.field_rules import Choice, Int, Number

Heads = Annotated[int, Int(1, 1 << 12)]
Unit = Annotated[float, Number(0, 1e6, above=True)]


class BoundWeight(Struct, frozen=True):
    """A weight that a graph takes as an input.

    Attributes:
        tensor: Its own name, dtype and shape.
        called: What the graph calls it.
        file: Where its bytes are, row-major.
        offset: In bytes, in `file`.
    """

    tensor: TensorSpec
    called: Name
    file: FilePath
    offset: ByteCount


class Segment(Struct, frozen=True):
    """A graph, a file. Those of several segments that differ in their weights alone are one file.

    Attributes:
        file: Where it is.
        inputs, outputs: Its tensors; of the part's own inputs and outputs, or of other steps.
        token_bytes: Bytes that what it calculates in between takes for each token of a step, at
            most; an estimate, by which memory is planned.
        matrix_bytes: Bytes of the largest matrix of whole numbers, as what it calculates in: it is
            made whole to multiply many tokens by.
        weights: Those that are not in the graph, but its inputs.
        names: What the graph calls its inputs and outputs, in order; none: the same.
    """

    file: FilePath
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    token_bytes: ByteCount
    matrix_bytes: ByteCount = 0
    weights: tuple[BoundWeight, ...] = ()
    names: tuple[Name, ...] = ()

    @property
    def called(self) -> Mapping[str, str]:
        """What the graph calls its inputs and outputs, by their names here."""
        own = [spec.name for spec in (*self.inputs, *self.outputs)]
        return dict(zip(own, self.names or own, strict=True))

    @property
    def form(self) -> tuple[object, ...]:
        """What is the same in all segments of a file: kinds of tensors, and names in the graph."""
        specs = (*self.inputs, *self.outputs, *(weight.tensor for weight in self.weights))
        called = (*self.called.values(), *(weight.called for weight in self.weights))
        return called, [(spec.dtype, spec.shape) for spec in specs]


class AttentionCall(Struct, frozen=True):
    """A launch of our paged attention over the pools of one layer.

    Attributes:
        layer: Whose pools of pages it reads and writes.
        qkv: Tensor `[batch, tokens, (heads + 2 * kv_heads) * head_dim]`: query, key and value of a
            token one after the other.
        out: Tensor `[batch, tokens, heads * head_dim]`.
        heads, kv_heads, head_dim: Of queries, of keys and values, and the size of each.
        scale: Factor on the scores.
        key_scale, value_scale: What one unit of an fp8 pool is worth; 1 for other pools.
        rotary: Whether it rotates query and key by the chain's tables.
    """

    layer: Annotated[int, Int(0, 1 << 12)]
    qkv: Name
    out: Name
    heads: Heads
    kv_heads: Heads
    head_dim: Annotated[int, Int(1, 1 << 14)]
    scale: Annotated[float, Number(-1e6, 1e6)]
    key_scale: Unit
    value_scale: Unit
    rotary: bool


class GatedActivation(Struct, frozen=True):
    """A launch of our gated activation: `act(first half of a row) * second half`.

    Attributes:
        activation: "silu", "gelu", or "gelu_tanh", its approximation.
        tensor: `[batch, tokens, 2 * width]`, float16 or bfloat16.
        out: `[batch, tokens, width]` of the same dtype; rounded once.
    """

    activation: Annotated[str, Choice(("silu", "gelu", "gelu_tanh"))]
    tensor: Name
    out: Name


class SumNorm(Struct, frozen=True):
    """What becomes of a sum at once: something is added to it, and that is normalised.

    Attributes:
        added: Tensor that is added, as the sum is, the same on all ranks.
        out: What that gives over the root of the mean of its squares, along the last axis, times a
            scale (https://arxiv.org/abs/1910.07467).
        file: Where the scale is: numbers of the sum's dtype, as many as its last axis has.
        offset: In bytes, of the scale in `file`.
        epsilon: Is added to the mean.
    """

    added: Name
    out: Name
    file: FilePath
    offset: ByteCount
    epsilon: Annotated[float, Number(0, 1)]


class Collective(Struct, frozen=True):
    """Where all ranks meet: each gives its `tensor`, and each gets the same `out`.

    The ranks' tensors have one shape and dtype (float32 where the backend is of the CPU).

    Attributes:
        kind: "all_reduce": `out` is the sum of the ranks' tensors, in any order of additions that
            is the same on all ranks. "all_gather": the ranks' tensors one after the other along
            the last axis, rank 0's first.
        tensor: What a rank gives.
        out: What all get.
        width: Of a gather: how much of the last axis of `out` is kept, where the ranks' shares
            were padded to one size; None: all.
        norm: Of a sum: what is added to it before it is `out`, and how that is normalised.
    """

    kind: Annotated[str, Choice(("all_reduce", "all_gather"))]
    tensor: Name
    out: Name
    width: Count | None = None
    norm: SumNorm | None = None

    @property
    def agreed(self) -> tuple[object, ...]:
        """What is the same on all ranks: they have files of their own."""
        norm = self.norm
        named = None if norm is None else (norm.added, norm.out, norm.epsilon)
        return self.kind, self.tensor, self.out, self.width, named

    @property
    def taken(self) -> frozenset[str]:
        """Names of the tensors that it takes."""
        return frozenset((self.tensor, *(() if self.norm is None else (self.norm.added,))))

    @property
    def given(self) -> frozenset[str]:
        """Names of the tensors that it gives."""
        return frozenset((self.out, *(() if self.norm is None else (self.norm.out,))))


class ChainStep(Struct, frozen=True):
    """Exactly one of them."""

    segment: Segment | None = None
    attention: AttentionCall | None = None
    collective: Collective | None = None
    gated: GatedActivation | None = None

    @property
    def taken(self) -> frozenset[str]:
        """Names of the tensors that it takes."""
        if self.gated is not None:
            return frozenset((self.gated.tensor,))
        if self.segment is not None:
            return frozenset(spec.name for spec in self.segment.inputs)
        if self.collective is not None:
            return self.collective.taken
        return frozenset(() if self.attention is None else (self.attention.qkv,))

    @property
    def given(self) -> frozenset[str]:
        """Names of the tensors that it gives."""
        if self.gated is not None:
            return frozenset((self.gated.out,))
        if self.segment is not None:
            return frozenset(spec.name for spec in self.segment.outputs)
        if self.collective is not None:
            return self.collective.given
        return frozenset(() if self.attention is None else (self.attention.out,))


class RotaryTables(Struct, frozen=True):
    """Cosines and sines, float32 `[positions, width]` each, at their offsets in bytes in `file`."""

    file: FilePath
    cos_offset: ByteCount
    sin_offset: ByteCount
    positions: ImageTokens
    width: Count


class PartChain(Agreeing, Struct, frozen=True):
    """What is run, in order.

    Attributes:
        steps: The first is a segment; the last is one too, or a gather.
        rotary: What the calls of attention rotate by; None where none does.
        kernels: Files of the attention's compiled kernels, by the names of their targets; none
            where attention is inside the segments.
        meetings: Files of the compiled kernels in which GPUs meet, by the names of their targets;
            none where they meet by those of a library.
        activations: Files of the compiled kernel of gated activations, by the names of their
            targets; none where these are inside the segments.
        sampler: What chooses tokens from the logits of a step (`interface.CHOSEN`); None: the host
            does.
        choosers: Files of the compiled kernel that does what `sampler` and the segment of the
            likeliest tokens do, by the names of their targets; none where those are run.
    """

    steps: tuple[ChainStep, ...]
    rotary: RotaryTables | None
    kernels: Mapping[str, FilePath]
    sampler: Segment | None = None
    meetings: Mapping[str, FilePath] = field(default_factory=dict)
    activations: Mapping[str, FilePath] = field(default_factory=dict)
    choosers: Mapping[str, FilePath] = field(default_factory=dict)

    @override
    def disagreements(self) -> Iterator[tuple[str, str]]:
        steps, calls = self.steps, self.attention
        if any(_kinds(step) != 1 for step in steps):
            yield "steps", "each a segment, a call or a collective"
        last = steps[-1] if steps else ChainStep()
        if not steps or steps[0].segment is None or (last.attention or last.gated) is not None:
            yield "steps", "a segment first, and no call last"
        if not (calls or self.collectives):
            yield "steps", "with attention or collectives between them"
        if len({(call.kv_heads, call.head_dim) for call in calls}) > 1:
            yield "steps", "with attention of one shape"
        if any(call.heads % call.kv_heads for call in calls):
            yield "steps", "of heads that share keys evenly"
        if any(len(s.names) not in (0, len(s.inputs) + len(s.outputs)) for s in self.segments):
            yield "steps", "with a name in the graph for each input and output of a segment"
        if any(call.norm is not None and call.kind != "all_reduce" for call in self.collectives):
            yield "steps", "with norms of sums alone"
        if not all(self._adds_up(call) for call in self.collectives):
            yield "steps", "with norms of sums and what is like them, between calls of attention"
        if self.rotary is None and any(call.rotary for call in calls):
            yield "rotary", "given where attention rotates"
        if self.gates and not calls:
            yield "steps", "with gates where there is attention"
        if len({gate.activation for gate in self.gates}) > 1:
            yield "steps", "with gates of one activation"
        if any(not self._halves(gate) for gate in self.gates):
            yield "steps", "with gates of 16 bits that give half of what they take"

    def _halves(self, gate: GatedActivation) -> bool:
        """Whether the segments around it agree about what it takes and gives."""
        given = {spec.name: spec for segment in self.segments for spec in segment.outputs}
        taken = {spec.name: spec for segment in self.segments for spec in segment.inputs}
        whole, half = given.get(gate.tensor), taken.get(gate.out)
        if whole is None or half is None or whole.dtype != half.dtype:
            return False
        *rows, width = half.shape or ("",)
        return (
            half.dtype in ("float16", "bfloat16")
            and isinstance(width, int)
            and whole.shape == (*rows, 2 * width)
        )

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All of them, in order."""
        return tuple(step.segment for step in self.steps if step.segment is not None)

    @property
    def kinds(self) -> Mapping[str, tuple[Segment, ...]]:
        """The segments of each file."""
        found = dict[str, tuple[Segment, ...]]()
        for segment in self.segments:
            found[segment.file] = (*found.get(segment.file, ()), segment)
        return found

    @property
    def attention(self) -> tuple[AttentionCall, ...]:
        """All launches of attention, in order."""
        return tuple(step.attention for step in self.steps if step.attention is not None)

    @property
    def gates(self) -> tuple[GatedActivation, ...]:
        """All launches of gated activations, in order."""
        return tuple(step.gated for step in self.steps if step.gated is not None)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """All meetings of the ranks, in order."""
        return tuple(step.collective for step in self.steps if step.collective is not None)

    def _adds_up(self, call: Collective) -> bool:
        """Whether what is added to a sum and what both become are as the sum is, in whole rows."""
        if call.norm is None or call.kind != "all_reduce":
            return True
        specs = self.tensors
        there = [specs[name] for name in call.taken | call.given if name in specs]
        found = {(spec.dtype, spec.shape) for spec in there}
        whole = all(shape and isinstance(shape[-1], int) for _, shape in found)
        return bool(self.attention) and len(found) == 1 and whole

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """By name: what segments take and give, and sums, which may be only added to others."""
        found = {spec.name: spec for s in self.segments for spec in (*s.inputs, *s.outputs)}
        for call in self.collectives:
            if call.kind == "all_reduce" and (one := found.get(call.tensor)) is not None:
                found = {
                    name: structs.replace(one, name=name) for name in sorted(call.given)
                } | found
        return found

    @property
    def files(self) -> frozenset[str]:
        """All that it names."""
        tables = () if self.rotary is None else (self.rotary.file,)
        graphs = (*self.segments, *(() if self.sampler is None else (self.sampler,)))
        sets = (self.kernels, self.meetings, self.activations, self.choosers)
        kernels = (name for files in sets for name in files.values())
        scales = (call.norm.file for call in self.collectives if call.norm is not None)
        weights = (weight.file for segment in self.segments for weight in segment.weights)
        return frozenset((*(s.file for s in graphs), *kernels, *tables, *scales, *weights))

    def missing(self, inputs: frozenset[str]) -> frozenset[str]:
        """Tensors that a step takes and neither the part's `inputs` nor an earlier step gives."""
        known, missing = set(inputs), set[str]()
        for step in self.steps:
            missing |= step.taken - known
            known |= step.given
        return frozenset(missing)


def _kinds(step: ChainStep) -> int:
    """How many things a step is."""
    kinds = (step.segment, step.attention, step.collective, step.gated)
    return sum(kind is not None for kind in kinds)
