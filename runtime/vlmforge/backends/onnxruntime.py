"""ONNX Runtime on CPU.

The memory of an engine is its weights once: either packed for the matrix kernels, or mapped from
the data file as they are. The graph reads and writes the key/value cache in place (`DenseCache`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge import limits
from vlmforge.backends import (
    Backend,
    Communicator,
    DecoderBatch,
    DecoderSession,
    FloatArray,
    IntArray,
    KeyValues,
    LoadOptions,
    VisionSession,
    WholeBackend,
)
from vlmforge.backends.choice import likeliest_ids
from vlmforge.backends.dense import PlacedCache
from vlmforge.backends.rows import Order
from vlmforge.engine import interface
from vlmforge.engine.images.patch_inputs import NO_ARRAYS, Arrays
from vlmforge.engine.manifest import KVLayout, Manifest, Part, decoder_name
from vlmforge.errors import EngineError
from vlmforge.kv.cache import Move
from vlmforge.limits import return_freed_memory
from vlmforge.ort import ort, run_bound

PROVIDER = "CPUExecutionProvider"
_KEPT_LAYOUTS = 256
_LOOKING_US = 60_000
"""Microseconds for which the decoder's threads look for more before they sleep. After few, they
sleep within a burst. After up to 30,000 they mostly fell asleep on the processor on which the
runtime's own thread wakes up next: with two processors, the next prompt's first step waited a
millisecond for it, or four."""
_LOOKING_BEHIND_IMAGES_US = 50
"""The same of the vision part's: about as long as between two operations of one run. What follows
are the decoder's steps, and with 60,000 those of the first 60 ms shared a processor with a thread
that was looking: a small model's took twice as long. With 500 the prompt's own step still did."""
_NO_MORE: Mapping[str, NDArray[Any]] = MappingProxyType({})


def _session(
    path: Path,
    part: Part,
    options: LoadOptions,
    dtype: str,
    weights: Mapping[str, ort.OrtValue] = MappingProxyType({}),
) -> ort.InferenceSession:
    """`weights` take the place of those of the file; they must live as long as the session."""
    settings = ort.SessionOptions()
    for name, value in weights.items():
        settings.add_initializer(name, value)
    settings.intra_op_num_threads = options.threads or limits.physical_cores()
    settings.inter_op_num_threads = 1
    if part.chain is not None:  # threads of one segment that wait would hold up those of the next
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    else:
        looking = _LOOKING_BEHIND_IMAGES_US if part.name == "vision" else _LOOKING_US
        settings.add_session_config_entry("session.intra_op.spin_duration_us", str(looking))
    settings.log_severity_level = 3
    if not options.pack:
        settings.add_session_config_entry("session.disable_prepacking", "1")
    if not options.pack and dtype != "float32":
        # Widen each weight just before its use: optimisations would widen all of them at load, and
        # the default order runs what depends on no input first, which is the same.
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    settings.enable_cpu_mem_arena = False
    settings.enable_mem_pattern = False
    try:
        session = ort.InferenceSession(path, settings, providers=[PROVIDER])
    except Exception as error:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot load {path}.",
            found=str(error).strip().splitlines()[0],
            expected=f"the part {part.name!r} as build-engine wrote it",
            fix="vlmforge doctor, then rebuild: build-engine CHECKPOINT -o ENGINE --force",
        ) from error
    return_freed_memory()  # of what was packed or widened: else it is still held while others load
    return session


def _longer_tables(manifest: Manifest, part: Part, capacity: int) -> Mapping[str, ort.OrtValue]:
    """Rotary tables for a longer window than the engine was built for, by their weights' names."""
    decode = manifest.decode
    if capacity <= decode.session_len or part.rotary_tables is None:
        return {}
    made = decode.positions.longer_tables(capacity)
    if made is None:
        return {}
    values = map(ort.OrtValue.ortvalue_from_numpy, made)
    return dict(zip(part.rotary_tables, values, strict=True))


class _Vision(VisionSession):
    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session

    @override
    def encode(self, pixel_values: FloatArray, arrays: Arrays = NO_ARRAYS) -> FloatArray:
        (features,) = self._session.run(None, {interface.PIXEL_VALUES: pixel_values, **arrays})
        return np.asarray(features, np.float32)


