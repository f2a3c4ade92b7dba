"""The manifest (`engine.json`): the one typed thing that flows from the builder to the runtime.

The runtime branches on the policies named here and never on a model's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from vlmforge.engine.image_policy import ImagePolicy
from vlmforge.engine.positions import PositionPolicy
from vlmforge.engine.regular_file import read_regular
from vlmforge.engine.schema import data_json, from_json, parse_json, to_data
from vlmforge.errors import EngineFormatError, EngineIntegrityError

SCHEMA_VERSION = 2
"""What build-engine writes.

1 is read too: it differs in having no digest, so that nothing tells if its values were changed.
"""
MANIFEST_FILE = "engine.json"

_WITHOUT_DIGEST = 1
_READ = (_WITHOUT_DIGEST, SCHEMA_VERSION)
_DIGEST = "digest"
_MOST_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a part. A string in `shape` is a symbolic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the engine: path relative to `engine.json`, size in bytes, sha256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class DimRange:
    """Least, usual and most of a symbolic dimension."""

    least: int
    usual: int
    most: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Ranges of all symbolic dimensions that a part was compiled for, and what it is for."""

    name: str
    dims: Mapping[str, DimRange]


@dataclass(frozen=True, slots=True)
class Part:
    """One compiled graph.

    Attributes:
        name: "vision" or "decoder".
        file: What the backend loads.
        data: Files beside it that belong to it.
        inputs, outputs: Its interface.
        weight_bytes: Bytes of its weights in files.
        loaded_bytes: Bytes of its weights in memory.
        profiles: Shapes that it was compiled for, in order; empty: any.
        layers: File of its layer report (`layer_report`), or None.
        aliases: Outputs that are written where an input is, by the input's name.
    """

    name: str
    file: str
    data: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weight_bytes: int
    loaded_bytes: int
    profiles: tuple[Profile, ...]
    layers: str | None
    aliases: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TemplateParts:
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
    stop_words: tuple[str, ...]
    strip_end: bool


@dataclass(frozen=True, slots=True)
class ImageSpelling:
    """How the image splice "named_span" writes an image.

    `{begin}{name}{end}` in text; in ids the begin token, the bytes of the name as ids, padding with
    the policy's `image_token_id` up to the image's length, and the end token.

    Attributes:
        begin, end: Texts of the tokens around the name.
        begin_id, end_id: Their ids.
        max_name_bytes: The longest name; a longer path is refused.
        stand_in: The name of an image that has none, such as one given as bytes.
    """

    begin: str
    end: str
    begin_id: int
    end_id: int
    max_name_bytes: int
    stand_in: str


@dataclass(frozen=True, slots=True)
class PromptPolicy:
    """How messages become token ids and image spans.

    Attributes:
        template_name: Name of the template frozen into `chat_template.jinja`.
        template_file: Path of that file.
        stop_words: Stop words of the frozen template; they stop generation beside the eos ids.
        templates: Named alternatives that `ChatTemplateConfig(model_name=...)` selects.
        image_placeholder: What the template writes where an image goes.
        image_splice: "inline_token": the placeholder is a token of the tokenizer, the text is
            encoded as a whole. "split_text": the text is split at the placeholder and each chunk
            is encoded alone. "named_span": as "split_text", and an image is written as `spelling`
            says.
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
        spelling: How "named_span" writes images; None for the others.
        history_window: The oldest turns are left out until fewer tokens than this come before
            the content of the last user message; None leaves nothing out.
        box_format: How the boxes in an answer are written (`vlmforge.vl.boxes`), or None.
    """

    template_name: str
    template_file: str
    stop_words: tuple[str, ...]
    templates: Mapping[str, TemplateParts]
    image_placeholder: str
    image_splice: str
    image_token_id: int
    bos_id: int | None
    bos_token: str
    eos_token: str
    image_line: str
    text_separator: str
    content_tokens: tuple[str, ...] | None
    spelling: ImageSpelling | None
    history_window: int | None
    box_format: str | None


