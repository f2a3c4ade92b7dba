"""Templates get the content of a message in the form that they take, images in their places."""

from __future__ import annotations

import dataclasses

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from prompt_setups import PHOTO, Setup, assistant, hf_setup, original_setup, user
from vlmforge.errors import PromptError
from vlmforge.inputs.content import check_writes_users, string_roles
from vlmforge.inputs.messages import Message, Text
from vlmforge.inputs.template_choice import ActiveTemplate
from vlmforge.vl.constants import IMAGE_TOKEN

# Templates of text-only models: Mistral's, Llama 2's, ChatML, Zephyr's.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
LLAMA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' }}{% endif %}"
    "{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] | trim }}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# These write the notation of a list without a fault.
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot:"
JSON = "{% for m in messages %}{{ m.role }}: {{ m.content | tojson }}\n{% endfor %}bot:"
STRINGS = {"mistral": MISTRAL, "llama": LLAMA, "chatml": CHATML, "plain": PLAIN, "json": JSON}

BLOCKS = (
    "{% for m in messages %}{{ m.role }}: {% for b in m.content %}"
    "{% if b.type == 'image' %}<image>{% else %}{{ b.text }}{% endif %}{% endfor %}\n{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for b in m.content %}{{ b.text or '<image>' }}{% endfor %}{% endif %}{% endfor %}"
)
# What a user says is a list, what else is said a string.
MIXED = (
    "{% for m in messages %}{% if m.role == 'user' %}{% for b in m.content %}"
    "{{ '<image>' if b.type == 'image' else b.text }}{% endfor %}{% else %}"
    "{{ '[' + m.content + ']' }}{% endif %}{% endfor %}"
)


def roles(source: str) -> frozenset[str]:
    return string_roles(source, "<s>", "</s>")


@pytest.mark.parametrize("source", STRINGS.values(), ids=STRINGS)
def test_templates_of_text_only_models_get_strings(source: str) -> None:
    assert roles(source) == {"user", "system", "assistant"}
    check_writes_users(source, "<s>", "</s>")


@pytest.mark.parametrize("source", [BLOCKS, EITHER, hf_setup().template.jinja], ids=str)
def test_templates_that_take_blocks_get_them(source: str) -> None:
    assert roles(source) == frozenset()
    check_writes_users(source, "<s>", "</s>")


def test_each_role_is_asked_for_itself() -> None:
    assert roles(MIXED) == {"system", "assistant"}


def with_template(setup: Setup, source: str) -> Setup:
    return dataclasses.replace(setup, template=ActiveTemplate("given", source, ()))


@pytest.mark.parametrize("source", STRINGS.values(), ids=STRINGS)
@pytest.mark.parametrize("setup", [hf_setup, original_setup])
def test_the_text_is_that_of_transformers_with_the_placeholders_in_the_strings(
    setup: object, source: str
) -> None:
    assert callable(setup)
    made = with_template(setup(), source)
    messages = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And <image> here?"},
    ]
    rendered = made.render(
        user("What is it?", PHOTO), assistant("A cat."), user(f"And {IMAGE_TOKEN} here?", PHOTO)
    )
    (expected,), _ = render_jinja_template(
        conversations=[messages],
        chat_template=source,
        add_generation_prompt=True,
        bos_token=made.policy.bos_token,
        eos_token=made.policy.eos_token,
    )
    assert rendered.text == expected
    assert len(rendered.image_spans) == 2


def test_images_come_before_the_text_of_a_string_and_keep_their_places_between_texts() -> None:
    made = with_template(hf_setup(), PLAIN)
    assert made.render(user("a", PHOTO, PHOTO)).text == "user: <image>\n<image>\na\nbot:"
    assert made.render(user("a", PHOTO, "b")).text == "user: a\n<image>\nb\nbot:"
    assert made.render(user(PHOTO)).text == "user: <image>\nbot:"
    assert made.render(user("a")).text == "user: a\nbot:"


def test_a_placeholder_that_a_user_typed_stays_text() -> None:
    made = with_template(hf_setup(), PLAIN)
    rendered = made.render(user("what does <image> mean?"))
    assert rendered.image_spans == ()
    assert rendered.text == "user: what does <image> mean?\nbot:"


def test_a_system_message_of_a_mixed_template_is_a_string() -> None:
    made = with_template(hf_setup(), MIXED)
    rendered = made.render(Message("system", (Text("Be kind."),)), user("hello", PHOTO))
    assert rendered.text == "[Be kind.]<image>hello"


NEITHER = {
    "fails": "{% for m in messages %}{{ m.content.missing.more }}{% endfor %}",
    "leaves it out": "{% for m in messages %}{{ m.role }}{% endfor %}",
    "numbers": "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
    "refuses": "{{ raise_exception('not today') }}",
}


@pytest.mark.parametrize("source", NEITHER.values(), ids=NEITHER)
def test_a_template_that_writes_nothing_of_a_user_is_refused(source: str) -> None:
    with pytest.raises(PromptError):
        check_writes_users(source, "<s>", "</s>")


def test_a_fault_does_not_blame_the_roles_alone() -> None:
    made = with_template(hf_setup(), NEITHER["numbers"])
    error = made.refusal(user("hello"))
    assert error.expected.startswith("contents that the template can write")
