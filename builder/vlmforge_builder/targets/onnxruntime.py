"""ONNX Runtime: graphs with contrib ops, weights in a page-aligned file that is mapped at load.

Its CPU provider has no 16-bit matrix kernels: a 16-bit engine *stores* 16 bits (half the disk) and
widens each weight to float32 once, at load. Arithmetic is float32 whatever the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmforge.manifest import Part, TensorSpec
from vlmforge_builder.export import Traced
from vlmforge_builder.passes.lower_cached_attention import lower_cached_attention
from vlmforge_builder.passes.store_weights import store_weights
from vlmforge_builder.targets import CompileJob
from vlmforge_builder.weights import Placed, plan, stored_dtype, write

_FILES = {"vision": "vision", "decoder": "decoder.rank0"}


@dataclass(frozen=True, slots=True)
class OnnxRuntimeTarget:
    """See the module."""

    name: str = "onnxruntime"
    compute_dtype: str = "float32"

    def compile(self, traced: Traced, job: CompileJob) -> Part:
        """Write `<part>.onnx` and `<part>.data` (TensorError names a weight that is not right)."""
        model, stem = traced.model, _FILES[job.part.name]
        interface = _specs(model.graph.inputs), _specs(model.graph.outputs)
        dtypes = {name: stored_dtype(job.part.weights[name], job.dtype) for name in traced.shapes}
        lower_cached_attention(model)
        store_weights(model, dtypes)
        RemoveUnusedNodesPass()(model)
        layout = plan(traced.shapes, dtypes)
        data = job.folder / f"{stem}.data"
        _refer(model, layout, data)
        ir.save(model, job.folder / f"{stem}.onnx")
        total = layout[-1].offset + layout[-1].size
        for done in write(data, layout, job.part.weights, job.store):
            job.report(done, total)
        weight_bytes = sum(item.size for item in layout)
        return Part(
            job.part.name, f"{stem}.onnx", (data.name,), *interface, weight_bytes=weight_bytes
        )


def _refer(model: ir.Model, layout: tuple[Placed, ...], data: Path) -> None:
    """Point the initialisers at their places in the data file."""
    for item in layout:
        value = model.graph.initializers[item.name]
        dtype = value.dtype
        assert dtype is not None
        value.const_value = ir.ExternalTensor(
            data.name,
            item.offset,
            item.size,
            dtype,
            shape=ir.Shape(item.shape),
            name=item.name,
            base_dir=data.parent,
        )


def _specs(values: object) -> tuple[TensorSpec, ...]:
    return tuple(_spec(value) for value in values)  # type: ignore[attr-defined]


def _spec(value: ir.Value) -> TensorSpec:
    shape = value.shape if value.shape is not None else ()
    dims = tuple(d if isinstance(d, int) else str(d) for d in shape)
    dtype = {ir.DataType.FLOAT: "float32", ir.DataType.INT64: "int64"}[
        value.dtype or ir.DataType.FLOAT
    ]
    return TensorSpec(value.name or "", dtype, dims)


TARGET = OnnxRuntimeTarget()
