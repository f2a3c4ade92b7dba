"""Chat templates: the worked examples of the interface, equality with transformers, the sandbox."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from conftest import HF
from vlmforge.engine.prompts import TemplateParts
from vlmforge.errors import PromptError
from vlmforge.inputs.template import jinja_from_parts, render_template

IMAGE = "<IMAGE_TOKEN>"
Turn = dict[str, Any]


def vicuna_like(person: str, *, strip_end: bool) -> TemplateParts:
    system = (
        f"A chat between a curious {person} and an artificial intelligence assistant. The assistant"
        f" gives helpful, detailed, and polite answers to the {person}'s questions."
    )
    parts = ("", system, " ", "USER: ", " ", "ASSISTANT: ", "</s>", "", ("</s>",))
    return TemplateParts(*parts, strip_end=strip_end)


def chatml(system: str, eol: str) -> TemplateParts:
    start, end = "<|im_start|>", "<|im_end|>"
    user, assistant = f"{start}user\n", f"{start}assistant\n"
    parts = (f"{start}system\n", system, end + eol, user, end + eol, assistant, end, eol, (end,))
    return TemplateParts(*parts, strip_end=False)


YI_SYSTEM = (
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI "
    "assistant. Read all the images carefully, and respond to the human's questions with "
    "informative, helpful, detailed and polite answers. "
    "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
    "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
    "\n\n"
)

TEMPLATES = {
    "llava-v1": vicuna_like("human", strip_end=True),
    "vicuna": vicuna_like("user", strip_end=False),
    "qwen": chatml("You are a helpful assistant.", "\n"),
    "llava-chatml": chatml("Answer the questions.", ""),
    "yi-vl": TemplateParts(
        *("", YI_SYSTEM, "", "### Human: ", "\n", "### Assistant:", "\n", "", ("###",)),
        strip_end=False,
    ),
    "mistral": TemplateParts(
        *("", None, "", "[INST] ", " [/INST]", "", "</s>", "", ()), strip_end=False
    ),
}
SYS_H = TEMPLATES["llava-v1"].meta_instruction
SYS_U = TEMPLATES["vicuna"].meta_instruction


def user(text: str, images: int = 0) -> Turn:
    content = [{"type": "image"}] * images
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def said(role: str, text: str) -> Turn:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def render(source: str, turns: Sequence[Turn], *, generation: bool | None = None) -> str:
    if generation is None:
        generation = not turns or turns[-1]["role"] != "assistant"
    return render_template(
        source, turns, bos_token="<s>", eos_token="</s>", add_generation_prompt=generation
    )


def shown(name: str, *turns: Turn) -> str:
    return render(jinja_from_parts(TEMPLATES[name], IMAGE), turns)


FIRST, ANSWER, SECOND = user("q1", 1), said("assistant", "a1"), user("q2")
T = IMAGE
CHATML = "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n"
QWEN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"

# Section 4.3 of the interface's reference: what the original produced.
WORKED = [
    ("llava-v1", [FIRST], f"{SYS_H} USER: {T}\nq1 ASSISTANT:"),
    ("llava-v1", [user("q1", 2)], f"{SYS_H} USER: {T}\n{T}\nq1 ASSISTANT:"),
    ("llava-v1", [user(f"q1{T}")], f"{SYS_H} USER: q1{T} ASSISTANT:"),
    ("llava-v1", [user("hi")], f"{SYS_H} USER: hi ASSISTANT:"),
    (
        "llava-v1",
        [FIRST, ANSWER, SECOND],
        f"{SYS_H} USER: {T}\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT:",
    ),
    (
        "llava-v1",
        [said("system", "SYS"), FIRST, ANSWER, SECOND],
        f"SYS USER: {T}\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT:",
    ),
    ("vicuna", [FIRST], f"{SYS_U} USER: {T}\nq1 ASSISTANT: "),
    ("yi-vl", [FIRST], f"{YI_SYSTEM}### Human: {T}\nq1\n### Assistant:"),
    (
        "yi-vl",
        [FIRST, ANSWER, SECOND],
        f"{YI_SYSTEM}### Human: {T}\nq1\n### Assistant:a1\n### Human: q2\n### Assistant:",
    ),
    ("qwen", [user("q1")], f"{QWEN}q1<|im_end|>\n<|im_start|>assistant\n"),
    (
        "qwen",
        [user("q1"), ANSWER, SECOND],
        f"{QWEN}q1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
    ),
    ("llava-chatml", [FIRST], f"{CHATML}{T}\nq1<|im_end|><|im_start|>assistant\n"),
    (
        "llava-chatml",
        [FIRST, ANSWER, SECOND],
        f"{CHATML}{T}\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
        "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\n",
    ),
    ("mistral", [FIRST], f"[INST] {T}\nq1 [/INST]"),
    ("mistral", [FIRST, ANSWER, SECOND], f"[INST] {T}\nq1 [/INST]a1</s>[INST] q2 [/INST]"),
]


@pytest.mark.parametrize(("name", "turns", "prompt"), WORKED)
def test_worked_examples(name: str, turns: list[Turn], prompt: str) -> None:
    assert shown(name, *turns) == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_that_ends_with_the_assistant_is_left_open(name: str) -> None:
    parts = TEMPLATES[name]
    whole = shown(name, FIRST, ANSWER, SECOND)
    open_ended = shown(name, FIRST, ANSWER)
    assert open_ended.endswith(f"q1{parts.eoh}{parts.assistant}a1")
    assert whole.startswith(open_ended + parts.eoa + parts.separator)


def test_a_system_message_replaces_the_default_and_only_that() -> None:
    prompt = shown("qwen", said("system", "Be brief."), user("q1"))
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq1")
    assert "helpful" not in prompt
    assert "helpful" not in shown("qwen", said("system", ""), user("q1"))


def test_without_a_default_there_is_no_system_block_and_an_empty_one_is_a_block() -> None:
    parts = TemplateParts("<sys>", None, "</sys>", "U:", "\n", "A:", "", "", (), strip_end=False)
    assert render(jinja_from_parts(parts, IMAGE), [user("q")]) == "U:q\nA:"
    given_one = [said("system", "s"), user("q")]
    assert render(jinja_from_parts(parts, IMAGE), given_one) == "<sys>s</sys>U:q\nA:"
    empty = TemplateParts("<sys>", "", "</sys>", "U:", "\n", "A:", "", "", (), strip_end=False)
    assert render(jinja_from_parts(empty, IMAGE), [user("q")]) == "<sys></sys>U:q\nA:"


def test_content_may_be_a_plain_string() -> None:
    source = jinja_from_parts(TEMPLATES["mistral"], IMAGE)
    assert render(source, [{"role": "user", "content": "q"}]) == "[INST] q [/INST]"


# --- any parts, any messages, against the layout written down plainly --------------------------

# What jinja itself could trip over, among ordinary text.
TEXT = st.text(max_size=12) | st.sampled_from(
    [
        "{{ x }}",
        "{% if %}",
        "{# c #}",
        '"',
        "'",
        "\\",
        "\\n",
        "\r\n",
        "\n",
        " ",
        "%}",
        "-%}",
        "\x00",
    ]
)
PARTS = st.builds(
    TemplateParts,
    *[TEXT, st.none() | TEXT, *[TEXT] * 6],
    stop_words=st.just(()),
    strip_end=st.booleans(),
)
TURNS = st.lists(
    st.one_of(
        st.builds(user, TEXT, st.integers(0, 2)),
        st.builds(said, st.sampled_from(["system", "assistant"]), TEXT),
    ),
    max_size=5,
)


def plainly(parts: TemplateParts, turns: Sequence[Turn]) -> str:
    """The layout of the interface's reference, without jinja."""
    around = {
        "system": (parts.system, parts.eosys),
        "user": (parts.user, parts.eoh),
        "assistant": (parts.assistant, parts.eoa + parts.separator),
    }
    prompt = ""
    if parts.meta_instruction is not None and not (turns and turns[0]["role"] == "system"):
        prompt = parts.system + parts.meta_instruction + parts.eosys
    for turn in turns:
        before, after = around[turn["role"]]
        images = sum(block["type"] == "image" for block in turn["content"])
        prompt += before + f"{IMAGE}\n" * images + turn["content"][-1]["text"] + after
    if turns and turns[-1]["role"] == "assistant":
        return prompt.removesuffix(around["assistant"][1])
    return prompt + (parts.assistant.rstrip() if parts.strip_end else parts.assistant)


