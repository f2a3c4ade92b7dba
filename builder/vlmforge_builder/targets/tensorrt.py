"""TensorRT and TensorRT-RTX: graphs compiled to plans by a process of its own.

The attention over the cache is our plugin's (paged, as long as its sequences), or with
`--attention native` the library's own (dense, as long as its capacity). Each rank's decoder is a
plan of its own, in which ranks meet by the library's own op; where that has none, it is a chain of
plans between which they meet as those of `cuda` do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from msgspec import structs
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from typing_extensions import override

from vlmforge.engine.chain import PartChain
from vlmforge.engine.interface import (
    BATCH,
    IMAGES,
    OUTPUTS,
    PAGES,
    ROWS,
    SEQUENCE_PAGES,
    TOKENS,
    WINDOWS,
    DecoderInterface,
    Interface,
    PatchInterface,
    VisionInterface,
)
from vlmforge.engine.manifest import DimRange, KVLayout, Part, Profile
from vlmforge.errors import ConfigError
from vlmforge_builder import passes
from vlmforge_builder.block_quantisation import Blocks, InBlocks
from vlmforge_builder.divided_part import divide_part
from vlmforge_builder.dtypes import KV_DTYPES
from vlmforge_builder.export import Traced
from vlmforge_builder.onnx_file import check_interface
from vlmforge_builder.ops.cached_attention import CachedAttentionNode
from vlmforge_builder.passes.assign_precision import AssignPrecisionPass
from vlmforge_builder.passes.dist_collective import DistCollectivePass
from vlmforge_builder.passes.lint import LintPass
from vlmforge_builder.passes.native_attention import NativeAttentionPass
from vlmforge_builder.passes.paged_attention import PagedAttentionPass
from vlmforge_builder.passes.quantise_weights import QuantiseWeightsPass, blocks_of_part
from vlmforge_builder.plan_files import PlanJob, write_chain, write_plan
from vlmforge_builder.recipe import PartSpec
from vlmforge_builder.targets import CompileJob, Settings, Target
from vlmforge_builder.tensorrt.flavours import (
    TENSORRT,
    Flavour,
    capability_name,
    check_installed,
)
from vlmforge_builder.tensorrt.job import KernelSet
from vlmforge_builder.weights import AsDtype, Layout, plan, stored_dtype, weight_bytes
from vlmforge_plugins.cached_attention.config import Config
from vlmforge_plugins.errors import UnsupportedError

ATTENTIONS = ("plugin", "native")
PAGE_SIZE = 64
# Tokens of a prompt that are run at once, as the scheduler does.
CHUNK = 512
VIEWS = 4
# Of an image, usually.
USUAL_TOKENS = 256
# Of GPUs with tensor cores for our types, and of those that convert fp8.
LEAST_CAPABILITY, FP8_CAPABILITY = 8.0, 8.9


@dataclass(frozen=True, slots=True)
class TensorRTTarget(Target):
    """Compiles by the library of a flavour."""

    flavour: Flavour

    @property
    @override
    def name(self) -> str:
        return self.flavour.name

    @override
    def check(self, settings: Settings) -> None:
        if settings.dtype not in ("float16", "bfloat16"):
            raise ConfigError(
                f"The target {self.name} compiles no {settings.dtype} engines.",
                found=f"--dtype {settings.dtype}",
                expected="float16 or bfloat16: its attention kernels are of these",
                fix="--dtype bfloat16",
            )
        if settings.attention not in (None, *ATTENTIONS):
            raise ConfigError(
                "Unknown attention.",
                found=repr(settings.attention),
                expected=" or ".join(ATTENTIONS),
                fix="--attention plugin",
            )
        capability_name(self.flavour, settings.compute_capability)
        _check_kernels(settings)
        check_installed(self.flavour)

    @override
    def stand_in(self) -> None:
        return None

    @override
    def compute_dtype(self, settings: Settings) -> str:
        return settings.dtype

    @override
    def kv_layout(self, kv: KVLayout, settings: Settings) -> KVLayout:
        page_size = None if settings.attention == "native" else PAGE_SIZE
        return structs.replace(kv, dtype=_stored(settings), page_size=page_size)

    @override
    def compile(self, traced: Traced, job: CompileJob) -> Part:
        """Write the part's plan and its layer report; of a decoder, those of the rank.

        Raises:
            TensorError: a weight that is not right.
            ConfigError: sizes that ranks cannot divide.
            BuildError: a graph that the library refuses or dies of, or kernels that there are not.
        """
        settings = job.settings
        dtypes = {n: stored_dtype(job.part.weights[n], settings.dtype) for n in traced.shapes}
        whole = blocks_of_part(traced.model.graph, job.part, settings.weights)
        divided = divide_part(traced, job.part, whole, job.rank, rounded=False)
        part, blocks = divided.part, divided.blocks
        kernels = _kernels(traced.model, settings)
        interface = self._interface(part, settings)
        passes.run(self._sequence(dtypes, blocks, interface, job), traced.model)
        check_interface(traced.model.graph, interface)
        layout = plan(
            divided.shapes,
            {
                name: divided.encoding(name, InBlocks(blocks[name], dtype))
                if name in blocks
                else AsDtype(dtype)
                for name, dtype in dtypes.items()
            },
        )
        profiles = _profiles(interface, settings)
        wanted = PlanJob(self.flavour, profiles, kernels, dataclasses.replace(job, part=part))
        file, data, chain = self._write(traced.model, layout, wanted)
        return Part(
            job.name,
            file,
            (*data, wanted.layers),
            interface.inputs,
            interface.outputs,
            weight_bytes=weight_bytes(layout),
            loaded_bytes=weight_bytes(layout),
            profiles=profiles,
            layers=wanted.layers,
            aliases=interface.aliases,
            chain=chain,
        )

    def _write(
        self, model: ir.Model, layout: Layout, wanted: PlanJob
    ) -> tuple[str, Sequence[str], PartChain | None]:
        """The first plan's file; all that belongs to it but the layer report; the chain, if any."""
        if self.flavour.meets or wanted.job.rank.of == 1:
            return write_plan(model, layout, wanted), (), None
        chain = write_chain(model, layout, wanted)
        first, *others = (segment.file for segment in chain.segments)
        return first, (*others, *chain.meetings.values()), chain

    def _interface(self, part: PartSpec, settings: Settings) -> Interface:
        """What the compiled part takes and gives."""
        traced = structs.replace(part.interface, features=settings.dtype)
        if not isinstance(traced, DecoderInterface):
            return traced
        capacity = settings.session_len if settings.attention == "native" else None
        kv = self.kv_layout(traced.kv, settings)
        return structs.replace(traced, kv=kv, capacity=capacity)

    def _sequence(
        self,
        dtypes: Mapping[str, str],
        blocks: Mapping[str, Blocks],
        interface: Interface,
        job: CompileJob,
    ) -> ir.passes.Sequential:
        specs = (*interface.inputs, *interface.outputs)
        float32 = [spec.name for spec in specs if spec.dtype == "float32"]
        return ir.passes.Sequential(
            AssignPrecisionPass(job.settings.dtype, dtypes, float32),
            QuantiseWeightsPass(blocks),
            _attention(job.settings),
            *((DistCollectivePass(job.rank.of),) if self.flavour.meets else ()),
            RemoveUnusedNodesPass(),
            RemoveUnusedOpsetsPass(),
            LintPass(),
        )


