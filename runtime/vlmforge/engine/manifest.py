"""The manifest (`engine.json`): the one typed thing that flows from the builder to the runtime.

The runtime calls the policies that stand here and never branches on a model's name, nor on a
policy's. A new field has a default, so that engines of before it load; where a layout changes, the
schema version goes up and `migration` reads the older ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from msgspec import Struct, structs
from typing_extensions import override

from vlmforge.engine.fields import (
    FLOATS,
    ByteCount,
    Count,
    DimSize,
    FilePath,
    FloatType,
    ImageTokens,
    Name,
    Sha256,
    TokenCount,
    TokenId,
)
from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.migration import SCHEMA_VERSION, upgraded
from vlmforge.engine.positions import PositionPolicy
from vlmforge.engine.prompts import PromptPolicy
from vlmforge.engine.regular_file import read_regular
from vlmforge.engine.schema import Agreeing, Elsewhere, data_json, from_json, parse_json, to_data
from vlmforge.engine.tensors import TensorSpec
from vlmforge.errors import EngineFormatError, EngineIntegrityError
from vlmforge.field_rules import Choice, Int

if TYPE_CHECKING:
    from vlmforge.engine.chain import PartChain
else:
    PartChain = Annotated[object, Elsewhere("vlmforge.engine.chain", "PartChain")]

MANIFEST_FILE = "engine.json"

_WITHOUT_DIGEST = 1
_READ = range(1, SCHEMA_VERSION + 1)
_DIGEST = "digest"
_MOST_BYTES = 1 << 24


class FileEntry(Struct, frozen=True):
    """A file of the engine: path relative to `engine.json`, size in bytes, sha256 in hex."""

    path: FilePath
    size: ByteCount
    sha256: Annotated[str, Sha256()]


class DimRange(Struct, frozen=True):
    """Least, usual and most of a symbolic dimension."""

    least: DimSize
    usual: DimSize
    most: DimSize


class Profile(Struct, frozen=True):
    """Ranges of all symbolic dimensions that a part was compiled for, and what it is for."""

    name: Name
    dims: Mapping[str, DimRange]


class Part(Agreeing, Struct, frozen=True):
    """One compiled graph, or a chain of them.

    Attributes:
        name: "vision", "decoder", or "decoder.rank1" and so on (`decoder_name`).
        file: What the backend loads; of a chain its first segment.
        data: Files beside it that belong to it.
        inputs, outputs: Its interface.
        weight_bytes: Bytes of its weights in files.
        loaded_bytes: Bytes of its weights in memory.
        profiles: Shapes that it was compiled for, in order; empty: any.
        layers: File of its layer report (`layer_report`), or None.
        aliases: Outputs that are written where an input is, by the input's name.
        rotary_tables: Names of its weights that are the cosines and sines of positions, where the
            backend can be given longer ones at load; None: they are compiled in, or not known.
        chain: How a part is run that is no single graph; None for the others.
    """

    name: Name
    file: FilePath
    data: tuple[FilePath, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weight_bytes: ByteCount
    loaded_bytes: ByteCount
    profiles: tuple[Profile, ...]
    layers: FilePath | None
    aliases: Mapping[str, Name]
    rotary_tables: tuple[Name, Name] | None = None
    chain: PartChain | None = None

    @override
    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.chain is None:
            return
        if not self.chain.files <= {self.file, *self.data}:
            yield "data", "all files of the chain"
        if missing := self.chain.missing(frozenset(spec.name for spec in self.inputs)):
            yield "chain", f"steps that take what there is, and not {min(missing)[:60]!r}"


class DecodePolicy(Struct, frozen=True):
    """Facts of the decoder that generation needs. Ids >= `vocab_size` index image features.

    `tokens_per_image` is what every image takes, or, where that depends on its size, the most that
    one takes. `session_len` is the window that it was built for. Each of the
    first `feature_layers` layers takes features of an image that are its own.
    """

    vocab_size: TokenCount
    hidden_size: Count
    eos_ids: tuple[TokenId, ...]
    tokens_per_image: ImageTokens
    session_len: TokenCount
    max_batch_size: Count
    positions: PositionPolicy
    feature_layers: Annotated[int, Int(1, 64)] = 1


class KVLayout(Struct, frozen=True):
    """Key/value cache, per layer two tensors.

    That of a manifest is the whole model's; what one rank holds of it is `Manifest.rank_kv`. They
    are `[sequences, kv_heads, tokens, head_dim]`, or, with a `page_size`, pools of pages `[pages,
    kv_heads, page_size, head_dim]`.
    """

    layers: Annotated[int, Int(1, 1 << 12)]
    kv_heads: Annotated[int, Int(1, 1 << 12)]
    head_dim: Annotated[int, Int(1, 1 << 14)]
    dtype: Annotated[str, Choice((*FLOATS, "float8_e4m3fn"))]
    page_size: Count | None

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes, all layers, keys and values."""
        itemsize = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}[self.dtype]
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


class ParallelLayout(Struct, frozen=True):
    """Tensor parallelism that the parts were sharded for.

    Attributes:
        tp: Ranks. All take the same inputs, and each has a decoder part of its own; the logits of
            all are the same. Where there are several, it is a chain with collectives in it, or one
            plan, which has them inside.
        kv_heads: Heads of keys and values that each rank's cache has; None: all of the model's.
            They are more than `KVLayout.kv_heads / tp` where ranks hold the same ones.
    """

    tp: Annotated[int, Int(1, 1 << 10)]
    kv_heads: Annotated[int, Int(1, 1 << 12)] | None = None


class Provenance(Struct, frozen=True):
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


