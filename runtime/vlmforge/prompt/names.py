"""What images are called in prompts that spell their names out."""

from __future__ import annotations

import os
import unicodedata

from vlmforge.manifest import PromptPolicy
from vlmforge.prompt.messages import Image


def given_name(image: Image) -> str | None:
    """The path or URL that an image was given by; None for one that was given otherwise."""
    if image.name is not None:
        return image.name
    source = image.source
    if isinstance(source, str):
        return None if source[:5].lower() == "data:" else source
    return os.fspath(source) if isinstance(source, os.PathLike) else None


def spelled_name(policy: PromptPolicy, image: Image, typed: str | None) -> str:
    """The name in the prompt: what the user typed there, the path or URL, or the stand-in.

    The stand-in is for images without a name, and for names that are too long or cannot be written.
    "" where the policy spells no names.
    """
    spelling = policy.spelling
    if spelling is None:
        return ""
    name = given_name(image) if typed is None else typed
    if not name or spelling.end in name:
        return spelling.stand_in
    try:
        fits = len(_bytes(name)) <= spelling.max_name_bytes
    except UnicodeEncodeError:  # a file's name that is no text
        return spelling.stand_in
    return name if fits else spelling.stand_in


def name_ids(name: str, length: int, policy: PromptPolicy) -> list[int]:
    """What stands at the positions of an image: its name's bytes, padded to `length` ids."""
    spelled = list(_bytes(name)) if policy.spelling is not None else []
    return spelled + [policy.image_token_id] * (length - len(spelled))


def _bytes(name: str) -> bytes:
    return unicodedata.normalize("NFC", name).encode("utf-8")
