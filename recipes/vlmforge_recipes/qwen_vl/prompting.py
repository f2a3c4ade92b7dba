"""How the family writes prompts: its special tokens, its template, its images, its boxes.

Sources: `tokenization_qwen.py` (`from_list_format`, special tokens) and `make_context` of
`qwen_generation_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlmforge.engine.prompts import NamedSpan, PromptPolicy, TemplateParts
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.tokenizer.byte_bpe import SpecialTokens, convert_byte_bpe, expect_ids
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer, convert_tokenizer
from vlmforge_recipes.chatml import chatml
from vlmforge_recipes.end_ids import generation_end_ids

DEFAULT = "qwen"
VOCABULARY = "qwen.tiktoken"
IMAGE_LINE = "Picture {n}: {image}\n"
# What the template writes for an image; users write the path between the two.
PLACEHOLDER = "<img></img>"

_CONTROL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
)
_MARKUP = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
_IMAGE = ("<img>", "</img>", "<imgpad>")
# `decode` of the original shows the markup of boxes; the rest is no text.
_SPECIALS = SpecialTokens(
    texts=(*_CONTROL, *_MARKUP, *_IMAGE),
    hidden=frozenset((*_CONTROL, *_IMAGE)),
    stops=("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
)
# In the text of a message the original knows the markup and the image's tokens. What is typed
# between <img> and </img> it opens; here that takes an image that comes with the text.
_CONTENT_TOKENS = (*_MARKUP, "</img>", "<imgpad>")
# The model looks for the end of the path in all but one of the 256 places, the tokenizer pads it.
_MAX_PATH_BYTES = 254
_STAND_IN = "image"

TEMPLATES: Mapping[str, TemplateParts] = {
    DEFAULT: chatml("You are a helpful assistant."),
}


def read_tokenizer(checkpoint: Path, visual: ConfigReader) -> ConvertedTokenizer:
    """The published vocabulary; a `tokenizer.json` where somebody has converted it already.

    Raises:
        TokenizerError: it cannot be converted, or its ids are not those that the model knows.
    """
    path = checkpoint / VOCABULARY
    found = convert_byte_bpe(path, _SPECIALS) if path.exists() else convert_tokenizer(checkpoint)
    start = visual.int("image_start_id", within=limits.TOKEN)
    expected = {text: start + i for i, text in enumerate(_IMAGE)}
    expect_ids(found, expected, visual.file)
    return found


def stop_ids(checkpoint: Path, tokenizer: ConvertedTokenizer) -> tuple[int, ...]:
    """Ids that end an answer: the chat's stop words, and the end of generation_config.json.

    Where that names none, or the original would never stop, the tokenizer's own end token.
    """
    ends = generation_end_ids(checkpoint) or tokenizer.eos_ids
    named = [tokenizer.token_id(text) for text in _SPECIALS.stops[1:]]
    known = [index for index in named if index is not None]
    return tuple(dict.fromkeys((*ends[:1], *known, *ends)))


def prompt_policy(
    checkpoint: Path, visual: ConfigReader, tokenizer: ConvertedTokenizer
) -> PromptPolicy:
    """The policy of the original's `chat`."""
    start = visual.int("image_start_id", within=limits.TOKEN)
    return PromptPolicy(
        template_name=DEFAULT,
        template_file="chat_template.jinja",
        stop_words=TEMPLATES[DEFAULT].stop_words,
        templates=TEMPLATES,
        image_placeholder=PLACEHOLDER,
        splice=NamedSpan("<img>", "</img>", start, start + 1, _MAX_PATH_BYTES, _STAND_IN),
        image_token_id=start + _IMAGE.index("<imgpad>"),
        bos_id=None,
        bos_token="",
        eos_token=tokenizer.eos_token,
        image_line=IMAGE_LINE,
        text_separator="",
        content_tokens=_CONTENT_TOKENS,
        history_window=_history_window(checkpoint, tokenizer),
        box_format="ref_box_1000",
    )


def _history_window(checkpoint: Path, tokenizer: ConvertedTokenizer) -> int:
    """`max_window_size`, in tokens before the text of the last question.

    The original counts up to the end of the last answer; the head of the question follows.
    """
    path = checkpoint / "generation_config.json"
    window = 6144
    if path.exists():
        window = read_config(path).int("max_window_size", window, within=limits.POSITIONS)
    head = tokenizer.encode("\n" + TEMPLATES[DEFAULT].user)
    return window + len(head)