def _attention(settings: Settings) -> ir.passes.InPlacePass:
    if settings.attention == "native":
        return NativeAttentionPass(settings.session_len)
    return PagedAttentionPass(PAGE_SIZE, ir.DataType.FLOAT8E4M3FN if settings.kv_dtype else None)


def _kernels(model: ir.Model, settings: Settings) -> KernelSet | None:
    """What the graph's attention will run (ConfigError: there are none); None: it has no plugin."""
    found = CachedAttentionNode.all_in(model.graph)
    if not found or settings.attention == "native":
        return None
    kernels = KernelSet(found[0].head_dim, settings.dtype, _stored(settings))
    config = Config(kernels.head_size, kernels.activation, kernels.stored)  # type: ignore[arg-type]
    try:
        config.check()
    except UnsupportedError as error:
        raise ConfigError(
            error.summary, found=error.found, expected=error.expected, fix=error.fix
        ) from error
    return kernels


def _stored(settings: Settings) -> str:
    """The dtype of the cache."""
    return settings.dtype if settings.kv_dtype is None else KV_DTYPES[settings.kv_dtype]


def _check_kernels(settings: Settings) -> None:
    """Refuse what the plugin has no kernels for (ConfigError)."""
    if settings.kv_dtype not in (None, *KV_DTYPES):
        raise ConfigError(
            "The cache cannot be stored in this dtype.",
            found=f"--kv-dtype {settings.kv_dtype}",
            expected=", ".join(KV_DTYPES) + "; or none, for --dtype",
            fix="--kv-dtype fp8",
        )
    if settings.attention == "native":
        if settings.kv_dtype is not None:
            raise ConfigError(
                "The library's own attention has no cache of this dtype.",
                found=f"--attention native --kv-dtype {settings.kv_dtype}",
                expected="--attention plugin",
                fix="leave --attention or --kv-dtype out",
            )
        return
    least = FP8_CAPABILITY if settings.kv_dtype else LEAST_CAPABILITY
    wanted = settings.compute_capability
    if wanted is not None and float(wanted) < least:
        raise ConfigError(
            "The attention kernels do not run on this GPU.",
            found=f"--compute-capability {wanted} with a cache in {_stored(settings)}",
            expected=f"compute capability {least} or higher",
            fix="leave --kv-dtype out" if settings.kv_dtype else "--attention native",
        )