class Manifest(Agreeing, Struct, frozen=True):
    """All that the runtime knows of an engine.

    `dtype` is how weights are stored, but for those of the decoder that `quantisation`, "int8" or
    "int4", is of; `compute_dtype` is what the backend calculates in.
    """

    schema_version: Annotated[int, Int(SCHEMA_VERSION, SCHEMA_VERSION)]
    backend: Name
    dtype: FloatType
    quantisation: Annotated[str, Choice(("int8", "int4"))] | None
    compute_dtype: FloatType
    parts: tuple[Part, ...]
    image: ImagePolicy
    prompt: PromptPolicy
    decode: DecodePolicy
    kv: KVLayout
    parallel: ParallelLayout
    tokenizer_file: FilePath
    files: tuple[FileEntry, ...]
    provenance: Provenance

    @override
    def disagreements(self) -> Iterator[tuple[str, str]]:
        names, paths = [part.name for part in self.parts], [entry.path for entry in self.files]
        outputs = [output for part in self.parts for output in part.outputs]
        logits = [n for output in outputs if output.name == "logits" for n in output.shape[-1:]]
        if len(set(names)) < len(names):
            yield "parts", "parts of different names"
        if len(set(paths)) < len(paths):
            yield "files", "each file once"
        if any(n != self.decode.vocab_size for n in logits if isinstance(n, int)):
            yield "decode.vocab_size", "as many as the decoder gives logits"
        for index, part in enumerate(self.parts):
            if part.chain is not None and not _fits(part, part.chain, self.rank_kv):
                yield f"parts[{index}].chain", "of one attention a layer, over pages as `kv` says"
        yield from self._unequal_ranks()

    def _unequal_ranks(self) -> Iterator[tuple[str, str]]:
        """Ranks that would wait for each other for ever."""
        tp, parts = self.parallel.tp, {part.name: part for part in self.parts}
        ranks = [parts.get(decoder_name(rank)) for rank in range(tp)]
        if tp == 1:
            return
        if None in ranks or len(parts) > tp + 1:
            yield "parts", f"a decoder for each of {tp} ranks, and a vision part"
        meetings = {None if p is None else _meetings(p) for p in ranks}
        if len(meetings) > 1 or () in meetings:
            yield "parts", "decoders that meet at the same collectives, at least once"

    @property
    def rank_kv(self) -> KVLayout:
        """The cache that one rank holds."""
        heads = self.parallel.kv_heads
        return self.kv if heads is None else structs.replace(self.kv, kv_heads=heads)

    @property
    def first_parts(self) -> tuple[Part, ...]:
        """The parts that the first rank holds, which are all but the other ranks' decoders."""
        others = {decoder_name(rank) for rank in range(1, self.parallel.tp)}
        return tuple(part for part in self.parts if part.name not in others)

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


def _meetings(part: Part) -> tuple[object, ...] | None:
    """Where a rank meets the others; None: that is inside a plan."""
    if part.chain is None:
        return () if part.layers is None else None
    return tuple(call.agreed for call in part.chain.collectives)


def decoder_name(rank: int) -> str:
    """Name of the decoder part of a rank: the first's is "decoder"."""
    return f"decoder.rank{rank}" if rank else "decoder"


def _fits(part: Part, chain: PartChain, kv: KVLayout) -> bool:
    calls = chain.attention
    if not calls:  # it is in the segments; those over pages are plans
        return kv.page_size is None or part.layers is not None
    shapes = {(call.kv_heads, call.head_dim) for call in calls}
    layers = sorted(call.layer for call in calls)
    whole = layers == list(range(kv.layers)) and kv.page_size is not None
    return whole and shapes == {(kv.kv_heads, kv.head_dim)}


def manifest_digest(data: Mapping[str, object]) -> str:
    """sha256, in hex, of all values of a manifest but its digest, however they are laid out."""
    rest = {key: value for key, value in data.items() if key != _DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def dump_manifest(manifest: Manifest) -> str:
    """The text of `engine.json`, with a digest of all that it says."""
    data = cast("dict[str, object]", to_data(manifest))
    return data_json({**data, _DIGEST: manifest_digest(data)})


def load_manifest(folder: Path) -> Manifest:
    """Read and check `engine.json` of an engine directory; its files are not looked at.

    Raises:
        EngineFormatError: no manifest, not JSON, another schema version, a key that is unknown,
            missing, twice there or of a wrong type, or a value out of range.
        EngineIntegrityError: its digest is not that of its values.
    """
    path = folder / MANIFEST_FILE
    data = _read(folder, path)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(data, dict) or version not in _READ or type(version) is not int:
        raise EngineFormatError(
            f"{path} is of another schema version.",
            found=f"schema_version {version!r}"[:100],
            expected="one of " + ", ".join(map(str, _READ)),
            fix="install the vlmforge that built it, or build it again with this one",
        )
    if version > _WITHOUT_DIGEST:
        _check_digest(path, data)
    return from_json(Manifest, upgraded(data, version), MANIFEST_FILE)


def _read(folder: Path, path: Path) -> object:
    try:
        return parse_json(read_regular(path, _MOST_BYTES).decode("utf-8"))
    except OSError as error:
        checkpoint = (folder / "config.json").is_file()
        raise EngineFormatError(
            f"{folder} is not an engine directory.",
            found=f"a checkpoint, without {MANIFEST_FILE}"
            if checkpoint
            else f"{path}: {error.strerror}",
            expected=f"a folder that build-engine wrote, with {MANIFEST_FILE}",
            fix=f"build-engine {folder} -o ENGINE"
            if checkpoint
            else f"build-engine CHECKPOINT -o {folder}",
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
