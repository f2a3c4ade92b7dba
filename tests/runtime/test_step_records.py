"""The log of steps: plain data that says what each did. Parts, tokens and images add up."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from stand_in import Parts, plain, png, stand_in
from vlmforge.runner.step import StepRecord


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[StepRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        (step,) = record.args
        assert isinstance(step, StepRecord)
        self.found.append(step)


@pytest.fixture
def records() -> Iterator[Records]:
    handler, logger = Records(), logging.getLogger("vlmforge.steps")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_parts_tokens_and_images_add_up(records: Records) -> None:
    logging.getLogger("vlmforge.steps").setLevel("DEBUG")
    parts = Parts(3)
    prompts = [("look", png(1)), "a longer text of some words", ("both", [png(2), png(1)])]
    with stand_in(parts, slots=3, max_prefill_token_num=8) as pipe:
        answers = pipe(prompts, plain(7))
    run, tokens = Counter[int](), Counter[int]()
    for record in records.found:
        for prompt in record.step.prompts:
            run[prompt.sequence] += len(prompt.tokens)
        tokens.update(row.sequence for row in record.step.decode)
        assert record.begun > 0
        assert min(record.encode, record.prompt, record.decode) >= 0
    assert isinstance(answers, list)
    expected = [answer.input_token_len - answer.cached_tokens for answer in answers]
    assert sorted(run.values()) == sorted(expected)
    assert list(tokens.values()) == [6] * 3  # the first one is of the prompt's end
    assert sum(record.images for record in records.found) == parts.calls["encode"] == 2


def test_a_record_reads_as_a_sentence(records: Records) -> None:
    logging.getLogger("vlmforge.steps").setLevel("DEBUG")
    with stand_in(slots=1, max_prefill_token_num=512) as pipe:
        pipe(("look", png(1)), plain(2))
    first, second = map(str, records.found)
    assert re.match(r"1 images in \d+\.\d+ s", first), first
    assert "prompt of 0 [0:" in first
    assert re.match(r"a token of 0 in \d+\.\d+ s", second), second


@pytest.fixture
def timeline() -> ModuleType:
    """bench/timeline.py."""
    path = Path(__file__).parents[2] / "bench" / "timeline.py"
    spec = importlib.util.spec_from_file_location("timeline", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_picture_has_a_bar_for_each_piece_of_work(timeline: ModuleType, tmp_path: Path) -> None:
    prompts = [("look", png(1)), "a longer text of some words", "short"]
    # The last step is told of when it has ended, which its answers do not wait for.
    with timeline.Steps() as steps, stand_in(slots=3, max_prefill_token_num=8) as pipe:
        pipe(prompts, plain(7))
    bars = timeline.bars(steps.records)
    assert [len(pieces) for pieces in bars["decode"].values()] == [6] * 3
    assert [len(pieces) for pieces in bars["encode"].values()] == [1]
    for sequence in bars["prompt"]:  # a sequence does one thing at a time
        pieces = sorted(piece for kind in bars.values() for piece in kind.get(sequence, []))
        ends = [begin + length for begin, length in pieces]
        assert all(end <= begin + 1e-6 for end, (begin, _) in zip(ends, pieces[1:], strict=False))
    timeline.draw(tmp_path / "steps.png", steps)
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_told_to_nobody(records: Records) -> None:
    with stand_in(slots=1) as pipe:
        pipe("look", plain(2))
    assert records.found == []
