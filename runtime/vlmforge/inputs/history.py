"""Leaving out the oldest turns of a conversation, as an engine's prompt policy asks for."""

from __future__ import annotations

from vlmforge.inputs.messages import Conversation
from vlmforge.inputs.render import RenderedPrompt


def newest_turns(conversation: Conversation, rendered: RenderedPrompt, window: int) -> Conversation:
    """The conversation without the turns that make it too long; itself if there are none.

    A turn begins with each message of the user. The last turn and what comes before the first one
    (a system message) are always kept.

    Args:
        conversation: Messages.
        rendered: The prompt of all of them.
        window: Fewer tokens than this may come before the content of the last user message.
    """
    messages = conversation.messages
    turns = [i for i, message in enumerate(messages) if message.role == "user"]
    starts = rendered.content_starts[-len(messages) :]  # a template's own system message is no one
    if len(turns) < 2 or len(starts) < len(messages):
        return conversation
    first, last = starts[turns[0]], starts[turns[-1]]
    # Contents are encoded apart, so leaving a turn out shortens the rest by just its tokens.
    kept = next((i for i in turns if last - (starts[i] - first) < window), turns[-1])
    if kept == turns[0]:
        return conversation
    return Conversation((*messages[: turns[0]], *messages[kept:]))
