"""Every named chat template of every family, from messages to the prompt's text.

The worked examples are those of LMDeploy's interface (v0.4.2), whose names the templates have; its
own tests of them are at the end. `mm_default` and others that LMDeploy does not have are the
original implementation's.

A family adds its own by a row in `FAMILIES` and rows in `EXAMPLES`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from msgspec import structs

from sample_manifest import PROMPT
from vlmforge import ChatTemplateConfig
from vlmforge.engine.prompts import PromptPolicy, SplitText, TemplateParts
from vlmforge.inputs.messages import Image, Text, parse_prompt
from vlmforge.inputs.render import render_prompt
from vlmforge.inputs.template_choice import choose_template
from vlmforge.vl.constants import IMAGE_TOKEN
from vlmforge_recipes.llava import templates as llava
from vlmforge_recipes.qwen_vl import prompting as qwen_vl
from vlmforge_recipes.yi_vl import templates as yi_vl

FAMILIES: Mapping[str, tuple[Mapping[str, TemplateParts], str]] = {
    "llava": (llava.TEMPLATES, llava.PLACEHOLDER),
    "qwen_vl": (qwen_vl.TEMPLATES, qwen_vl.PLACEHOLDER),
    "yi_vl": (yi_vl.TEMPLATES, yi_vl.PLACEHOLDER),
}
# A family that writes more than its placeholder for an image: its line before the text.
LINES: Mapping[str, str] = {"qwen_vl": qwen_vl.IMAGE_LINE}
PICTURE = PIL.Image.new("RGB", (4, 4))
T = IMAGE_TOKEN

Message = dict[str, Any]


def user(text: str, images: int = 0) -> Message:
    pictures = [{"type": "image_url", "image_url": {"url": "xxx"}}] * images
    return {"role": "user", "content": [{"type": "text", "text": text}, *pictures]}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


CONVERSATIONS: Mapping[str, object] = {
    "text": "hi",
    "one image": ("q1", [PICTURE]),
    "two images": [user("q1", 2)],
    "placed": [user(f"q1{T}", 1)],
    "placed inside": [user(f"a {T} b {T} c", 2)],
    "two turns": [user("q1", 1), assistant("a1"), user("q2")],
    "images in both turns": [user("q1", 1), assistant("a1"), user("q2", 1)],
    "placed later": [user("q1"), assistant("a1"), user(f"q2 {T}?", 1)],
    "system": [system("SYS"), user("q1", 1)],
    "system, two turns": [system("SYS"), user("q1", 1), assistant("a1"), user("q2")],
}

SYS_H = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
SYS_U = SYS_H.replace("human", "user")
SYS_Y = (
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI "
    "assistant. Read all the images carefully, and respond to the human's questions with "
    "informative, helpful, detailed and polite answers. 这是一个好奇的人类和一个人工智能助手之间"
    "的对话。假设你扮演这个AI助手的角色。仔细阅读所有的图像，并对人类的问题做出信息丰富、"
    "有帮助、详细的和礼貌的回答。\n\n"
)


def _vicuna_like(person: str) -> dict[str, str]:
    return {
        "text": f"{person} USER: hi ASSISTANT:",
        "one image": f"{person} USER: {T}\nq1 ASSISTANT:",
        "two images": f"{person} USER: {T}\n{T}\nq1 ASSISTANT:",
        "placed": f"{person} USER: q1{T} ASSISTANT:",
        "placed inside": f"{person} USER: a {T} b {T} c ASSISTANT:",
        "two turns": f"{person} USER: {T}\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT:",
        "images in both turns": f"{person} USER: {T}\nq1 ASSISTANT: a1</s>USER: {T}\nq2 ASSISTANT:",
        "placed later": f"{person} USER: q1 ASSISTANT: a1</s>USER: q2 {T}? ASSISTANT:",
        "system": f"SYS USER: {T}\nq1 ASSISTANT:",
        "system, two turns": f"SYS USER: {T}\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT:",
    }


def _human_and_assistant(answer: str, after_system: str) -> dict[str, str]:
    """`answer`: how an earlier answer is written; `after_system`: what follows a given system."""
    end = "\n### Assistant:"
    turns = f"### Human: {T}\nq1{end}{answer}\n### Human: q2{end}"
    return {
        "text": f"{SYS_Y}### Human: hi{end}",
        "one image": f"{SYS_Y}### Human: {T}\nq1{end}",
        "two images": f"{SYS_Y}### Human: {T}\n{T}\nq1{end}",
        "placed": f"{SYS_Y}### Human: q1{T}{end}",
        "placed inside": f"{SYS_Y}### Human: a {T} b {T} c{end}",
        "two turns": f"{SYS_Y}{turns}",
        "images in both turns": f"{SYS_Y}{turns}".replace("q2", f"{T}\nq2"),
        "placed later": f"{SYS_Y}{turns}".replace(f"{T}\nq1", "q1").replace("q2", f"q2 {T}?"),
        "system": f"SYS{after_system}### Human: {T}\nq1{end}",
        "system, two turns": f"SYS{after_system}{turns}",
    }


def _numbered_chatml() -> dict[str, str]:
    """Of a family that numbers its images in each message."""
    ask, end = "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
    head = f"<|im_start|>system\nYou are a helpful assistant.{end}"
    one, other = f"Picture 1: {T}\n", f"Picture 2: {T}\n"

    def turns(first: str, second: str) -> str:
        return f"<|im_start|>user\n{first}{ask}a1{end}<|im_start|>user\n{second}{ask}"

    def given(system: str) -> str:
        return f"<|im_start|>system\n{system}{end}"

    return {
        "text": f"{head}<|im_start|>user\nhi{ask}",
        "one image": f"{head}<|im_start|>user\n{one}q1{ask}",
        "two images": f"{head}<|im_start|>user\n{one}{other}q1{ask}",
        "placed": f"{head}<|im_start|>user\nq1{T}{ask}",
        "placed inside": f"{head}<|im_start|>user\na {T} b {T} c{ask}",
        "two turns": head + turns(f"{one}q1", "q2"),
        "images in both turns": head + turns(f"{one}q1", f"{one}q2"),
        "placed later": head + turns("q1", f"q2 {T}?"),
        "system": f"{given('SYS')}<|im_start|>user\n{one}q1{ask}",
        "system, two turns": given("SYS") + turns(f"{one}q1", "q2"),
    }


def _chatml(system: str) -> str:
    return f"<|im_start|>system\n{system}<|im_end|><|im_start|>user\n"


def _llava_chatml() -> dict[str, str]:
    start, end = _chatml("Answer the questions."), "<|im_end|><|im_start|>assistant\n"
    turns = f"{T}\nq1{end}a1<|im_end|><|im_start|>user\nq2{end}"
    return {
        "text": f"{start}hi{end}",
        "one image": f"{start}{T}\nq1{end}",
        "two images": f"{start}{T}\n{T}\nq1{end}",
        "placed": f"{start}q1{T}{end}",
        "placed inside": f"{start}a {T} b {T} c{end}",
        "two turns": f"{start}{turns}",
        "images in both turns": f"{start}{turns}".replace("q2", f"{T}\nq2"),
        "placed later": f"{start}{turns}".replace(f"{T}\nq1", "q1").replace("q2", f"q2 {T}?"),
        "system": f"{_chatml('SYS')}{T}\nq1{end}",
        "system, two turns": f"{_chatml('SYS')}{turns}",
    }


def _mistral() -> dict[str, str]:
    turns = f"[INST] {T}\nq1 [/INST]a1</s>[INST] q2 [/INST]"
    return {
        "text": "[INST] hi [/INST]",
        "one image": f"[INST] {T}\nq1 [/INST]",
        "two images": f"[INST] {T}\n{T}\nq1 [/INST]",
        "placed": f"[INST] q1{T} [/INST]",
        "placed inside": f"[INST] a {T} b {T} c [/INST]",
        "two turns": turns,
        "images in both turns": turns.replace("q2", f"{T}\nq2"),
        "placed later": turns.replace(f"{T}\nq1", "q1").replace("q2", f"q2 {T}?"),
        "system": f"SYS[INST] {T}\nq1 [/INST]",
        "system, two turns": f"SYS{turns}",
    }


def _mistral_instruct() -> dict[str, str]:
    """The original's: spaces around an earlier answer, and the system message in the first turn."""
    asks = "[INST] <<SYS>>\nSYS\n<</SYS>>\n\n"
    rows = {name: row.replace("]a1<", "] a1 <") for name, row in _mistral().items()}
    system = {name: row.replace("SYS[INST] ", asks) for name, row in rows.items() if "SYS" in row}
    return rows | system


