"""Plans of TensorRT-RTX, which compiles without a GPU: real parser, real compiler, our plugin."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Protocol

import pytest

from conftest import DATA, HF
from damage import edit_json
from drawn_decoder import drawn
from heavy_checkpoint import HEAVY
from live_parity import FAMILIES, checkpoint
from named_kernels import Named
from vlmforge import pipeline
from vlmforge.cli import main
from vlmforge.engine.layer_report import LayerReport, read_layers
from vlmforge.engine.manifest import Manifest, load_manifest
from vlmforge.errors import BackendUnavailableError
from vlmforge_builder import plan_files
from vlmforge_builder.blocks.decoder import DecoderConfig
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.progress import Progress
from vlmforge_builder.ranks import Rank
from vlmforge_builder.targets import CompileJob, Settings, load_target
from vlmforge_plugins.cached_attention.compile import Nvrtc, compile_set
from vlmforge_plugins.cached_attention.config import Config
from vlmforge_recipes.llava.synthetic import PRESETS, SyntheticSpec, write_checkpoint

# A checkpoint of each family and version, and the head sizes of their decoders.
CHECKPOINTS = {
    "llava_1_5_hf": 32,
    "llava_next_mistral_hf": 32,
    "qwen_vl_chat": 64,
    "yi_vl": 32,
}
# The windows of the engines that other tests build of them: a decoder's trace depends on it.
SESSION = {HF.name: 1024}
CARRIED = Config(32, "float16", "float16")
DECODER = DecoderConfig(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=64,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=CARRIED.head_size,
    norm_eps=1e-5,
    rope_theta=1e4,
    activation="silu",
    max_positions=64,
)


class Build(Protocol):
    """Engines by checkpoint, attention, dtype and kind of weights, each built once."""

    def __call__(
        self, checkpoint: str, attention: str, dtype: str, weights: str = "", kv_dtype: str = ""
    ) -> Path: ...


# No plan is run here: it is enough to know their kernels by name.
NAMED = (
    CARRIED,
    Config(64, "bfloat16", "bfloat16"),
    Config(32, "bfloat16", "float8_e4m3fn"),
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the builds of this file find their kernels, those of `NAMED`, as if compiled before."""
    cache = tmp_path_factory.mktemp("named")
    for config in NAMED:
        compile_set(config, Named.for_nvrtc(), cache / "kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMFORGE_CACHE", str(cache))
        yield cache / "kernels"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, kernels: Path) -> Build:
    """See `Build`."""
    folder = tmp_path_factory.mktemp("plans")

    def make(
        checkpoint: str, attention: str, dtype: str, weights: str = "", kv_dtype: str = ""
    ) -> Path:
        engine = folder / f"{Path(checkpoint).name}.{attention}.{dtype}.{weights}.{kv_dtype}"
        if not engine.exists():
            options = BuildOptions(
                checkpoint if Path(checkpoint).is_dir() else str(DATA / checkpoint / "checkpoint"),
                engine,
                target="tensorrt_rtx",
                dtype=dtype,
                weights=weights or None,
                kv_dtype=kv_dtype or None,
                session_len=SESSION.get(checkpoint),
                max_batch_size=3,
                attention=attention,
            )
            with Progress(text=io.StringIO()) as progress:
                build_engine(options, progress)
        return engine

    return make


def report(engine: Path, part: str) -> LayerReport:
    layers = load_manifest(engine).part(part).layers
    assert layers is not None
    return read_layers(engine / layers)


# Every checkpoint with the plugin, in a dtype for each head size, so that most carry the same
# kernels; native attention in bfloat16 here, in float16 where plans are weighed. The rest is for
# nightly runs.
NIGHTLY = pytest.mark.nightly
FIRST, *_ = CHECKPOINTS


def _nightly(name: str, attention: str, dtype: str) -> bool:
    if attention == "native":
        return (name, dtype) != (FIRST, "bfloat16")
    return (CHECKPOINTS[name] == 32) == (dtype == "bfloat16")


KINDS = [
    pytest.param(*kind, marks=NIGHTLY if _nightly(*kind) else ())
    for kind in product(CHECKPOINTS, ("plugin", "native"), ("float16", "bfloat16"))
]
CARRYING = [
    pytest.param(name, dtype, marks=NIGHTLY if _nightly(name, "plugin", dtype) else ())
    for name, dtype in product(CHECKPOINTS, ("float16", "bfloat16"))
]


@pytest.mark.parametrize(("name", "attention", "dtype"), KINDS)
def test_layers_profiles_and_caches(build: Build, name: str, attention: str, dtype: str) -> None:
    check_plan(build(name, attention, dtype), attention, dtype)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        pytest.param(*kind, marks=NIGHTLY if kind != ("idefics3", "plugin") else ())
        for kind in product(FAMILIES, ("plugin", "native"))
    ],
)
def test_plans_of_drawn_checkpoints(
    build: Build, shared: Path, family: str, attention: str
) -> None:
    # The library has no attention of its own for two heads of queries with one of keys and values.
    shapes = [*FAMILIES[family].SHAPES]
    drawn = checkpoint(shared, family, shapes[(family, attention) == ("idefics3", "native")])
    check_plan(build(str(drawn), attention, "float16"), attention, "float16")


