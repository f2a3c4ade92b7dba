"""The small things of a call: its events, its generation configs, its errors as responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmforge.arguments import check_call
from vlmforge.errors import ConfigError, as_ours
from vlmforge.field_rules import shown
from vlmforge.generation import GenerationConfig
from vlmforge.response import Response

GenConfigs = GenerationConfig | Sequence[GenerationConfig | None] | None


@dataclass(frozen=True, slots=True)
class GenOut:
    """What `Pipeline.generate` yields; see `Response` for the fields."""

    response: str
    history_token_len: int
    input_token_len: int
    generate_token_len: int
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: list[dict[int, float]] | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """A delta, or an error, of the item `index` of a call."""

    index: int
    delta: Response | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether the item ends with it."""
        return self.error is not None or (
            self.delta is not None and self.delta.finish_reason is not None
        )


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


def error_response(index: int, error: Exception) -> Response:
    """What stands in a list for an item that failed."""
    error = as_ours(error)
    return Response(
        index=index,
        session_id=index,
        finish_reason="error",
        error_code=error.code,
        error_message=str(error),
    )


def gen_out(piece: Response, whole: Response) -> GenOut:
    """A piece, with the lengths of what came so far."""
    return GenOut(
        piece.text,
        0,
        whole.input_token_len,
        whole.generate_token_len,
        piece.finish_reason,
        piece.token_ids,
        piece.logprobs,
    )
