"""What the recipes of today's models read from configurations is what transformers reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Idefics3Config, InternVLConfig, LlamaConfig, SmolVLMConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from configuration_keys import load, read, write
from live_parity import FAMILIES
from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.blocks.decoder import inverse_frequencies
from vlmforge_builder.blocks.vision import VisionConfig
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.keys import check_keys
from vlmforge_recipes.idefics3 import keys as idefics3_keys
from vlmforge_recipes.idefics3 import tower as siglip
from vlmforge_recipes.internvl import keys as internvl_keys
from vlmforge_recipes.internvl import tower as internvit
from vlmforge_recipes.llama_decoder import read_decoder_config

TOWER = st.fixed_dictionaries(
    {},
    optional={
        "hidden_size": st.sampled_from([48, 96]),
        "intermediate_size": st.integers(1, 9999),
        "num_hidden_layers": st.integers(2, 50),
        "num_attention_heads": st.sampled_from([4, 8, 16]),
        "image_size": st.sampled_from([224, 336]),
        "patch_size": st.sampled_from([14, 32]),
        "layer_norm_eps": st.sampled_from([1e-6, 1e-5]),
        "hidden_act": st.sampled_from(["gelu_pytorch_tanh", "gelu"]),
    },
)
TOWERS: dict[str, tuple[Callable[[ConfigReader], VisionConfig], type]] = {
    "internvl": (internvit.read_tower, InternVLVisionConfig),
    "idefics3": (siglip.read_tower, Idefics3VisionConfig),
}


@pytest.mark.parametrize("family", TOWERS)
@settings(max_examples=50)
@given(values=TOWER)
def test_towers_and_what_they_mean_by_keys_that_are_left_out(
    family: str, values: dict[str, Any]
) -> None:
    read_tower, theirs = TOWERS[family]
    ours, config = read_tower(ConfigReader(values, Path("c"))), theirs(**values)
    found = (ours.hidden_size, ours.intermediate_size, ours.layers, ours.heads)
    sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    assert found == (*sizes, config.num_attention_heads)
    sides = [v if isinstance(v, int) else v[0] for v in (config.image_size, config.patch_size)]
    assert [ours.image_size, ours.patch_size] == sides
    assert (ours.norm_eps, ours.activation) == (config.layer_norm_eps, config.hidden_act)


def test_defaults_at_the_top() -> None:
    internvl = InternVLConfig()
    assert (internvl.downsample_ratio, internvl.image_token_id) == (0.5, 151667)
    assert (internvl.projector_hidden_act, internvl.tie_word_embeddings) == ("gelu", True)
    for config in (Idefics3Config(), SmolVLMConfig()):
        assert (config.scale_factor, config.image_token_id) == (2, 128257)
        assert not config.tie_word_embeddings


@pytest.mark.parametrize("side", [*range(1, 33), 70])
def test_positions_of_patches_are_those_of_the_buckets(side: int) -> None:
    config = Idefics3VisionConfig(hidden_size=1, image_size=2 * side, patch_size=2)
    embeddings = Idefics3VisionEmbeddings(config)
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
        whole = torch.ones(1, side, side, dtype=torch.bool)
        found = embeddings(torch.zeros(1, 3, 2 * side, 2 * side), whole)
    assert found.flatten().int().tolist() == list(siglip.position_ids(side))


@settings(max_examples=50)
@given(
    theta=st.sampled_from([1e4, 5e5]),
    head_dim=st.sampled_from([16, 64, 128]),
    factor=st.floats(1.5, 32),
    low=st.floats(0.5, 2),
    more=st.floats(0.5, 4),
    original=st.sampled_from([64, 1024, 8192]),
)
def test_frequencies_of_llama_3(
    theta: float, head_dim: int, factor: float, low: float, more: float, original: int
) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + more,
        "original_max_position_embeddings": original,
    }
    values = {"head_dim": head_dim, "max_position_embeddings": 1 << 17, "rope_parameters": rope}
    ours = read_decoder_config(ConfigReader(values, Path("c")), session_len=8)
    config = LlamaConfig(**json.loads(json.dumps(values)))
    theirs, scale = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert scale == 1.0
    np.testing.assert_allclose(inverse_frequencies(ours), theirs.numpy(), rtol=2e-6)


def test_dynamic_positions_are_plain_up_to_the_trained_length() -> None:
    values = {
        "max_position_embeddings": 64,
        "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0},
    }
    ours = read_decoder_config(ConfigReader(values, Path("c")), session_len=64)
    assert (ours.rope_scaling, ours.attention_window) == (None, 64)
    config = LlamaConfig(**json.loads(json.dumps(values)))
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=64)
    np.testing.assert_allclose(inverse_frequencies(ours), theirs.numpy(), rtol=1e-6)
    with pytest.raises(UnsupportedModelError, match="session_len of at most 64"):
        read_decoder_config(ConfigReader(values, Path("c")), session_len=65)


# --- what is wrong is said before any weights are looked for ------------------------------------

WRONG: dict[str, list[tuple[str, str, object, str]]] = {
    "internvl": [
        ("config.json", "downsample_ratio", 0.3, "downsample_ratio 0.3"),
        ("config.json", "image_token_id", 5, "image_token_id 5, but '<IMG_CONTEXT>' is token"),
        ("config.json", "vision_feature_layer", -2, "vision_feature_layer -2"),
        ("config.json", "vision_config", {"norm_type": "rms_norm"}, "InternViT-300M"),
        ("config.json", "vision_config", {"image_size": [448, 224]}, "views are square"),
        ("config.json", "text_config", {"model_type": "qwen3_moe"}, "'qwen3_moe'"),
        ("config.json", "text_config", {"use_sliding_window": True}, "use_sliding_window true"),
        ("processor_config.json", "image_seq_length", 256, "the rows of a view"),
        ("preprocessor_config.json", "size", {"height": 448, "width": 448}, "tower's image_size"),
        ("preprocessor_config.json", "min_patches", 13, "min_patches of at most"),
        ("tokenizer_config.json", "start_image_token", "<nowhere>", "start_image_token"),
    ],
    "idefics3": [
        ("config.json", "scale_factor", 3, "scale_factor 3"),
        ("config.json", "image_token_id", 5, "image_token_id 5, but '<image>' is token"),
        ("config.json", "text_config", {"model_type": "mistral"}, "model_type"),
        ("config.json", "vision_config", {"hidden_act": "mish"}, "hidden_act 'mish'"),
        ("processor_config.json", "image_seq_len", 64, "the rows of a view"),
        ("preprocessor_config.json", "max_image_size", {"longest_edge": 364}, "image_size"),
        ("preprocessor_config.json", "size", {"height": 4, "width": 4}, "longest_edge"),
        ("tokenizer_config.json", "fake_image_token", "<nowhere>", "fake_image_token"),
    ],
}


@pytest.fixture(scope="module", params=WRONG)
def without_weights(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Path]:
    module, folder = FAMILIES[request.param], tmp_path_factory.mktemp("checkpoint")
    module.write(folder, next(iter(module.SHAPES.values())))
    (folder / "model.safetensors").unlink()
    return request.param, folder


def test_wrong_values(without_weights: tuple[str, Path]) -> None:
    family, folder = without_weights
    for file, key, value, words in WRONG[family]:
        path = folder / file
        before = read(path)
        section = {**before[key], **value} if file == "config.json" and "_config" in key else value  # type: ignore[dict-item]
        write(path, {**before, key: section})
        try:
            with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
                load(folder)
        finally:
            write(path, before)
        assert words in str(caught.value), (file, key)


def test_missing_keys(without_weights: tuple[str, Path]) -> None:
    """A key that is not there has the class's default, or is missed before weights are."""
    _, folder = without_weights
    path = folder / "config.json"
    before = read(path)
    for place in ("", "text_config", "vision_config"):
        for key in before[place] if place else before:
            left = {k: v for k, v in (before[place] if place else before).items() if k != key}
            write(path, {**before, place: left} if place else left)
            with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
                load(folder)
            assert str(caught.value)
    write(path, before)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        load(folder)