class _TokenSteps:
    """What steps of one token for each row give and take: arrays that stay where they are.

    Binding a step anew takes as long as a small decoder's arithmetic.
    """

    def __init__(self, session: ort.InferenceSession, rows: int) -> None:
        inputs = {item.name: item for item in session.get_inputs()}
        outputs = {item.name: item for item in session.get_outputs()}
        self._session = session
        self._ids, self._lengths = np.zeros((rows, 1), np.int64), np.zeros(rows, np.int64)
        self._inputs: dict[str, NDArray[Any]] = {
            interface.INPUT_IDS.name: self._ids,
            interface.PAST_LENGTHS.name: self._lengths,
            interface.LOGITS_INDICES.name: np.zeros((rows, 1), np.int64),
        }
        self._more = {interface.ROTARY_LEVELS.name, interface.TURNS} & inputs.keys()
        if interface.ROTARY_LEVELS.name in inputs:
            self._inputs[interface.ROTARY_LEVELS.name] = np.zeros(rows, np.int64)
        if interface.TURNS in inputs:
            width = inputs[interface.TURNS].shape[2]
            self._inputs[interface.TURNS] = np.zeros((rows, 1, width), np.float32)
        self.no_features = np.zeros((1, inputs[interface.IMAGE_FEATURES].shape[1]), np.float32)
        self.logits = np.zeros((rows, 1, outputs[interface.LOGITS].shape[2]), np.float32)

    def bind(self, rows: int) -> ort.IOBinding:
        """The first `rows` rows of all arrays; the caches are still to be bound."""
        binding = self._session.io_binding()
        binding.bind_cpu_input(interface.IMAGE_FEATURES, self.no_features)
        for name, array in self._inputs.items():
            binding.bind_cpu_input(name, array[:rows])
        logits = ort.OrtValue.ortvalue_from_numpy(self.logits[:rows])
        binding.bind_ortvalue_output(interface.LOGITS, logits)
        return binding

    def take(self, batch: DecoderBatch, order: Order) -> bool:
        """Whether it is such a step, and its arrays are taken over."""
        rows, length = batch.input_ids.shape
        if length != 1 or batch.image_features is not None:
            return False
        more = _more_inputs(batch)
        if more.keys() != self._more:
            return False
        self._ids[:rows] = batch.input_ids[order]
        self._lengths[:rows] = batch.past_lengths[order]
        for name, values in more.items():
            self._inputs[name][:rows] = values[order]
        return True


def _more_inputs(batch: DecoderBatch) -> Mapping[str, NDArray[Any]]:
    """What only some position policies give, by name."""
    if batch.rotary_levels is None and batch.turns is None:  # mostly
        return _NO_MORE
    given = {interface.ROTARY_LEVELS.name: batch.rotary_levels, interface.TURNS: batch.turns}
    return {name: values for name, values in given.items() if values is not None}


class _Layout(Struct):
    """Some rows of the cache that lie side by side, as a session takes them; made once."""

    rows: tuple[tuple[str, ort.OrtValue], ...]  # by the name of what is past
    one_token: ort.IOBinding | None = None
    prompt: ort.IOBinding | None = None

    def bind(self, binding: ort.IOBinding) -> None:
        """What is written goes where what was read lies."""
        for past, value in self.rows:
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(interface.present_of(past), value)


