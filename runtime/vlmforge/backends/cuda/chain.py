"""A decoder that is a chain: segments that ONNX Runtime runs, and our attention between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from msgspec import Struct, structs
from typing_extensions import override

from vlmforge.backends import LoadOptions
from vlmforge.backends.cuda.choice_kernel import load_choice
from vlmforge.backends.cuda.device import (
    Device,
    MeetingPlace,
    Memory,
    Segment,
    SumAndNorm,
    Tensor,
    Work,
)
from vlmforge.backends.cuda.frames import (
    PAST,
    Arrangement,
    Size,
    arrange,
    inputs_of,
    largest,
    made_by,
)
from vlmforge.backends.cuda.placed_weights import place_weights
from vlmforge.backends.cuda.program import FEW, Pools, Program, Span
from vlmforge.backends.number_formats import DTYPES
from vlmforge.engine import chain
from vlmforge.engine.chain import AttentionCall, ChainStep, GatedActivation, PartChain
from vlmforge.engine.interface import BLOCK_TABLE, LOGITS, QUERY_LENGTHS, chosen_by_kernel
from vlmforge.engine.manifest import KVLayout, Part
from vlmforge.engine.tensors import TensorSpec
from vlmforge.errors import EngineFormatError
from vlmforge_plugins.cached_attention import launcher
from vlmforge_plugins.cached_attention.config import Config
from vlmforge_plugins.cached_attention.plan import Plan, Shape, max_workspace, plan
from vlmforge_plugins.gated_activation.launcher import Gate, Kernels, launch_of, name_of


class _Call(Struct, frozen=True):
    """A launch of attention: how, and of which sequence and which token on."""

    plan: Plan
    sequence: int
    token: int


class ChainProgram(Program):
    """See `Program`."""

    outputs: int | None = None
    gives_likeliest = True

    def __init__(
        self,
        device: Device,
        folder: Path,
        part: Part,
        kv: KVLayout,
        options: LoadOptions,
        place: MeetingPlace | None = None,
    ) -> None:
        """`place`: where it meets the other ranks, if there are any."""
        assert part.chain is not None and kv.page_size is not None
        self._device, self._chain, self._place = device, part.chain, place
        self._specs = part.chain.tensors
        self._page, self._columns = kv.page_size, -(-options.capacity // kv.page_size)
        self._inputs = inputs_of(part.inputs, self._columns)
        self._segments = _loaded(device, folder, part.chain)
        self._weights = place_weights(device, folder, part.chain)
        self._loaded = device.kernels(
            _config(part.chain, kv), {n: folder / f for n, f in part.chain.kernels.items()}
        )
        self._gates = _gates(device, folder, part.chain, self._specs)
        self._tables = _tables(device, folder, part.chain)
        self._scales = _scales(device, folder, part.chain, self._specs)
        self._workspace = device.allocate(max(map(self._workspace_bytes, largest(options))))

    @override
    def inputs(self, size: Size) -> Sequence[TensorSpec]:
        return self._inputs

    @override
    def arrange(self, size: Size) -> Arrangement:
        return arrange(self._chain, self._inputs, size)

    @override
    def bind(
        self, size: Size, at: Mapping[str, int], pools: Pools, spans: Sequence[Span] = ()
    ) -> Work:
        calls, works = list[_Call](), list[Work]()
        if size.packed:
            works.append(lambda: self._plan_calls(size, spans, calls))
        else:
            calls.append(_Call(self._planned(self._shape(size)), 0, 0))
        works += [self._step(step, size, at, calls, pools) for step in self._steps(size)]
        return partial(_all, works)

    def _plan_calls(self, size: Size, spans: Sequence[Span], calls: list[_Call]) -> None:
        """One for all neighbours with as many new tokens: each takes one number of them."""
        calls.clear()
        sequence = token = 0
        for tokens, group in itertools.groupby(spans, lambda span: span.tokens):
            totals = [span.total for span in group]
            if tokens:
                one = structs.replace(
                    size, batch=len(totals), tokens=tokens, total=max(totals), packed=0
                )
                calls.append(_Call(self._planned(self._shape(one)), sequence, token))
            sequence, token = sequence + len(totals), token + tokens * len(totals)

    def _planned(self, shape: Shape) -> Plan:
        return plan(shape, self._loaded.sizes, self._loaded.machine)

    def _workspace_bytes(self, size: Size) -> int:
        return max_workspace(self._shape(size), self._loaded.sizes, self._loaded.machine)

    def _shape(self, size: Size) -> Shape:
        call, rotary = self._chain.attention[0], self._chain.rotary
        total = min(size.total, self._columns * self._page)
        return Shape(
            batch=size.batch,  # of a packed one its row: no call has more tokens
            max_query=size.tokens,
            max_total=total if rotary is None else min(total, rotary.positions),
            heads=call.heads,
            kv_heads=call.kv_heads,
            page_size=self._page,
            max_pages=self._columns,
            rotary=call.rotary,
            **({} if rotary is None else {"positions": rotary.positions}),
        )

    def _steps(self, size: Size) -> tuple[ChainStep, ...]:
        """Those that are of use: without logits, none behind the last attention."""
        if size.one_each and size.sequences > FEW:
            return self._chain.steps
        last = LOGITS if size.outputs else self._chain.attention[-1].out
        return self._chain.steps[: made_by(self._chain, last) + 1]

    def _step(
        self,
        step: ChainStep,
        size: Size,
        at: Mapping[str, int],
        calls: Sequence[_Call],
        pools: Pools,
    ) -> Work:
        if step.attention is not None:
            return self._attention(step.attention, at, calls, pools)

        def tensors(specs: Iterable[TensorSpec]) -> list[Tensor]:
            return [Tensor(s.name, s.dtype, size.shape(s), at[s.name]) for s in specs]

        if (call := step.collective) is not None:
            assert self._place is not None
            given, out = tensors(self._specs[name] for name in (call.tensor, call.out))
            if (norm := call.norm) is None:
                return self._place.bind(call, given, out)
            added, normed = tensors(self._specs[name] for name in (norm.added, norm.out))
            scale = self._scales[norm.out].address
            return self._place.bind_norm(SumAndNorm(given, added, out, normed, scale, norm.epsilon))
        if step.gated is not None:
            return self._gate(step.gated, size, at)
        assert step.segment is not None

        return self._segment(step.segment, size, at)

    def _segment(self, segment: chain.Segment, size: Size, at: Mapping[str, int]) -> Work:
        called = segment.called

        def tensors(specs: Iterable[TensorSpec]) -> list[Tensor]:
            return [
                Tensor(s.name, s.dtype, size.shape(s), at[s.name], called[s.name]) for s in specs
            ]

        loaded: Segment = self._segments[segment.file]
        weights = [self._weights[weight] for weight in segment.weights]
        return loaded.bind([*tensors(segment.inputs), *weights], tensors(segment.outputs))

    def _gate(self, step: GatedActivation, size: Size, at: Mapping[str, int]) -> Work:
        assert self._gates is not None
        spec = self._specs[step.out]
        *rows, width = size.shape(spec)
        given, out = at[step.tensor], at[step.out]
        gate = Gate(given, out, math.prod(rows), width, step.activation, spec.dtype)
        launch, params = launch_of(gate, overlap=self._gates.overlap)
        return partial(self._gates.launch, launch, params, self._device.stream)

    def _attention(
        self, call: AttentionCall, at: Mapping[str, int], calls: Sequence[_Call], pools: Pools
    ) -> Work:
        cos, sin = (memory.address for memory in self._tables) if self._tables else (0, 0)
        scales = launcher.Scales(call.scale, call.key_scale, call.value_scale)
        width = (call.heads + 2 * call.kv_heads) * call.head_dim
        key_pool, value_pool = pools.of(call.layer)

        def rows(name: str, one: _Call, width: int, head: int = 0) -> launcher.Rows:
            begin = at[name] + 2 * (one.token * width + head * call.head_dim)
            return launcher.Rows(begin, one.plan.shape.max_query * width, width)

        def work() -> None:
            for one in calls:
                tensors = launcher.Tensors(
                    query=rows(call.qkv, one, width),
                    key=rows(call.qkv, one, width, call.heads),
                    value=rows(call.qkv, one, width, call.heads + call.kv_heads),
                    out=rows(call.out, one, call.heads * call.head_dim),
                    key_pool=key_pool,
                    value_pool=value_pool,
                    pages=pools.pages,
                    cos=cos if call.rotary else 0,
                    sin=sin if call.rotary else 0,
                    past_lengths=at[PAST.name] + 4 * one.sequence,
                    query_lengths=at[QUERY_LENGTHS.name] + 4 * one.sequence,
                    block_table=at[BLOCK_TABLE.name] + 4 * self._columns * one.sequence,
                    workspace=self._workspace.address,
                )
                kernels, stream = self._loaded.kernels, self._device.stream
                launcher.run(one.plan, tensors, scales, kernels, stream)

        return work


def _loaded(device: Device, folder: Path, chain: PartChain) -> Mapping[str, Segment]:
    """The segments by their files; the likeliest tokens by our kernel, where there is one."""
    found = dict[str, Segment]()
    for file, kind in chain.kinds.items():
        kernel = None
        if chosen_by_kernel(chain, kind[0]):
            kernel = load_choice(device, folder, chain, rows=0)  # nothing is edited before
        found[file] = kernel or device.segment(folder / file)
    return found


def _all(works: list[Work]) -> None:
    for work in works:
        work()


def _config(chain: PartChain, kv: KVLayout) -> Config:
    """What the attention's kernels are specialised on."""
    call = chain.attention[0]
    specs = {s.name: s for segment in chain.segments for s in segment.outputs}
    return Config(call.head_dim, specs[call.qkv].dtype, kv.dtype)  # type: ignore[arg-type]


