"""Chat templates of the family, and the names under which users choose them."""

from __future__ import annotations

from collections.abc import Mapping

from vlmforge.engine.prompts import TemplateParts

PLACEHOLDER = "<image_placeholder>"
DEFAULT = "mm_default"

_SYSTEM = (
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI "
    "assistant. Read all the images carefully, and respond to the human's questions with "
    "informative, helpful, detailed and polite answers. "
    "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
    "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
)

TEMPLATES: Mapping[str, TemplateParts] = {
    # What the model was trained with: `conv_templates["mm_default"]` of `llava/conversation.py`,
    # which writes "system\n\n### Role: text\n### Role: text\n### ".
    DEFAULT: TemplateParts(
        system="",
        meta_instruction=_SYSTEM,
        eosys="\n\n### ",
        user="Human: ",
        eoh="\n### ",
        assistant="Assistant: ",
        eoa="\n### ",
        separator="",
        stop_words=("###",),
        strip_end=True,
    ),
    # LMDeploy's parts. They differ where an earlier answer is repeated (no space before it) and
    # where a system message is given (it is followed by "### " without a line break).
    "yi-vl": TemplateParts(
        system="",
        meta_instruction=f"{_SYSTEM}\n\n",
        eosys="",
        user="### Human: ",
        eoh="\n",
        assistant="### Assistant:",
        eoa="\n",
        separator="",
        stop_words=("###",),
        strip_end=False,
    ),
}
