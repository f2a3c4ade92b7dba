"""`vlmforge chat`: talk to an engine in the terminal."""

from __future__ import annotations

import argparse
import io
import logging
import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, cast

from msgspec import Struct, field

from vlmforge.api.config import EngineConfig
from vlmforge.api.load import pipeline
from vlmforge.api.pipeline import Pipeline
from vlmforge.api.session import Session
from vlmforge.cli.typed import Lines, PlainLines, image_sources
from vlmforge.errors import VlmforgeError
from vlmforge.outputs.generation_config import GenerationConfig
from vlmforge.outputs.response import Response
from vlmforge.vl import load_image

if TYPE_CHECKING:
    import PIL.Image

logger = logging.getLogger("vlmforge")

HELP = """\
/image PATH_OR_URL ...  attach images to the next message
/images                 list what is attached
/drop                   detach all images
/reset                  forget the conversation
/render TEXT            show the exact prompt that TEXT would become
/stats                  lengths and times of the last answer
/help                   this list
/exit                   leave (also Ctrl-D)
Anything else is sent as a message. Tab completes commands and paths, the arrow keys go back to
what you typed. Alt-Enter begins a new line; in a pipe, a message of several lines stands between
two lines of three double quotes. Ctrl-C stops an answer."""
# What would move the cursor, clear the screen or worse: answers and file names are only shown.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def say(text: str = "", end: str = "\n") -> None:
    """Print, with control characters in writing."""
    print(_CONTROL.sub(lambda found: ascii(found[0])[1:-1], text), end=end, flush=True)


class Chat(Struct):
    """A conversation that is typed.

    Attributes:
        images: What goes with the next message.
        names: How they were called.
    """

    pipe: Pipeline
    config: GenerationConfig
    session: Session = field(default_factory=Session)
    images: list[PIL.Image.Image] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    ended: bool = False

    def handle(self, text: str) -> None:
        """Act on what was typed. Nothing that goes wrong ends the chat; it is shown."""
        try:
            self._act(text.strip())
        except VlmforgeError as error:
            say(f"{type(error).__name__}: {error}")
        except BrokenPipeError:  # nobody reads the chat any more
            raise
        except Exception as error:
            say(f"This should not happen. {type(error).__name__}: {error}")
            logger.debug("while acting on %r", text, exc_info=True)
        except KeyboardInterrupt:
            say("\n(stopped)")

    def _act(self, text: str) -> None:
        if not text.startswith("/"):
            if text:
                self._send(text)
            return
        command, *rest = text.split(maxsplit=1)
        if command not in COMMANDS:
            say(f"unknown command {command}; /help lists them")
            return
        COMMANDS[command](self, *rest or [""])

    def _exit(self, _: str) -> None:
        self.ended = True

    def _help(self, _: str) -> None:
        say(HELP)

    def _attach(self, text: str) -> None:
        sources = image_sources(text)
        if not sources:
            say("which? /image PATH_OR_URL ...")
        for source in sources:
            try:
                image = load_image(source)
            except VlmforgeError as error:  # the others are attached
                say(f"{type(error).__name__}: {error}")
                continue
            self.images.append(image)
            self.names.append(source)
            say(f"attached {source} ({image.width}x{image.height})")

    def _list(self, _: str) -> None:
        say("\n".join(self.names) or "no images attached")

    def _drop(self, _: str = "") -> None:
        self.images.clear()
        self.names.clear()

    def _reset(self, _: str) -> None:
        self.session.reset()
        self._drop()
        say("forgotten")

    def _render(self, text: str) -> None:
        say(repr(self.pipe.render(self._prompt(text)).text))

    def _prompt(self, text: str) -> object:
        return (text, list(self.images)) if self.images else text

    def _send(self, text: str) -> None:
        pieces = cast(
            "Generator[Response]",
            self.pipe.chat(self._prompt(text), self.session, self.config, stream_response=True),
        )
        with closing(pieces):  # an answer that is left early is cancelled
            try:
                self._print(pieces)
            except KeyboardInterrupt:
                say("\n(stopped; this turn is not part of the conversation)")
                return
        self._drop()

    def _print(self, pieces: Iterator[Response]) -> None:
        for piece in pieces:
            say(piece.text, end="")
        response = self.session.response
        if response is not None and response.finish_reason == "length":
            say(" (stopped at the length limit)", end="")
        say()

    def _stats(self, _: str) -> None:
        response = self.session.response
        if response is None:
            say("no answer yet")
            return
        say(
            f"{response.input_token_len} tokens in, {response.generate_token_len} out, "
            f"{response.finish_reason}; {response.timings}"
        )


COMMANDS: Mapping[str, Callable[[Chat, str], None]] = {
    "/image": Chat._attach,
    "/images": Chat._list,
    "/drop": Chat._drop,
    "/reset": Chat._reset,
    "/render": Chat._render,
    "/stats": Chat._stats,
    "/help": Chat._help,
    "/exit": Chat._exit,
    "/quit": Chat._exit,
}


def run_chat(values: argparse.Namespace) -> int:
    """Load the engine and act on what is typed until the end of the input."""
    sampling = values.temperature is not None
    config = GenerationConfig(max_new_tokens=values.max_new_tokens, do_sample=sampling or None)
    if sampling:
        config.temperature = values.temperature
    _take_any_bytes()
    engine = EngineConfig(session_len=values.session_len, tp=values.tp)
    with pipeline(values.engine, backend_config=engine) as pipe:
        say(f"{values.engine} is ready; /help lists the commands")
        converse(Chat(pipe, config), _lines())
    return 0


def converse(chat: Chat, lines: Lines) -> None:
    """Act on lines until they or the chat end."""
    while not chat.ended and (text := lines.read()) is not None:
        chat.handle(text)


def _lines() -> Lines:
    if sys.stdin is None:  # the standard input is closed
        return PlainLines(io.StringIO())
    if sys.stdout is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return PlainLines(sys.stdin)
    # Imported for terminals only: it is a tenth of a second, and pipes need none of it.
    from vlmforge.cli.line_editor import LineEditor

    return LineEditor(tuple(COMMANDS))


def _take_any_bytes() -> None:
    """Names of files are bytes: one that is no text must not end the chat."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
