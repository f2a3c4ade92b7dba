"""ONNX Runtime: graphs with contrib ops, weights in a page-aligned file that is mapped at load.

Its CPU provider has no 16-bit matrix kernels: a 16-bit engine *stores* 16 bits (half the disk) and
widens each weight to float32 once, at load. Arithmetic is float32 whatever the dtype. Quantised
matrices stay as they are stored, in memory too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from typing_extensions import override

from vlmforge.engine.chain import PartChain
from vlmforge.engine.interface import PatchInterface
from vlmforge.engine.manifest import KVLayout, Part
from vlmforge.errors import ConfigError
from vlmforge_builder import passes
from vlmforge_builder.block_quantisation import Blocks, ForMatMulNBits, InBlocks
from vlmforge_builder.chain_file import chain_steps, save_segments
from vlmforge_builder.divided_part import divide_part
from vlmforge_builder.export import Traced
from vlmforge_builder.onnx_file import check_interface, refer
from vlmforge_builder.passes.cut_chain import cut_chain
from vlmforge_builder.passes.flash_attention import FlashAttentionPass
from vlmforge_builder.passes.lower_cached_attention import LowerCachedAttentionPass
from vlmforge_builder.passes.lower_dequantize import LowerDequantizePass
from vlmforge_builder.passes.quantise_weights import QuantiseWeightsPass, blocks_of_part
from vlmforge_builder.passes.store_weights import StoreWeightsPass
from vlmforge_builder.ranks import WHOLE
from vlmforge_builder.targets import CompileJob, Settings, Target
from vlmforge_builder.traced_file import NEUTRAL_FILE, save_traced
from vlmforge_builder.weights import (
    AsDtype,
    Encoding,
    PlacedParameter,
    TensorShape,
    plan,
    stored_dtype,
    weight_bytes,
    write,
)

# Where GroupQueryAttention has the cosines and sines among its inputs.
_TABLES = slice(7, 9)


@dataclass(frozen=True, slots=True)
class OnnxRuntimeTarget(Target):
    """Compiles for the CPU provider."""

    name: str = "onnxruntime"

    @override
    def check(self, settings: Settings) -> None:
        for option, value, other in (
            ("kv-dtype", settings.kv_dtype, "cuda"),
            ("attention", settings.attention, "tensorrt_rtx"),
            ("compute-capability", settings.compute_capability, "tensorrt_rtx"),
        ):
            if value is not None:
                raise ConfigError(
                    f"The target {self.name} has no --{option}.",
                    found=repr(value),
                    expected="none",
                    fix=f"leave --{option} out, or build with --target {other}",
                )

    @override
    def stand_in(self) -> AbstractContextManager[None]:
        return nullcontext()

    @override
    def compute_dtype(self, settings: Settings) -> str:
        del settings
        return "float32"

    @override
    def kv_layout(self, kv: KVLayout, settings: Settings) -> KVLayout:
        del settings
        return kv

    @override
    def compile(self, traced: Traced, job: CompileJob) -> Part:
        """Write the part's graph and data, or a rank's chain of graphs.

        Raises:
            TensorError: a weight that is not right.
            ConfigError: sizes that ranks cannot divide.
        """
        model = traced.model
        if job.is_decoder and job.rank == WHOLE:
            save_traced(traced, job.folder / NEUTRAL_FILE)
        dtypes = {
            name: stored_dtype(job.part.weights[name], job.settings.dtype) for name in traced.shapes
        }
        blocks = blocks_of_part(model.graph, job.part, job.settings.weights)
        divided = divide_part(traced, job.part, blocks, job.rank, rounded=True)
        part = divided.part
        if isinstance(part.interface, PatchInterface):  # images may be of any size
            passes.run(ir.passes.Sequential(FlashAttentionPass()), model)
        passes.run(_sequence(dtypes, divided.blocks), model)
        check_interface(model.graph, part.interface)
        encodings = {
            name: divided.encoding(name, _encoding(dtype, divided.blocks.get(name)))
            for name, dtype in dtypes.items()
        }
        layout = plan(divided.shapes, encodings)
        data = job.folder / f"{job.stem}.data"
        refer(model, layout, data)
        chain = _save(model, job)
        files = (f"{job.stem}.onnx",) if chain is None else tuple(s.file for s in chain.segments)
        if not job.described:
            for done, total in write(data, layout, part.weights, job.store):
                job.report(done, total)
        return Part(
            job.name,
            files[0],
            (data.name, *files[1:]),
            part.interface.inputs,
            part.interface.outputs,
            weight_bytes=weight_bytes(layout),
            loaded_bytes=sum(map(_loaded_bytes, layout)),
            profiles=(),
            layers=None,
            aliases={},
            rotary_tables=_rotary_tables(model),
            chain=chain,
        )


def _save(model: ir.Model, job: CompileJob) -> PartChain | None:
    """Write the graph; cut where ranks meet, if they do."""
    if job.rank == WHOLE:
        ir.save(model, job.folder / f"{job.stem}.onnx")
        return None
    cut = cut_chain(model)
    segments = save_segments(cut.pieces, job.stem, job.folder)
    return PartChain(chain_steps(segments, cut.between), None, {})


def _rotary_tables(model: ir.Model) -> tuple[str, str] | None:
    """Names of the tables that the attention reads whole: it takes longer ones as well."""
    for node in model.graph:
        names = [value.name or "" for value in node.inputs[_TABLES] if value is not None]
        stored = [name for name in names if name in model.graph.initializers]
        if node.op_type == "GroupQueryAttention" and len(stored) == 2:
            return stored[0], stored[1]
    return None


def _sequence(dtypes: Mapping[str, str], blocks: Mapping[str, Blocks]) -> ir.passes.Sequential:
    return ir.passes.Sequential(
        QuantiseWeightsPass(blocks),
        LowerCachedAttentionPass(),
        LowerDequantizePass(),
        StoreWeightsPass(dtypes),
        RemoveUnusedNodesPass(),
        RemoveUnusedOpsetsPass(),
    )


def _encoding(dtype: str, blocks: Blocks | None) -> Encoding:
    if blocks is None:
        return AsDtype(dtype)
    return InBlocks(blocks, "float32") if blocks.axis else ForMatMulNBits(blocks)


def _loaded_bytes(item: PlacedParameter) -> int:
    if isinstance(item.encoding, AsDtype):
        return TensorShape(item.name, "float32", item.shape).size
    return sum(place.tensor.size for place in item.places)


TARGET = OnnxRuntimeTarget()