@dataclass(frozen=True, slots=True)
class DecodePolicy:
    """Facts of the decoder that generation needs. Ids >= `vocab_size` index image features.

    `tokens_per_image` is what every image takes, or, with a tiling in the image policy, the most
    that one takes.
    """

    vocab_size: int
    hidden_size: int
    eos_ids: tuple[int, ...]
    tokens_per_image: int
    session_len: int
    max_batch_size: int
    positions: PositionPolicy


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Key/value cache, per layer two tensors.

    They are `[sequences, kv_heads, tokens, head_dim]`, or, with a `page_size`, pools of pages
    `[pages, kv_heads, page_size, head_dim]`.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    page_size: int | None

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes, all layers, keys and values."""
        itemsize = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}[self.dtype]
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Tensor parallelism that the parts were sharded for."""

    tp: int


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the engine comes from. `built_at` is the only field that differs between two builds.

    (And so does the digest, which is of this field too.)
    """

    built_at: str
    source: str
    source_fingerprint: str
    recipe: str
    architecture: str
    options: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that the runtime knows of an engine.

    `dtype` is how weights are stored, but for those of the decoder that `quantisation`, "int8" or
    "int4", is of; `compute_dtype` is what the backend calculates in.
    """

    schema_version: int
    backend: str
    dtype: str
    quantisation: str | None
    compute_dtype: str
    parts: tuple[Part, ...]
    image: ImagePolicy
    prompt: PromptPolicy
    decode: DecodePolicy
    kv: KVLayout
    parallel: ParallelLayout
    tokenizer_file: str
    files: tuple[FileEntry, ...]
    provenance: Provenance

    def part(self, name: str) -> Part:
        """The part called `name` (EngineFormatError when there is none)."""
        for part in self.parts:
            if part.name == name:
                return part
        raise EngineFormatError(
            f"The engine has no part {name!r}.",
            found=", ".join(part.name for part in self.parts),
            expected=name,
            fix="rebuild the engine with build-engine",
        )


def manifest_digest(data: Mapping[str, object]) -> str:
    """sha256, in hex, of all values of a manifest but its digest, however they are laid out."""
    rest = {key: value for key, value in data.items() if key != _DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def dump_manifest(manifest: Manifest) -> str:
    """The text of `engine.json`, with a digest of all that it says."""
    data = cast("dict[str, object]", to_data(manifest))
    if manifest.schema_version > _WITHOUT_DIGEST:
        data[_DIGEST] = manifest_digest(data)
    return data_json(data)


def load_manifest(folder: Path) -> Manifest:
    """Read and check `engine.json` of an engine directory; its files are not looked at.

    Raises:
        EngineFormatError: no manifest, not JSON, another schema version, a key that is unknown,
            missing, twice there or of a wrong type, or a value out of range.
        EngineIntegrityError: its digest is not that of its values.
    """
    from vlmforge.engine.manifest_rules import check_manifest  # it needs the classes above

    path = folder / MANIFEST_FILE
    data = _read(folder, path)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(data, dict) or version not in _READ or type(version) is not int:
        raise EngineFormatError(
            f"{path} is of another schema version.",
            found=f"schema_version {version!r}"[:100],
            expected=" or ".join(f"schema_version {known}" for known in _READ),
            fix="rebuild the engine with the build-engine of this version",
        )
    if version > _WITHOUT_DIGEST:
        _check_digest(path, data)
    manifest = from_json(Manifest, data, MANIFEST_FILE)
    check_manifest(manifest)
    return manifest


def _read(folder: Path, path: Path) -> object:
    try:
        return parse_json(read_regular(path, _MOST_BYTES).decode("utf-8"))
    except OSError as error:
        raise EngineFormatError(
            f"{folder} is not an engine directory.",
            found=f"{path}: {error.strerror}",
            expected=f"a folder that build-engine wrote, with {MANIFEST_FILE}",
            fix=f"build-engine CHECKPOINT -o {folder}",
        ) from None
    except ValueError as error:  # of a path with NUL too
        raise EngineFormatError(
            f"{path} is not JSON.",
            found=str(error)[:200],
            expected="the manifest that build-engine wrote",
            fix="copy the engine again, or rebuild it with build-engine",
        ) from None


def _check_digest(path: Path, data: dict[str, object]) -> None:
    """Take the digest out of `data` and compare it with the rest."""
    stated, found = data.pop(_DIGEST, None), manifest_digest(data)
    if stated != found:
        raise EngineIntegrityError(
            f"{path} is not the manifest that was built.",
            found=f"values of the digest {found}",
            expected=f"digest {stated}"[:100] if stated else "a digest of them",
            fix="copy the engine again, or rebuild it: build-engine CHECKPOINT -o ENGINE --force",
        )
