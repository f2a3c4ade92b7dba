"""Nothing is done twice, and nothing before it is known to be needed: calls are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

import vlmforge.runner.stages
from sample_manifest import MANIFEST
from stand_in import (
    CAPACITY,
    HIDDEN,
    TOKENS,
    Gate,
    Parts,
    SlowFile,
    manifest,
    plain,
    png,
    settle,
    stand_in,
)
from vlmforge import Pipeline, Response, Session, VisionConfig
from vlmforge.engine.images.anyres import AnyRes
from vlmforge.engine.images.tiling import Lines, Tiling
from vlmforge.engine.manifest import Manifest
from vlmforge.errors import ContextLengthError
from vlmforge.vl.load import OpenedImage


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often prompts are rendered, and images opened, decoded and preprocessed."""
    counts: Counter[str] = Counter()

    def spy(owner: Any, name: str, called: str) -> None:
        original = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            counts[called] += 1
            return original(*given, **named)

        monkeypatch.setattr(owner, name, call)

    spy(vlmforge.runner.stages, "render_prompt", "render")
    spy(vlmforge.runner.stages, "open_image", "open")
    spy(vlmforge.runner.stages, "preprocess", "preprocess")
    spy(OpenedImage, "decode", "decode")
    return counts


ONE_IMAGE = 4 * TOKENS * HIDDEN  # bytes of its features
FEW_FEATURES = VisionConfig(feature_cache_bytes=ONE_IMAGE)


def whole(response: object) -> Response:
    assert isinstance(response, Response)
    return response


TILED = structs.replace(
    MANIFEST,
    image=AnyRes(
        MANIFEST.image.format,
        Tiling(8, ((8, 8), (16, 8), (8, 16)), (0, 0, 0), 2, TOKENS, Lines()),
    ),
)


@pytest.mark.parametrize("of", [MANIFEST, TILED], ids=["one view", "tiled"])
def test_a_prompt_that_does_not_fit_costs_no_pixels(counted: Counter[str], of: Manifest) -> None:
    """Where the number of tokens depends on sizes, headers are read; no pixel is."""
    large = png(1, (5000, 50)) if of is TILED else png(1, (8, 8))
    parts = Parts(1)
    with stand_in(parts, slots=1, of=of) as pipe, pytest.raises(ContextLengthError) as caught:
        pipe(("look", [large] * 40))
    assert caught.value.ledger.image >= 40 * TOKENS
    assert caught.value.ledger.window == CAPACITY
    assert counted["decode"] == counted["preprocess"] == parts.calls["encode"] == 0
    assert counted["open"] == (40 if of is TILED else 0)
    assert counted["render"] == 1


def test_nor_does_it_fetch_a_file(counted: Counter[str], tmp_path: Path) -> None:
    gate = Gate()  # never opened
    with stand_in(slots=1) as pipe, pytest.raises(ContextLengthError):
        pipe(("look " * 200, SlowFile(tmp_path / "picture.png", gate)))
    assert not gate.reached.is_set()


APART = ("<s>", "</s>")


@pytest.mark.parametrize(
    ("window", "turns", "renders"),
    [(None, 2, 1), (120, 2, 1), (120, 1, 1), (20, 2, 2)],
    ids=["no window", "all turns fit", "one turn", "a turn is left out"],
)
def test_a_prompt_is_rendered_once(
    counted: Counter[str], window: int | None, turns: int, renders: int
) -> None:
    """Or once more without the turns that are left out."""
    asked = [("user", "a b c d e f g h i j k l"), ("assistant", "yes"), ("user", "and")]
    messages = [{"role": role, "content": text} for role, text in asked[-(2 * turns - 1) :]]
    of = manifest(content_tokens=APART, history_window=window)
    with stand_in(slots=1, of=of) as pipe:
        answer = whole(pipe(messages, plain(2)))
        assert counted["render"] == renders
        assert answer.input_token_len == len(pipe.render(messages).token_ids)


def test_a_later_turn_does_nothing_again_for_earlier_images(
    counted: Counter[str], tmp_path: Path
) -> None:
    """The files may even be gone."""
    path = tmp_path / "picture.png"
    path.write_bytes(png(1))
    parts = Parts(1)
    with stand_in(parts, slots=1) as pipe:
        session = pipe.chat(("look", [str(path), png(2)]), gen_config=plain(3))
        path.unlink()
        done, encoded = dict(counted), parts.calls["encode"]
        assert (done["open"], done["decode"], done["preprocess"]) == (2, 2, 2)
        for text in ("and", "then"):
            session = pipe.chat(text, session, plain(3))  # type: ignore[arg-type]
        assert isinstance(session, Session)
        assert {**counted, "render": 0} == {**done, "render": 0}
        assert parts.calls["encode"] == encoded
        assert session.response is not None
        assert session.response.timings is not None
        assert session.response.timings.cached_images == 2


def test_a_later_turn_sees_an_image_as_it_was(counted: Counter[str]) -> None:
    """Its owner draws on it meanwhile, and its features are forgotten."""
    picture = PIL.Image.new("RGB", (8, 8), "red")
    texts = ("look", "and", "again")

    def answers(pipe: Pipeline, change: Callable[[], None]) -> list[str]:
        session = Session()
        pipe.chat((texts[0], picture), session, plain(5))
        change()
        for text in texts[1:]:
            pipe(("other", png(7)), plain(2))  # takes the place of its features
            pipe.chat(text, session, plain(5))
        return [answer for _, answer in session.history]

    found = []
    for change in (lambda: None, lambda: picture.paste("blue", (0, 0, 8, 8))):
        with stand_in(slots=1, vision=FEW_FEATURES, enable_prefix_caching=False) as pipe:
            found.append(answers(pipe, change))
    assert found[0] == found[1]


