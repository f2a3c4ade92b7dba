"""Checks of what is passed to calls: nothing of a wrong type gets further than the call."""

from __future__ import annotations

import os
from pathlib import Path

from vlmforge.errors import ConfigError
from vlmforge.field_rules import (
    Flag,
    Identity,
    Instance,
    Int,
    OrNone,
    Rule,
    Text,
    check_value,
    shown,
)
from vlmforge.manifest import MANIFEST_FILE
from vlmforge.session import Session

_FLAG = Flag()
_RULES: dict[str, Rule] = {
    "do_preprocess": _FLAG,
    "use_tqdm": _FLAG,
    "stream_response": _FLAG,
    "sequence_start": _FLAG,
    "sequence_end": _FLAG,
    "step": Int(0),
    "adapter_name": OrNone(Text()),
    "session": OrNone(Instance(Session, "a Session")),
    "session_id": Identity(),
}


def check_call(call: str, /, **arguments: object) -> None:
    """ConfigError for an argument of a wrong type.

    Args:
        call: The call, for the message: "chat".
        arguments: By their names; what each must be is the same in all calls.
    """
    for name, value in arguments.items():
        check_value(f"{call}(): {name}", name, value, _RULES[name])


def path_text(model_path: object) -> str:
    """A path or hub id as text (ConfigError: it is none, or none that a file system takes)."""
    try:
        text = os.fsdecode(model_path)  # type: ignore[arg-type]
        os.fsencode(text)
    except (TypeError, UnicodeEncodeError) as error:
        raise _no_path(model_path, str(error)) from error
    if not text.strip() or "\0" in text:
        raise _no_path(model_path, "it is empty" if not text.strip() else "it has a NUL character")
    try:
        Path(text, MANIFEST_FILE).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # a hub id, or a path whose absence is told later
    except OSError as error:  # too long, a loop of links, no right to look
        raise _no_path(model_path, error.strerror or str(error)) from error
    return text


def _no_path(found: object, reason: str) -> ConfigError:
    return ConfigError(
        "pipeline(): model_path cannot be used as a path.",
        found=f"{shown(found)}: {reason}",
        expected="the path of an engine directory or a checkpoint folder, or a hub id: org/name",
        fix="pipeline('ENGINE')",
    )
