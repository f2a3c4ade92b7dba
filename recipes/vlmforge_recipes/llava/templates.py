"""Chat templates of the family, and the names under which users choose them.

Sources: `llava/conversation.py` of the original repository (llava_v1, vicuna_v1) and the chat
template published with llava-hf/llava-1.5-7b-hf.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlmforge.manifest import TemplateParts

PLACEHOLDER = "<image>"


def _vicuna_like(person: str) -> TemplateParts:
    return TemplateParts(
        system="",
        meta_instruction=f"A chat between a curious {person} and an artificial intelligence "
        "assistant. The assistant gives helpful, detailed, and polite answers to the "
        f"{person}'s questions.",
        eosys=" ",
        user="USER: ",
        eoh=" ",
        assistant="ASSISTANT: ",
        eoa="</s>",
        separator="",
        stop_words=(),
        strip_end=True,
    )


TEMPLATES: Mapping[str, TemplateParts] = {
    "llava-v1": _vicuna_like("human"),
    "vicuna": _vicuna_like("user"),
}

# For a checkpoint in the llava-hf layout that comes without its chat template.
PUBLISHED_HF_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
