"""The chat template that is frozen into an engine: the recipe's, or the one that was asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vlmforge.prompt.choice import choose_template as choose
from vlmforge.template_config import ChatTemplateConfig
from vlmforge_builder.recipe import ChatTemplate, ModelSpec
from vlmforge_builder.weights import sha256


def choose_template(spec: ModelSpec, wanted: str | None) -> ModelSpec:
    """The spec with the template `wanted`: a name, a JSON text, or a path to a JSON file.

    Raises:
        ConfigError: no such template, or JSON that is not a `ChatTemplateConfig`.
    """
    if wanted is None:
        return spec
    known = wanted == spec.template.name or wanted in spec.prompt.templates
    is_json = not known and (wanted.lstrip().startswith("{") or wanted.endswith(".json"))
    config = ChatTemplateConfig.from_json(wanted) if is_json else ChatTemplateConfig(wanted)
    active = choose(spec.prompt, spec.template.jinja, config)
    return dataclasses.replace(
        spec,
        template=ChatTemplate(active.name, active.jinja, active.stop_words),
        prompt=dataclasses.replace(
            spec.prompt, template_name=active.name, stop_words=active.stop_words
        ),
    )


def template_name(wanted: str) -> str:
    """How `wanted` is recorded: what it is, but of a file its name and what is in it."""
    path = Path(wanted)
    if wanted.lstrip().startswith("{") or not path.is_file():
        return wanted
    return f"{path.name} sha256:{sha256(path)}"
