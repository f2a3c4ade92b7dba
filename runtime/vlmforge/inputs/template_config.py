"""`ChatTemplateConfig`: the chat template that a pipeline is made with."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from vlmforge.errors import ConfigError
from vlmforge.field_rules import (
    Choice,
    ListOf,
    OrNone,
    Refusal,
    Rule,
    Text,
    check_fields,
    check_refusals,
    known_fields,
    shown,
)

UNNAMED_TEMPLATE = "custom"
"""`model_name` of a template whose JSON has none."""


@known_fields
@dataclass(slots=True)
class ChatTemplateConfig:
    """A chat template by its name, its parts, or both. It only holds them.

    A part that is None keeps the named template's value; an empty one replaces it. The layout is
    `{system}{meta_instruction}{eosys}{user}{question}{eoh}{assistant}{answer}{eoa}{separator}...`.

    Attributes:
        model_name: Name of a template that the engine has, or of your own if you give its parts.
        capability: "completion" and "infilling" send prompts as they are; "chat" and "python" put
            the template around them.
        stop_words: Texts that end an answer.
        tool, eotool, model_path: Not supported; refused when set.

    Raises:
        ConfigError: a field of a wrong type, or not supported.
    """

    model_name: str
    system: str | None = None
    meta_instruction: str | None = None
    eosys: str | None = None
    user: str | None = None
    eoh: str | None = None
    assistant: str | None = None
    eoa: str | None = None
    separator: str | None = None
    capability: str | None = None
    stop_words: Sequence[str] | None = None
    _: KW_ONLY
    tool: str | None = None
    eotool: str | None = None
    model_path: str | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check all fields (ConfigError: field, value found, values expected)."""
        check_fields(self, RULES)
        check_refusals(self, REFUSALS)

    def to_json(self, file_path: str | os.PathLike[str] | None = None) -> str:
        """All fields as JSON text, also written to `file_path` if given.

        Raises:
            ConfigError: a field is wrong, or the file cannot be written.
        """
        self.validate()
        text = json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=4)
        if file_path is not None:
            try:
                Path(file_path).write_text(text, "utf-8")
            except (OSError, ValueError, TypeError) as error:
                raise ConfigError(
                    f"The chat template's JSON cannot be written to {shown(file_path)}.",
                    found=f"{type(error).__name__}: {error}",
                    expected="a path in a folder that can be written to",
                ) from error
        return text

    @classmethod
    def from_json(cls, file_or_string: str | os.PathLike[str]) -> ChatTemplateConfig:
        """The config of a JSON file or of JSON text, which begins with "{".

        Without `model_name` it is called `UNNAMED_TEMPLATE`.

        Raises:
            ConfigError: no such file, not a JSON object, or a field that is unknown or wrong.
        """
        values = _json_object(file_or_string)
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(
                "A chat template's JSON has a field that we do not know.",
                found=unknown[0],
                expected=", ".join(known),
                fix="remove it",
            )
        return cls(**{"model_name": UNNAMED_TEMPLATE, **values})


RULES: Mapping[str, Rule] = {
    "model_name": Text(empty=False),
    "system": OrNone(Text()),
    "meta_instruction": OrNone(Text()),
    "eosys": OrNone(Text()),
    "user": OrNone(Text()),
    "eoh": OrNone(Text()),
    "assistant": OrNone(Text()),
    "eoa": OrNone(Text()),
    "separator": OrNone(Text()),
    "capability": OrNone(Choice(("completion", "infilling", "chat", "python"))),
    "stop_words": OrNone(ListOf(Text(empty=False))),
}

_NO_TOOLS = Refusal(
    (None,), "messages have no tool role here", "put the tool's answer into a user message"
)
REFUSALS: Mapping[str, Refusal] = {
    "tool": _NO_TOOLS,
    "eotool": _NO_TOOLS,
    "model_path": Refusal(
        (None,),
        "the template of a checkpoint is frozen into its engine",
        "build-engine CHECKPOINT -o ENGINE, and leave model_path out",
    ),
}


def _json_object(file_or_string: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        text = os.fsdecode(file_or_string)
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text("utf-8")
        values = json.loads(text)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _not_json(file_or_string, f"{type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise _not_json(file_or_string, f"JSON of type {type(values).__name__}")
    return values


def _not_json(given: object, found: str) -> ConfigError:
    return ConfigError(
        f"Not a chat template's JSON: {shown(given)[:60]}.",
        found=found,
        expected='a path to a JSON file, or JSON text such as {"model_name": "...", "user": "..."}',
        fix="ChatTemplateConfig(...).to_json() writes it",
    )
