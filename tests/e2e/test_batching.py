"""A batch gives what single calls give, and nobody in it waits for or recomputes anything."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from conftest import IMAGES, wait_until
from stand_in import at_once, planned_steps
from vlmforge import EngineConfig, GenerationConfig, Pipeline, VisionConfig, pipeline
from vlmforge.api.load import serve
from vlmforge.backends import DecoderBatch
from vlmforge.runner.stages import Engine

PHOTO, TALL, GRAY = (
    str(IMAGES / name) for name in ("photo_640x480.png", "tall_300x900.png", "gray_257x191.png")
)
PROMPTS: list[object] = [
    "Write one line about cats.",
    ("What is shown in this image?", PHOTO),
    ("Compare these.", [TALL, GRAY]),
    "hi",
    ("What is shown in this image?", GRAY),
    [{"role": "user", "content": [{"type": "text", "text": "And now?"}]}],
    ("Three of them: which is the tallest?", [PHOTO, TALL, GRAY]),
    ("What is shown in this image?", PHOTO),
]
# Different lengths, so that sequences end at different times.
CONFIGS = [GenerationConfig(max_new_tokens=n) for n in (24, 3, 17, 1, 9, 12, 5, 20)]


def open_pipe(engine: Path, **fields: object) -> Pipeline:
    vision = VisionConfig(max_batch_size=int(str(fields.pop("vision", 1))))
    config = EngineConfig(**fields)  # type: ignore[arg-type]
    return pipeline(engine, backend_config=config, vision_config=vision)


@pytest.fixture(scope="module")
def singles(hf_engine: Path) -> list[list[int]]:
    """What each prompt gives alone, with nothing cached."""
    with open_pipe(hf_engine, max_batch_size=1, enable_prefix_caching=False) as pipe:
        return [
            pipe(prompt, gen_config=config).token_ids  # type: ignore[union-attr]
            for prompt, config in zip(PROMPTS, CONFIGS, strict=True)
        ]


def test_the_singles_are_of_use(singles: list[list[int]]) -> None:
    assert len({tuple(ids) for ids in singles}) >= 6
    assert max(map(len, singles)) >= 12


@pytest.mark.parametrize(
    "fields",
    [
        {"max_batch_size": 8},
        {"max_batch_size": 2, "threads": 2},
        {"max_batch_size": 1},
        {"max_batch_size": 3, "enable_prefix_caching": False},
        {"max_batch_size": 8, "max_prefill_token_num": 37, "vision": 4},
    ],
    ids=str,
)
def test_batches_in_any_order_equal_singles(
    hf_engine: Path, singles: list[list[int]], fields: dict[str, object]
) -> None:
    with open_pipe(hf_engine, **fields) as pipe:
        for seed in range(3):
            order = random.Random(seed).sample(range(len(PROMPTS)), len(PROMPTS))
            responses = pipe([PROMPTS[i] for i in order], gen_config=[CONFIGS[i] for i in order])
            assert isinstance(responses, list)
            assert [r.index for r in responses] == list(range(len(order)))
            assert [r.token_ids for r in responses] == [singles[i] for i in order]


@pytest.mark.parametrize(("fields", "spare"), [({}, 0), ({"max_prefill_token_num": 37}, 9)])
def test_a_cache_that_is_too_small_makes_sequences_wait_and_changes_no_token(
    hf_engine: Path, singles: list[list[int]], fields: dict[str, int], spare: int
) -> None:
    """Who came last gives up its place, pictures included, and is computed again later."""
    with open_pipe(hf_engine, max_batch_size=4) as pipe:
        longest = max(pipe.count_tokens(prompt) for prompt in PROMPTS) + 24
        options = structs.replace(
            pipe._engine.options, block_size=16, budget=-(-longest // 16) + spare
        )
        engine = dataclasses.replace(pipe._engine, options=options)
        runs = Counting(engine)
        engine = dataclasses.replace(engine, decoder=runs)
        with serve(engine, EngineConfig(**fields), VisionConfig()) as small:
            runs.begin_with(len(PROMPTS), small)
            responses = small(PROMPTS[::-1], gen_config=CONFIGS[::-1])
        assert isinstance(responses, list)
        assert [r.token_ids for r in responses] == singles[::-1]
        least = sum(r.input_token_len - r.cached_tokens + len(r.token_ids) - 1 for r in responses)
        assert sum(rows * tokens for rows, tokens in runs.runs) > least  # some were run twice


def test_one_bad_item_leaves_its_siblings_alone(hf_engine: Path, singles: list[list[int]]) -> None:
    with open_pipe(hf_engine) as pipe:
        prompts = [PROMPTS[0], ("look", "no/such/file.png"), PROMPTS[1], 42]
        configs = [CONFIGS[0], None, CONFIGS[1], None]
        responses = pipe(prompts, gen_config=configs)
    assert isinstance(responses, list)
    assert [r.finish_reason for r in responses][1::2] == ["error", "error"]
    assert [responses[0].token_ids, responses[2].token_ids] == singles[:2]
    assert "no/such/file.png" in str(responses[1].error_message)


class Counting:
    """A decoder session that notes what it runs: (rows, tokens of each)."""

    def __init__(self, engine: Engine) -> None:
        self.inner, self.runs = engine.decoder, []
        self.before_all: Callable[[], None] = lambda: None
        self.move = self.inner.move

    def begin_with(self, jobs: int, pipe: Pipeline) -> None:
        """Nothing is run before so many have come: some may be late."""
        handed, loop = list[object](), pipe._scheduler
        submit = loop.submit
        loop.submit = lambda job: handed.append(submit(job))  # type: ignore[method-assign]
        self.before_all = lambda: wait_until(lambda: len(handed) == jobs)

    def stand_in(self, pipe: Pipeline) -> None:
        """All that this pipeline runs from now on is run here; it gives logits only."""
        for name, value in (("decoder", self), ("_sparing", None)):
            object.__setattr__(pipe._engine, name, value)

    def step(self, batch: DecoderBatch) -> np.ndarray:
        if not self.runs:
            self.before_all()
        self.runs.append(batch.input_ids.shape)
        return self.inner.step(batch)


@pytest.fixture
def counted(hf_engine: Path) -> Iterator[tuple[Pipeline, Counting]]:
    with open_pipe(hf_engine, max_batch_size=4) as pipe:
        counting = Counting(pipe._engine)
        counting.stand_in(pipe)
        yield pipe, counting


def test_no_token_is_run_twice(counted: tuple[Pipeline, Counting]) -> None:
    pipe, counting = counted
    config = GenerationConfig(max_new_tokens=10, ignore_eos=True)
    for prompt in (PROMPTS[1], PROMPTS[2], PROMPTS[1]):
        counting.runs.clear()
        response = pipe(prompt, gen_config=config)
        run = sum(rows * tokens for rows, tokens in counting.runs)
        # Every generated token but the last is run once, and so is what was not in the cache.
        assert run == response.input_token_len - response.cached_tokens + 10 - 1
    assert response.cached_tokens == response.input_token_len - 1


def test_decoding_runs_as_one_batch(counted: tuple[Pipeline, Counting]) -> None:
    pipe, counting = counted
    config = GenerationConfig(max_new_tokens=60, ignore_eos=True)
    counting.begin_with(4, pipe)
    pipe(["a cat", "a dog", "a bird", "a cow"], gen_config=config)
    assert max(rows for rows, tokens in counting.runs if tokens == 1) == 4
    assert len(counting.runs) < 80  # one after the other would be some 240, and together 60


def test_a_finished_sequence_does_not_hold_the_others(hf_engine: Path) -> None:
    with open_pipe(hf_engine, max_batch_size=2) as pipe:
        counting = Counting(pipe._engine)
        counting.stand_in(pipe)
        counting.begin_with(4, pipe)
        lengths = [300, 2, 2, 2]
        configs = [GenerationConfig(max_new_tokens=n, ignore_eos=True) for n in lengths]
        ends = [
            piece.index
            for piece in pipe.stream_infer([f"prompt {n}" for n in range(4)], configs)
            if piece.finish_reason is not None
        ]
    # The long one keeps its slot; the short ones pass through the other.
    assert ends[-1] == 0
    assert sorted(ends) == [0, 1, 2, 3]


def test_the_second_turn_runs_only_its_own_tokens(counted: tuple[Pipeline, Counting]) -> None:
    pipe, _ = counted
    config = GenerationConfig(max_new_tokens=6)
    session = pipe.chat(("What is shown?", PHOTO), gen_config=config)
    first = session.response
    session = pipe.chat("Are you sure?", session=session, gen_config=config)
    assert session.response.cached_tokens >= first.input_token_len - 1
    assert session.response.timings.cached_images == 1


def test_short_prompts_that_come_at_once_run_in_one_step(
    hf_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = planned_steps(monkeypatch)
    texts = ["red", "a circle", "what is it?"]
    generation = GenerationConfig(max_new_tokens=4, ignore_eos=True)
    with pipeline(hf_engine, EngineConfig(max_batch_size=4)) as pipe:
        found = at_once(pipe, texts, generation)
        together = [len(step.prompts) for step in steps if step.prompts]
        alone = [at_once(pipe, [text], generation)[0] for text in texts]
    assert together == [3]
    assert [one.token_ids for one in found] == [one.token_ids for one in alone]