class _Decoder(DecoderSession):
    def __init__(
        self,
        session: ort.InferenceSession,
        kv: KVLayout,
        options: LoadOptions,
        weights: Mapping[str, ort.OrtValue],
    ) -> None:
        self._session = session
        self._weights = weights  # the session refers to them
        self._places = PlacedCache(kv, options.slots, options.capacity)
        self._tokens = _TokenSteps(session, options.slots)
        self._layouts: OrderedDict[tuple[int, int], _Layout] = OrderedDict()

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
        given, order = self._run(batch)
        # Copied: what comes may be a view of memory that goes with the binding, or is used again.
        logits = np.empty(given.shape, np.float32)
        logits[order] = given
        return logits

    def likeliest(self, batch: DecoderBatch) -> IntArray:
        """See `LikeliestDecoder`."""
        given, order = self._run(batch)
        ids = np.empty(len(given), np.int64)
        ids[order] = likeliest_ids(given[:, 0])
        return ids

    def _run(self, batch: DecoderBatch) -> tuple[FloatArray, Order]:
        """The logits as they lie in the cache's rows, of use until the next step, and the order."""
        first_row, order = self._places.arrange(batch)
        rows = len(batch.input_ids)
        layout = self._layout(first_row, rows)
        if batch.logits_indices.shape[1] != 1:
            given = self._run_anew(layout, batch, order)
        elif self._tokens.take(batch, order):
            run_bound(self._session, self._token_binding(layout, rows))
            given = self._tokens.logits[:rows]
        else:
            self._run_prompt(layout, batch, order)
            given = self._tokens.logits[:rows]
        return given, order

    def _run_anew(self, layout: _Layout, batch: DecoderBatch, order: Order) -> FloatArray:
        """Any number of logits for each row; `order`: of the batch's rows in the cache."""
        binding = self._session.io_binding()
        layout.bind(binding)
        binding.bind_output(interface.LOGITS, "cpu")
        self._bind_inputs(binding, batch, order)
        run_bound(self._session, binding)
        found: FloatArray = binding.get_outputs()[-1].numpy()
        return found

    def _run_prompt(self, layout: _Layout, batch: DecoderBatch, order: Order) -> None:
        """Several tokens for each row, and the logits after one of them, where `_tokens` has them.

        What does not change from one prompt to the next is bound once.
        """
        if layout.prompt is None:
            layout.prompt = self._tokens.bind(len(batch.input_ids))
            layout.bind(layout.prompt)
        self._bind_inputs(layout.prompt, batch, order)
        run_bound(self._session, layout.prompt)
        if batch.image_features is not None:  # let them go
            layout.prompt.bind_cpu_input(interface.IMAGE_FEATURES, self._tokens.no_features)

    def _bind_inputs(self, binding: ort.IOBinding, batch: DecoderBatch, order: Order) -> None:
        features = batch.image_features
        inputs = {
            interface.INPUT_IDS.name: batch.input_ids,
            interface.PAST_LENGTHS.name: batch.past_lengths,
            interface.LOGITS_INDICES.name: batch.logits_indices,
            **_more_inputs(batch),
        }
        if features is None:
            features = self._tokens.no_features
        binding.bind_cpu_input(interface.IMAGE_FEATURES, np.ascontiguousarray(features))
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value[order]))

    def _token_binding(self, layout: _Layout, rows: int) -> ort.IOBinding:
        """Of one token for each of the layout's rows; made once."""
        if layout.one_token is None:
            layout.one_token = self._tokens.bind(rows)
            layout.bind(layout.one_token)
        return layout.one_token

    def _layout(self, first: int, count: int) -> _Layout:
        """The rows `first .. first + count`; those that were used last are kept."""
        key = (first, count)
        if key not in self._layouts:
            rows = self._places.rows(first, count)
            self._layouts[key] = _Layout(
                tuple((past, ort.OrtValue.ortvalue_from_numpy(array)) for past, array in rows)
            )
        self._layouts.move_to_end(key)
        if len(self._layouts) > _KEPT_LAYOUTS:
            self._layouts.popitem(last=False)
        return self._layouts[key]


def _started(work: Callable[[], None]) -> threading.Thread | None:
    """A thread that does it; None: there can be no more threads, as when Python is ending."""
    thread = threading.Thread(target=work, name="vlmforge-load")
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


class OnnxRuntimeBackend(Backend, WholeBackend):
    """See the module."""

    @override
    def load_parts(
        self, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> tuple[VisionSession, DecoderSession]:
        decoder: Future[DecoderSession] = Future()

        def load() -> None:
            try:
                decoder.set_result(self.load_decoder(folder, manifest, options))
            except BaseException as error:  # noqa: BLE001 - it is raised by whoever asks
                decoder.set_exception(error)

        # Reading and packing take one thread each. Where memory is short, what one part takes while
        # it loads goes back before the other does.
        beside = _started(load) if options.pack else None
        try:
            vision = self.load_vision(folder, manifest, options)
        except Exception:
            if beside is not None:
                beside.join()  # or it would still take memory behind the error
            raise
        if beside is None:
            load()
        return vision, decoder.result()

    @override
    def load_vision(self, folder: Path, manifest: Manifest, options: LoadOptions) -> VisionSession:
        part = manifest.part("vision")
        return _Vision(_session(folder / part.file, part, options, manifest.dtype))

    @override
    def load_decoder(
        self, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> DecoderSession:
        part = manifest.part("decoder")
        weights = _longer_tables(manifest, part, options.capacity)
        session = _session(folder / part.file, part, options, manifest.dtype, weights)
        return _Decoder(session, manifest.kv, options, weights)

    @override
    def load_rank(
        self, folder: Path, manifest: Manifest, options: LoadOptions, ranks: Communicator
    ) -> DecoderSession:
        from vlmforge.backends.chained import ChainedDecoder  # an engine of one rank needs none

        part = manifest.part(decoder_name(ranks.rank))
        assert part.chain is not None
        weights = _longer_tables(manifest, part, options.capacity)
        sessions = {
            segment.file: _session(folder / segment.file, part, options, manifest.dtype, weights)
            for segment in part.chain.segments
        }
        return ChainedDecoder(part, sessions, manifest.rank_kv, options, ranks, weights)

    @override
    def memory(self, devices: Sequence[int] = (0,)) -> None:
        return None

    @override
    def check(self) -> None:
        """Importing the library was the check."""

    @override
    def versions(self) -> Sequence[tuple[str, str]]:
        return (("onnxruntime", ort.__version__),)


BACKEND = OnnxRuntimeBackend()
