"""The lowered graphs of a golden checkpoint behind ONNX Runtime, as the runtime's sessions.

Native lowering: standard ops over caches of a fixed capacity. Paged lowering: the plugin's nodes by
their ONNX function bodies, over poisoned pools and a random block table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from conftest import DATA, HF
from vlmforge.backends import DecoderBatch, FloatArray
from vlmforge.engine.images.patch_inputs import NO_ARRAYS, Arrays
from vlmforge.kv.cache import Copy, Move
from vlmforge.ort import ort
from vlmforge_builder import build
from vlmforge_builder.checkpoint.config import read_config
from vlmforge_builder.export import Traced
from vlmforge_builder.ops import DOMAIN, VERSION, functions
from vlmforge_builder.passes.native_attention import NativeAttentionPass
from vlmforge_builder.passes.paged_attention import PagedAttentionPass
from vlmforge_builder.recipe import ModelSpec, PartSpec, RecipeOptions, find_recipe

PAGE_SIZE = 16


def model_spec(folder: str) -> ModelSpec:
    """The golden checkpoint as its recipe understands it."""
    checkpoint = DATA / folder / "checkpoint"
    config = read_config(checkpoint / "config.json")
    window = 1024 if folder == HF.name else None
    options = RecipeOptions(window, None, lambda name: DATA / folder / name)
    return find_recipe(config).load(checkpoint, config, options)


def part_of(spec: ModelSpec, name: str) -> PartSpec:
    return next(part for part in spec.parts if part.name == name)


def filled(spec: ModelSpec, part: PartSpec) -> ir.Model:
    """The traced part with its weights in float32."""
    traced: Traced = build.trace(part)  # kept by `traces.py`
    for name, shape in traced.shapes.items():
        values = part.weights[name].read(spec.store, shape).float().contiguous().numpy()
        traced.model.graph.initializers[name].const_value = ir.tensor(values, name=name)
    return traced.model


def session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


class Vision:
    """`VisionSession`; the part has no attention over a cache, and runs as it was traced."""

    def __init__(self, spec: ModelSpec) -> None:
        model = filled(spec, part_of(spec, "vision"))
        assert not NativeAttentionPass(capacity=1)(model).modified
        assert not PagedAttentionPass(PAGE_SIZE)(model).modified
        self._session = session(model)

    def encode(self, pixel_values: FloatArray, arrays: Arrays = NO_ARRAYS) -> FloatArray:
        (features,) = self._session.run(None, {"pixel_values": pixel_values, **arrays})
        return np.asarray(features, np.float32)


class _Decoder:
    """What both lowerings share: inputs by name, and caches that go out and come back."""

    def __init__(self, model: ir.Model) -> None:
        self._session = session(model)
        self._outputs = [item.name for item in self._session.get_outputs()]
        self._inputs = {item.name: item for item in self._session.get_inputs()}
        self._caches: dict[str, FloatArray] = {}

    def cache_names(self) -> list[str]:
        return [name for name in self._inputs if name.startswith("past_") and "." in name]

    def _feeds(self, batch: DecoderBatch) -> dict[str, NDArray[Any]]:
        features = batch.image_features
        if features is None:
            features = np.zeros((1, self._inputs["image_features"].shape[1]), np.float32)
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": batch.input_ids,
            "past_lengths": batch.past_lengths,
            "image_features": features,
            "logits_indices": batch.logits_indices,
        }
        if batch.rotary_levels is not None:
            feeds["rotary_levels"] = batch.rotary_levels
        return feeds

    def _run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, FloatArray]:
        return dict(zip(self._outputs, self._session.run(None, feeds), strict=True))


class NativeDecoder(_Decoder):
    """`DecoderSession` of the native lowering of a traced decoder."""

    def __init__(self, decoder: ir.Model, slots: int, capacity: int) -> None:
        model = decoder.clone()
        assert NativeAttentionPass(capacity)(model).modified
        super().__init__(model)
        for name in self.cache_names():
            kv_heads, held, head_dim = self._inputs[name].shape[1:]
            assert held == capacity
            self._caches[name] = np.zeros((slots, kv_heads, capacity, head_dim), np.float32)

    def step(self, batch: DecoderBatch) -> FloatArray:
        rows = list(batch.slots)
        feeds = self._feeds(batch)
        results = self._run({**feeds, **{k: v[rows] for k, v in self._caches.items()}})
        for name, cache in self._caches.items():
            cache[rows] = results[name.replace("past_", "present_")]
        return results["logits"]

    def move(self, move: Move) -> None:
        for cache in self._caches.values():
            if isinstance(move, Copy):
                cache[move.target, :, : move.tokens] = cache[move.source, :, : move.tokens]
            else:
                cache[move.place, :, move.tokens :] = 0  # the graph multiplies it by zero


class PagedDecoder(_Decoder):
    """`DecoderSession` of the paged lowering; a slot is a row of a block table."""

    def __init__(self, decoder: ir.Model, slots: int, capacity: int) -> None:
        model = decoder.clone()
        assert PagedAttentionPass(PAGE_SIZE)(model).modified
        for function in functions():
            model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = VERSION
        super().__init__(model)
        columns = -(-capacity // PAGE_SIZE)
        pages = slots * columns + 3
        order = np.random.default_rng(5).permutation(pages).astype(np.int32)
        self._table = order[: slots * columns].reshape(slots, columns)
        for name in self.cache_names():
            shape = (pages, *self._inputs[name].shape[1:])
            assert shape[2] == PAGE_SIZE
            self._caches[name] = np.full(shape, np.nan, np.float32)

    def step(self, batch: DecoderBatch) -> FloatArray:
        rows, tokens = batch.input_ids.shape
        needed = -(-(int(batch.past_lengths.max()) + tokens) // PAGE_SIZE)
        feeds = self._feeds(batch)
        feeds["query_lengths"] = np.full(rows, tokens, np.int32)
        feeds["block_table"] = self._table[list(batch.slots), :needed]
        results = self._run({**feeds, **self._caches})
        self._caches = {k: results[k.replace("past_", "present_")] for k in self._caches}
        return results["logits"]

    def move(self, move: Move) -> None:
        if isinstance(move, Copy):
            pages = -(-move.tokens // PAGE_SIZE)
            for cache in self._caches.values():
                cache[self._table[move.target, :pages]] = cache[self._table[move.source, :pages]]
