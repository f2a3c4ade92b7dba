"""Which chat template serves a pipeline: the engine's own, or the one that the user chose."""

from __future__ import annotations

from msgspec import Struct, structs

from vlmforge.engine.prompts import PromptPolicy, TemplateParts
from vlmforge.errors import ConfigError
from vlmforge.field_rules import shown
from vlmforge.inputs.template import jinja_from_parts
from vlmforge.inputs.template_config import ChatTemplateConfig

_PARTS = ("system", "meta_instruction", "eosys", "user", "eoh", "assistant", "eoa", "separator")
_EMPTY = TemplateParts("", None, "", "", "", "", "", "", (), strip_end=False)


class ActiveTemplate(Struct, frozen=True):
    """A template in use.

    `verbatim`: prompts are passed through untouched; `in_order`: see `PromptPolicy`.
    """

    name: str
    jinja: str
    stop_words: tuple[str, ...]
    verbatim: bool = False
    in_order: bool = False


def choose_template(
    policy: PromptPolicy, frozen: str, config: ChatTemplateConfig | None
) -> ActiveTemplate:
    """The engine's frozen template (jinja text), or what `config` makes of it or of another.

    Parts that `config` leaves None keep the named template's values. A name that the engine does
    not have is fine when the config gives the parts itself.

    Raises:
        ConfigError: an unknown name without parts, or parts for a template that has none.
    """
    if config is None:
        return ActiveTemplate(
            policy.template_name, frozen, policy.stop_words, in_order=policy.in_order
        )
    given = {name: value for name in _PARTS if (value := getattr(config, name)) is not None}
    stop_words = None if config.stop_words is None else tuple(config.stop_words)
    verbatim = config.capability in ("completion", "infilling")
    if config.model_name == policy.template_name and not given:
        words = policy.stop_words if stop_words is None else stop_words
        return ActiveTemplate(policy.template_name, frozen, words, verbatim, policy.in_order)
    base = policy.templates.get(config.model_name)
    if base is None and (not given or config.model_name == policy.template_name):
        raise _unknown(policy, config.model_name, given)
    parts = structs.replace(base or _EMPTY, **given)
    return ActiveTemplate(
        config.model_name,
        jinja_from_parts(
            parts, policy.image_placeholder, policy.image_line + policy.text_separator
        ),
        parts.stop_words if stop_words is None else stop_words,
        verbatim,
    )


def _unknown(policy: PromptPolicy, name: str, given: dict[str, str]) -> ConfigError:
    known = ", ".join(sorted({policy.template_name, *policy.templates}))
    if name == policy.template_name:
        return ConfigError(
            f"The chat template {name!r} is jinja text and has no parts to replace.",
            found=f"ChatTemplateConfig({name!r}, {', '.join(given)}=...)",
            expected="a template with parts: " + ", ".join(sorted(policy.templates)),
            fix="choose one of these as model_name, or give all the parts under a name of your own",
        )
    return ConfigError(
        f"This engine has no chat template {shown(name)}.",
        found=f"ChatTemplateConfig(model_name={shown(name)}) without parts",
        expected=f"one of: {known}",
        fix="choose one of these, or give the parts: ChatTemplateConfig(name, user='USER: ', ...)",
    )