def _gates(
    device: Device, folder: Path, chain: PartChain, specs: Mapping[str, TensorSpec]
) -> Kernels | None:
    """The kernel of gated activations, where the chain has any."""
    if not chain.gates:
        return None
    gate = chain.gates[0]
    name = name_of(gate.activation, specs[gate.out].dtype)
    files = {target: folder / file for target, file in chain.activations.items()}
    return device.activations(name, files)


def _scales(
    device: Device, folder: Path, chain: PartChain, specs: Mapping[str, TensorSpec]
) -> Mapping[str, Memory]:
    """What norms behind sums multiply by, on the device; by the names of what they give."""
    found = {}
    for norm in (call.norm for call in chain.collectives if call.norm is not None):
        spec = specs[norm.out]
        width, item = spec.shape[-1], np.dtype(DTYPES.get(spec.dtype, spec.dtype))
        assert isinstance(width, int)
        values = np.fromfile(folder / norm.file, item, width, offset=norm.offset)
        if len(values) < width:
            raise EngineFormatError(
                f"The scale of the norm {norm.out!r} is not in its file.",
                found=f"{len(values)} numbers at {norm.offset} of {norm.file}",
                expected=f"{width}, of {spec.dtype}",
                fix="build the engine again with build-engine",
            )
        found[norm.out] = memory = device.allocate(values.nbytes)
        device.upload(memory.address, values)
    return found


def _tables(device: Device, folder: Path, chain: PartChain) -> tuple[Memory, Memory] | None:
    """Cosines and sines on the device, where attention rotates by them."""
    tables = chain.rotary
    if tables is None:
        return None
    count = tables.positions * tables.width

    def put(offset: int) -> Memory:
        values = np.fromfile(folder / tables.file, np.float32, count, offset=offset)
        memory = device.allocate(values.nbytes)
        device.upload(memory.address, values)
        return memory

    return put(tables.cos_offset), put(tables.sin_offset)
