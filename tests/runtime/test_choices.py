"""`n` answers to one prompt: it is run once, and each of them is as if it were alone."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from stand_in import HANG_S, Gate, Parts, answered, plain, png, stand_in
from vlmforge import GenerationConfig, Response
from vlmforge.errors import ConfigError, EngineStepError, ImageError
from vlmforge.kv.cache import Keys
from vlmforge.kv.slots import SlotCache
from vlmforge.outputs.events import GenOut

PROMPT = ("look at this, and say something about it", png(1))


def drawn(count: int = 12, **fields: Any) -> GenerationConfig:
    """Sampled from many tokens, the logits of which are nearly equal."""
    return plain(count, do_sample=True, top_k=0, temperature=2.0, **fields)


def whole(response: object) -> Response:
    assert isinstance(response, Response)
    return response


def texts(response: Response) -> list[str]:
    return [choice.text for choice in response.choices]


def test_the_prompt_is_run_and_its_image_encoded_once() -> None:
    parts = Parts(4)
    with stand_in(parts, slots=4) as pipe:
        answer = whole(pipe(PROMPT, drawn(6, n=4, random_seed=5)))
        assert parts.calls["encode"] == 1
        assert parts.rows == [1] + [4] * 5
    assert [choice.choice for choice in answer.choices] == [0, 1, 2, 3]
    assert {len(choice.token_ids) for choice in answer.choices} == {6}
    assert {choice.input_token_len for choice in answer.choices} == {answer.input_token_len}
    assert all(choice.timings is not None for choice in answer.choices)
    assert all(not choice.others for choice in answer.others)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("slots", [1, 3, 6])
def test_seeds(slots: int, reuse: bool) -> None:
    """Answer i depends on the seed and i alone: not on n, the slots, or what runs beside it."""
    with stand_in(slots=6) as pipe:
        single = whole(pipe(PROMPT, drawn(random_seed=5)))
        five = texts(whole(pipe(PROMPT, drawn(random_seed=5, n=5))))
        other = texts(whole(pipe(PROMPT, drawn(random_seed=6, n=5))))
    assert five[0] == single.text
    assert len({*five, *other}) == 10
    with stand_in(slots=slots, enable_prefix_caching=reuse) as pipe:
        beside = [("else", png(2)), PROMPT, "other", PROMPT]
        configs = [plain(3), drawn(random_seed=5, n=3), plain(9), drawn(random_seed=6, n=2)]
        found = pipe(beside, configs)
        assert isinstance(found, list)
        assert [texts(found[1]), texts(found[3])] == [five[:3], other[:2]]
        assert [len(answer.choices) for answer in found] == [1, 3, 1, 2]


def test_without_a_seed_each_draws_its_own() -> None:
    with stand_in(slots=3) as pipe:
        assert len(set(texts(whole(pipe(PROMPT, drawn(n=3)))))) == 3


def test_pieces_say_which_answer_they_belong_to() -> None:
    config = drawn(random_seed=5, n=3)
    with stand_in(slots=2) as pipe:
        expected = whole(pipe(PROMPT, config))
        pieces = list(pipe.stream_infer([PROMPT, "b"], [config, plain(2)]))
    gathered = [Response(index=i, session_id=i) for i in range(2)]
    for piece in pieces:
        gathered[piece.index].extend(piece)
    gathered[0].cached_tokens = expected.cached_tokens
    assert texts(gathered[0]) == texts(expected)
    assert [c.token_ids for c in gathered[0].choices] == [c.token_ids for c in expected.choices]
    ends = [(piece.index, piece.choice) for piece in pieces if piece.finish_reason]
    assert sorted(ends) == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_generate() -> None:
    config = drawn(random_seed=5, n=3)

    async def main(stream: bool) -> dict[int, str]:
        found: dict[int, str] = {}
        async for out in pipe.generate(PROMPT, gen_config=config, stream_response=stream):
            assert stream or out.choice not in found
            found[out.choice] = found.get(out.choice, "") + out.response
        return found

    with stand_in(slots=3) as pipe:
        expected = dict(enumerate(texts(whole(pipe(PROMPT, config)))))
        assert asyncio.run(main(True)) == asyncio.run(main(False)) == expected


def test_what_is_reported_of_the_prompt_is_reported_with_each() -> None:
    config = drawn(3, n=2, random_seed=1, output_logits="all", return_ppl=True, logprobs=2)
    with stand_in(slots=2) as pipe:
        answer = whole(pipe("some words", config))
    for choice in answer.choices:
        assert choice.logits is not None
        assert choice.logits.shape[0] == choice.input_token_len + 2
        assert choice.ppl == answer.ppl is not None
        assert len(choice.logprobs or ()) == 3


def test_one_that_ends_early_leaves_the_others() -> None:
    with stand_in(slots=3) as pipe:
        free = whole(pipe(PROMPT, drawn(random_seed=5, n=3)))
        stop = free.choices[1].token_ids[0]
        held = whole(pipe(PROMPT, drawn(random_seed=5, n=3, stop_token_ids=[stop])))
    assert [choice.finish_reason for choice in held.choices] == ["length", "stop", "length"]
    assert texts(held) == [free.text, "", free.choices[2].text]


def test_one_that_fails_leaves_the_others() -> None:
    """The processor fails at the second of the three, whose first token it knows."""
    with stand_in(slots=3) as pipe:
        free = whole(pipe(PROMPT, drawn(random_seed=5, n=3)))
        second = free.choices[1].token_ids[0]

        def processor(ids: list[int], logits: Any) -> Any:
            if ids[-1] == second:
                raise KeyError("mine")
            return logits

        config = drawn(random_seed=5, n=3, logits_processors=[processor])
        found = whole(pipe(PROMPT, config))
        assert [choice.finish_reason for choice in found.choices] == ["length", "error", "length"]
        assert (found.text, found.choices[2].text) == (free.text, free.choices[2].text)
        assert found.choices[1].error_code == "internal_error"
        pieces = [piece for piece in pipe.stream_infer(PROMPT, config) if piece.finish_reason]
        assert {p.choice: p.finish_reason for p in pieces}[1] == "error"


@pytest.mark.parametrize("number", [1, 2])
def test_one_whose_place_cannot_be_made_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calls, fork = list[int](), SlotCache.fork

    def broken(cache: SlotCache, parent: int, child: int, keys: Keys) -> bool:
        calls.append(child)
        if len(calls) == number:
            raise MemoryError
        return fork(cache, parent, child, keys)

    config = drawn(random_seed=5, n=4)
    with stand_in(slots=4) as pipe:
        free = whole(pipe(PROMPT, config))
        with monkeypatch.context() as patched:
            patched.setattr(SlotCache, "fork", broken)
            found = whole(answered(lambda: pipe(PROMPT, config)))
        assert [choice.error_code for choice in found.choices].count("engine_step") == 1
        assert found.choices[number].finish_reason == "error"
        for i, choice in enumerate(found.choices):
            assert choice.text == free.choices[i].text or i == number
        assert texts(whole(pipe(PROMPT, config))) == texts(free)


def test_when_all_fail_one_prompt_raises() -> None:
    def processor(ids: list[int], logits: Any) -> Any:
        raise KeyError("mine")

    with stand_in(slots=3) as pipe, pytest.raises(KeyError, match="mine"):
        pipe(PROMPT, drawn(n=3, logits_processors=[processor]))


def test_what_fails_before_they_part_is_the_prompts() -> None:
    parts = Parts(3)

    def before(name: str, number: int) -> None:
        if name == "encode":
            raise RuntimeError("no memory")

    with stand_in(parts, slots=3) as pipe:
        with pytest.raises(ImageError):
            pipe(("look", b"nothing"), drawn(n=3))
        with pytest.raises(ImageError):
            list(pipe.stream_infer(("look", b"nothing"), drawn(n=3)))
        parts.before = before
        with pytest.raises(EngineStepError, match="this request"):
            answered(lambda: pipe(PROMPT, drawn(n=3)))
        parts.before = lambda name, number: None
        assert len(whole(pipe(PROMPT, drawn(2, n=3))).choices) == 3


@pytest.mark.parametrize("slots", [1, 3])
def test_leaving_a_stream_ends_all(slots: int) -> None:
    parts = Parts(slots)
    with stand_in(parts, slots=slots) as pipe:
        for piece in pipe.stream_infer(PROMPT, drawn(100, n=3, random_seed=5)):
            assert piece.finish_reason is None
            break
        whole(pipe("after", plain(20)))
        seen = len(parts.rows)
        whole(pipe("after", plain(20)))
        assert set(parts.rows[seen:]) == {1}


@pytest.mark.parametrize("end", ["stop_session", "close"])
def test_each_ends_with_what_it_has(end: str) -> None:
    gate, steps = Gate(), list[int]()

    def processor(ids: list[int], logits: Any) -> Any:
        steps.append(len(ids))
        if len(steps) == 3 * 20:
            gate.passed()
        return logits

    async def main() -> dict[int, list[GenOut]]:
        found: dict[int, list[GenOut]] = {0: [], 1: [], 2: []}

        async def stream() -> None:
            async for out in pipe.generate(PROMPT, 7, config):
                found[out.choice].append(out)

        task = asyncio.create_task(stream())
        assert await asyncio.to_thread(gate.reached.wait, HANG_S)
        ending = asyncio.create_task(
            pipe.stop_session(7) if end == "stop_session" else asyncio.to_thread(pipe.close)
        )
        if end == "close":
            while not pipe._scheduler._stopping:
                await asyncio.sleep(0.001)
        else:
            await ending
        gate.open.set()
        await asyncio.gather(task, ending)
        return found

    config = drawn(100, n=3, random_seed=5, logits_processors=[processor])
    with stand_in(slots=3) as pipe:
        found = asyncio.run(main())
    for outs in found.values():
        assert [out.finish_reason for out in outs][-1] == "abort"
        assert sum(len(out.token_ids or ()) for out in outs) == 20
        assert outs[-1].generate_token_len == 20


def test_greedy_answers_are_equal() -> None:
    with stand_in(slots=2) as pipe:
        answer = whole(pipe(PROMPT, plain(n=2)))
    assert answer.text == answer.choices[1].text


def test_a_turn_has_one_answer() -> None:
    with stand_in(slots=2) as pipe, pytest.raises(ConfigError, match="one answer") as caught:
        pipe.chat("hello", gen_config=plain(n=2))
    assert caught.value.found == "chat() with n=2"


def test_numbers_of_numpy_are_numbers() -> None:
    with stand_in(slots=2) as pipe:
        assert len(whole(pipe("hello", plain(2, n=np.int64(3)))).choices) == 3
