"""What every field of a manifest may hold, and which fields must agree.

Types are the schema's. Ranges are wide: they keep nonsense from becoming a division by zero, an
endless loop or all the memory, and say nothing of what makes a good model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from typing_extensions import override

from vlmforge.engine.image_policy import Tiling
from vlmforge.engine.manifest import MANIFEST_FILE, SCHEMA_VERSION, Manifest
from vlmforge.errors import EngineFormatError
from vlmforge.field_rules import Choice, Int, Number, OrNone, Rule, Text
from vlmforge.runner.interface import LOGITS

_MOST_TOKENS = 1 << 22
_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class RelativePath(Rule):
    """A path of a file inside the engine."""

    @override
    def admits(self, value: object) -> bool:
        if not isinstance(value, str) or not value or "\0" in value or len(value) > 4096:
            return False
        path = PurePosixPath(value)
        return not path.is_absolute() and ".." not in path.parts and bool(path.parts)

    def __str__(self) -> str:
        return "a path inside the engine"


@dataclass(frozen=True, slots=True)
class Sha256(Rule):
    """A sha256 in hex."""

    @override
    def admits(self, value: object) -> bool:
        return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None

    def __str__(self) -> str:
        return "64 digits of 0-9 and a-f"


@dataclass(frozen=True, slots=True)
class Dimension(Rule):
    """A dimension: a size, or a symbol."""

    @override
    def admits(self, value: object) -> bool:
        return value != "" if isinstance(value, str) else Int(0, 1 << 40).admits(value)

    def __str__(self) -> str:
        return "a size, or the name of one"


_NAME, _ANY = Text(empty=False), Text()
_PATH = RelativePath()
_BYTES, _ID, _LEVEL = Int(0, 1 << 50), Int(0, (1 << 31) - 1), Int(0, 255)
_SIZE, _COUNT, _FLOAT = Int(1, 1 << 31), Int(1, 1 << 20), Choice(_FLOATS)

RULES: Mapping[str, Rule] = {
    "schema_version": Int(1, SCHEMA_VERSION),
    "backend": _NAME,
    "dtype": _FLOAT,
    "quantisation": OrNone(Choice(("int8", "int4"))),
    "compute_dtype": _FLOAT,
    "parts.*.name": _NAME,
    "parts.*.file": _PATH,
    "parts.*.data.*": _PATH,
    "parts.*.inputs.*.name": _NAME,
    "parts.*.inputs.*.dtype": _NAME,
    "parts.*.inputs.*.shape.*": Dimension(),
    "parts.*.outputs.*.name": _NAME,
    "parts.*.outputs.*.dtype": _NAME,
    "parts.*.outputs.*.shape.*": Dimension(),
    "parts.*.weight_bytes": _BYTES,
    "parts.*.loaded_bytes": _BYTES,
    "parts.*.profiles.*.name": _NAME,
    "parts.*.profiles.*.dims.*.least": Int(0, 1 << 40),
    "parts.*.profiles.*.dims.*.usual": Int(0, 1 << 40),
    "parts.*.profiles.*.dims.*.most": Int(0, 1 << 40),
    "parts.*.layers": OrNone(_PATH),
    "parts.*.aliases.*": _NAME,
    "image.name": _NAME,
    "image.shortest_edge": Int(1, 1 << 12),
    "image.crop.*": Int(1, 1 << 12),
    "image.resample": _NAME,
    "image.rescale_factor": Number(0, 1e6, above=True),
    "image.mean.*": Number(-1e6, 1e6),
    "image.std.*": Number(1e-12, 1e6),
    "image.background.*": _LEVEL,
    "image.pad_fill.*": _LEVEL,
    "image.tiling.tile": Int(1, 1 << 12),
    "image.tiling.canvases.*.*": Int(1, 1 << 13),
    "image.tiling.fill.*": _LEVEL,
    "image.tiling.side": Int(1, 1 << 12),
    "image.tiling.view_rows": Int(1, _MOST_TOKENS),
    "image.tiling.merge": _NAME,
    "image.tiling.rounding": _NAME,
    "prompt.template_name": _NAME,
    "prompt.template_file": _PATH,
    "prompt.stop_words.*": _NAME,
    **{
        f"prompt.templates.*.{name}": _ANY
        for name in ("system", "eosys", "user", "eoh", "assistant", "eoa", "separator")
    },
    "prompt.templates.*.meta_instruction": OrNone(_ANY),
    "prompt.templates.*.stop_words.*": _NAME,
    "prompt.image_placeholder": _NAME,
    "prompt.image_splice": Choice(("inline_token", "split_text", "named_span")),
    "prompt.image_token_id": Int(-(1 << 31), (1 << 31) - 1),  # some originals use a negative one
    "prompt.bos_id": OrNone(_ID),
    "prompt.bos_token": _ANY,
    "prompt.eos_token": _ANY,
    "prompt.image_line": _ANY,
    "prompt.text_separator": _ANY,
    "prompt.content_tokens.*": _NAME,
    "prompt.spelling.begin": _NAME,
    "prompt.spelling.end": _NAME,
    "prompt.spelling.begin_id": _ID,
    "prompt.spelling.end_id": _ID,
    "prompt.spelling.max_name_bytes": _COUNT,
    "prompt.spelling.stand_in": _NAME,
    "prompt.history_window": OrNone(_SIZE),
    "prompt.box_format": OrNone(_NAME),
    "decode.vocab_size": _SIZE,
    "decode.hidden_size": _COUNT,
    "decode.eos_ids.*": _ID,
    "decode.tokens_per_image": Int(1, _MOST_TOKENS),
    "decode.session_len": _SIZE,
    "decode.max_batch_size": _COUNT,
    "decode.positions.name": _NAME,
    "decode.positions.trained_length": Int(0, 1 << 31),
    "decode.positions.levels": Int(1, 64),
    "kv.layers": Int(1, 1 << 12),
    "kv.kv_heads": Int(1, 1 << 12),
    "kv.head_dim": Int(1, 1 << 14),
    "kv.dtype": Choice((*_FLOATS, "float8_e4m3fn")),
    "kv.page_size": OrNone(_COUNT),
    "parallel.tp": Int(1, 1 << 10),
    "tokenizer_file": _PATH,
    "files.*.path": _PATH,
    "files.*.size": _BYTES,
    "files.*.sha256": Sha256(),
    **{
        f"provenance.{name}": _ANY
        for name in ("built_at", "source", "source_fingerprint", "recipe", "architecture")
    },
    "provenance.options.*": _ANY,
    "provenance.versions.*": _ANY,
}
"""By the path of a field; `*` is any item. A field that is null or a flag needs none."""


def check_manifest(manifest: Manifest) -> None:
    """Check all ranges, and what must agree.

    Raises:
        EngineFormatError: names the field, what it may hold, and what it holds.
    """
    for where, path, value in leaves(manifest):
        if isinstance(value, bool) or (value is None and path not in RULES):
            continue
        if not RULES[path].admits(value):
            raise _out_of_range(where, str(RULES[path]), repr(value))
    for where, expected, agrees in _agreements(manifest):
        if not agrees:
            raise _out_of_range(where, expected, "values that do not go together")


def leaves(
    value: object, where: str = MANIFEST_FILE, path: str = ""
) -> Iterator[tuple[str, str, object]]:
    """All plain values below `value`: where they are, the path of their rule, and themselves."""
    dot = "." if path else ""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            yield from leaves(inner, f"{where}.{field.name}", f"{path}{dot}{field.name}")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{where}.{key}", f"{path}.*")
    elif isinstance(value, tuple):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{where}[{index}]", f"{path}.*")
    else:
        yield where, path, value


def _agreements(manifest: Manifest) -> Iterator[tuple[str, str, bool]]:
    image, prompt, positions = manifest.image, manifest.prompt, manifest.decode.positions
    outputs = [output for part in manifest.parts for output in part.outputs]
    logits = [n for output in outputs if output.name == LOGITS for n in output.shape[-1:]]
    names = [part.name for part in manifest.parts]
    paths = [entry.path for entry in manifest.files]
    yield "engine.json.parts", "parts of different names", len(set(names)) == len(names)
    yield "engine.json.files", "each file once", len(set(paths)) == len(paths)
    yield (
        "engine.json.prompt.spelling",
        'given for the image splice "named_span" and no other',
        (prompt.image_splice == "named_span") == (prompt.spelling is not None),
    )
    yield (
        "engine.json.decode.vocab_size",
        "as many as the decoder gives logits",
        all(n == manifest.decode.vocab_size for n in logits if isinstance(n, int)),
    )
    yield (
        "engine.json.decode.positions.trained_length",
        "positive where there are levels",
        positions.name != "dynamic_ntk" or positions.trained_length > 0,
    )
    yield (
        "engine.json.image.tiling",
        'given for the image policy "anyres" and no other',
        (image.name == "anyres") == (image.tiling is not None),
    )
    if image.tiling is not None:
        yield from _tiling_agreements(image.tiling)


def _tiling_agreements(tiling: Tiling) -> Iterator[tuple[str, str, bool]]:
    where, tile = "engine.json.image.tiling", tiling.tile
    canvases = tiling.canvases
    whole = all(width % tile == 0 == height % tile for width, height in canvases)
    yield f"{where}.canvases", "some, multiples of the tile", bool(canvases) and whole
    views = max(((width // tile) * (height // tile) for width, height in canvases), default=0)
    least = tiling.side**2 + (tiling.merge == "unpadded_lines")
    yield f"{where}.view_rows", "at least side x side", tiling.view_rows >= least
    most = f"views of at most {_MOST_TOKENS} rows in all"
    yield f"{where}.view_rows", most, (1 + views) * tiling.view_rows <= _MOST_TOKENS


def _out_of_range(where: str, expected: str, found: str) -> EngineFormatError:
    return EngineFormatError(
        f"{where} must be {expected}.",
        found=found if len(found) <= 100 else found[:100] + "...",
        expected=expected,
        fix="do not use this engine; copy it again, or rebuild it with build-engine",
    )
