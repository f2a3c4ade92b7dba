"""Which of the runtime's records are msgspec's, and which dataclasses. CONTRIBUTING says why."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import Any

from msgspec import Struct

import vlmforge

# Not exported, but users make it or are given it all the same.
HELD = {"ServerSettings", "GenOut", "Timings", "Histogram", "TokenLedger"}


@cache
def classes() -> tuple[type, ...]:
    """Those of the runtime, each where it is defined."""
    found = list[type]()
    for info in pkgutil.walk_packages(vlmforge.__path__, "vlmforge."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            own = (kind for kind in vars(module).values() if inspect.isclass(kind))
            found += [kind for kind in own if kind.__module__ == info.name]
    return tuple(found)


def dataclasses_of_data() -> Iterator[type]:
    """Dataclasses that implement no protocol and whose fields are all arguments."""
    for kind in filter(dataclasses.is_dataclass, classes()):
        told = all(field.init for field in dataclasses.fields(kind))
        if told and not any(getattr(base, "_is_protocol", False) for base in kind.__mro__):
            yield kind


def defaults_of(kind: Any) -> tuple[object, ...]:
    return tuple(kind.__struct_defaults__)


def test_there_are_records_of_both_kinds() -> None:
    assert sum(issubclass(kind, Struct) for kind in classes()) > 150
    assert vlmforge.Response in classes()


def test_dataclasses_are_what_users_hold() -> None:
    public = {name for name in vlmforge.__all__ if inspect.isclass(getattr(vlmforge, name))}
    assert {kind.__name__ for kind in dataclasses_of_data()} - public == HELD


def test_no_field_of_a_dataclass_is_the_default_of_a_struct() -> None:
    """msgspec takes one of `dataclasses.field` for a default like any other."""
    structs = [kind for kind in classes() if issubclass(kind, Struct)]
    defaults = [(kind.__name__, default) for kind in structs for default in defaults_of(kind)]
    assert defaults
    assert [name for name, default in defaults if isinstance(default, dataclasses.Field)] == []
