"""Which of the runtime's records are msgspec's, and which dataclasses. CONTRIBUTING says why."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any

from msgspec import Struct

import vlmforge
from vlmforge.engine.schema import Agreeing
from vlmforge.field_rules import Rule

# Not exported, but users get them: of `pipe.render`, `session.turns`, `pipe.metrics`, the log ...
HELD = {
    *("GenOut", "Timings", "Histogram", "TokenLedger", "ServerSettings"),
    *("RenderedPrompt", "ImageSpan", "Conversation", "Message", "Text", "Image", "StepRecord"),
}
# Not made of their arguments alone, or of functions that nobody wants to read in a `repr`.
OTHERS = {"Engine", "_Engine", "OpenedImage"}


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


def structs() -> list[Any]:
    return [kind for kind in classes() if issubclass(kind, Struct)]


def of_a_protocol(kind: type) -> bool:
    return any(getattr(base, "_is_protocol", False) for base in kind.__mro__)


def test_there_are_records_of_both_kinds() -> None:
    assert len(structs()) > 150
    assert vlmforge.Response in classes()


def test_dataclasses_are_what_users_hold() -> None:
    public = {name for name in vlmforge.__all__ if inspect.isclass(getattr(vlmforge, name))}
    found = [k for k in classes() if dataclasses.is_dataclass(k) and not of_a_protocol(k)]
    assert {kind.__name__ for kind in found} - public == HELD | OTHERS


def test_no_field_of_a_dataclass_is_the_default_of_a_struct() -> None:
    """msgspec takes one of `dataclasses.field` for a default like any other."""
    defaults = [(kind, default) for kind in structs() for default in kind.__struct_defaults__]
    assert defaults
    assert [kind for kind, default in defaults if isinstance(default, dataclasses.Field)] == []


def test_what_a_record_must_say_is_said() -> None:
    """Structs have a metaclass of their own, so that no abstract method is refused."""
    rules = [k for k in structs() if issubclass(k, Rule)]
    agreeing = [k for k in structs() if issubclass(k, Agreeing)]
    assert len(rules) > 10
    assert len(agreeing) > 5
    assert [k for k in rules if k.admits is Rule.admits] == []
    assert [k for k in agreeing if k.disagreements is Agreeing.disagreements] == []
