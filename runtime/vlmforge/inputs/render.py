"""From a conversation to the exact text, token ids and image spans that the decoder gets."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlmforge.engine.images.pixels import Layout
from vlmforge.engine.prompts import PromptPolicy
from vlmforge.errors import PromptError
from vlmforge.inputs import image_marks as marks
from vlmforge.inputs.content import string_roles
from vlmforge.inputs.image_marks import refuse_marks
from vlmforge.inputs.image_names import name_ids, refuse_spelled, spelled_name
from vlmforge.inputs.messages import Conversation, Image, Message, Text
from vlmforge.inputs.template import render_template
from vlmforge.inputs.template_choice import ActiveTemplate
from vlmforge.inputs.text_pieces import Encoded, TextEncoder, encode_chunks, without_borders
from vlmforge.inputs.tokenizer_file import parse_tokenizer
from vlmforge.vl.constants import IMAGE_TOKEN

__all__ = ["ImageSpan", "RenderedPrompt", "TextEncoder", "marked_tokenizer_json", "render_prompt"]


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where features of image `image` go: `ids[start : start + length]`, from its token `first`.

    `grid`: its tokens down and across, where positions ask for it.
    """

    start: int
    length: int
    image: int
    first: int = 0
    grid: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """What the decoder will get.

    Attributes:
        text: The prompt's text, the family's placeholder where an image goes.
        token_ids: Ids with images expanded; at their positions the engine's `image_token_id`, or
            what the original writes there.
        image_spans: In order; several for an image that has text among its tokens.
        content_starts: Where in `token_ids` the content of each message begins, a template's own
            system message included; empty unless contents are encoded apart.
        image_texts: For each image, where it is written in `text`: `text[start:end]`.
    """

    text: str
    token_ids: tuple[int, ...]
    image_spans: tuple[ImageSpan, ...]
    content_starts: tuple[int, ...] = ()
    image_texts: tuple[tuple[int, int], ...] = ()

    @property
    def text_tokens(self) -> int:
        """Number of tokens that are text."""
        return len(self.token_ids) - self.image_tokens

    @property
    def image_tokens(self) -> int:
        """Number of tokens that are image features."""
        return sum(span.length for span in self.image_spans)


def marked_tokenizer_json(tokenizer_json: str, policy: PromptPolicy) -> str:
    """The tokenizer in which only our mark, never typed text, is the image placeholder's token.

    Raises:
        EngineFormatError: it is no tokenizer.
    """
    if not policy.splice.whole:
        return tokenizer_json
    data = parse_tokenizer(tokenizer_json)
    for token in data["added_tokens"]:
        if token["content"] == policy.image_placeholder:
            token["content"] = marks.IMAGE
    vocab = data["model"].get("vocab")
    if isinstance(vocab, dict) and policy.image_placeholder in vocab:
        vocab[marks.IMAGE] = vocab.pop(policy.image_placeholder)
    return json.dumps(data, ensure_ascii=False)


def render_prompt(
    conversation: Conversation,
    *,
    policy: PromptPolicy,
    template: ActiveTemplate,
    encoder: TextEncoder,
    layouts: Sequence[Layout],
    preprocess: bool = True,
) -> RenderedPrompt:
    """Apply the template, place the images, tokenise.

    Args:
        conversation: Messages.
        policy: The engine's prompt policy.
        template: The template in use.
        encoder: Tokenizer made from `marked_tokenizer_json`.
        layouts: What stands for each image.
        preprocess: False takes the text of the messages verbatim, without the template; images go
            where IMAGE_TOKEN or the family's placeholder is.

    Raises:
        PromptError: image tokens and images do not match, an image's name cannot be spelled, or
            the template refuses the messages.
    """
    if preprocess and not template.verbatim:
        marked = _apply(conversation, policy, template)
    else:
        marked = _verbatim(conversation, policy)
    chunks, typed = _cut(marked)
    images = conversation.images
    if len(typed) != len(images):
        raise _mismatch("The prompt", len(typed), len(images), optional=False)
    names = [spelled_name(policy, *pair) for pair in zip(images, typed, strict=True)]
    chunks = [
        chunk.replace(marks.SEAM, "").replace(marks.TYPED, policy.image_placeholder)
        for chunk in chunks
    ]
    for chunk in chunks:
        refuse_spelled(chunk, policy)
    texts, runs = _laid_out(chunks, layouts)
    pieces = encode_chunks(texts, policy, encoder)
    return _expand(_text(chunks, names, policy), pieces, names, policy, runs)


