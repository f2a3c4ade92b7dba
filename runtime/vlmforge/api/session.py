"""A multi-turn conversation. Turns are sent whole; the key/value cache makes the old ones free."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import PIL.Image
from msgspec import Struct

from vlmforge.api.session_cache import Kept, SessionCache
from vlmforge.api.turn import Turn
from vlmforge.errors import ConfigError, PipelineError
from vlmforge.field_rules import Flag, Identity, Instance, Int, Rule, check_fields, check_value
from vlmforge.inputs.image_names import given_name
from vlmforge.inputs.messages import Conversation, Image, Message, Text
from vlmforge.outputs.generation_config import GenerationConfig
from vlmforge.outputs.response import Response
from vlmforge.runner.terms import Terms
from vlmforge.vl.load import open_image

_ids = itertools.count()


_RULES: Mapping[str, Rule] = {
    "session_id": Identity(),
    "history": Instance(list, "a list"),
    "turns": Instance(Conversation, "a Conversation"),
}


class Sent(Struct, frozen=True):
    """What was sent for a turn: the whole conversation, whether by the chat template, and how."""

    asked: Conversation
    do_preprocess: bool
    terms: Terms


class Served(Protocol):
    """What `Session.load` needs of a pipeline."""

    @property
    def session_cache(self) -> SessionCache:
        """The caches of its engine."""


@dataclass(slots=True, eq=False)
class Session:
    """What `pipe.chat` takes and returns. Used by one thread at a time.

    Attributes:
        session_id: Unique in this process.
        prompt: The last prompt, as it was given.
        response: The answer to it.
        history: Pairs of prompt as given and text of the answer, one for each finished turn.
        gen_config: The generation config of the last turn.
        turns: The conversation so far, with its images opened: later turns read no file again.
    """

    session_id: int = field(default_factory=lambda: next(_ids))
    prompt: object = None
    response: Response | None = None
    history: list[tuple[object, str]] = field(default_factory=list)
    gen_config: GenerationConfig | None = None
    turns: Conversation = field(default_factory=lambda: Conversation(()))
    _finished: list[Turn] = field(default_factory=list, init=False)
    _engine: str | None = field(default=None, init=False)  # digest of the one that answered last
    _cache: weakref.ref[SessionCache] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_fields(self, _RULES)

    def with_prompt(self, prompt: Conversation) -> Conversation:
        """The conversation so far, followed by a new prompt."""
        return Conversation((*self.turns.messages, *prompt.messages))

    def finish_turn(
        self, prompt: object, sent: Sent, response: Response, cache: SessionCache
    ) -> None:
        """Note a turn that went well: the prompt as it was given, and who answered what."""
        before = len(self.turns.messages)
        answer = Message("assistant", (Text(response.text),))
        self.prompt, self.response = prompt, response
        self.history.append((prompt, response.text))
        self.turns = Conversation((*map(_kept, sent.asked.messages), answer))
        messages = self.turns.messages[before:]
        self._finished.append(Turn(prompt, messages, sent.do_preprocess, sent.terms.salt, response))
        self._engine, self._cache = cache.engine_digest, weakref.ref(cache)

    def fork(self) -> Session:
        """A second session with the same turns; from here on they differ.

        Both use what is in the key/value cache of the turns that they share.
        """
        child = Session(
            prompt=self.prompt,
            response=self.response,
            history=list(self.history),
            gen_config=self.gen_config,
            turns=self.turns,
        )
        child._finished = list(self._finished)
        child._engine, child._cache = self._engine, self._cache
        return child

    def rewind(self, turns: int = 1) -> None:
        """Forget the last `turns` turns; 0 changes nothing.

        Raises:
            ConfigError: there are not so many finished turns.
        """
        check_value("rewind(): turns", "turns", turns, Int(0))
        if turns > len(self._finished):
            raise ConfigError(
                "The session does not have so many turns.",
                found=f"rewind({turns}) of {len(self._finished)} turns",
                expected=f"at most {len(self._finished)}",
                fix="session.reset() forgets all of them",
            )
        for turn in self._finished[len(self._finished) - turns :]:
            messages = self.turns.messages
            self.turns = Conversation(messages[: len(messages) - len(turn.messages)])
            self.history.pop()
            self._finished.pop()
        last = self._finished[-1] if self._finished else None
        self.prompt = None if last is None else last.prompt
        self.response = None if last is None else last.response

    def save(self, path: str | os.PathLike[str], *, cache: bool = True) -> int:
        """Write the session to a file, over one of that name: whole, or not at all.

        It holds the turns, the images by content (the originals need not be there any more) and,
        with `cache`, what the pipeline still keeps of them: keys and values of their tokens and the
        images' features, so that `load` has next to nothing to compute. It is a NumPy archive of
        numbers and one JSON text. Not in it: `gen_config`, timings, logits and log-probabilities.

        Returns:
            Tokens whose keys and values are in the file. The others are computed again.

        Raises:
            SessionError: the file cannot be written.
            PipelineError, CancelledError: with `cache`, the session's pipeline is gone or closed.
            BackendUnavailableError: with `cache`, the backend does not hand its cache out.
        """
        from vlmforge.api.session_file import Saved, write_session  # few conversations are saved

        check_value("save(): cache", "cache", cache, Flag())
        kept = self._kept() if cache and self._finished else None
        in_turns = sum(len(turn.messages) for turn in self._finished)
        opening = self.turns.messages[: len(self.turns.messages) - in_turns]
        write_session(_path(path), Saved(self._engine, opening, tuple(self._finished), kept))
        return 0 if kept is None else len(kept.keys)

    @classmethod
    def load(cls, path: str | os.PathLike[str], pipe: Served) -> Session:
        """The session that was saved, in a pipeline of the same engine.

        Its next turn runs its own tokens only, if the file has the cache and there is room for it
        now; otherwise all of them. Images in its prompts are open ones, that any prompt takes.
        Checksums tell accidents, not forgeries: what a file says goes into the pipeline's cache, so
        load only files of people who may decide what this engine answers.

        Raises:
            SessionError: the file is damaged, of another engine, or has an image that asks for more
                pixels than this pipeline allows, or fewer; nothing of it was used.
            ImageError: an image is not within what this pipeline may read.
            PipelineError, CancelledError: the pipeline cannot be used.
        """
        from vlmforge.api.session_file import read_session

        cache = pipe.session_cache
        saved = read_session(_path(path), cache.engine_digest, cache.limits)
        of_turns = (message for turn in saved.turns for message in turn.messages)
        conversation = Conversation((*saved.opening, *of_turns))
        cache.check_images(conversation)
        if saved.kept is not None:
            cache.write(saved.kept)
        turns, session = saved.turns, cls()
        session._finished = list(turns)
        session.history = [(turn.prompt, turn.response.text) for turn in turns]
        session.turns = conversation
        if turns:
            session.prompt, session.response = turns[-1].prompt, turns[-1].response
            session._engine, session._cache = cache.engine_digest, weakref.ref(cache)
        return session

    def reset(self) -> None:
        """Forget all turns."""
        self.prompt, self.response, self.turns = None, None, Conversation(())
        self.history.clear()
        self._finished.clear()

    def close(self) -> None:
        """Forget all turns; the memory of their tokens is given to others as it is needed."""
        self.reset()

    def _kept(self) -> Kept:
        cache = None if self._cache is None else self._cache()
        if cache is None:
            raise PipelineError(
                "The session's pipeline is gone, and its cache with it.",
                found="save() after the pipeline was dropped",
                expected="save() while the pipeline is there",
                fix="save it without: session.save(path, cache=False); it is computed again",
            )
        last = self._finished[-1]
        return cache.read(self.turns, Terms(salt=last.salt), do_preprocess=last.do_preprocess)

    def __repr__(self) -> str:
        turns = [f"USER:\n{_text(prompt)}\nASSISTANT:\n{text}\n" for prompt, text in self.history]
        return "\n".join([f"Session(id={self.session_id})", *turns])


def _path(path: object) -> Path:
    try:
        return Path(os.fsdecode(path))  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(
            "A session's path is not one.",
            found=str(error),
            expected="a str or a Path",
            fix="session.save('conversation.session')",
        ) from error


def _kept(message: Message) -> Message:
    """The message with Pillow images copied: their owner may draw on them before the next turn."""
    return Message(
        message.role,
        tuple(
            Image(open_image(block.source.copy()), given_name(block), block.pixels)
            if isinstance(block, Image) and isinstance(block.source, PIL.Image.Image)
            else block
            for block in message.blocks
        ),
    )


def _text(prompt: object) -> str:
    if isinstance(prompt, tuple):
        return " ".join(part if isinstance(part, str) else "[image]" for part in prompt)
    return str(prompt)
