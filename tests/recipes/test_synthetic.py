from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, CLIPModel, LlavaForConditionalGeneration

from vlmforge.errors import ConfigError
from vlmforge_recipes.llava.synthetic import PRESETS, SyntheticSpec, write_checkpoint
from vlmforge_recipes.llava.synthetic import tensors as tensors_module
from vlmforge_recipes.llava.synthetic.__main__ import main
from vlmforge_recipes.llava.synthetic.configs import write_hf_configs
from vlmforge_recipes.llava.synthetic.files import partition
from vlmforge_recipes.llava.synthetic.tensors import checkpoint_entries, tower_entries

DATA = Path(__file__).parents[1] / "data"
TINY = PRESETS["tiny"]
GQA = replace(TINY, text=replace(TINY.text, kv_heads=2))
TIED = replace(TINY, text=replace(TINY.text, tied=True))
ORIGINAL = replace(TINY, layout="original", file_format="bin", shards=2)
TOWER = "openai/clip-vit-large-patch14-336"
PROMPT = "USER: <image>\nWhat is it? ASSISTANT:"
FORMS = {
    "published": TINY,
    "two_shards": replace(TINY, shards=2),
    "three_bin_shards": replace(TINY, shards=3, file_format="bin"),
    "new_keys": replace(TINY, keys="new"),
    "new_keys_tied": replace(TIED, keys="new"),
    "new_keys_theta": replace(TINY, keys="new", text=replace(TINY.text, rope_theta=1e6)),
    "tied": TIED,
    "gqa": GQA,
    "half": replace(TINY, dtype="float16"),
    "brain_half": replace(TINY, dtype="bfloat16", shards=2),
    "theta": replace(TINY, text=replace(TINY.text, rope_theta=5e5, max_positions=1024)),
}


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the libraries that own the formats."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def load(kind: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A transformers model in float32, and what its loader has to say about the keys."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    return model, info


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def load_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


@pytest.mark.parametrize("spec", FORMS.values(), ids=FORMS)
def test_transformers_runs_every_form(tmp_path: Path, spec: SyntheticSpec) -> None:
    folder = write_checkpoint(tmp_path / "it", spec)
    model, info = load(LlavaForConditionalGeneration, folder)
    assert not any(info.values()), info
    text = model.config.text_config
    assert text.rope_parameters["rope_theta"] == spec.text.rope_theta
    assert text.num_key_value_heads == spec.text.kv_heads
    assert text.max_position_embeddings == spec.text.max_positions
    embedding = model.model.language_model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding) == spec.text.tied

    processor = cast(Any, AutoProcessor).from_pretrained(folder)
    image = Image.open(DATA / "images/photo_640x480.png")
    inputs = processor(images=image, text=PROMPT, return_tensors="pt")
    assert (inputs["input_ids"] == 640).sum() == spec.vision.positions - 1
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    assert 1 <= output.logits[0].std(-1).mean() <= 6
    assert all(0.3 < state.std() < 4 for state in output.hidden_states)
    generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize(
    ("golden", "spec"),
    [
        ("llava_1_5_hf", replace(TINY, dtype="bfloat16")),
        (
            "llava_v1_5_liuhaotian",
            replace(ORIGINAL, dtype="bfloat16", text=replace(TINY.text, vocab=640)),
        ),
    ],
)
def test_names_shapes_and_dtypes_are_the_published_ones(golden: str, spec: SyntheticSpec) -> None:
    expected = read(DATA / golden / "checkpoint")
    found = {e.name: (e.source.shape, e.dtype) for e in checkpoint_entries(spec)}
    assert found == {name: (tuple(t.shape), t.dtype) for name, t in expected.items()}


def test_the_stock_tower_has_the_published_names_shapes_and_dtypes() -> None:
    spec = replace(ORIGINAL, vision=replace(TINY.vision, image_size=336))
    expected = read(DATA / "llava_v1_5_liuhaotian" / TOWER)
    found = {e.name: (e.source.shape, e.dtype) for e in tower_entries(spec)}
    assert found == {name: (tuple(t.shape), t.dtype) for name, t in expected.items()}


def test_buffers_of_the_original_layout_are_the_published_ones(tmp_path: Path) -> None:
    golden = read(DATA / "llava_v1_5_liuhaotian/checkpoint")
    ours = read(write_checkpoint(tmp_path / "it", ORIGINAL))
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        torch.testing.assert_close(ours[name], golden[name])
    ids = read(tmp_path / TOWER)["vision_model.embeddings.position_ids"]
    assert torch.equal(ids, torch.arange(145)[None])


def test_the_stock_tower_loads_as_a_whole_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "it", ORIGINAL)
    model, info = load(CLIPModel, tmp_path / TOWER)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert model.config.vision_config.hidden_act == "quick_gelu"