# --- keys that published files have ---------------------------------------------------------------

_TRAINER = {
    "_flash_attn_2_enabled": True,
    "is_llama_config": True,
    "neftune_noise_alpha": 0.0,
    "perceiver_config": {"model_type": "vllama3", "resampler_depth": 3},
    "pixel_shuffle_factor": 4,
    "qk_layer_norms": False,
    "rope_interleaved": False,
    "use_resampler": False,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
}
PUBLISHED: list[tuple[str, str, dict[str, object]]] = [
    (
        "idefics3",
        "config.json",
        {
            "model_type": "smolvlm",
            "image_seq_len": 81,
            "pad_token_id": 2,
            "use_cache": False,
            "vocab_size": 49280,
            "text_config": {
                "_name_or_path": "None",
                "architectures": ["VLlama3ForCausalLM"],
                "head_dim": 64,
                "max_position_embeddings": 8192,
                "model_type": "llama",
                "pretraining_tp": 1,
                "attention_bias": False,
                "mlp_bias": False,
                "rope_scaling": None,
                "rope_theta": 130000,
                "torch_dtype": "bfloat16",
                **_TRAINER,
            },
            "vision_config": {
                "max_image_size": {"longest_edge": 384},
                "model_type": "smolvlm_vision",
                "size": {"longest_edge": 1920},
                "tie_word_embeddings": False,
                "use_base_siglip": False,
                "num_channels": 3,
            },
        },
    ),
    (
        "internvl",
        "config.json",
        {
            "model_type": "internvl",
            "image_seq_length": 256,
            "torch_dtype": "bfloat16",
            "vision_feature_layer": -1,
            "text_config": {
                "architectures": ["Qwen3ForCausalLM"],
                "attention_bias": False,
                "debug": False,
                "layer_types": ["full_attention"] * 36,
                "max_window_layers": 36,
                "model_type": "qwen3",
                "rope_scaling": None,
                "rope_theta": 1000000,
                "sliding_window": None,
                "use_sliding_window": False,
            },
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "attention_bias": True,
                "dropout": 0.0,
                "initializer_factor": 0.1,
                "initializer_range": 1e-10,
                "layer_scale_init_value": 0.1,
                "model_type": "internvl_vision",
                "norm_type": "layer_norm",
                "use_mask_token": False,
                "use_qk_norm": False,
            },
        },
    ),
]
TABLES = {
    "idefics3": idefics3_keys.TABLES["SmolVLMForConditionalGeneration"],
    "internvl": internvl_keys.TABLES["qwen3"],
}


@pytest.mark.parametrize(("family", "file", "values"), PUBLISHED, ids=lambda v: str(v)[:11])
def test_keys_that_published_files_have(family: str, file: str, values: dict[str, object]) -> None:
    check_keys(ConfigReader(values, Path(file)), TABLES[family])
