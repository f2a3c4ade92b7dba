"""EngineConfig, VisionConfig, ChatTemplateConfig: accepted, refused, written and read back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sample_manifest import MANIFEST
from vlmforge import GenerationConfig, pipeline
from vlmforge.api import config as module
from vlmforge.api.config import EngineConfig, TurbomindEngineConfig, VisionConfig, VisonConfig
from vlmforge.api.parallel import check_processors, devices_of, parallel_refusals
from vlmforge.api.pytorch_config import PYTORCH_REFUSALS, PYTORCH_RULES, PytorchEngineConfig
from vlmforge.engine.manifest import dump_manifest
from vlmforge.errors import ConfigError, EngineError
from vlmforge.inputs import template_config
from vlmforge.inputs.template_config import ChatTemplateConfig
from vlmforge.outputs import generation_config

FIELDS_OF_0_4_2 = """model_name model_format tp session_len max_batch_size cache_max_entry_count
cache_block_seq_len enable_prefix_caching quant_policy rope_scaling_factor use_logn_attn
download_dir revision max_prefill_token_num num_tokens_per_iter max_prefill_iters"""
ADDED_SINCE = """cache_chunk_size dtype dp cp ep device_num attn_tp_size attn_cp_size attn_dp_size
mlp_tp_size mlp_dp_size outer_dp_size nnodes node_rank dist_init_addr devices
cache_checkpoint_interval cache_prompt cache_prompt_boundary_skip cache_generation async_ empty_init
language_model_only communicator hf_overrides enable_metrics gemm_input_dtype moe_a2a_backend"""
PARTS = ("system", "meta_instruction", "eosys", "user", "eoh", "assistant", "eoa", "separator")


def names(config: object) -> list[str]:
    return [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]


def test_engine_config_has_the_fields_of_both_versions_and_ours() -> None:
    ours = {"threads", "max_queued_requests"}
    assert set(names(EngineConfig)) == {*FIELDS_OF_0_4_2.split(), *ADDED_SINCE.split(), *ours}


def test_every_field_is_checked_or_refused() -> None:
    checked = {*module.RULES, *module.REFUSALS, *parallel_refusals(1)}
    assert checked == set(names(EngineConfig))
    pytorch = {*PYTORCH_RULES, *PYTORCH_REFUSALS}
    assert {*checked, *pytorch} == set(names(PytorchEngineConfig))
    rules, refusals = template_config.RULES, template_config.REFUSALS
    assert set(rules) | set(refusals) == set(names(ChatTemplateConfig))


@pytest.mark.parametrize(
    ("kind", "rules", "refusals"),
    [
        (EngineConfig, module.RULES, {**module.REFUSALS, **parallel_refusals(1)}),
        (EngineConfig, {}, parallel_refusals(2)),
        (PytorchEngineConfig, PYTORCH_RULES, PYTORCH_REFUSALS),
        (ChatTemplateConfig, template_config.RULES, template_config.REFUSALS),
        (GenerationConfig, generation_config.RULES, generation_config.REFUSALS),
    ],
)
def test_every_default_is_right(kind: Any, rules: Any, refusals: Any) -> None:
    """So what is left at it need not be looked at."""
    fields = {f.name: f.default for f in dataclasses.fields(kind)}
    for name, rule in rules.items():
        assert fields[name] is dataclasses.MISSING or rule.admits(fields[name]), name
    for name, refusal in refusals.items():
        assert any(fields[name] == neutral for neutral in refusal.neutral), name


def test_both_spellings_are_the_same_class() -> None:
    assert TurbomindEngineConfig is EngineConfig
    assert VisonConfig is VisionConfig


def test_a_field_that_tunes_other_machinery_is_accepted() -> None:
    EngineConfig(
        "some-name",
        session_len=8192,
        max_batch_size=4,
        cache_max_entry_count=1,
        cache_block_seq_len=128,
        cache_chunk_size=0,
        enable_prefix_caching=False,
        revision="main",
        max_prefill_token_num=1,
        num_tokens_per_iter=8192,
        max_prefill_iters=16,
        dtype="float16",
        threads=2,
        model_format="hf",
        async_=0,
        enable_metrics=False,
        attn_tp_size=1,
        device_num=1,
    )


FOLDER = "True, False or the path of a folder that is there"
FORMATS = (
    "a list whose every item is one of "
    "'PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'AVIF', 'PPM', 'QOI'"
)
COLOUR = "a list of 3 whose every item is an integer in [0, 255] or None"
REVISION = "a non-empty string without NUL and lone surrogates or None"
WRONG: list[tuple[Callable[..., object], str, object, str]] = [
    (EngineConfig, "tp", 0, "a positive integer"),
    (EngineConfig, "tp", True, "a positive integer"),
    (EngineConfig, "tp", "2", "a positive integer"),
    (EngineConfig, "session_len", 0, "a positive integer or None"),
    (EngineConfig, "session_len", 8192.0, "a positive integer or None"),
    *((EngineConfig, "max_batch_size", n, "an integer in [1, 65536] or None") for n in (0, 2**60)),
    (EngineConfig, "cache_max_entry_count", 0, "a number in (0, 1]"),
    (EngineConfig, "cache_max_entry_count", 1.5, "a number in (0, 1]"),
    (EngineConfig, "cache_max_entry_count", math.nan, "a number in (0, 1]"),
    (EngineConfig, "cache_block_seq_len", 0, "a positive integer"),
    (EngineConfig, "cache_chunk_size", -2, "an integer >= -1"),
    (EngineConfig, "enable_prefix_caching", 1, "True or False"),
    *((EngineConfig, "revision", value, REVISION) for value in ("", "a\0b", "\ud800")),
    (EngineConfig, "max_prefill_token_num", 0, "a positive integer or None"),
    (EngineConfig, "num_tokens_per_iter", -1, "a non-negative integer"),
    (EngineConfig, "max_prefill_iters", 0, "a positive integer"),
    (EngineConfig, "dtype", "int8", "one of 'auto', 'float32', 'float16', 'bfloat16'"),
    (EngineConfig, "threads", 0, "a positive integer or None"),
    (EngineConfig, "model_name", 3, "a string or None"),
    (EngineConfig, "async_", 2, "an integer in [0, 1]"),
    (VisionConfig, "max_batch_size", 0, "a positive integer"),
    (VisionConfig, "max_batch_size", None, "a positive integer"),
    (VisionConfig, "thread_safe", "yes", "True or False"),
    *((VisionConfig, "local_files", value, FOLDER) for value in (None, 1, "", "/no/folder", b"/")),
    *((VisionConfig, "image_formats", value, FORMATS) for value in ("PNG", ["EPS"], ["png"], 3)),
    *((VisionConfig, "background", value, COLOUR) for value in ((9, 9), (0, 0, 256), "white")),
    (ChatTemplateConfig, "model_name", "", "a non-empty string"),
    (ChatTemplateConfig, "model_name", None, "a non-empty string"),
    (ChatTemplateConfig, "user", 3, "a string or None"),
    (
        ChatTemplateConfig,
        "stop_words",
        "###",
        "a list whose every item is a non-empty string or None",
    ),
    (
        ChatTemplateConfig,
        "stop_words",
        [""],
        "a list whose every item is a non-empty string or None",
    ),
    (
        ChatTemplateConfig,
        "capability",
        "talk",
        "one of 'completion', 'infilling', 'chat', 'python' or None",
    ),
]


@pytest.mark.parametrize(("kind", "field", "value", "expected"), WRONG)
def test_a_wrong_value_is_named_found_and_told_what_is_expected(
    kind: Callable[..., object], field: str, value: object, expected: str
) -> None:
    required = {"model_name": "x"} if kind is ChatTemplateConfig else {}
    with pytest.raises(ConfigError) as caught:
        kind(**{**required, field: value})
    assert caught.value.summary == f"{kind.__name__}: {field} must be {expected}."
    assert (caught.value.found, caught.value.expected) == (f"{field}={value!r}", expected)


REFUSED: list[tuple[str, object, str, str]] = [
    ("cp", 2, "a shard of the decoder for each rank", "tp=N"),
    ("ep", 2, "a shard of the decoder for each rank", "tp=N"),
    ("device_num", 8, "a shard of the decoder for each rank", "tp=N"),
    ("attn_tp_size", 2, "a shard of the decoder for each rank", "tp=N"),
    ("attn_cp_size", 2, "a shard of the decoder for each rank", "tp=N"),
    ("mlp_tp_size", 2, "a shard of the decoder for each rank", "tp=N"),
    ("dp", 2, "one pipeline", "one pipeline for each"),
    ("attn_dp_size", 2, "one pipeline", "one pipeline for each"),
    ("mlp_dp_size", 2, "one pipeline", "one pipeline for each"),
    ("outer_dp_size", 2, "one pipeline", "one pipeline for each"),
    ("nnodes", 2, "one pipeline", "mpirun --host"),
    ("node_rank", 1, "one pipeline", "mpirun --host"),
    ("dist_init_addr", "host:1", "one pipeline", "mpirun --host"),
    ("communicator", "native", "the fastest way", "leave it out"),
    ("model_format", "awq", "not quantised", "unquantised checkpoint"),
    ("model_format", "llama", "layout", "build-engine"),
    ("quant_policy", 8, "not quantised", "quant_policy=0"),
    ("rope_scaling_factor", 2.0, "compiled into the engine", "build-engine"),
    ("use_logn_attn", True, "compiled into the engine", "build-engine"),
    ("hf_overrides", {"a": 1}, "its own configuration", "build-engine"),
    ("download_dir", "/data", "hub's own cache", "HF_HOME"),
    ("cache_prompt", "none", "no such modes", "enable_prefix_caching"),
    ("cache_generation", "all", "no such modes", "enable_prefix_caching"),
    ("empty_init", True, "with its weights", "leave it out"),
    ("language_model_only", True, "both parts", "leave it out"),
    ("gemm_input_dtype", "fp8", "compiled into the engine", "build-engine --dtype"),
]


@pytest.mark.parametrize(("field", "value", "reason", "instead"), REFUSED)
def test_what_cannot_be_honoured_is_refused_with_what_to_do(
    field: str, value: object, reason: str, instead: str
) -> None:
    with pytest.raises(ConfigError, match=f"EngineConfig: {field} is not supported: ") as caught:
        EngineConfig(**{field: value})  # type: ignore[arg-type]
    assert reason in caught.value.summary
    assert instead in caught.value.fix
    assert caught.value.found == f"{field}={value!r}"
    default = getattr(EngineConfig(), field)
    assert f"{field}={default!r}" in caught.value.expected or default == 0
    assert not str(caught.value).endswith(".")


def test_all_refusals_are_tried_above() -> None:
    assert {row[0] for row in REFUSED} == {*module.REFUSALS, *parallel_refusals(1)}


def test_what_says_the_same_as_tp_is_accepted() -> None:
    EngineConfig(tp=2, device_num=2, attn_tp_size=2, mlp_tp_size=2, devices=[0, 1])
    EngineConfig(tp=4, devices=(3, 1, 2, 0), communicator="mpi")
    for field, value in (("device_num", 1), ("attn_tp_size", 4), ("mlp_tp_size", 1)):
        with pytest.raises(ConfigError, match=f"{field} is not supported"):
            EngineConfig(tp=2, **{field: value})  # type: ignore[arg-type]


def test_each_rank_has_a_device_of_its_own() -> None:
    assert devices_of(None, 3) == (0, 1, 2)
    assert devices_of([3, 1], 2) == (3, 1)
    for wrong in ([0], [0, 0], [0, 1, 2]):
        with pytest.raises(ConfigError, match="no device for each rank") as caught:
            devices_of(wrong, 2)
        assert caught.value.found == f"devices={wrong}"
        assert caught.value.expected == "2 different numbers"
    with pytest.raises(ConfigError, match="devices"):
        EngineConfig(devices=[-1])


def test_processors_have_no_numbers() -> None:
    check_processors([0, 1])
    with pytest.raises(ConfigError, match="for processors takes the first devices"):
        check_processors([1, 0])


def test_a_value_assigned_later_is_checked_again() -> None:
    config = EngineConfig()
    config.dp = 2
    with pytest.raises(ConfigError, match="dp is not supported"):
        config.validate()
    vision = VisionConfig()
    vision.max_batch_size = 0
    with pytest.raises(ConfigError, match="VisionConfig: max_batch_size"):
        vision.validate()


def test_replacing_a_field_checks_it() -> None:
    assert dataclasses.replace(EngineConfig(), session_len=4096).session_len == 4096
    with pytest.raises(ConfigError, match="session_len"):
        dataclasses.replace(EngineConfig(), session_len=-1)


# --- ChatTemplateConfig --------------------------------------------------------------------------


def test_the_parts_are_positional_in_the_original_order() -> None:
    template = ChatTemplateConfig("mine", *PARTS, "chat", ["###"])
    assert [getattr(template, part) for part in PARTS] == list(PARTS)
    assert (template.capability, template.stop_words) == ("chat", ["###"])


@pytest.mark.parametrize("field", ["tool", "eotool", "model_path"])
def test_parts_that_nothing_reads_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"ChatTemplateConfig: {field} is not supported"):
        ChatTemplateConfig("mine", **{field: "x"})


def test_json_is_laid_out_as_the_originals() -> None:
    text = ChatTemplateConfig("mine", user="用户：").to_json()
    assert text.startswith('{\n    "model_name": "mine",\n')
    assert '"user": "用户："' in text
    assert json.loads(text) == {
        **dict.fromkeys(names(ChatTemplateConfig)),
        "model_name": "mine",
        "user": "用户：",
    }


TEMPLATES = st.builds(
    ChatTemplateConfig,
    st.text(min_size=1),
    *[st.one_of(st.none(), st.text(max_size=400)) for _ in PARTS],
    capability=st.sampled_from([None, "completion", "infilling", "chat", "python"]),
    stop_words=st.one_of(st.none(), st.lists(st.text(min_size=1))),
)


@given(TEMPLATES)
def test_json_text_reads_back_the_same(template: ChatTemplateConfig) -> None:
    assert ChatTemplateConfig.from_json(template.to_json()) == template


def test_a_long_json_text_is_not_taken_for_a_path() -> None:
    template = ChatTemplateConfig("mine", system="s" * 100_000)
    assert ChatTemplateConfig.from_json("\n " + template.to_json()) == template


@pytest.mark.parametrize("as_path", [True, False])
def test_a_file_reads_back_the_same(tmp_path: Path, as_path: bool) -> None:
    template = ChatTemplateConfig("mine", user="用户：", eoa="", stop_words=["</s>"])
    file = tmp_path / "template.json"
    text = template.to_json(file if as_path else str(file))
    assert file.read_text("utf-8") == text
    assert ChatTemplateConfig.from_json(file if as_path else str(file)) == template


def test_a_template_without_a_name_gets_the_same_one_each_time() -> None:
    first = ChatTemplateConfig.from_json('{"user": "U: "}')
    assert first == ChatTemplateConfig(template_config.UNNAMED_TEMPLATE, user="U: ")
    assert ChatTemplateConfig.from_json('{"user": "U: "}') == first


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{'user': 'U'}", "JSONDecodeError"),
        ('{"user": "U"', "JSONDecodeError"),
        ("no/such/file.json", "FileNotFoundError"),
        ("x" * 5000, "OSError"),
        ("a\0b", "ValueError"),
        ("", "IsADirectoryError"),
    ],
)
def test_what_is_not_json_is_an_error_that_says_so(text: str, found: str) -> None:
    with pytest.raises(ConfigError, match="Not a chat template's JSON") as caught:
        ChatTemplateConfig.from_json(text)
    assert caught.value.found.startswith(found)
    assert len(caught.value.summary) < 120
    assert "path to a JSON file, or JSON text" in caught.value.expected


def test_json_of_another_type_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text("[1]", "utf-8")
    with pytest.raises(ConfigError, match="Not a chat template's JSON") as caught:
        ChatTemplateConfig.from_json(file)
    assert caught.value.found == "JSON of type list"
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError) as caught:
        ChatTemplateConfig.from_json(file)
    assert caught.value.found.startswith("UnicodeDecodeError")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_name": "m", "users": "U"}, "a field that we do not know"),
        ({"model_name": 3}, "model_name must be a non-empty string"),
        ({"model_name": "m", "user": ["U"]}, "user must be a string or None"),
        ({"model_name": "m", "tool": "T"}, "tool is not supported"),
    ],
)
def test_json_with_wrong_fields_is_an_error(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ChatTemplateConfig.from_json(json.dumps(values))


def test_limits_of_pixels_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """Of this engine there is nothing but what it says of itself."""
    (tmp_path / "engine.json").write_text(dump_manifest(MANIFEST), "utf-8")
    with pytest.raises(ConfigError, match="no limits of pixels"):
        pipeline(tmp_path, vision_config=VisionConfig(max_pixels=12544))
    with pytest.raises(EngineError):
        pipeline(tmp_path)


@pytest.mark.parametrize(
    ("make", "given", "fix"),
    [
        (GenerationConfig, "max_tokens", "use max_new_tokens, or leave it out"),
        (GenerationConfig, "seed", "use random_seed, or leave it out"),
        (EngineConfig, "max_batch", "use max_batch_size, or leave it out"),
        (PytorchEngineConfig, "qqq", "leave it out"),
        (VisionConfig, "maxpixels", "use max_pixels, or leave it out"),
    ],
)
def test_a_field_that_is_not_there_names_one_that_is(
    make: Callable[..., object], given: str, fix: str
) -> None:
    with pytest.raises(ConfigError, match=f"has no field '{given}'") as caught:
        make(**{given: 3})
    assert (caught.value.found, caught.value.fix) == (f"{given}=3", fix)
    assert "max_batch_size" in caught.value.expected or make is GenerationConfig


def test_a_keyword_that_is_no_engines(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no argument 'sessionlen'") as caught:
        pipeline(tmp_path, sessionlen=3)
    assert caught.value.fix == "use session_len, or leave it out"