def _profiles(interface: Interface, settings: Settings) -> tuple[Profile, ...]:
    if isinstance(interface, VisionInterface):
        return (Profile("encode", {IMAGES: DimRange(1, 1, VIEWS)}),)
    if isinstance(interface, PatchInterface):
        return (Profile("encode", _patch_ranges(interface, settings.session_len)),)
    pages, batch = -(-settings.session_len // PAGE_SIZE), settings.max_batch_size
    one, chunk = DimRange(1, 1, 1), min(CHUNK, settings.session_len)
    shared = {
        OUTPUTS: one,
        PAGES: DimRange(1, pages * batch, pages * batch + 1),
        SEQUENCE_PAGES: DimRange(1, pages, pages),
    }
    # Both have the same ranges but for the tokens: where one fixes what the other leaves open, the
    # compiler lays all weights out anew for it, and the plan has them twice.
    tokens, rows = DimRange(1, chunk, chunk), DimRange(1, chunk, chunk)
    return (
        Profile("prefill", {**shared, BATCH: DimRange(1, 1, batch), TOKENS: tokens, ROWS: rows}),
        Profile("decode", {**shared, BATCH: DimRange(1, batch, batch), TOKENS: one, ROWS: rows}),
    )


def _patch_ranges(interface: PatchInterface, most: int) -> dict[str, DimRange]:
    """One image at a time, of as many tokens as a sequence holds; no window is empty."""
    ranges = {
        IMAGES: DimRange(1, 1, 1),
        ROWS: DimRange(1, min(USUAL_TOKENS, most), most),
        WINDOWS: DimRange(1, min(USUAL_TOKENS, most), most),
    }
    symbols = {dim for spec in interface.inputs for dim in spec.shape}
    return {name: found for name, found in ranges.items() if name in symbols}


TARGET = TensorRTTarget(TENSORRT)
