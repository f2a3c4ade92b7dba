"""From a conversation to the exact text, token ids and image spans that the decoder gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vlmforge.errors import PromptError
from vlmforge.manifest import PromptPolicy
from vlmforge.prompt.choice import ActiveTemplate
from vlmforge.prompt.messages import Conversation, Image, Message
from vlmforge.prompt.template import render_template
from vlmforge.vl.constants import IMAGE_TOKEN

# Private-use characters: stand for an image, and for the placeholder typed as ordinary text. All
# six differ, so that a part of a mark beside a mark cannot be mistaken for one.
_MARK = "\ue0f1\ue0f2\ue0f3"
_TYPED = "\ue0f4\ue0f5\ue0f6"


class TextEncoder(Protocol):
    """Text to ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it recognised, none added."""


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where the features of image `image` go: `ids[start : start + length]`."""

    start: int
    length: int
    image: int


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """What the decoder will get.

    Attributes:
        text: The prompt's text, the family's placeholder where an image goes.
        token_ids: Ids with images expanded; `image_token_id` of the engine at their positions.
        image_spans: One for each image, in order.
    """

    text: str
    token_ids: tuple[int, ...]
    image_spans: tuple[ImageSpan, ...]

    @property
    def text_tokens(self) -> int:
        """Number of tokens that are text."""
        return len(self.token_ids) - self.image_tokens

    @property
    def image_tokens(self) -> int:
        """Number of tokens that are image features."""
        return sum(span.length for span in self.image_spans)


def marked_tokenizer_json(tokenizer_json: str, policy: PromptPolicy) -> str:
    """The tokenizer in which only our mark, never typed text, is the image placeholder's token."""
    if policy.image_splice != "inline_token":
        return tokenizer_json
    data = json.loads(tokenizer_json)
    for token in data["added_tokens"]:
        if token["content"] == policy.image_placeholder:
            token["content"] = _MARK
    vocab = data["model"].get("vocab")
    if isinstance(vocab, dict) and policy.image_placeholder in vocab:
        vocab[_MARK] = vocab.pop(policy.image_placeholder)
    return json.dumps(data, ensure_ascii=False)


def render_prompt(
    conversation: Conversation,
    *,
    policy: PromptPolicy,
    template: ActiveTemplate,
    encoder: TextEncoder,
    image_lengths: Sequence[int],
    preprocess: bool = True,
) -> RenderedPrompt:
    """Apply the template, place the images, tokenise.

    Args:
        conversation: Messages.
        policy: The engine's prompt policy.
        template: The template in use.
        encoder: Tokenizer made from `marked_tokenizer_json`.
        image_lengths: Tokens of each image.
        preprocess: False takes the text of the messages verbatim, without the template; images go
            where IMAGE_TOKEN or the family's placeholder is.

    Raises:
        PromptError: image tokens and images do not match, or the template refuses the messages.
    """
    if preprocess and not template.verbatim:
        marked = _apply(conversation, policy, template)
    else:
        marked = _verbatim(conversation, policy)
    chunks = marked.split(_MARK)
    images = len(conversation.images)
    if len(chunks) - 1 != images:
        raise _mismatch("The prompt", len(chunks) - 1, images, optional=False)
    text = policy.image_placeholder.join(chunks).replace(_TYPED, policy.image_placeholder)
    chunks = [chunk.replace(_TYPED, policy.image_placeholder) for chunk in chunks]
    pieces = _encode(chunks, policy, encoder)
    return _expand(text, pieces, policy, image_lengths)


def _mismatch(what: str, tokens: int, images: int, *, optional: bool) -> PromptError:
    """`optional`: without any image token, the images have a place too."""
    or_none = ", or none (then the images go before the text)" if optional else ""
    or_leave_out = ", or leave it out" if optional else ""
    return PromptError(
        f"{what} does not have one image token for each image.",
        found=f"{tokens} x {IMAGE_TOKEN} and {images} image{'' if images == 1 else 's'}",
        expected=f"{images} x {IMAGE_TOKEN}{or_none}",
        fix=f"put {IMAGE_TOKEN} into the text once for each image{or_leave_out}",
    )


