"""CUDA: graphs that ONNX Runtime's CUDA provider runs, and between them our attention kernels.

The decoder becomes a chain (`vlmforge.engine.chain`): no GPU is needed to make it. All its pieces
take their weights from one file, and those that are alike are one graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
from msgspec import structs
from onnx_ir.passes.common import RemoveUnusedNodesPass
from typing_extensions import override

from vlmforge.backends.fake import InFloat32, cuda_on_cpu
from vlmforge.engine.chain import PartChain, RotaryTables
from vlmforge.engine.interface import IMAGE_FEATURES, DecoderInterface, Interface
from vlmforge.engine.manifest import KVLayout, Part
from vlmforge.errors import ConfigError
from vlmforge_builder import passes
from vlmforge_builder.alike_segments import save_alike
from vlmforge_builder.block_quantisation import Blocks, ForMatMulNBits
from vlmforge_builder.chain_file import chain_steps, save_segments
from vlmforge_builder.divided_part import divide_part
from vlmforge_builder.dtypes import KV_DTYPES
from vlmforge_builder.export import Traced
from vlmforge_builder.kernel_files import compiler, write_kernels, write_meetings
from vlmforge_builder.onnx_file import check_interface, refer
from vlmforge_builder.passes.assign_precision import AssignPrecisionPass
from vlmforge_builder.passes.cut_chain import Cut, cut_chain
from vlmforge_builder.passes.float32_features import Float32FeaturesPass
from vlmforge_builder.passes.fuse_contrib import FuseContribPass
from vlmforge_builder.passes.fuse_gated import FuseGatedPass
from vlmforge_builder.passes.fuse_sum_norm import FuseSumNormPass
from vlmforge_builder.passes.likeliest_token import likeliest_token
from vlmforge_builder.passes.lower_dequantize import LowerDequantizePass
from vlmforge_builder.passes.quantise_weights import QuantiseWeightsPass, blocks_of_part
from vlmforge_builder.passes.sample_token import sample_token, sampling_bytes
from vlmforge_builder.targets import CompileJob, Settings, Target
from vlmforge_builder.weights import AsDtype, Layout, plan, stored_dtype, weight_bytes, write
from vlmforge_builder.widened_graphs import open_widened
from vlmforge_plugins.cached_attention.compile import compile_set
from vlmforge_plugins.cached_attention.config import Config
from vlmforge_plugins.errors import PluginError
from vlmforge_plugins.gated_activation.compile import compile_set as compile_gates
from vlmforge_plugins.token_choice.compile import compile_set as compile_choosers
from vlmforge_plugins.token_choice.launcher import MOST_VOCAB, scratch_bytes

PAGE_SIZE = 64
_WHOLE_ACTIVATIONS = 0  # the provider has no others
_KERNELS, _ACTIVATIONS = "decoder.rank0.attention", "decoder.rank0.activations"
_CHOOSERS = "decoder.rank0.choosers"


@dataclass(frozen=True, slots=True)
class CudaTarget(Target):
    """Makes graphs, and a chain of the decoder's."""

    name: str = "cuda"

    @override
    def check(self, settings: Settings) -> None:
        if settings.dtype not in ("float16", "bfloat16"):
            raise ConfigError(
                f"The target {self.name} compiles no {settings.dtype} engines.",
                found=f"--dtype {settings.dtype}",
                expected="float16 or bfloat16: its attention kernels are of these",
                fix="--dtype bfloat16",
            )
        for option, value in (
            ("attention", settings.attention),
            ("compute-capability", settings.compute_capability),
        ):
            if value is not None:
                raise ConfigError(
                    f"The target {self.name} has no --{option}.",
                    found=repr(value),
                    expected="none",
                    fix=f"leave --{option} out",
                )
        if settings.kv_dtype not in (None, *KV_DTYPES):
            raise ConfigError(
                "The cache cannot be stored in this dtype.",
                found=f"--kv-dtype {settings.kv_dtype}",
                expected=", ".join(KV_DTYPES) + "; or none, for --dtype",
                fix="--kv-dtype fp8",
            )
        compiler()

    @override
    def stand_in(self) -> AbstractContextManager[None]:
        program = "vlmforge_builder.rank_on_cpu"
        return cuda_on_cpu(graphs=InFloat32(open_widened), program=program)

    @override
    def compute_dtype(self, settings: Settings) -> str:
        return settings.dtype

    @override
    def kv_layout(self, kv: KVLayout, settings: Settings) -> KVLayout:
        return structs.replace(kv, dtype=_stored(settings), page_size=PAGE_SIZE)

    @override
    def compile(self, traced: Traced, job: CompileJob) -> Part:
        """Write the part's graphs, their weights in one file, and the attention's kernels.

        Raises:
            TensorError: a weight that is not right.
            ConfigError: heads of a size that there are no kernels for, or sizes that ranks cannot
                divide.
            BuildError: the kernels cannot be compiled.
        """
        settings, stem = job.settings, job.stem
        dtypes = {n: stored_dtype(job.part.weights[n], settings.dtype) for n in traced.shapes}
        whole = _matrices(blocks_of_part(traced.model.graph, job.part, settings.weights))
        divided = divide_part(traced, job.part, whole, job.rank, rounded=False)
        part, blocks = divided.part, divided.blocks
        dense = _dense(part.interface, settings)
        passes.run(_sequence(dtypes, blocks, dense, settings), traced.model)
        check_interface(traced.model.graph, dense)
        encodings = {
            name: divided.encoding(name, ForMatMulNBits(blocks[name], dtype))
            if name in blocks
            else AsDtype(dtype)
            for name, dtype in dtypes.items()
        }
        layout = plan(divided.shapes, encodings)
        data = job.folder / f"{stem}.data"
        refer(traced.model, layout, data)
        interface = self._interface(dense, settings)
        made = Part(
            job.name,
            f"{stem}.onnx",
            (data.name,),
            interface.inputs,
            interface.outputs,
            weight_bytes=weight_bytes(layout),
            loaded_bytes=weight_bytes(layout),
            profiles=(),
            layers=None,
            aliases=interface.aliases,
        )
        if isinstance(dense, DecoderInterface):
            made = _write_chain(traced.model, made, layout, job)
        else:
            ir.save(traced.model, job.folder / made.file)
        if not job.described:
            for done, total in write(data, layout, part.weights, job.store):
                job.report(done, total)
        return made

    def _interface(self, dense: Interface, settings: Settings) -> Interface:
        """What the runtime binds: pages in the place of dense caches."""
        if not isinstance(dense, DecoderInterface):
            return dense
        kv = self.kv_layout(dense.kv, settings)
        return structs.replace(dense, kv=kv, chained=True)


