"""`engine.json` of a stranger: every value has a range, every change is seen, errors are typed."""

from __future__ import annotations

import json
import os
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Struct

from conftest import examples
from sample_manifest import MANIFEST, RICH
from vlmforge.engine.fields import RelativePath, Sha256
from vlmforge.engine.manifest import (
    MANIFEST_FILE,
    Manifest,
    dump_manifest,
    load_manifest,
    manifest_digest,
)
from vlmforge.engine.schema import Elsewhere
from vlmforge.errors import EngineError, EngineFormatError, EngineIntegrityError
from vlmforge.field_rules import Choice, Int, Number, OrNone, Rule, Text

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
# Values that must agree with others, or tell which kind they are of, stay.
FIXED = ("schema_version", "name", "tiling", "files[0].path")


def write(folder: Path, text: str) -> Path:
    (folder / MANIFEST_FILE).write_text(text, "utf-8")
    return folder


def signed(data: dict[str, Any]) -> str:
    """The text of a manifest whose digest fits its values."""
    return json.dumps({**data, "digest": manifest_digest(data)})


def refusal(folder: Path) -> EngineFormatError:
    with pytest.raises(EngineFormatError) as caught:
        load_manifest(folder)
    return caught.value


def put(data: Any, place: str, value: object) -> None:
    """Set a value of parsed JSON, at a place such as `parts[0].name`."""
    *above, last = place.replace("[", ".").replace("]", "").split(".")
    for key in above:
        data = data[int(key) if isinstance(data, list) else key]
    data[int(last) if isinstance(data, list) else last] = value


def valid(rule: Rule) -> st.SearchStrategy[object]:
    """Values that a rule admits, its ends among them."""
    match rule:
        case Int(low=low, high=high):
            return st.integers(low, high) | st.sampled_from([low, high])
        case Number(low=low, high=high, above=above):
            return st.floats(low, high, exclude_min=above)
        case Choice(values=values):
            return st.sampled_from(values)
        case OrNone(rule=inner):
            return st.none() | valid(inner)
        case Text(empty=empty):
            return st.text(min_size=not empty, max_size=6)
        case RelativePath():
            return st.from_regex("[a-zA-Z0-9. \u00e9]{0,8}[a-z]", fullmatch=True)
        case Sha256():
            return st.from_regex("[0-9a-f]{64}", fullmatch=True)
        case _:
            return st.integers(0, 9) | st.text(min_size=1, max_size=4)


def places(
    hint: Any, value: object, where: str = "", rule: Rule | None = None
) -> Iterator[tuple[str, Rule | None]]:
    """All plain values below `value`, a Struct or part of one, and the rule of each."""
    options = typing.get_args(hint)
    if isinstance(value, Struct):
        for name, kind in typing.get_type_hints(type(value), include_extras=True).items():
            yield from places(kind, getattr(value, name), f"{where}.{name}".lstrip("."))
    elif typing.get_origin(hint) is typing.Annotated:
        own = None if isinstance(options[1], Elsewhere) else options[1]
        yield from places(options[0], value, where, own)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from places(options[1], item, f"{where}.{key}")
    elif isinstance(value, tuple):
        kinds = options if ... not in options else options[:1] * len(value)
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            kinds = typing.get_args(options[0])[:1] * len(value)
        for index, item in enumerate(value):
            yield from places(kinds[index], item, f"{where}[{index}]")
    elif typing.get_origin(hint) in (types.UnionType, typing.Union) and rule is None:
        yield from places(options[0], value, where)  # X | None
    else:
        yield where, rule


RULES = dict(places(Manifest, RICH))
FREE = [
    place
    for place, rule in RULES.items()
    if rule is not None
    and not place.endswith(FIXED)
    and not any(word in place for word in ("tiling", "parts[1].", "parts[2].", "kv.", "parallel."))
]


