"""What the fields of the user's configuration classes may hold, and how a misfit is reported."""

from __future__ import annotations

import itertools
import math
import numbers
import os
import re
import reprlib
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache, wraps
from typing import Any, TypeGuard, TypeVar, cast

from msgspec import Struct
from typing_extensions import override

from vlmforge.errors import ConfigError

_MOST = 2**64 - 1
T = TypeVar("T")


class Rule:
    """The values that a field may hold; its `str` completes "must be ..."."""

    __slots__ = ()

    def admits(self, value: object) -> bool:
        """Whether a field may hold `value`."""
        raise NotImplementedError


class OrNone(Rule, Struct, frozen=True):
    """None, or what `rule` admits."""

    rule: Rule

    @override
    def admits(self, value: object) -> bool:
        return value is None or self.rule.admits(value)

    def __str__(self) -> str:
        return f"{self.rule} or None"


class Int(Rule, Struct, frozen=True):
    """An integer (not a bool) in `[low, high]`; without `high`, of at most 64 bits."""

    low: int
    high: int | None = None

    @override
    def admits(self, value: object) -> bool:
        if not _is_whole(value):
            return False
        return self.low <= int(value) <= (_MOST if self.high is None else self.high)

    def __str__(self) -> str:
        if self.high is not None:
            return f"an integer in [{self.low}, {self.high}]"
        return {0: "a non-negative integer", 1: "a positive integer"}.get(
            self.low, f"an integer >= {self.low}"
        )


class Number(Rule, Struct, frozen=True):
    """A finite number (not a bool) in `[low, high]`, without `low` itself if `above`."""

    low: float
    high: float = math.inf
    above: bool = False

    @override
    def admits(self, value: object) -> bool:
        if not _is_number(value):
            return False
        number = value if isinstance(value, int) else float(value)
        in_range = self.low <= number <= min(self.high, sys.float_info.max)
        return in_range and not (self.above and number == self.low)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"a number {'>' if self.above else '>='} {self.low:g}"
        return f"a number in {'(' if self.above else '['}{self.low:g}, {self.high:g}]"


class Flag(Rule, Struct, frozen=True):
    """A bool."""

    @override
    def admits(self, value: object) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "True or False"


class FlagOrFolder(Rule, Struct, frozen=True):
    """A bool, or the path of a folder that exists."""

    @override
    def admits(self, value: object) -> bool:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, bool):
            return True
        # Not pathlib's, which raises for paths that no system takes; and "" is no folder to it.
        return isinstance(value, str) and os.path.isdir(value)  # noqa: PTH112

    def __str__(self) -> str:
        return "True, False or the path of a folder that is there"


class Text(Rule, Struct, frozen=True):
    """A string, `empty` ones included; `argument`: such as programs can be called with."""

    empty: bool = True
    argument: bool = False

    @override
    def admits(self, value: object) -> bool:
        if not isinstance(value, str) or not (self.empty or value):
            return False
        return not self.argument or not re.search("[\0\ud800-\udfff]", value)

    def __str__(self) -> str:
        kind = "a string" if self.empty else "a non-empty string"
        return kind + (" without NUL and lone surrogates" if self.argument else "")


class Choice(Rule, Struct, frozen=True):
    """One of a few strings."""

    values: tuple[str, ...]

    @override
    def admits(self, value: object) -> bool:
        return isinstance(value, str) and value in self.values

    def __str__(self) -> str:
        return "one of " + ", ".join(repr(value) for value in self.values)


class ListOf(Rule, Struct, frozen=True):
    """A list or tuple whose every item `item` admits. A bare string is not a list of strings.

    `length` is how many items it must have; None: any number.
    """

    item: Rule
    length: int | None = None

    @override
    def admits(self, value: object) -> bool:
        if not isinstance(value, list | tuple) or self.length not in (None, len(value)):
            return False
        return all(self.item.admits(item) for item in value)

    def __str__(self) -> str:
        many = "" if self.length is None else f" of {self.length}"
        return f"a list{many} whose every item is {self.item}"


class Function(Rule, Struct, frozen=True):
    """A callable."""

    @override
    def admits(self, value: object) -> bool:
        return callable(value)

    def __str__(self) -> str:
        return "a callable"


class Identity(Rule, Struct, frozen=True):
    """What tells sessions apart."""

    @override
    def admits(self, value: object) -> bool:
        return isinstance(value, int | str)

    def __str__(self) -> str:
        return "an integer or a string"


class Refusal(Struct, frozen=True):
    """Why a field can hold only the values `neutral`, and what to do instead."""

    neutral: tuple[object, ...]
    reason: str
    instead: str


class Instance(Rule, Struct, frozen=True):
    """An object of a class."""

    kind: type
    words: str

    @override
    def admits(self, value: object) -> bool:
        return isinstance(value, self.kind)

    def __str__(self) -> str:
        return self.words