# (family, template): conversation -> prompt.
EXAMPLES: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("llava", "llava-v1"): _vicuna_like(SYS_H),
    ("llava", "vicuna"): _vicuna_like(SYS_U),
    ("llava", "llava-chatml"): _llava_chatml(),
    ("llava", "mistral"): _mistral(),
    ("qwen_vl", "qwen"): _numbered_chatml(),
    ("yi_vl", "yi-vl"): _human_and_assistant("a1", ""),
    ("yi_vl", "mm_default"): _human_and_assistant(" a1", "\n\n"),
}
ROWS = [(*key, name) for key, rows in EXAMPLES.items() for name in rows]


class _Characters:
    """Any encoder will do: only the text is looked at."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def policy_of(family: str) -> PromptPolicy:
    templates, placeholder = FAMILIES[family]
    return structs.replace(
        PROMPT,
        template_name=next(iter(templates)),
        templates=templates,
        image_placeholder=placeholder,
        splice=SplitText(),
        bos_id=None,
        image_line=LINES.get(family, PROMPT.image_line),
        text_separator="" if family in LINES else PROMPT.text_separator,
    )


def shown(family: str, config: ChatTemplateConfig, messages: object) -> str:
    """The prompt's text, with LMDeploy's image token where an image goes."""
    policy = policy_of(family)
    conversation = parse_prompt(messages)
    rendered = render_prompt(
        conversation,
        policy=policy,
        template=choose_template(policy, "not chosen", config),
        encoder=_Characters(),
        layouts=[(1,)] * len(conversation.images),
    )
    assert len(rendered.image_spans) == len(conversation.images)
    return rendered.text.replace(policy.image_placeholder, T)


def test_the_table_is_whole() -> None:
    llava_names = {name for family, name in EXAMPLES if family == "llava"}
    assert {"llava-v1", "vicuna"} <= llava_names
    for family, (templates, _) in FAMILIES.items():
        tested = {name for owner, name in EXAMPLES if owner == family}
        assert tested == set(templates)
    assert all(rows.keys() == CONVERSATIONS.keys() for rows in EXAMPLES.values())


def chosen(family: str, name: str) -> ChatTemplateConfig:
    """The config that asks for a template; the engine's own is asked for by its parts."""
    parts = FAMILIES[family][0][name]
    if name != policy_of(family).template_name:
        return ChatTemplateConfig(name)
    return ChatTemplateConfig(name, user=parts.user)


