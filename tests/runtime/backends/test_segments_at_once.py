"""The graphs of a chain are loaded a few at once, and nobody can tell but by the time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typing_extensions import override

from conftest import HANGS
from vlmforge.backends.cuda.device import Segment, Tensor, Work
from vlmforge.backends.cuda.segments import AT_ONCE, load_segments
from vlmforge.backends.fake import HostDevice
from vlmforge.errors import EngineError

NAMES = [f"{number}.onnx" for number in range(1 + 3 * AT_ONCE)]


@dataclass(frozen=True)
class Named(Segment):
    name: str

    @override
    def bind(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Work:
        raise AssertionError("it is only loaded")


@dataclass
class Loads(HostDevice):
    """`load` is called within the loading of each file."""

    load: Callable[[str], None]
    lock: threading.Lock = field(default_factory=threading.Lock)
    begun: list[str] = field(default_factory=list)
    under_way: int = 0
    most: int = 0

    @override
    def segment(self, file: Path) -> Segment:
        with self.lock:
            self.begun.append(file.name)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            self.load(file.name)
        finally:
            with self.lock:
                self.under_way -= 1
        return Named(file.name)


def test_a_few_are_under_way_at_once_and_come_in_order() -> None:
    others = threading.Barrier(AT_ONCE)  # passed by so many together only

    def load(name: str) -> None:
        if name != NAMES[0]:  # that one is alone
            others.wait(HANGS)

    device = Loads(load)
    loaded = load_segments(device, Path("engine"), NAMES)
    assert list(loaded.items()) == [(name, Named(name)) for name in NAMES]
    assert sorted(device.begun) == sorted(NAMES)
    assert device.begun[0] == NAMES[0]
    assert device.most == AT_ONCE


def test_of_those_that_fail_the_first_is_told_of() -> None:
    later = threading.Event()

    def load(name: str) -> None:
        if name == NAMES[1]:
            assert later.wait(HANGS)
            raise EngineError(f"cannot load {name}", found="a", expected="b", fix="c")
        if name == NAMES[2]:
            later.set()
            raise EngineError(f"cannot load {name}", found="a", expected="b", fix="c")

    device = Loads(load)
    with pytest.raises(EngineError, match=f"cannot load {NAMES[1]}"):
        load_segments(device, Path("engine"), NAMES)
    assert device.under_way == 0, "something is being loaded when nobody waits for it"


def test_where_the_first_fails_no_other_begins() -> None:
    def load(name: str) -> None:
        raise EngineError(f"cannot load {name}", found="a", expected="b", fix="c")

    device = Loads(load)
    with pytest.raises(EngineError, match=f"cannot load {NAMES[0]}"):
        load_segments(device, Path("engine"), NAMES)
    assert device.begun == NAMES[:1]


def test_a_chain_of_one_graph() -> None:
    found = load_segments(Loads(lambda name: None), Path("engine"), NAMES[:1])
    assert dict(found) == {NAMES[0]: Named(NAMES[0])}