def test_equal_images_under_way_are_prepared_once(counted: Counter[str]) -> None:
    with stand_in(slots=2) as pipe:
        answers = pipe([(f"look {n}", png(1)) for n in range(12)], gen_config=plain(2))
        assert isinstance(answers, list)
        assert {answer.finish_reason for answer in answers} == {"length"}
    assert (counted["decode"], counted["preprocess"]) == (1, 1)


def test_an_image_whose_tokens_are_all_in_the_cache_is_not_encoded() -> None:
    parts = Parts(2)
    with stand_in(parts, slots=2, vision=FEW_FEATURES) as pipe:
        first = whole(pipe(("look", png(1)), plain(4)))
        pipe(("other", png(2)), plain(4))  # its features take the place of the first one's
        assert parts.calls["encode"] == 2
        again = whole(pipe(("look", png(1)), plain(4)))
        assert parts.calls["encode"] == 2
    assert again.token_ids == first.token_ids
    assert again.timings is not None
    assert again.timings.cached_images == 1


def test_nor_is_it_decoded_or_preprocessed(counted: Counter[str]) -> None:
    """No features are kept at all: what the cache has of its tokens is enough."""
    parts = Parts(2)
    with stand_in(parts, slots=2, vision=VisionConfig(feature_cache_bytes=0)) as pipe:
        session = pipe.chat(("look", png(1)), gen_config=plain(4))
        work = [(counted["decode"], counted["preprocess"], parts.calls["encode"])]
        for prompt in ("and", "then", ("and this", png(2)), "or"):
            settle(pipe)  # what it leaves in the cache is known
            session = pipe.chat(prompt, session, plain(4))  # type: ignore[arg-type]
            work.append((counted["decode"], counted["preprocess"], parts.calls["encode"]))
    assert work == [(1, 1, 1)] * 3 + [(2, 2, 2)] * 2
    assert isinstance(session, Session)
    with stand_in(slots=1, enable_prefix_caching=False) as alone:
        again = alone.chat(("look", png(1)), gen_config=plain(4))
        for prompt in ("and", "then", ("and this", png(2)), "or"):
            again = alone.chat(prompt, again, plain(4))  # type: ignore[arg-type]
    assert isinstance(again, Session)
    assert again.history[-1][1] == session.history[-1][1]


def test_what_has_left_the_cache_meanwhile_is_made_by_the_worker(
    counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Any] = [("look", png(1)), ("and", [png(2), png(1)]), ("look", png(1))]
    with stand_in(slots=2) as pipe:
        expected = [whole(pipe(prompt, plain(5))).token_ids for prompt in prompts]
    counted.clear()
    parts = Parts(2)
    with stand_in(parts, slots=2, vision=VisionConfig(feature_cache_bytes=0)) as pipe:
        monkeypatch.setattr(pipe._scheduler, "cached", lambda keys, terms: len(keys))
        found = pipe(prompts, plain(5))
        assert isinstance(found, list)
        assert [answer.token_ids for answer in found] == expected
        assert 2 <= counted["decode"] == counted["preprocess"] <= 4
        broken = whole(pipe([("look", png(3)[:90])], plain(5))[0])  # type: ignore[index]
        assert broken.error_code == "engine_step"
        assert whole(pipe("fine", plain(2))).finish_reason == "length"


def test_of_two_images_only_the_one_that_is_not_in_the_cache_is_encoded() -> None:
    parts = Parts(2)
    with stand_in(parts, slots=2, vision=FEW_FEATURES) as pipe:
        pipe(("look", png(1)), plain(2))
        pipe(("other", png(2)), plain(2))
        answer = whole(pipe(("look", [png(1), png(3)]), plain(6)))
        assert parts.calls["encode"] == 3
    with stand_in(slots=1) as fresh:
        assert whole(fresh(("look", [png(1), png(3)]), plain(6))).token_ids == answer.token_ids


PROMPTS = st.tuples(st.sampled_from(["a", "a b", "b"]), st.lists(st.integers(1, 4), max_size=3))


@given(st.lists(PROMPTS, min_size=1, max_size=8), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_whatever_is_left_out_the_answers_are_the_same(
    prompts: list[tuple[str, list[int]]], slots: int, batch: int
) -> None:
    """Prefixes, features and images under way are shared; each answer is as if nothing were."""
    asked: list[Any] = [(text, [png(n) for n in images]) for text, images in prompts]
    vision = VisionConfig(max_batch_size=batch, feature_cache_bytes=ONE_IMAGE)
    with stand_in(slots=slots, vision=vision, max_prefill_token_num=5) as pipe:
        found = [*pipe(asked, plain(4)), *pipe(asked[::-1], plain(4))[::-1]]  # type: ignore[misc,index]
    with stand_in(slots=1, enable_prefix_caching=False) as alone:
        expected = [whole(alone(prompt, plain(4))).token_ids for prompt in asked]
    assert [answer.token_ids for answer in found] == expected * 2


def test_prompts_with_all_logits_are_run_whole() -> None:
    """Nothing of the cache is used, so every image is needed again."""
    parts = Parts(1)
    with stand_in(parts, slots=1, vision=FEW_FEATURES) as pipe:
        config = plain(2, output_logits="all")
        first, again = (whole(pipe(("look", png(1)), config)) for _ in range(2))
        assert again.cached_tokens == 0
        assert first.logits is not None
        assert again.logits is not None
        np.testing.assert_array_equal(first.logits, again.logits)
