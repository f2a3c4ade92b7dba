"""ONNX Runtime on CPU.

The memory of an engine is its weights once: either packed for the matrix kernels, or mapped from
the data file as they are. The key/value cache is one buffer per layer that the graph reads and
writes in place; its pages are touched only as sequences grow.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmforge.backends import DecoderSession, FloatArray, IntArray, LoadOptions, VisionSession
from vlmforge.errors import EngineError
from vlmforge.limits import available_cpus
from vlmforge.manifest import KVLayout, Manifest, Part
from vlmforge.ort import ort

PROVIDER = "CPUExecutionProvider"


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
class _Vision:
    session: ort.InferenceSession

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        (features,) = self.session.run(None, {"pixel_values": pixel_values})
        return np.asarray(features, np.float32)


def _lazy_zeros(shape: tuple[int, ...]) -> FloatArray:
    """Zeros whose pages cost memory only once they are written to.

    Huge pages are declined: one token of each head would make two megabytes resident.
    """
    memory = mmap.mmap(-1, math.prod(shape) * 4)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)


class _Decoder:
    def __init__(self, session: ort.InferenceSession, kv: KVLayout, options: LoadOptions) -> None:
        self._session = session
        shape = (options.slots, kv.kv_heads, options.capacity, kv.head_dim)
        names = [f"{kind}.{i}" for kind in ("key", "value") for i in range(kv.layers)]
        self._caches = {name: _lazy_zeros(shape) for name in names}
        self._hidden = self._feature_width()
        self._bound: dict[tuple[int, int], dict[str, ort.OrtValue]] = {}

    def _feature_width(self) -> int:
        inputs = {item.name: item for item in self._session.get_inputs()}
        return int(inputs["image_features"].shape[1])

    def _slots(self, first: int, count: int) -> dict[str, ort.OrtValue]:
        key = (first, count)
        if key not in self._bound:
            self._bound[key] = {
                name: ort.OrtValue.ortvalue_from_numpy(cache[first : first + count])
                for name, cache in self._caches.items()
            }
        return self._bound[key]

    def step(
        self,
        first_slot: int,
        input_ids: IntArray,
        past_lengths: IntArray,
        image_features: FloatArray | None,
        logits_indices: IntArray,
        rotary_levels: IntArray | None = None,
    ) -> FloatArray:
        binding = self._session.io_binding()
        if image_features is None:
            image_features = np.zeros((1, self._hidden), np.float32)
        feeds = {
            "input_ids": input_ids,
            "image_features": image_features,
            "past_lengths": past_lengths,
            "logits_indices": logits_indices,
        }
        if rotary_levels is not None:
            feeds["rotary_levels"] = rotary_levels
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, cache in self._slots(first_slot, len(input_ids)).items():
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(
                "ONNX Runtime failed to run the decoder.",
                found=str(error).strip().splitlines()[0],
                expected=f"a step of {input_ids.shape} tokens",
                fix="vlmforge verify ENGINE; if it fails too, rebuild the engine",
            ) from error
        # A copy: the array may be a view of memory that goes with the binding.
        return np.array(binding.get_outputs()[-1].numpy(), np.float32)

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        for cache in self._caches.values():
            cache[target, :, :tokens] = cache[source, :, :tokens]

    def swap_slots(self, first: int, second: int, tokens: int) -> None:
        for cache in self._caches.values():
            kept = cache[first, :, :tokens].copy()
            cache[first, :, :tokens] = cache[second, :, :tokens]
            cache[second, :, :tokens] = kept


@dataclass(frozen=True, slots=True)
class OnnxRuntimeBackend:
    """See the module."""

    def load_vision(self, folder: Path, manifest: Manifest, options: LoadOptions) -> VisionSession:
        """See `Backend.load_vision`."""
        part = manifest.part("vision")
        return _Vision(_session(folder / part.file, part, options, manifest.dtype))

    def load_decoder(
        self, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> DecoderSession:
        """See `Backend.load_decoder`."""
        part = manifest.part("decoder")
        return _Decoder(
            _session(folder / part.file, part, options, manifest.dtype), manifest.kv, options
        )

    def check(self) -> None:
        """See `Backend.check`: importing the library was the check."""

    def versions(self) -> Sequence[tuple[str, str]]:
        """See `Backend.versions`."""
        return (("onnxruntime", ort.__version__),)


BACKEND = OnnxRuntimeBackend()
