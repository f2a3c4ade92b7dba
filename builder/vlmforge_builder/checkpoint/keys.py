"""What a build does with each configuration key of a checkpoint, as tables that recipes declare.

A key that no table knows is refused unless it says nothing: it might change pixels, tokens or
positions, and nobody would notice. `--ignore-config-key` is how a user takes that upon himself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase

from vlmforge.errors import UnsupportedModelError
from vlmforge_builder.checkpoint.config import ConfigReader

OPTION = "--ignore-config-key"
_NOTHING: tuple[object, ...] = (None, False, "", [], {})
_ANOTHER = "choose a checkpoint without it, or extend the recipe"


class Fate(Enum):
    """What becomes of a key's value."""

    HONOURED = "honoured"
    UNUSED = "cannot matter"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Key:
    """A configuration key; `name` may end or begin with `*`.

    Attributes:
        name: Its name in its section.
        fate: What becomes of it.
        note: What it decides, why it cannot matter, or what it would change.
        admitted: The values of a refused key that are none of the refused ones.
        instead: What to do where a refused key says something else.
    """

    name: str
    fate: Fate
    note: str
    admitted: tuple[object, ...] = ()
    instead: str = _ANOTHER


@dataclass(frozen=True, slots=True)
class KeyTable:
    """The keys of one section of one file.

    `place` is the section's dotted place, "" the top; `when` tells which files it is of, where the
    files of one name differ.
    """

    file: str
    place: str
    keys: tuple[Key, ...]
    when: str = ""
    _named: Mapping[str, Key] = field(init=False, repr=False, compare=False)
    _patterns: tuple[Key, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        named = {key.name: key for key in reversed(self.keys)}
        object.__setattr__(self, "_named", named)
        object.__setattr__(self, "_patterns", tuple(key for key in self.keys if "*" in key.name))

    def find(self, name: str) -> Key | None:
        """The key of that name, or the first pattern that it fits."""
        if (key := self._named.get(name)) is not None:
            return key
        return next((key for key in self._patterns if fnmatchcase(name, key.name)), None)


def honoured(note: str, names: str) -> tuple[Key, ...]:
    """Keys (names apart by spaces) whose values shape the engine."""
    return tuple(Key(name, Fate.HONOURED, note) for name in names.split())


def unused(note: str, names: str) -> tuple[Key, ...]:
    """Keys (names apart by spaces) that cannot change an answer."""
    return tuple(Key(name, Fate.UNUSED, note) for name in names.split())


def refused(note: str, names: str, *admitted: object, instead: str = _ANOTHER) -> tuple[Key, ...]:
    """Keys (names apart by spaces) that are refused with any value but null and `admitted`."""
    return tuple(Key(name, Fate.REFUSED, note, admitted, instead) for name in names.split())


def check_keys(reader: ConfigReader, tables: Iterable[KeyTable], when: str = "") -> None:
    """Check the file of `reader`, section by section, against the tables of its name and `when`.

    Raises:
        CheckpointError: a section that is no object.
        UnsupportedModelError: a key that no table knows, or one with a refused value.
    """
    for table in tables:
        if (table.file, table.when) != (reader.file.name, when):
            continue
        if (section := _section(reader, table.place)) is not None:
            for name, value in section.values.items():
                _check(section, table.find(name), name, value)


def _section(reader: ConfigReader, place: str) -> ConfigReader | None:
    for part in place.split(".") if place else ():
        if not reader.has(part):
            return None
        reader = reader.section(part)
    return reader


def _check(section: ConfigReader, key: Key | None, name: str, value: object) -> None:
    dotted = f"{section.place}.{name}" if section.place else name
    if value is None or not section.ignored.isdisjoint((name, dotted)):
        return
    if key is None and not _among(value, _NOTHING):
        raise UnsupportedModelError(
            f"{section.file} has a key that is not known: {dotted}.",
            found=f"{dotted} {_shown(value)}",
            expected="the keys that docs/checkpoints.md lists, so that nothing which shapes "
            "pixels, tokens or positions is left out in silence",
            fix=f"if it cannot change an answer (a note of a training run, say): build-engine ... "
            f"{OPTION} {dotted}",
        )
    if key is not None and key.fate is Fate.REFUSED and not _among(value, key.admitted):
        raise UnsupportedModelError(
            f"{section.file} asks for something that is not supported: {dotted}.",
            found=f"{dotted} {_shown(value)} ({key.note})",
            expected=" or ".join([*map(_shown, key.admitted), "no such key"]),
            fix=key.instead.format(name=dotted),
        )


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]


def _among(value: object, known: Iterable[object]) -> bool:
    """Equal to one of `known`; true is not 1, but 1.0 is."""
    return any(
        value == item and isinstance(value, bool) == isinstance(item, bool) for item in known
    )
