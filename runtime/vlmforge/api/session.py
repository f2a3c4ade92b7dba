"""A multi-turn conversation. Turns are sent whole; the key/value cache makes the old ones free."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import PIL.Image

from vlmforge.field_rules import Identity, Instance, Rule, check_fields
from vlmforge.inputs.image_names import given_name
from vlmforge.inputs.messages import Conversation, Image, Message, Text
from vlmforge.outputs.generation_config import GenerationConfig
from vlmforge.outputs.response import Response
from vlmforge.vl.load import open_image

_ids = itertools.count()


_RULES: Mapping[str, Rule] = {
    "session_id": Identity(),
    "history": Instance(list, "a list"),
    "turns": Instance(Conversation, "a Conversation"),
}


@dataclass(slots=True, eq=False)
class Session:
    """What `pipe.chat` takes and returns.

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

    def __post_init__(self) -> None:
        check_fields(self, _RULES)

    def with_prompt(self, prompt: Conversation) -> Conversation:
        """The conversation so far, followed by a new prompt."""
        return Conversation((*self.turns.messages, *prompt.messages))

    def finish_turn(self, prompt: object, asked: Conversation, response: Response) -> None:
        """Note a turn that went well; `asked` is the whole conversation that was sent."""
        answer = Message("assistant", (Text(response.text),))
        self.prompt, self.response = prompt, response
        self.history.append((prompt, response.text))
        self.turns = Conversation((*map(_kept, asked.messages), answer))

    def reset(self) -> None:
        """Forget all turns."""
        self.prompt, self.response, self.turns = None, None, Conversation(())
        self.history.clear()

    def close(self) -> None:
        """Forget all turns; the memory of their tokens is given to others as it is needed."""
        self.reset()

    def __repr__(self) -> str:
        turns = [f"USER:\n{_text(prompt)}\nASSISTANT:\n{text}\n" for prompt, text in self.history]
        return "\n".join([f"Session(id={self.session_id})", *turns])


def _kept(message: Message) -> Message:
    """The message with Pillow images copied: their owner may draw on them before the next turn."""
    return Message(
        message.role,
        tuple(
            Image(open_image(block.source.copy()), given_name(block))
            if isinstance(block, Image) and isinstance(block.source, PIL.Image.Image)
            else block
            for block in message.blocks
        ),
    )


def _text(prompt: object) -> str:
    if isinstance(prompt, tuple):
        return " ".join(part if isinstance(part, str) else "[image]" for part in prompt)
    return str(prompt)