def hf_name(name: str) -> str:
    """Published renaming of the two layouts, written out by hand."""
    if name.startswith("vision_model."):
        return f"vision_tower.{name}"
    if name.startswith("model.mm_projector."):
        number = {"0": "linear_1", "2": "linear_2"}[name.split(".")[2]]
        return f"multi_modal_projector.{number}.{name.rsplit('.', 1)[1]}"
    return f"language_model.{name}"


def test_both_layouts_and_all_dtypes_hold_the_same_values(tmp_path: Path) -> None:
    hf = read(write_checkpoint(tmp_path / "hf", replace(TINY, dtype="float16", shards=3)))
    original = read(write_checkpoint(tmp_path / "original", ORIGINAL))
    brain = read(write_checkpoint(tmp_path / "brain", replace(TINY, dtype="bfloat16")))
    tower = read(tmp_path / TOWER)
    used = {n: t for n, t in tower.items() if n.startswith("vision_model.") and "_ids" not in n}
    both = {hf_name(n): t for n, t in (original | used).items() if "inv_freq" not in n}
    assert both.keys() == hf.keys() == brain.keys()
    for name, values in both.items():
        assert values.dtype == torch.float32
        assert hf[name].dtype == torch.float16
        assert brain[name].dtype == torch.bfloat16
        assert torch.equal(values, hf[name].float()), name
        assert torch.equal(values, brain[name].float()), name


@pytest.mark.parametrize("spec", [TINY, ORIGINAL, replace(TINY, file_format="bin")])
def test_equal_specs_give_equal_bytes(tmp_path: Path, spec: SyntheticSpec) -> None:
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name / "it", spec)
    write_checkpoint(tmp_path / "c" / "it", replace(spec, seed=1))
    first = contents(tmp_path / "a")
    assert contents(tmp_path / "b") == first
    other = contents(tmp_path / "c")
    assert other.keys() == first.keys()
    changed = {Path(name).suffix for name in first if other[name] != first[name]}
    assert changed == {f".{spec.file_format}"}


def test_the_size_of_a_block_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(write_checkpoint(tmp_path / "whole", TINY))
    monkeypatch.setattr(tensors_module, "BLOCK", 1024)
    assert contents(write_checkpoint(tmp_path / "blocks", TINY)) == whole


def test_no_block_is_large() -> None:
    table = next(
        e for e in checkpoint_entries(PRESETS["7b"]) if e.name.endswith("embed_tokens.weight")
    )
    blocks = iter(table.blocks(0))
    assert next(blocks).nbytes <= 16 << 20
    assert next(blocks).nbytes <= 16 << 20


def test_tensors_differ_from_each_other_and_follow_their_law(tmp_path: Path) -> None:
    weights = read(write_checkpoint(tmp_path / "it", TINY))
    layer = "language_model.model.layers.0.self_attn"
    q, k = (weights[f"{layer}.{name}_proj.weight"] for name in "qk")
    assert abs(np.corrcoef(q.flatten(), k.flatten())[0, 1]) < 0.05
    assert q.std().item() == pytest.approx(1.6 / math.sqrt(128), rel=0.05)
    head = weights["language_model.lm_head.weight"]
    assert head.std().item() == pytest.approx(3 / math.sqrt(128), rel=0.02)
    assert head.mean().item() == pytest.approx(0, abs=0.005)
    norm = weights["language_model.model.norm.weight"]
    assert norm.mean().item() == pytest.approx(1, abs=0.05)


def test_sizes() -> None:
    def parameters(size: str) -> int:
        return sum(math.prod(e.source.shape) for e in checkpoint_entries(PRESETS[size]))

    # `total_size` of the published index.
    assert sum(e.nbytes for e in checkpoint_entries(PRESETS["7b"])) == 14_126_854_144
    assert parameters("tiny") * 4 < 3e6
    assert parameters("60m") == pytest.approx(61e6, rel=0.02)
    assert parameters("1b") == pytest.approx(1.05e9, rel=0.02)


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 80])
def test_shards_are_consecutive_full_and_complete(shards: int) -> None:
    entries = checkpoint_entries(TINY)
    parts = partition(entries, shards)
    assert len(parts) == shards
    assert all(parts)
    assert [e for part in parts for e in part] == entries
    largest = max(e.nbytes for e in entries)
    share = sum(e.nbytes for e in entries) / shards
    assert all(sum(e.nbytes for e in part) <= share + largest for part in parts)


def test_the_index_names_the_shard_of_every_tensor(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "it", replace(TINY, shards=3))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    shards = {name: load_file(folder / name) for name in names}
    found = {key: name for name, tensors in shards.items() for key in tensors}
    assert index["weight_map"] == found
    total = sum(t.nbytes for tensors in shards.values() for t in tensors.values())
    assert index["metadata"] == {"total_size": total}
    assert not (folder / "model.safetensors").exists()


def without(value: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value[key] for key in value if key not in keys}


