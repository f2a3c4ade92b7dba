"""A family that no recipe knows is refused at once, before any weights are downloaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from conftest import HF
from hub_server import HubServer
from vlmforge.engine.families import installed_families
from vlmforge.errors import UnsupportedModelError
from vlmforge_builder.build import BuildOptions
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.command import parser
from vlmforge_builder.recipe import RecipeOptions, find_recipe
from vlmforge_builder.recognise import recognise

OTHER = {"architectures": ["Qwen9VLForConditionalGeneration"], "model_type": "qwen9_vl"}
# Of a family that we know; its text model is one that the recipe does not.
VARIANT = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {"model_type": "gemma9"},
}
FILES = {
    "tokenizer.json": b"{}",
    "tokenizer.model": b"t" * 4000,
    "model.safetensors": b"w" * 5000,
    "pytorch_model.bin": b"w" * 5000,
    "modeling_other.py": b"raise SystemExit",
    "vit/config.json": b"{}",
    "vit/model.safetensors": b"w" * 5000,
}
# Of a family that we know; what is beside it, or in it, says that its weights are not plain.
KNOWN = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
QUANTISED = {**KNOWN, "quantization_config": {"quant_method": "fp8"}}
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
BESIDE = {
    "org/gptq": {"quantize_config.json": b"{}"},
    "org/adapter": {
        "adapter_config.json": json.dumps(ADAPTER).encode(),
        "adapter_model.safetensors": b"w" * 5000,
    },
}
REPOS = {
    "org/other": OTHER,
    "org/variant": VARIANT,
    "org/nothing": None,
    "org/quantised": QUANTISED,
    "org/gptq": KNOWN,
    "org/adapter": KNOWN,
}

# What is said of each. One has no config.json, one is not there.
REFUSED = {
    "org/other": (
        "UnsupportedModelError",
        "found:    architectures ['Qwen9VLForConditionalGeneration'], model_type 'qwen9_vl'",
    ),
    "org/variant": ("UnsupportedModelError", "found:    text_config.model_type 'gemma9'"),
    "org/quantised": ("UnsupportedModelError", "found:    fp8: quantization_config in"),
    "org/gptq": ("UnsupportedModelError", "found:    gptq: "),
    "org/adapter": ("CheckpointError", "found:    LORA of org/base (adapter_config.json)"),
    "org/nothing": ("CheckpointError", "config.json does not exist"),
    "org/nowhere": ("CheckpointError", "org/nowhere is neither a folder nor could it be fetched"),
}
# All in one process: to import takes longer than to refuse.
PROGRAM = """
import sys
from vlmforge_builder.cli import main
for repo in sys.argv[1:]:
    status = main([repo, "-o", "it.engine"])
    print(f"END {repo} {status}", file=sys.stderr)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    for repo, config in REPOS.items():
        files = {**FILES, **BESIDE.get(repo, {})}
        if config is not None:
            files["config.json"] = json.dumps(config).encode()
        for name, content in files.items():
            path = tmp_path / "repos" / repo / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    with HubServer({repo: tmp_path / "repos" / repo for repo in REPOS}) as server:
        yield server


def contents_asked_for(hub: HubServer, repo: str) -> set[str]:
    """Names of the files that were asked for, HEAD requests too."""
    paths = [urlsplit(path).path for _, path in hub.requests]
    return {
        path.split("/", 5)[5]
        for path in paths
        if path.startswith((f"/{repo}/resolve/", f"/lfs/{repo}/"))
    }


def test_only_what_tells_of_the_model_is_asked_for(hub: HubServer, tmp_path: Path) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *REFUSED],
        env={**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    rest = done.stderr
    for repo, (kind, words) in REFUSED.items():
        said, end, rest = rest.partition(f"END {repo} 1\n")
        assert end and "END" not in said
        assert kind in said
        assert words in said
        small = {name for name in BESIDE.get(repo, {}) if name.endswith(".json")}
        small |= {"config.json"} if REPOS.get(repo) else set()
        assert contents_asked_for(hub, repo) - {"config.json"} == small - {"config.json"}
        assert contents_asked_for(hub, repo) >= small
    assert hub.downloaded() == {"config.json", "quantize_config.json", "adapter_config.json"}
    assert not (tmp_path / "it.engine").exists()


def test_it_is_refused_before_the_libraries_of_a_build_are_loaded(tmp_path: Path) -> None:
    """They take longer to import than all the rest takes."""
    (tmp_path / "config.json").write_text(json.dumps(OTHER), "utf-8")
    program = (
        "import sys\nfrom vlmforge_builder.cli import main\n"
        "status = main(['.', '-o', 'it.engine'])\n"
        "heavy = ('torch', 'onnx', 'onnxscript', 'onnxruntime', 'transformers', 'safetensors')\n"
        "print(status, *[name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1\n", done.stderr
    assert "UnsupportedModelError" in done.stderr


def test_what_is_supported_is_named() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        find_recipe(ConfigReader(OTHER, Path("config.json")))
    error = caught.value
    assert error.summary == "No recipe knows the model of config.json."
    for card in installed_families():
        for row in card.rows:
            assert f"{row.model} ({row.recognised_by})" in error.expected


# --- configuration keys ------------------------------------------------------------------------


def _recognised(tmp_path: Path, ignored: tuple[str, ...], **changes: object) -> None:
    config = json.loads((HF / "checkpoint/config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | changes), "utf-8")
    recognise(tmp_path, ignored)


def test_an_unknown_key_is_refused_from_config_json_alone(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        _recognised(tmp_path, (), my_learning_rate=0.1)
    assert caught.value.summary.endswith("has a key that is not known: my_learning_rate.")
    assert caught.value.found == "my_learning_rate 0.1"
    assert caught.value.fix.endswith("--ignore-config-key my_learning_rate")
    with pytest.raises(UnsupportedModelError, match=r"not known: text_config\.my_rate"):
        _recognised(tmp_path, ("rate",), text_config={"model_type": "llama", "my_rate": 1})


@pytest.mark.parametrize("name", ["my_rate", "text_config.my_rate"])
def test_an_unknown_key_can_be_left_out(tmp_path: Path, name: str) -> None:
    _recognised(tmp_path, (name,), text_config={"model_type": "llama", "my_rate": 1})


def test_the_option_reaches_the_build_and_is_recorded() -> None:
    arguments = ["c", "-o", "e", "--ignore-config-key", "b", "--ignore-config-key", "a"]
    values = vars(parser().parse_args(arguments))
    for name in ("json_events", "until_eof", "describe"):
        values.pop(name)
    assert BuildOptions(**values).recorded()["ignore_config_key"] == "a, b"
    assert "ignore_config_key" not in BuildOptions("c", Path("e")).recorded()


def test_what_changes_greedy_answers_says_how_to_have_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(HF / "checkpoint", checkpoint)
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 2, "repetition_penalty": 1.2}), "utf-8")
    config, recipe = recognise(checkpoint)
    with pytest.raises(UnsupportedModelError) as caught:
        recipe.load(checkpoint, config, RecipeOptions(None, None, Path))
    assert caught.value.fix == (
        "build-engine ... --ignore-config-key repetition_penalty, and in each call "
        "GenerationConfig(repetition_penalty=...)"
    )
    config, recipe = recognise(checkpoint, ["repetition_penalty"])
    assert recipe.load(checkpoint, config, RecipeOptions(None, None, Path)).eos_ids == (2,)