def _apply(conversation: Conversation, policy: PromptPolicy, template: ActiveTemplate) -> str:
    messages = [_template_message(message, policy) for message in conversation.messages]
    last = conversation.messages[-1].role if conversation.messages else "user"
    text = render_template(
        template.jinja,
        messages,
        bos_token=policy.bos_token,
        eos_token=policy.eos_token,
        add_generation_prompt=last != "assistant",
    )
    return text.replace(policy.image_placeholder, _MARK)


def _template_message(message: Message, policy: PromptPolicy) -> dict[str, object]:
    images, texts = message.images, message.texts
    placed = _placed_text(message, policy)
    if placed is not None:
        return {"role": message.role, "content": [{"type": "text", "text": placed}]}
    content: list[dict[str, str]] = [{"type": "image"} for _ in images]
    if texts:
        content.append({"type": "text", "text": _escape("\n".join(texts), policy)})
    return {"role": message.role, "content": content}


def _placed_text(message: Message, policy: PromptPolicy) -> str | None:
    """The message's text with images marked in place; None: the template puts them first."""
    images, texts = message.images, message.texts
    tokens = sum(text.count(IMAGE_TOKEN) for text in texts)
    if tokens:
        if tokens != len(images):
            raise _mismatch("A message", tokens, len(images), optional=True)
        return _escape("\n".join(texts), policy).replace(IMAGE_TOKEN, _MARK)
    if not images:
        return None
    # The family's own placeholder, once for each image, is how its users place images by hand.
    if sum(text.count(policy.image_placeholder) for text in texts) == len(images):
        _refuse_marks("".join(texts))
        return "\n".join(texts).replace(policy.image_placeholder, _MARK)
    if len(texts) > 1:
        blocks = message.blocks
        return "\n".join(
            _MARK if isinstance(block, Image) else _escape(block.text, policy) for block in blocks
        )
    return None


def _verbatim(conversation: Conversation, policy: PromptPolicy) -> str:
    text = "".join(text for message in conversation.messages for text in message.texts)
    _refuse_marks(text)
    text = text.replace(IMAGE_TOKEN, _MARK)
    return text.replace(policy.image_placeholder, _MARK) if conversation.images else text


def _escape(text: str, policy: PromptPolicy) -> str:
    _refuse_marks(text)
    return text.replace(policy.image_placeholder, _TYPED)


def _refuse_marks(text: str) -> None:
    if _MARK in text or _TYPED in text:
        raise PromptError(
            "The prompt contains a private-use sequence that vlmforge uses inside.",
            found=ascii(_MARK if _MARK in text else _TYPED),
            expected="text without it",
            fix="remove these characters",
        )


def _encode(chunks: Sequence[str], policy: PromptPolicy, encoder: TextEncoder) -> list[list[int]]:
    """Ids of the text between the images."""
    if policy.image_splice == "split_text":
        pieces = [encoder.encode(chunk) for chunk in chunks]
    else:
        pieces = [[]]
        for token in encoder.encode(_MARK.join(chunks)):
            if token == policy.image_token_id:
                pieces.append([])
            else:
                pieces[-1].append(token)
    if policy.bos_id is not None and pieces[0][:1] != [policy.bos_id]:
        pieces[0].insert(0, policy.bos_id)
    return pieces


def _expand(
    text: str, pieces: Sequence[Sequence[int]], policy: PromptPolicy, lengths: Sequence[int]
) -> RenderedPrompt:
    ids = list(pieces[0])
    spans = []
    for image, (piece, length) in enumerate(zip(pieces[1:], lengths, strict=True)):
        spans.append(ImageSpan(len(ids), length, image))
        ids += [policy.image_token_id] * length
        ids += piece
    return RenderedPrompt(text, tuple(ids), tuple(spans))