def test_hf_files_and_fields_are_the_published_ones(tmp_path: Path) -> None:
    golden = DATA / "llava_1_5_hf/checkpoint"
    ours = write_checkpoint(tmp_path / "it", replace(TINY, shards=3))
    assert {path.name for path in ours.iterdir()} == {path.name for path in golden.iterdir()}
    for name in ("added_tokens", "chat_template", "preprocessor_config", "processor_config"):
        assert load_json(ours / f"{name}.json") == load_json(golden / f"{name}.json")
    assert load_json(ours / "special_tokens_map.json") == load_json(
        golden / "special_tokens_map.json"
    )
    tokenizer = load_json(ours / "tokenizer_config.json")
    assert without(tokenizer, "padding_side") == load_json(golden / "tokenizer_config.json")
    ours_json, golden_json = (
        load_json(ours / "tokenizer.json"),
        load_json(golden / "tokenizer.json"),
    )
    assert without(ours_json, "model") == without(golden_json, "model")

    config, expected = load_json(ours / "config.json"), load_json(golden / "config.json")
    nested = ("text_config", "vision_config", "transformers_version")
    assert without(config, *nested) == without(expected, *nested)
    text, vision = config["text_config"], config["vision_config"]
    assert text == without(expected["text_config"], "_name_or_path")
    unused = ("projection_dim", "vocab_size")
    assert without(vision, *unused) == without(expected["vision_config"], *unused)


def test_the_large_text_config_leaves_defaults_out_like_the_published_one(tmp_path: Path) -> None:
    write_hf_configs(tmp_path, PRESETS["7b"])
    config = load_json(tmp_path / "config.json")
    assert config["text_config"] == {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    }


def test_original_files_and_fields_are_the_published_ones(tmp_path: Path) -> None:
    golden = DATA / "llava_v1_5_liuhaotian"
    ours = write_checkpoint(tmp_path / "it", replace(ORIGINAL, text=replace(TINY.text, vocab=640)))
    names = {path.name for path in (golden / "checkpoint").iterdir()}
    assert {path.name for path in ours.iterdir()} == names
    for name in ("config", "generation_config", "tokenizer_config", "special_tokens_map"):
        expected = load_json(golden / f"checkpoint/{name}.json")
        drop = ("_name_or_path", "transformers_version")
        assert without(load_json(ours / f"{name}.json"), *drop) == without(expected, *drop)
    assert {p.name for p in (tmp_path / TOWER).iterdir()} == {
        p.name for p in (golden / TOWER).iterdir()
    }
    preprocessor = load_json(tmp_path / TOWER / "preprocessor_config.json")
    golden_preprocessor = load_json(golden / TOWER / "preprocessor_config.json")
    assert preprocessor == {**golden_preprocessor, "size": 168, "crop_size": 168}


def test_a_folder_in_use_is_refused_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "it"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="is there already") as caught:
        write_checkpoint(out, TINY)
    assert "--force" in caught.value.fix
    assert (out / "mine.txt").read_text() == "precious"
    write_checkpoint(out, TINY, force=True)
    assert not (out / "mine.txt").exists()
    assert (out / "config.json").exists()


def test_a_tower_in_use_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", ORIGINAL)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=TOWER):
        write_checkpoint(tmp_path / "two", replace(ORIGINAL, seed=1))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("spec", [TINY, ORIGINAL])
def test_a_failure_leaves_nothing(tmp_path: Path, spec: SyntheticSpec) -> None:
    with pytest.raises(ConfigError, match="more shards than tensors"):
        write_checkpoint(tmp_path / "it", replace(spec, shards=1000))
    assert contents(tmp_path) == {}
    assert not (tmp_path / "it").exists()


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    assert (write_checkpoint(tmp_path / "it", TINY) / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": "gguf"}, "hf or original"),
        ({"dtype": "int8"}, "float32 or float16 or bfloat16"),
        ({"shards": 0}, "at least 1"),
        ({"text": replace(TINY.text, kv_heads=3)}, "a divisor of heads = 4"),
        ({"text": replace(TINY.text, heads=0)}, "a divisor of hidden = 128"),
        ({"text": replace(TINY.text, vocab=641)}, "at least 642"),
        ({"vision": replace(TINY.vision, image_size=170)}, "a divisor of image_size = 170"),
    ],
)
def test_impossible_specs_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(TINY, **change)
    assert words in str(caught.value)


def test_the_command_writes_what_its_options_say(tmp_path: Path) -> None:
    out = tmp_path / "it"
    options = ["--layout", "original", "--seed", "3", "--dtype", "float16", "--shards", "2"]
    assert main([str(out), *options, "--kv-heads", "2", "--tie"]) == 0
    config = load_json(out / "config.json")
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["torch_dtype"] == "float16"
    assert config["num_key_value_heads"] == 2
    assert config["tie_word_embeddings"] is True
    spec = replace(ORIGINAL, seed=3, dtype="float16", text=replace(GQA.text, tied=True))
    write_checkpoint(tmp_path / "same" / "it", spec)
    assert contents(out) == contents(tmp_path / "same" / "it")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "it"), "--kv-heads", "3"]) == 2
    assert "a divisor of heads = 4" in capsys.readouterr().err
    assert not (tmp_path / "it").exists()
