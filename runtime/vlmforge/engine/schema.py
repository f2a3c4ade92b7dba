"""Records to JSON and back, strictly: an unknown, missing or mistyped key is an error.

A record, a msgspec Struct or a dataclass, is its own schema. Supported field types: `str`, `int`,
`float`, `bool`, `X | None`, `tuple[X, ...]`, `tuple[X, Y]`, `Mapping[str, X]`, other records, and
tagged unions of them: each member has a field `name: Literal["..."]`, and the key `name` tells
which one it is. The members may stand in files that are imported when a document has one
(`Elsewhere`). A field with a default may be missing: that is how documents written before it was
there are read. An `Annotated[X, rule]` holds what `rule` (`vlmforge.field_rules`) admits; what
several fields must agree on is said by a method `disagreements` (`Agreeing`).

msgspec's own reading was tried (0.22): its errors name no value found, one bound at a time and no
key of a mapping, it takes a key twice, lone surrogates and whole numbers that a float rounds. To
keep our errors its sentences would have to be parsed; this module is shorter than that.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from msgspec import Struct

from vlmforge.errors import EngineFormatError
from vlmforge.field_rules import Rule

T = TypeVar("T")
TAG = "name"
"""The field that tells the members of a union apart."""


class Agreeing:
    """A record whose fields must go together."""

    __slots__ = ()

    def disagreements(self) -> Iterator[tuple[str, str]]:
        """For each rule that is broken: the field, and what it must be."""
        raise NotImplementedError


class Elsewhere(Struct, frozen=True):
    """A record whose file is imported when a document has one: `Annotated[object, Elsewhere()]`.

    Several of them are a tagged union; each one's file is called as its tag.
    """

    module: str
    name: str

    @property
    def tag(self) -> str:
        """What the key `name` of such a value is, where there are several."""
        return self.module.rpartition(".")[2]

    def load(self) -> Any:
        """The class."""
        return getattr(importlib.import_module(self.module), self.name)


def to_json(value: object) -> str:
    """Readable JSON text of a record; equal values have equal text.

    Fields keep their order, keys of mappings are sorted. ValueError on a float that is not finite.
    """
    return data_json(to_data(value))


def to_data(value: object) -> object:
    """`value` as what `json.dumps` takes; see `to_json`."""
    return _encode(value)


def data_json(data: object) -> str:
    """The text of `to_data`'s result (ValueError on a float that is not finite)."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(text: str) -> object:
    """Parse JSON as RFC 8259 has it: no NaN and no infinity, and no key twice in an object.

    ValueError: `text` is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:60]!a} twice in one object")
    return table


def _no_constant(name: str) -> object:
    raise ValueError(f"{name}, which JSON does not have")


def from_json(cls: type[T], data: object, where: str) -> T:
    """Build `cls` from parsed JSON.

    Raises:
        EngineFormatError: names the dotted key below `where`, what was found and what is expected:
            an unknown, missing or mistyped key, a value out of range, values that do not agree.
    """
    return typing.cast("T", _decode(cls, data, where))


def _encode(value: object) -> object:
    kind: Any = type(value)
    if _is_record(kind):
        return {name: _encode(getattr(value, name)) for name in _fields(kind)}
    if isinstance(value, Mapping):
        return {key: _encode(value[key]) for key in sorted(value)}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    return value


def _decode(kind: Any, data: object, where: str) -> object:
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        inner, *rules = typing.get_args(kind)
        if isinstance(rules[0], Elsewhere):
            return _decode_elsewhere(rules, data, where)
        return _admitted(_decode(inner, data, where), rules, where)
    if _is_record(kind):
        return _decode_record(kind, data, where)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(kind, data, where)
    if origin is typing.Literal:
        return _decode_literal(typing.get_args(kind), data, where)
    if origin is tuple:
        return _decode_tuple(typing.get_args(kind), data, where)
    if origin is Mapping:
        table = _expect(dict, data, where)
        value_kind = typing.get_args(kind)[1]
        for key in table:
            _check_text(key, where)
        return {key: _decode(value_kind, item, f"{where}.{key}") for key, item in table.items()}
    if kind is float:
        return _decode_float(data, where)
    return _expect(kind, data, where)


def _admitted(value: object, rules: list[Rule], where: str) -> object:
    for rule in rules:
        if not rule.admits(value):
            raise _out_of_range(where, str(rule), repr(value))
    return value


def _decode_record(cls: type, data: object, where: str) -> object:
    table = _expect(dict, data, where)
    hints, names = _hints(cls), _fields(cls)
    if unknown := sorted(set(table) - set(names)):
        raise _mismatch(where, f"unknown key {unknown[0]!r}", f"only the keys {', '.join(names)}")
    if missing := [name for name, needed in names.items() if needed and name not in table]:
        raise _mismatch(where, f"no key {missing[0]!r}", f"the keys {', '.join(names)}")
    given = [name for name in names if name in table]
    made = cls(**{name: _decode(hints[name], table[name], f"{where}.{name}") for name in given})
    if isinstance(made, Agreeing):
        for field, expected in made.disagreements():
            raise _out_of_range(f"{where}.{field}", expected, "values that do not go together")
    return typing.cast("object", made)


def _decode_elsewhere(places: Sequence[Elsewhere], data: object, where: str) -> object:
    if len(places) == 1:
        return _decode(places[0].load(), data, where)
    tagged = {place.tag: place for place in places}
    return _decode(tagged[_known_tag(tagged, data, where)].load(), data, where)


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, Struct) or dataclasses.is_dataclass(kind))


@lru_cache(maxsize=64)
def _fields(cls: Any) -> Mapping[str, bool]:
    """Each field of a record, and whether it has no default."""
    if not issubclass(cls, Struct):
        absent = dataclasses.MISSING
        fields = dataclasses.fields(cls)
        return {f.name: f.default is absent and f.default_factory is absent for f in fields}
    needed = len(cls.__struct_fields__) - len(cls.__struct_defaults__)
    return {name: index < needed for index, name in enumerate(cls.__struct_fields__)}


@lru_cache(maxsize=64)
def _hints(cls: type) -> Mapping[str, Any]:
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):  # typing's `get_type_hints` takes half as long again
        hints |= inspect.get_annotations(base, eval_str=True)
    return hints


def _decode_union(kind: Any, data: object, where: str) -> object:
    options = typing.get_args(kind)
    plain = (str, int, bool, types.NoneType)
    if type(data) in options and type(data) in plain:
        return _expect(type(data), data, where)
    others = [option for option in options if option not in plain]
    tagged = {tag: option for option in others if (tag := _tag(option)) is not None}
    if tagged:
        return _decode(tagged[_known_tag(tagged, data, where)], data, where)
    # At most one option needs decoding: `X | None` with a record, a tuple, a float ...
    for option in others:
        return _decode(option, data, where)
    names = ("null" if option is types.NoneType else option.__name__ for option in options)
    raise _mistyped(data, " or ".join(names), where)


def _tag(option: Any) -> str | None:
    """What the key `name` of a member of a tagged union is; None: it has no tag."""
    if not _is_record(option):
        return None
    hint = _hints(option).get(TAG)
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Literal else None


def _known_tag(members: Mapping[str, object], data: object, where: str) -> str:
    """The one of `members` that `data` says it is."""
    table = _expect(dict, data, where)
    if TAG not in table:
        raise _mismatch(where, f"no key {TAG!r}", f"a key {TAG!r}: one of {', '.join(members)}")
    tag = _expect(str, table[TAG], f"{where}.{TAG}")
    if tag not in members:
        raise EngineFormatError(
            f"{where}.{TAG} is unknown to this version of vlmforge.",
            found=repr(tag[:60]),
            expected="one of: " + ", ".join(members),
            fix="install a newer vlmforge, or rebuild the engine with this build-engine",
        )
    return tag


def _decode_literal(values: tuple[object, ...], data: object, where: str) -> object:
    found = _expect(str, data, where)
    if found not in values:
        raise _mismatch(where, repr(found[:60]), " or ".join(map(repr, values)))
    return found


def _decode_float(data: object, where: str) -> float:
    if type(data) not in (int, float):
        raise _mistyped(data, "float", where)
    try:
        value = float(typing.cast("float", data))
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or value != data:  # a whole number may need more digits
        raise _mistyped(data, "a finite float", where)
    return value


def _decode_tuple(kinds: tuple[Any, ...], data: object, where: str) -> object:
    items = _expect(list, data, where)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    if len(kinds) != len(items):
        raise _mismatch(where, f"{len(items)} items", f"{len(kinds)} items")
    pairs = zip(kinds, items, strict=True)
    return tuple(_decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))


def _expect(kind: type[T], data: object, where: str) -> T:
    # `type() is`, not isinstance: JSON's true must not pass as the integer 1.
    if type(data) is not kind:
        raise _mistyped(data, kind.__name__, where)
    if isinstance(data, str):
        _check_text(data, where)
    return data


def _check_text(text: str, where: str) -> None:
    """JSON can spell halves of characters, which nothing can write or send on."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!a} at position {error.start}"
        raise _mismatch(where, found, "text that can be written as UTF-8") from None


def _mistyped(data: object, expected: str, where: str) -> EngineFormatError:
    try:
        shown = json.dumps(data, default=str)[:60]
    except RecursionError:
        shown = "nested deeply"
    return _mismatch(where, f"{type(data).__name__} {shown}", expected)


def _mismatch(where: str, found: str, expected: str) -> EngineFormatError:
    return EngineFormatError(
        f"{where} is not what this version of vlmforge reads.",
        found=found,
        expected=expected,
        fix="rebuild the engine with the build-engine of this version",
    )


def _out_of_range(where: str, expected: str, found: str) -> EngineFormatError:
    return EngineFormatError(
        f"{where} must be {expected}.",
        found=found if len(found) <= 100 else found[:100] + "...",
        expected=expected,
        fix="do not use this engine; copy it again, or rebuild it with build-engine",
    )