@given(PARTS, TURNS)
def test_any_parts_and_messages_come_out_as_written(
    parts: TemplateParts, turns: list[Turn]
) -> None:
    assert render(jinja_from_parts(parts, IMAGE), turns) == plainly(parts, turns)


# --- equality with transformers ----------------------------------------------------------------

PUBLISHED = json.loads((HF / "checkpoint/chat_template.json").read_text())["chat_template"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    file = str(HF / "checkpoint/tokenizer.json")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=file, bos_token="<s>", eos_token="</s>"
    )


def original(
    tokenizer: PreTrainedTokenizerFast, source: str, turns: Sequence[Turn], generation: bool
) -> str:
    text = tokenizer.apply_chat_template(
        list(turns), chat_template=source, tokenize=False, add_generation_prompt=generation
    )
    assert isinstance(text, str)
    return text


def test_the_published_template_marks_the_assistants_words() -> None:
    assert "{% generation %}" in PUBLISHED


@given(TURNS.filter(bool), st.booleans())
def test_the_published_template_gives_what_transformers_gives(
    tokenizer: PreTrainedTokenizerFast, turns: list[Turn], generation: bool
) -> None:
    expected = original(tokenizer, PUBLISHED, turns, generation)
    assert render(PUBLISHED, turns, generation=generation) == expected


