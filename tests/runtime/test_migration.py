"""Engines of before: `tests/data/manifests/` has what older versions of this code wrote.

Those of schema version 1 and 2 are read as if they had been built today, but for what they do not
know.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec import structs

from conftest import DATA
from sample_manifest import FORMAT, IMAGE, MANIFEST, PARTS, PROMPT, RICH
from vlmforge.engine.chain import ChainStep
from vlmforge.engine.images.anyres import AnyRes
from vlmforge.engine.images.center_crop import CenterCrop
from vlmforge.engine.images.pad_square import PadSquare
from vlmforge.engine.images.stretch import Stretch
from vlmforge.engine.images.tiling import Tiling, UnpaddedLines
from vlmforge.engine.manifest import (
    MANIFEST_FILE,
    Part,
    dump_manifest,
    load_manifest,
    manifest_digest,
)
from vlmforge.engine.migration import SCHEMA_VERSION, upgraded
from vlmforge.engine.prompts import SplitText
from vlmforge.errors import EngineError, EngineFormatError, EngineIntegrityError

OLD = DATA / "manifests"
# The parts of an engine of before have no names of tables, and it has one rank.
OLD_RICH = structs.replace(
    RICH,
    parallel=MANIFEST.parallel,
    kv=structs.replace(RICH.kv, page_size=None),
    prompt=structs.replace(RICH.prompt, in_order=False, image_around=("", "")),
    decode=structs.replace(RICH.decode, feature_layers=1),
    parts=(
        RICH.parts[0],
        structs.replace(
            RICH.parts[1], rotary_tables=None, chain=None, data=("decoder.rank0.data",)
        ),
    ),
)


def tiled(digits: int | None) -> AnyRes:
    canvases = ((8, 16), (16, 16))
    return AnyRes(FORMAT, Tiling(8, canvases, (0, 0, 0), 2, 5, UnpaddedLines(digits)))


EXPECTED = {
    "1_pad_square": structs.replace(
        MANIFEST,
        image=PadSquare(FORMAT, 8, (8, 8), (0, 0, 0)),
        prompt=structs.replace(PROMPT, splice=SplitText()),
    ),
    "2_center_crop": MANIFEST,
    "2_stretch": structs.replace(MANIFEST, image=Stretch(FORMAT, (8, 9))),
    "2_anyres_named": structs.replace(OLD_RICH, image=tiled(None)),
    "2_anyres_7_digits": structs.replace(OLD_RICH, image=tiled(7)),
}


def test_every_old_manifest_is_expected() -> None:
    assert {path.stem for path in OLD.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_old_manifest_is_read_and_written_as_a_new_one(tmp_path: Path, name: str) -> None:
    shutil.copy(OLD / f"{name}.json", tmp_path / MANIFEST_FILE)
    found = load_manifest(tmp_path)
    assert found == EXPECTED[name]
    assert found.schema_version == SCHEMA_VERSION
    (tmp_path / MANIFEST_FILE).write_text(dump_manifest(found), "utf-8")
    assert load_manifest(tmp_path) == found


def test_sums_of_engines_of_before_are_sums(tmp_path: Path) -> None:
    data = json.loads(dump_manifest(RICH))
    for part in data["parts"][1:]:
        del part["chain"]["steps"][9]["collective"]["norm"]
    data["digest"] = manifest_digest(data)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(data), "utf-8")
    assert load_manifest(tmp_path) == RICH


def test_segments_of_before_have_all_their_weights_inside(tmp_path: Path) -> None:
    data = json.loads(dump_manifest(RICH))
    for part in data["parts"][1:]:
        for segment in (step["segment"] for step in part["chain"]["steps"] if step["segment"]):
            del segment["weights"], segment["names"]
    data["digest"] = manifest_digest(data)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(data), "utf-8")
    chain, now = (one.parts[1].chain for one in (load_manifest(tmp_path), RICH))
    assert chain is not None and now is not None
    assert [(s.weights, s.names) for s in chain.segments] == [((), ())] * len(now.segments)
    assert {*chain.segments[0].called.values()} == {"qkv0", "hidden"}
    assert chain.segments[1] == structs.replace(now.segments[1], weights=(), names=())


def test_an_engine_of_before_keeps_its_window() -> None:
    positions = EXPECTED["2_center_crop"].decode.positions
    assert not positions.extends
    assert PARTS[1].rotary_tables is None


def test_a_chain_of_before_has_no_kernels_of_gates_and_choices(tmp_path: Path) -> None:
    data = json.loads(dump_manifest(structs.replace(RICH, parts=(PARTS[0], *ungated()))))
    for part in data["parts"][1:]:
        assert part["chain"].pop("activations") == part["chain"].pop("choosers") == {}
        assert all(step.pop("gated") is None for step in part["chain"]["steps"])
    data["digest"] = manifest_digest(data)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(data), "utf-8")
    assert load_manifest(tmp_path).parts[1:] == ungated()


def ungated() -> tuple[Part, ...]:
    """The sample's decoders with the activation inside a segment."""
    found = []
    for part in RICH.parts[1:]:
        assert part.chain is not None
        *first, before, _, after, last = part.chain.steps
        assert before.segment is not None and after.segment is not None
        whole = structs.replace(before.segment, outputs=after.segment.outputs)
        steps = (*first, ChainStep(segment=whole), last)
        chain = structs.replace(part.chain, steps=steps, activations={}, choosers={})
        found.append(structs.replace(part, chain=chain, data=tuple(sorted(chain.files))))
    return tuple(found)


