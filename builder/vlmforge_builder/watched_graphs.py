"""Graphs run with all that they calculate as outputs: of engines, and of checkpoints as traced."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from polygraphy import constants
from polygraphy.backend.onnx import ModifyOutputs
from polygraphy.logger import G_LOGGER
from typing_extensions import override

from vlmforge.backends import DecoderBatch, LoadOptions, load_backend
from vlmforge.backends.cuda.device import Segment, Tensor
from vlmforge.backends.fake import Float32Segment, Graphs, cuda_on_cpu
from vlmforge.backends.fake_memory import narrow, numbers_of
from vlmforge.engine.bundle import Bundle
from vlmforge.engine.images.patch_inputs import WINDOW_PLACES, WINDOW_ROWS, WINDOW_SIZES
from vlmforge.engine.interface import (
    BATCH,
    BLOCK_TABLE,
    IMAGES,
    INPUT_IDS,
    LOGITS_INDICES,
    OUTPUTS,
    QUERY_LENGTHS,
    ROTARY_LEVELS,
    ROWS,
    TOKENS,
    TURNS,
    WINDOWS,
    PatchInterface,
    interface_of,
)
from vlmforge.engine.manifest import Manifest
from vlmforge.errors import BackendUnavailableError, ConfigError
from vlmforge.ort import ort
from vlmforge_builder import passes
from vlmforge_builder.alike_segments import names_within
from vlmforge_builder.build import BuildOptions, read_checkpoint
from vlmforge_builder.export import trace
from vlmforge_builder.onnx_file import refer
from vlmforge_builder.ops import DOMAIN, VERSION, functions
from vlmforge_builder.passes.store_weights import StoreWeightsPass
from vlmforge_builder.progress import Progress
from vlmforge_builder.weights import AsDtype, plan, stored_dtype, write
from vlmforge_builder.widened_graphs import WIDENED, session_of, widen

Array = NDArray[Any]
Inputs = Mapping[str, Array]
WEIGHT = "the checkpoint's weights"
_TOKENS, _CAPACITY, _ROWS = 24, 64, 8


@dataclass(frozen=True, slots=True)
class Watched:
    """What was calculated, in order, by name; and the ops that made it."""

    tensors: dict[str, Array] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)


def draw(manifest: Manifest, part: str) -> Inputs:
    """Inputs of a part, without caches: noise, and a prompt that begins with an image."""
    rng, given = np.random.default_rng(0), dict[str, Array]()
    interface = interface_of(manifest, part)
    window = interface.patches.window if isinstance(interface, PatchInterface) else 0
    sizes = {IMAGES: 1, ROWS: _ROWS, BATCH: 1, TOKENS: _TOKENS, OUTPUTS: _TOKENS}
    sizes[WINDOWS] = -(-_ROWS // (window or 1))
    for spec in interface.inputs:
        if "." in spec.name or spec.name in (QUERY_LENGTHS.name, BLOCK_TABLE.name):
            continue
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]
        if spec.dtype == "float32":
            given[spec.name] = rng.standard_normal(shape, np.float32)
        else:
            given[spec.name] = np.zeros(shape, np.int64)
    whole: dict[str, Array] = {
        WINDOW_SIZES: np.full(sizes[WINDOWS], window),
        WINDOW_ROWS: np.arange(sizes[WINDOWS] * window).reshape(-1, window or 1) % _ROWS,
        WINDOW_PLACES: np.arange(_ROWS),
        LOGITS_INDICES.name: np.arange(_TOKENS)[None],
        INPUT_IDS.name: rng.integers(0, manifest.decode.vocab_size, (1, _TOKENS)),
    }
    whole[INPUT_IDS.name][0, :_ROWS] = manifest.decode.vocab_size + np.arange(_ROWS)
    return given | {name: values for name, values in whole.items() if name in given}


def watch_engine(bundle: Bundle, part: str, inputs: Inputs) -> Watched:
    """Run a part of an engine on the processor.

    Raises:
        BackendUnavailableError: it is a plan of TensorRT, which shows nothing of its inside.
        ConfigError: it is of several ranks.
    """
    manifest, described = bundle.manifest, bundle.manifest.part(part)
    if manifest.parallel.tp > 1:
        raise ConfigError(
            "Engines of several ranks are not compared tensor by tensor.",
            found=f"an engine of {manifest.parallel.tp} ranks",
            expected="an engine of one",
            fix="build the same checkpoint without --tp, and compare that",
        )
    if manifest.backend not in ("onnxruntime", "cuda"):
        raise BackendUnavailableError(
            f"An engine of {manifest.backend} cannot be compared tensor by tensor here.",
            found=f"{described.file}, a plan",
            expected="an engine of onnxruntime or cuda, whose graphs the processor runs",
            fix="build the same checkpoint with --target cuda, whose attention is the same, and "
            "compare that",
        )
    if described.chain is not None:
        return _watch_chain(bundle, inputs)
    watched = Watched()
    _run(bundle.folder / described.file, _with_caches(manifest, part, inputs), watched)
    return watched


def watch_checkpoint(
    manifest: Manifest, checkpoint: Path, part: str, inputs: Inputs, scratch: Path
) -> Watched:
    """Trace a part of a checkpoint as an engine's was, and run it as it is, by `scratch` files.

    Raises:
        VlmforgeError: the checkpoint cannot be read.
    """
    with Progress(text=io.StringIO()) as progress:
        spec = read_checkpoint(_options(manifest, checkpoint), progress).spec
    described = next(item for item in spec.parts if item.name == part)
    traced = trace(described)
    dtypes = {n: stored_dtype(described.weights[n], manifest.dtype) for n in traced.shapes}
    passes.run(ir.passes.Sequential(StoreWeightsPass(dtypes)), traced.model)
    for function in functions():
        traced.model.functions[function.identifier()] = function
    traced.model.opset_imports[DOMAIN] = VERSION
    layout = plan(traced.shapes, {name: AsDtype(dtype) for name, dtype in dtypes.items()})
    data, file = scratch / f"{part}.data", scratch / f"{part}.onnx"
    refer(traced.model, layout, data)
    ir.save(traced.model, file)
    for _ in write(data, layout, described.weights, spec.store):
        pass
    watched = Watched()
    _run(file, _with_caches(manifest, part, inputs), watched)
    return watched


def _options(manifest: Manifest, checkpoint: Path) -> BuildOptions:
    """Those that shape what is traced."""
    built = {k: None if v == "None" else v for k, v in manifest.provenance.options.items()}
    return BuildOptions(
        str(checkpoint),
        Path("ENGINE"),
        session_len=manifest.decode.session_len,
        vision_tower=built.get("vision_tower"),
        tower_weights=built.get("tower_weights"),
        ignore_config_key=(built.get("ignore_config_key") or "").split(", "),
    )


def _with_caches(manifest: Manifest, part: str, inputs: Inputs) -> Inputs:
    """The inputs of a whole decoder: with empty caches, dense ones."""
    given = dict(inputs)
    if part == "decoder":
        kv = manifest.kv
        empty = np.zeros((1, kv.kv_heads, _CAPACITY, kv.head_dim), np.float32)
        kinds = (f"past_{kind}.{layer}" for kind in ("key", "value") for layer in range(kv.layers))
        given.update(dict.fromkeys(kinds, empty))
    return given


def _run(file: Path, inputs: Inputs, watched: Watched) -> None:
    session = _opened(file, watched)
    given = {item.name: inputs[item.name] for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    watched.tensors.update(zip(names, session.run(names, given), strict=True))


def _opened(file: Path, watched: Watched) -> ort.InferenceSession:
    """A session in float32 that gives all tensors."""
    model = ir.load(file)
    widen(model)
    for node in model.graph:
        for value in node.outputs:
            name = value.name or ""
            watched.ops[name] = WEIGHT if name.endswith(WIDENED) else node.op_type
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        marked: onnx.ModelProto = ModifyOutputs(ir.to_proto(model), constants.MARK_ALL)()
    return session_of(marked.SerializeToString(), file)


@dataclass(frozen=True, slots=True)
class _Watching(Graphs):
    watched: Watched

    @override
    def session(self, file: Path) -> ort.InferenceSession:
        return _opened(file, self.watched)

    @override
    def segment(self, file: Path, owner: object) -> Segment:
        def note(inputs: Sequence[Tensor], outputs: Sequence[Tensor], found: Inputs) -> None:
            self._note(names_within(ir.load(file), outputs[0].name), inputs, outputs, found)

        return Float32Segment(lambda path: _opened(path, self.watched), file, note)

    def _note(
        self,
        names: Mapping[str, str],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        found: Inputs,
    ) -> None:
        """`names`: of what is calculated inside, by the graph's; none: those are its own."""
        watched = self.watched
        for item in inputs:
            wide = item.weight and narrow(item)
            name = f"{item.name}{WIDENED}" if wide else item.name
            # What the attention between segments gave is the next one's input.
            # It lies in memory that is used again.
            watched.tensors[name] = numbers_of(item).copy()
            if item.weight:
                watched.ops[name] = WEIGHT
        for name, values in found.items():
            watched.tensors[names.get(name, name)] = values
            if name in watched.ops:
                watched.ops[names.get(name, name)] = watched.ops[name]


def _watch_chain(bundle: Bundle, inputs: Inputs) -> Watched:
    """A prefill by the backend `cuda` on the processor, segment by segment."""
    manifest, watched = bundle.manifest, Watched()
    chain = manifest.part("decoder").chain
    assert chain is not None
    watched.ops.update({gate.out: "gated activation" for gate in chain.gates})
    page = manifest.kv.page_size or _CAPACITY
    options = LoadOptions(1, _CAPACITY, block_size=page, paged=True, chunk=_TOKENS)
    with cuda_on_cpu(graphs=_Watching(watched)):
        decoder = load_backend("cuda").load_decoder(bundle.folder, manifest, options)
        watched.tensors.clear()  # of runs that warm up
        decoder.step(
            DecoderBatch(
                [0],
                inputs["input_ids"],
                inputs["past_lengths"],
                inputs["image_features"],
                inputs["logits_indices"],
                inputs.get(ROTARY_LEVELS.name),
                [range(options.blocks)],
                inputs.get(TURNS),
            )
        )
    return watched
