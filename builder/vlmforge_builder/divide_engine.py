"""Divide an engine that is there already among tensor-parallel ranks, without its checkpoint.

The decoder's weights are read by slice from where the engine has them, whole numbers as they are;
all else is copied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import onnx_ir as ir
from msgspec import structs

from vlmforge.engine.bundle import Bundle, open_bundle
from vlmforge.engine.interface import interface_of
from vlmforge.engine.manifest import (
    MANIFEST_FILE,
    Manifest,
    Part,
    Provenance,
    dump_manifest,
    load_manifest,
)
from vlmforge.errors import BuildError, ConfigError, EngineError
from vlmforge_builder.block_quantisation import Blocks, scales_name
from vlmforge_builder.checkpoint.mapped import MappedTensor, TensorInfo, contiguous_stride
from vlmforge_builder.checkpoint.store import FileStore
from vlmforge_builder.compile_ranks import compile_ranks, parallel_layout
from vlmforge_builder.kept_weights import Kept, KeptBlocks
from vlmforge_builder.progress import Progress
from vlmforge_builder.publish import list_files, sole_build, staging
from vlmforge_builder.recipe import PartSpec
from vlmforge_builder.targets import CompileJob, Settings, load_target
from vlmforge_builder.traced_file import NEUTRAL_FILE, load_traced
from vlmforge_builder.weights import Weight

BUILD_LOG = "build.log.jsonl"
_TARGET = "onnxruntime"
# As torch names them; four bits are two to a byte.
_DTYPES: Mapping[ir.DataType, str] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT8: "int8",
    ir.DataType.INT4: "uint8",
}


def divide_engine(
    engine: Path, output: Path, tp: int, progress: Progress, *, force: bool, wait: bool
) -> Path:
    """Write the engine of `tp` ranks of the engine in `engine` at `output` and return its path.

    One that was divided so already is left as it is, unless `force`.

    Raises:
        ConfigError: an engine that is no one rank's of ONNX Runtime, or sizes that ranks cannot
            divide.
        BuildError: `output` is another engine, or the engine was built before this could be done.
        EngineError: `engine` is damaged.
    """
    with progress.stage("read the engine"):
        bundle = open_bundle(engine)
    _check(bundle, output, tp)
    wanted = _provenance(bundle.manifest, tp)
    if _is_current(output, wanted, force=force):
        progress.note(f"{output} is up to date; --force builds it again")
        return output
    with sole_build(output, progress.note if wait else None):
        if not _is_current(output, wanted, force=force):
            _write(bundle, output, wanted, tp, progress)
    return output


def _check(bundle: Bundle, output: Path, tp: int) -> None:
    manifest = bundle.manifest
    if tp < 2 or manifest.parallel.tp != 1 or manifest.backend != _TARGET:
        raise ConfigError(
            "Only an engine of one rank can be divided, among several.",
            found=f"an engine of {manifest.parallel.tp} for {manifest.backend}, --tp {tp}",
            expected=f"an engine of 1 for {_TARGET}, and a --tp of 2 or more",
            fix="give --tp 2 or more"
            if tp < 2
            else f"build-engine CHECKPOINT -o {output} --tp {tp}, from the checkpoint",
        )
    if output.resolve() == bundle.folder.resolve():
        raise ConfigError(
            "An engine cannot be divided where it lies.",
            found=f"-o {output}",
            expected="another folder",
            fix=f"-o {output}.tp{tp}",
        )
    if not (bundle.folder / NEUTRAL_FILE).exists():
        raise BuildError(
            f"{bundle.folder} was built before engines could be divided.",
            found=f"no {NEUTRAL_FILE} in it",
            expected="an engine of this version",
            fix="build-engine CHECKPOINT --tp N, from the checkpoint",
        )


def _provenance(manifest: Manifest, tp: int) -> Provenance:
    options = {**manifest.provenance.options, "tp": str(tp)}
    return structs.replace(manifest.provenance, options=options)


def _is_current(output: Path, wanted: Provenance, *, force: bool) -> bool:
    """Whether `output` is this engine already (BuildError: another one)."""
    if force or not (output / MANIFEST_FILE).exists():
        return False
    try:
        found = load_manifest(output).provenance
    except EngineError:
        found = None
    if found is None or structs.replace(found, built_at=wanted.built_at) != wanted:
        raise BuildError(
            f"{output} is another engine.",
            found="an engine of " + (found.source if found else "another schema version"),
            expected="no engine, or the one that would be written",
            fix="add --force to replace it, or choose another -o",
        )
    try:
        open_bundle(output)
    except EngineError:
        return False  # damaged since: write it again
    return True


def _write(
    bundle: Bundle, output: Path, provenance: Provenance, tp: int, progress: Progress
) -> None:
    with staging(output) as folder:
        with progress.stage("copy what the ranks share"):
            _copy_shared(bundle, folder, tp)
        parts = _divided(bundle, folder, tp, progress)
        built_at = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = structs.replace(
            bundle.manifest,
            parts=parts,
            parallel=parallel_layout(parts, tp),
            files=(),
            provenance=structs.replace(provenance, built_at=built_at),
        )
        with progress.stage("checksums"):
            files = list_files(folder)
        manifest = structs.replace(manifest, files=files)
        (folder / MANIFEST_FILE).write_text(dump_manifest(manifest), "utf-8")
    size = sum(entry.size for entry in files)
    progress.note(f"built {output}: {len(files) + 1} files, {size / 1e9:.2f} GB")


def _copy_shared(bundle: Bundle, folder: Path, tp: int) -> None:
    manifest, decoder = bundle.manifest, bundle.manifest.part("decoder")
    left = {NEUTRAL_FILE, decoder.file, *decoder.data}
    for entry in manifest.files:
        if entry.path not in left:
            target = folder / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / entry.path, target)
    with (folder / BUILD_LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps({"event": "divided", "tp": str(tp)}) + "\n")


def _divided(bundle: Bundle, folder: Path, tp: int, progress: Progress) -> tuple[Part, ...]:
    """The parts of the new engine; the others than the decoder are as they were."""
    manifest, report = bundle.manifest, progress.report
    interface = interface_of(manifest, "decoder")
    traced = load_traced(bundle.folder / NEUTRAL_FILE, [spec.name for spec in interface.inputs])
    stored = _stored(bundle)
    weights = {name: _weight(name, shape, stored) for name, shape in traced.shapes.items()}
    part = PartSpec("decoder", _no_module, interface, weights)
    store = FileStore({name: _mapped(name, tensor) for name, tensor in stored.items()})
    decode, target = manifest.decode, load_target(_TARGET)
    settings = Settings(
        *(manifest.dtype, manifest.quantisation, decode.session_len, decode.max_batch_size),
        kv_dtype=None,
        attention=None,
        compute_capability=None,
        tp=tp,
    )
    job = CompileJob(part, store, settings, folder, report, progress.note)
    others = tuple(part for part in manifest.parts if part.name != "decoder")
    return (*others, *compile_ranks(target, traced, job, progress))


def _no_module() -> NoReturn:
    raise BuildError("An engine has the graph of its decoder, and no module to trace.")


def _stored(bundle: Bundle) -> dict[str, ir.ExternalTensor]:
    """Where the decoder's tensors lie, by name."""
    graph = ir.load(bundle.folder / bundle.manifest.part("decoder").file).graph
    tensors = ((name, value.const_value) for name, value in graph.initializers.items())
    return {name: t for name, t in tensors if isinstance(t, ir.ExternalTensor)}


def _weight(name: str, shape: tuple[int, ...], stored: Mapping[str, ir.ExternalTensor]) -> Weight:
    found, scales = stored[name], stored.get(scales_name(name))
    if scales is None:
        return Kept(name, _DTYPES[found.dtype])
    if found.dtype == ir.DataType.UINT8:  # a matrix, as `ForMatMulNBits` writes it
        _, blocks, size = found.shape.numpy()
        return KeptBlocks(name, Blocks(8 * size * blocks // shape[0], 0, shape[0] // blocks))
    bits = 4 if found.dtype == ir.DataType.INT4 else 8
    return KeptBlocks(name, Blocks(bits, 1, shape[1] // scales.shape.numpy()[1]))


def _mapped(name: str, tensor: ir.ExternalTensor) -> MappedTensor:
    shape = tensor.shape.numpy()
    if tensor.dtype == ir.DataType.INT4:
        shape = (*shape[:-1], shape[-1] // 2)
    info = TensorInfo(name, _DTYPES[tensor.dtype], shape, Path(tensor.path))
    return MappedTensor(info, tensor.offset or 0, contiguous_stride(shape))
