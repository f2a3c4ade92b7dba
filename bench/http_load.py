"""What benches of the server share: prompts with pictures, a server, a client that costs little."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "black", "purple")
QUESTIONS = ("What color is the circle?", "How many things are there?", "Describe the image.")
MOST_TOKENS = 24
END_OF_BODY = b"\r\n0\r\n\r\n"


@dataclass(frozen=True)
class Question:
    """A text, and a picture of a circle whose left upper corner is at `at`."""

    text: str
    colour: str
    at: tuple[int, int] = (40, 60)

    def messages(self) -> list[dict[str, Any]]:
        """As OpenAI's clients send it."""
        image = Image.new("RGB", (224, 224), "white")
        x, y = self.at
        ImageDraw.Draw(image).ellipse((x, y, x + 110, y + 110), fill=self.colour)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.text},
        ]
        return [{"role": "user", "content": parts}]


# Few, so that all their answers can be known.
ALL = [Question(text, colour) for text in QUESTIONS for colour in COLOURS]


def new_questions(count: int, seed: int) -> list[Question]:
    """Questions about pictures that nobody has seen."""
    chance = random.Random(seed)
    return [
        Question(
            chance.choice(QUESTIONS),
            chance.choice(COLOURS),
            (chance.randrange(110), chance.randrange(110)),
        )
        for _ in range(count)
    ]


def body_of(question: Question, *, stream: bool = True) -> dict[str, Any]:
    """The body of a request."""
    return {
        "messages": question.messages(),
        "temperature": 0,
        "max_tokens": MOST_TOKENS,
        "stream": stream,
    }


def encoded(body: dict[str, Any]) -> bytes:
    """A request as it goes over the wire."""
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> bytes:
    """Send a request, and read its response to the end of the body, unparsed."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    if length is not None:
        return head + await reader.readexactly(int(length[1]))
    body = b""
    while not body.endswith(END_OF_BODY):
        more = await reader.read(1 << 16)
        if not more:
            raise SystemExit("the server closed a response that was not at its end")
        body += more
    return head + body


async def at_once(port: int, requests: Sequence[bytes], clients: int) -> list[bytes]:
    """The responses, in order; `clients` connections each send one after the other."""
    left, found = iter(enumerate(requests)), [b""] * len(requests)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        for index, request in left:
            found[index] = await exchange(reader, writer, request)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


@contextmanager
def server(engine: str, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server of its own process, which must end by itself."""
    command = [sys.executable, "-m", "vlmforge.cli", "serve", engine, "--port", "0"]
    command += ["--log-level", "error", "--max-concurrent-requests", "1000", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while "OpenAI clients" not in said:  # the last line of what it says when it is there
            line = process.stderr.readline()
            if not line:
                raise SystemExit(said)
            said += line
        address = re.search(r"http://\S+", said)
        assert address is not None
        try:
            yield address[0], process
        finally:
            process.terminate()
            process.wait(120)
