"""Responses and the time ledger."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmforge.outputs.response import Response, Stage, Stopwatch, Timings

STAGES: tuple[Stage, ...] = (
    "queue",
    "load",
    "preprocess",
    "encode",
    "prefill",
    "decode",
    "other",
)


class Clock:
    """Goes on only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_repr_is_that_of_a_dataclass_with_the_classic_fields() -> None:
    response = Response("a 'tiger'", 3, 600, 0, "stop", [5, 6, 7])
    assert repr(response) == str(response)
    assert repr(response) == (
        """Response(text="a 'tiger'", generate_token_len=3, input_token_len=600, session_id=0, """
        "finish_reason='stop', token_ids=[5, 6, 7], logprobs=None)"
    )


def test_repr_shows_the_rest_briefly_and_only_if_set() -> None:
    response = Response(
        index=2,
        logits=np.zeros((3, 32000), np.float32),
        timings=Timings(prefill=1.5, decode=0.25),
        cached_tokens=576,
        ppl=2.5,
    )
    tail = repr(response).partition("logprobs=None, ")[2]
    assert tail == (
        "logits=<float32 [3, 32000]>, index=2, timings=<1.750 s = queue 0.000 + load 0.000 + "
        "image_wait 0.000 + preprocess 0.000 + encode 0.000 + prefill 1.500 + decode 0.250 + "
        "other 0.000>, "
        "cached_tokens=576, ppl=2.5)"
    )


def test_an_error_shows_its_message() -> None:
    response = Response(finish_reason="error", error_code="invalid_image", error_message="cut")
    assert repr(response).endswith("error_code='invalid_image', error_message='cut')")


def pieces() -> Iterator[Response]:
    yield Response("a", 1, 9, token_ids=[4], logprobs=[{4: -0.1}], cached_tokens=8, ppl=1.5)
    yield Response("b", 2, 9, token_ids=[5, 6], logprobs=[{5: -0.2}, {6: -0.3}])
    yield Response("", 2, 9, finish_reason="stop", timings=Timings(decode=1.0))


def test_pieces_of_a_stream_add_up_to_the_response() -> None:
    whole = Response(session_id=7, index=3)
    given_pieces = list(pieces())
    for piece in given_pieces:
        assert whole.extend(piece) is whole
    assert whole == Response(
        "ab",
        2,
        9,
        7,
        "stop",
        [4, 5, 6],
        [{4: -0.1}, {5: -0.2}, {6: -0.3}],
        index=3,
        cached_tokens=8,
        ppl=1.5,
    )
    assert whole.timings == Timings(decode=1.0)
    assert given_pieces == list(pieces())  # what was merged is as it was


def test_an_error_on_the_way_is_kept_with_the_text_so_far() -> None:
    whole = Response("a", 1, 9, token_ids=[4])
    whole.extend(Response(finish_reason="error", error_code="x", error_message="y"))
    assert (whole.text, whole.token_ids, whole.generate_token_len) == ("a", [4], 1)
    assert (whole.finish_reason, whole.error_code, whole.error_message) == ("error", "x", "y")


def test_logits_are_stacked_and_left_out_of_comparison() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    whole = Response()
    for piece in (rows[:1], rows[1:]):
        whole.extend(Response(logits=piece))
    assert whole.logits is not None
    np.testing.assert_array_equal(whole.logits, rows)
    assert whole == Response()


def test_responses_do_not_share_their_ids() -> None:
    first, second = Response(), Response()
    first.token_ids.append(1)
    assert second.token_ids == []


STEP = st.tuples(
    st.sampled_from(["switch", "block", "split"]), st.sampled_from(STAGES), st.integers(0, 8)
)


@given(st.lists(STEP, max_size=12))
def test_the_stages_tile_the_wall_time(steps: list[tuple[str, Stage, int]]) -> None:
    """Each second belongs to the stage that a simple account says, and to no other."""
    clock = Clock()
    watch = Stopwatch(clock)
    account: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
    current: Stage = "other"
    for kind, stage, seconds in steps:
        if kind == "switch":
            watch.switch(stage)
            current = stage
        elif kind == "block":
            with watch.stage(stage):
                clock.now += seconds
            account[stage] += seconds
        else:
            clock.now += seconds + 1
            watch.split({stage: seconds})
            account[stage] += seconds
            account[current] += 1
        clock.now += 0.5
        account[current] += 0.5
    timings = watch.timings(cached_prefix_tokens=3, cached_images=1)
    assert {stage: getattr(timings, stage) for stage in STAGES} == account
    assert timings.total == clock.now - 1000.0
    assert (timings.cached_prefix_tokens, timings.cached_images) == (3, 1)


def test_a_block_within_a_block_is_charged_once_and_an_error_ends_it() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    with pytest.raises(KeyError), watch.stage("load"):
        clock.now += 1
        with watch.stage("preprocess"):
            clock.now += 2
        clock.now += 4
        raise KeyError
    clock.now += 8
    timings = watch.timings()
    assert (timings.load, timings.preprocess, timings.other) == (5, 2, 8)


def test_the_real_clock_only_goes_forward() -> None:
    watch = Stopwatch()
    first, second = watch.timings(), watch.timings()
    assert 0 <= first.total <= second.total


def test_every_stage_counts_in_the_total() -> None:
    assert Timings(1, 2, 4, 8, 16, 32, 64, cached_prefix_tokens=128, cached_images=256).total == 127
