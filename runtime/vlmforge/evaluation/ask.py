"""Ask an engine the questions of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

from vlmforge.api.pipeline import Pipeline
from vlmforge.evaluation.answers import contains, is_exact
from vlmforge.evaluation.dataset import Question
from vlmforge.outputs.generation_config import GenerationConfig
from vlmforge.outputs.response import Response

MATCHES: dict[str, Callable[[str, Sequence[str]], bool]] = {
    "contains": contains,
    "exact": is_exact,
}
"""Rules by their names; the first is the usual one."""

_GROUP = 64


class Judged(Struct, frozen=True):
    """A question and what came of it.

    Attributes:
        question: As it was asked.
        reply: The answer's text, "" where there is none.
        matches: Whether the reply is right, by each rule of `MATCHES`.
        finish_reason: Of the answer.
        error: Why it could not be asked; None: it was.
    """

    question: Question
    reply: str
    matches: dict[str, bool]
    finish_reason: str | None
    error: str | None

    def row(self) -> dict[str, object]:
        """As a line of the results."""
        asked = self.question
        return {
            "line": asked.line,
            "image": asked.image,
            "question": asked.question,
            "answers": list(asked.answers),
            "reply": self.reply,
            **self.matches,
            "finish_reason": self.finish_reason,
            "error": self.error,
        }


def ask(
    pipe: Pipeline, questions: Sequence[Question], *, max_new_tokens: int
) -> Iterator[tuple[Judged, ...]]:
    """Greedy replies in the questions' order, a group at a time; one that fails is wrong."""
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
    for first in range(0, len(questions), _GROUP):
        group = questions[first : first + _GROUP]
        replies = pipe([_messages(question) for question in group], gen_config=config)
        assert isinstance(replies, list)
        yield tuple(map(_judge, group, replies))


def _messages(question: Question) -> list[dict[str, object]]:
    content: list[dict[str, object]] = [{"type": "text", "text": question.question}]
    if question.image is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": question.image}})
    return [{"role": "user", "content": content}]


def _judge(question: Question, reply: Response) -> Judged:
    failed = reply.finish_reason == "error"
    matches = {
        name: not failed and rule(reply.text, question.answers) for name, rule in MATCHES.items()
    }
    error = reply.error_message if failed else None
    return Judged(question, reply.text, matches, reply.finish_reason, error)
