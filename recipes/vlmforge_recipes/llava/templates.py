"""Chat templates of the family, and the names under which users choose them.

Sources: `llava/conversation.py` of the original repository (llava_v1, vicuna_v1, mistral_instruct,
chatml_direct), LMDeploy's parts of the same names as here, and the chat template published with
llava-hf/llava-1.5-7b-hf.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlmforge.engine.prompts import TemplateParts
from vlmforge.inputs.template import jinja_from_parts
from vlmforge_builder.recipe import ChatTemplate
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer

PLACEHOLDER = "<image>"
_CHATML_END = "<|im_end|>"


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
    # The same text as `chatml_direct`.
    "llava-chatml": TemplateParts(
        system="<|im_start|>system\n",
        meta_instruction="Answer the questions.",
        eosys=_CHATML_END,
        user="<|im_start|>user\n",
        eoh=_CHATML_END,
        assistant="<|im_start|>assistant\n",
        eoa=_CHATML_END,
        separator="",
        stop_words=(),
        strip_end=False,
    ),
    # Differs from `mistral_instruct` where an earlier answer is repeated (no spaces around it) and
    # where a system message is given (it is written as it is, before the first turn).
    "mistral": TemplateParts(
        system="",
        meta_instruction=None,
        eosys="",
        user="[INST] ",
        eoh=" [/INST]",
        assistant="",
        eoa="</s>",
        separator="",
        stop_words=(),
        strip_end=False,
    ),
}

# A system message goes into the first turn, which parts cannot say.
MISTRAL_INSTRUCT = """\
{%- macro said(message) -%}
{%- for block in message.content if block.type == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for block in message.content if block.type == 'text' -%}{{ block.text }}{%- endfor -%}
{%- endmacro -%}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set state.system = '<<SYS>>\\n' + said(message) + '\\n<</SYS>>\\n\\n' -%}
{%- elif message.role == 'user' -%}
{{ '[INST] ' + state.system + said(message) + ' [/INST]' }}{%- set state.system = '' -%}
{%- else -%}
{{ ' ' + said(message) }}
{%- if not loop.last or add_generation_prompt -%}{{ ' </s>' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""


def original_template(kind: str, tokenizer: ConvertedTokenizer) -> ChatTemplate:
    """The conversation that the original code has for a checkpoint.

    The original goes by the folder's name; here the decoder's `model_type` and the tokenizer's end
    token tell the same.
    """
    if kind == "mistral":
        return ChatTemplate("mistral_instruct", MISTRAL_INSTRUCT, ())
    chatml = tokenizer.token_id(_CHATML_END) in tokenizer.eos_ids
    name = "llava-chatml" if chatml else "llava-v1"
    return ChatTemplate(name, jinja_from_parts(TEMPLATES[name], PLACEHOLDER), ())


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
