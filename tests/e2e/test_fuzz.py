"""A few of the requests that `make fuzz` sends by the thousand, and the judge of their answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest

from conftest import HANGS, ROOT
from vlmforge import Pipeline, Response
from vlmforge.outputs.events import GenOut

sys.path.append(str(ROOT / "scripts"))  # programs of their own, which import each other
from drawn_requests import Drawing, Drawn, Pictures
from sent_requests import Outcome, judged, send


def test_a_short_run(hf_engine: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts/fuzz.py", "--engine", hf_engine, "--seed", "3"]
    options = ["--requests", "100", "--no-large", "--memory", "3", "--growth", "inf"]
    options += ["--largest-first", "0"]
    done = subprocess.run(
        [*map(str, command), *options, "--work", str(tmp_path), "--hangs", str(HANGS / 2)],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 0 faults" in done.stdout
    # Whether a caller that leaves comes before the end is chance: `test_a_caller_leaves`.
    for end in ("length", "stop", "invalid_request", "looked"):
        assert f" {end}\n" in done.stdout


GOOD = Response("a", 3, 10, finish_reason="stop", token_ids=[5, 6, 7])


@pytest.mark.parametrize(
    ("answer", "end", "fault"),
    [
        (GOOD, "stop", None),
        ("left", "left", None),
        (Response("", 0, 10, finish_reason="stop"), "stop", None),
        (Response("", 0, 10, finish_reason="length"), "length", "cut at 0 tokens of 8"),
        (Response("", 0, 10, finish_reason="abort"), "abort", "nobody cancelled it"),
        (Response("", 0, 10), "None", "ended with None"),
        (Response("a", 3, 10, finish_reason="length", token_ids=[1, 2, 3]), "length", "of 8"),
        (Response("a", 8, 10, finish_reason="length", token_ids=[1] * 8), "length", None),
        (Response("a", 5, 95, finish_reason="length", token_ids=[1] * 5), "length", None),
        (Response("a", 3, 10, finish_reason="stop", token_ids=[1]), "stop", "1 ids of 3"),
        (
            Response(finish_reason="error", error_code="invalid_image", error_message="cut"),
            "invalid_image",
            None,
        ),
        (
            Response(finish_reason="error", error_code="internal_error", error_message="oops"),
            "internal_error",
            "oops",
        ),
        (
            Response(finish_reason="error", error_code="engine_step", error_message="gone"),
            "engine_step",
            "gone",
        ),
    ],
)
def test_the_judge(answer: Response | str, end: str, fault: str | None) -> None:
    outcome = judged(answer, {"max_new_tokens": 8}, 100)
    assert outcome.end == end
    assert (outcome.fault is None) == (fault is None)
    assert (fault or "") in (outcome.fault or "")
    assert isinstance(outcome, Outcome)


class Pieces:
    """Stands in for a pipeline whose answers come token by token, and end with the fourth."""

    def __init__(self) -> None:
        self.taken = 0

    def stream_infer(self, *_: object, **__: object) -> Iterator[Response]:
        for end in (None, None, None, "stop"):
            self.taken += 1
            yield Response("a", self.taken, 3, finish_reason=end, token_ids=[5])

    def chat(self, *_: object, **__: object) -> Iterator[Response]:
        return self.stream_infer()

    async def generate(self, *_: object, **__: object) -> AsyncIterator[GenOut]:
        for piece in self.stream_infer():
            yield GenOut(piece.text, 0, 3, self.taken, piece.finish_reason, piece.token_ids)


@pytest.mark.parametrize("form", ["stream", "chat_stream", "generate"])
@pytest.mark.parametrize(
    ("leave", "end", "taken"), [(None, "stop", 4), (0, "left", 1), (2, "left", 3)]
)
def test_a_caller_leaves(form: str, leave: int | None, end: str, taken: int) -> None:
    pipe = Pieces()
    drawn = Drawn(0, form, ("hello",), {"max_new_tokens": 8}, leave, do_preprocess=True)
    (outcome,) = send(cast(Pipeline, pipe), drawn, 100)
    assert (outcome.end, outcome.fault, pipe.taken) == (end, None, taken)


def test_a_request_is_drawn_by_its_number_alone(tmp_path: Path) -> None:
    files = tuple(tmp_path / f"{i}.png" for i in range(9))
    pictures = Pictures(files, files, files, {})
    first, second = (Drawing(7, pictures, 1024) for _ in range(2))
    there = [repr(first.request(number)) for number in range(200)]
    assert there[::-1] == [repr(second.request(number)) for number in reversed(range(200))]
    assert len(set(there)) == 200
    assert there[:9] != [repr(Drawing(8, pictures, 1024).request(number)) for number in range(9)]
