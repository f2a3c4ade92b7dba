"""The ranks of a divided decoder give together what one rank gives: drawn decoders, golden ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from divided_decoders import SETTINGS, compiled, prompts, ranks_of
from drawn_decoder import Random, drawn
from golden_models import FOLDERS
from lowered_decoder import model_spec, part_of
from vlmforge.engine.layer_report import read_layers
from vlmforge.errors import BuildError, ConfigError
from vlmforge_builder import build
from vlmforge_builder.blocks.decoder import Decoder, DecoderConfig
from vlmforge_builder.export import Traced
from vlmforge_builder.passes import shard as shard_pass
from vlmforge_builder.passes.shard import shard
from vlmforge_builder.ranks import Rank, heads_of
from vlmforge_builder.targets.tensorrt import TensorRTTarget
from vlmforge_builder.tensorrt.flavours import TENSORRT_RTX
from vlmforge_builder.weights import Stored
from vlmforge_recipes.cached_decoder import cached_decoder_part

CONFIG = DecoderConfig(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=64,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    rope_theta=1e4,
    activation="silu",
    max_positions=64,
)


# --- drawn decoders -----------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> tuple[DecoderConfig, int]:
    tp = draw(st.sampled_from([2, 3, 4]))
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    heads = kv_heads * draw(st.sampled_from([n for n in range(1, 13) if n * kv_heads % tp == 0]))
    return replace(
        CONFIG,
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=tp * draw(st.integers(1, 20)),
        vocab_size=draw(st.integers(5, 99)),
        layers=draw(st.integers(1, 2)),
        qkv_bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", "gelu"])),
    ), tp


@settings(max_examples=12)
@given(configs(), st.booleans(), st.booleans(), st.booleans())
@example((replace(CONFIG, heads=6, kv_heads=2, intermediate_size=66), 3), True, True, True)
@example((replace(CONFIG, heads=8, kv_heads=1, qkv_bias=True), 4), False, True, False)
def test_ranks_together_are_the_whole(
    drawn_config: tuple[DecoderConfig, int], tied: bool, normed: bool, table: bool
) -> None:
    config, tp = drawn_config
    made = drawn(config, tied=tied, normed=normed)
    ids, features = prompts(config.vocab_size, config.hidden_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_pass, "LARGE_TABLE", 0 if table else 1 << 40)
        with ranks_of(*made, 1) as whole, ranks_of(*made, tp) as ranks:
            expected, tokens = whole.greedy(ids, features, 4)
            found, same = ranks.greedy(ids, features, 4)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)
    np.testing.assert_array_equal(same, tokens)


@pytest.mark.parametrize(
    ("weights", "heads", "inner", "tp"),
    [
        ("int8", 16, 256, 2),
        ("int4", 12, 384, 3),
        # A border inside a block: of heads, of an MLP, of both, and columns that must be padded.
        ("int4", 8, 256, 2),
        ("int8", 16, 128, 2),
        ("int4", 12, 32, 4),
        ("int8", 4, 48, 4),
    ],
)
def test_whole_numbers_are_those_of_one_rank(
    monkeypatch: pytest.MonkeyPatch,
    weights: str,
    heads: int,
    inner: int,
    tp: int,
) -> None:
    monkeypatch.setattr(shard_pass, "LARGE_TABLE", 0)
    hidden = CONFIG.hidden_size if inner != 48 else 46
    config = replace(
        CONFIG, vocab_size=65, heads=heads, intermediate_size=inner, hidden_size=hidden
    )
    made, quantised = drawn(config), replace(SETTINGS, weights=weights)
    ids, features = prompts(config.vocab_size, config.hidden_size)
    with ranks_of(*made, 1, quantised) as whole, ranks_of(*made, tp, quantised) as ranks:
        expected, tokens = whole.greedy(ids, features, 4)
        found, same = ranks.greedy(ids, features, 4)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(same, tokens)
    with ranks_of(*made, 1) as plain:
        assert abs(plain.greedy(ids, features, 1)[0] - expected[0]).max() > 1e-3


# --- golden decoders ----------------------------------------------------------------------------

USUAL = (("qwen_vl_chat", 2), ("llava_next_mistral_hf", 4))
GRID = [
    pytest.param(folder, tp, marks=() if (folder, tp) in USUAL else pytest.mark.nightly)
    for folder in FOLDERS
    for tp in (2, 4)
]


@pytest.mark.parametrize(("folder", "tp"), GRID)
def test_golden_decoders_are_divided(folder: str, tp: int) -> None:
    spec = model_spec(folder)
    part = part_of(spec, "decoder")
    made = build.trace(part), part, spec.store
    ids, features = prompts(spec.vocab_size, spec.hidden_size)
    level = 1 if spec.positions.has_levels else 0
    try:
        with ranks_of(*made, 1) as whole, ranks_of(*made, tp) as ranks:
            expected, tokens = whole.greedy(ids, features, 8, level)
            found, same = ranks.greedy(ids, features, 8, level)
    except ConfigError as error:  # this one's heads are too few
        assert (folder, tp) == ("llava_v1_6_mistral_liuhaotian", 4), error
        assert error.found == "2 attention heads, tp 4"
        return
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(same, tokens)


WHOLE_NUMBERS = [
    pytest.param(folder, weights, tp, marks=() if usual else pytest.mark.nightly)
    for folder in FOLDERS
    for weights in ("int8", "int4")
    for tp in (2, 4)
    if (folder, tp) != ("llava_v1_6_mistral_liuhaotian", 4)  # heads are too few
    for usual in [(folder, weights, tp) in {("yi_vl", "int8", 2), ("qwen_vl_chat", "int8", 4)}]
]


@pytest.mark.parametrize(("folder", "weights", "tp"), WHOLE_NUMBERS)
def test_golden_decoders_in_whole_numbers(folder: str, weights: str, tp: int) -> None:
    spec = model_spec(folder)
    part, settings = part_of(spec, "decoder"), replace(SETTINGS, weights=weights)
    made = build.trace(part), part, spec.store
    ids, features = prompts(spec.vocab_size, spec.hidden_size)
    level = 1 if spec.positions.has_levels else 0
    with ranks_of(*made, 1, settings) as whole, ranks_of(*made, tp, settings) as ranks:
        expected, tokens = whole.greedy(ids, features, 12, level)
        found, same = ranks.greedy(ids, features, 12, level)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(same, tokens)


@pytest.mark.nightly
def test_decoders_of_today_are_divided() -> None:
    """Norms of heads, positions from outside, features for several layers."""
    config = replace(
        CONFIG,
        heads=12,
        intermediate_size=96,
        layers=3,
        qkv_bias=True,
        qk_norm=True,
        turned_outside=True,
        feature_layers=2,
    )
    shapes = {name: tuple(p.shape) for name, p in Decoder(config).named_parameters()}
    part = cached_decoder_part(config, {name: Stored(name) for name in shapes})
    made = build.trace(part), part, Random(shapes)
    ids, features = prompts(config.vocab_size, 2 * config.hidden_size)
    with ranks_of(*made, 1) as whole:
        expected, tokens = whole.greedy(ids, features, 4)
    for tp in (2, 3, 4):
        with ranks_of(*made, tp) as ranks:
            found, same = ranks.greedy(ids, features, 4)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)
        np.testing.assert_array_equal(same, tokens)


def test_drawn_decoders_are_of_the_form_of_traced_ones() -> None:
    """So that what is said of drawn ones is said of all."""
    spec = model_spec("llava_1_5_hf")
    traced = build.trace(part_of(spec, "decoder"))
    config = part_of(spec, "decoder").module.args[0]  # type: ignore[attr-defined]
    ours, _, _ = drawn(config)
    assert ours.shapes == traced.shapes

    def kinds(made: Traced) -> list[tuple[str, str]]:
        left = {"Shape", "Expand"}  # of a zero for each token
        return [(n.domain, n.op_type) for n in made.model.graph if n.op_type not in left]

    assert kinds(ours) == kinds(traced)


@pytest.mark.parametrize(("weights", "attention"), [(None, "native"), ("int4", "plugin")])
def test_chains_of_plans_meet_between_them(
    tmp_path: Path, weights: str | None, attention: str
) -> None:
    """Attention is inside, with the pools of its layer; what is open comes from the step's ids."""
    config = replace(CONFIG, heads=8, kv_heads=2, head_dim=64, layers=2, qkv_bias=True)
    half = replace(SETTINGS, dtype="float16", weights=weights, attention=attention)
    parts = compiled(*drawn(config), tmp_path, 4, half, "tensorrt_rtx", described=True)
    meant = compiled(*drawn(config), tmp_path, 4, half, "cuda", described=True)
    for part, other in zip(parts, meant, strict=True):
        chain, theirs = part.chain, other.chain
        assert chain is not None and theirs is not None and not chain.attention
        met, meant_to = (
            [(call.kind, call.tensor, call.width) for call in one.collectives]
            for one in (chain, theirs)
        )
        assert met == meant_to and not any(call.norm for call in chain.collectives)
        assert part.file == chain.segments[0].file and part.layers in part.data
        assert {segment.file for segment in chain.segments} < {part.file, *part.data}
        taken = [{spec.name for spec in segment.inputs} for segment in chain.segments]
        ids = {"input_ids", "past_lengths"}
        pages = {"query_lengths", "block_table"} if attention == "plugin" else set()
        for layer in (0, 1):
            assert taken[2 * layer] >= {*ids, *pages, f"past_key.{layer}", f"past_value.{layer}"}
            assert not taken[2 * layer + 1] & {*ids, *pages}
        caches = [name for names in taken for name in names if name.startswith("past_key")]
        assert sorted(caches) == ["past_key.0", "past_key.1"]
        given = [spec for segment in chain.segments for spec in segment.outputs]
        assert {spec.name for spec in given} >= part.aliases.keys()


