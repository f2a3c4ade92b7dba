"""Ask an engine the held-out questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from msgspec import Struct

from vlmforge.api.pipeline import Pipeline
from vlmforge.evaluation.cases import KINDS, Case
from vlmforge.evaluation.score import facts, wilson
from vlmforge.outputs.generation_config import GenerationConfig
from vlmforge.outputs.response import Response

MAX_NEW_TOKENS = 96
_GROUP = 64

Progress = Callable[[int, int], None]


class Answer(Struct, frozen=True):
    """What came of a case.

    Attributes:
        case: The case.
        replies: The engine's replies, one for each turn.
        right: The last reply tells the facts of the exact answer, and no others.
        exact: It is the exact answer, word for word.
    """

    case: Case
    replies: tuple[str, ...]
    right: bool
    exact: bool


class Score(Struct, frozen=True):
    """The share of right replies to questions of a kind, with its 95 % confidence interval."""

    kind: str
    count: int
    right: int
    exact: int

    @property
    def accuracy(self) -> float:
        """Share of right replies."""
        return self.right / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of `accuracy`."""
        return wilson(self.right, self.count)


class Report(Struct, frozen=True):
    """All answers, and what they cost."""

    answers: tuple[Answer, ...]
    generated_tokens: int
    seconds: float

    @property
    def scores(self) -> tuple[Score, ...]:
        """One for each kind that was asked, in the order of `KINDS`."""
        found = []
        for kind in KINDS:
            of_kind = [answer for answer in self.answers if answer.case.kind == kind]
            if of_kind:
                right, exact = (sum(getattr(a, n) for a in of_kind) for n in ("right", "exact"))
                found.append(Score(kind, len(of_kind), right, exact))
        return tuple(found)

    @property
    def overall(self) -> Score:
        """All kinds together."""
        scores = self.scores
        sums = (sum(getattr(s, name) for s in scores) for name in ("count", "right", "exact"))
        return Score("all", *sums)


def evaluate(pipe: Pipeline, cases: Sequence[Case], progress: Progress) -> Report:
    """Greedy replies to `cases`, in batches; a second turn follows the engine's own first reply."""
    answers: list[Answer] = []
    tokens, start = 0, time.monotonic()
    for first in range(0, len(cases), _GROUP):
        group = cases[first : first + _GROUP]
        replies: list[list[Response]] = [[] for _ in group]
        for turn in range(max(len(case.turns) for case in group)):
            asked = [i for i, case in enumerate(group) if turn < len(case.turns)]
            prompts = [_messages(group[i], replies[i]) for i in asked]
            for i, reply in zip(asked, _ask(pipe, prompts), strict=True):
                replies[i].append(reply)
                tokens += reply.generate_token_len
        answers += [_judge(case, said) for case, said in zip(group, replies, strict=True)]
        progress(len(answers), len(cases))
    return Report(tuple(answers), tokens, time.monotonic() - start)


def _ask(pipe: Pipeline, prompts: Sequence[object]) -> list[Response]:
    config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    replies = pipe(list(prompts), gen_config=config)
    return replies if isinstance(replies, list) else [replies]


def _messages(case: Case, replies: Sequence[Response]) -> list[dict[str, object]]:
    """The conversation up to the next question, in OpenAI's form."""
    messages: list[dict[str, object]] = []
    for index, turn in enumerate(case.turns[: len(replies) + 1]):
        content: list[dict[str, object]] = [
            {"type": "image_data", "image_data": {"data": picture}}
            for picture in (case.pictures if index == 0 else ())
        ]
        content.append({"type": "text", "text": turn.question})
        messages.append({"role": "user", "content": content})
        if index < len(replies):
            messages.append({"role": "assistant", "content": replies[index].text})
    return messages


def _judge(case: Case, replies: Sequence[Response]) -> Answer:
    said, expected = replies[-1].text.strip(), case.turns[-1].answer
    right = facts(case.kind, said) == facts(case.kind, expected)
    return Answer(case, tuple(reply.text for reply in replies), right, said == expected)
