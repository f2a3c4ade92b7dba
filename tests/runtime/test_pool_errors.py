"""What goes wrong in steps of several prompts, and of a decoder that chooses tokens itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from stand_in import Parts, at_once, plain, stand_in
from vlmforge import EngineConfig, Pipeline, VisionConfig
from vlmforge.api.load import serve
from vlmforge.backends import DecoderBatch, FloatArray
from vlmforge.backends.choice import Choice, Picked
from vlmforge.errors import EngineStepError
from vlmforge.outputs.token_generator import TokenGenerator
from vlmforge.runner.stages import Engine

TEXTS = ["a", "b c d", "e f", "g h i j k"]


class PoolParts(Parts):
    """With rows of several lengths, and a choice of its own."""

    chooses = True

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.widths: list[int] = []
        self.choices: list[Choice | None] = []

    def step(self, batch: DecoderBatch) -> FloatArray:
        if batch.lengths is None:
            return super().step(batch)
        self.widths.append(len(batch.lengths))
        found = []
        for row, length in enumerate(batch.lengths):
            one = structs.replace(
                batch,
                slots=batch.slots[row : row + 1],
                input_ids=batch.input_ids[row : row + 1, :length],
                past_lengths=batch.past_lengths[row : row + 1],
                logits_indices=batch.logits_indices[row : row + 1],
                lengths=None,
            )
            assert not batch.input_ids[row, length:].any()
            found.append(super().step(one))
        return np.concatenate(found)

    def choose(
        self, batch: DecoderBatch, choices: Sequence[Choice | None]
    ) -> Sequence[Picked | FloatArray]:
        self.choices += choices
        logits = self.step(batch)[:, 0]
        return [
            row if choice is None else Picked(int(row.argmax()))
            for row, choice in zip(logits, choices, strict=True)
        ]


@pytest.fixture
def parts() -> PoolParts:
    return PoolParts(4)


@pytest.fixture
def pipe(parts: PoolParts) -> Iterator[Pipeline]:
    """All prompts of a call that waits are run in one step."""
    with stand_in(parts, slots=4) as made:
        options = structs.replace(made._engine.options, prompts=4, apart=False, packs=False)
        engine = dataclasses.replace(made._engine, options=options)
        with serve(engine, EngineConfig(), VisionConfig()) as opened:
            yield opened


def answers(pipe: Pipeline, **fields: Any) -> list[list[int] | None]:
    found = at_once(pipe, TEXTS, plain(5, **fields))
    return [None if one.error_code else one.token_ids for one in found]


def test_prompts_in_one_step_answer_as_alone(pipe: Pipeline, parts: PoolParts) -> None:
    alone = [pipe(text, gen_config=plain(5)).token_ids for text in TEXTS]  # type: ignore[union-attr]
    assert parts.widths == []
    assert answers(pipe) == alone
    assert parts.widths == [len(TEXTS)]


def test_a_step_of_prompts_that_fails_ends_these(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = Engine.prefill_together, list[int]()

    def fails_once(engine: Engine, given: Sequence[Any]) -> FloatArray:
        sizes.append(len(given))
        if len(sizes) == 1:
            raise RuntimeError("bad_alloc")
        return real(engine, given)

    whole = answers(pipe)
    monkeypatch.setattr(Engine, "prefill_together", fails_once)
    found = answers(pipe)
    assert sizes[0] == len(TEXTS) == found.count(None)
    assert answers(pipe) == whole


def test_a_choice_that_cannot_be_told_ends_its_own_request(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = {"top_k": 5, "random_seed": 1}
    whole, real = answers(pipe, **sampled), TokenGenerator.choice

    def fails(generator: TokenGenerator) -> Choice | None:
        if generator._caller.index == 2:
            raise RuntimeError("no choice")
        return real(generator)

    monkeypatch.setattr(TokenGenerator, "choice", fails)
    found = at_once(pipe, TEXTS, plain(5, **sampled))
    assert [i for i, one in enumerate(found) if one.error_code] == [2]
    assert found[2].error_code == EngineStepError.code
    assert [one.token_ids for i, one in enumerate(found) if i != 2] == [
        one for i, one in enumerate(whole) if i != 2
    ]


def test_who_wants_logits_gets_them_and_others_tell_their_choice(
    pipe: Pipeline, parts: PoolParts
) -> None:
    likeliest = plain(3)
    wanted = plain(3, top_k=5, random_seed=1, output_logits="generation")
    drawn = plain(3, top_k=5, top_p=0.5, temperature=0.7, random_seed=1)
    found = at_once(pipe, TEXTS[:3], [likeliest, wanted, drawn])
    assert [one.logits is not None for one in found] == [False, True, False]
    given = {None if one is None else one.numbers[:4] for one in parts.choices}
    size = float(pipe._engine.manifest.decode.vocab_size)
    assert given == {None, (1.0, size, 1.0, 0.0), (0.7, 5, 0.5, 0.0)}