def test_of_version_2_the_digest_is_that_of_what_stands_there(tmp_path: Path) -> None:
    text = (OLD / "2_center_crop.json").read_text("utf-8")
    (tmp_path / MANIFEST_FILE).write_text(text.replace("Be helpful.", "Be hateful."), "utf-8")
    with pytest.raises(EngineIntegrityError):
        load_manifest(tmp_path)


def test_version_1_has_no_digest(tmp_path: Path) -> None:
    data = json.loads((OLD / "1_pad_square.json").read_text("utf-8"))
    assert "digest" not in data
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({**data, "digest": "0" * 64}), "utf-8")
    with pytest.raises(EngineFormatError) as caught:
        load_manifest(tmp_path)
    assert caught.value.found == "unknown key 'digest'"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"image": {"name": "spiral"}}, "engine.json.image.name is unknown"),
        ({"image": 3}, "engine.json.image is not"),
        ({"image": {}}, "engine.json.image is not"),
        ({"prompt": {"image_splice": "glue"}}, "engine.json.prompt"),
        ({"prompt": []}, "engine.json.prompt is not"),
        ({"decode": {"positions": {"name": "spiral"}}}, "engine.json.decode"),
        ({"decode": None}, "engine.json.decode is not"),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, change: dict[str, object], where: str) -> None:
    data = {**json.loads((OLD / "2_center_crop.json").read_text("utf-8")), **change}
    data["digest"] = manifest_digest(data)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(data), "utf-8")
    with pytest.raises(EngineFormatError) as caught:
        load_manifest(tmp_path)
    assert caught.value.summary.startswith(where)
    assert caught.value.fix


def leaves_of(data: object, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield place
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, inner in items:
        yield from leaves_of(inner, (*place, key))


PLACES = [
    (name, place)
    for name in sorted(EXPECTED)
    for place in leaves_of(json.loads((OLD / f"{name}.json").read_text("utf-8")))
    if len(place) > 1
]
NASTY = [None, True, -1, 0, 10**400, 0.5, "", "x", "../x", [], {}, [[]], {"name": []}, {"": 0}]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.sampled_from(PLACES), st.sampled_from(NASTY))
@example(("2_anyres_named", ("image", "tiling", "rounding")), [])
@example(("2_anyres_named", ("image", "tiling", "rounding")), None)
@example(("2_anyres_named", ("image", "tiling", "merge")), {})
@example(("2_anyres_named", ("image", "name")), [])
@example(("2_anyres_named", ("prompt", "spelling")), None)
@example(("2_center_crop", ("prompt", "image_splice")), {})
def test_a_nasty_value_in_an_old_manifest_is_a_typed_error_or_does_no_harm(
    tmp_path: Path, where: tuple[str, tuple[str | int, ...]], value: object
) -> None:
    name, place = where
    data = json.loads((OLD / f"{name}.json").read_text("utf-8"))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    if "digest" in data:
        data["digest"] = manifest_digest(data)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(data), "utf-8")
    try:
        load_manifest(tmp_path)
    except EngineError as error:
        assert error.found and error.expected and error.fix


def test_an_old_rounding_that_nobody_knows(tmp_path: Path) -> None:
    data = json.loads((OLD / "2_anyres_named.json").read_text("utf-8"))
    data["image"]["tiling"]["rounding"] = "up"
    data["digest"] = manifest_digest(data)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(data), "utf-8")
    with pytest.raises(EngineFormatError, match=r"image\.tiling\.merge\.digits"):
        load_manifest(tmp_path)


def test_the_newest_is_left_as_it_is() -> None:
    data = json.loads(dump_manifest(MANIFEST))
    assert upgraded(data, SCHEMA_VERSION) == data
    assert isinstance(IMAGE, CenterCrop)
