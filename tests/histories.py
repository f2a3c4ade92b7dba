"""Requests that come, end, fork and are cancelled beside each other, drawn by a seed.

All of a loaded engine takes part but its threads: requests are prepared, planned, run and answered
as ever, and every history runs the same way again. The cache is too small: it has blocks for the
prompts of a few requests, and hardly any for their answers.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field

from msgspec import structs

from conftest import IMAGES
from vlmforge import GenerationConfig, Pipeline
from vlmforge.backends import FloatArray
from vlmforge.inputs.messages import Conversation, Message, Text, parse_prompt
from vlmforge.kv.cache import Keys
from vlmforge.outputs.events import Event
from vlmforge.outputs.response import Response
from vlmforge.runner.features import FeatureCache
from vlmforge.runner.job import Job
from vlmforge.runner.stages import Engine
from vlmforge.runner.terms import Terms
from vlmforge.scheduler.jobs import Jobs
from vlmforge.scheduler.prepare import Caches, Preparation, token_facts
from vlmforge.scheduler.request import Request
from vlmforge.scheduler.sequence import TokenSequence

SLOTS, LONGEST_ANSWER = 4, 32
_PHOTO, _TALL, _GRAY = (
    str(IMAGES / f"{name}.png") for name in ("photo_640x480", "tall_300x900", "gray_257x191")
)
# Texts, pictures and both, some of which begin alike.
_PROMPTS: tuple[object, ...] = (
    "hi",
    "Write one line about cats.",
    "Write one line about cats and dogs.",
    ("What is shown in this image?", _PHOTO),
    ("What is shown in this image?", _GRAY),
    ("What is shown in this image, and why?", _PHOTO),
    ("Compare these.", [_TALL, _GRAY]),
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "What can you do?"},
    ],
)
_CONVERSATIONS = tuple(map(parse_prompt, _PROMPTS))


@dataclass(frozen=True)
class Asked:
    """A request of a history; times are in steps.

    Attributes:
        conversation: What is asked.
        count: Tokens to generate at most.
        arrival: When it comes.
        cancelled: When it is cancelled; None: never.
        priority: Higher goes first.
        forks: It goes on from what this earlier request of the history has answered by then,
            whether or not that goes on too.
    """

    conversation: Conversation
    count: int = LONGEST_ANSWER
    arrival: int = 0
    cancelled: int | None = None
    priority: int = 0
    forks: int | None = None


@dataclass(frozen=True)
class History:
    """What is asked, and of what.

    Attributes:
        asked: In the order of their arrival.
        slots: Requests that may have a place at once.
        fitting: Requests whose prompts fit the cache together, if they are not the longest.
        spare: Blocks that there are beside those.
        block: Tokens of a block.
        chunk: Tokens of a prompt in one step.
        reuse: Whether prefixes are reused.
        views: Views in one run of the vision part.
    """

    asked: tuple[Asked, ...]
    slots: int
    fitting: int
    spare: int
    block: int
    chunk: int
    reuse: bool
    views: int


def drawn(seed: int) -> History:
    """A history of four to nine requests."""
    draw = random.Random(seed)
    conversations = draw.sample(_CONVERSATIONS, draw.randint(1, 4))

    def one(index: int, arrival: int) -> Asked:
        return Asked(
            draw.choice(conversations),
            draw.randint(1, LONGEST_ANSWER),
            arrival,
            arrival + draw.randint(0, 30) if draw.random() < 0.2 else None,
            draw.choice((0, 0, 0, 1, 2)),
            draw.randrange(index) if index and draw.random() < 0.25 else None,
        )

    arrivals = sorted(draw.randint(0, 12) for _ in range(draw.randint(4, 9)))
    return History(
        tuple(one(index, arrival) for index, arrival in enumerate(arrivals)),
        slots=draw.randint(2, SLOTS),
        fitting=draw.randint(1, SLOTS),
        spare=draw.randint(0, 2),
        block=draw.choice((4, 16)),
        chunk=draw.choice((5, 37, 512)),
        reuse=draw.random() < 0.8,
        views=draw.choice((1, 3)),
    )


@dataclass
class Asking:
    """A request under way, or ended."""

    asked: Asked
    conversation: Conversation
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = GenerationConfig(max_new_tokens=self.asked.count)
        self.request = Request(self.conversation, config, self.events.append)

    @property
    def answer(self) -> Response:
        """What came so far."""
        whole = Response()
        for event in self.events:
            assert event.error is None, event.error
            assert event.delta is not None
            whole.extend(event.delta)
        return whole


class NotedJobs(Jobs):
    """Jobs whose sequences get a priority, and are kept to be counted."""

    priority = 0
    sequences: tuple[TokenSequence, ...] = ()

    def _sequence(self, job: Job) -> TokenSequence:
        sequence = super()._sequence(job)
        sequence.priority = self.priority
        self.sequences = (*self.sequences, sequence)
        return sequence

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks that sequences hold, and those that are in use with what ended ones left."""
        return self._cache.held_blocks, self._cache.used_blocks


