"""Two ways in which an engine places images in its prompt, ready to render conversations."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from msgspec import structs
from tokenizers import Tokenizer

from conftest import DATA, HF, ORIGINAL
from sample_manifest import PROMPT, TEMPLATE
from vlmforge.engine.prompts import InlineToken, PromptPolicy, SplitText
from vlmforge.errors import PromptError
from vlmforge.inputs.messages import Conversation, Image, Message, Text
from vlmforge.inputs.render import RenderedPrompt, TextEncoder, marked_tokenizer_json, render_prompt
from vlmforge.inputs.template import jinja_from_parts
from vlmforge.inputs.template_choice import ActiveTemplate
from vlmforge.inputs.tokenizer import TextTokenizer

PHOTO = Image(DATA / "images/photo_640x480.png")
MARK, TYPED = "\ue0f1\ue0f2\ue0f3", "\ue0f4\ue0f5\ue0f6"


class SentencePieceEncoder:
    """What the original Llama tokenizer (legacy=False) does, written on sentencepiece."""

    def __init__(self, model: Path) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self._specials = {"<unk>": 0, "<s>": 1, "</s>": 2}

    def encode(self, text: str) -> list[int]:
        if not text:
            return []
        first, *rest = self._split("▁" + text)
        ids = [] if first == "▁" and rest else self._piece(first)
        for part in rest:
            ids += self._piece(part)
        return ids

    def _split(self, text: str) -> list[str]:
        for special in self._specials:
            text = text.replace(special, f"\0{special}\0")
        return [part for part in text.split("\0") if part]

    def _piece(self, text: str) -> list[int]:
        if text in self._specials:
            return [self._specials[text]]
        # A known beginning, cut off again, keeps the model from putting a space before the text.
        beginning = self._model.encode("<unk>")
        return list(self._model.encode("<unk>" + text)[len(beginning) :])


@dataclasses.dataclass(frozen=True)
class Setup:
    policy: PromptPolicy
    template: ActiveTemplate
    encoder: TextEncoder
    length: int

    def render(
        self, *messages: Message, preprocess: bool = True, length: int | None = None
    ) -> RenderedPrompt:
        conversation = Conversation(messages)
        return render_prompt(
            conversation,
            policy=self.policy,
            template=self.template,
            encoder=self.encoder,
            layouts=[(self.length if length is None else length,)] * len(conversation.images),
            preprocess=preprocess,
        )

    def refusal(self, *messages: Message, preprocess: bool = True) -> PromptError:
        with pytest.raises(PromptError) as caught:
            self.render(*messages, preprocess=preprocess)
        return caught.value


HF_JSON = (HF / "checkpoint/tokenizer.json").read_text("utf-8")


@cache
def hf_setup() -> Setup:
    """The placeholder is a token of the tokenizer; 144 features for each image."""
    published = json.loads((HF / "checkpoint/chat_template.json").read_text("utf-8"))
    policy = structs.replace(PROMPT, splice=InlineToken(), image_token_id=640)
    return Setup(
        policy,
        ActiveTemplate("published", published["chat_template"], ()),
        TextTokenizer(marked_tokenizer_json(HF_JSON, policy)),
        144,
    )


@cache
def original_setup() -> Setup:
    """The text is split at the placeholder; one -200 for each image, as the goldens have it."""
    system = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions."
    )
    parts = structs.replace(TEMPLATE, meta_instruction=system)
    policy = structs.replace(PROMPT, splice=SplitText(), image_token_id=-200)
    return Setup(
        policy,
        ActiveTemplate("parts", jinja_from_parts(parts, policy.image_placeholder), ()),
        SentencePieceEncoder(ORIGINAL / "checkpoint/tokenizer.model"),
        1,
    )


def user(*blocks: str | Image) -> Message:
    texts = (Text(block) if isinstance(block, str) else block for block in blocks)
    return Message("user", tuple(texts))


def assistant(text: str) -> Message:
    return Message("assistant", (Text(text),))


def plain_ids(text: str, policy: PromptPolicy) -> list[int]:
    """Ids of the published tokenizer without its placeholder's token: all is ordinary text."""
    data = json.loads(HF_JSON)
    added = data["added_tokens"]
    data["added_tokens"] = [t for t in added if t["content"] != policy.image_placeholder]
    return list(Tokenizer.from_str(json.dumps(data)).encode(text).ids)
