"""Large pictures take turns: what many of them need together is bounded, and goes back."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from conftest import wait_until
from stand_in import HANG_S, plain, png, stand_in
from vlmforge import Pipeline
from vlmforge.errors import CancelledError, ImageError
from vlmforge.limits import Room
from vlmforge.vl import pixel_room
from vlmforge.vl.decode import decode_image
from vlmforge.vl.pixel_room import LARGE, PixelRoom


def never() -> bool:
    return False


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def test_together_they_have_no_more_than_there_is(pool: ThreadPoolExecutor) -> None:
    room, lock, held = PixelRoom(100), threading.Lock(), [0, 0]

    def one(width: int) -> None:
        with room.hold((width, 1), None, never):
            with lock:
                held[0] += width
                held[1] = max(held)
            with lock:
                held[0] -= width

    list(pool.map(one, [30, 60, 100, 1, 45, 99, 50] * 30))
    assert held[0] == 0
    assert 60 <= held[1] <= 100


def test_one_that_is_larger_than_the_room_has_it_alone(pool: ThreadPoolExecutor) -> None:
    room = PixelRoom(100)
    with room.hold((50, 1), None, never):
        entered = threading.Event()

        def large() -> None:
            with room.hold((500, 1), None, never):
                entered.set()

        waiting = pool.submit(large)
        assert not entered.wait(0.2)
    waiting.result(HANG_S)
    assert entered.is_set()


def test_small_ones_do_not_overtake_a_large_one(pool: ThreadPoolExecutor) -> None:
    room, order = PixelRoom(100), list[int]()

    def one(width: int) -> None:
        with room.hold((width, 1), None, never):
            order.append(width)

    with room.hold((50, 1), None, never):
        large = pool.submit(one, 100)
        wait_until(room._turn.locked)
        small = pool.submit(one, 10)
    large.result(HANG_S)
    small.result(HANG_S)
    assert order == [100, 10]


def test_who_is_cancelled_waits_no_more(pool: ThreadPoolExecutor) -> None:
    room, gone = PixelRoom(100), threading.Event()

    def one() -> None:
        with room.hold((100, 1), None, gone.is_set):
            pytest.fail("it had no room")

    with room.hold((1, 1), None, never):
        waiting = [pool.submit(one) for _ in range(3)]  # one for room, two for their turn
        gone.set()
        for one_waiting in waiting:
            assert isinstance(one_waiting.exception(HANG_S), CancelledError)
    with room.hold((100, 1), None, never):
        pass


def test_what_does_not_fit_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_room, "available_memory", lambda: Room(10**9 - 1, "a limit"))
    room = PixelRoom()
    with room.hold((10_000, 9_000), "photo.png", never):
        pass
    with (
        pytest.raises(ImageError, match=r"photo\.png does not fit the memory") as caught,
        room.hold((10_000, 10_000), "photo.png", never),
    ):
        pass
    assert caught.value.found == "10000 x 10000 pixels, 1.00 GB while they are decoded"
    assert caught.value.expected == "at most 1.00 GB, by a limit"
    with room.hold((10_000, 9_000), "photo.png", never):  # its place is free again
        pass


@pytest.fixture
def pipe() -> Iterator[Pipeline]:
    with stand_in() as made:
        yield made


def test_requests_ask_for_room(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_room, "LARGE", 64)
    monkeypatch.setattr(pixel_room, "available_memory", lambda: Room(639, "a limit"))
    small, large = pipe([("a", png(1, (7, 7))), ("a", png(2, (8, 8)))], plain(2))
    assert small.finish_reason == "length"
    assert large.error_code == "invalid_image"
    assert LARGE > 64


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_pixels_go_with_their_last_user(tmp_path: Path, kind: str) -> None:
    """A cycle of references would keep hundreds of megabytes until a collector comes."""
    Image.new("RGB", (5, 5)).save(tmp_path / "image", kind)
    gc.collect()
    gc.disable()
    try:
        image = decode_image((tmp_path / "image").read_bytes(), name="it")
        there = weakref.ref(image)
        del image
        assert there() is None
    finally:
        gc.enable()
