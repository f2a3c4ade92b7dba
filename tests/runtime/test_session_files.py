"""Files of sessions: what is damaged, of another engine or made up is refused before it is used."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from sample_manifest import MANIFEST
from stand_in import Parts, png, stand_in
from talks import talk, turn
from vlmforge import Pipeline, Session
from vlmforge.api.array_file import read_arrays, write_arrays
from vlmforge.api.session_cache import engine_digest
from vlmforge.api.session_file import read_session
from vlmforge.backends import FloatArray
from vlmforge.engine.images.patch_inputs import NO_ARRAYS, Arrays
from vlmforge.engine.images.patches import Patches
from vlmforge.engine.images.pixels import PixelRange
from vlmforge.engine.manifest import FileEntry
from vlmforge.errors import (
    ConfigError,
    ImageError,
    SessionError,
)
from vlmforge.vl.image_limits import DEFAULT_LIMITS


def test_a_session_of_another_engine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    with stand_in() as pipe:
        session = talk(pipe)
        session.save(path)
        built_again = structs.replace(
            MANIFEST, provenance=structs.replace(MANIFEST.provenance, built_at="later")
        )
    with stand_in(of=built_again) as pipe:
        assert turn(pipe, "so", Session.load(path, pipe)).cached_tokens > 0
    file = FileEntry("decoder.onnx", 7, "0" * 64)
    parts, other = Parts(3), structs.replace(MANIFEST, files=(file,))
    with stand_in(parts, of=other) as pipe:
        with pytest.raises(SessionError, match="from another engine") as caught:
            Session.load(path, pipe)
        assert pipe.session_cache.engine_digest in caught.value.expected
        assert "engine " in caught.value.found
        assert not parts.calls


class Deep(Parts):
    """Each image has features for two layers."""

    def encode(self, pixel_values: FloatArray, arrays: Arrays = NO_ARRAYS) -> FloatArray:
        return np.tile(super().encode(pixel_values, arrays), 2)


def test_features_for_several_layers_are_restored(tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    decode = structs.replace(MANIFEST.decode, feature_layers=2)
    deep = structs.replace(MANIFEST, decode=decode)
    with stand_in(Deep(3), of=deep) as pipe:
        session = talk(pipe)
        session.save(path)
        expected = turn(pipe, "so", session).token_ids
    parts = Deep(3)
    with stand_in(parts, of=deep) as pipe:
        assert turn(pipe, "so", Session.load(path, pipe)).token_ids == expected
    assert parts.calls["encode"] == 0


def test_other_limits_of_pixels_are_no_other_engine() -> None:
    """They are chosen at load (`Engine.with_pixels`): the session goes on without its cache."""
    patches = Patches(MANIFEST.image.format, 14, 2, 2, 3136, 12544, (1.0,))
    built = structs.replace(MANIFEST, image=patches)
    decode = structs.replace(MANIFEST.decode, tokens_per_image=9)
    chosen = structs.replace(built, image=patches.within(PixelRange(784, 7056)), decode=decode)
    assert engine_digest(chosen) == engine_digest(built)
    other = structs.replace(patches, merge=1)
    assert engine_digest(structs.replace(built, image=other)) != engine_digest(built)
    fewer = structs.replace(MANIFEST, decode=decode)
    assert engine_digest(fewer) != engine_digest(MANIFEST)


class Patched(Parts):
    """A vision part that gives a row of features for each token of an image."""

    def encode(self, pixel_values: FloatArray, arrays: Arrays = NO_ARRAYS) -> FloatArray:
        found = super().encode(pixel_values, arrays)[:, :1]
        return np.repeat(found, pixel_values.shape[1], axis=1)


def test_an_image_of_more_pixels_than_here_is_refused_at_load(tmp_path: Path) -> None:
    """Not at the next turn; and nothing is put into the caches."""
    path = tmp_path / "talk.session"
    patches = Patches(MANIFEST.image.format, 14, 2, 2, 3136, 12544, (1.0,))
    built = structs.replace(MANIFEST, image=patches)
    wide = structs.replace(built, image=patches.within(PixelRange(None, 50176), 64))
    picture = {"type": "image_data", "image_data": {"data": png(1), "max_pixels": 50176}}
    with stand_in(Patched(3), of=wide) as pipe:
        session = pipe.session()
        turn(pipe, [{"role": "user", "content": [picture]}], session)
        session.save(path)
        expected = turn(pipe, "so", session).token_ids
    with stand_in(Patched(3), of=wide) as pipe:
        assert turn(pipe, "so", Session.load(path, pipe)).token_ids == expected
    parts = Patched(3)
    with stand_in(parts, of=built) as pipe, pytest.raises(SessionError) as caught:
        Session.load(path, pipe)
    assert (caught.value.found, caught.value.expected) == (
        "max_pixels 50176",
        "at most 12544, which are 16 tokens",
    )
    assert "VisionConfig" in caught.value.fix
    assert not parts.calls


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "talk.session"
    with stand_in() as pipe:
        talk(pipe).save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "talk.session"


@pytest.fixture(scope="module")
def counted() -> Iterator[tuple[Parts, Pipeline]]:
    parts = Parts(3)
    with stand_in(parts) as pipe:
        yield parts, pipe


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_as_it_was(
    saved: bytes, place: Path, counted: tuple[Parts, Pipeline], data: st.DataObject
) -> None:
    parts, pipe = counted
    at, cut = data.draw(st.integers(0, len(saved) - 1)), data.draw(st.booleans())
    wrong = bytearray(saved)
    wrong[at] ^= data.draw(st.integers(1, 255))
    place.write_bytes(saved[:at] if cut else bytes(wrong))
    before = parts.calls.copy()
    try:
        loaded = Session.load(place, pipe)
    except SessionError as error:
        assert error.fix
        assert parts.calls == before
    else:  # what says when and how a member was packed is not looked at
        assert not cut
        place.write_bytes(saved)
        assert loaded.turns.messages[0].texts == ("look",)
        assert [text for _, text in loaded.history] == [
            text for _, text in Session.load(place, pipe).history
        ]


def test_what_is_no_session_is_refused(tmp_path: Path, counted: tuple[Parts, Pipeline]) -> None:
    path = tmp_path / "x"
    for content in (b"", b"hello", b"PK\x03\x04", png(1)):
        path.write_bytes(content)
        with pytest.raises(SessionError, match="not a whole saved session"):
            Session.load(path, counted[1])
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SessionError, match="cannot be read"):
            Session.load(missing, counted[1])
    with pytest.raises(ConfigError, match="path"):
        Session.load(3, counted[1])  # type: ignore[arg-type]


def test_a_file_cannot_take_more_memory_than_it_has(tmp_path: Path) -> None:
    path, member = tmp_path / "x", io.BytesIO()
    np.save(member, np.zeros(1 << 20, np.uint8))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("record.npy", member.getvalue())
    with pytest.raises(SessionError, match="not a whole") as caught:
        read_arrays(path)
    assert "compressed" in caught.value.found
    huge = b"\x93NUMPY\x01\x00v\x00" + (
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (1152921504606846976,), }".ljust(117)
        + b"\n"
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("record.npy", huge)
    with pytest.raises(SessionError, match="not a whole"):
        read_arrays(path)


def test_nothing_in_a_file_can_run(tmp_path: Path) -> None:
    path, member = tmp_path / "x", io.BytesIO()
    np.save(member, np.array([object], object), allow_pickle=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("record.npy", member.getvalue())
    with pytest.raises(SessionError, match="not a whole") as caught:
        read_arrays(path)
    assert "allow_pickle" in caught.value.found


def changed(saved: bytes, path: Path, old: str, new: str, **arrays: Any) -> Path:
    path.write_bytes(saved)
    text, there = read_arrays(path)
    assert old in text
    write_arrays(path, text.replace(old, new), {**there, **arrays})
    return path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"version": 1', '"version": 2', "another version"),
        ('"version": 1', '"version": true', "another version"),
        ('"role": "user"', '"role": "wizard"', "not a whole"),
        ('"finish_reason": "length"', '"finish_reason": "luck"', "not a whole"),
        ('"image": 0', '"image": 7', "not a whole"),
        ('"image": 0', '"image": -1', "not a whole"),
        ('"min_pixels": null', '"min_pixels": -1', "not a whole"),
        ('"max_pixels": null', '"max_pixels": true', "not a whole"),
        ('"turns"', '"turn"', "not a whole"),
        ('"salt": "', '"salt": "x', "not a whole"),
        ('"key.0"', '"key.9"', "not a whole"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(
    saved: bytes, tmp_path: Path, counted: tuple[Parts, Pipeline], old: str, new: str, words: str
) -> None:
    parts, pipe = counted
    path, before = changed(saved, tmp_path / "x", old, new), parts.calls.copy()
    with pytest.raises(SessionError, match=words):
        Session.load(path, pipe)
    assert parts.calls == before


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("keys", np.zeros(3, np.int64)),
        ("keys", np.zeros(3, np.float32)),
        ("rows.key.0", np.zeros((1, 2, 1), np.int64)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    saved: bytes, tmp_path: Path, counted: tuple[Parts, Pipeline], name: str, array: Any
) -> None:
    path = changed(saved, tmp_path / "x", "{", "{", **{name: array})
    with pytest.raises(SessionError, match="does not fit"):
        Session.load(path, counted[1])


def test_images_beyond_what_this_pipeline_reads_are_refused(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    path.write_bytes(saved)
    limits = structs.replace(DEFAULT_LIMITS, formats=("JPEG",))
    with stand_in() as pipe, pytest.raises(ImageError) as caught:
        read_session(path, pipe.session_cache.engine_digest, limits)
    assert "a PNG file" in caught.value.found