@pytest.mark.parametrize("weights", [None, "int4"])
def test_chains_for_gpus_meet_between_their_calls(tmp_path: Path, weights: str | None) -> None:
    config = replace(CONFIG, heads=8, kv_heads=2, head_dim=64, layers=2, qkv_bias=True)
    half = replace(SETTINGS, dtype="float16", weights=weights)
    parts = compiled(*drawn(config), tmp_path, 4, half, "cuda", described=True)
    chains = [part.chain for part in parts]
    for part, chain in zip(parts, chains, strict=True):
        assert chain is not None
        assert {(c.heads, c.kv_heads, c.head_dim) for c in chain.attention} == {(2, 1, 64)}
        assert [call.layer for call in chain.attention] == [0, 1]
        assert [spec.shape for spec in part.inputs if "." in spec.name] == [
            ("pages", 1, 64, 64)
        ] * 4
        assert [c.kind for c in chain.collectives] == ["all_reduce"] * 4 + ["all_gather"]
        gather = chain.collectives[-1]
        shares = {s.name: s for segment in chain.segments for s in segment.outputs}
        assert (gather.width, shares[gather.tensor].shape[-1]) == (37, 10)
        assert {shares[c.tensor].dtype for c in chain.collectives} == {"float16"}
        # A rank has no call, and no meeting, that another has not.
        assert [step.segment is None for step in chain.steps] == [
            step.segment is None
            for step in chains[0].steps  # type: ignore[union-attr]
        ]
        agreed = [[call.agreed for call in c.collectives] for c in (chain, chains[0]) if c]
        assert agreed[0] == agreed[1]
        # All sums are normalised at once, but for the last: of that only some rows are.
        norms = [call.norm for call in chain.collectives]
        assert [norm is not None for norm in norms] == [True, True, True, False, False]
        scales = {norm.offset for norm in norms if norm is not None}
        assert len(scales) == 3 and {n.file for n in norms if n} == set(part.data[:1])
        graphs = (onnx.load(tmp_path / s.file, load_external_data=False) for s in chain.segments)
        kinds = [node.op_type for graph in graphs for node in graph.graph.node]
        assert "SkipSimplifiedLayerNormalization" not in kinds
    whole = compiled(*drawn(config), tmp_path, 1, half, "cuda", described=True)[0]
    assert sum(part.weight_bytes for part in parts) > whole.weight_bytes > parts[0].weight_bytes


