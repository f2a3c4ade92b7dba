"""The text of training conversations, exactly as the engine's prompts have it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vlmforge.evaluation.cases import training_conversation
from vlmforge.evaluation.questions import Turn
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge_recipes.llava.templates import PLACEHOLDER, TEMPLATES

_BOS = 1
_NO_LABEL = -100
_LINES = 6000


def corpus(seed: int) -> Iterator[str]:
    """What the tokenizer is trained on: conversations without their pictures."""
    parts = TEMPLATES["llava-v1"]
    for index in range(_LINES):
        _, turns = training_conversation(np.random.default_rng([seed, 2, index]), turns=3)
        # Rare lines make every word of the system prompt one piece.
        if index % 20 == 0:
            yield parts.meta_instruction or ""
        for turn in turns:
            yield f"{parts.user}{turn.question} {parts.assistant}{turn.answer}"


def conversation_ids(
    tokenizer: TextTokenizer, turns: Sequence[Turn], *, pictures: int, rows: int
) -> tuple[list[int], list[int], list[int]]:
    """A conversation as the decoder gets it, all pictures in its first turn.

    Returns:
        ids: Token ids; 0 at image rows.
        image: Row index over all pictures at each position, or -1.
        labels: The next token where it belongs to an answer (end token included), else -100.
    """
    text, answers = _write(turns, pictures)
    *before, last = text.split(PLACEHOLDER)
    ids = [_BOS]
    image = [-1]
    for index, chunk in enumerate(before):
        words = tokenizer.encode(chunk)
        ids += words + [0] * rows
        image += [-1] * len(words) + list(range(index * rows, (index + 1) * rows))
    cut, offset = len(text) - len(last), len(ids)
    ids += tokenizer.encode(last)
    image += [-1] * (len(ids) - offset)
    labels = [_NO_LABEL] * len(ids)
    for start, stop in answers:
        # Pieces never cross a space, so a prefix of the text has a prefix of the ids.
        first, end = (offset + len(tokenizer.encode(text[cut:at])) for at in (start, stop))
        labels[first - 1 : end - 1] = ids[first:end]
    return ids, image, labels


def _write(turns: Sequence[Turn], pictures: int) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where its answers begin and end."""
    parts = TEMPLATES["llava-v1"]
    text, answers = f"{parts.system}{parts.meta_instruction}{parts.eosys}", []
    for index, turn in enumerate(turns):
        places = "" if index else f"{PLACEHOLDER}\n" * pictures
        text += f"{parts.user}{places}{turn.question}{parts.eoh}{parts.assistant.rstrip()}"
        start = len(text)
        text += f" {turn.answer}{parts.eoa}{parts.separator}"
        answers.append((start, len(text)))
    return text, answers