def check_plan(engine: Path, attention: str, dtype: str) -> None:
    manifest = load_manifest(engine)
    assert (manifest.backend, manifest.dtype, manifest.compute_dtype) == (
        *("tensorrt_rtx", dtype),
        dtype,
    )
    check_vision(engine)
    layers, histogram = manifest.kv.layers, report(engine, "decoder").histogram
    if attention == "plugin":
        assert histogram["PLUGIN_V3"] == layers
        assert not {"ATTENTION_INPUT", "KV_CACHE_UPDATE"} & set(histogram)
        assert manifest.kv.page_size == 64
    else:
        assert histogram["ATTENTION_INPUT"] == layers
        assert histogram["KV_CACHE_UPDATE"] == 2 * layers
        assert "PLUGIN_V3" not in histogram
        assert manifest.kv.page_size is None
        check_masks(report(engine, "decoder"))
    check_interface(manifest, dtype)
    assert main(["verify", str(engine), "--static"]) == 0


def check_vision(engine: Path) -> None:
    """The tower's attention is the library's own, with three tensors; only windows have a mask."""
    found = [layer for layer in report(engine, "vision").layers if layer.type == "ATTENTION_INPUT"]
    windowed = any(
        spec.name == "window_rows" for spec in load_manifest(engine).part("vision").inputs
    )
    assert found
    assert all(len(set(layer.inputs)) == 3 or windowed for layer in found)


def check_masks(layers: LayerReport) -> None:
    """Every attention over the cache has a mask, the same in all layers, and no lengths."""
    found = [layer for layer in layers.layers if layer.type == "ATTENTION_INPUT"]
    masks = {layer.inputs[3] for layer in found}
    assert {len(layer.inputs) for layer in found} == {4}
    types = {out.name: out.dtype for layer in layers.layers for out in layer.outputs}
    assert {types[mask] for mask in masks} == {"BOOL"}


def check_interface(manifest: Manifest, dtype: str, stored: str | None = None) -> None:
    decoder, kv = manifest.part("decoder"), manifest.kv
    assert [profile.name for profile in decoder.profiles] == ["prefill", "decode"]
    prefill, decode = (profile.dims for profile in decoder.profiles)
    assert (prefill["tokens"].most, decode["tokens"].most) == (512, 1)
    assert (prefill["batch"].usual, decode["batch"].usual) == (1, 3)
    # But for the tokens the ranges are the same, or the plan has its weights twice.
    ends = [{name: (dim.least, dim.most) for name, dim in p.items()} for p in (prefill, decode)]
    assert {name for name in ends[0] if ends[0][name] != ends[1][name]} == {"tokens"}
    caches = [spec for spec in decoder.inputs if spec.name.startswith("past_") and "." in spec.name]
    assert len(caches) == len(decoder.aliases) == 2 * kv.layers
    assert {spec.dtype for spec in caches} == {stored or dtype}
    place = kv.page_size if kv.page_size is not None else manifest.decode.session_len
    assert {spec.shape[2] for spec in caches} == {place}
    assert set(decoder.aliases.values()) == {spec.name for spec in caches}
    dtypes = {spec.name: spec.dtype for spec in (*decoder.inputs, *decoder.outputs)}
    assert (dtypes["logits"], dtypes["image_features"]) == ("float32", dtype)


@pytest.mark.parametrize(("name", "dtype"), CARRYING)
def test_a_plan_carries_its_kernels(build: Build, name: str, dtype: str, kernels: Path) -> None:
    plan = (build(name, "plugin", dtype) / "decoder.rank0.plan").read_bytes()
    config = Config(CHECKPOINTS[name], dtype, dtype)  # type: ignore[arg-type]
    binaries = compile_set(config, Nvrtc(), kernels)
    assert [b.target.name for b in binaries] == [
        *("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"),
        "ptx",
    ]
    # Once for each profile, not for each layer.
    assert {plan.count(binary.code) for binary in binaries} == {2}


