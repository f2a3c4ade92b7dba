"""Checks of what is passed to calls: nothing of a wrong type gets further than the call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vlmforge.api.session import Session
from vlmforge.engine.manifest import MANIFEST_FILE
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
from vlmforge.outputs.generation_config import GenerationConfig

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


GenConfigs = GenerationConfig | Sequence[GenerationConfig | None] | None


def one_for_each(given: GenConfigs, count: int) -> list[GenerationConfig]:
    """A config for each of `count` prompts (ConfigError when that many were not given)."""
    if given is None or isinstance(given, GenerationConfig):
        given = [given] * count
    if not isinstance(given, list | tuple) or len(given) != count:
        raise _misfit(f"gen_config={shown(given)}", count)
    for config in given:
        if not isinstance(config, GenerationConfig | None):
            raise _misfit(f"{shown(config)} in the list gen_config", count)
    return [config if config is not None else GenerationConfig() for config in given]


def _misfit(found: str, count: int) -> ConfigError:
    return ConfigError(
        "gen_config does not fit the prompts.",
        found=found,
        expected=f"a GenerationConfig, or a list of {count} of them",
        fix="give one for all, or one for each prompt",
    )


def refuse_adapter(name: str | None) -> None:
    """ConfigError for an adapter's name; None passes."""
    if name is not None:
        raise ConfigError(
            "Adapters are not supported.",
            found=f"adapter_name={shown(name)}",
            expected="None",
            fix="merge the adapter into the checkpoint and build an engine of that",
        )


def refuse_state(sequence_start: bool, sequence_end: bool, step: int) -> None:
    """ConfigError for a sequence that is to go on after the call, or has begun before it."""
    check_call("generate", sequence_start=sequence_start, sequence_end=sequence_end, step=step)
    if not (sequence_start and sequence_end and step == 0):
        raise ConfigError(
            "generate() keeps no state between calls.",
            found=f"sequence_start={sequence_start}, sequence_end={sequence_end}, step={step}",
            expected="sequence_start=True, sequence_end=True, step=0",
            fix="send the whole conversation as OpenAI messages, or use chat()",
        )
