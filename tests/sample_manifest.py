"""A small, valid manifest for tests that need one without building an engine."""

from __future__ import annotations

from msgspec import structs

from vlmforge.engine.chain import (
    AttentionCall,
    BoundWeight,
    ChainStep,
    Collective,
    GatedActivation,
    PartChain,
    RotaryTables,
    Segment,
    SumNorm,
)
from vlmforge.engine.images.anyres import AnyRes
from vlmforge.engine.images.center_crop import CenterCrop
from vlmforge.engine.images.pixels import PixelFormat
from vlmforge.engine.images.tiling import Tiling, UnpaddedLines
from vlmforge.engine.manifest import (
    DecodePolicy,
    DimRange,
    FileEntry,
    KVLayout,
    Manifest,
    ParallelLayout,
    Part,
    Profile,
    Provenance,
)
from vlmforge.engine.migration import SCHEMA_VERSION
from vlmforge.engine.positions.absolute import Absolute
from vlmforge.engine.positions.dynamic_ntk import DynamicNTK
from vlmforge.engine.prompts import InlineToken, NamedSpan, PromptPolicy, TemplateParts
from vlmforge.engine.tensors import TensorSpec

TEMPLATE = TemplateParts(
    system="",
    meta_instruction="Be helpful.",
    eosys=" ",
    user="USER: ",
    eoh=" ",
    assistant="ASSISTANT: ",
    eoa="</s>",
    separator="",
    stop_words=("</s>",),
    strip_end=True,
)

PROMPT = PromptPolicy(
    template_name="plain",
    template_file="chat_template.jinja",
    stop_words=("</s>",),
    templates={"plain": TEMPLATE},
    image_placeholder="<image>",
    splice=InlineToken(),
    image_token_id=640,
    bos_id=1,
    bos_token="<s>",
    eos_token="</s>",
    image_line="{image}",
    text_separator="\n",
    content_tokens=None,
    history_window=None,
    box_format=None,
)

FORMAT = PixelFormat(
    resample="bicubic",
    rescale_factor=1 / 255,
    mean=(0.5, 0.25, 0.125),
    std=(0.1, 1e-3, 3.0000000000000004),
    background=(255, 255, 255),
)

IMAGE = CenterCrop(FORMAT, shortest_edge=8, crop=(8, 8))

PARTS = (
    Part(
        name="vision",
        file="vision.onnx",
        data=("vision.data",),
        inputs=(TensorSpec("pixel_values", "float32", ("images", 3, 8, 8)),),
        outputs=(TensorSpec("features", "float32", ("images", 4, 16)),),
        weight_bytes=100,
        loaded_bytes=100,
        profiles=(),
        layers=None,
        aliases={},
    ),
    Part("decoder", "decoder.rank0.onnx", ("decoder.rank0.data",), (), (), 200, 200, (), None, {}),
)

MANIFEST = Manifest(
    schema_version=SCHEMA_VERSION,
    backend="onnxruntime",
    dtype="float32",
    quantisation=None,
    compute_dtype="float32",
    parts=PARTS,
    image=IMAGE,
    prompt=PROMPT,
    decode=DecodePolicy(704, 16, (2,), 4, 64, 2, Absolute()),
    kv=KVLayout(2, 2, 8, "float32", None),
    parallel=ParallelLayout(1),
    tokenizer_file="tokenizer.json",
    files=(),
    provenance=Provenance("2024-01-01", "checkpoint", "0" * 64, "sample", "Sample", {}, {}),
)

_HIDDEN = TensorSpec("hidden", "float16", ("batch", "tokens", 16))
_GATED = TensorSpec("gated", "float16", ("batch", "tokens", 32))


def _attention(layer: int) -> AttentionCall:
    return AttentionCall(layer, f"qkv{layer}", f"mixed{layer}", 4, 2, 8, 0.35, 1.0, 1.0, True)


def _rows(name: str) -> TensorSpec:
    return TensorSpec(name, "float16", ("batch", "tokens", 64))


def _share(name: str) -> TensorSpec:
    return TensorSpec(name, "float16", ("batch", "tokens", 16))


CHAIN = PartChain(
    steps=(
        ChainStep(segment=Segment("d.0.onnx", (), (_rows("qkv0"), _HIDDEN), 300)),
        ChainStep(attention=_attention(0)),
        ChainStep(
            segment=Segment(
                "d.1.onnx",
                (_HIDDEN, _rows("mixed0")),
                (_rows("qkv1"),),
                300,
                weights=(
                    BoundWeight(
                        TensorSpec("layers.0.w", "float16", (64, 16)), "w", "d.data", 12288
                    ),
                ),
                names=("hidden", "mixed", "qkv"),
            )
        ),
        ChainStep(attention=_attention(1)),
        ChainStep(segment=Segment("d.2.onnx", (_rows("mixed1"),), (_share("out1"),), 300)),
        ChainStep(
            collective=Collective(
                "all_reduce", "out1", "sum1", norm=SumNorm("hidden", "norm1", "d.data", 8192, 1e-5)
            )
        ),
        ChainStep(
            segment=Segment("d.3.onnx", (_share("norm1"), _HIDDEN), (_rows("gate_up"),), 300, 4096)
        ),
        ChainStep(gated=GatedActivation("silu", "gate_up", "gated")),
        ChainStep(segment=Segment("d.4.onnx", (_GATED,), (_rows("logits_shard"),), 300)),
        ChainStep(collective=Collective("all_gather", "logits_shard", "logits", 100)),
    ),
    rotary=RotaryTables("d.data", 0, 4096, 64, 4),
    kernels={"sm_90": "d.sm_90.cubin"},
    meetings={"sm_90": "d.meetings.sm_90.cubin"},
    activations={"sm_90": "d.activations.sm_90.cubin"},
    sampler=Segment("d.sample.onnx", (), (), 500),
    choosers={"sm_90": "d.choosers.sm_90.cubin"},
)
"""Of two layers, as the sample's key/value cache has them."""

_SHARD = structs.replace(
    PARTS[1],
    outputs=PARTS[0].outputs,
    rotary_tables=("cos", "sin"),
    data=tuple(sorted(CHAIN.files)),
    chain=CHAIN,
)

RICH = structs.replace(
    MANIFEST,
    quantisation="int4",
    parts=(
        structs.replace(
            PARTS[0],
            profiles=(Profile("encode", {"images": DimRange(1, 1, 8)}),),
            layers="vision.layers.json",
            aliases={"features": "pixel_values"},
        ),
        _SHARD,
        structs.replace(_SHARD, name="decoder.rank1"),
    ),
    parallel=ParallelLayout(2, kv_heads=2),
    kv=structs.replace(MANIFEST.kv, page_size=64),
    image=AnyRes(FORMAT, Tiling(8, ((8, 16), (16, 16)), (0, 0, 0), 2, 5, UnpaddedLines(digits=7))),
    prompt=structs.replace(
        PROMPT,
        splice=NamedSpan("<img>", "</img>", 5, 6, 10, "image"),
        content_tokens=("<img>",),
        history_window=5,
        box_format="ref_box_1000",
        in_order=True,
        image_around=("<a>", "</a>"),
    ),
    decode=structs.replace(MANIFEST.decode, positions=DynamicNTK(2048, 3), feature_layers=2),
    files=(FileEntry("vision.data", 3, "0" * 64),),
    provenance=structs.replace(MANIFEST.provenance, options={"a": "b"}, versions={"c": "1"}),
)
"""A manifest that has all that there can be."""


def with_files(entries: tuple[FileEntry, ...]) -> Manifest:
    """The sample with these files."""
    return structs.replace(MANIFEST, files=entries)