@SHARED_FOLDER
@given(st.lists(st.sampled_from(FREE), max_size=12), st.data())
def test_what_is_dumped_is_what_is_loaded(
    tmp_path: Path, places: list[str], data: st.DataObject
) -> None:
    values = json.loads(dump_manifest(RICH))
    for place in places:
        rule = RULES[place]
        assert rule is not None
        put(values, place, data.draw(valid(rule)))
    words = data.draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3))
    values["provenance"]["options"] = words
    loaded = load_manifest(write(tmp_path, signed(values)))
    text = dump_manifest(loaded)
    assert json.loads(text) == {**values, "digest": manifest_digest(values)}
    assert load_manifest(write(tmp_path, text)) == loaded


# --- ranges -------------------------------------------------------------------------------------


def numbers(hint: Any, where: str = "") -> Iterator[tuple[str, bool]]:
    """Where the schema has numbers, whatever the kinds, and whether each has a range."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated and isinstance(options[1], Elsewhere):
        for place in options[1:]:
            yield from numbers(place.load(), where)
    elif typing.get_origin(hint) is typing.Annotated:
        yield from ((place, True) for place, _ in numbers(options[0], where))
    elif isinstance(hint, type) and issubclass(hint, Struct):
        for name, kind in typing.get_type_hints(hint, include_extras=True).items():
            yield from numbers(kind, f"{where}.{name}")
    elif options:
        for option in options:
            yield from numbers(option, where)
    elif hint in (int, float):
        yield where, False


def test_every_number_has_a_range() -> None:
    found = dict(numbers(Manifest))
    assert len(found) > 35
    assert {".image.shortest_edge", ".image.tiling.side", ".prompt.splice.end_id"} <= set(found)
    assert {place for place, ranged in found.items() if not ranged} == set()


def use(manifest: Manifest) -> None:
    """What the runtime computes of a manifest by itself."""
    assert manifest.kv.bytes_per_token > 0
    assert manifest.decode.positions.level(10) >= 0
    rows = manifest.image.rows((8, 9))
    assert rows is None or manifest.image.most_tokens(4) >= len(rows)


NASTY = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, -0.0, 1e-320, float("nan"), float("inf")),
    *("", "\0", "\ud800", "../x", "/etc/passwd", "a/../../b", ".", "x" * 5000, "float32", "9"),
    *([], {}, [[]], [1], [0, 0], {"": 0}, [None]),
]


@settings(SHARED_FOLDER, max_examples=examples(250))
@given(st.sampled_from(sorted(RULES)), st.sampled_from(NASTY), st.booleans())
def test_a_nasty_value_is_a_typed_error_or_does_no_harm(
    tmp_path: Path, place: str, value: object, whole: bool
) -> None:
    data = json.loads(dump_manifest(RICH))
    put(data, place.rpartition(".")[0] or place if whole else place, value)
    try:
        manifest = load_manifest(write(tmp_path, signed(data)))
        use(manifest)
    except EngineError as error:
        assert error.summary and error.found and error.expected and error.fix
        assert len(str(error)) < 2500
        str(error).encode()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("kv.dtype", "float33", "must be one of 'float32', 'float16', 'bfloat16'"),
        ("kv.head_dim", 0, "must be an integer in [1, 16384]"),
        ("kv.layers", 10**9, "must be an integer in [1, 4096]"),
        ("decode.positions.trained_length", 0, "must be an integer in [1, 2147483648]"),
        ("decode.session_len", -5, "must be an integer in [1, 2147483648]"),
        ("image.format.std[1]", 0.0, "must be a number in [1e-12, 1e+06]"),
        ("image.tiling.tile", 0, "must be an integer in [1, 4096]"),
        ("image.tiling.canvases", [], "must be some, multiples of the tile"),
        ("image.tiling.canvases[0][0]", 9, "must be some, multiples of the tile"),
        ("image.tiling.view_rows", 4, "must be at least side x side"),
        ("image.tiling.view_rows", 4_000_000, "must be views of at most 4194304 rows in all"),
        ("image.name", "spiral", "is unknown to this version of vlmforge"),
        ("image.format.resample", "cubist", "must be one of 'nearest', "),
        ("image.tiling.merge.digits", 99, "must be an integer in [0, 15]"),
        ("prompt.image_placeholder", "", "must be a non-empty string"),
        ("prompt.template_file", "../../etc/passwd", "must be a path inside the engine"),
        ("parts[0].layers", "/etc/passwd", "must be a path inside the engine"),
        ("tokenizer_file", "a\0b", "must be a path inside the engine"),
        ("parts[1].name", "vision", "must be parts of different names"),
        ("parts[1].chain.steps", [], "must be a segment first"),
        ("parts[1].chain.steps[1].attention", None, "must be each a segment, a call"),
        ("parts[1].chain.steps[3].attention.layer", 0, "must be of one attention a layer"),
        ("parts[1].chain.steps[3].attention.head_dim", 16, "must be with attention of one shape"),
        ("parts[1].chain.steps[3].attention.heads", 3, "must be of heads that share keys evenly"),
        ("parts[1].chain.steps[3].attention.qkv", "x", "must be steps that take what there is"),
        ("parts[1].chain.steps[4].segment", None, "must be each a segment, a call or a collective"),
        ("parts[1].chain.steps[7].gated", None, "must be each a segment, a call or a collective"),
        ("parts[1].chain.steps[7].gated.activation", "relu", "must be one of 'silu', "),
        ("parts[1].chain.steps[7].gated.tensor", "x", "must be with gates of 16 bits that give"),
        ("parts[1].chain.steps[7].gated.out", "hidden", "must be with gates of 16 bits that"),
        ("parts[1].chain.steps[8].segment.inputs[0].shape[2]", 33, "must be with gates of 16 bits"),
        ("parts[1].chain.steps[8].segment.inputs[0].dtype", "float32", "must be with gates of 16"),
        ("parts[1].chain.steps[9].collective.kind", "sum", "must be one of 'all_reduce', "),
        ("parts[1].chain.steps[9].collective.tensor", "x", "must be steps that take what there is"),
        ("parts[1].chain.steps[9].collective.width", 7, "must be decoders that meet at the same"),
        ("parts[1].chain.steps[5].collective.kind", "all_gather", "must be with norms of sums"),
        ("parts[1].chain.steps[5].collective.norm.added", "x", "must be steps that take what"),
        ("parts[1].chain.steps[5].collective.norm.added", "qkv1", "must be with norms of sums and"),
        ("parts[1].chain.steps[4].segment.outputs[0].dtype", "float32", "must be with norms of"),
        ("parts[1].chain.steps[5].collective.norm.epsilon", 2, "must be a number in [0, 1]"),
        ("parts[1].chain.steps[5].collective.norm.epsilon", 0.1, "must be decoders that meet"),
        ("parts[1].chain.steps[5].collective.norm.file", "x", "must be all files of the chain"),
        ("parts[1].chain", None, "must be decoders that meet at the same collectives"),
        ("parts[2].name", "decoder.rank2", "must be a decoder for each of 2 ranks"),
        ("parts[1].chain.rotary", None, "must be given where attention rotates"),
        ("parts[1].chain.rotary.positions", 0, "must be an integer in [1, 4194304]"),
        ("parts[1].chain.kernels.sm_90", "other.cubin", "must be all files of the chain"),
        ("parts[1].chain.choosers.sm_90", "other.cubin", "must be all files of the chain"),
        ("parts[1].chain.kernels.sm_90", "/lib/x", "must be a path inside the engine"),
        ("parts[1].chain.steps[0].segment.token_bytes", -1, "must be an integer in [0, "),
        ("files[0].sha256", "0" * 63, "must be 64 digits of 0-9 and a-f"),
    ],
)
def test_a_value_out_of_range_is_named(
    tmp_path: Path, place: str, value: object, words: str
) -> None:
    data = json.loads(dump_manifest(RICH))
    put(data, place, value)
    error = refusal(write(tmp_path, signed(data)))
    assert error.summary.startswith(f"engine.json.{place.partition('[')[0]}")
    assert words in error.summary


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("tp", 3, "engine.json.parts must be a decoder for each of 3 ranks"),
        ("kv_heads", 1, "engine.json.parts[1].chain must be of one attention a layer"),
    ],
)
def test_parts_are_those_of_the_ranks(
    tmp_path: Path, field: str, value: object, words: str
) -> None:
    data = json.loads(dump_manifest(RICH))
    put(data, f"parallel.{field}", value)
    assert refusal(write(tmp_path, signed(data))).summary.startswith(words)


@pytest.mark.parametrize(("shape", "fits"), [(["batch", 7], False), (["batch", "any"], True)])
def test_there_are_as_many_logits_as_tokens(
    tmp_path: Path, shape: list[object], fits: bool
) -> None:
    data = json.loads(dump_manifest(RICH))
    put(data, "parts[1].outputs", [{"name": "logits", "dtype": "float32", "shape": shape}])
    folder = write(tmp_path, signed(data))
    if fits:
        load_manifest(folder)
    else:
        assert "must be as many as the decoder gives logits" in refusal(folder).summary


# --- the digest, and the text itself ------------------------------------------------------------


@settings(SHARED_FOLDER, max_examples=examples(200))
@given(st.data())
def test_a_flipped_bit_is_seen_or_changes_nothing(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(dump_manifest(RICH).encode())
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    try:
        assert load_manifest(tmp_path) == RICH
    except EngineError as error:
        assert error.found and error.fix


@SHARED_FOLDER
@given(st.binary(max_size=200), st.integers(0, 4000))
def test_any_bytes_in_any_place_are_seen_or_change_nothing(
    tmp_path: Path, noise: bytes, place: int
) -> None:
    content = dump_manifest(RICH).encode()
    changed = content[:place] + noise + content[place + len(noise) :]
    (tmp_path / MANIFEST_FILE).write_bytes(changed)
    try:
        assert load_manifest(tmp_path) == RICH
    except EngineError as error:
        assert error.found and error.fix


def test_a_changed_prompt_is_seen(tmp_path: Path) -> None:
    text = dump_manifest(MANIFEST)
    assert "Be helpful." in text
    write(tmp_path, text.replace("Be helpful.", "Be hateful."))
    with pytest.raises(EngineIntegrityError) as caught:
        load_manifest(tmp_path)
    assert caught.value.summary == f"{tmp_path / MANIFEST_FILE} is not the manifest that was built."
    assert caught.value.expected == f"digest {json.loads(text)['digest']}"
    data = json.loads(text)
    del data["digest"]
    with pytest.raises(EngineIntegrityError, match="not the manifest that was built"):
        load_manifest(write(tmp_path, json.dumps(data)))


def test_the_digest_is_of_the_values_not_of_their_layout(tmp_path: Path) -> None:
    data = json.loads(dump_manifest(MANIFEST))
    turned = dict(reversed(data.items()))
    assert load_manifest(write(tmp_path, json.dumps(turned, indent=7))) == MANIFEST


def test_a_key_may_not_be_there_twice(tmp_path: Path) -> None:
    text = dump_manifest(MANIFEST)
    for key, value in (("backend", '"x"'), ("tp", "1"), ("digest", '"0"')):
        twice = text.replace(f'"{key}":', f'"{key}": {value}, "{key}":')
        error = refusal(write(tmp_path, twice))
        assert error.summary == f"{tmp_path / MANIFEST_FILE} is not JSON."
        assert error.found == f"the key {key!r} twice in one object"


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "9" * 5000, '{"a":' * 9999])
def test_what_json_does_not_have_is_refused(tmp_path: Path, text: str) -> None:
    assert refusal(write(tmp_path, text)).summary.endswith("is not JSON.")


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST_FILE)  # reading it would never end
    assert refusal(tmp_path).found.endswith(": not a regular file")
    (tmp_path / MANIFEST_FILE).unlink()
    (tmp_path / MANIFEST_FILE).symlink_to("/dev/zero")
    assert refusal(tmp_path).found.endswith(": not a regular file")
    (tmp_path / MANIFEST_FILE).unlink()
    with (tmp_path / MANIFEST_FILE).open("wb") as file:
        file.truncate(1 << 40)
    assert "at most 16777216 are read" in refusal(tmp_path).found
    assert "null" in refusal(Path("a\0b")).found
