"""Slots of one step lie side by side, and every slot keeps its content on the way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vlmforge.backends.rows import Rows


@given(st.data(), st.integers(1, 9))
def test_every_arrangement_is_whole(data: st.DataObject, count: int) -> None:
    rows = Rows(count)
    content = [f"slot {i}" for i in range(count)]  # by row
    before: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        slot = data.draw(st.integers(0, count - 1))
        renewed = rows.renew(slot) if data.draw(st.booleans()) else ()
        for exchange in renewed:
            assert 0 in (exchange.first_tokens, exchange.second_tokens)
            a, b = exchange.first, exchange.second
            content[a], content[b] = content[b], content[a]
        held = data.draw(st.integers(0, 20))
        data.draw(st.sampled_from([rows.set_tokens, rows.leave]))(slot, held)
        assert rows.tokens(slot) == held
        new = st.lists(st.integers(0, count - 1), min_size=1, unique=True)
        asked = data.draw(st.sampled_from(before) | new if before else new)
        before.append(asked)
        arrangement = rows.arrange(asked)
        for exchange in arrangement.exchanges:
            a, b = exchange.first, exchange.second
            content[a], content[b] = content[b], content[a]
        for index, place in enumerate(arrangement.order):
            row = arrangement.first_row + index
            assert content[row] == f"slot {asked[place]}"
            assert rows.row(asked[place]) == row
        assert all(content[rows.row(slot)] == f"slot {slot}" for slot in range(count))
        assert sorted(arrangement.order) == list(range(len(asked)))


def test_what_lies_side_by_side_stays() -> None:
    rows = Rows(6)
    arrangement = rows.arrange([4, 2, 3])
    assert (arrangement.first_row, arrangement.order, arrangement.exchanges) == (2, (1, 2, 0), ())


def test_the_fewest_tokens_are_moved() -> None:
    """A short sequence joins the long ones, wherever they are."""
    rows = Rows(8)
    for slot, tokens in ((5, 900), (6, 800), (0, 3), (7, 0)):
        rows.set_tokens(slot, tokens)
    (exchange,) = rows.arrange([0, 5, 6]).exchanges
    assert {exchange.first_tokens, exchange.second_tokens} == {3, 0}


def test_who_holds_nothing_yet_goes_beside_those_that_run() -> None:
    """So that nothing has to move when it runs with them."""
    rows = Rows(8)
    for slot, tokens in ((2, 50), (3, 40), (4, 9)):
        rows.set_tokens(slot, tokens)
    rows.arrange([2, 3])
    rows.arrange([7])
    rows.set_tokens(7, 600)
    assert rows.arrange([2, 3, 7]).exchanges == ()


def test_who_ran_alone_and_left_does_so_again() -> None:
    rows = Rows(8)
    rows.arrange([7])
    rows.leave(7, 0)
    for slot, tokens in ((2, 50), (3, 40)):
        rows.set_tokens(slot, tokens)
    rows.arrange([2, 3])
    rows.arrange([7])
    rows.set_tokens(7, 600)
    assert rows.arrange([2, 3, 7]).exchanges == ()


def moved(rows: Rows, slots: list[int]) -> list[tuple[int, int]]:
    """The tokens of the rows that an arrangement moves."""
    found = rows.arrange(slots).exchanges
    return [(exchange.first_tokens, exchange.second_tokens) for exchange in found]


def test_sequences_that_begin_and_end_in_turn_stay_side_by_side() -> None:
    """In the order in which they begin: nothing moves when one joins, nor when one ends."""
    rows, left = Rows(8), [3, 0, 6, 5, 1, 2, 7, 4]  # who was used least recently, first
    for slot in range(8):
        rows.set_tokens(slot, 46)
    running: list[int] = []
    for slot in left[:5]:  # as many as there is room for above row 3
        rows.renew(slot)  # a beginning that others have is copied to it
        rows.set_tokens(slot, 36)
        assert moved(rows, [slot]) == []
        rows.set_tokens(slot, 46)
        if running:
            assert moved(rows, running) == []
        running.append(slot)
    while running:
        assert moved(rows, running) == []
        rows.leave(running.pop(0), 78)


def test_nothing_is_moved_for_those_that_have_left() -> None:
    rows = Rows(6)
    for slot in (0, 4, 1):
        assert rows.renew(slot) == ()
        assert moved(rows, [slot]) == []
        rows.leave(slot, 900)


def test_they_do_so_downwards_where_what_is_above_is_long() -> None:
    """And go on so, although it is gone by then."""
    rows = Rows(8)
    for slot in range(8):
        rows.set_tokens(slot, 900 if slot == 5 else 46)
    rows.arrange([4])
    running: list[int] = []
    for place, slot in enumerate((7, 0, 6, 3)):
        rows.renew(slot)
        rows.set_tokens(5, 46)
        rows.set_tokens(slot, 36)
        assert moved(rows, [slot]) == []
        assert rows.row(slot) == 3 - place
        running.append(slot)
    while running:
        assert moved(rows, running) == []
        rows.leave(running.pop(0), 78)


def test_many_tokens_are_not_moved_for_an_order() -> None:
    rows = Rows(6)
    for slot, tokens in ((1, 50), (2, 50), (3, 900), (5, 80)):
        rows.set_tokens(slot, tokens)
    rows.arrange([1, 2])
    (exchange,) = rows.renew(5)
    assert {exchange.first, exchange.second} == {5, 0}  # not where those before it went


def test_what_lay_side_by_side_is_looked_for_again_when_another_moved_it() -> None:
    rows = Rows(5)
    assert rows.arrange([0, 1]) == rows.arrange([0, 1])
    rows.set_tokens(3, 50)
    rows.arrange([1, 3])  # which brings slot 1 to the other
    assert rows.row(1) == 2
    first = rows.arrange([0, 1]).first_row
    assert {rows.row(0), rows.row(1)} == {first, first + 1}