# --- what is refused, and how -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "tp", "found", "fix"),
    [
        ({"heads": 32}, 3, "32 attention heads, tp 3", "--tp 2"),
        (
            {"heads": 6, "intermediate_size": 64},
            3,
            "64 rows of layers.0.mlp.down.weight, tp 3",
            "--tp 2",
        ),
    ],
)
def test_what_does_not_divide_is_refused_by_name_and_numbers(
    tmp_path: Path, change: dict[str, int], tp: int, found: str, fix: str
) -> None:
    made = drawn(replace(CONFIG, **change))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"among {tp} ranks") as caught:
        compiled(*made, tmp_path, tp, SETTINGS)
    assert (caught.value.found, caught.value.fix) == (found, fix)
    assert not list(tmp_path.iterdir())


def test_blocks_too_small_for_a_gpu_are_refused(tmp_path: Path) -> None:
    made = drawn(replace(CONFIG, head_dim=64, intermediate_size=32))
    settings = replace(SETTINGS, dtype="float16", weights="int4")
    with pytest.raises(ConfigError, match="among 4 ranks") as caught:
        compiled(*made, tmp_path, 4, settings, "cuda", described=True)
    assert caught.value.found == "rows 0 to 8 of a rank, in blocks of 32"
    assert caught.value.fix == "a smaller --tp, or no --weights"


