"""ONNX Runtime on CPU.

The memory of an engine is its weights once: either packed for the matrix kernels, or mapped from
the data file as they are. The graph reads and writes the key/value cache in place (`DenseCache`).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import override

from vlmforge.backends import (
    Backend,
    DecoderBatch,
    DecoderSession,
    FloatArray,
    KeyValues,
    LoadOptions,
    VisionSession,
)
from vlmforge.backends.dense import DenseCache
from vlmforge.backends.rows import Rows
from vlmforge.engine.manifest import KVLayout, Manifest, Part
from vlmforge.errors import EngineError
from vlmforge.kv.cache import Copy, Move
from vlmforge.limits import available_cpus
from vlmforge.ort import ort
from vlmforge.runner import interface

PROVIDER = "CPUExecutionProvider"
_BOUND_LAYOUTS = 256


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once; no more than its quota of time.

    Falls back to the number of usable logical processors where the topology is not published.
    """
    allowed = available_cpus()
    cores = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text("ascii").strip())
        except OSError:
            return allowed
    return min(len(cores) or allowed, allowed)


def _session(path: Path, part: Part, options: LoadOptions, dtype: str) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads or physical_cores()
    settings.inter_op_num_threads = 1
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
        return ort.InferenceSession(path, settings, providers=[PROVIDER])
    except Exception as error:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot load {path}.",
            found=str(error).strip().splitlines()[0],
            expected=f"the part {part.name!r} as build-engine wrote it",
            fix="vlmforge doctor, then rebuild: build-engine CHECKPOINT -o ENGINE --force",
        ) from error


@dataclass(frozen=True, slots=True)
class _Vision(VisionSession):
    session: ort.InferenceSession

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        (features,) = self.session.run(None, {interface.PIXEL_VALUES: pixel_values})
        return np.asarray(features, np.float32)


class _Decoder(DecoderSession):
    def __init__(self, session: ort.InferenceSession, kv: KVLayout, options: LoadOptions) -> None:
        self._session = session
        self._cache = DenseCache(kv, options.slots, options.capacity)
        self._rows = Rows(options.slots)
        self._hidden = self._feature_width()
        self._bound: OrderedDict[tuple[int, int], dict[str, ort.OrtValue]] = OrderedDict()

    def _feature_width(self) -> int:
        inputs = {item.name: item for item in self._session.get_inputs()}
        return int(inputs[interface.IMAGE_FEATURES].shape[1])

    @override
    def move(self, move: Move) -> None:
        if isinstance(move, Copy):
            self._cache.copy(self._rows.row(move.source), self._rows.row(move.target), move.tokens)
            self._rows.set_tokens(move.target, move.tokens)
        else:
            self._cache.drop(self._rows.row(move.place), move.tokens)
            self._rows.set_tokens(move.place, move.tokens)

    @override
    def read(self, place: Sequence[int], tokens: int) -> KeyValues:
        return self._cache.read(self._rows.row(place[0]), tokens)

    @override
    def write(self, place: Sequence[int], rows: KeyValues, start: int) -> None:
        tokens = self._cache.write(self._rows.row(place[0]), rows, start)
        self._rows.set_tokens(place[0], tokens)

    def step(self, batch: DecoderBatch) -> FloatArray:
        arrangement = self._rows.arrange(batch.slots)
        for exchange in arrangement.exchanges:
            self._cache.exchange(exchange.first, exchange.second, exchange.tokens)
        order = list(arrangement.order)
        in_order = order == sorted(order)
        binding = self._bind(batch, None if in_order else order, arrangement.first_row)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(
                "ONNX Runtime failed to run the decoder.",
                found=str(error).strip().splitlines()[0],
                expected=f"a step of {batch.input_ids.shape} tokens",
                fix="vlmforge verify ENGINE; if it fails too, rebuild the engine",
            ) from error
        for slot, past in zip(batch.slots, batch.past_lengths, strict=True):
            self._rows.set_tokens(slot, int(past) + batch.input_ids.shape[1])
        # Copied: what comes may be a view of memory that goes with the binding.
        given = binding.get_outputs()[-1].numpy()
        if in_order:
            return np.array(given, np.float32)
        logits = np.empty(given.shape, np.float32)
        logits[order] = given
        return logits

    def _bind(self, batch: DecoderBatch, order: list[int] | None, first: int) -> ort.IOBinding:
        """`order`: of the batch's rows in the cache; None: theirs."""
        features = batch.image_features
        if features is None:
            features = np.zeros((1, self._hidden), np.float32)
        rows = {
            interface.INPUT_IDS.name: batch.input_ids,
            interface.PAST_LENGTHS.name: batch.past_lengths,
            interface.LOGITS_INDICES.name: batch.logits_indices,
        }
        if batch.rotary_levels is not None:
            rows[interface.ROTARY_LEVELS.name] = batch.rotary_levels
        binding = self._session.io_binding()
        binding.bind_cpu_input(interface.IMAGE_FEATURES, np.ascontiguousarray(features))
        for name, value in rows.items():
            placed = value if order is None else value[order]
            binding.bind_cpu_input(name, np.ascontiguousarray(placed))
        for past, cache in self._buffers(first, len(batch.input_ids)).items():
            binding.bind_ortvalue_input(past, cache)
            binding.bind_ortvalue_output(interface.present_of(past), cache)
        binding.bind_output(interface.LOGITS, "cpu")
        return binding

    def _buffers(self, first: int, count: int) -> dict[str, ort.OrtValue]:
        """The rows `first .. first + count` of each cache, where they lie."""
        key = (first, count)
        if key not in self._bound:
            self._bound[key] = {
                name: ort.OrtValue.ortvalue_from_numpy(rows)
                for name, rows in self._cache.rows(first, count)
            }
        self._bound.move_to_end(key)
        if len(self._bound) > _BOUND_LAYOUTS:
            self._bound.popitem(last=False)
        return self._bound[key]


@dataclass(frozen=True, slots=True)
class OnnxRuntimeBackend(Backend):
    """See the module."""

    @override
    def load_vision(self, folder: Path, manifest: Manifest, options: LoadOptions) -> VisionSession:
        part = manifest.part("vision")
        return _Vision(_session(folder / part.file, part, options, manifest.dtype))

    @override
    def load_decoder(
        self, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> DecoderSession:
        part = manifest.part("decoder")
        return _Decoder(
            _session(folder / part.file, part, options, manifest.dtype), manifest.kv, options
        )

    @override
    def check(self) -> None:
        """Importing the library was the check."""

    @override
    def versions(self) -> Sequence[tuple[str, str]]:
        return (("onnxruntime", ort.__version__),)


BACKEND = OnnxRuntimeBackend()
