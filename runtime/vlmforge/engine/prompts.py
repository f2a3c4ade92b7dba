"""Prompt policies: how messages become token ids, and where in them images go.

What differs between families is how an image is spliced into the text: a tagged union. What a
splice answers stands in `_Placeholder`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from msgspec import Struct
from typing_extensions import override

from vlmforge.engine.fields import Count, FilePath, Name, TokenCount, TokenId
from vlmforge.field_rules import Int


class TemplateParts(Struct, frozen=True):
    """A chat template by its parts, in the layout of `ChatTemplateConfig`.

    `{system}{meta_instruction}{eosys}{user}{q}{eoh}{assistant}{a}{eoa}{separator}{user}...`
    `meta_instruction=None` leaves the whole system block out. `strip_end` removes trailing white
    space from the end of the prompt.
    """

    system: str
    meta_instruction: str | None
    eosys: str
    user: str
    eoh: str
    assistant: str
    eoa: str
    separator: str
    stop_words: tuple[Name, ...]
    strip_end: bool


class _Placeholder:
    """What a splice answers if an image is its placeholder and nothing else."""

    @property
    def whole(self) -> bool:
        """Whether the text around images is encoded as a whole, the placeholder as a token."""
        return False

    @property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids before an image's, and behind them."""
        return (), ()

    def written(self, name: str, placeholder: str) -> str:
        """An image in the prompt's text."""
        del name
        return placeholder

    def pattern(self, placeholder: str) -> re.Pattern[str]:
        """What users write where an image goes; its group, if it has one, is the image's name."""
        return re.compile(re.escape(placeholder))

    def name_ids(self, name: str) -> list[int]:
        """What stands first at the positions of an image."""
        del name
        return []


class InlineToken(_Placeholder, Struct, frozen=True):
    """The placeholder is a token of the tokenizer; the text is encoded as a whole."""

    name: Literal["inline_token"] = "inline_token"

    @property
    @override
    def whole(self) -> bool:
        return True


class SplitText(_Placeholder, Struct, frozen=True):
    """The text is split at the placeholders, and each chunk is encoded alone."""

    name: Literal["split_text"] = "split_text"


class NamedSpan(_Placeholder, Struct, frozen=True):
    """As `SplitText`, and an image is written with its name, `{begin}{name}{end}`.

    In ids: the begin token, the bytes of the name as ids, padding with the policy's
    `image_token_id` up to the image's length, and the end token.

    Attributes:
        begin, end: Texts of the tokens around the name.
        begin_id, end_id: Their ids.
        max_name_bytes: The longest name; a longer path is refused.
        stand_in: The name of an image that has none, such as one given as bytes.
    """

    begin: Name
    end: Name
    begin_id: TokenId
    end_id: TokenId
    max_name_bytes: Count
    stand_in: Name
    name: Literal["named_span"] = "named_span"

    @property
    @override
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.begin_id,), (self.end_id,)

    @override
    def written(self, name: str, placeholder: str) -> str:
        return f"{self.begin}{name}{self.end}"

    @override
    def pattern(self, placeholder: str) -> re.Pattern[str]:
        return re.compile(f"{re.escape(self.begin)}(.*?){re.escape(self.end)}", re.DOTALL)

    @override
    def name_ids(self, name: str) -> list[int]:
        return list(self.name_bytes(name))

    def name_bytes(self, name: str) -> bytes:
        """The bytes of a name, as its ids (UnicodeEncodeError: it is no text)."""
        return unicodedata.normalize("NFC", name).encode("utf-8")


Splice: TypeAlias = InlineToken | SplitText | NamedSpan


class PromptPolicy(Struct, frozen=True):
    """How messages become token ids and image spans.

    Attributes:
        template_name: Name of the template frozen into `chat_template.jinja`.
        template_file: Path of that file.
        stop_words: Stop words of the frozen template; they stop generation beside the eos ids.
        templates: Named alternatives that `ChatTemplateConfig(model_name=...)` selects.
        image_placeholder: What the template writes where an image goes.
        splice: How an image is written, and what that means for the ids of the text around it.
        image_token_id: Id of the placeholder's token; where the tokenizer has none, the id that
            the original implementation writes at an image.
        bos_id: Token put before the prompt, or None.
        bos_token, eos_token: Their texts, for templates that use them.
        image_line: What is written for an image that the user has not placed, before the text
            or between texts; `{image}` is the image and `{n}` its number in its message, from 1.
        text_separator: Put between the texts and image lines of a message.
        content_tokens: None: the prompt's text is encoded as a whole, special tokens in it
            recognised. Otherwise what the template writes and each message's content are encoded
            apart, and in a content only these special tokens are recognised.
        history_window: The oldest turns are left out until fewer tokens than this come before
            the content of the last user message; None leaves nothing out.
        box_format: How the boxes in an answer are written (`vlmforge.vl.boxes`), or None.
        in_order: The frozen template is given the texts and images of a message as blocks, in the
            order of the message, and writes them so. False: it may put images first, so that those
            with a place are written into the text before.
        image_around: Texts that the family has around every image; what users place with
            IMAGE_TOKEN gets them, unless they are there.
    """

    template_name: Name
    template_file: FilePath
    stop_words: tuple[Name, ...]
    templates: Mapping[str, TemplateParts]
    image_placeholder: Name
    splice: Splice
    image_token_id: Annotated[int, Int(-(1 << 31), (1 << 31) - 1)]  # some are negative
    bos_id: TokenId | None
    bos_token: str
    eos_token: str
    image_line: str
    text_separator: str
    content_tokens: tuple[Name, ...] | None
    history_window: TokenCount | None
    box_format: Name | None
    in_order: bool = False
    image_around: tuple[str, str] = ("", "")