@pytest.mark.parametrize(("family", "name", "conversation"), ROWS)
def test_worked_examples(family: str, name: str, conversation: str) -> None:
    found = shown(family, chosen(family, name), CONVERSATIONS[conversation])
    assert found == EXAMPLES[family, name][conversation]


@pytest.mark.parametrize(("family", "name"), EXAMPLES)
def test_json_forms(family: str, name: str, tmp_path: Path) -> None:
    expected = EXAMPLES[family, name]["two turns"]
    text = chosen(family, name).to_json(tmp_path / "template.json")
    for form in (text, str(tmp_path / "template.json"), tmp_path / "template.json"):
        config = ChatTemplateConfig.from_json(form)
        assert shown(family, config, CONVERSATIONS["two turns"]) == expected
    # LMDeploy's own file has no more than the parts that differ.
    short = json.dumps({"model_name": name, "meta_instruction": "M", "eosys": "|"})
    found = shown(family, ChatTemplateConfig.from_json(short), CONVERSATIONS["two turns"])
    parts = FAMILIES[family][0][name]
    given = (parts.meta_instruction or "") + parts.eosys
    assert found == (expected.replace(given, "M|") if given else f"M|{expected}")


@pytest.mark.parametrize(("family", "name"), EXAMPLES)
def test_custom_parts(family: str, name: str) -> None:
    config = ChatTemplateConfig(
        *(name, "<s>", "Be brief.", "</s>", "<u>", "</u>", "<a>", "</a>", "|"),
        stop_words=["</a>"],
    )
    found = shown(family, config, CONVERSATIONS["two turns"])
    line = LINES.get(family, "{image}\n").replace("{n}", "1").replace("{image}", T)
    assert found == f"<s>Be brief.</s><u>{line}q1</u><a>a1</a>|<u>q2</u><a>"
    # An empty part replaces the template's, None keeps it.
    empty = ChatTemplateConfig(name, system="", meta_instruction="", eosys="")
    assert shown(family, empty, "hi").startswith(FAMILIES[family][0][name].user)
    policy = policy_of(family)
    assert choose_template(policy, "", config).stop_words == ("</a>",)
    assert choose_template(policy, "", empty).stop_words == (FAMILIES[family][0][name].stop_words)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_original_mistral_conversation(conversation: str) -> None:
    """`mistral_instruct` is no row of parts: its system message goes into the first turn."""
    policy = structs.replace(policy_of("llava"), template_name="mistral_instruct")
    messages = parse_prompt(CONVERSATIONS[conversation])
    rendered = render_prompt(
        messages,
        policy=policy,
        template=choose_template(policy, llava.MISTRAL_INSTRUCT, None),
        encoder=_Characters(),
        layouts=[(1,)] * len(messages.images),
    )
    found = rendered.text.replace(policy.image_placeholder, T)
    assert found == _mistral_instruct()[conversation]


# --- the peer's own tests ----------------------------------------------------------------------


def test_prompts_become_messages() -> None:
    (message,) = parse_prompt("hi").messages
    assert (message.role, message.blocks) == ("user", (Text("hi"),))
    (message,) = parse_prompt(("hi", [PICTURE])).messages
    assert message.role == "user"
    assert [type(block) for block in message.blocks] == [Image, Text]


def test_messages_become_the_peers_prompts() -> None:
    messages = [user("q1", 1)]
    config = chosen("llava", "llava-v1")
    prompt = shown("llava", config, messages)
    assert prompt.count(IMAGE_TOKEN) == 1
    assert prompt == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions. "
        "USER: <IMAGE_TOKEN>\nq1 ASSISTANT:"
    )
    messages += [{"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}]
    assert shown("llava", config, messages) == f"{prompt} a1</s>USER: q2 ASSISTANT:"


def test_the_peers_chatml_prompts() -> None:
    config = chosen("llava", "llava-chatml")
    messages = [user("q1", 1)]
    prompt = shown("llava", config, messages)
    assert prompt == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<IMAGE_TOKEN>\nq1"
        "<|im_end|><|im_start|>assistant\n"
    )
    messages += [{"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}]
    assert shown("llava", config, messages) == (
        f"{prompt}a1<|im_end|><|im_start|>user\nq2<|im_end|><|im_start|>assistant\n"
    )
