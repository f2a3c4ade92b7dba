"""Tokens chosen by the graph, from the numbers of the host's sampler, are those that it chooses.

The graph runs as an engine's does: bound by address on the stand-in for a GPU, captured, with rows
that other sequences have. The host's sampler is tested by itself (`test_sampling.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from numpy.typing import NDArray

from vlmforge.backends.choice import Choice, Picked
from vlmforge.backends.cuda.choosing import MOST_EDITS, TokenSampler
from vlmforge.backends.fake import HostDevice, HostMemory
from vlmforge.errors import ConfigError, EngineError
from vlmforge.outputs.sampling import Sampler, SamplingParams
from vlmforge_builder.chain_file import save_segments
from vlmforge_builder.passes import sample_token as graph
from vlmforge_builder.passes.sample_token import sample_token

ROWS = 4
SMALL, LARGE = 61, 3000


@cache
def sampler(vocab_size: int, candidates: int = graph.CANDIDATES) -> tuple[TokenSampler, HostMemory]:
    """The graph on the stand-in, and where its logits are put."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(graph, "CANDIDATES", candidates)
        (segment,) = save_segments([sample_token(vocab_size)], "sample", Path(folder))
        device = HostDevice()
        made = TokenSampler(device, device.segment(Path(folder) / segment.file), segment, ROWS)
    return made, device.allocate(4 * ROWS * vocab_size)


def chosen(
    logits: Sequence[NDArray[np.float32]],
    choices: Sequence[Choice | None],
    candidates: int = graph.CANDIDATES,
) -> list[Picked | None]:
    made, memory = sampler(len(logits[0]), candidates)
    rows = np.full((ROWS, len(logits[0])), np.nan, np.float32)  # of sequences that are not there
    rows[: len(logits)] = logits
    made._device.upload(memory.address, rows)
    frame = made.prepare(ROWS, memory.address, choices)
    made.run(frame)
    return made.found(frame, choices)


def drawn_logits(seed: int, vocab_size: int, grain: float) -> NDArray[np.float32]:
    """Logits of which many are equal, as those of 16 bits are."""
    values = np.random.default_rng(seed).standard_normal(vocab_size) * 4
    return (np.round(values / grain) * grain).astype(np.float32)


@st.composite
def settings_of_requests(draw: st.DrawFn) -> SamplingParams:
    greedy = draw(st.sampled_from([False, False, False, True]))
    return SamplingParams(
        greedy=greedy,
        temperature=draw(st.sampled_from([0.05, 0.6, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 40, 60, SMALL, 5000])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.0, 0.01, 0.5, 0.8, 0.999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.7, -0.3])),
        seed=draw(st.integers(0, 99)),
        bad_words=draw(st.sampled_from([(), ((3,), (7,)), ((1, 2),)])),
        held_ids=(0,),
        min_new_tokens=draw(st.sampled_from([0, 2])),
        logprobs=draw(st.sampled_from([0, 0, 1, 5, 20])),
    )


@settings(max_examples=120)
@given(
    st.lists(settings_of_requests(), min_size=1, max_size=ROWS),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 0.25, 1e-6]),
    st.sampled_from([SMALL, SMALL, 300]),
)
def test_it_chooses_as_the_host_does(
    asked: list[SamplingParams], seed: int, grain: float, vocab_size: int
) -> None:
    by_host = [Sampler(params, vocab_size, (5, 9, 9)) for params in asked]
    by_graph = [Sampler(params, vocab_size, (5, 9, 9)) for params in asked]
    for step in range(4):
        logits = [drawn_logits(seed + 7 * step + r, vocab_size, grain) for r in range(len(asked))]
        found = chosen(logits, [one.choice() for one in by_graph])
        for row, picked in enumerate(found):
            assert picked is not None
            wanted = by_host[row].step(logits[row])
            token = by_graph[row].step(picked)
            assert token.id == wanted.id
            assert list(token.top_logprobs or ()) == list(wanted.top_logprobs or ())
            if wanted.top_logprobs is not None and token.top_logprobs is not None:
                values = [[*top.values()] for top in (token.top_logprobs, wanted.top_logprobs)]
                np.testing.assert_allclose(*values, atol=1e-12)


NUCLEUS = SamplingParams(greedy=False, top_p=0.95, seed=4)


