"""Stopping: whatever the pieces, the text ends where a plain search of the whole says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vlmforge.outputs.stopping import NgramCounter, StopRules, StopScanner

WORDS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)
TEXT = st.text("abc", max_size=24)


def chunked(text: str, cuts: Sequence[int]) -> list[str]:
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]


def first_word(text: str, words: Sequence[str], after: int = 0) -> tuple[int, int] | None:
    """Start and end of the earliest, then longest, word in `text` that ends beyond `after`."""
    found = [
        (start, start + len(word))
        for word in words
        for start in range(len(text))
        if text.startswith(word, start) and start + len(word) > after
    ]
    return min(found, key=lambda span: (span[0], -span[1]), default=None)


def run(rules: StopRules, pieces: Sequence[str]) -> tuple[str, StopScanner]:
    scanner = StopScanner(rules)
    text = "".join([scanner.push(piece) for piece in pieces])
    return text + scanner.finish(), scanner


@given(TEXT, WORDS, st.lists(st.integers(0, 99), max_size=12), st.booleans())
@example("abcd", ["abcd", "bc"], [1, 2, 3], False)
@example("abcx", ["abcd", "bc"], [1, 2, 3], False)
@example("abab", ["ab", "aba"], [1, 2, 3], True)
def test_however_the_text_is_cut_up_it_ends_at_the_first_stop_word(
    text: str, words: list[str], cuts: list[int], include: bool
) -> None:
    rules = StopRules(words=tuple(words), include_stop_str_in_output=include)
    emitted, scanner = run(rules, chunked(text, cuts))
    span = first_word(text, words)
    if span is None:
        assert (emitted, scanner.matched) == (text, None)
    else:
        assert emitted == text[: span[1] if include else span[0]]
        # A longer word that begins at the same place is waited for only if it is to be included.
        assert scanner.matched in words
        assert text[span[0] : span[1]].startswith(scanner.matched)
        assert not include or scanner.matched == text[span[0] : span[1]]


@given(TEXT, WORDS, st.lists(st.integers(0, 99), max_size=12))
def test_the_kept_pieces_are_those_wholly_before_the_cut(
    text: str, words: list[str], cuts: list[int]
) -> None:
    pieces = chunked(text, cuts)
    emitted, scanner = run(StopRules(words=tuple(words)), pieces)
    kept = "".join(pieces[: scanner.kept])
    assert emitted.startswith(kept)
    if scanner.matched is None:
        assert scanner.kept == len(pieces)
    else:
        # Not one piece with text could be kept besides.
        longer = "".join(pieces[: scanner.kept + 1])
        assert longer == kept or len(longer) > len(emitted)
        assert scanner.kept == 0 or pieces[scanner.kept - 1]


@given(TEXT, WORDS, st.lists(st.integers(0, 99), max_size=12))
def test_with_the_word_included_the_kept_pieces_reach_its_end(
    text: str, words: list[str], cuts: list[int]
) -> None:
    pieces = chunked(text, cuts)
    rules = StopRules(words=tuple(words), include_stop_str_in_output=True)
    emitted, scanner = run(rules, pieces)
    assert "".join(pieces[: scanner.kept]).startswith(emitted)
    if scanner.matched is not None:
        assert len("".join(pieces[: scanner.kept - 1])) < len(emitted)


@given(TEXT, WORDS, st.lists(st.integers(0, 99), max_size=12), st.integers(0, 14))
@example("abc", ["ab", "abx", "bc"], [2], 2)
def test_a_word_that_is_complete_before_the_minimum_is_ordinary_text(
    text: str, words: list[str], cuts: list[int], minimum: int
) -> None:
    pieces = chunked(text, cuts)
    emitted, _ = run(StopRules(words=tuple(words), min_new_tokens=minimum), pieces)
    early = len("".join(pieces[: max(0, minimum - 1)]))
    span = first_word(text, words, early)
    assert emitted == (text if span is None else text[: span[0]])


@given(TEXT, WORDS, st.lists(st.integers(0, 99), max_size=12))
def test_text_is_held_back_only_while_it_may_become_a_stop_word(
    text: str, words: list[str], cuts: list[int]
) -> None:
    scanner = StopScanner(StopRules(words=tuple(words)))
    pushed = emitted = ""
    for piece in chunked(text, cuts):
        pushed += piece
        emitted += scanner.push(piece)
        if scanner.matched is None:
            held = pushed[len(emitted) :]
            assert held == "" or any(
                (word.startswith(held) and word != held) or word in held for word in words
            )


def test_an_empty_piece_goes_with_the_text_after_it() -> None:
    """Two bytes of a character have no text; the third has all of it."""
    _, scanner = run(StopRules(words=("é!",)), ["x", "", "", "é", "!"])
    assert scanner.kept == 1
    _, scanner = run(StopRules(words=("é!",)), ["", "é", "!"])
    assert scanner.kept == 0
    _, scanner = run(StopRules(words=("!",)), ["", "é", "!"])
    assert scanner.kept == 2


@given(TEXT, WORDS, st.lists(st.integers(0, 99), max_size=12), st.booleans())
@example("xab", ["ab"], [1, 1], False)
def test_settled_pieces_are_never_taken_away(
    text: str, words: list[str], cuts: list[int], include: bool
) -> None:
    scanner = StopScanner(StopRules(words=tuple(words), include_stop_str_in_output=include))
    settled = [0]
    for piece in chunked(text, cuts):
        let_through = scanner.push(piece)
        settled.append(scanner.settled)
        assert not (let_through and piece == let_through) or scanner.settled
    scanner.finish()
    assert settled == sorted(settled)
    assert settled[-1] <= scanner.kept


def test_pieces_settle_as_their_text_is_let_through() -> None:
    scanner = StopScanner(StopRules(words=("é!",)))
    counts = []
    for piece in ["x", "", "", "é", "a"]:
        scanner.push(piece)
        counts.append(scanner.settled)
    assert counts == [1, 1, 1, 1, 5]


def test_nothing_is_let_through_after_a_match() -> None:
    scanner = StopScanner(StopRules(words=("END",)))
    pieces = ["one E", "N", "D two", " three"]
    assert [scanner.push(piece) for piece in pieces] == ["one ", "", "", ""]
    assert (scanner.finish(), scanner.matched, scanner.kept) == ("", "END", 0)


def test_words_are_literal_text() -> None:
    emitted, scanner = run(StopRules(words=(".*", "###")), ["a b", " .", "* c"])
    assert (emitted, scanner.matched) == ("a b ", ".*")


@given(
    st.lists(st.integers(0, 2), max_size=30),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 12),
)
def test_ngrams_are_counted_by_definition(
    ids: list[int], size: int, threshold: int, minimum: int
) -> None:
    rules = StopRules(ngram_size=size, ngram_threshold=threshold, min_new_tokens=minimum)
    counter = NgramCounter(rules)
    for done, token in enumerate(ids, start=1):
        windows = [ids[i : i + size] for i in range(done - size + 1)]
        repeats = windows.count(ids[done - size : done]) if windows else 0
        assert counter.push(token) == (repeats >= threshold and done >= minimum)


@pytest.mark.parametrize("ids", [[1] * 50, [1, 2] * 25])
def test_no_ngram_rule_never_ends_anything(ids: list[int]) -> None:
    counter = NgramCounter(StopRules())
    assert not any(counter.push(token) for token in ids)
