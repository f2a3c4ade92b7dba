"""The chat template that a checkpoint must bring along."""

from __future__ import annotations

from pathlib import Path

from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint.chat_template import read_chat_template
from vlmforge_builder.recipe import ChatTemplate


def own_template(checkpoint: Path) -> ChatTemplate:
    """The checkpoint's own template (CheckpointError: it has none)."""
    if (text := read_chat_template(checkpoint)) is None:
        raise CheckpointError(
            f"{checkpoint} has no chat template.",
            found="none in processor_config.json, chat_template.json, chat_template.jinja and "
            "tokenizer_config.json",
            expected="the template that the model was trained with",
            fix="download chat_template.jinja from where the checkpoint was published",
        )
    return ChatTemplate("checkpoint", text, ())
