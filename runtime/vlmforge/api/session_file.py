"""A session as plain data: turns, images by content, and what the caches have of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from vlmforge.api.array_file import Arrays, damaged, read_arrays, write_arrays
from vlmforge.api.session_cache import Kept
from vlmforge.api.turn import Turn
from vlmforge.engine.images.patches import PixelCount
from vlmforge.engine.images.pixels import PixelRange
from vlmforge.engine.schema import from_json, parse_json, to_json
from vlmforge.errors import EngineFormatError, ImageError, SessionError
from vlmforge.inputs.image_names import given_name
from vlmforge.inputs.messages import ROLES, Image, Message, Text
from vlmforge.outputs.response import FinishReason, Response
from vlmforge.vl.boxes import Box
from vlmforge.vl.image_limits import ImageLimits
from vlmforge.vl.load import OpenedImage, open_image, reopen
from vlmforge.vl.stored import Pixels, StoredImage

VERSION = 1


class Saved(Struct, frozen=True):
    """What a session's file holds.

    Attributes:
        engine: Digest of the engine that answered; None: there was none.
        opening: Messages in front of the first turn.
        turns: In order.
        kept: What the engine's caches have of them; None: nothing.
    """

    engine: str | None
    opening: tuple[Message, ...]
    turns: tuple[Turn, ...]
    kept: Kept | None


class _Block(Struct, frozen=True):
    """A text, or the number of an image, the name that it was given by, and its limits."""

    text: str | None
    image: int | None
    name: str | None
    min_pixels: PixelCount | None = None
    max_pixels: PixelCount | None = None


class _Message(Struct, frozen=True):
    role: str
    blocks: tuple[_Block, ...]


class _Response(Struct, frozen=True):
    text: str
    token_ids: tuple[int, ...]
    generate_token_len: int
    input_token_len: int
    cached_tokens: int
    finish_reason: str | None
    boxes: tuple[Box, ...]


class _Turn(Struct, frozen=True):
    form: str  # of the prompt: "text", "tuple" or "messages"
    messages: tuple[_Message, ...]
    do_preprocess: bool
    salt: str
    response: _Response


class _Image(Struct, frozen=True):
    orientation: int
    pixels: Pixels | None


class _Kept(Struct, frozen=True):
    pixels: str
    salt: str
    rows: tuple[str, ...]
    features: tuple[str, ...]


class _Record(Struct, frozen=True):
    version: int
    engine: str | None
    opening: tuple[_Message, ...]
    turns: tuple[_Turn, ...]
    images: tuple[_Image, ...]
    kept: _Kept | None


class _Images(Struct):
    """The images of a session, each once."""

    stored: list[StoredImage] = field(default_factory=list)
    numbers: dict[bytes, int] = field(default_factory=dict)

    def number(self, image: Image) -> int:
        opened = image.source
        if not isinstance(opened, OpenedImage):
            opened = open_image(cast("Any", opened))
        if opened.digest not in self.numbers:
            self.numbers[opened.digest] = len(self.stored)
            self.stored.append(opened.stored())
        return self.numbers[opened.digest]


def write_session(path: Path, saved: Saved) -> None:
    """Write a session; whole or not at all (SessionError: it cannot be written)."""
    images, arrays = _Images(), dict[str, NDArray[Any]]()
    opening = tuple(_message(message, images) for message in saved.opening)
    turns = tuple(_turn(turn, images) for turn in saved.turns)
    for number, image in enumerate(images.stored):
        arrays[f"image.{number}"] = np.frombuffer(image.data, np.uint8)
        arrays[f"palette.{number}"] = np.frombuffer(image.palette, np.uint8)
    record = _Record(
        VERSION,
        saved.engine,
        opening,
        turns,
        tuple(_Image(image.orientation, image.pixels) for image in images.stored),
        None if saved.kept is None else _written(saved.kept, arrays),
    )
    write_arrays(path, to_json(record), arrays)


def read_session(path: Path, engine: str, limits: ImageLimits) -> Saved:
    """A saved session, its images opened.

    Raises:
        SessionError: it is not whole, or of another engine than that of the digest `engine`.
        ImageError: an image in it is not within `limits`.
    """
    text, arrays = read_arrays(path)
    try:
        data = parse_json(text)
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION or isinstance(version, bool):
            raise _other_version(path, version)
        record = from_json(_Record, data, "record")
    except (EngineFormatError, ValueError) as error:
        found = error.found if isinstance(error, EngineFormatError) else ""
        raise damaged(path, f"{error if not found else error.args[0]} {found}") from error
    if record.engine not in (None, engine):
        raise _other_engine(path, str(record.engine), engine)
    try:
        stored = [
            StoredImage(
                arrays[f"image.{number}"].tobytes(),
                arrays[f"palette.{number}"].tobytes(),
                image.orientation,
                image.pixels,
            )
            for number, image in enumerate(record.images)
        ]
        return Saved(
            record.engine,
            tuple(_read_message(message, stored, limits) for message in record.opening),
            tuple(_read_turn(turn, stored, limits) for turn in record.turns),
            None if record.kept is None else _read_kept(record.kept, arrays),
        )
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise damaged(path, f"{type(error).__name__}: {error}") from error


# --- there --------------------------------------------------------------------------------------


def _turn(turn: Turn, images: _Images) -> _Turn:
    answer = turn.response
    return _Turn(
        _form(turn.prompt),
        tuple(_message(message, images) for message in turn.messages),
        turn.do_preprocess,
        turn.salt.hex(),
        _Response(
            answer.text,
            tuple(map(int, answer.token_ids)),
            answer.generate_token_len,
            answer.input_token_len,
            answer.cached_tokens,
            answer.finish_reason,
            answer.boxes,
        ),
    )


def _form(prompt: object) -> str:
    if isinstance(prompt, str):
        return "text"
    return "tuple" if isinstance(prompt, tuple) else "messages"


def _message(message: Message, images: _Images) -> _Message:
    return _Message(message.role, tuple(_block(block, images) for block in message.blocks))


def _block(block: Text | Image, images: _Images) -> _Block:
    if isinstance(block, Text):
        return _Block(block.text, None, None)
    return _Block(None, images.number(block), given_name(block), *block.pixel_range)


def _written(kept: Kept, arrays: dict[str, NDArray[Any]]) -> _Kept:
    arrays["keys"] = kept.keys
    arrays.update({f"rows.{name}": array for name, array in kept.rows.items()})
    digests = tuple(digest.hex() for digest in kept.features)
    arrays.update({f"features.{digest.hex()}": rows for digest, rows in kept.features.items()})
    return _Kept(kept.pixels, kept.salt.hex(), tuple(kept.rows), digests)


# --- and back -----------------------------------------------------------------------------------


def _read_kept(kept: _Kept, arrays: Arrays) -> Kept:
    return Kept(
        kept.pixels,
        arrays["keys"],
        bytes.fromhex(kept.salt),
        {name: arrays[f"rows.{name}"] for name in kept.rows},
        {bytes.fromhex(digest): arrays[f"features.{digest}"] for digest in kept.features},
    )


def _read_turn(turn: _Turn, images: Sequence[StoredImage], limits: ImageLimits) -> Turn:
    messages = tuple(_read_message(message, images, limits) for message in turn.messages)
    asked, given = messages[:-1], turn.response
    if not asked or {message.role for message in messages} - set(ROLES):
        raise ValueError("a turn without a prompt, or with a role that is not known")
    if given.finish_reason not in (None, *get_args(FinishReason)):
        raise ValueError(f"finish_reason {given.finish_reason!r}")
    response = Response(
        given.text,
        given.generate_token_len,
        given.input_token_len,
        finish_reason=cast("FinishReason | None", given.finish_reason),
        token_ids=list(given.token_ids),
        cached_tokens=given.cached_tokens,
        boxes=given.boxes,
    )
    salt = bytes.fromhex(turn.salt)
    return Turn(_prompt(turn.form, asked), messages, turn.do_preprocess, salt, response)


def _read_message(message: _Message, images: Sequence[StoredImage], limits: ImageLimits) -> Message:
    return Message(
        message.role, tuple(_read_block(block, images, limits) for block in message.blocks)
    )


def _read_block(block: _Block, images: Sequence[StoredImage], limits: ImageLimits) -> Text | Image:
    if (block.text is None) == (block.image is None):
        raise ValueError("a part of a message that is neither a text nor an image, or both")
    if block.image is None:
        return Text(block.text or "")
    if block.image < 0:
        raise IndexError(f"image {block.image}")
    opened = reopen(images[block.image], name=block.name, limits=limits)
    asked = PixelRange(block.min_pixels, block.max_pixels)
    return Image(dataclasses.replace(opened, pixel_range=asked), block.name)


def _prompt(form: str, messages: Sequence[Message]) -> object:
    """A prompt that asks the same, in the form that it was given in."""
    if form == "text":
        return "".join(messages[0].texts)
    if form == "tuple":
        texts, images = messages[0].texts, [image.source for image in messages[0].images]
        shown = images[0] if len(images) == 1 else images
        text_first = isinstance(messages[0].blocks[0], Text)
        return (texts[0], shown) if text_first else (shown, texts[0])
    return [
        {"role": message.role, "content": [_part(block) for block in message.blocks]}
        for message in messages
    ]


def _part(block: Text | Image) -> Mapping[str, object]:
    if isinstance(block, Text):
        return {"type": "text", "text": block.text}
    return {"type": "image_data", "image_data": {"data": block.source}}


def _other_version(path: Path, version: object) -> SessionError:
    return SessionError(
        f"{path} is a session of another version.",
        found=f"version {version!r}"[:100],
        expected=f"version {VERSION}",
        fix="load it with the vlmforge that saved it",
    )


def _other_engine(path: Path, found: str, expected: str) -> SessionError:
    return SessionError(
        f"{path} was saved from another engine.",
        found=f"engine {found}"[:200],
        expected=f"engine {expected}, which this pipeline serves",
        fix="make the pipeline of the engine that the session was saved from: pipeline(ENGINE)",
    )
