"""What the operators, methods, filters and tests of a chat template may do, and its work, counted
before it is done.

Lists of what is allowed, not of what is not: a new method of Python's `str` is no new hole.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from string import Formatter
from typing import Any

from jinja2.exceptions import SecurityError

from vlmforge.inputs.budget import OPERATION, TemplateLimitError, size_of, spend, text_work, work_of

_MOST_BITS = 4096
_MOST_ARGUMENT = 10_000
_WIDTH = re.compile(r"\d{5,}")

Cost = Callable[..., int]


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Count the work of `left operator right`; TemplateLimitError: its result would be huge."""
    what = f"the operator {operator}"
    if operator == "+" and type(left) is str is type(right):  # mostly
        spend(OPERATION + text_work(len(left) + len(right)), what)
        return
    spend(OPERATION, what)
    for value in (left, right):
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise TemplateLimitError(f"{what} with a number of {value.bit_length()} bits")
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * right > _MOST_BITS:
            raise TemplateLimitError(f"{_shown(left)} ** {_shown(right)}")
    elif operator == "+":
        spend(_length_work(left) + _length_work(right), what)
    elif operator == "*":
        spend(_repeated(left, right) + _repeated(right, left), what)
    elif operator == "%" and isinstance(left, str):
        values = right if isinstance(right, tuple) else (right,)
        spend(_percent(left, *values), what)
    elif operator == "%" and isinstance(left, bytes):
        raise SecurityError("bytes are not formatted")


def _length_work(value: object) -> int:
    if isinstance(value, str | bytes):
        return text_work(len(value))
    return len(value) if isinstance(value, list | tuple) else 0


def _repeated(value: object, times: object) -> int:
    if not isinstance(times, int) or not isinstance(value, str | bytes | list | tuple):
        return 0
    if isinstance(value, str | bytes):
        return text_work(len(value) * max(times, 0))
    return len(value) * max(times, 0)


def _shown(number: int) -> str:
    return str(number) if number.bit_length() < 64 else f"(a number of {number.bit_length()} bits)"


# --- texts that are made by a pattern -----------------------------------------------------------


def _percent(layout: object, *values: object, **named: object) -> int:
    values, layout = (*values, *named.values()), str(layout)
    if "*" in layout or _WIDTH.search(layout):
        raise TemplateLimitError("a format with a width of more than 9999, or one that is computed")
    places = layout.count("%")
    return text_work(len(layout) + places * (_MOST_ARGUMENT + max(map(size_of, values), default=0)))


def _format(layout: str, *values: object, **named: object) -> int:
    fields = [field for field in Formatter().parse(layout) if field[1] is not None]
    if any("{" in (spec or "") or _WIDTH.search(spec or "") for _, _, spec, _ in fields):
        raise TemplateLimitError("a format with a width of more than 9999, or one that is computed")
    largest = max(map(size_of, (*values, *named.values())), default=0)
    return text_work(len(layout) + len(fields) * (_MOST_ARGUMENT + largest))


def _replaced(text: object, old: object, new: object, count: object = None) -> int:
    del count
    if not (isinstance(text, str) and isinstance(old, str) and isinstance(new, str)):
        return work_of(text, old, new)
    return text_work(len(text) + text.count(old) * len(new))


def _joined(separator: str, values: list[object]) -> int:
    return text_work(sum(map(size_of, values)) + len(values) * len(separator))


def _stripped(text: object, characters: object = None) -> int:
    if isinstance(characters, str) and len(characters) > 256:
        raise TemplateLimitError(f"{len(characters)} characters to strip; at most 256")
    return work_of(text)


def _padded(text: object, width: object = 80, fill: object = " ") -> int:
    del fill
    return work_of(text) + (text_work(abs(width)) if isinstance(width, int) else 0)


def _indented(text: object, width: object = 4, first: object = False, blank: object = False) -> int:
    del first, blank
    step = width if isinstance(width, int) else size_of(width)
    return text_work(size_of(text) + (str(text).count("\n") + 1) * abs(step))


def _as_json(
    value: object,
    ensure_ascii: object = False,
    indent: object = None,
    separators: object = None,
    sort_keys: object = False,
) -> int:
    del ensure_ascii, sort_keys
    step = indent if isinstance(indent, int) else size_of(indent or "")
    if step > 16 or size_of(separators or ()) > 96:
        raise TemplateLimitError("tojson with a long indent or long separators")
    return work_of(value) * (4 + abs(step) * 4)


def _sorted(*values: object, **named: object) -> int:
    return 20 * work_of(*values, *named.values())


def _rounded(value: object, precision: object = 0, method: object = "common") -> int:
    del method
    if isinstance(precision, int) and abs(precision) > 300:
        raise TemplateLimitError(f"round to {_shown(precision)} places")
    return work_of(value)


