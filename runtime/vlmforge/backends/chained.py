"""A decoder on the CPU that is a chain: ONNX Runtime's segments, and collectives between them.

Tensors stay where they are from one segment to the next. What lives at different times shares its
memory, which is laid out once from the chain.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge.backends import (
    Communicator,
    DecoderBatch,
    DecoderSession,
    FloatArray,
    KeyValues,
    LoadOptions,
)
from vlmforge.backends.dense import PlacedCache
from vlmforge.backends.ranks import all_gather, all_reduce
from vlmforge.backends.rows import Order
from vlmforge.engine import interface
from vlmforge.engine.chain import ChainStep, Collective, PartChain
from vlmforge.engine.manifest import KVLayout, Part
from vlmforge.engine.tensors import TensorSpec
from vlmforge.kv.cache import Move
from vlmforge.ort import ort, run_bound

_BOUND_LAYOUTS = 64
_MOST_ROOM = 1 << 18  # floats that ranks meet over at once: what is more goes in pieces
_CACHES = ("past_key.", "past_value.", "present_key.", "present_value.")
_DTYPES: Mapping[str, Any] = {"float32": np.float32, "int64": np.int64}

Array = NDArray[Any]
Work = Callable[[], None]
Dims = Mapping[str, int]
Allocate = Callable[[str, tuple[int, ...], Any], Array]
"""Memory by its name (see `shared_memory`), shape and dtype."""


class _Run(Struct, frozen=True):
    """A step of one size, bound: where its inputs go, what runs, where its logits are."""

    inputs: Mapping[str, Array]
    works: Sequence[Work]
    logits: FloatArray


class Meetings(Struct):
    """Where a chain meets the other ranks.

    Attributes:
        seconds: Spent so far, waiting for each other included.
    """

    ranks: Communicator
    seconds: float = 0.0

    def hold(self, call: Collective, values: FloatArray, out: FloatArray) -> None:
        """What all ranks give at `call`, into `out`."""
        begun = time.perf_counter()
        if call.kind == "all_reduce":
            all_reduce(self.ranks, values, out)
        elif values.size:
            unused = self.ranks.rank > 0 and call.out == interface.LOGITS
            all_gather(self.ranks, values, None if unused else out)
        self.seconds += time.perf_counter() - begun


class ChainedDecoder(DecoderSession):
    """The decoder part of one rank."""

    def __init__(
        self,
        part: Part,
        sessions: Mapping[str, ort.InferenceSession],
        kv: KVLayout,
        options: LoadOptions,
        ranks: Communicator,
        weights: Mapping[str, ort.OrtValue],
    ) -> None:
        """`sessions` are the segments', by their files; `weights` must live as long as they do."""
        assert part.chain is not None
        self._chain, self._sessions, self.meetings = part.chain, sessions, Meetings(ranks)
        self._weights = weights
        self._specs = tensors_of(part.chain, part.inputs, ranks.size)
        self._places = PlacedCache(kv, options.slots, options.capacity)
        self._inputs = [spec for spec in part.inputs if not spec.name.startswith(_CACHES)]
        self._memory_of = shared_memory(part.chain, self._specs)
        self._slots = options.slots
        self._kept: dict[str, Array] = {}
        self._bound: OrderedDict[tuple[int, int], _Run] = OrderedDict()

    @override
    def move(self, move: Move) -> None:
        self._places.move(move)

    @override
    def read(self, place: Sequence[int], tokens: int) -> KeyValues:
        return self._places.read(place, tokens)

    @override
    def write(self, place: Sequence[int], rows: KeyValues, start: int) -> None:
        self._places.write(place, rows, start)

    @override
    def step(self, batch: DecoderBatch) -> FloatArray:
        first_row, order = self._places.arrange(batch)
        run = self._run_for(first_row, batch)
        self._fill(run, batch, order)
        for work in run.works:
            work()
        logits = np.empty(run.logits.shape, np.float32)
        logits[order] = run.logits
        return logits

    def _run_for(self, first: int, batch: DecoderBatch) -> _Run:
        rows, tokens = batch.input_ids.shape
        outputs, features = batch.logits_indices.shape[1], batch.image_features
        if (tokens, outputs, features) == (1, 1, None):
            return self._token_run(first, rows)
        count = 1 if features is None else len(features)
        return self._bind(first, _dims(rows, tokens, count, outputs), _new)

    def _token_run(self, first: int, rows: int) -> _Run:
        """Of one token for each of the rows `first .. first + rows`; made once."""
        key = (first, rows)
        if key not in self._bound:
            self._bound[key] = self._bind(first, _dims(rows, 1, 1, 1), self._keep)
        self._bound.move_to_end(key)
        if len(self._bound) > _BOUND_LAYOUTS:
            self._bound.popitem(last=False)
        return self._bound[key]

    def _keep(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Memory for as many rows as there are slots, of which the first are given."""
        if name not in self._kept:
            whole = shape if name == interface.IMAGE_FEATURES else (self._slots, *shape[1:])
            self._kept[name] = np.zeros(whole, dtype)
        return self._kept[name][: shape[0]]

    def _fill(self, run: _Run, batch: DecoderBatch, order: Order) -> None:
        given = {
            interface.INPUT_IDS.name: batch.input_ids,
            interface.PAST_LENGTHS.name: batch.past_lengths,
            interface.LOGITS_INDICES.name: batch.logits_indices,
            interface.ROTARY_LEVELS.name: batch.rotary_levels,
            interface.TURNS: batch.turns,
        }
        for name, place in run.inputs.items():
            values = given.get(name)
            if values is not None:
                place[:] = values[order]
            elif name == interface.IMAGE_FEATURES:
                features = batch.image_features
                place[:] = 0.0 if features is None else np.asarray(features)

    def _bind(self, first: int, dims: Dims, allocate: Allocate) -> _Run:
        arrays: dict[str, Array] = {}
        memory: dict[str, Array] = {}
        for spec in self._specs.values():
            shape = tuple(dims[n] if isinstance(n, str) else n for n in spec.shape)
            name = self._memory_of.get(spec.name, spec.name)
            if name not in memory:
                memory[name] = allocate(name, shape, _DTYPES[spec.dtype])
            arrays[spec.name] = memory[name]
        caches = dict(self._places.rows(first, dims[interface.BATCH]))
        works = [self._work(step, arrays, caches) for step in self._chain.steps]
        inputs = {spec.name: arrays[spec.name] for spec in self._inputs}
        return _Run(inputs, works, arrays[interface.LOGITS])

    def _work(
        self, step: ChainStep, arrays: Mapping[str, Array], caches: Mapping[str, FloatArray]
    ) -> Work:
        if step.collective is not None:
            call = step.collective
            return partial(self.meetings.hold, call, arrays[call.tensor], arrays[call.out])
        assert step.segment is not None
        session = self._sessions[step.segment.file]
        binding = session.io_binding()
        for spec in step.segment.inputs:
            if spec.name in caches:
                value = ort.OrtValue.ortvalue_from_numpy(caches[spec.name])
                binding.bind_ortvalue_input(spec.name, value)
                binding.bind_ortvalue_output(interface.present_of(spec.name), value)
            else:
                binding.bind_cpu_input(spec.name, arrays[spec.name])
        for spec in step.segment.outputs:
            if spec.name in arrays:
                value = ort.OrtValue.ortvalue_from_numpy(arrays[spec.name])
                binding.bind_ortvalue_output(spec.name, value)
        return partial(run_bound, session, binding)


def tensors_of(
    chain: PartChain, inputs: Sequence[TensorSpec], size: int
) -> Mapping[str, TensorSpec]:
    """All tensors of a chain of `size` ranks but the caches, by name."""
    known = {spec.name: spec for spec in inputs if not spec.name.startswith(_CACHES)}
    for step in chain.steps:
        if step.segment is not None:
            outputs = step.segment.outputs
            known |= {s.name: s for s in outputs if not s.name.startswith(_CACHES)}
        elif step.collective is not None:
            given, name = known[step.collective.tensor], step.collective.out
            shape = given.shape
            if step.collective.kind == "all_gather":
                assert isinstance(shape[-1], int)
                shape = (*shape[:-1], step.collective.width or shape[-1] * size)
            known[name] = TensorSpec(name, given.dtype, shape)
    return known


def shared_memory(chain: PartChain, specs: Mapping[str, TensorSpec]) -> Mapping[str, str]:
    """Names of memory by those of the tensors that steps give.

    Two tensors of one shape have the same where the later one is made after the earlier one's last
    use. Logits have their own.
    """
    last = {name: at for at, step in enumerate(chain.steps) for name in step.taken}
    free: dict[object, list[str]] = {}
    memory: dict[str, str] = {}
    for at, step in enumerate(chain.steps):
        for name in sorted(step.given & specs.keys()):
            spec = specs[name]
            left = free.get((spec.dtype, spec.shape), [])
            reused = left and name != interface.LOGITS
            memory[name] = left.pop() if reused else f"memory.{len(memory)}"
        for name in sorted((step.taken | step.given) & memory.keys()):
            if last.get(name, at) <= at and name != interface.LOGITS:
                spec = specs[name]
                free.setdefault((spec.dtype, spec.shape), []).append(memory[name])
    return memory


def room_of(part: Part, tokens: int, size: int) -> int:
    """Floats that `size` ranks may give at once, for steps of at most so many tokens."""
    assert part.chain is not None
    specs, dims = tensors_of(part.chain, part.inputs, size), _dims(1, tokens, 1, 1)
    given = [specs[call.tensor].shape for call in part.chain.collectives]
    most = max(math.prod(dims[n] if isinstance(n, str) else n for n in shape) for shape in given)
    row = max(n for shape in given for n in shape[-1:] if isinstance(n, int))
    return max(row, min(most, _MOST_ROOM))


def _dims(rows: int, tokens: int, features: int, outputs: int) -> Dims:
    return {
        interface.BATCH: rows,
        interface.TOKENS: tokens,
        interface.ROWS: features,
        interface.OUTPUTS: outputs,
    }


def _new(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    del name
    return np.empty(shape, dtype)
