"""The line of a terminal, by prompt-toolkit: history, completion, several lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from typing_extensions import override

from vlmforge.cli.typed import Lines, path_beginnings

_IMAGE = "/image "


class ChatCompleter(Completer):
    """Completes commands, and the paths after /image."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    @override
    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        text = document.text_before_cursor
        if text.startswith(_IMAGE):
            yield from self._of_path(text.removeprefix(_IMAGE), complete_event)
        elif text.startswith("/") and not any(map(str.isspace, text)):
            for command in self._commands:
                if command.startswith(text):
                    yield Completion(command, start_position=-len(text))

    def _of_path(self, text: str, event: CompleteEvent) -> Iterable[Completion]:
        """Of the longest end of the line that begins a path: names may have spaces."""
        beginnings = [*path_beginnings(text)] if text[-1:].strip() else [*path_beginnings(text), ""]
        for beginning in beginnings:
            found = [*self._paths.get_completions(Document(beginning), event)]
            if found:
                return found
        return []


class LineEditor(Lines):
    """Reads a terminal: Enter sends, Alt-Enter or Ctrl-J begins a new line.

    What is typed is remembered for the arrow keys while the chat lasts, and written nowhere.
    `terminal` and `screen` are prompt-toolkit's own unless they are given.
    """

    def __init__(
        self, commands: Sequence[str], terminal: Input | None = None, screen: Output | None = None
    ) -> None:
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            history=InMemoryHistory(),
            completer=ChatCompleter(commands),
            complete_while_typing=False,
            key_bindings=_bindings(),
            input=terminal,
            output=screen,
        )

    @property
    def typed(self) -> str:
        """The line so far."""
        return self._session.default_buffer.text

    @override
    def read(self) -> str | None:
        """Ctrl-C clears the line; Ctrl-D on an empty one is the end."""
        while True:
            try:
                return self._session.prompt()
            except EOFError:
                return None
            except KeyboardInterrupt:
                continue


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
