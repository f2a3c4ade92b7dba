"""What the recipes read from a configuration is what the classes of transformers read from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from configuration_keys import load, plan
from conftest import HF
from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer
from vlmforge_builder.tokenizer.proof import TokenizerProof
from vlmforge_recipes.clip_tower import read_tower_config
from vlmforge_recipes.end_ids import with_end_ids
from vlmforge_recipes.llama_decoder import read_decoder_config

ROPE = st.fixed_dictionaries(
    {"rope_type": st.just("default")}, optional={"rope_theta": st.sampled_from([123.0, 1e6])}
)
TEXT = st.fixed_dictionaries(
    {},
    optional={
        "vocab_size": st.integers(1, 10**6),
        "hidden_size": st.sampled_from([64, 128, 4096]),
        "intermediate_size": st.integers(1, 10**5),
        "num_hidden_layers": st.integers(1, 100),
        "num_attention_heads": st.sampled_from([8, 16, 32]),
        "num_key_value_heads": st.sampled_from([1, 2, 4, 8]),
        "head_dim": st.sampled_from([2, 8, 64, 128]),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-5, 0.1]),
        "hidden_act": st.sampled_from(["silu", "gelu"]),
        "max_position_embeddings": st.integers(1, 2048),
        "rope_theta": st.sampled_from([500.0, 1e4, 5e6]),
        "rope_parameters": ROPE,
        "rope_scaling": ROPE,
    },
)


DECODERS = [
    ("llama", LlamaConfig),
    ("mistral", MistralConfig),
    ("qwen2", Qwen2Config),
    ("qwen3", Qwen3Config),
]


@pytest.mark.parametrize(("kind", "theirs"), DECODERS, ids=[kind for kind, _ in DECODERS])
@settings(max_examples=80)
@given(values=TEXT)
def test_decoders(kind: str, theirs: type, values: dict[str, Any]) -> None:
    # The default of Qwen's classes, 32, does not divide fewer heads: such a file is refused.
    values = {"num_key_value_heads": 8, **values} if kind.startswith("qwen") else values
    ours = read_decoder_config(ConfigReader(values, Path("c")), session_len=8, kind=kind)
    # The class writes into what it is given.
    config = theirs(**json.loads(json.dumps(values)))
    found = (ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.layers, ours.heads)
    expected = (config.vocab_size, config.hidden_size, config.intermediate_size)
    assert found == (*expected, config.num_hidden_layers, config.num_attention_heads)
    assert (ours.kv_heads, ours.head_dim) == (
        config.num_key_value_heads,
        getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
    )
    assert (ours.norm_eps, ours.activation) == (config.rms_norm_eps, config.hidden_act)
    assert ours.rope_theta == config.rope_parameters["rope_theta"]


TOWER = st.fixed_dictionaries(
    {},
    optional={
        "hidden_size": st.sampled_from([48, 96]),
        "intermediate_size": st.integers(1, 9999),
        "num_hidden_layers": st.integers(2, 50),
        "num_attention_heads": st.sampled_from([4, 12]),
        "image_size": st.sampled_from([224, 336]),
        "patch_size": st.sampled_from([14, 32]),
        "layer_norm_eps": st.sampled_from([1e-6, 1e-5]),
        "hidden_act": st.sampled_from(["quick_gelu", "gelu"]),
    },
)


@given(values=TOWER)
def test_towers(values: dict[str, Any]) -> None:
    reader = ConfigReader(values, Path("c"))
    ours = read_tower_config(reader, feature_layer=-2, keep_class_token=False)
    config = CLIPVisionConfig(**values)
    assert ours.layers == config.num_hidden_layers - 1
    found = (ours.hidden_size, ours.intermediate_size, ours.heads, ours.image_size, ours.patch_size)
    sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads)
    assert found == (*sizes, config.image_size, config.patch_size)
    assert (ours.norm_eps, ours.activation) == (config.layer_norm_eps, config.hidden_act)


# Of what docs/checkpoints.md says that it cannot matter, what sounds as if it could.
IGNORED_AT_THE_TOP = {
    "ignore_index": -7,
    "vocab_size": 7,
    "image_seq_length": 7,
    "use_image_newline_parameter": False,
    "pad_token_id": -1,
    "bos_token_id": 7,
    "use_cache": False,
    "temperature": 0.1,
    "top_k": 3,
}
IGNORED_IN_THE_TEXT = {
    "pad_token_id": 7,
    "bos_token_id": 7,
    "attention_dropout": 0.5,
    "initializer_range": 0.5,
    "pretraining_tp": 2,
    "use_cache": False,
    "sliding_window": 3,
    "is_decoder": True,
    "chunk_size_feed_forward": 1,
    "_name_or_path": "elsewhere",
}
IGNORED_IN_THE_TOWER = {
    "projection_dim": 7,
    "vocab_size": 7,
    "attention_dropout": 0.5,
    "dropout": 0.5,
    "initializer_factor": 7.0,
    "initializer_range": 0.5,
    "tie_word_embeddings": True,
}


def logits(checkpoint: Path) -> torch.Tensor:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 5, 6, *[640] * 144, 7, 8]])
    pixels = torch.linspace(-1, 1, 3 * 168 * 168).reshape(1, 3, 168, 168)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, pixel_values=pixels).logits
    return found


def test_the_original_does_not_mind_what_cannot_matter(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(HF / "checkpoint", checkpoint)
    before = logits(checkpoint)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config |= IGNORED_AT_THE_TOP
    config["text_config"] |= IGNORED_IN_THE_TEXT
    config["vision_config"] |= IGNORED_IN_THE_TOWER
    path.write_text(json.dumps(config), "utf-8")
    assert torch.equal(logits(checkpoint), before)


# --- ids that end an answer --------------------------------------------------------------------


TOKENIZER = ConvertedTokenizer(
    *(b"", 1, "<s>", True, (2,), "</s>", (), 9), TokenizerProof("none", 0, 0)
)


def end_ids(folder: Path, generation: dict[str, Any] | None, *configs: dict[str, Any]) -> Any:
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    readers = [ConfigReader(values, Path("config.json")) for values in configs]
    return with_end_ids(TOKENIZER, folder, *readers).eos_ids


def test_generation_config_is_asked_first_and_the_tokenizer_last(tmp_path: Path) -> None:
    assert end_ids(tmp_path, None, {}, {}) == (2,)
    assert end_ids(tmp_path, None, {}, {"eos_token_id": 7}) == (7,)
    assert end_ids(tmp_path, None, {"eos_token_id": 5}, {"eos_token_id": 7}) == (5,)
    assert end_ids(tmp_path, {"eos_token_id": [9, 8, 9]}, {"eos_token_id": 5}) == (9, 8)
    assert end_ids(tmp_path, {"eos_token_id": None}, {"eos_token_id": 5}) == (5,)


@pytest.mark.parametrize("value", ["2", -1, True, 2.0, [], [2, "3"], [[2]], {"id": 2}], ids=str)
def test_ids_of_a_wrong_type_are_errors_wherever_they_are(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="wrong eos_token_id"):
        end_ids(tmp_path, None, {}, {"eos_token_id": value})
    with pytest.raises(CheckpointError, match="wrong eos_token_id"):
        end_ids(tmp_path, {"eos_token_id": value}, {"eos_token_id": 2})


@pytest.mark.parametrize("value", [-1, "x", [0], 10**12], ids=str)
def test_what_nothing_uses_may_say_anything(tmp_path: Path, value: object) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(HF / "checkpoint", checkpoint)
    before = plan(load(checkpoint))
    path = checkpoint / "generation_config.json"
    ids = {f"{role}_token_id": value for role in ("pad", "bos", "sep", "decoder_start")}
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **ids}), "utf-8")
    assert plan(load(checkpoint)) == before