class World(Caches):
    """Runs requests on an engine, step by step, in this thread."""

    def __init__(self, engine: Engine, *, chunk: int = 512, reuse: bool, views: int = 1) -> None:
        features = FeatureCache(engine.encode, batch=views)
        self.jobs = NotedJobs(engine, features, chunk=chunk, reuse_prefixes=reuse)
        self._features = features
        self._prepare = Preparation(engine, self, token_facts(engine))

    def known_features(self, digest: bytes) -> FloatArray | None:
        return self._features.known(digest)

    def cached(self, keys: Keys, terms: Terms) -> int:
        return self.jobs.cached(keys, terms)

    def ask(self, asking: Asking) -> None:
        self.jobs.priority = asking.asked.priority
        self.jobs.add(self._prepare.job(asking.request))


@dataclass(frozen=True)
class Ran:
    """What came of a history: the requests, and how often one lost its place or found tokens."""

    asking: list[Asking]
    preempted: int
    reused: int
    steps: int


class Family:
    """A loaded engine, and what requests of it give alone."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe
        self._alone: dict[Conversation, list[int]] = {}

    def alone(self, conversation: Conversation) -> list[int]:
        """Greedy ids with nothing beside it and nothing remembered."""
        if conversation not in self._alone:
            world = World(self._pipe._engine, reuse=False)
            asking = Asking(Asked(conversation), conversation)
            world.ask(asking)
            while not world.jobs.idle:
                world.jobs.step()
            self._alone[conversation] = asking.answer.token_ids
        return self._alone[conversation]

    def run(self, history: History) -> Ran:
        """Run a history to its end; what is left of the cache is accounted for at each step."""
        prompts = sorted(self._tokens(asked.conversation) for asked in history.asked)
        most = prompts[-1] + LONGEST_ANSWER
        tokens = max(most, sum(prompts[: history.fitting]))
        blocks = -(-tokens // history.block) + history.spare
        options = structs.replace(
            self._pipe._engine.options,
            slots=history.slots,
            block_size=history.block,
            budget=blocks,
        )
        engine = dataclasses.replace(self._pipe._engine, options=options)
        world = World(engine, chunk=history.chunk, reuse=history.reuse, views=history.views)
        coming, there = list(history.asked), list[Asking]()
        time = 0
        while coming or not world.jobs.idle:
            while coming and coming[0].arrival <= time:
                asked = coming.pop(0)
                there.append(Asking(asked, self._conversation(asked, there, most)))
                world.ask(there[-1])
            for asking in there:
                if asking.asked.cancelled is not None and asking.asked.cancelled <= time:
                    asking.request.cancelled.set()
            world.jobs.step()
            assert world.jobs.blocks <= (blocks, blocks)
            time += 1
            assert time < 20_000, "it never ends"
        assert world.jobs.blocks[0] == 0
        sequences = world.jobs.sequences
        preempted, reused = sum(s.preempted for s in sequences), sum(s.cached for s in sequences)
        return Ran(there, preempted, reused, time)

    def check(self, history: History) -> Ran:
        """Run a history; each answer is what the request gives alone, or its beginning."""
        ran = self.run(history)
        for asking in ran.asking:
            answer, alone = asking.answer, self.alone(asking.conversation)[: asking.asked.count]
            assert asking.request.ended
            if answer.finish_reason == "abort":
                assert asking.asked.cancelled is not None
                alone = alone[: len(answer.token_ids)]
            assert answer.token_ids == alone, (asking.asked, ran)
        return ran

    def _conversation(self, asked: Asked, there: list[Asking], most: int) -> Conversation:
        """What is asked; if it goes on from another request, that one's unless it is too long."""
        if asked.forks is None:
            return asked.conversation
        before = there[asked.forks]
        turns = (
            Message("assistant", (Text(before.answer.text),)),
            Message("user", (Text("And now?"),)),
        )
        longer = Conversation((*before.conversation.messages, *turns))
        fits = self._tokens(longer) + LONGEST_ANSWER <= most
        return longer if fits else before.conversation

    def _tokens(self, conversation: Conversation) -> int:
        return len(self._pipe._engine.render(conversation).token_ids)
