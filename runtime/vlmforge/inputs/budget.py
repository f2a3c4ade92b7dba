"""How much work a chat template may do. Work is counted, not timed: it ends at the same place
everywhere.

A unit is about what one operation of the template costs. Values are measured by what it takes to
write them out, compare or hash them: what is shared between lists counts wherever it occurs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, ValuesView
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import ContextVar

import jinja2
from msgspec import Struct

MOST_WORK = 2_000_000
"""Units of work of one rendering, beside what its input allows for."""

OPERATION = 10
"""Units of a call, a filter, a test, a comparison, or a turn of a loop."""

_WORK_PER_INPUT = 40
_CHARACTERS_PER_UNIT = 4
_PER_ITEM = 16
_MOST_CHARACTERS = 16_000_000
_MOST_ITEMS = 500_000
_MOST_DEPTH = 100
_MAPPINGS = (dict, Mapping)  # the first one is told quickly
_CONTAINERS = (list, tuple, *_MAPPINGS, AbstractSet, ValuesView)
_PLAIN = frozenset((str, int, bool, float, type(None)))
"""The types of most values; what they hold is told without asking whether they are containers."""


class TemplateLimitError(jinja2.TemplateError):
    """A template asks for more than it may have; the message says what it did."""


class _Budget(Struct):
    """Of one rendering.

    Attributes:
        left: Units.
        given: Its input, for which there is more; measured when that is needed, once.
    """

    left: int
    given: object

    def overdrawn(self) -> bool:
        """Whether nothing is left, with what the input allows for."""
        given, self.given = self.given, None
        if given is not None:
            self.left += _WORK_PER_INPUT * work_of(given)
        return self.left < 0


_BUDGET: ContextVar[_Budget] = ContextVar("vlmforge_template_budget")


@contextmanager
def limited(given: object = None) -> Iterator[None]:
    """Count the work of the block; `given` is its input, with which what it may do grows."""
    token = _BUDGET.set(_Budget(MOST_WORK, given))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def spend(work: int, what: str) -> None:
    """Count `work` units, done by `what` (TemplateLimitError: there are none left)."""
    budget = _BUDGET.get()
    budget.left -= abs(work)
    if budget.left < 0 and budget.overdrawn():
        raise TemplateLimitError(f"{what} takes too much work (more than {MOST_WORK} operations)")


def work_of(*values: object) -> int:
    """Units of work that writing, comparing or hashing `values` takes."""
    work = len(values)
    for value in values:  # mostly one, a text
        size = len(value) if type(value) is str else size_of(value)
        work += size // _CHARACTERS_PER_UNIT
    return work


def text_work(characters: int) -> int:
    """Units of work of making a text of that length (TemplateLimitError: it is too long)."""
    if characters > _MOST_CHARACTERS:
        raise TemplateLimitError(f"a text of {characters} characters; at most {_MOST_CHARACTERS}")
    return characters // _CHARACTERS_PER_UNIT


def size_of(value: object) -> int:
    """Characters of texts and digits in a value; an item of a list counts as 16 more.

    Raises:
        TemplateLimitError: it is too large, or too deeply nested.
    """
    if isinstance(value, str | bytes):
        return len(value)
    total, items, level = 0, 0, [value]
    for _ in range(_MOST_DEPTH):
        below: list[object] = []
        for item in level:
            total += _PER_ITEM
            if type(item) is str:  # mostly
                total += len(item)
                continue
            if item is None or type(item) is bool:
                continue
            total += _own_size(item)
            if type(item) in _PLAIN:
                continue
            items += _length(item)
            if items > _MOST_ITEMS:
                raise TemplateLimitError(f"a value of more than {_MOST_ITEMS} items")
            below += _children(item)
        if not below:
            return total
        level = below
    raise TemplateLimitError(f"a value that is nested more than {_MOST_DEPTH} deep")


def _own_size(value: object) -> int:
    if isinstance(value, str | bytes | range):
        return len(value)
    return value.bit_length() // 3 if isinstance(value, int) else 0


def _length(value: object) -> int:
    return 2 * len(value) if isinstance(value, _CONTAINERS) else 0


def _children(value: object) -> list[object]:
    if isinstance(value, list | tuple):
        return [*value]
    if isinstance(value, _MAPPINGS):
        return [*value.keys(), *value.values()]
    return [*value] if isinstance(value, _CONTAINERS) else []
