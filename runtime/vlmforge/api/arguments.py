"""Checks of what is passed to calls: nothing of a wrong type gets further than the call."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vlmforge.api.session import Session
from vlmforge.engine.manifest import MANIFEST_FILE
from vlmforge.errors import ConfigError
from vlmforge.field_rules import (
    Flag,
    Identity,
    Instance,
    Int,
    Number,
    OrNone,
    Rule,
    Text,
    misfit,
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
    "priority": Int(-(2**31), 2**31 - 1),
    "salt": Text(),
    "timeout": OrNone(Number(0, above=True)),
}


def check_call(call: str, /, **arguments: object) -> None:
    """ConfigError for an argument of a wrong type.

    Args:
        call: The call, for the message: "chat".
        arguments: By their names; what each must be is the same in all calls.
    """
    for name, value in arguments.items():
        if not _RULES[name].admits(value):
            raise misfit(f"{call}(): {name}", name, value, _RULES[name])


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


def one_for_each(given: GenConfigs, count: int | None) -> Iterable[GenerationConfig]:
    """A config for each of `count` prompts (ConfigError when that many were not given).

    None is an iterator's unknown number: there must be one for all.
    """
    if count is None:
        if not isinstance(given, GenerationConfig | None):
            raise _misfit(f"gen_config={shown(given)}", "one GenerationConfig for all prompts")
        return itertools.repeat(given or GenerationConfig())
    expected = f"a GenerationConfig, or a list of {count} of them"
    if given is None or isinstance(given, GenerationConfig):
        given = [given] * count
    if isinstance(given, Mapping):
        fix = "gen_config=GenerationConfig(**gen_config)"
        raise _misfit(f"gen_config={shown(given)}", expected, fix)
    if not isinstance(given, list | tuple) or len(given) != count:
        raise _misfit(f"gen_config={shown(given)}", expected)
    for config in given:
        if not isinstance(config, GenerationConfig | None):
            raise _misfit(f"{shown(config)} in the list gen_config", expected)
    return [config if config is not None else GenerationConfig() for config in given]


_ONE_EACH = "give one for all, or a list of prompts and one for each"


def _misfit(found: str, expected: str, fix: str = _ONE_EACH) -> ConfigError:
    return ConfigError(
        "gen_config does not fit the prompts.",
        found=found,
        expected=expected,
        fix=fix,
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


def refuse_choices(config: object) -> None:
    """ConfigError for a turn with several answers: a conversation goes on from one."""
    n = config.n if isinstance(config, GenerationConfig) else 1
    if n != 1:
        raise ConfigError(
            "A turn of a conversation has one answer.",
            found=f"chat() with n={shown(n)}",
            expected="n=1",
            fix="ask pipe(messages, gen_config=GenerationConfig(n=...)) with the whole "
            "conversation, and go on from the answer that you choose",
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
