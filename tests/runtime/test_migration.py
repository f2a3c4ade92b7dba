"""Engines of before: `tests/data/manifests/` has what older versions of this code wrote.

Those of schema version 1 and 2 are read as if they had been built today, but for what they do not
know.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from conftest import DATA
from sample_manifest import FORMAT, IMAGE, MANIFEST, PARTS, PROMPT, RICH
from vlmforge.engine.images import AnyRes, CenterCrop, PadSquare, Stretch
from vlmforge.engine.images.tiling import Tiling, UnpaddedLines
from vlmforge.engine.manifest import MANIFEST_FILE, dump_manifest, load_manifest, manifest_digest
from vlmforge.engine.migration import SCHEMA_VERSION, upgraded
from vlmforge.engine.prompts import SplitText
from vlmforge.errors import EngineFormatError, EngineIntegrityError

OLD = DATA / "manifests"
# The parts of an engine of before have no names of tables.
OLD_RICH = dataclasses.replace(
    RICH, parts=(RICH.parts[0], dataclasses.replace(RICH.parts[1], rotary_tables=None))
)


def tiled(digits: int | None) -> AnyRes:
    canvases = ((8, 16), (16, 16))
    return AnyRes(FORMAT, Tiling(8, canvases, (0, 0, 0), 2, 5, UnpaddedLines(digits)))


EXPECTED = {
    "1_pad_square": dataclasses.replace(
        MANIFEST,
        image=PadSquare(FORMAT, 8, (8, 8), (0, 0, 0)),
        prompt=dataclasses.replace(PROMPT, splice=SplitText()),
    ),
    "2_center_crop": MANIFEST,
    "2_stretch": dataclasses.replace(MANIFEST, image=Stretch(FORMAT, (8, 9))),
    "2_anyres_named": dataclasses.replace(OLD_RICH, image=tiled(None)),
    "2_anyres_7_digits": dataclasses.replace(OLD_RICH, image=tiled(7)),
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


def test_an_engine_of_before_keeps_its_window() -> None:
    positions = EXPECTED["2_center_crop"].decode.positions
    assert positions.most_tokens(64) == 64
    assert positions.longer_tables(128) is None
    assert PARTS[1].rotary_tables is None


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