def test_a_rank_is_a_chain_of_plans(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is compiled by the library, attention inside; the first has the kernels of all."""
    monkeypatch.setattr(plan_files, "write_meetings", lambda folder: {})  # they are others' to test
    traced, part, store = drawn(DECODER)
    settings, said = Settings("float16", None, 64, 2, None, None, None, tp=2), list[str]()
    job = CompileJob(part, store, settings, tmp_path, lambda *_: None, said.append, Rank(1, 2))
    made = load_target("tensorrt_rtx").compile(traced, job)
    assert made.chain is not None and made.layers is not None
    files = [segment.file for segment in made.chain.segments]
    assert files == [f"decoder.rank1.{number:03}.plan" for number in range(4)]
    assert {path.name for path in tmp_path.iterdir()} == {*files, made.layers}
    histogram = read_layers(tmp_path / made.layers).histogram
    assert histogram["PLUGIN_V3"] == DECODER.layers
    assert "DIST_COLLECTIVE" not in histogram
    plans = [(tmp_path / file).read_bytes() for file in files]
    for binary in compile_set(CARRIED, Nvrtc(), kernels):
        assert [plan.count(binary.code) for plan in plans] == [2, 0, 0, 0]
    assert len(said) == 1 and "decoder.rank1: 4 plans compiled by tensorrt_rtx" in said[0]


@pytest.mark.parametrize(
    ("name", "attention", "dtype", "weights"),
    [
        ("llava_1_5_hf", "plugin", "float16", "int4"),
        ("llava_1_5_hf", "native", "bfloat16", "int8"),
        pytest.param("qwen_vl_chat", "plugin", "bfloat16", "int4", marks=NIGHTLY),
    ],
)
def test_quantised_weights_stay_quantised_in_the_plan(
    build: Build, name: str, attention: str, dtype: str, weights: str
) -> None:
    engine = build(name, attention, dtype, weights)
    manifest = load_manifest(engine)
    assert (manifest.quantisation, manifest.dtype) == (weights, dtype)
    layers = manifest.kv.layers
    assert report(engine, "decoder").histogram["DEQUANTIZE"] == 4 * layers + 2
    assert "DEQUANTIZE" not in report(engine, "vision").histogram
    assert main(["verify", str(engine), "--static"]) == 0


def test_a_cache_in_fp8(build: Build, kernels: Path) -> None:
    """Pools and their kernels are of fp8; GPUs that do not convert it have none in the plan."""
    engine = build("yi_vl", "plugin", "bfloat16", kv_dtype="fp8")
    manifest = load_manifest(engine)
    check_interface(manifest, "bfloat16", "float8_e4m3fn")
    assert manifest.kv.dtype == "float8_e4m3fn"
    half = load_manifest(build("yi_vl", "plugin", "float16")).kv
    assert manifest.kv.bytes_per_token * 2 == half.bytes_per_token
    plan = (engine / "decoder.rank0.plan").read_bytes()
    config = Config(CHECKPOINTS["yi_vl"], "bfloat16", "float8_e4m3fn")
    binaries = compile_set(config, Nvrtc(), kernels)
    assert [b.target.name for b in binaries] == ["sm_89", "sm_90", "sm_120", "ptx"]
    assert all(binary.code in plan for binary in binaries)
    assert main(["verify", str(engine), "--static"]) == 0


@pytest.mark.parametrize(
    ("spec", "attention", "share"),
    [
        pytest.param(HEAVY, "native", 0.75, id="34m"),
        pytest.param(PRESETS["60m"], "plugin", 0.95, id="60m", marks=NIGHTLY),
    ],
)
def test_a_plan_is_smaller_by_what_quantised_weights_save(
    build: Build, tmp_path: Path, spec: SyntheticSpec, attention: str, share: float
) -> None:
    """By most of it: the compiler adds some megabytes, however many weights there are."""
    checkpoint = write_checkpoint(tmp_path / f"{spec.text.layers}layers", spec)
    engines = [build(str(checkpoint), attention, "float16", kind) for kind in ("", "int4")]
    check_plan(engines[0], attention, "float16")
    parts = [load_manifest(engine).part("decoder") for engine in engines]
    whole, quantised = ((e / p.file).stat().st_size for e, p in zip(engines, parts, strict=True))
    assert parts[1].weight_bytes < 0.28 * parts[0].weight_bytes
    assert whole - quantised > share * (parts[0].weight_bytes - parts[1].weight_bytes)


def test_an_engine_that_cannot_be_run_here(
    build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = build("yi_vl", "plugin", "float16")
    with pytest.raises(BackendUnavailableError) as caught:
        pipeline(engine)
    assert "verify --static work here" in caught.value.fix
    assert main(["verify", str(engine)]) == 1
    assert main(["inspect", str(engine)]) == 0
    shown = capsys.readouterr().out
    for words in ("2 PLUGIN_V3", "profile decode: batch 1..3", "block_table: int32 [batch,"):
        assert words in shown


def test_a_damaged_plan_and_a_false_description(
    build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = build(FIRST, "native", "bfloat16")
    plan = engine / "vision.plan"
    content = plan.read_bytes()
    plan.write_bytes(content[:-1] + b"?")
    assert main(["verify", str(engine), "--static"]) == 1
    assert "vision.plan" in capsys.readouterr().err
    plan.write_bytes(content)
    text = (engine / "engine.json").read_text("utf-8")
    edit_json("engine.json", **{"kv.page_size": 64})(engine)
    assert main(["verify", str(engine), "--static"]) == 1
    assert "FAIL decoder  caches" in capsys.readouterr().out
    (engine / "engine.json").write_text(text)