_NO_DEFAULT = object()


@cache
def _defaults(kind: type[Any]) -> Mapping[str, object]:
    """Of the fields of a dataclass; those without one are left out."""
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING}


def known_fields(kind: type[T]) -> type[T]:
    """Of a dataclass: a keyword that is no field of it is a ConfigError, which names some that are.

    Put it above `@dataclass`.
    """
    made: Any = kind.__init__
    names = [field.name for field in fields(cast("Any", kind)) if field.init]

    @wraps(made)
    def init(self: object, *args: object, **values: object) -> None:
        for name in values:
            if name not in names:
                raise _unknown(kind.__name__, name, values[name], names)
        made(self, *args, **values)

    cast("Any", kind).__init__ = init
    return kind


def _unknown(kind: str, name: str, value: object, names: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{kind} has no field {name!r}.",
        found=f"{name}={shown(value)}",
        expected=f"one of: {', '.join(names)}",
        fix=use_instead(name, names),
    )


def use_instead(name: str, names: Sequence[str]) -> str:
    """What to do about a name that is none of `names`: use the one that it is like, if any is."""
    import difflib  # where somebody has to wait for words anyway

    alike = [known for known in names if name in known] or difflib.get_close_matches(name, names)
    return f"use {alike[0]}, or leave it out" if alike else "leave it out"


def check_fields(config: object, rules: Mapping[str, Rule]) -> None:
    """Check the fields named in `rules` (ConfigError: field, value found, values expected).

    What is left at its default is right, and most is: this is done for each request.
    """
    kind: Any = type(config)
    defaults = _defaults(kind)
    for name, rule in rules.items():
        value = getattr(config, name)
        if value is not defaults.get(name, _NO_DEFAULT) and not rule.admits(value):
            raise misfit(f"{kind.__name__}: {name}", name, value, rule)


def check_value(what: str, name: str, value: object, rule: Rule) -> None:
    """ConfigError for a value that `rule` does not admit; `what` names it in a sentence."""
    if not rule.admits(value):
        raise misfit(what, name, value, rule)


def misfit(what: str, name: str, value: object, rule: Rule) -> ConfigError:
    """The error of `check_value`."""
    return ConfigError(
        f"{what} must be {rule}.",
        found=f"{name}={shown(value)}",
        expected=str(rule),
        fix=f"set {name} to such a value, or leave it out for its default",
    )


def check_refusals(config: object, refusals: Mapping[str, Refusal]) -> None:
    """Refuse what cannot be honoured (ConfigError: field, reason, what to do instead)."""
    kind: Any = type(config)
    defaults = _defaults(kind)
    for name, refusal in refusals.items():
        value = getattr(config, name)
        if value is defaults.get(name, _NO_DEFAULT):
            continue
        if not any(_same(value, neutral) for neutral in refusal.neutral):
            raise ConfigError(
                f"{kind.__name__}: {name} is not supported: {refusal.reason}.",
                found=f"{name}={shown(value)}",
                expected=" or ".join(f"{name}={neutral!r}" for neutral in refusal.neutral),
                fix=refusal.instead,
            )


def _same(value: object, neutral: object) -> bool:
    """Equal and of a kind: 1 is not True here, and arrays are not asked whether they are 1."""
    if neutral is None or isinstance(neutral, bool):
        return value is neutral
    if isinstance(neutral, int | float):
        return _is_number(value) and value == neutral
    if isinstance(neutral, list | tuple):
        if not isinstance(value, list | tuple) or not isinstance(value, type(neutral)):
            return False
        return len(value) == len(neutral) and all(map(_same, value, neutral))
    return isinstance(value, type(neutral)) and value == neutral


def _is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an int (not a bool) or one of numpy's, which need not be imported for that."""
    return _of(value, int, numbers.Integral)


def _is_number(value: object) -> TypeGuard[int | float]:
    return _of(value, int | float, numbers.Real)


def _of(value: object, own: type | types.UnionType, abstract: type) -> bool:
    if isinstance(value, bool):
        return False
    of_numpy = type(value).__module__ == "numpy"
    return isinstance(value, own) or (of_numpy and isinstance(value, abstract))


class _Short(reprlib.Repr):
    def repr_dict(self, x: dict[object, object], level: int) -> str:
        """In the order that it has; the base class sorts."""
        if level <= 0:
            return "{...}"
        shown_items = [
            f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}"
            for key, value in itertools.islice(x.items(), self.maxdict)
        ]
        return f"{{{', '.join(shown_items + ['...'] * (len(x) > self.maxdict))}}}"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 500
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 20


def shown(value: object) -> str:
    """The value in an error's words: as `repr`, cut if that is long, whatever its own does."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number with more digits than Python writes
        return f"<{type(value).__name__}>"
