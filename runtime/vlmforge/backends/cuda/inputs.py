"""What is uploaded of a batch: each sequence in a row, or all of them packed in one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from vlmforge.backends import DecoderBatch, IntArray
from vlmforge.backends.cuda.frames import PAST
from vlmforge.engine.interface import (
    INPUT_IDS,
    LOGITS_INDICES,
    PAST_LENGTHS,
    QUERY_LENGTHS,
    ROTARY_LEVELS,
    TURNS,
)


def new_tokens(batch: DecoderBatch) -> IntArray:
    """How many each sequence has, `[B]`."""
    rows, tokens = batch.input_ids.shape
    return np.full(rows, tokens, np.int64) if batch.lengths is None else batch.lengths


def totals(batch: DecoderBatch) -> IntArray:
    """How many tokens each sequence has with the new ones, `[B]`."""
    return batch.past_lengths + new_tokens(batch)


def first_places(batch: DecoderBatch) -> IntArray:
    """Where the first new token of each sequence lies, if they lie one behind the other `[B]`."""
    new = new_tokens(batch)
    return np.cumsum(new) - new


def put(views: Mapping[str, NDArray[Any]], batch: DecoderBatch, *, packed: bool) -> None:
    """Put the numbers of a batch where they are uploaded from, and zeros behind them.

    All but features and pages. `packed`: tokens lie one behind the other in the only row.
    """
    new = new_tokens(batch)
    given: dict[str, NDArray[Any]] = {PAST.name: batch.past_lengths, QUERY_LENGTHS.name: new}
    if not packed:
        given[PAST_LENGTHS.name] = batch.past_lengths
        given[ROTARY_LEVELS.name] = _or_nothing(batch.rotary_levels)
        given |= _of_tokens(batch)
    for name, values in given.items():
        if name in views:
            _fill(views[name], values)
    for name, values in _of_tokens(batch).items() if packed else ():
        if name in views:
            _fill(views[name][0], _in_a_row(name, values, batch))


def runs(ahead: IntArray) -> Iterator[tuple[int, int, int]]:
    """Rows whose tokens come from rows that lie side by side: the first of both, how many."""
    row, end = 0, len(ahead)
    while row < end:
        first, source = row, int(ahead[row])
        row += 1
        while source >= 0 and row < end and ahead[row] == source + row - first:
            row += 1
        if source >= 0:
            yield first, source, row - first


def _or_nothing(values: IntArray | None) -> IntArray:
    return np.zeros(0, np.int64) if values is None else values


def _of_tokens(batch: DecoderBatch) -> dict[str, NDArray[Any]]:
    """What there is for each token, by name, a row for each sequence."""
    given: dict[str, NDArray[Any]] = {INPUT_IDS.name: batch.input_ids}
    if batch.logits_indices.shape[1]:
        given[LOGITS_INDICES.name] = batch.logits_indices
    if batch.turns is not None:
        given[TURNS] = batch.turns
    return given


def _in_a_row(name: str, values: NDArray[Any], batch: DecoderBatch) -> NDArray[Any]:
    """The rows of `values` one behind the other, of each its new ones; places all move along."""
    if name == LOGITS_INDICES.name:
        places: NDArray[Any] = values + first_places(batch)[:, None]
        return places.reshape(-1)
    found: NDArray[Any] = values[np.arange(values.shape[1]) < new_tokens(batch)[:, None]]
    return found


def _fill(view: NDArray[Any], values: NDArray[Any]) -> None:
    view[: len(values)] = values
    view[len(values) :] = 0


def each_token(batch: DecoderBatch) -> Iterator[DecoderBatch]:
    """A step for each token of a batch, with the logits after it."""
    for place in range(batch.input_ids.shape[1]):
        one = slice(place, place + 1)
        yield structs.replace(
            batch,
            input_ids=batch.input_ids[:, one],
            past_lengths=batch.past_lengths + place,
            logits_indices=np.zeros((len(batch.input_ids), 1), np.int64),
            turns=None if batch.turns is None else batch.turns[:, one],
        )
