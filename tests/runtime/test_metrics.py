"""What a pipeline counts: against what its answers say, and by a clock that a test turns."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import Any

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from conftest import wait_until
from stand_in import HANG_S, Gate, Parts, at_once, plain, png, settle, stand_in
from vlmforge import Metrics, Response
from vlmforge.api.prometheus import PipelineCollector
from vlmforge.errors import ConfigError, ImageError
from vlmforge.outputs.events import Event
from vlmforge.outputs.metrics import SECONDS, SHARES, Tally
from vlmforge.outputs.response import Timings
from vlmforge.runner.clock import PartClock
from vlmforge.scheduler.meter import Meter


def answers(found: object) -> list[Response]:
    assert isinstance(found, list)
    return found


def test_counters_are_what_the_answers_say() -> None:
    parts = Parts(3)
    with stand_in(parts) as pipe:
        nothing = pipe.metrics()
        assert nothing.requests == {"stop": 0, "length": 0, "abort": 0, "error": 0}
        assert (nothing.step_seconds.count, nothing.step_seconds.mean) == (0, 0.0)
        prompts = [("look", png(1)), ("see", png(1)), "words", ("x", b"no image"), ("y", png(2))]
        found = answers(pipe(prompts, gen_config=plain(7)))
        gate, middle = Gate(), parts.calls["step"] + 20  # it cannot end before it is left
        parts.before = lambda name, n: gate.passed() if (name, n) == ("step", middle) else None
        pieces = pipe.stream_infer("long", plain(90))
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        gate.open.set()
        wait_until(lambda: sum(pipe.metrics().requests.values()) == 6)
        settle(pipe)
        metrics = pipe.metrics()
        whole = [answer for answer in found if answer.finish_reason != "error"]
        assert metrics.requests == {"stop": 0, "length": 4, "abort": 1, "error": 1}
        assert metrics.errors == {"invalid_image": 1}
        assert metrics.prompt_tokens >= sum(answer.input_token_len for answer in whole)
        assert metrics.generated_tokens >= sum(answer.generate_token_len for answer in whole)
        of_the_abandoned = metrics.cached_tokens - sum(answer.cached_tokens for answer in whole)
        assert 0 <= of_the_abandoned < pipe.count_tokens("long")
        assert metrics.images_encoded == parts.calls["encode"] == 2
        assert metrics.images_cached == sum(
            answer.timings.cached_images for answer in whole if answer.timings is not None
        )
        assert (metrics.waiting, metrics.running, metrics.preemptions) == (0, 0, 0)
        assert metrics.first_token_seconds.count == 5
        assert metrics.between_tokens_seconds.count >= 4 * 6
        assert metrics.request_seconds.count == 6
        assert metrics.step_seconds.count == metrics.step_host_share.count
        assert parts.calls["step"] >= metrics.step_seconds.count > 0
        assert 0 < metrics.blocks_used <= metrics.blocks_total
    assert dataclasses.replace(pipe.metrics(), blocks_used=0) == dataclasses.replace(
        metrics, blocks_used=0
    )


def test_it_says_what_is_going_on_and_waits_for_nobody() -> None:
    parts, gate = Parts(1), Gate()
    with stand_in(parts, slots=1) as pipe:
        parts.before = lambda name, number: gate.passed() if number == 2 else None
        threads = [
            threading.Thread(target=pipe, args=(f"{n}",), kwargs={"gen_config": plain(3)})
            for n in range(3)
        ]
        for thread in threads:
            thread.start()
        assert gate.reached.wait(HANG_S)  # a step stands still
        wait_until(lambda: pipe.metrics().waiting == 2)
        assert pipe.metrics().running == 1
        gate.open.set()
        for thread in threads:
            thread.join()
        settle(pipe)
        metrics = pipe.metrics()
        assert (metrics.waiting, metrics.running, metrics.requests["length"]) == (0, 0, 3)


def test_answers_to_one_prompt_have_one_prompt() -> None:
    with stand_in() as pipe:
        found = pipe("hello", plain(6, n=3, temperature=1.0, top_k=9, random_seed=1))
        assert isinstance(found, Response)
        settle(pipe)
        metrics = pipe.metrics()
    assert (metrics.requests["length"], metrics.generated_tokens) == (3, 18)
    assert metrics.prompt_tokens == found.input_token_len
    assert (metrics.first_token_seconds.count, metrics.between_tokens_seconds.count) == (3, 15)


def test_preemptions_are_counted() -> None:
    with stand_in(slots=3, blocks=(16, 8)) as pipe:
        found = at_once(pipe, [f"prompt {n}" for n in range(3)], plain(60))
        assert [answer.generate_token_len for answer in found] == [60] * 3
        settle(pipe)
        assert pipe.metrics().preemptions > 0
        assert pipe.metrics().blocks_total == 8


def test_errors_of_many_threads_are_all_counted() -> None:
    count, parts = 60, Parts(3)

    def ask(number: int) -> None:
        if number % 2:
            pipe(f"{number}", plain(2))
        else:
            with pytest.raises(ImageError):
                pipe(("look", b"no image"), plain(2))

    with stand_in(parts) as pipe:
        threads = [threading.Thread(target=ask, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        settle(pipe)
        metrics = pipe.metrics()
    assert metrics.requests == {"stop": 0, "length": count // 2, "abort": 0, "error": count // 2}
    assert metrics.generated_tokens == count


# --- by a clock ---------------------------------------------------------------------------------


class Turned:
    """A clock, and parts whose time it is."""

    def __init__(self) -> None:
        self.now, self.parts = 100.0, PartClock()

    def __call__(self) -> float:
        return self.now

    def step(self, meter: Meter, inside: float, outside: float, then: Callable[[], None]) -> None:
        with meter.step():
            self.now += inside
            self.parts.seconds += inside
            self.now += outside
            then()


def test_times_are_those_of_the_clock() -> None:
    clock, seen = Turned(), list[Event]()
    meter = Meter(clock.parts, clock)
    meter.begin()
    send = meter.watched(seen.append)
    clock.now += 2  # it waits

    def say(tokens: int, reason: Any = None) -> Callable[[], None]:
        timings = Timings(decode=1.0) if reason else None
        return lambda: send(
            Event(
                0,
                Response("x", tokens, 9, finish_reason=reason, cached_tokens=4, timings=timings),
                last=reason is not None,
            )
        )

    clock.step(meter, 0.75, 0.25, say(1))
    clock.step(meter, 1.5, 0.5, say(3))  # two tokens at once: some text was held back
    clock.step(meter, 1.0, 0.0, lambda: None)
    clock.step(meter, 0.75, 0.25, say(4, "stop"))
    with meter.step():  # finds nothing to do
        clock.now += 5
    assert (meter.first_token.sum, meter.first_token.now().count) == (3.0, 1)
    assert (meter.between_tokens.sum, meter.between_tokens.now().count) == (4.0, 3)
    assert (meter.steps.sum, meter.steps.now().count) == (5.0, 4)
    assert meter.shares.sum == pytest.approx(0.25 + 0.25 + 0.0 + 0.25)
    assert meter.request_seconds().sum == 7.0
    assert meter.total("generated_tokens") == 4
    assert (meter.total("prompt_tokens"), meter.total("cached_tokens")) == (9, 4)
    last = seen[-1].delta
    assert last is not None
    assert last.timings is not None
    assert last.timings.host_share == pytest.approx(1 / 5)
    assert last.timings.total == 1.0  # it is no stage
    assert meter.under_way == 0


def test_answers_say_the_host_s_share_and_where_they_waited() -> None:
    with stand_in() as pipe:
        for answer in answers(pipe([("look", png(n % 2)) for n in range(6)], gen_config=plain(4))):
            assert answer.timings is not None
            assert 0 < answer.timings.host_share <= 1
            assert answer.timings.image_wait >= 0
            assert "image_wait" in str(answer.timings)


@given(values=st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5)), max_size=30))
@pytest.mark.parametrize("bounds", [SECONDS, SHARES])
def test_a_histogram_counts_by_size(
    bounds: tuple[float, ...], values: list[tuple[float, int]]
) -> None:
    tally, every = Tally(bounds), Counter[float]()
    for value, times in values:
        tally.add(value, times)
        every[value] += times
    found = tally.now()
    assert found.count == every.total()
    for bound, count in found.at_most():
        assert count == sum(times for value, times in every.items() if value <= bound)
    assert found.sum == pytest.approx(sum(value * times for value, times in every.items()))
    assert found.mean == pytest.approx(found.sum / max(1, found.count))
    assert len(found.counts) == bisect_left(bounds, float("inf")) + 1
    assert tally.plus(tally).count == 2 * found.count


# --- for Prometheus -----------------------------------------------------------------------------


def test_prometheus_reads_all_of_it() -> None:
    registry = prometheus_client.CollectorRegistry()
    with stand_in() as pipe:
        pipe([("look", png(1)), "b", ("c", b"no image")], gen_config=plain(5))
        settle(pipe)
        registry.register(PipelineCollector(pipe, {"model": 'a "name"'}))
        text = prometheus_client.generate_latest(registry).decode()
        metrics = pipe.metrics()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "model")): (
            sample.value
        )
        for family in families.values()
        for sample in family.samples
    }
    assert samples["vlmforge_requests_total", "length"] == 2
    assert samples["vlmforge_requests_total", "stop"] == 0
    assert samples["vlmforge_request_errors_total", "invalid_image"] == 1
    for name, value in (
        ("prompt_tokens_total", metrics.prompt_tokens),
        ("prompt_tokens_cached_total", metrics.cached_tokens),
        ("generated_tokens_total", metrics.generated_tokens),
        ("images_encoded_total", metrics.images_encoded),
        ("images_cached_total", metrics.images_cached),
        ("preemptions_total", metrics.preemptions),
        ("requests_waiting", 0),
        ("requests_running", 0),
        ("cache_blocks_used", metrics.blocks_used),
        ("cache_blocks", metrics.blocks_total),
        ("step_seconds_count", metrics.step_seconds.count),
        ("step_host_ratio_sum", metrics.step_host_share.sum),
        ("time_to_first_token_seconds_count", 2),
        ("time_between_tokens_seconds_count", 8),
        ("request_seconds_count", 3),
    ):
        assert samples[(f"vlmforge_{name}",)] == pytest.approx(value), name
    assert samples["vlmforge_request_seconds_bucket", "+Inf"] == 3
    assert all(
        sample.labels["model"] == 'a "name"' for f in families.values() for sample in f.samples
    )
    assert len(families) == len(dataclasses.fields(Metrics))


def test_without_its_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vlmforge.api.prometheus")
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        importlib.import_module("vlmforge.api.prometheus")
    assert "vlmforge[metrics]" in caught.value.fix