IDIOMS = [
    "{{ bos_token }}{% for m in messages %}\n  {% if loop.first %}\n{{ m.role }}\n{% endif %}\n"
    "{% endfor %}{{ eos_token }}\n",
    "{%- if tools is not none %}tools{% elif tools is defined %}none{% endif %}",
    "{%- if documents is not none %}documents{% endif %}{% if xtools is defined %}x{% endif %}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}"
    "{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}"
    "{% endfor %}",
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ messages[0] | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
    "{{ {'a': '<ü>&'} | tojson }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "{{ messages[-1]['content'][-1]['text'].strip().upper() }}",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(messages | length) }}",
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% else %}"
    "{% set loop_messages = messages %}{% endif %}{{ loop_messages | length }}",
    "{{ strftime_now('%Y') }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content[0].text }}"
    "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
    "{{ '<a href=\"x\">' }}{{ messages[0].content[-1].text | trim }}",
]


@pytest.mark.parametrize("source", IDIOMS)
def test_idioms_of_published_templates(tokenizer: PreTrainedTokenizerFast, source: str) -> None:
    turns = [said("system", "Be <b>brief</b>"), user(" q1 ü ", 1), said("assistant", "a1")]
    expected = original(tokenizer, source, turns, generation=True)
    assert render(source, turns, generation=True) == expected


# --- what a template may not do ----------------------------------------------------------------


def refusal(source: str, turns: Sequence[Turn] = (SECOND,)) -> PromptError:
    with pytest.raises(PromptError) as caught:
        render(source, list(turns))
    error = caught.value
    assert error.summary == "The chat template cannot render these messages."
    assert "ChatTemplateConfig(model_name=...)" in error.fix
    return error


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ (''|attr('__class__')) ~ '' }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__mro__}'.format_map({'0': ''}) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].pop('role') }}",
    "{% include '/etc/hostname' %}",
    "{% import '/etc/hostname' as x %}",
    "{% extends 'x' %}",
    "{{ range(1000000) | list }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(source: str) -> None:
    turns = [user("q", 1)]
    before = json.dumps(turns)
    try:
        assert render(source, turns) == ""  # an unsafe attribute alone is undefined: no text
    except PromptError as error:
        assert error.found.split(":")[0] in (
            *("SecurityError", "UndefinedError", "OverflowError", "IndexError", "TypeError"),
        )
    assert json.dumps(turns) == before


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_a_breach_of_the_sandbox_is_an_error(source: str) -> None:
    assert refusal(source).found.startswith("SecurityError")


@pytest.mark.parametrize("name", ["open", "os", "self.__init__", "environ", "__import__"])
def test_a_name_that_templates_do_not_have_cannot_be_called(name: str) -> None:
    refusal(f"{{{{ {name}('x') }}}}")


def test_a_template_refuses_messages_in_its_own_words() -> None:
    error = refusal("{{ raise_exception('Conversation roles must alternate') }}")
    assert error.found == "TemplateError: Conversation roles must alternate"
    assert "roles in an order that the template allows" in error.expected


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ x", "TemplateSyntaxError"),
        ("{% generation %}", "TemplateSyntaxError"),
        ("{{ x | no_such_filter }}", "TemplateAssertionError"),
        ("{{ messages[9].role }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 'a'.index('b') }}", "ValueError"),
        ("{{ '{}'.format() }}", "IndexError"),
        ("{{ '{a}'.format() }}", "KeyError"),
        ("{{ ['a'] | join(1, 2, 3) }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a'.encode('no-such-codec') }}", "LookupError"),
        ("{{ 'abc' | map(attribute='x') | sum }}", "UndefinedError"),
    ],
)
def test_a_broken_template_is_a_typed_error(source: str, found: str) -> None:
    assert refusal(source).found.startswith(found)
