"""Whatever fails at whatever call of the worker: whom it concerns is told, the others go on.

The table `SEAMS` has every call that the worker makes; a test compares it with the worker's source.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from conftest import wait_until
from late_parts import BegunLate, FirstParts, LateParts
from stand_in import Parts, answered, plain, png, stand_in
from vlmforge import Pipeline, Response
from vlmforge.backends import DecoderBatch, FloatArray
from vlmforge.engine.images.patch_inputs import NO_ARRAYS, Arrays
from vlmforge.errors import EngineError, EngineStepError, PipelineError
from vlmforge.kv.cache import Copy, Move
from vlmforge.kv.slots import SlotCache
from vlmforge.outputs.token_generator import TokenGenerator
from vlmforge.runner import runner, work
from vlmforge.runner.features import FeatureCache
from vlmforge.runner.stages import Engine
from vlmforge.scheduler import jobs, scheduler
from vlmforge.scheduler.request import Request

Logits = np.ndarray[Any, np.dtype[np.float32]]


class Unheard(BaseException):
    """An exception that nobody knows."""


FAILURES = (RuntimeError("bad_alloc"), SystemExit(1), Unheard())
# Where the worker calls, and how many requests a call is made for: a decoding step for all.
ONE, ROWS = "one", "rows"
SEAMS: dict[str, tuple[type, str]] = {
    "features.get": (FeatureCache, ONE),
    "engine.keys": (Engine, ONE),
    "engine.rotary_level": (Engine, ONE),
    "engine.decoder_input": (Engine, ONE),
    "engine.prefill": (Engine, ONE),
    "engine.decode": (Engine, ROWS),
    "cache.begin": (SlotCache, ONE),
    "cache.grow": (SlotCache, ONE),
    "cache.place": (SlotCache, ONE),
    "cache.note": (SlotCache, ONE),
    "cache.fits": (SlotCache, ONE),
    "generation.wants_prompt_logits": (TokenGenerator, ONE),
    "generation.begin": (TokenGenerator, ONE),
    "generation.accept": (TokenGenerator, ONE),
}
# Called for all or for none: see the tests of these.
ENDS = {"cache.free", "cache.take_moves"}
# Called where a prompt has several answers: see their tests.
FORKS = {"cache.fork"}
# Of a decoder with a pool of blocks: see `test_pool_errors.py`.
POOLS = {"engine.prefill_together", "generation.choice"}
# Of a decoder that begins steps while others run: see `LATE`.
OVERLAP = {"engine.begin", "engine.begin_prompts", "engine.begin_first", "generation.left"}
KNOWN = ("options", "decoder", "choosing", "overlapping", "first", "clock", "manifest")
NO_CALLS = {"cache.reuses", *(f"engine.{x}" for x in KNOWN)}
# For a session that is saved, or by whoever wants to see metrics; who asked is told.
ASKED = {"cache.find", "cache.used_blocks"}


def test_the_table_has_every_call_of_the_worker() -> None:
    found = set()
    for module in (jobs, scheduler, runner, work):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
                owner = node.value.attr.removeprefix("_")
                if owner in ("features", "engine", "cache", "generation"):
                    found.add(f"{owner}.{node.attr}".replace("cache.get", "features.get"))
    assert found - NO_CALLS == SEAMS.keys() | ENDS | FORKS | ASKED | POOLS | OVERLAP


class Fault:
    """Raises once, at call `number` of a function, and says how many requests it was made for."""

    def __init__(self, number: int, error: BaseException, concerns: str) -> None:
        self._number, self._error, self._concerns = number, error, concerns
        self._calls, self.concerned = 0, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(owner: object, *given: Any, **named: Any) -> Any:
            self._calls += 1
            if self._calls == self._number:
                rows = given[0] if given else getattr(owner, "rows", ())
                self.concerned = len(rows) if self._concerns == ROWS else 1
                raise self._error
            return function(owner, *given, **named)

        return call

    def patch(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        found = inspect.getattr_static(owner, name)
        if isinstance(found, property):
            assert found.fget is not None
            monkeypatch.setattr(owner, name, property(self.wrap(found.fget)))
        else:
            monkeypatch.setattr(owner, name, self.wrap(found))


PROMPTS: list[Any] = ["a", ("look", png(1)), "a b c", ("and", [png(2), png(1)]), "d"]
COUNTS = (9, 14, 5, 11, 7)
CONFIGS = [plain(count) for count in COUNTS]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """What each prompt gives with nothing beside it."""
    answers = []
    for prompt, config in zip(PROMPTS, CONFIGS, strict=True):
        with stand_in(slots=1, enable_prefix_caching=False) as pipe:
            answers.append(whole(pipe(prompt, config)).token_ids)
    assert len({tuple(ids) for ids in answers}) == len(PROMPTS)
    return answers


@pytest.fixture
def pipe() -> Iterator[Pipeline]:
    with stand_in(max_prefill_token_num=7) as made:
        yield made


def whole(response: object) -> Response:
    assert isinstance(response, Response)
    return response


def batch(pipe: Pipeline) -> list[Response]:
    found = answered(lambda: pipe(PROMPTS, CONFIGS))
    assert isinstance(found, list)
    return found


def check_alive(pipe: Pipeline, alone: list[list[int]]) -> None:
    """The worker answers as if nothing had happened, also from what its cache remembers."""
    assert [r.token_ids for r in batch(pipe)] == alone


# Only prompts with pictures ask for features.
NUMBERS = {"features.get": (1, 2)}
# In the first prompt, beside others, and while tokens are generated.
LATER = [
    ("engine.decode", 9),
    ("generation.accept", 20),
    ("cache.place", 30),
    ("cache.note", 30),
    ("cache.grow", 41),
]


# Every error at the first call of every seam; at each later call one of them, in turn, and the
# others at night.
CALLS = [*((seam, n) for seam in SEAMS for n in NUMBERS.get(seam, (1, 2, 4))), *LATER]
GRID = [
    pytest.param(
        seam, number, error, marks=[pytest.mark.nightly] * (number > 1 and (at + turn) % 3 > 0)
    )
    for at, (seam, number) in enumerate(CALLS)
    for turn, error in enumerate(FAILURES)
]


@pytest.mark.parametrize(("seam", "number", "error"), GRID, ids=repr)
def test_a_failure_ends_the_requests_that_it_concerns(
    pipe: Pipeline,
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    seam: str,
    error: BaseException,
    number: int,
) -> None:
    owner, concerns = SEAMS[seam]
    fault = Fault(number, error, concerns)
    with monkeypatch.context() as patched:
        fault.patch(patched, owner, seam.partition(".")[2])
        responses = batch(pipe)
    failed = [i for i, response in enumerate(responses) if response.finish_reason == "error"]
    assert fault.concerned, "the seam was never called that often"
    if seam == "cache.note":
        assert len(failed) <= fault.concerned  # the answer may be whole when its end is noted
    else:
        assert len(failed) == fault.concerned
    for i, response in enumerate(responses):
        if i in failed:
            assert response.error_code in ("engine_step", "internal_error")
            assert type(error).__name__ in str(response.error_message)
        else:
            assert response.token_ids == alone[i]
    check_alive(pipe, alone)


BEGINS = ("engine.begin", "engine.begin_prompts", "engine.begin_first")
BEGUN = dict.fromkeys(BEGINS, (Engine, ROWS))
BEGUN |= {"wait": (BegunLate, ROWS)}
LATE = dict.fromkeys(BEGUN, (1, 2, 5)) | {"features.get": (1,), "generation.accept": (1, 20, 21)}
LATE |= {"cache.note": (30,), "cache.place": (20,), "cache.grow": (9, 30, 41)}


KINDS = [(LateParts, seam) for seam in LATE if seam != "engine.begin_first"]
KINDS += [(FirstParts, seam) for seam in LATE]


@pytest.mark.parametrize(
    ("kind", "seam", "number"), [(kind, s, n) for kind, s in KINDS for n in LATE[s]]
)
def test_a_failure_while_the_next_step_runs(
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    kind: type[LateParts],
    seam: str,
    number: int,
) -> None:
    """It concerns those whom it would concern if that did not run."""
    owner, concerns = (SEAMS | BEGUN)[seam]
    fault = Fault(number, Unheard(), concerns)
    with stand_in(kind(3), max_prefill_token_num=7) as pipe:
        with monkeypatch.context() as patched:
            fault.patch(patched, owner, seam.rpartition(".")[2])
            responses = batch(pipe)
        failed = [i for i, r in enumerate(responses) if r.finish_reason == "error"]
        assert fault.concerned, "the seam was never called that often"
        assert (0 if seam == "cache.note" else 1) <= len(failed) <= fault.concerned
        for i, response in enumerate(responses):
            assert i in failed or response.token_ids == alone[i]
        check_alive(pipe, alone)


class Breaking(Parts):
    """Fails at call `number` of a function, in the middle of what it does."""

    def __init__(self, function: str, number: int) -> None:
        super().__init__(3)
        self._function, self._number = function, number

    def encode(self, pixel_values: FloatArray, arrays: Arrays = NO_ARRAYS) -> FloatArray:
        features = super().encode(pixel_values, arrays)
        self._break("encode")
        return features

    def step(self, batch: DecoderBatch) -> FloatArray:
        logits = super().step(batch)
        if self.calls["step"] == self._number and self._function == "step":
            self._cache[list(batch.slots)] = -9
        self._break("step")
        return logits

    def move(self, move: Move) -> None:
        if isinstance(move, Copy):
            super().move(structs.replace(move, tokens=move.tokens // 2))
            self._break("copy")
            self._cache[move.target, : move.tokens] = self._cache[move.source, : move.tokens]
        else:
            super().move(move)
            self._break("drop")

    def _break(self, name: str) -> None:
        if name == self._function and self.calls[name] == self._number:
            raise EngineError("the device is gone", found="nothing", fix="look for it")


@pytest.mark.parametrize(
    ("function", "number"),
    [("encode", 1), ("encode", 2)]
    + [(name, n) for name in ("step", "copy", "drop") for n in (1, 2, 3, 4)],
)
def test_what_was_half_done_is_nobodys(alone: list[list[int]], function: str, number: int) -> None:
    """Whoever the data belonged to is told, and nobody goes on from what is left of it."""
    parts = Breaking(function, number)
    with stand_in(parts, max_prefill_token_num=7) as pipe:
        ends = []
        for _ in range(2):
            for response, expected in zip(batch(pipe), alone, strict=True):
                ends.append(response.finish_reason)
                if response.finish_reason == "error":
                    assert response.error_code == "engine_step"
                    assert "the device is gone" in str(response.error_message)
                else:
                    assert response.token_ids == expected
        # Memory that does not go back concerns nobody.
        least, most = {"step": (1, 3), "drop": (0, 0)}.get(function, (1, 1))
        if parts.calls[function] < number:  # who is prepared first, and finds what, may differ
            assert (function, number) == ("copy", 4)
            least = 0
        assert least <= ends.count("error") <= most
        check_alive(pipe, alone)


def test_every_move_fails_from_now_on(alone: list[list[int]]) -> None:
    """Nobody waits for ever, and nobody gets another's text."""
    parts = Parts(3)
    with stand_in(parts) as pipe:

        def fail(name: str, _: int) -> None:
            if name in ("copy", "drop"):
                raise MemoryError

        parts.before = fail
        for _ in range(3):
            for response, expected in zip(batch(pipe), alone, strict=True):
                assert response.finish_reason == "error" or response.token_ids == expected


