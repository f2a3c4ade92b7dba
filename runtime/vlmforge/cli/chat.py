"""`vlmforge chat`: talk to an engine in the terminal."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmforge.api import pipeline
from vlmforge.config import EngineConfig
from vlmforge.errors import VlmforgeError
from vlmforge.generation import GenerationConfig
from vlmforge.pipe import Pipeline
from vlmforge.response import Response
from vlmforge.session import Session
from vlmforge.vl import load_image

if TYPE_CHECKING:
    import PIL.Image

HELP = """\
/image PATH_OR_URL ...  attach images to the next message
/images                 list what is attached
/drop                   detach all images
/reset                  forget the conversation
/render TEXT            show the exact prompt that TEXT would become
/stats                  lengths and times of the last answer
/help                   this list
/exit                   leave (also Ctrl-D)
Anything else is sent as a message. Ctrl-C stops an answer."""


@dataclass(slots=True)
class _Chat:
    pipe: Pipeline
    config: GenerationConfig
    session: Session = field(default_factory=Session)
    images: list[PIL.Image.Image] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def handle(self, line: str) -> bool:
        """Act on a line; False ends the chat."""
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                return True
            case "/exit" | "/quit":
                return False
            case "/help":
                print(HELP)
            case "/image":
                self._attach(shlex.split(rest))
            case "/images":
                print("\n".join(self.names) or "no images attached")
            case "/drop":
                self._drop()
            case "/reset":
                self.session.reset()
                self._drop()
                print("forgotten")
            case "/render":
                print(repr(self.pipe.render(self._prompt(rest)).text))
            case "/stats":
                self._stats()
            case _ if command.startswith("/"):
                print(f"unknown command {command}; /help lists them")
            case _:
                self._send(line.strip())
        return True

    def _attach(self, sources: list[str]) -> None:
        if not sources:
            print("which? /image PATH_OR_URL ...")
        for source in sources:
            self.images.append(load_image(source))
            self.names.append(source)
            width, height = self.images[-1].size
            print(f"attached {source} ({width}x{height})")

    def _drop(self) -> None:
        self.images.clear()
        self.names.clear()

    def _prompt(self, text: str) -> object:
        return (text, list(self.images)) if self.images else text

    def _send(self, text: str) -> None:
        pieces = self.pipe.chat(self._prompt(text), self.session, self.config, stream_response=True)
        assert not isinstance(pieces, Session)
        try:
            self._print(pieces)
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            print("\n(stopped; this turn is not part of the conversation)")
            return
        self._drop()

    def _print(self, pieces: Iterator[Response]) -> None:
        for piece in pieces:
            print(piece.text, end="", flush=True)
        response = self.session.response
        if response is not None and response.finish_reason == "length":
            print(" (stopped at the length limit)", end="")
        print()

    def _stats(self) -> None:
        response = self.session.response
        if response is None:
            print("no answer yet")
            return
        print(
            f"{response.input_token_len} tokens in, {response.generate_token_len} out, "
            f"{response.finish_reason}; {response.timings}"
        )


def run_chat(values: argparse.Namespace) -> int:
    """Load the engine and read lines until the end of the input."""
    sampling = values.temperature is not None
    config = GenerationConfig(max_new_tokens=values.max_new_tokens, do_sample=sampling or None)
    if sampling:
        config.temperature = values.temperature
    with pipeline(
        values.engine, backend_config=EngineConfig(session_len=values.session_len)
    ) as pipe:
        print(f"{values.engine} is ready; /help lists the commands")
        chat = _Chat(pipe, config)
        while (line := _read()) is not None:
            try:
                if not chat.handle(line):
                    break
            except VlmforgeError as error:
                print(f"{type(error).__name__}: {error}")
    return 0


def _read() -> str | None:
    """The next line; None at the end of the input. Ctrl-C at the prompt clears the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()
