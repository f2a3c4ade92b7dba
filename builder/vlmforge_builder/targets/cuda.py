"""CUDA: graphs that ONNX Runtime's CUDA provider runs, and between them our attention kernels.

The decoder becomes a chain (`vlmforge.engine.chain`): no GPU is needed to make it. All its pieces
take their weights from one file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmforge.engine.chain import AttentionCall, ChainStep, PartChain, RotaryTables, Segment
from vlmforge.engine.manifest import KVLayout, Part, TensorSpec
from vlmforge.env import writable_cache
from vlmforge.errors import BuildError, ConfigError
from vlmforge_builder.dtypes import KV_DTYPES
from vlmforge_builder.export import Traced
from vlmforge_builder.onnx_file import refer, tensor_specs
from vlmforge_builder.passes.assign_precision import assign_precision
from vlmforge_builder.passes.attention_nodes import attention_nodes
from vlmforge_builder.passes.cut_chain import Cut, cut_chain
from vlmforge_builder.passes.fuse_contrib import fuse_contrib
from vlmforge_builder.passes.scratch import token_bytes
from vlmforge_builder.targets import CompileJob, Settings
from vlmforge_builder.weights import AsDtype, Layout, plan, stored_dtype, weight_bytes, write
from vlmforge_plugins.cached_attention.compile import Compiler, Nvcc, Nvrtc, compile_set
from vlmforge_plugins.cached_attention.config import Config
from vlmforge_plugins.errors import CompileError, PluginError

PAGE_SIZE = 64
_STEMS = {"vision": "vision", "decoder": "decoder.rank0"}
_FLOAT32_INPUTS, _FLOAT32_OUTPUTS = {"pixel_values": "float32"}, {"logits": "float32"}
_FEATURES = "image_features"


@dataclass(frozen=True, slots=True)
class CudaTarget:
    """See the module."""

    name: str = "cuda"
    runs_here: bool = False

    def check(self, settings: Settings) -> None:
        """See `Target.check`."""
        if settings.dtype not in ("float16", "bfloat16"):
            raise ConfigError(
                f"The target {self.name} compiles no {settings.dtype} engines.",
                found=f"--dtype {settings.dtype}",
                expected="float16 or bfloat16: its attention kernels are of these",
                fix="--dtype bfloat16",
            )
        for option, value in (
            ("weights", settings.weights),
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
        _compiler()

    def compute_dtype(self, settings: Settings) -> str:
        """See `Target.compute_dtype`."""
        return settings.dtype

    def kv_layout(self, kv: KVLayout, settings: Settings) -> KVLayout:
        """See `Target.kv_layout`."""
        return dataclasses.replace(kv, dtype=_stored(settings), page_size=PAGE_SIZE)

    def compile(self, traced: Traced, job: CompileJob) -> Part:
        """Write the part's graphs, their weights in one file, and the attention's kernels.

        Raises:
            TensorError: a weight that is not right.
            ConfigError: heads of a size that there are no kernels for.
            BuildError: the kernels cannot be compiled.
        """
        model, settings, name = traced.model, job.settings, job.part.name
        dtypes = {n: stored_dtype(job.part.weights[n], settings.dtype) for n in traced.shapes}
        assign_precision(
            model, settings.dtype, dtypes, inputs=_FLOAT32_INPUTS, outputs=_FLOAT32_OUTPUTS
        )
        _take_float32(model, _FEATURES)
        _give_float32(model, _FEATURES)
        fuse_contrib(model)
        RemoveUnusedNodesPass()(model)
        layout = plan(traced.shapes, {n: AsDtype(dtype) for n, dtype in dtypes.items()})
        data = job.folder / f"{_STEMS[name]}.data"
        refer(model, layout, data)
        part = self._write(model, layout, data, job)
        for done, total in write(data, layout, job.part.weights, job.store):
            job.report(done, total)
        return part

    def _write(self, model: ir.Model, layout: Layout, data: Path, job: CompileJob) -> Part:
        stem, weights = _STEMS[job.part.name], weight_bytes(layout)
        part = Part(
            job.part.name,
            f"{stem}.onnx",
            (data.name,),
            tensor_specs(model.graph.inputs),
            tensor_specs(model.graph.outputs),
            weight_bytes=weights,
            loaded_bytes=weights,
            profiles=(),
            layers=None,
            aliases={},
        )
        found = attention_nodes(model.graph)
        if not found:
            ir.save(model, job.folder / part.file)
            return part
        config = _config(found[0].head_dim, job.settings)
        caches = {
            spec.name for spec in part.inputs if spec.name.startswith("past_") and "." in spec.name
        }
        cut = cut_chain(model)
        segments = _save(cut, stem, job.folder)
        kernels = _kernels(config, stem, job.folder)
        chain = PartChain(_steps(segments, cut.calls), _tables(cut, layout, data.name), kernels)
        return dataclasses.replace(
            part,
            file=segments[0].file,
            data=(data.name, *(s.file for s in segments[1:]), *kernels.values()),
            inputs=tuple(_pooled(s, job.settings) if s.name in caches else s for s in part.inputs),
            outputs=tuple(s for s in part.outputs if not s.name.startswith("present_")),
            chain=chain,
        )


def _take_float32(model: ir.Model, name: str) -> None:
    """Take the float input `name` as float32, whatever it is calculated in."""
    graph = model.graph
    value = next((v for v in graph.inputs if v.name == name), None)
    if value is None or value.dtype == ir.DataType.FLOAT:
        return
    wanted = value.dtype
    assert wanted is not None
    cast = ir.node("Cast", [value], attributes={"to": wanted}, name=f"{name}_cast")
    made = cast.outputs[0]
    made.name, made.type, made.shape = f"{name}_narrow", value.type, value.shape
    value.replace_all_uses_with(made)
    cast.replace_input_with(0, value)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(graph[0], cast)


def _give_float32(model: ir.Model, name: str) -> None:
    """Give the float output `name` as float32."""
    graph = model.graph
    for index, value in enumerate(graph.outputs):
        if value.name == name and value.dtype != ir.DataType.FLOAT:
            value.name = f"{name}_narrow"
            attributes = {"to": ir.DataType.FLOAT}
            cast = ir.node("Cast", [value], attributes=attributes, name=f"{name}_cast")
            made = cast.outputs[0]
            made.name, made.shape = name, value.shape
            made.type = ir.TensorType(ir.DataType.FLOAT)
            graph.append(cast)
            graph.outputs[index] = made


def _stored(settings: Settings) -> str:
    """The dtype of the cache."""
    return settings.dtype if settings.kv_dtype is None else KV_DTYPES[settings.kv_dtype]


def _pooled(spec: TensorSpec, settings: Settings) -> TensorSpec:
    """A key/value cache as pages."""
    _, heads, _, head_dim = spec.shape
    return TensorSpec(spec.name, _stored(settings), ("pages", heads, PAGE_SIZE, head_dim))


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


def _save(cut: Cut, stem: str, folder: Path) -> tuple[Segment, ...]:
    segments = []
    for index, piece in enumerate(cut.pieces):
        name = f"{stem}.{index:03d}.onnx"
        ir.save(piece, folder / name)
        graph = piece.graph
        segments.append(
            Segment(
                name, tensor_specs(graph.inputs), tensor_specs(graph.outputs), token_bytes(graph)
            )
        )
    return tuple(segments)


def _steps(
    segments: tuple[Segment, ...], calls: tuple[AttentionCall, ...]
) -> tuple[ChainStep, ...]:
    between = [
        step
        for segment, call in zip(segments, calls, strict=False)
        for step in (ChainStep(segment=segment), ChainStep(attention=call))
    ]
    return (*between, ChainStep(segment=segments[-1]))


def _tables(cut: Cut, layout: Layout, file: str) -> RotaryTables | None:
    if cut.tables is None:
        return None
    cos, sin = (next(i for i in layout if i.name == name).places[0] for name in cut.tables)
    positions, width = cos.tensor.shape
    return RotaryTables(file, cos.offset, sin.offset, positions, width)


def _compiler() -> Compiler:
    """NVRTC, which needs no toolkit, or else the toolkit's compiler (ConfigError: neither)."""
    try:
        return Nvrtc()
    except CompileError as missing:
        try:
            return Nvcc()
        except CompileError:
            raise ConfigError(
                missing.summary,
                found=missing.found,
                expected=missing.expected,
                fix="pip install 'vlmforge[kernels]'; no GPU and no CUDA toolkit is needed",
            ) from missing


def _kernels(config: Config, stem: str, folder: Path) -> Mapping[str, str]:
    """Compile the attention for every kind of GPU; files by the targets' names."""
    with TemporaryDirectory(prefix=".kernels.", dir=folder) as scratch:
        # Without a cache they are compiled again the next time.
        cache = writable_cache("kernels") or Path(scratch)
        try:
            binaries = compile_set(config, _compiler(), cache)
        except PluginError as error:
            raise BuildError(
                error.summary, found=error.found, expected=error.expected, fix=error.fix
            ) from error
    files = {}
    for binary in binaries:
        kind = "ptx" if binary.target.name == "ptx" else f"{binary.target.name}.cubin"
        files[binary.target.name] = f"{stem}.attention.{kind}"
        (folder / files[binary.target.name]).write_bytes(binary.code)
    return files


TARGET = CudaTarget()