def _parts(value: object, count: object, fill: object = None) -> int:
    del fill
    return _listed(value) + (abs(count) if isinstance(count, int) else 0)


def _listed(value: object) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _nothing(*_: object, **__: object) -> int:
    return 0


def _whole(*values: object, **named: object) -> int:
    return work_of(*values, *named.values())


# --- methods ------------------------------------------------------------------------------------

_TEXT_METHODS: Mapping[str, Cost] = {
    **dict.fromkeys(("upper", "lower", "title", "capitalize", "swapcase", "casefold"), _whole),
    **dict.fromkeys(
        ("find", "rfind", "index", "rindex", "count", "startswith", "endswith"), _whole
    ),
    **dict.fromkeys(("split", "rsplit", "splitlines", "partition", "rpartition"), _whole),
    **dict.fromkeys(("removeprefix", "removesuffix", "encode"), _whole),
    **dict.fromkeys(("isdigit", "isalpha", "isalnum", "isspace", "isnumeric", "isdecimal"), _whole),
    **dict.fromkeys(("isupper", "islower", "istitle", "isascii", "isidentifier"), _whole),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), _stripped),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
    "replace": _replaced,
    "join": _joined,
    "format": _format,
}
_METHODS: Mapping[type, Mapping[str, Cost]] = {
    str: _TEXT_METHODS,
    dict: {**dict.fromkeys(("get", "items", "keys", "values"), _nothing), "copy": _listed},
    list: {**dict.fromkeys(("index", "count"), _whole), "copy": _listed},
    tuple: dict.fromkeys(("index", "count"), _whole),
}


def check_method(method: Any, owner: object, args: tuple[Any, ...], named: Any) -> tuple[Any, ...]:
    """Count the work of a call of a method of a plain value; the arguments to call it with.

    Raises:
        SecurityError: templates do not have this method.
        TemplateLimitError: its result would be huge.
    """
    name = method.__name__
    kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
    cost = _METHODS[kind].get(name) if kind is not None else None
    if cost is None:
        raise SecurityError(f"templates have no method {name!r} of {type(owner).__name__!r}")
    what = f"the method {name}"
    if name == "join" and args:
        args = (list(counted(args[0], what)), *args[1:])
    spend(OPERATION + (0 if name == "format" else work_of(*args)), what)
    spend(cost(owner, *args, **named), what)
    return args


# --- filters and tests --------------------------------------------------------------------------

FILTERS: Mapping[str, Cost] = {
    **dict.fromkeys(("length", "count", "first", "last", "default", "d", "attr"), _nothing),
    **dict.fromkeys(("map", "select", "reject", "selectattr", "rejectattr"), _nothing),
    **dict.fromkeys(("items", "reverse"), _nothing),
    **dict.fromkeys(("abs", "capitalize", "e", "escape", "float", "int", "lower"), _whole),
    **dict.fromkeys(("safe", "string", "title", "truncate", "upper"), _whole),
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "unique"), _sorted),
    **dict.fromkeys(("batch", "slice"), _parts),
    **dict.fromkeys(("join", "sum"), _nothing),  # they count what they put together
    "center": _padded,
    "format": _percent,
    "indent": _indented,
    "list": _listed,
    "replace": _replaced,
    "round": _rounded,
    "tojson": _as_json,
    "trim": _stripped,
}
"""Cost of each filter that templates have; others of jinja's (`urlize`, `pprint`) are left out."""

_PLAIN_TESTS = frozenset(
    {
        *("boolean", "callable", "defined", "escaped", "false", "filter", "float", "integer"),
        *("iterable", "mapping", "none", "number", "sameas", "sequence", "string", "test", "true"),
        "undefined",
    }
)


def counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with its work counted; what it yields is counted item by item."""
    what, cost = f"the filter {name}", FILTERS[name]
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        spend(OPERATION, what)
        spend(cost(*args[skipped:], **named), what)
        result = function(*args, **named)
        return counted(result, what) if isinstance(result, Iterator) else result

    return run


def counted_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The test, with its work counted."""
    what = f"the test {name}"
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        spend(OPERATION + (0 if name in _PLAIN_TESTS else work_of(*args[skipped:])), what)
        return function(*args)

    return run


def counted(values: Iterable[Any], what: str) -> Iterator[Any]:
    """`values`, each counted as it is taken."""
    for value in values:
        spend(OPERATION, what)
        yield value


def join(values: Iterable[Any], separator: str) -> str:
    """The texts of `values`, counted."""
    listed = list(counted(values, "the filter join"))
    spend(_joined(separator, listed), "the filter join")
    return separator.join(map(str, listed))
