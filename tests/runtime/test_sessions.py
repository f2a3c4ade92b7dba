"""Sessions: forked, rewound, saved and loaded; what is in the cache is not computed again."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from conftest import wait_until
from sample_manifest import MANIFEST
from stand_in import Parts, plain, png, stand_in
from talks import talk, turn
from vlmforge import Response, Session
from vlmforge.errors import (
    BackendUnavailableError,
    CancelledError,
    ConfigError,
    PipelineError,
    SessionError,
    VlmforgeError,
)
from vlmforge.kv.slots import SlotCache
from vlmforge.vl.load import OpenedImage

# --- fork and rewind ----------------------------------------------------------------------------


def test_a_fork_goes_its_own_way() -> None:
    with stand_in() as pipe:
        session = talk(pipe)
        before = list(session.history)
        child = session.fork()
        assert child.session_id != session.session_id
        first, second = turn(pipe, "left", session), turn(pipe, "right", child)
        assert [prompt for prompt, _ in session.history[2:]] == ["left"]
        assert [prompt for prompt, _ in child.history[2:]] == ["right"]
        assert session.history[:2] == child.history[:2] == before
        # Neither computes again what both have; an answer may be spelled with other tokens.
        shared = pipe.count_tokens(("look", [png(1), png(2)]))
        assert min(first.cached_tokens, second.cached_tokens) >= shared


def test_a_rewound_session_answers_as_if_nothing_had_happened() -> None:
    with stand_in() as pipe:
        session = talk(pipe)
        expected = turn(pipe, "so", session.fork())
        for text in ("other", "things"):
            turn(pipe, text, session)
        session.rewind(2)
        assert [prompt for prompt, _ in session.history][1:] == ["and"]
        assert session.prompt == "and"
        assert session.response is not None
        assert session.response.text == session.history[-1][1]
        again = turn(pipe, "so", session)
        assert again.token_ids == expected.token_ids
        session.rewind(3)
        assert (session.prompt, session.response, session.history) == (None, None, [])
        assert not session.turns.messages


@pytest.mark.parametrize("turns", [-1, 3, 1.0, "1", True])
def test_what_cannot_be_rewound_is_refused(turns: Any) -> None:
    with stand_in() as pipe:
        session = talk(pipe)
        with pytest.raises(ConfigError) as caught:
            session.rewind(turns)
        assert str(turns) in caught.value.found
        assert len(session.history) == 2
        session.rewind(0)
        assert len(session.history) == 2


# --- saved and loaded ---------------------------------------------------------------------------


def test_a_loaded_session_computes_only_its_next_turn(tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    with stand_in() as pipe:
        session = talk(pipe)
        tokens = session.save(path)
        expected = turn(pipe, "so", session, 9)
    parts = Parts(3)
    with stand_in(parts) as pipe:
        turn(pipe, "something else before", pipe.session())
        ran = parts.calls["step"]
        loaded = Session.load(path, pipe)
        found = turn(pipe, "so", loaded, 9)
        assert (found.token_ids, found.cached_tokens) == (
            expected.token_ids,
            expected.cached_tokens,
        )
        assert found.cached_tokens > 40
        assert tokens >= found.cached_tokens
        assert parts.calls["encode"] == 0
        assert parts.calls["step"] - ran == 9  # the prompt's new part, and each token
        assert found.timings is not None
        assert found.timings.cached_images == 2


def test_it_is_the_session_that_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    with stand_in() as pipe:
        session = talk(pipe)
        parts: list[dict[str, Any]] = [
            {"type": "text", "text": "third"},
            {"type": "image_data", "image_data": {"data": png(5)}},
        ]
        turn(pipe, [{"role": "user", "content": parts}], session)
        session.save(path)
        loaded = Session.load(path, pipe)
        assert loaded.session_id != session.session_id
        assert [text for _, text in loaded.history] == [text for _, text in session.history]
        assert loaded.history[1] == session.history[1]
        assert pipe.render(loaded.turns) == pipe.render(session.turns)
        for prompt, given in zip(
            (prompt for prompt, _ in loaded.history),
            (prompt for prompt, _ in session.history),
            strict=True,
        ):
            assert type(prompt) is type(given)
            assert pipe.render(prompt) == pipe.render(given)
        assert session.response is not None
        assert loaded.response == dataclasses.replace(session.response, session_id=0)
        first, second = (talk.turns.images for talk in (loaded, session))
        assert [digest(image.source) for image in first] == [digest(i.source) for i in second]
        loaded.rewind(2)
        assert len(loaded.history) == 1


def digest(source: object) -> bytes:
    assert isinstance(source, OpenedImage)
    return source.digest


def test_the_pictures_need_not_be_there_any_more(tmp_path: Path) -> None:
    picture, path = tmp_path / "picture.png", tmp_path / "talk.session"
    picture.write_bytes(png(3))
    with stand_in(enable_prefix_caching=False) as pipe:
        session = pipe.session()
        turn(pipe, ("look", str(picture)), session)
        assert session.save(path) == 0  # nothing is kept
        expected = turn(pipe, "so", session)
    picture.unlink()
    parts = Parts(3)
    with stand_in(parts, enable_prefix_caching=False) as pipe:
        loaded = Session.load(path, pipe)
        found = turn(pipe, "so", loaded)
    assert (found.token_ids, found.cached_tokens) == (expected.token_ids, 0)
    assert parts.calls["encode"] == parts.calls["write"] == 0  # the features are in the file


@pytest.mark.parametrize("cache", [True, False])
def test_without_its_cache_a_session_is_computed_again(tmp_path: Path, cache: bool) -> None:
    path = tmp_path / "talk.session"
    with stand_in() as pipe:
        session = talk(pipe)
        look = pipe.count_tokens("look")
        tokens = session.save(path, cache=cache)
        for number in itertools.count():  # others take its place in the cache, sooner or later
            if not cache or tokens < look:
                break
            pipe([(f"{number}, {i}", png(10 + i)) for i in range(3)], plain(20))
            tokens = session.save(path)
        assert tokens < look if cache else tokens == 0
        expected = turn(pipe, "so", session)
    parts = Parts(3)
    with stand_in(parts) as pipe:
        found = turn(pipe, "so", Session.load(path, pipe))
    assert found.token_ids == expected.token_ids
    assert parts.calls["encode"] == (0 if cache else 2)


def test_a_forked_and_rewound_session_is_saved_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "talk.session"

    def facts(response: Response) -> tuple[list[int], int]:
        return response.token_ids, response.cached_tokens

    seen = []
    for saves in (True, False):
        with stand_in() as pipe:
            session = talk(pipe)
            child = session.fork()
            child.rewind()
            if saves:
                child.save(path)
            seen.append([facts(turn(pipe, "so", each)) for each in (child, session)])
    assert seen[0] == seen[1]  # saving has taken nothing away
    with stand_in() as pipe:
        assert facts(turn(pipe, "so", Session.load(path, pipe))) == seen[0][0]


def test_a_session_without_turns_is_saved_too(tmp_path: Path) -> None:
    with stand_in() as pipe:
        assert pipe.session().save(tmp_path / "empty") == 0
        loaded = Session.load(tmp_path / "empty", pipe)
        assert not loaded.history
        assert turn(pipe, "hello", loaded).text


def test_a_cache_that_has_no_room_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "talk.session"
    with stand_in() as pipe:
        session = talk(pipe)
        session.save(path)
        expected = turn(pipe, "so", session)
    parts, done = Parts(1), threading.Event()

    def held(name: str, number: int) -> None:
        """The stream has the only slot still when the session is loaded."""
        if name == "step" and number > 10:  # it goes on only to answer a question
            wait_until(lambda: done.is_set() or not pipe._scheduler._inbox.empty())

    parts.before = held
    with stand_in(parts, slots=1) as pipe:
        pieces = pipe.stream_infer("long", plain(50))
        next(pieces)
        loaded = Session.load(path, pipe)
        done.set()
        assert "computed again" in caplog.text
        pieces.close()  # type: ignore[attr-defined]
        found = turn(pipe, "so", loaded)
    assert found.token_ids == expected.token_ids
    assert parts.calls["write"] == 0


def test_other_image_settings_do_not_use_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "talk.session"
    with stand_in() as pipe:
        talk(pipe).save(path)
    parts = Parts(3)
    white = structs.replace(MANIFEST.image.format, background=(1, 2, 3))
    image = structs.replace(MANIFEST.image, format=white)
    engine = structs.replace(MANIFEST, image=image)
    with stand_in(parts, of=engine) as pipe:
        assert turn(pipe, "so", Session.load(path, pipe)).cached_tokens == 0
    assert parts.calls["encode"] > 0
    assert "other image settings" in caplog.text


def test_a_session_is_restored_for_those_of_its_salt(tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    with stand_in() as pipe:
        session = pipe.session()
        pipe.chat(("look", png(1)), session, plain(5), salt="ours")
        assert session.save(path) > 20
    for salt, hits in (("ours", True), ("theirs", False), ("", False)):
        parts = Parts(3)
        with stand_in(parts) as pipe:
            loaded = Session.load(path, pipe)
            assert loaded.save(tmp_path / "again") > 20  # it knows whose it is
            pipe.chat("so", loaded, plain(5), salt=salt)
            assert loaded.response is not None
            assert (loaded.response.cached_tokens > 20) == hits
            assert parts.calls["encode"] == (0 if hits else 1)


def test_what_is_restored_is_not_dropped_with_what_was_there_before(tmp_path: Path) -> None:
    """A sequence that ends leaves work for the next step, at lengths around a block's."""
    path = tmp_path / "talk.session"
    with stand_in(slots=1) as pipe:
        session = talk(pipe)
        session.save(path)
        expected = turn(pipe, "so", session)
    with stand_in(slots=1) as pipe:
        for words in range(16):
            pipe("a " * words, plain(2))
            found = turn(pipe, "so", Session.load(path, pipe))
            assert found.token_ids == expected.token_ids
            assert found.cached_tokens == expected.cached_tokens


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    with stand_in() as pipe:
        session = talk(pipe)
        session.save(path)
        before = path.read_bytes()
        session.history[0] = session.history[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.fsync", _full_disk)
            with pytest.raises(SessionError, match="cannot be written") as caught:
                session.save(path)
        assert "No space left" in caught.value.found
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
        with pytest.raises(SessionError, match="cannot be written"):
            session.save(tmp_path / "no folder" / "talk.session")


def _full_disk(file: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_backend_may_keep_its_cache_to_itself(tmp_path: Path) -> None:
    from vlmforge.backends import DecoderSession

    parts = Parts(3)
    parts.read = lambda place, tokens: DecoderSession.read(parts, place, tokens)  # type: ignore[method-assign]
    with stand_in(parts) as pipe:
        session = talk(pipe)
        with pytest.raises(BackendUnavailableError) as caught:
            session.save(tmp_path / "x")
        assert "cache=False" in caught.value.fix
        assert session.save(tmp_path / "x", cache=False) == 0
        assert turn(pipe, "so", session).text  # the pipeline goes on


def test_a_pipeline_that_is_closed_or_gone_gives_no_cache(tmp_path: Path) -> None:
    pipe = stand_in()
    session = talk(pipe)
    pipe.close()
    with pytest.raises(CancelledError):
        session.save(tmp_path / "x")
    with pytest.raises(CancelledError):
        Session.load(_saved_without(session, tmp_path / "y"), pipe).save(tmp_path / "z")
    del pipe
    with pytest.raises(PipelineError) as caught:
        session.save(tmp_path / "x")
    assert "cache=False" in caught.value.fix
    with stand_in() as pipe:
        assert turn(pipe, "so", Session.load(tmp_path / "y", pipe)).text


def _saved_without(session: Session, path: Path) -> Path:
    assert session.save(path, cache=False) == 0
    return path


@pytest.mark.parametrize("call", ["read", "write", "find"])
def test_a_failure_while_the_cache_is_read_or_written_is_told_and_harms_nobody(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, parts = tmp_path / "talk.session", Parts(3)

    def fail(name: str = call, *_: object, **__: object) -> Any:
        if name == call:
            raise MemoryError("none left")

    with stand_in(parts) as pipe:
        session = talk(pipe)
        session.save(path)
        expected = turn(pipe, "so", session.fork())
        with monkeypatch.context() as patch:
            if call == "find":
                patch.setattr(SlotCache, "find", lambda *_, **__: fail())
            parts.before = fail
            with pytest.raises(MemoryError):
                Session.load(path, pipe) if call == "write" else session.save(path)
        parts.before = lambda name, number: None
        assert turn(pipe, "so", session).token_ids == expected.token_ids
        assert turn(pipe, "so", Session.load(path, pipe)).token_ids == expected.token_ids


def test_a_session_is_not_saved_from_inside_a_callback(tmp_path: Path) -> None:
    errors: list[Exception] = []
    with stand_in() as pipe:
        session = talk(pipe)

        def processor(ids: Sequence[int], logits: Any) -> Any:
            with pytest.raises(VlmforgeError) as caught:
                session.save(tmp_path / "x")
            errors.append(caught.value)
            return logits

        pipe("hello", plain(1, logits_processors=[processor]))
    assert isinstance(errors[0], PipelineError)
    assert not list(tmp_path.iterdir())
