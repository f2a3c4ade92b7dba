"""The server under load: is each answer that of `pipe()`, and how long do clients wait?

    python bench/serve.py ENGINE --check          64 clients, 20 % go away, 10 % send nonsense
    python bench/serve.py ENGINE                  Poisson arrivals at three loads, and a picture

The server is a process of its own; clients are tasks of this one.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageDraw

from vlmforge import GenerationConfig, pipeline

COLOURS = ("red", "green", "blue", "yellow", "black", "purple")
QUESTIONS = ("What color is the circle?", "How many things are there?", "Describe the image.")
MOST_TOKENS = 24


@dataclass(frozen=True)
class Question:
    """One of few prompts, so that all their answers can be known."""

    text: str
    colour: str

    def messages(self) -> list[dict[str, Any]]:
        """As OpenAI's clients send it."""
        image = Image.new("RGB", (224, 224), "white")
        ImageDraw.Draw(image).ellipse((40, 60, 150, 170), fill=self.colour)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.text},
        ]
        return [{"role": "user", "content": parts}]


ALL = [Question(text, colour) for text in QUESTIONS for colour in COLOURS]


@contextmanager
def server(engine: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server of its own process, which must end by itself."""
    command = [sys.executable, "-m", "vlmforge.cli", "serve", engine, "--port", "0"]
    command += ["--log-level", "error", "--max-concurrent-requests", "1000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(3)]
        address = re.search(r"http://\S+", lines[0])
        if address is None:
            raise SystemExit("".join(lines) + (process.stderr.read() or ""))
        try:
            yield address[0], process
        finally:
            process.terminate()
            process.wait(120)


async def pieces(
    client: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream."""
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[6:])


def body_of(question: Question) -> dict[str, Any]:
    return {
        "messages": question.messages(),
        "temperature": 0,
        "max_tokens": MOST_TOKENS,
        "stream": True,
    }


# --- is it right? ------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of the requests of a check."""

    right: int = 0
    wrong: int = 0
    left: int = 0
    refused: int = 0
    strange: int = 0
    tokens: int = 0


async def client_of(
    seed: int, url: str, client: httpx.AsyncClient, wanted: dict[Question, str], count: int
) -> Tally:
    """One client, one request after the other."""
    chance, tally = random.Random(seed), Tally()
    for _ in range(count):
        question, fate = chance.choice(ALL), chance.random()
        body = body_of(question)
        if fate < 0.1:
            body |= chance.choice(({"temperature": 7}, {"messages": []}, {"odd": 1}))
            answer = await client.post(f"{url}/v1/chat/completions", json=body)
            tally.refused += answer.status_code == 400
            tally.strange += answer.status_code != 400
            continue
        text, stop_after = "", chance.randrange(1, 6) if fate < 0.3 else None
        async for chunk in pieces(client, url, body):
            choice = chunk["choices"][0]
            text += choice["delta"].get("content", "")
            tally.tokens += bool(choice["delta"].get("content"))
            if stop_after is not None and (stop_after := stop_after - 1) == 0:
                break
        if stop_after is not None:
            tally.left += 1
        elif text == wanted[question]:
            tally.right += 1
        else:
            tally.wrong += 1
    return tally


def check(engine: str, clients: int, count: int) -> int:
    """Print what came of it; the status of the process."""
    with pipeline(engine) as pipe:
        config = GenerationConfig(max_new_tokens=MOST_TOKENS, do_sample=False)
        prompts = [question.messages() for question in ALL]
        answers = pipe(prompts, config)
        assert isinstance(answers, list)
        wanted = {q: answer.text for q, answer in zip(ALL, answers, strict=True)}

    async def run(url: str) -> tuple[Tally, int]:
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            tasks = [client_of(i, url, client, wanted, count) for i in range(clients)]
            tallies = await asyncio.gather(*tasks)
            await asyncio.sleep(1)
            running = (await client.get(f"{url}/health")).json()["running"]
        names = Tally.__dataclass_fields__
        return Tally(**{name: sum(getattr(t, name) for t in tallies) for name in names}), running

    with server(engine) as (url, _):
        began = time.perf_counter()
        tally, running = asyncio.run(run(url))
        seconds = time.perf_counter() - began
    print(f"{clients} clients x {count} requests in {seconds:.0f} s: {tally}; still run: {running}")
    return int(tally.wrong + tally.strange + running > 0)


# --- how long does it take? --------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Of one request: seconds to its first text, and between its pieces."""

    first: float
    gaps: tuple[float, ...]


async def timed(client: httpx.AsyncClient, url: str, question: Question) -> Times:
    """Ask, and note when pieces come."""
    began, marks = time.perf_counter(), list[float]()
    async for chunk in pieces(client, url, body_of(question)):
        if chunk["choices"][0]["delta"].get("content"):
            marks.append(time.perf_counter())
    if not marks:
        marks = [time.perf_counter()]
    gaps = tuple(b - a for a, b in itertools.pairwise(marks))
    return Times(marks[0] - began, gaps)


async def poisson(url: str, rate: float, count: int, seed: int) -> tuple[float, list[Times]]:
    """`count` requests that arrive at `rate` a second; seconds until the last has ended."""
    chance, tasks = random.Random(seed), list[asyncio.Task[Times]]()
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        began = time.perf_counter()
        for _ in range(count):
            tasks.append(asyncio.create_task(timed(client, url, chance.choice(ALL))))
            await asyncio.sleep(chance.expovariate(rate))
        times = await asyncio.gather(*tasks)
        return time.perf_counter() - began, times


def percentiles(values: Sequence[float]) -> str:
    """p50 / p95 / p99 in milliseconds."""
    if len(values) < 2:
        return "-"
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return " / ".join(f"{1000 * cuts[at - 1]:.0f}" for at in (50, 95, 99))


def measure(engine: str, count: int, picture: Path | None) -> int:
    """Print a table of three loads."""
    with server(engine) as (url, _):
        asyncio.run(poisson(url, 50.0, 20, 1))  # warm: every picture has been seen
        seconds, _ = asyncio.run(poisson(url, 1e6, count, 2))
        most = count / seconds
        print(f"all at once: {most:.1f} requests/s; loads are shares of that")
        print("| load | requests/s | first token ms p50 / p95 / p99 | between tokens ms |")
        print("|---|---|---|---|")
        found: dict[str, list[Times]] = {}
        for share in (0.3, 0.6, 0.9):
            seconds, times = asyncio.run(poisson(url, share * most, count, 3))
            gaps = [gap for one in times for gap in one.gaps]
            first = percentiles([one.first for one in times])
            print(f"| {share:.0%} | {count / seconds:.1f} | {first} | {percentiles(gaps)} |")
            found[f"{share:.0%} load"] = times
    if picture is not None:
        plot(found, picture)
    return 0


def plot(found: dict[str, list[Times]], picture: Path) -> None:
    """The share of requests whose first token has come by a time."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    for name, times in found.items():
        firsts = sorted(1000 * one.first for one in times)
        axes.step(firsts, [(i + 1) / len(firsts) for i in range(len(firsts))], label=name)
    axes.set_xlabel("ms to the first token")
    axes.set_ylabel("share of requests")
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture)


def main() -> int:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=50, help="of each client, or of each load")
    parser.add_argument("--picture", type=Path, help="write a plot: .svg or .png")
    values = parser.parse_args()
    if values.check:
        return check(values.engine, values.clients, values.requests)
    return measure(values.engine, values.requests, values.picture)


if __name__ == "__main__":
    sys.exit(main())
