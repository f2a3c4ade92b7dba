"""A later turn runs what is new: tokens reused are as a brute-force count of beginnings says."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stand_in import Parts, plain, png, stand_in
from vlmforge import Pipeline, Response, Session

Turn = tuple[str, list[int]]
"""The text, and the seeds of its pictures."""

Content = list[tuple[int, int]]
"""Of each token: (-1, id), or a picture's seed and which of its rows."""


def content(pipe: Pipeline, messages: list[dict[str, object]], seeds: list[int]) -> Content:
    rendered = pipe.render(messages)
    found = [(-1, token) for token in rendered.token_ids]
    for span in rendered.image_spans:
        rows = [(seeds[span.image], row) for row in range(span.length)]
        found[span.start : span.start + span.length] = rows
    return found


def asked(text: str, seeds: list[int]) -> dict[str, object]:
    urls = ["data:image/png;base64," + base64.b64encode(png(seed)).decode() for seed in seeds]
    blocks = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*blocks, {"type": "text", "text": text}]}


def common(first: Content, second: Content) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


def check(turns: list[Turn], tokens: int) -> list[tuple[int, int]]:
    """Tokens reused and run anew by each turn of one session, if they are as counted here."""
    parts, found = Parts(1), list[tuple[int, int]]()
    messages, seeds, before = list[dict[str, object]](), list[int](), Content()
    with stand_in(parts, slots=1) as pipe:
        session = Session()
        for text, pictures in turns:
            messages.append(asked(text, pictures))
            seeds += pictures
            prompt = content(pipe, messages, seeds)
            pipe.chat((text, [png(seed) for seed in pictures]), session, plain(tokens))
            answer = session.response
            assert answer is not None
            assert answer.input_token_len == len(prompt)
            # The last token of a prompt is run in any case: its logits are needed.
            reused = min(common(before, prompt), len(prompt) - 1)
            assert answer.cached_tokens == reused
            found.append((reused, len(prompt) - reused))
            # The last token of an answer is chosen, and not run.
            before = [*prompt, *((-1, token) for token in answer.token_ids[:-1])]
            messages.append({"role": "assistant", "content": answer.text})
        assert parts.calls["encode"] == len(set(seeds))
    return found


TURNS = st.tuples(
    st.sampled_from(["look", "and", "a b c"]), st.lists(st.integers(0, 3), max_size=2)
)


@settings(max_examples=15)
@given(st.lists(TURNS, min_size=1, max_size=4), st.integers(1, 4))
def test_what_is_reused_is_as_counted(turns: list[Turn], tokens: int) -> None:
    check(turns, tokens)


@pytest.mark.parametrize("second", [[], [2]], ids=["the same picture", "a second picture"])
def test_the_first_picture_is_never_run_again(second: list[int]) -> None:
    (_, all_of_it), (reused, _) = check([("look", [1]), ("and", second)], tokens=3)
    assert reused >= all_of_it - 1


def test_of_the_same_prompt_the_last_token_is_run() -> None:
    with stand_in(slots=1) as pipe:
        first, again = (pipe(("look", png(1)), plain(1)) for _ in range(2))
    assert isinstance(first, Response)
    assert isinstance(again, Response)
    assert (first.cached_tokens, again.cached_tokens) == (0, again.input_token_len - 1)
    assert first.text == again.text
