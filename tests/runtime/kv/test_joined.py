"""Keys that grow: the tokens that came before are not copied, and nobody else's keys change."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vlmforge.kv.cache import NO_KEYS, joined


@given(st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(-9, 9), max_size=9))))
def test_what_is_cut_and_added_is_as_in_a_list(changes: list[tuple[int, list[int]]]) -> None:
    keys, room, expected = NO_KEYS, NO_KEYS, list[int]()
    for kept, more in changes:
        keys, expected = keys[:kept], [*expected[:kept], *more]
        keys, room = joined(keys, more, room)
        assert keys.tolist() == expected


def test_two_that_begin_alike_do_not_share_what_comes_behind() -> None:
    first, room = joined(np.arange(5), (5,), NO_KEYS)
    second, other = joined(first[:3], (7, 8), NO_KEYS)
    first, room = joined(first, (6,), room)
    second, other = joined(second, (9,), other)
    assert first.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert second.tolist() == [0, 1, 2, 7, 8, 9]


def test_a_token_is_written_where_there_is_room() -> None:
    keys, room = joined(np.arange(5), (5,), NO_KEYS)
    longer, same = joined(keys, (6,), room)
    assert same is room
    assert np.shares_memory(keys, longer)