def _cut(marked: str) -> tuple[list[str], list[str | None]]:
    """The text before, between and after the images, and the names that the user spelled."""
    first, *rest = marked.split(marks.IMAGE)
    chunks, names = [first], list[str | None]()
    for chunk in rest:
        name, named, text = chunk.partition(marks.NAMED)
        chunks.append(text if named else chunk)
        names.append(name if named else None)
    return chunks, names


def _laid_out(
    chunks: Sequence[str], layouts: Sequence[Layout]
) -> tuple[list[str], list[ImageSpan]]:
    """The text with that of the images, cut where tokens of images go; and these, not placed."""
    texts, runs = [chunks[0]], list[ImageSpan]()
    for image, (layout, chunk) in enumerate(zip(layouts, chunks[1:], strict=True)):
        first = 0
        for piece in layout:
            if isinstance(piece, str):
                texts[-1] += piece
            else:
                runs.append(ImageSpan(0, piece, image, first))
                texts.append("")
                first += piece
        texts[-1] += chunk
    return texts, runs


def _text(
    chunks: Sequence[str], names: Sequence[str], policy: PromptPolicy
) -> tuple[str, tuple[tuple[int, int], ...]]:
    text, places = without_borders(chunks[0]), list[tuple[int, int]]()
    for name, chunk in zip(names, chunks[1:], strict=True):
        written = policy.splice.written(name, policy.image_placeholder)
        places.append((len(text), len(text) + len(written)))
        text += written + without_borders(chunk)
    return text, tuple(places)


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
    strings = string_roles(template.jinja, policy.bos_token, policy.eos_token)
    messages = [
        _in_order(message, policy)
        if template.in_order and message.role not in strings
        else _template_message(message, policy, as_string=message.role in strings)
        for message in conversation.messages
    ]
    last = conversation.messages[-1].role if conversation.messages else "user"
    try:
        text = render_template(
            template.jinja,
            messages,
            bos_token=policy.bos_token,
            eos_token=policy.eos_token,
            add_generation_prompt=last != "assistant",
            content_marks=_borders(policy),
        )
    except PromptError as error:  # templates may quote what they were given
        error.found = marks.as_written(error.found, policy.image_placeholder)
        raise
    return text.replace(policy.image_placeholder, marks.IMAGE)


def _borders(policy: PromptPolicy) -> tuple[str, str]:
    """What goes around a content; templates that do not know of it leave out the images' lines."""
    return ("", "") if policy.content_tokens is None else (marks.OPEN, marks.CLOSE)


def _template_message(
    message: Message, policy: PromptPolicy, *, as_string: bool
) -> dict[str, object]:
    texts, (begin, end) = message.texts, _borders(policy)
    placed = _placed_text(message, policy)
    if as_string:
        if placed is None:
            placed = _interleaved(_images_first(message), policy)
        return {"role": message.role, "content": f"{begin}{placed}{end}"}
    if placed is not None:
        return {"role": message.role, "content": [_text_block(f"{begin}{placed}{end}")]}
    content: list[dict[str, str]] = [{"type": "image"} for _ in message.images]
    if texts:
        text = _escape(policy.text_separator.join(texts), policy)
        content.append(_text_block(f"{begin}{text}{end}"))
    return {"role": message.role, "content": content}


def _in_order(message: Message, policy: PromptPolicy) -> dict[str, object]:
    """The blocks as they stand; in a text with marks for images, these have their place there."""
    begin, end = _borders(policy)
    placed = _marked_text(message, policy)
    if placed is not None:
        placed = placed.replace(marks.IMAGE.join(policy.image_around), marks.IMAGE)
        texts: list[str | None] = [*placed.split(marks.IMAGE)]
        places = [piece for text in texts for piece in (text, None)][:-1]
    else:
        places = [
            _escape(block.text, policy) if isinstance(block, Text) else None
            for block in message.blocks
        ]
    content = [
        {"type": "image"} if piece is None else _text_block(f"{begin}{piece}{end}")
        for piece in _seamed(places, policy)
        if piece != "" or len(places) == 1
    ]
    return {"role": message.role, "content": content}