@pytest.mark.parametrize("name", ["free", "take_moves"])
def test_bookkeeping_that_fails_for_nobody_ends_all_and_begins_anew(
    pipe: Pipeline, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patched:
        Fault(2, MemoryError(), ONE).patch(patched, SlotCache, name)
        responses = batch(pipe)
    failed = [response for response in responses if response.finish_reason == "error"]
    assert failed or name == "free"  # whoever was freed had its answer, and may have been the last
    for response, expected in zip(responses, alone, strict=True):
        assert response.finish_reason == "error" or response.token_ids == expected
    check_alive(pipe, alone)


def test_a_single_caller_gets_the_typed_error_and_its_cause() -> None:
    parts = Parts(1)
    with stand_in(parts, slots=1) as pipe:
        cause = RuntimeError("bad_alloc")

        def fail(name: str, _: int) -> None:
            if name == "encode":
                raise cause

        parts.before = fail
        with pytest.raises(EngineStepError, match="failed while it ran") as caught:
            answered(lambda: pipe(("look", png(1))))
        assert caught.value.__cause__ is cause
        assert caught.value.found == "RuntimeError: bad_alloc"
        assert answered(lambda: whole(pipe("text", plain(3)))).generate_token_len == 3


def test_an_end_that_cannot_be_reported_does_not_harm_others(
    pipe: Pipeline, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text held back for a cancelled request cannot be had: its caller is told all the same."""
    fault = Fault(1, MemoryError(), ONE)
    with monkeypatch.context() as patched:
        fault.patch(patched, TokenGenerator, "_flush")
        parts, loop = pipe._engine.decoder, pipe._scheduler
        assert isinstance(parts, Parts)
        first = parts.calls["step"] + 20  # it cannot end before it is cancelled
        parts.before = lambda name, number: (
            wait_until(lambda: loop._stopping) if (name, number) == ("step", first) else None
        )
        stream = pipe.stream_infer("a", plain(90))
        pieces: list[object] = []

        def cancelled() -> None:
            for piece in stream:
                pieces.append(piece)
                if len(pieces) == 1:
                    pipe.close()

        with pytest.raises(MemoryError):
            answered(cancelled)


def test_a_sink_that_fails_does_not_harm_others(
    pipe: Pipeline, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place where events are handed over fails once, for whatever it is given."""
    for number in (1, 5, 9):
        with monkeypatch.context() as patched:
            fault = Fault(number, MemoryError(), ONE)
            fault.patch(patched, Request, "send")
            responses = batch(pipe)
        failed = [response for response in responses if response.finish_reason == "error"]
        assert len(failed) == 1
        check_alive(pipe, alone)


def test_a_worker_that_dies_tells_all_and_refuses_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in(slots=1) as pipe:
        fault = Fault(3, SystemError("a bug"), ONE)
        fault.patch(monkeypatch, jobs.Jobs, "step")
        responses = answered(lambda: pipe(PROMPTS, CONFIGS))
        assert isinstance(responses, list)
        assert {response.error_code for response in responses} == {"pipeline_unusable"}
        with pytest.raises(PipelineError, match="died") as caught:
            answered(lambda: pipe("later"))
        assert "SystemError: a bug" in caught.value.found
        assert isinstance(caught.value.__cause__, SystemError)
