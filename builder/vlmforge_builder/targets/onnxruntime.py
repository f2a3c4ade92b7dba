"""ONNX Runtime: graphs with contrib ops, weights in a page-aligned file that is mapped at load.

Its CPU provider has no 16-bit matrix kernels: a 16-bit engine *stores* 16 bits (half the disk) and
widens each weight to float32 once, at load. Arithmetic is float32 whatever the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmforge.errors import ConfigError
from vlmforge.manifest import KVLayout, Part
from vlmforge_builder.export import Traced
from vlmforge_builder.onnx_file import refer, tensor_specs
from vlmforge_builder.passes.lower_cached_attention import lower_cached_attention
from vlmforge_builder.passes.store_weights import store_weights
from vlmforge_builder.targets import CompileJob, Settings
from vlmforge_builder.weights import plan, stored_dtype, write

_FILES = {"vision": "vision", "decoder": "decoder.rank0"}


@dataclass(frozen=True, slots=True)
class OnnxRuntimeTarget:
    """See the module."""

    name: str = "onnxruntime"
    runs_here: bool = True

    def check(self, settings: Settings) -> None:
        """See `Target.check`."""
        for option, value in (
            ("attention", settings.attention),
            ("compute-capability", settings.compute_capability),
        ):
            if value is not None:
                raise ConfigError(
                    f"The target {self.name} has no --{option}.",
                    found=repr(value),
                    expected="none",
                    fix=f"leave --{option} out, or build with --target tensorrt_rtx",
                )

    def compute_dtype(self, settings: Settings) -> str:
        """See `Target.compute_dtype`."""
        del settings
        return "float32"

    def kv_layout(self, kv: KVLayout, settings: Settings) -> KVLayout:
        """See `Target.kv_layout`."""
        del settings
        return kv

    def compile(self, traced: Traced, job: CompileJob) -> Part:
        """Write `<part>.onnx` and `<part>.data` (TensorError names a weight that is not right)."""
        model, stem = traced.model, _FILES[job.part.name]
        interface = tensor_specs(model.graph.inputs), tensor_specs(model.graph.outputs)
        dtypes = {
            name: stored_dtype(job.part.weights[name], job.settings.dtype) for name in traced.shapes
        }
        lower_cached_attention(model)
        store_weights(model, dtypes)
        RemoveUnusedNodesPass()(model)
        layout = plan(traced.shapes, dtypes)
        data = job.folder / f"{stem}.data"
        refer(model, layout, data)
        ir.save(model, job.folder / f"{stem}.onnx")
        total = layout[-1].offset + layout[-1].size
        for done in write(data, layout, job.part.weights, job.store):
            job.report(done, total)
        weight_bytes = sum(item.size for item in layout)
        return Part(
            job.part.name,
            f"{stem}.onnx",
            (data.name,),
            *interface,
            weight_bytes=weight_bytes,
            profiles=(),
            layers=None,
            aliases={},
        )


TARGET = OnnxRuntimeTarget()
