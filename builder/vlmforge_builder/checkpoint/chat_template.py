"""The chat template of a checkpoint, from wherever transformers looks for one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint.config import read_json, refuse_pointer

_KEY = "chat_template"
_LEGACY = "chat_template.json"
_TEXT = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
"""A folder of named templates, inside the checkpoint's."""


def read_chat_template(folder: Path) -> str | None:
    """The checkpoint's template as jinja text; None where it has none.

    The places are asked in the order of `ProcessorMixin.get_processor_dict` of transformers:
    processor_config.json, chat_template.json, chat_template.jinja (and additional_chat_templates);
    then tokenizer_config.json. Of several named templates the one called "default" is taken.

    Raises:
        CheckpointError: a template that is neither text nor a set of named texts with a default, or
            places that transformers refuses together.
    """
    for path, value in _places(folder):
        if value is not None:
            return _default(path, value)
    return None


def _places(folder: Path) -> Iterator[tuple[Path, object]]:
    yield _from_json(folder / "processor_config.json")
    legacy = folder / _LEGACY
    more = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    if legacy.exists():
        if more:
            raise _conflict(folder, [path.name for path in more])
        yield _legacy(legacy)
    files = _files(folder, more)
    yield folder / (_TEXT if "default" in files else MORE_TEMPLATES), files or None
    yield _from_json(folder / "tokenizer_config.json")


def _from_json(path: Path) -> tuple[Path, object]:
    return path, read_json(path).get(_KEY) if path.exists() else None


def _legacy(path: Path) -> tuple[Path, object]:
    value = read_json(path).get(_KEY)
    if value is None:
        raise _wrong(path, f"no {_KEY}")
    return path, value


def _files(folder: Path, more: list[Path]) -> dict[str, object]:
    """The templates that are files of their own, by name."""
    paths = {path.stem: path for path in more}
    if (folder / _TEXT).exists():
        paths["default"] = folder / _TEXT
    return {name: _text(path) for name, path in paths.items()}


def _text(path: Path) -> str:
    refuse_pointer(path)
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(path, f"a byte at offset {error.start} that is not UTF-8") from error


def _default(path: Path, value: object) -> str:
    if isinstance(value, str):
        return value
    named = _named(value)
    if named is None:
        raise _wrong(path, f"{type(value).__name__} {str(value)[:60]}")
    template = named.get("default")
    if not isinstance(template, str):
        raise _wrong(path, f"templates named {', '.join(map(repr, named)) or 'nothing'}")
    return template


def _named(value: object) -> Mapping[object, object] | None:
    """Templates by name, given as an object or as a list of {"name": ..., "template": ...}."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and {"name", "template"} <= item.keys() for item in value
    ):
        return None
    return {str(item["name"]): item["template"] for item in value}


def _wrong(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has no usable chat template.",
        found=found,
        expected="jinja text, or named templates of which one is called 'default'",
        fix='name the template that chats are to use: [{"name": "default", "template": "..."}]',
    )


def _conflict(folder: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder} has chat templates in two places, which transformers refuses too.",
        found=f"{_LEGACY}, and {MORE_TEMPLATES}/ with {', '.join(names)}",
        expected=f"{_TEXT} beside {MORE_TEMPLATES}/, or {_LEGACY} alone",
        fix=f"move the template of {_LEGACY} to {_TEXT}, and delete {_LEGACY}",
    )
