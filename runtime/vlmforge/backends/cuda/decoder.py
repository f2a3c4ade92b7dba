"""A decoder that is a chain, over a pool of pages: `DecoderSession` on a `Device`.

Prompts run eagerly; a step of decoding is captured once for each of a few sizes and replayed.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge.backends import DecoderBatch, DecoderSession, FloatArray, IntArray, LoadOptions
from vlmforge.backends.cuda.device import ITEM_BYTES, Device, Memory, Segment, Tensor, Work
from vlmforge.backends.cuda.frames import (
    PAST,
    Arrangement,
    Size,
    arrange,
    bucket,
    inputs_of,
    made_by,
)
from vlmforge.engine.chain import AttentionCall, ChainStep, PartChain, TensorSpec
from vlmforge.engine.interface import (
    BLOCK_TABLE,
    IMAGE_FEATURES,
    INPUT_IDS,
    LIKELIEST,
    LOGITS,
    LOGITS_INDICES,
    PAST_LENGTHS,
    QUERY_LENGTHS,
    ROTARY_LEVELS,
    TURNS,
)
from vlmforge.engine.manifest import KVLayout, Part
from vlmforge.kv.cache import Copy, Move
from vlmforge_plugins.cached_attention import launcher
from vlmforge_plugins.cached_attention.config import Config
from vlmforge_plugins.cached_attention.plan import Plan, Shape, max_workspace, plan

_EAGER_FRAMES = 16
_FEW = 2  # rows for which the host finds the largest logits sooner than the GPU
_DTYPES: dict[str, Any] = {"int32": np.int32, "int64": np.int64, "float32": np.float32}


@dataclass(slots=True)
class _Frame:
    """A step of one size: where its inputs are put, and what runs it."""

    size: Size
    arrangement: Arrangement
    inputs: NDArray[np.uint8]  # all that is uploaded
    views: dict[str, NDArray[Any]]  # of `inputs`, by name
    work: Work
    runs: int = 0


class ChainDecoder(DecoderSession):
    """See `DecoderSession`. Its slots are the blocks of each row (`DecoderBatch.blocks`)."""

    def __init__(
        self, device: Device, folder: Path, part: Part, kv: KVLayout, options: LoadOptions
    ) -> None:
        assert part.chain is not None and kv.page_size is not None
        self._device, self._chain, self._kv, self._options = device, part.chain, kv, options
        self._page, self._columns = kv.page_size, -(-options.capacity // kv.page_size)
        self._inputs = inputs_of(part.inputs, self._columns)
        self._logits = next(spec for spec in part.outputs if spec.name == LOGITS)
        self._segments = {s.file: device.segment(folder / s.file) for s in part.chain.segments}
        self._loaded = device.kernels(
            _config(part.chain, kv), {n: folder / f for n, f in part.chain.kernels.items()}
        )
        self._tables = _tables(device, folder, part.chain)
        page_bytes = math.prod((kv.kv_heads, self._page, kv.head_dim)) * ITEM_BYTES[kv.dtype]
        self._page_bytes, self._pool_bytes = page_bytes, page_bytes * options.blocks
        self._pools = device.allocate(2 * kv.layers * self._pool_bytes)
        self._arena = device.allocate(max(map(self._arena_bytes, self._largest())))
        self._workspace = device.allocate(max(map(self._workspace_bytes, self._largest())))
        self._eager: OrderedDict[Size, _Frame] = OrderedDict()
        self._replayed: dict[Size, _Frame] = {}
        self._warm_up()

    # --- steps ---------------------------------------------------------------------------------

    @override
    def step(self, batch: DecoderBatch) -> FloatArray:
        frame = self._frame(_size(batch))
        self._fill(frame, batch)
        self._run(frame)
        wanted = (*batch.logits_indices.shape, int(self._logits.shape[-1]))
        if not frame.size.outputs:
            return np.empty(wanted, np.float32)
        offset = frame.arrangement.offsets[LOGITS]
        address = self._arena.address + offset
        logits = self._device.download(address, wanted, np.dtype(np.float32))
        # Tokens are chosen from a decoded step's at once; a prompt's may be kept for its end.
        return logits if frame.size.replayed else logits.copy()

    def likeliest(self, batch: DecoderBatch) -> IntArray:
        """See `LikeliestDecoder`."""
        if len(batch.slots) <= _FEW:
            return _largest(self.step(batch)[:, 0])
        frame = self._frame(_size(batch))
        self._fill(frame, batch)
        self._run(frame)
        address = self._arena.address + frame.arrangement.offsets[LIKELIEST.name]
        return self._device.download(address, (len(batch.input_ids),), np.dtype(np.int64))

    @override
    def move(self, move: Move) -> None:
        """Whole pages are copied, and none needs to be given back."""
        if not isinstance(move, Copy):
            return
        for pool in range(2 * self._kv.layers):
            start = self._pools.address + pool * self._pool_bytes
            source, target = (start + i * self._page_bytes for i in (move.source, move.target))
            self._device.copy(source, target, self._page_bytes)

    def _frame(self, asked: Size) -> _Frame:
        size = bucket(asked, self._options.slots, self._options.capacity)
        if size.replayed:
            if size not in self._replayed:
                self._replayed[size] = self._bound(size)
            return self._replayed[size]
        if size not in self._eager:
            self._eager[size] = self._bound(size)
        self._eager.move_to_end(size)
        if len(self._eager) > _EAGER_FRAMES:
            self._eager.popitem(last=False)
        return self._eager[size]

    def _fill(self, frame: _Frame, batch: DecoderBatch) -> None:
        """Put a batch into its frame; the rows that it does not have take part in nothing."""
        rows, tokens = batch.input_ids.shape
        views = frame.views
        given: dict[str, NDArray[Any]] = {
            INPUT_IDS.name: batch.input_ids,
            PAST_LENGTHS.name: batch.past_lengths,
            PAST.name: batch.past_lengths,
        }
        if frame.size.outputs:
            given[LOGITS_INDICES.name] = batch.logits_indices
        if batch.rotary_levels is not None:
            given[ROTARY_LEVELS.name] = batch.rotary_levels
        if batch.turns is not None:
            given[TURNS] = batch.turns
        for name, values in given.items():
            if name in views:
                views[name][:rows] = values
                views[name][rows:] = 0
        if batch.image_features is not None:
            views[IMAGE_FEATURES][:] = batch.image_features
        views[QUERY_LENGTHS.name][:] = 0
        views[QUERY_LENGTHS.name][:rows] = tokens
        table = views[BLOCK_TABLE.name]
        for row, blocks in enumerate(batch.blocks):
            held = blocks[: self._columns]
            table[row, : len(held)] = held

    def _run(self, frame: _Frame) -> None:
        self._device.upload(self._arena.address, frame.inputs)
        frame.work()
        frame.runs += 1
        if frame.size.replayed and frame.runs == 1:
            frame.work = self._device.captured(frame.work)

    def _warm_up(self) -> None:
        """Run the largest sizes once: what libraries allocate, they allocate now."""
        for size in self._largest():
            frame = self._bound(size)
            self._device.upload(self._arena.address, frame.inputs)  # zeros: no row has a token
            frame.work()

    # --- sizes ---------------------------------------------------------------------------------

    def _largest(self) -> tuple[Size, ...]:
        """No step needs more than the largest of these."""
        options = self._options
        chunk = min(options.chunk, options.capacity)
        return (
            Size(1, chunk, chunk, chunk, options.capacity),
            Size(options.slots, 1, 1, 1, options.capacity),
        )

    def _arena_bytes(self, size: Size) -> int:
        return arrange(self._chain, self._inputs, size).size

    def _workspace_bytes(self, size: Size) -> int:
        return max_workspace(self._shape(size), self._loaded.sizes, self._loaded.machine)

    def _shape(self, size: Size) -> Shape:
        call, rotary = self._chain.attention[0], self._chain.rotary
        total = min(size.total, self._columns * self._page)
        return Shape(
            batch=size.batch,
            max_query=size.tokens,
            max_total=total if rotary is None else min(total, rotary.positions),
            heads=call.heads,
            kv_heads=call.kv_heads,
            page_size=self._page,
            max_pages=self._columns,
            rotary=call.rotary,
            **({} if rotary is None else {"positions": rotary.positions}),
        )

    # --- binding -------------------------------------------------------------------------------

    def _bound(self, size: Size) -> _Frame:
        arrangement = arrange(self._chain, self._inputs, size)
        at = {n: self._arena.address + offset for n, offset in arrangement.offsets.items()}
        planned = plan(self._shape(size), self._loaded.sizes, self._loaded.machine)
        steps = self._steps(size)
        works = [self._step(step, size, at, planned) for step in steps]
        inputs = np.zeros(arrangement.uploaded, np.uint8)
        views = {spec.name: _view(inputs, spec, size, arrangement) for spec in self._inputs}
        return _Frame(size, arrangement, inputs, views, partial(_all, works))

    def _steps(self, size: Size) -> tuple[ChainStep, ...]:
        """Those that are of use: without logits, none behind the last attention."""
        if size.replayed and size.batch > _FEW:
            return self._chain.steps
        last = LOGITS if size.outputs else self._chain.attention[-1].out
        return self._chain.steps[: made_by(self._chain, last) + 1]

    def _step(self, step: ChainStep, size: Size, at: dict[str, int], planned: Plan) -> Work:
        if step.attention is not None:
            return self._attention(step.attention, size, at, planned)
        assert step.segment is not None

        def tensors(specs: tuple[TensorSpec, ...]) -> list[Tensor]:
            return [Tensor(s.name, s.dtype, size.shape(s), at[s.name]) for s in specs]

        loaded: Segment = self._segments[step.segment.file]
        return loaded.bind(tensors(step.segment.inputs), tensors(step.segment.outputs))

    def _attention(
        self, call: AttentionCall, size: Size, at: dict[str, int], planned: Plan
    ) -> Work:
        width = (call.heads + 2 * call.kv_heads) * call.head_dim
        query, key, value = (
            launcher.Rows(at[call.qkv] + 2 * head * call.head_dim, size.tokens * width, width)
            for head in (0, call.heads, call.heads + call.kv_heads)
        )
        out = call.heads * call.head_dim
        cos, sin = (memory.address for memory in self._tables) if self._tables else (0, 0)
        key_pool = self._pools.address + 2 * call.layer * self._pool_bytes
        tensors = launcher.Tensors(
            query=query,
            key=key,
            value=value,
            out=launcher.Rows(at[call.out], size.tokens * out, out),
            key_pool=key_pool,
            value_pool=key_pool + self._pool_bytes,
            pages=self._options.blocks,
            cos=cos if call.rotary else 0,
            sin=sin if call.rotary else 0,
            past_lengths=at[PAST.name],
            query_lengths=at[QUERY_LENGTHS.name],
            block_table=at[BLOCK_TABLE.name],
            workspace=self._workspace.address,
        )
        scales = launcher.Scales(call.scale, call.key_scale, call.value_scale)
        stream, kernels = self._device.stream, self._loaded.kernels
        return partial(launcher.run, planned, tensors, scales, kernels, stream)


def _largest(logits: FloatArray) -> IntArray:
    """Ids `[B]` of the largest of logits `[B, vocab_size]`; -1 where it is not finite."""
    ids = logits.argmax(-1)
    found = np.take_along_axis(logits, ids[:, None], -1)[:, 0]
    return np.where(np.isfinite(found), ids, -1)


def _all(works: list[Work]) -> None:
    for work in works:
        work()


def _size(batch: DecoderBatch) -> Size:
    (rows, tokens), outputs = batch.input_ids.shape, batch.logits_indices.shape[1]
    features = 1 if batch.image_features is None else len(batch.image_features)
    return Size(rows, tokens, outputs, features, int(batch.past_lengths.max()) + tokens)


def _view(
    inputs: NDArray[np.uint8], spec: TensorSpec, size: Size, arrangement: Arrangement
) -> NDArray[Any]:
    """The place of one input in all that is uploaded."""
    shape, dtype = size.shape(spec), np.dtype(_DTYPES[spec.dtype])
    begin = arrangement.offsets[spec.name]
    part: NDArray[Any] = inputs[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype)
    return part.reshape(shape)


def _config(chain: PartChain, kv: KVLayout) -> Config:
    """What the attention's kernels are specialised on."""
    call = chain.attention[0]
    specs = {s.name: s for segment in chain.segments for s in segment.outputs}
    return Config(call.head_dim, specs[call.qkv].dtype, kv.dtype)  # type: ignore[arg-type]


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