def test_what_would_fit_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        heads_of(12, 4, Rank(0, 5))
    assert caught.value.expected == "a tp that divides them: 1, 2, 3, 4, 6, 12"
    assert caught.value.fix == "--tp 4"


def test_attention_between_unknown_things_is_refused() -> None:
    traced, part, _ = drawn(CONFIG)
    known = [name for name in part.weights if "attn.out" not in name]
    with pytest.raises(BuildError, match="cannot be divided among ranks") as caught:
        shard(traced.model.graph, known, Rank(1, 2), {}, rounded=True)
    assert caught.value.expected == "an attention between two products of weights"
    assert caught.value.found.startswith("CachedAttention of ")


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_every_query_meets_its_own_key(kv_heads: int, group: int, tp: int) -> None:
    heads = kv_heads * group
    if heads % tp:
        heads, kv_heads = heads * tp, kv_heads * tp
    seen = []
    for index in range(tp):
        own, kv = heads_of(heads, kv_heads, Rank(index, tp))
        assert own % len(kv) == 0
        for head in range(own):  # as grouped-query attention shares them
            seen.append(kv[head // (own // len(kv))])
        if kv_heads % tp == 0:
            assert len(kv) == kv_heads // tp  # none is held twice
    assert seen == [head * kv_heads // heads for head in range(heads)]


def test_plans_of_ranks_meet_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of TensorRT: with its own op, which the library that there is compiles too."""
    inside = TensorRTTarget(replace(TENSORRT_RTX, meets=True))
    monkeypatch.setattr("vlmforge_builder.targets.tensorrt_rtx.TARGET", inside)
    config = replace(CONFIG, heads=8, kv_heads=8, head_dim=64)
    half = replace(SETTINGS, dtype="float16", attention="native")
    (whole,) = compiled(*drawn(config), tmp_path, 1, half, "tensorrt_rtx", described=True)
    parts = compiled(*drawn(config), tmp_path, 2, half, "tensorrt_rtx")
    assert [part.name for part in parts] == ["decoder", "decoder.rank1"]
    assert [part.file for part in parts] == ["decoder.rank0.plan", "decoder.rank1.plan"]
    first, second = ((tmp_path / part.file).read_bytes() for part in parts)
    assert first != second
    for part in parts:
        assert part.chain is None
        assert part.profiles == whole.profiles
        assert [s.name for s in part.inputs] == [s.name for s in whole.inputs]
        assert part.outputs[0] == whole.outputs[0]  # the logits of all
        assert {s.shape[1] for s in part.inputs if "." in s.name} == {4}
        # All but the norms, the table of words and those of cosines and sines.
        same = 2 * 32 * (3 + CONFIG.vocab_size) + 2 * 4 * 64 * 32
        assert part.layers is not None
        halved = (whole.weight_bytes - same) / 2
        assert part.weight_bytes - same == pytest.approx(halved, rel=0.02)
        layers = read_layers(tmp_path / part.layers).layers
        met = [layer.outputs[0] for layer in layers if layer.type == "DIST_COLLECTIVE"]
        assert [(out.dtype, out.shape[-1]) for out in met[:2]] == [("HALF", 32)] * 2
        assert met[2].shape[0] == 38  # of two ranks: 37 of the vocabulary, and padding
