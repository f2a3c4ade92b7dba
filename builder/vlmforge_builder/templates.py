"""The chat template that is frozen into an engine: the recipe's, or the one that was asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from msgspec import structs

from vlmforge.errors import CheckpointError, PromptError
from vlmforge.inputs.content import check_writes_users
from vlmforge.inputs.template_choice import choose_template as choose
from vlmforge.inputs.template_config import ChatTemplateConfig
from vlmforge_builder.checkpoint.fingerprint import sha256
from vlmforge_builder.recipe import ChatTemplate, ModelSpec


def choose_template(spec: ModelSpec, wanted: str | None) -> ModelSpec:
    """The spec with the template `wanted`: a name, a JSON text, or a path to a JSON file.

    Raises:
        ConfigError: no such template, or JSON that is not a `ChatTemplateConfig`.
        CheckpointError: none is wanted, and the checkpoint's own writes no message of a user.
    """
    if wanted is None:
        _check_own(spec)
        return spec
    known = wanted == spec.template.name or wanted in spec.prompt.templates
    is_json = not known and (wanted.lstrip().startswith("{") or wanted.endswith(".json"))
    config = ChatTemplateConfig.from_json(wanted) if is_json else ChatTemplateConfig(wanted)
    active = choose(spec.prompt, spec.template.jinja, config)
    return dataclasses.replace(
        spec,
        template=ChatTemplate(active.name, active.jinja, active.stop_words),
        prompt=structs.replace(
            spec.prompt, template_name=active.name, stop_words=active.stop_words
        ),
    )


def template_name(wanted: str) -> str:
    """How `wanted` is recorded: what it is, but of a file its name and what is in it."""
    path = Path(wanted)
    if wanted.lstrip().startswith("{") or not path.is_file():
        return wanted
    return f"{path.name} sha256:{sha256(path)}"


def _check_own(spec: ModelSpec) -> None:
    try:
        check_writes_users(spec.template.jinja, spec.prompt.bos_token, spec.prompt.eos_token)
    except PromptError as error:
        raise CheckpointError(
            f"The chat template {spec.template.name!r} of the checkpoint cannot be used.",
            found=f"{error.found}, for one message of a user",
            expected="a template that takes its content as a list of blocks, or as a string",
            fix="--chat-template NAME: " + ", ".join(sorted(spec.prompt.templates)),
        ) from error