def _dense(traced: Interface, settings: Settings) -> Interface:
    """What the graph takes and gives before it is cut; features are float32."""
    if not isinstance(traced, DecoderInterface):
        return traced
    return structs.replace(traced, kv=structs.replace(traced.kv, dtype=settings.dtype))


def _matrices(blocks: Mapping[str, Blocks]) -> dict[str, Blocks]:
    """Those of matrices: tables keep 16 bits.

    A step reads a row of them for each token, and the provider's op for rows of whole numbers
    (GatherBlockQuantized) takes numbers without a zero point otherwise from version to version.
    """
    return {name: cut for name, cut in blocks.items() if cut.axis == 0}


def _sequence(
    dtypes: Mapping[str, str],
    blocks: Mapping[str, Blocks],
    dense: Interface,
    settings: Settings,
) -> ir.passes.Sequential:
    specs = (*dense.inputs, *dense.outputs)
    float32 = [s.name for s in specs if s.dtype == "float32" and s.name != IMAGE_FEATURES]
    # What our kernels do stands between the pieces of a chain: the vision part is one piece.
    ours = (FuseGatedPass(), FuseSumNormPass()) if isinstance(dense, DecoderInterface) else ()
    return ir.passes.Sequential(
        AssignPrecisionPass(settings.dtype, dtypes, float32),
        QuantiseWeightsPass(blocks),
        LowerDequantizePass(_WHOLE_ACTIVATIONS),
        Float32FeaturesPass(),
        FuseContribPass(),
        *ours,
        RemoveUnusedNodesPass(),
    )