def test_more_candidates_than_it_looks_at_are_left_to_the_host() -> None:
    """Whose number is the one that was drawn, however often it is asked for."""
    sharp, flat = drawn_logits(1, LARGE, 1e-6), np.zeros(LARGE, np.float32)
    wide = structs.replace(NUCLEUS, top_k=65)
    of_graph, of_host = Sampler(NUCLEUS, LARGE), Sampler(NUCLEUS, LARGE)
    for logits in (sharp * 5, flat, sharp * 5):
        choice = of_graph.choice()
        assert of_graph.choice() == choice
        (picked,) = chosen([logits], [choice], candidates=64)
        assert (picked is None) is (logits is flat)
        assert of_graph.step(logits if picked is None else picked) == of_host.step(logits)
    assert chosen([sharp], [Sampler(wide, LARGE).choice()], candidates=64) == [None]
    assert chosen(
        [sharp], [Sampler(structs.replace(wide, top_k=64), LARGE).choice()], candidates=64
    ) != [None]


def test_without_limits_every_token_may_be_drawn() -> None:
    """In the order of ids, by blocks, as the host does over all."""
    params = SamplingParams(greedy=False, seed=8)
    of_graph, of_host = Sampler(params, LARGE), Sampler(params, LARGE)
    logits = drawn_logits(2, LARGE, 1e-6) / 4
    found = set()
    for _ in range(40):
        (picked,) = chosen([logits], [of_graph.choice()], candidates=64)
        assert picked is not None
        token = of_host.step(logits)
        assert of_graph.step(picked) == token
        found.add(token.id // graph._BLOCK)
    assert len(found) > LARGE // graph._BLOCK // 2


def test_the_ends_of_what_may_be_drawn() -> None:
    """Tokens without weight are never drawn, whatever the number is."""
    logits = np.full(SMALL, -1e4, np.float32)
    logits[[4, 50]] = 0.0
    for number, token in ((0.0, 4), (0.49, 4), (0.51, 50), (float(np.nextafter(1, 0)), 50)):
        for top_p in (1.0, 0.9999):
            choice = Choice((0.5, SMALL, top_p, 0.0, number))
            assert chosen([logits], [choice]) == [Picked(token)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error_of_the_engine(bad: float) -> None:
    logits = drawn_logits(3, SMALL, 1.0)
    broken = logits.copy()
    broken[17] = bad
    one = Sampler(SamplingParams(logprobs=1), SMALL)
    assert chosen([broken, logits], [one.choice(), one.choice()])[0] is None
    with pytest.raises(EngineError, match="not finite"):
        one.step(broken)


def test_when_everything_is_banned_the_host_says_so() -> None:
    one = Sampler(SamplingParams(bad_words=tuple((i,) for i in range(SMALL))), SMALL)
    logits = drawn_logits(3, SMALL, 1.0)
    assert chosen([logits], [one.choice()]) == [None]
    with pytest.raises(ConfigError, match="banned"):
        one.step(logits)


def test_rows_without_a_choice_and_choices_that_are_too_large() -> None:
    logits = drawn_logits(3, LARGE * 2, 1e-6)
    few = Sampler(SamplingParams(repetition_penalty=1.1), len(logits), range(MOST_EDITS))
    many = Sampler(SamplingParams(repetition_penalty=1.1), len(logits), range(MOST_EDITS + 1))
    told = Sampler(SamplingParams(logprobs=21), len(logits))
    choices = [None, few.choice(), many.choice(), told.choice()]
    found = chosen([logits] * 4, choices)
    assert [one is None for one in found] == [True, False, True, True]
    assert found[1] is not None
    assert few.step(found[1]).id == many.step(logits).id


def test_processors_and_grammars_are_the_hosts() -> None:
    processor = SamplingParams(logits_processors=(lambda ids, logits: logits,))
    assert Sampler(processor, SMALL).choice() is None


def test_no_node_waits_for_the_host() -> None:
    """Shapes are constants: a captured step copies nothing from the host on its way."""
    ops = {node.op_type for node in sample_token(32064).graph}
    assert not ops & {"Shape", "Size", "NonZero", "If", "Loop", "CastLike"}
    # What the GPU's provider has not in this version, and what is told sizes by a copy at each run.
    assert not ops & {"Pad", "Concat", "Split"}