def _seamed(places: Sequence[str | None], policy: PromptPolicy) -> list[str | None]:
    """Texts, and None for an image: marked where two make a placeholder that neither has."""
    word, found, before = policy.image_placeholder, list[str | None](), ""
    for piece in places:
        if piece is None:
            before = ""
        elif word in before + piece:
            piece = before = f"{marks.SEAM}{piece}"
        else:
            before = (before + piece)[1 - len(word) :]
        found.append(piece)
    return found


def _text_block(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _placed_text(message: Message, policy: PromptPolicy) -> str | None:
    """The message's text with images marked in place; None: the template puts them first."""
    placed = _marked_text(message, policy)
    if placed is not None or not message.images:
        return placed
    return _interleaved(message, policy) if len(message.texts) > 1 else None


def _marked_text(message: Message, policy: PromptPolicy) -> str | None:
    """The same where the user has placed them in the text; None: he has not."""
    images, texts = message.images, message.texts
    joined = policy.text_separator.join(texts)
    tokens = sum(text.count(IMAGE_TOKEN) for text in texts)
    if tokens:
        if tokens != len(images):
            raise _mismatch("A message", tokens, len(images), optional=True)
        return _marked(_escape(joined, policy), policy)
    if not images:
        return None
    # The family's own placeholder, once for each image, is how its users place images by hand.
    if sum(len(_placeholder(policy).findall(text)) for text in texts) == len(images):
        refuse_marks(joined)
        return _mark_placeholders(joined, policy)
    return None


def _marked(text: str, policy: PromptPolicy) -> str:
    """The text with images where IMAGE_TOKEN is, and around them what the family writes there."""
    whole, text = marks.IMAGE.join(policy.image_around), text.replace(IMAGE_TOKEN, marks.IMAGE)
    return text.replace(whole, marks.IMAGE).replace(marks.IMAGE, whole)


def _images_first(message: Message) -> Message:
    texts = tuple(Text(text) for text in message.texts)
    return Message(message.role, (*message.images, *texts))


def _interleaved(message: Message, policy: PromptPolicy) -> str:
    parts, number = [], 0
    for block in message.blocks:
        if isinstance(block, Image):
            number += 1
            line = policy.image_line.replace("{n}", str(number))
            parts.append(line.replace("{image}", marks.IMAGE))
        else:
            parts.append(_escape(block.text, policy))
    return policy.text_separator.join(parts).replace(policy.image_placeholder, marks.TYPED)


def _placeholder(policy: PromptPolicy) -> re.Pattern[str]:
    """What an image looks like in the family's own prompts."""
    return policy.splice.pattern(policy.image_placeholder)


def _mark_placeholders(text: str, policy: PromptPolicy) -> str:
    return _placeholder(policy).sub(
        lambda found: f"{marks.IMAGE}{found[1]}{marks.NAMED}" if found.re.groups else marks.IMAGE,
        text,
    )


def _verbatim(conversation: Conversation, policy: PromptPolicy) -> str:
    text = "".join(text for message in conversation.messages for text in message.texts)
    refuse_marks(text)
    text = _marked(text, policy)
    return _mark_placeholders(text, policy) if conversation.images else text


def _escape(text: str, policy: PromptPolicy) -> str:
    refuse_marks(text)
    return text.replace(policy.image_placeholder, marks.TYPED)


def _expand(
    written: tuple[str, tuple[tuple[int, int], ...]],
    pieces: Sequence[Encoded],
    names: Sequence[str],
    policy: PromptPolicy,
    runs: Sequence[ImageSpan],
) -> RenderedPrompt:
    ids, spans, contents = list(pieces[0].ids), list[ImageSpan](), list(pieces[0].contents)
    before, behind = policy.splice.around
    for piece, run in zip(pieces[1:], runs, strict=True):
        ids += before
        spans.append(dataclasses.replace(run, start=len(ids)))
        ids += name_ids(names[run.image], run.length, policy)
        ids += behind
        contents += [len(ids) + start for start in piece.contents]
        ids += piece.ids
    text, places = written
    return RenderedPrompt(text, tuple(ids), tuple(spans), tuple(contents), places)
