"""What the fields of the user's configuration classes may hold, and how a misfit is reported."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from vlmforge.errors import ConfigError


class Rule(Protocol):
    """The values that a field may hold; its `str` completes "must be ..."."""

    def admits(self, value: object) -> bool:
        """Whether a field may hold `value`."""


@dataclass(frozen=True, slots=True)
class OrNone:
    """None, or what `rule` admits."""

    rule: Rule

    def admits(self, value: object) -> bool:
        """See `Rule`."""
        return value is None or self.rule.admits(value)

    def __str__(self) -> str:
        return f"{self.rule} or None"


@dataclass(frozen=True, slots=True)
class Int:
    """An integer (not a bool) in `[low, high]`."""

    low: int
    high: int | None = None

    def admits(self, value: object) -> bool:
        """See `Rule`."""
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            return False
        return self.low <= int(value) and (self.high is None or int(value) <= self.high)

    def __str__(self) -> str:
        if self.high is not None:
            return f"an integer in [{self.low}, {self.high}]"
        return {0: "a non-negative integer", 1: "a positive integer"}.get(
            self.low, f"an integer >= {self.low}"
        )


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number (not a bool) in `[low, high]`, without `low` itself if `above`."""

    low: float
    high: float = math.inf
    above: bool = False

    def admits(self, value: object) -> bool:
        """See `Rule`."""
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            return False
        in_range = self.low <= value <= min(self.high, sys.float_info.max)
        return bool(in_range and not (self.above and value == self.low))

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"a number {'>' if self.above else '>='} {self.low:g}"
        return f"a number in {'(' if self.above else '['}{self.low:g}, {self.high:g}]"


@dataclass(frozen=True, slots=True)
class Flag:
    """A bool."""

    def admits(self, value: object) -> bool:
        """See `Rule`."""
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "True or False"


@dataclass(frozen=True, slots=True)
class FlagOrFolder:
    """A bool, or the path of a folder that exists."""

    def admits(self, value: object) -> bool:
        """See `Rule`."""
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        return isinstance(value, bool) or (isinstance(value, str) and Path(value).is_dir())

    def __str__(self) -> str:
        return "True, False or the path of a folder that is there"


@dataclass(frozen=True, slots=True)
class Text:
    """A string, `empty` ones included."""

    empty: bool = True

    def admits(self, value: object) -> bool:
        """See `Rule`."""
        return isinstance(value, str) and (self.empty or value != "")

    def __str__(self) -> str:
        return "a string" if self.empty else "a non-empty string"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few strings."""

    values: tuple[str, ...]

    def admits(self, value: object) -> bool:
        """See `Rule`."""
        return isinstance(value, str) and value in self.values

    def __str__(self) -> str:
        return "one of " + ", ".join(repr(value) for value in self.values)


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list or tuple whose every item `item` admits. A bare string is not a list of strings.

    `length` is how many items it must have; None: any number.
    """

    item: Rule
    length: int | None = None

    def admits(self, value: object) -> bool:
        """See `Rule`."""
        if not isinstance(value, list | tuple) or self.length not in (None, len(value)):
            return False
        return all(self.item.admits(item) for item in value)

    def __str__(self) -> str:
        many = "" if self.length is None else f" of {self.length}"
        return f"a list{many} whose every item is {self.item}"


@dataclass(frozen=True, slots=True)
class Function:
    """A callable."""

    def admits(self, value: object) -> bool:
        """See `Rule`."""
        return callable(value)

    def __str__(self) -> str:
        return "a callable"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field can hold only the values `neutral`, and what to do instead."""

    neutral: tuple[object, ...]
    reason: str
    instead: str


def check_fields(config: object, rules: Mapping[str, Rule]) -> None:
    """Check the fields named in `rules` (ConfigError: field, value found, values expected)."""
    for name, rule in rules.items():
        value = getattr(config, name)
        if not rule.admits(value):
            raise ConfigError(
                f"{type(config).__name__}: {name} must be {rule}.",
                found=f"{name}={value!r}",
                expected=str(rule),
                fix=f"set {name} to such a value, or leave it out for its default",
            )


def check_refusals(config: object, refusals: Mapping[str, Refusal]) -> None:
    """Refuse what cannot be honoured (ConfigError: field, reason, what to do instead)."""
    for name, refusal in refusals.items():
        value = getattr(config, name)
        if value not in refusal.neutral:
            raise ConfigError(
                f"{type(config).__name__}: {name} is not supported: {refusal.reason}.",
                found=f"{name}={value!r}",
                expected=" or ".join(f"{name}={neutral!r}" for neutral in refusal.neutral),
                fix=refusal.instead,
            )
