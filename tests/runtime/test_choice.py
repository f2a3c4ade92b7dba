"""Which chat template serves a pipeline, for every way in which one can be asked for."""

from __future__ import annotations

import pytest
from msgspec import structs

from sample_manifest import PROMPT, TEMPLATE
from vlmforge.errors import ConfigError
from vlmforge.inputs.template import jinja_from_parts, render_template
from vlmforge.inputs.template_choice import ActiveTemplate, choose_template
from vlmforge.inputs.template_config import ChatTemplateConfig

FROZEN = "frozen {{ messages[0].content }}"
POLICY = structs.replace(
    PROMPT,
    template_name="frozen",
    stop_words=("FROZEN",),
    templates={"plain": TEMPLATE, "other": structs.replace(TEMPLATE, user="OTHER: ")},
)


def choose(config: ChatTemplateConfig | None) -> ActiveTemplate:
    return choose_template(POLICY, FROZEN, config)


def shown(template: ActiveTemplate) -> str:
    return render_template(
        template.jinja,
        [{"role": "user", "content": "q"}],
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=True,
    )


def refusal(config: ChatTemplateConfig) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        choose(config)
    return caught.value


@pytest.mark.parametrize("config", [None, ChatTemplateConfig("frozen")])
def test_the_frozen_template_unless_asked(config: ChatTemplateConfig | None) -> None:
    assert choose(config) == ActiveTemplate("frozen", FROZEN, ("FROZEN",))


def test_a_named_template() -> None:
    template = choose(ChatTemplateConfig("plain"))
    assert template == ActiveTemplate("plain", jinja_from_parts(TEMPLATE, "<image>"), ("</s>",))
    assert shown(choose(ChatTemplateConfig("other"))) == "Be helpful. OTHER: q ASSISTANT:"


def test_given_parts_replace_the_named_ones_and_empty_ones_count() -> None:
    config = ChatTemplateConfig("plain", meta_instruction="", eosys="", user="Q: ")
    assert shown(choose(config)) == "Q: q ASSISTANT:"


def test_a_template_of_ones_own() -> None:
    config = ChatTemplateConfig("mine", user="<u>", assistant="<a> ", stop_words=["</a>"])
    template = choose(config)
    assert (template.name, template.stop_words) == ("mine", ("</a>",))
    assert shown(template) == "<u>q<a> "


@pytest.mark.parametrize(("name", "words"), [("frozen", ("FROZEN",)), ("plain", ("</s>",))])
def test_stop_words_are_the_templates_unless_given(name: str, words: tuple[str, ...]) -> None:
    assert choose(ChatTemplateConfig(name)).stop_words == words
    assert choose(ChatTemplateConfig(name, stop_words=["x", "y"])).stop_words == ("x", "y")
    assert choose(ChatTemplateConfig(name, stop_words=[])).stop_words == ()


@pytest.mark.parametrize("name", ["frozen", "plain"])
def test_completion_sends_prompts_as_they_are(name: str) -> None:
    assert choose(ChatTemplateConfig(name, capability="completion")).verbatim
    assert choose(ChatTemplateConfig(name, capability="infilling")).verbatim
    assert not choose(ChatTemplateConfig(name, capability="chat")).verbatim


def test_an_unknown_name_is_refused_with_those_known() -> None:
    error = refusal(ChatTemplateConfig("plane"))
    assert error.summary == "This engine has no chat template 'plane'."
    assert error.expected == "one of: frozen, other, plain"
    assert "give the parts" in error.fix


def test_parts_of_a_template_without_parts_cannot_be_replaced() -> None:
    error = refusal(ChatTemplateConfig("frozen", user="U: "))
    assert error.summary == (
        "The chat template 'frozen' is jinja text and has no parts to replace."
    )
    assert error.found == "ChatTemplateConfig('frozen', user=...)"
    assert error.expected == "a template with parts: other, plain"


def test_a_frozen_template_that_has_parts_takes_replacements() -> None:
    policy = structs.replace(POLICY, template_name="plain")
    template = choose_template(policy, FROZEN, ChatTemplateConfig("plain", user="U: "))
    assert shown(template) == "Be helpful. U: q ASSISTANT:"
    assert choose_template(policy, FROZEN, ChatTemplateConfig("plain")).jinja == FROZEN


def test_a_long_name_makes_no_long_error() -> None:
    assert len(str(refusal(ChatTemplateConfig("x" * 99999)))) < 2000
