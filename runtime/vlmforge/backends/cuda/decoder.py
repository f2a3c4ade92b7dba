"""A decoder over a pool of pages: `DecoderSession` on a `Device`, for chains and for plans.

Prompts run eagerly; a step of decoding is captured once for each of a few sizes and replayed.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge.backends import DecoderBatch, DecoderSession, FloatArray, IntArray, LoadOptions
from vlmforge.backends.choice import (
    FIRST_TOKENS,
    Begun,
    Choice,
    Found,
    Picked,
    T_co,
    likeliest_ids,
)
from vlmforge.backends.cuda.choosing import TokenSampler
from vlmforge.backends.cuda.device import Arriving, Device, Mark, MeetingPlace, Work
from vlmforge.backends.cuda.frames import Arrangement, Size, bucket, largest, most_tokens
from vlmforge.backends.cuda.inputs import each_token, first_places, new_tokens, put, runs, totals
from vlmforge.backends.cuda.program import FEW, Program, Span, make_pools
from vlmforge.backends.features import DeviceRows
from vlmforge.backends.number_formats import DTYPES, encode
from vlmforge.engine.interface import (
    BLOCK_TABLE,
    IMAGE_FEATURES,
    INPUT_IDS,
    LIKELIEST,
    LOGITS,
)
from vlmforge.engine.manifest import KVLayout
from vlmforge.engine.tensors import TensorSpec
from vlmforge.kv.cache import Copy, Move

_EAGER_FRAMES = 16


class _Frame(Struct):
    """A step of one size: where its inputs are put, and what runs it."""

    size: Size
    arrangement: Arrangement
    inputs: NDArray[np.uint8]  # all that is uploaded
    views: dict[str, NDArray[Any]]  # of `inputs`, by name
    work: Work
    spans: list[Span]  # of the step that was put into it last, where that is packed
    runs: int = 0


@dataclass(slots=True)
class BegunStep(Begun[T_co]):
    """See `Begun`.

    Attributes:
        start: When the device began it.
        arriving: What was found.
        read: What is made of that.
    """

    start: Mark
    arriving: Arriving
    read: Callable[[NDArray[np.uint8]], T_co]
    seconds: float = 0.0

    @override
    def wait(self) -> T_co:
        raw = self.arriving.wait()
        self.seconds = self.arriving.end.since(self.start)
        return self.read(raw)


class PagedDecoder(DecoderSession):
    """See `DecoderSession`. Its slots are the blocks of each row (`DecoderBatch.blocks`).

    Args:
        device: Runs it.
        program: What is run.
        kv: Its cache.
        vocab_size: Logits of a token.
        options: How to load it.
        sampler: Chooses tokens; None: the host does, or another rank.
        place: Where it meets the other ranks; None: there are none.
    """

    def __init__(
        self,
        device: Device,
        program: Program,
        kv: KVLayout,
        vocab_size: int,
        options: LoadOptions,
        sampler: TokenSampler | None = None,
        place: MeetingPlace | None = None,
    ) -> None:
        self._sampler, self.chooses = sampler, sampler is not None
        self._device, self._program, self._options = device, program, options
        self._place, self._shared = place, dict[tuple[int, int, int], Work]()
        self._vocab_size = vocab_size
        self._pools = make_pools(device, kv, options.blocks)
        # Of several prompts at once, what is for each row lies beside what is for each token.
        most = [program.arrange(self._fitted(size)) for size in largest(options)]
        self._room = max(one.size for one in most) + max(one.uploaded for one in most)
        self._arena = device.allocate(self._room)
        # The tokens of the step begun last, and behind them those of the prompts begun last.
        self._chosen = device.allocate(2 * 8 * options.slots)
        self._eager: OrderedDict[Size, _Frame] = OrderedDict()
        self._replayed: dict[Size, _Frame] = {}
        self._warm_up()

    # --- steps ---------------------------------------------------------------------------------

    @override
    def step(self, batch: DecoderBatch) -> FloatArray:
        if self._takes_several(batch):
            return self._token_by_token(batch)
        wanted = batch.logits_indices.shape
        frame = self._filled(batch)
        self._run(frame, batch)
        shape = (*wanted, self._vocab_size)
        if not wanted[1]:
            return np.empty(shape, np.float32)
        logits = self._device.download(self._at(frame, LOGITS), shape, np.dtype(np.float32))
        # Tokens are chosen from a decoded step's at once; a prompt's may be kept for its end.
        return logits if frame.size.replayed else logits.copy()

    def follow(self, batch: DecoderBatch) -> None:
        """See `FollowingDecoder`."""
        if self._takes_several(batch):
            for one in each_token(batch):
                self.follow(one)
            return
        self._run(self._filled(batch), batch)

    def _takes_several(self, batch: DecoderBatch) -> bool:
        """Whether it takes several steps: the program gives fewer logits in one."""
        outputs = self._program.outputs
        return outputs is not None and batch.logits_indices.shape[1] > outputs

    def _token_by_token(self, batch: DecoderBatch) -> FloatArray:
        """The logits after several tokens, of a program that gives fewer of them in a step."""
        found = np.concatenate([self.step(one).copy() for one in each_token(batch)], axis=1)
        return np.take_along_axis(found, batch.logits_indices[..., None], axis=1)

    def likeliest(self, batch: DecoderBatch) -> IntArray:
        """See `LikeliestDecoder`."""
        if not self.can_begin(len(batch.slots), None):
            return likeliest_ids(self.step(batch)[:, 0])
        return np.array(self.begin(batch, None, _none(batch)).wait(), np.int64)

    def choose(
        self, batch: DecoderBatch, choices: Sequence[Choice | None]
    ) -> Sequence[Picked | FloatArray]:
        """See `ChoosingDecoder`."""
        found, logits = self.begin(batch, choices, _none(batch)).wait(), self._logits(batch)
        return [
            one if isinstance(one, Picked) else self._row(logits, row)
            for row, one in enumerate(found)
        ]

    def _logits(self, batch: DecoderBatch) -> int:
        """Where those of a step of decoding are."""
        return self._at(self._frame(self._size(batch)), LOGITS)

    def can_begin(self, rows: int, choices: Sequence[Choice] | None) -> bool:
        """See `OverlappingDecoder`."""
        if choices is None:
            return self._program.gives_likeliest and (not rows or rows > FEW)
        return self._sampler is not None and all(map(self._sampler.takes, choices))

    def begin(
        self, batch: DecoderBatch, choices: Sequence[Choice | None] | None, ahead: IntArray
    ) -> BegunStep[Sequence[Picked | np.int64 | None]]:
        """See `OverlappingDecoder`."""
        device, start = self._device, self._device.mark()
        rows, frame = len(batch.slots), self._run_behind(batch, ahead)
        if choices is None:
            self._keep_likeliest(frame, rows, 0)
            return BegunStep(start, device.fetch(self._chosen.address, 8 * rows), _ids)
        assert self._sampler is not None
        count, again = frame.size.sequences, frame.size.replayed
        prepared = self._sampler.prepare(count, self._at(frame, LOGITS), choices, again=again)
        for row, source in enumerate(ahead):
            if source >= 0:
                self._sampler.tell(prepared, row, choices[row], self._source(int(source)))
        self._keep_chosen(self._sampler.run(prepared), rows, 0)
        read = partial(self._sampler.read, prepared, choices)
        return BegunStep(start, self._sampler.fetch(prepared, choices), read)

    def _source(self, ahead: int) -> int:
        """Where the token of a row of what was begun last is (see `OverlappingDecoder.begin`)."""
        slots = self._options.slots
        row = ahead if ahead < FIRST_TOKENS else slots + ahead - FIRST_TOKENS
        return self._chosen.address + 8 * row

    def begin_prompts(self, batch: DecoderBatch) -> BegunStep[Sequence[FloatArray]]:
        """See `OverlappingDecoder`."""
        start, shape = self._device.mark(), (*batch.logits_indices.shape, self._vocab_size)
        frame = self._filled(batch)
        self._run(frame, batch)
        arriving = self._device.fetch(self._at(frame, LOGITS), 4 * math.prod(shape))
        return BegunStep(start, arriving, lambda raw: list(raw.view(np.float32).reshape(shape)))

    def begin_first(
        self, batch: DecoderBatch, choices: Sequence[Choice | None] | None
    ) -> BegunStep[Sequence[Found]]:
        """See `FirstTokenDecoder`."""
        device, start = self._device, self._device.mark()
        rows, frame = len(batch.slots), self._filled(batch)
        self._run(frame, batch)
        logits, chosen = self._at(frame, LOGITS), self._source(FIRST_TOKENS)
        if choices is None:
            self._keep_likeliest(frame, rows, FIRST_TOKENS)
            return BegunStep(start, device.fetch(chosen, 8 * rows), _ids)
        sampler = self._sampler
        assert sampler is not None
        prepared = sampler.prepare(frame.size.sequences, logits, choices, again=False)
        self._keep_chosen(sampler.run(prepared), rows, FIRST_TOKENS)
        # They are few, and another step lies over them soon: all that the host may need of them.
        kept = device.fetch(logits, 4 * rows * self._vocab_size)

        def read(raw: NDArray[np.uint8]) -> Sequence[Found]:
            values = kept.wait().view(np.float32).reshape(rows, 1, self._vocab_size)
            found = sampler.read(prepared, choices, raw)
            return [values[row] if one is None else one for row, one in enumerate(found)]

        return BegunStep(start, sampler.fetch(prepared, choices), read)

    def follow_tokens(self, batch: DecoderBatch, ahead: IntArray, *, chosen: bool) -> None:
        """See `FollowingDecoder`."""
        self._keep(self._run_behind(batch, ahead), len(batch.slots), 0, chosen)

    def follow_first(self, batch: DecoderBatch, *, chosen: bool) -> None:
        """See `FollowingDecoder`."""
        frame = self._filled(batch)
        self._run(frame, batch)
        self._keep(frame, len(batch.slots), FIRST_TOKENS, chosen)

    def _run_behind(self, batch: DecoderBatch, ahead: IntArray) -> _Frame:
        """Enqueue a step of decoding, whose input may be what was kept of what is before it."""
        frame = self._filled(batch)
        self._upload(frame, batch)
        inputs, firsts = self._at(frame, INPUT_IDS.name), first_places(batch)
        for row, source, count in runs(ahead):
            self._device.copy(self._source(source), inputs + 8 * int(firsts[row]), 8 * count)
        self._work(frame)
        return frame

    def _keep(self, frame: _Frame, rows: int, first: int, chosen: bool) -> None:
        """What the first rank keeps, on another one."""
        if chosen:
            self._keep_chosen(self._source(first), rows, first)
        else:
            self._keep_likeliest(frame, rows, first)

    def _keep_likeliest(self, frame: _Frame, rows: int, first: int) -> None:
        """Another size may lie over these tokens, before its inputs are there."""
        self._device.copy(self._at(frame, LIKELIEST.name), self._source(first), 8 * rows)

    def _keep_chosen(self, chosen: int, rows: int, first: int) -> None:
        """Tokens that the first rank has chosen, on all ranks; `first` as of `_source`."""
        target = self._source(first)
        if self._place is None:
            self._device.copy(chosen, target, 8 * rows)
            return
        key = chosen, target, rows
        if key not in self._shared:
            self._shared[key] = self._place.broadcast(*key)
        self._shared[key]()

    def _row(self, logits: int, row: int) -> FloatArray:
        """The logits of one row."""
        address, shape = logits + 4 * row * self._vocab_size, (self._vocab_size,)
        return self._device.download(address, shape, np.dtype(np.float32)).copy()

    @override
    def move(self, move: Move) -> None:
        """Whole pages are copied, and none needs to be given back."""
        if isinstance(move, Copy):
            self._pools.copy(self._device, move.source, move.target)

    def _at(self, frame: _Frame, name: str) -> int:
        return self._arena.address + frame.arrangement.offsets[name]

    def _size(self, batch: DecoderBatch) -> Size:
        (rows, tokens), outputs = batch.input_ids.shape, batch.logits_indices.shape[1]
        features = 1 if batch.image_features is None else len(batch.image_features)
        size = Size(rows, tokens, outputs, features, int(totals(batch).max()))
        if size.replayed or not self._options.packs:
            return size
        tokens = int(new_tokens(batch).sum())
        return structs.replace(size, batch=1, tokens=tokens, outputs=rows * outputs, packed=rows)

    def _frame(self, asked: Size) -> _Frame:
        options = self._options
        size = bucket(asked, options.slots, options.capacity, most_tokens(options))
        size = self._fitted(size)
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

    def _fitted(self, size: Size) -> Size:
        outputs = self._program.outputs
        return size if outputs is None else structs.replace(size, outputs=outputs)

    def _filled(self, batch: DecoderBatch) -> _Frame:
        """The frame of a batch, with it in; the rows that it does not have take part in nothing."""
        frame = self._frame(self._size(batch))
        views = frame.views
        put(views, batch, packed=bool(frame.size.packed))
        features = batch.image_features
        if features is not None and not isinstance(features, DeviceRows):
            dtype = next(s.dtype for s in self._program.inputs(frame.size) if _is_features(s))
            taken = encode(features, dtype) if dtype in DTYPES else features
            views[IMAGE_FEATURES][: len(taken)] = taken
        table = views[BLOCK_TABLE.name]
        for row, blocks in enumerate(batch.blocks):
            held = blocks[: table.shape[1]]
            table[row, : len(held)] = held
        frame.spans[:] = map(Span, new_tokens(batch).tolist(), totals(batch).tolist())
        return frame

    def _upload(self, frame: _Frame, batch: DecoderBatch) -> None:
        """Have what is in a frame where the step takes it; features from where they are."""
        features, device = batch.image_features, self._device
        if not isinstance(features, DeviceRows):
            device.upload(self._arena.address, frame.inputs)
            return
        # They are the last of the inputs, of chains.
        begin = frame.arrangement.offsets[IMAGE_FEATURES]
        device.upload(self._arena.address, frame.inputs[:begin])
        at = self._arena.address + begin
        for run in features.runs:
            device.copy(run.address, at, run.nbytes)
            at += run.nbytes

    def _run(self, frame: _Frame, batch: DecoderBatch) -> None:
        self._upload(frame, batch)
        self._work(frame)

    def _work(self, frame: _Frame) -> None:
        frame.work()
        frame.runs += 1
        if frame.size.replayed and frame.runs == 1:
            frame.work = self._device.captured(frame.work)

    def _warm_up(self) -> None:
        """Run the largest sizes once: what libraries allocate, they allocate now."""
        for size in map(self._fitted, largest(self._options)):
            frame = self._bound(size)
            self._device.upload(self._arena.address, frame.inputs)  # zeros: no row has a token
            frame.work()

    def _bound(self, size: Size) -> _Frame:
        specs, arrangement = self._program.inputs(size), self._program.arrange(size)
        assert arrangement.size <= self._room, f"{size} takes {arrangement.size} bytes"
        at = {n: self._arena.address + offset for n, offset in arrangement.offsets.items()}
        spans = list[Span]()
        work = self._program.bind(size, at, self._pools, spans)
        inputs = np.zeros(arrangement.uploaded, np.uint8)
        views = {spec.name: arrangement.view(inputs, spec, size.dims) for spec in specs}
        return _Frame(size, arrangement, inputs, views, work, spans)


def _is_features(spec: TensorSpec) -> bool:
    return spec.name == IMAGE_FEATURES


def _ids(raw: NDArray[np.uint8]) -> Sequence[np.int64]:
    return list(raw.view(np.int64))


def _none(batch: DecoderBatch) -> IntArray:
    """All tokens of the batch stand in it."""
    return np.full(len(batch.slots), -1, np.int64)
