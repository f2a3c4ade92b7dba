"""ChatML (https://github.com/openai/openai-python/blob/v0.28.1/chatml.md), as template parts."""

from __future__ import annotations

from vlmforge.engine.prompts import TemplateParts


def chatml(instruction: str | None) -> TemplateParts:
    """The parts as LMDeploy has them, with the system message of conversations that have none."""
    return TemplateParts(
        system="<|im_start|>system\n",
        meta_instruction=instruction,
        eosys="<|im_end|>\n",
        user="<|im_start|>user\n",
        eoh="<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        eoa="<|im_end|>",
        separator="\n",
        stop_words=("<|im_end|>",),
        strip_end=False,
    )
