"""The chat template of a checkpoint is the one that transformers takes, or is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaProcessor

from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint.chat_template import read_chat_template


def write(folder: Path, **files: object) -> Path:
    """Files by name, `.` as `__` and `/` as `___`: text, or an object as JSON."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder


SOURCES: dict[str, object] = {
    "processor_config__json": {"chat_template": "from processor_config"},
    "chat_template__json": {"chat_template": "from chat_template.json"},
    "chat_template__jinja": "from chat_template.jinja",
    "additional_chat_templates___default__jinja": "from additional/default",
    "additional_chat_templates___other__jinja": "from additional/other",
}


def theirs(folder: Path) -> str | None:
    """What `ProcessorMixin.apply_chat_template` of transformers would take."""
    template: Any = LlavaProcessor.get_processor_dict(folder)[0].get("chat_template")
    if isinstance(template, dict):
        template = template["default"]
    assert template is None or isinstance(template, str)
    return template


@pytest.mark.parametrize(
    "names",
    [c for n in range(len(SOURCES) + 1) for c in itertools.combinations(SOURCES, n)],
    ids=lambda names: "+".join(names) or "none",
)
def test_of_several_places_the_one_of_transformers_counts(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder = write(tmp_path, **{name: SOURCES[name] for name in names})
    try:
        expected = theirs(folder)
    except (ValueError, KeyError):
        # It refuses the folder as it loads, or has no default: we do unless another place says.
        if "processor_config__json" not in names:
            with pytest.raises(CheckpointError):
                read_chat_template(folder)
        return
    assert read_chat_template(folder) == expected


def test_the_tokenizers_template_comes_last(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config__json={"chat_template": "from the tokenizer"})
    assert read_chat_template(tmp_path) == "from the tokenizer"
    write(tmp_path, chat_template__jinja="from the processor")
    assert read_chat_template(tmp_path) == "from the processor"


NAMED = (
    [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}],
    [{"name": "tool_use", "template": "y"}, {"name": "default", "template": "x"}],
    {"default": "x", "rag": "y"},
)
PLACES = ("tokenizer_config__json", "chat_template__json", "processor_config__json")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", NAMED, ids=str)
def test_of_named_templates_the_default_is_taken(tmp_path: Path, place: str, value: object) -> None:
    assert read_chat_template(write(tmp_path, **{place: {"chat_template": value}})) == "x"


WRONG = (
    7,
    True,
    [],
    {},
    ["x"],
    [{"name": "default"}],
    [{"template": "x"}],
    [{"name": "tool_use", "template": "y"}],
    {"rag": "y"},
    {"default": ["x"]},
    [{"name": "default", "template": None}],
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", WRONG, ids=str)
def test_a_template_of_another_form_is_an_error_and_never_left_out(
    tmp_path: Path, place: str, value: object
) -> None:
    write(tmp_path, **{place: {"chat_template": value}})
    with pytest.raises(CheckpointError) as caught:
        read_chat_template(tmp_path)
    assert place.replace("__", ".") in caught.value.summary
    assert "'default'" in caught.value.expected


def test_files_that_are_no_text_are_errors(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(CheckpointError, match="offset 1 that is not UTF-8"):
        read_chat_template(tmp_path)
    write(tmp_path, chat_template__jinja="version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="LFS pointer"):
        read_chat_template(tmp_path)


def test_a_legacy_file_without_its_key_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, chat_template__json={"template": "x"})
    with pytest.raises(CheckpointError) as caught:
        read_chat_template(tmp_path)
    assert caught.value.found == "no chat_template"
