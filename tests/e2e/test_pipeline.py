"""The pipeline's calls: streams, sessions, async, settings, errors and the end."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conftest import HANGS, IMAGES, ORIGINAL
from vlmforge import (
    ChatTemplateConfig,
    EngineConfig,
    GenerationConfig,
    Pipeline,
    Response,
    Session,
    VisionConfig,
    pipeline,
)
from vlmforge import env as environment
from vlmforge.errors import BuildError, CancelledError, ContextLengthError, ImageError
from vlmforge.vl import load_image

PHOTO = str(IMAGES / "photo_640x480.png")
TALL = str(IMAGES / "tall_300x900.png")


@pytest.fixture(scope="module")
def pipe(hf_engine: Path) -> Iterator[Pipeline]:
    with pipeline(hf_engine, backend_config=EngineConfig(max_batch_size=3)) as made:
        yield made


def whole(pieces: list[Response]) -> Response:
    joined = Response()
    for piece in pieces:
        joined.extend(piece)
    return joined


def plain(count: int = 24, **fields: object) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=count, ignore_eos=True, **fields)  # type: ignore[arg-type]


def test_a_stream_is_the_whole_in_pieces(pipe: Pipeline) -> None:
    prompts = ["hi there", ("what is this?", PHOTO)]
    at_once = pipe(prompts, gen_config=plain())
    assert isinstance(at_once, list)
    pieces = list(pipe.stream_infer(prompts, plain()))
    for index, expected in enumerate(at_once):
        own = [piece for piece in pieces if piece.index == index]
        assert len(own) > 5
        assert [piece.finish_reason for piece in own[:-1]] == [None] * (len(own) - 1)
        joined = whole(own)
        assert (joined.text, joined.token_ids) == (expected.text, expected.token_ids)
        assert joined.finish_reason == expected.finish_reason == "length"


def test_timings_are_the_wall_time(pipe: Pipeline) -> None:
    begin = time.perf_counter()
    response = pipe(("time this", TALL), gen_config=plain())
    wall = time.perf_counter() - begin
    assert isinstance(response, Response)
    times = response.timings
    assert times is not None
    before = (times.queue, times.image_wait, times.load, times.preprocess)
    run = (times.encode, times.prefill, times.decode)
    assert sum(before) + sum(run) + times.other == pytest.approx(times.total)
    assert 0 < times.total <= wall
    assert times.encode > 0
    assert times.decode > 0


def test_settings_of_generation(pipe: Pipeline) -> None:
    def ids(**fields: object) -> list[int]:
        return pipe("once upon a time", gen_config=plain(**fields)).token_ids  # type: ignore[union-attr]

    greedy = ids()
    sampled = {"top_k": 0, "temperature": 1.5}
    assert ids(**sampled, random_seed=1) == ids(**sampled, random_seed=1)
    assert ids(**sampled, random_seed=1) != ids(**sampled, random_seed=2)
    assert ids(do_sample=False, top_k=40) == greedy
    assert len(greedy) == 24
    assert greedy[0] not in ids(bad_token_ids=[greedy[0]])
    assert ids(stop_token_ids=[greedy[3]]) == greedy[: greedy.index(greedy[3])]
    held = ids(stop_token_ids=[greedy[3]], min_new_tokens=6)
    assert len(held) >= 6

    def never(seen: list[int], logits: np.ndarray) -> np.ndarray:
        logits[greedy[0]] = -np.inf
        return logits

    assert greedy[0] not in ids(logits_processors=[never])


def test_equal_prompts_of_a_batch_get_seeds_of_their_own(pipe: Pipeline) -> None:
    config = plain(top_k=0, temperature=2.0)
    first, second = pipe(["same", "same"], gen_config=config)
    assert first.token_ids != second.token_ids
    assert config.random_seed is None


def test_a_stop_word_of_several_tokens(pipe: Pipeline) -> None:
    free = pipe("tell me", gen_config=plain(30))
    assert isinstance(free, Response)
    word = free.text[8:13]
    cut = free.text.index(word)
    for include in (False, True):
        config = plain(30, stop_words=[word], include_stop_str_in_output=include)
        stopped = pipe("tell me", gen_config=config)
        assert isinstance(stopped, Response)
        assert stopped.text == free.text[: cut + (len(word) if include else 0)]
        assert stopped.finish_reason == "stop"
        assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
        streamed = whole(list(pipe.stream_infer("tell me", config)))
        assert (streamed.text, streamed.token_ids) == (stopped.text, stopped.token_ids)


def test_logprobs_logits_and_perplexity(pipe: Pipeline) -> None:
    config = plain(4, logprobs=3, output_logits="all", return_ppl=True)
    response = pipe("measure this", gen_config=config)
    assert isinstance(response, Response)
    assert response.logits is not None
    assert response.logprobs is not None
    length = response.input_token_len
    assert len(response.logits) == length - 1 + 4
    for row, token, top in zip(
        response.logits[length - 1 :], response.token_ids, response.logprobs, strict=True
    ):
        logp = row - np.log(np.exp(row.astype(np.float64)).sum())
        assert top[token] == pytest.approx(logp[token], abs=1e-4)
        assert len(top) == 3
    ids = pipe.render("measure this").token_ids
    rows = response.logits[: length - 1].astype(np.float64)
    logp = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    loss = -np.mean([logp[i, token] for i, token in enumerate(ids[1:])])
    assert response.ppl == pytest.approx(loss, abs=1e-4)


def test_the_window_is_filled_and_not_passed(pipe: Pipeline) -> None:
    window = 1024
    prompt = "word " * 150
    length = pipe.count_tokens(prompt)
    filled = pipe(prompt, gen_config=plain(None))  # type: ignore[arg-type]
    assert isinstance(filled, Response)
    assert filled.input_token_len == length
    assert filled.generate_token_len == window - length
    assert filled.finish_reason == "length"
    with pytest.raises(ContextLengthError) as caught:
        pipe(("word " * 400, [PHOTO, TALL]))
    ledger = caught.value.ledger
    assert (ledger.image, ledger.window) == (2 * 144, window)
    assert ledger.text + ledger.image >= window


def test_sessions_are_apart_and_failures_leave_them(pipe: Pipeline) -> None:
    first = pipe.chat(("look", PHOTO), gen_config=plain(5))
    second = pipe.chat("hello", gen_config=plain(5))
    assert isinstance(first, Session)
    assert isinstance(second, Session)
    assert first.session_id != second.session_id
    with pytest.raises(ImageError):
        pipe.chat(("look", "no/such.png"), session=first)
    assert len(first.history) == 1
    stream = pipe.chat("and?", session=first, gen_config=plain(8), stream_response=True)
    next(iter(stream))
    stream.close()  # type: ignore[union-attr]
    assert len(first.history) == 1
    pieces = list(pipe.chat("and?", session=first, gen_config=plain(8), stream_response=True))  # type: ignore[arg-type]
    assert [text for _, text in first.history][1] == "".join(piece.text for piece in pieces)
    assert "look [image]" not in repr(second)


def test_async_generate(pipe: Pipeline) -> None:
    async def one(prompt: str, session: int) -> str:
        texts = [out.response async for out in pipe.generate(prompt, session, plain(12))]
        return "".join(texts)

    async def several() -> list[str]:
        return list(await asyncio.gather(*(one(f"prompt {n}", n) for n in range(5))))

    expected = pipe([f"prompt {n}" for n in range(5)], gen_config=plain(12))
    assert asyncio.run(several()) == [r.text for r in expected]  # type: ignore[union-attr]

    async def left_early() -> None:
        async for _ in pipe.generate("a long one", 9, plain(700)):
            return

    asked, steps = threading.Event(), []

    def held(seen: list[int], logits: np.ndarray) -> np.ndarray:
        steps.append(len(seen))
        assert len(steps) < 20 or asked.wait(HANGS)  # it does not end before it is stopped
        return logits

    async def stopped() -> list[str | None]:
        reasons = []
        async for out in pipe.generate("a long one", 9, plain(700, logits_processors=[held])):
            reasons.append(out.finish_reason)
            await pipe.stop_session(9)
            asked.set()
        return reasons

    asyncio.run(left_early())
    assert asyncio.run(stopped())[-1] == "abort"
    # Its slot is free again.
    answers = pipe(["a", "b", "c"], gen_config=plain(2))
    assert [r.generate_token_len for r in answers] == [2, 2, 2]  # type: ignore[union-attr]


def test_a_processor_that_raises_harms_only_its_own_request(pipe: Pipeline) -> None:
    def broken(seen: list[int], logits: np.ndarray) -> np.ndarray:
        raise RuntimeError("my own mistake")

    with pytest.raises(RuntimeError, match="my own mistake"):
        pipe("a", gen_config=plain(4, logits_processors=[broken]))
    answer = pipe("a", gen_config=plain(4))
    assert isinstance(answer, Response)
    assert len(answer.token_ids) == 4


def test_many_threads(pipe: Pipeline) -> None:
    prompts = [f"thread {n % 4}" for n in range(12)]
    expected = {p: pipe(p, gen_config=plain(6)).token_ids for p in set(prompts)}  # type: ignore[union-attr]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda p: pipe(p, gen_config=plain(6)).token_ids, prompts))  # type: ignore[union-attr]
    assert found == [expected[p] for p in prompts]


def test_closing_ends_those_who_wait(hf_engine: Path) -> None:
    pipe = pipeline(hf_engine, backend_config=EngineConfig(max_batch_size=1))
    outcomes: list[object] = []
    begun = threading.Event()

    def note(seen: list[int], logits: np.ndarray) -> np.ndarray:
        begun.set()
        return logits

    def call() -> None:
        config = plain(900, logits_processors=[note])
        try:
            outcomes.append(pipe("a long one", gen_config=config).finish_reason)  # type: ignore[union-attr]
        except CancelledError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(HANGS)
    pipe.close()
    for thread in threads:
        thread.join(timeout=HANGS)
    assert not any(thread.is_alive() for thread in threads)
    assert len(outcomes) == 3
    with pytest.raises(CancelledError, match="closed"):
        pipe("again")
    pipe.close()


def test_rendering_runs_nothing(pipe: Pipeline) -> None:
    rendered = pipe.render(("what?", "no/such/file.png"))
    assert rendered.image_tokens == 144
    assert pipe.count_tokens(("what?", "no/such/file.png")) == len(rendered.token_ids)
    (span,) = rendered.image_spans
    assert set(rendered.token_ids[span.start : span.start + span.length]) == {640}


def test_templates_by_name_and_by_parts(hf_engine: Path) -> None:
    chosen = ChatTemplateConfig("llava-v1", meta_instruction="Be brief.")
    with pipeline(hf_engine, chat_template_config=chosen) as pipe:
        text = pipe.render(("q", PHOTO)).text
    assert text == "Be brief. USER: <image>\nq ASSISTANT:"


def test_vision_batches_change_nothing(hf_engine: Path) -> None:
    prompt = ("all of them", [PHOTO, TALL, load_image(PHOTO).rotate(90)])
    answers = []
    for size in (1, 4):
        with pipeline(hf_engine, vision_config=VisionConfig(max_batch_size=size)) as pipe:
            answers.append(pipe(prompt, gen_config=plain(8)).token_ids)  # type: ignore[union-attr]
    assert answers[0] == answers[1]


def test_a_pipeline_opens_only_the_images_that_it_may(hf_engine: Path, tmp_path: Path) -> None:
    inside = tmp_path / "photo.png"
    inside.write_bytes(Path(PHOTO).read_bytes())
    jpeg = io.BytesIO()
    load_image(PHOTO).save(jpeg, "JPEG")
    vision = VisionConfig(local_files=tmp_path, image_formats=["PNG"])
    with pipeline(hf_engine, vision_config=vision) as pipe:
        images = (str(inside), PHOTO, f"file://{PHOTO}", "/proc/self/environ", jpeg.getvalue())
        answers = pipe([("look", image) for image in images], gen_config=plain(1))
        assert isinstance(answers, list)
        assert answers[0].finish_reason == "length"
        for answer in answers[1:4]:
            assert answer.finish_reason == "error"
            assert "outside of the folder" in str(answer.error_message)
        assert "a JPEG file" in str(answers[4].error_message)
        with pytest.raises(ImageError, match="outside of the folder"):
            pipe.chat(("look", PHOTO))


@pytest.mark.usefixtures("traces_for_children")
def test_a_checkpoint_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMFORGE_CACHE", str(tmp_path / "cache"))
    config = EngineConfig(session_len=1024)
    with pipeline(ORIGINAL / "checkpoint", backend_config=config) as pipe:
        assert pipe("hi", gen_config=plain(2)).generate_token_len == 2  # type: ignore[union-attr]
    (engine,) = (environment.cache_dir() / "engines").iterdir()
    built = (engine / "engine.json").stat().st_mtime_ns
    with pipeline(ORIGINAL / "checkpoint", backend_config=config):
        pass
    assert (engine / "engine.json").stat().st_mtime_ns == built


def test_a_build_that_fails_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT9"]}', "utf-8")
    with pytest.raises(BuildError, match=r"failed: UnsupportedModelError: ") as caught:
        pipeline(tmp_path)
    assert "GPT9" in caught.value.found


def test_the_token_of_an_image_is_written_as_its_family_writes_it(pipe: Pipeline) -> None:
    """It may be generated; the next turn takes what it reads as text that somebody typed."""
    policy = pipe.manifest.prompt

    def images_only(ids: object, logits: np.ndarray) -> np.ndarray:
        del ids
        return np.where(np.arange(logits.shape[-1]) == policy.image_token_id, 0, -np.inf)

    config = GenerationConfig(
        max_new_tokens=2, skip_special_tokens=False, logits_processors=[images_only]
    )
    session = pipe.chat("Say it.", gen_config=config)
    assert session.response.text.split() == 2 * [policy.image_placeholder]
    session = pipe.chat("Again.", session=session, gen_config=GenerationConfig(max_new_tokens=1))
    assert session.response.generate_token_len == 1