def _write_chain(model: ir.Model, part: Part, layout: Layout, job: CompileJob) -> Part:
    """Cut the graph, and write its pieces and what runs between them."""
    data = part.data[0]
    cut = cut_chain(model)
    vocab_size = int(part.outputs[0].shape[-1])
    config = _config(cut.calls[0].head_dim, job.settings)
    activation = next((gate.activation for gate in cut.gates), None)
    kernels = _kernels(config, activation, vocab_size, job)
    pieces = (*cut.pieces, likeliest_token(vocab_size))
    segments = save_alike(pieces, job.stem, job.folder)
    steps, tables = chain_steps(segments, cut.between), _tables(cut, layout, data)
    (sampler,) = save_segments([sample_token(vocab_size)], f"{job.stem}.sample", job.folder)
    sampler = structs.replace(sampler, token_bytes=_choosing_bytes(vocab_size))
    return structs.replace(
        part,
        file=segments[0].file,
        data=(
            data,
            *list(dict.fromkeys(s.file for s in segments))[1:],
            sampler.file,
            *kernels.files,
        ),
        chain=PartChain(
            steps,
            tables,
            kernels.attention,
            sampler,
            kernels.meetings,
            kernels.activations,
            kernels.choosers,
        ),
    )


def _stored(settings: Settings) -> str:
    """The dtype of the cache."""
    return settings.dtype if settings.kv_dtype is None else KV_DTYPES[settings.kv_dtype]


def _config(head_dim: int, settings: Settings) -> Config:
    config = Config(head_dim, settings.dtype, _stored(settings))  # type: ignore[arg-type]
    try:
        config.check()
    except PluginError as error:
        raise ConfigError(
            error.summary,
            found=error.found,
            expected=error.expected,
            fix="build for the processor: --target onnxruntime",
        ) from error
    return config


def _tables(cut: Cut, layout: Layout, file: str) -> RotaryTables | None:
    if cut.tables is None:
        return None
    cos, sin = (next(i for i in layout if i.name == name).places[0] for name in cut.tables)
    positions, width = cos.tensor.shape
    return RotaryTables(file, cos.offset, sin.offset, positions, width)


@dataclass(frozen=True, slots=True)
class _Kernels:
    """Files by the targets' names, for all ranks."""

    attention: Mapping[str, str]
    meetings: Mapping[str, str]
    activations: Mapping[str, str]
    choosers: Mapping[str, str]

    @property
    def files(self) -> tuple[str, ...]:
        """All of them."""
        sets = (self.attention, self.meetings, self.activations, self.choosers)
        return tuple(name for files in sets for name in files.values())


def _kernels(config: Config, activation: str | None, vocab_size: int, job: CompileJob) -> _Kernels:
    """Compile the attention for every kind of GPU, and the gated activation, if there is one.

    The choice of tokens too, where it covers the vocabulary, and what ranks meet in.
    """
    if job.described:
        return _Kernels({}, {}, {}, {})
    dtype, folder = job.settings.dtype, job.folder
    gates: Mapping[str, str] = {}
    if activation is not None:
        gates = write_kernels(partial(compile_gates, activation, dtype), _ACTIVATIONS, folder)
    return _Kernels(
        write_kernels(partial(compile_set, config), _KERNELS, folder),
        write_meetings(folder) if job.rank.of > 1 else {},
        gates,
        write_kernels(compile_choosers, _CHOOSERS, folder) if vocab_size <= MOST_VOCAB else {},
    )


def _choosing_bytes(vocab_size: int) -> int:
    """Bytes that choosing a token for a row takes: of the kernel, or of the graph without one."""
    return scratch_bytes(1, vocab_size) if vocab_size <= MOST_VOCAB else sampling_bytes(vocab_size)


TARGET = CudaTarget()
