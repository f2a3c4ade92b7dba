"""Does the server hold? Load with clients that leave and clients that send nonsense; then its end.

    python bench/serve_check.py ENGINE

64 clients with 50 requests each, all with pictures; 20 % go away in the middle, 10 % send nonsense;
each answer is compared with that of `pipe()`. Then SIGTERM in the middle of 24 streams: they must
end whole, and whoever comes meanwhile must get 503. Exit status 1 if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import httpx

from http_load import ALL, MOST_TOKENS, Question, body_of, server
from vlmforge import GenerationConfig, pipeline

BAD: tuple[dict[str, Any], ...] = ({"temperature": 7}, {"messages": []}, {"odd": 1})
HANGS = 900.0  # seconds after which a request is said to hang, on however busy a machine
TERMINATED = 24


@dataclass
class Tally:
    """What came of requests.

    Attributes:
        right: Answers that are those of `pipe()`.
        wrong: Others.
        left: Streams that their clients left.
        refused: Nonsense that got 400.
        strange: Any other status, or a stream that did not end as streams do.
        hung: Requests without an end.
    """

    right: int = 0
    wrong: int = 0
    left: int = 0
    refused: int = 0
    strange: int = 0
    hung: int = 0

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return self.wrong == self.strange == self.hung == 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Tally)))


def wanted_of(engine: str) -> dict[Question, str]:
    """The answers of the pipeline."""
    config = GenerationConfig(max_new_tokens=MOST_TOKENS, do_sample=False)
    with pipeline(engine) as pipe:
        answers = pipe([question.messages() for question in ALL], config)
    assert isinstance(answers, list)
    return {question: answer.text for question, answer in zip(ALL, answers, strict=True)}


async def pieces(
    client: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> AsyncIterator[str | None]:
    """The texts of a stream; None at its end, if it has one."""
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                yield None
            elif line.startswith("data: "):
                choices = json.loads(line[6:])["choices"]
                yield choices[0]["delta"].get("content", "") if choices else ""


async def ask(
    client: httpx.AsyncClient, url: str, question: Question, wanted: str, leave: int | None
) -> Tally:
    """One stream, which is left behind its piece `leave`."""
    found = list[str | None]()
    async for piece in pieces(client, url, body_of(question)):
        found.append(piece)
        if leave is not None and len(found) > leave:
            return Tally(left=1)
    if not found or found[-1] is not None:
        return Tally(strange=1)
    return Tally(right=1) if "".join(p or "" for p in found) == wanted else Tally(wrong=1)


async def client_of(
    seed: int, url: str, client: httpx.AsyncClient, wanted: dict[Question, str], count: int
) -> Tally:
    """One client, one request after the other."""
    chance, tally = random.Random(seed), Tally()
    for _ in range(count):
        question, fate = chance.choice(ALL), chance.random()
        try:
            async with asyncio.timeout(HANGS):
                if fate < 0.1:
                    body = body_of(question) | chance.choice(BAD)
                    answer = await client.post(f"{url}/v1/chat/completions", json=body)
                    bad = answer.status_code == 400
                    tally += Tally(refused=1) if bad else Tally(strange=1)
                else:
                    leave = chance.randrange(5) if fate < 0.3 else None
                    tally += await ask(client, url, question, wanted[question], leave)
        except TimeoutError:
            tally += Tally(hung=1)
        except httpx.HTTPError as error:
            print(f"strange: {error!r}")
            tally += Tally(strange=1)
    return tally


async def load(url: str, wanted: dict[Question, str], clients: int, count: int) -> Tally:
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        tasks = [client_of(i, url, client, wanted, count) for i in range(clients)]
        return sum(await asyncio.gather(*tasks), Tally())


def still_there(url: str) -> dict[str, float]:
    """What the server says is going on; nothing, a second after its last client has gone."""
    for _ in range(100):
        text = httpx.get(f"{url}/metrics", timeout=60).text
        found = re.findall(r"^(vlmforge_\w*(?:running|waiting)\w*)\{?[^ ]* ([\d.]+)$", text, re.M)
        left = {name: float(value) for name, value in found}
        if found and not any(left.values()):
            break
        time.sleep(0.1)
    return left


def memory_mib(pid: int) -> float:
    """Resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


async def terminate(url: str, process: subprocess.Popen[str], wanted: dict[Question, str]) -> Tally:
    """Streams that have begun when the signal comes, and requests that come behind it."""
    async with httpx.AsyncClient(timeout=HANGS) as client:
        begun, tally = 0, Tally()

        async def stream(question: Question) -> Tally:
            nonlocal begun
            text, ended = "", False
            async for piece in pieces(client, url, body_of(question)):
                begun += not text
                text, ended = text + (piece or ""), piece is None
            return Tally(right=1) if ended and text == wanted[question] else Tally(wrong=1)

        chance = random.Random(1)
        tasks = [asyncio.create_task(stream(chance.choice(ALL))) for _ in range(TERMINATED)]
        await client.get(f"{url}/health")  # a connection that is open when the listener closes
        while not begun:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        while not all(task.done() for task in tasks):
            try:
                late = await client.post(f"{url}/v1/chat/completions", json=body_of(ALL[0]))
            except httpx.TransportError:  # the last one has ended, and the server with it
                break
            ready = b"shutting down" in late.content and "retry-after" in late.headers
            tally += Tally(refused=1) if late.status_code == 503 and ready else Tally(strange=1)
            await asyncio.sleep(0.05)
        return sum(await asyncio.gather(*tasks), tally)


def main() -> int:
    """Print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=50, help="of each client")
    values = parser.parse_args()
    wanted = wanted_of(values.engine)
    with server(values.engine) as (url, process):
        asyncio.run(load(url, wanted, values.clients, 2))  # every picture has been seen
        before, began = memory_mib(process.pid), time.perf_counter()
        tally = asyncio.run(load(url, wanted, values.clients, values.requests))
        seconds = time.perf_counter() - began
        left = still_there(url)
        print(f"{values.clients} clients x {values.requests} requests in {seconds:.0f} s: {tally}")
        print(f"memory {before:.0f} MiB before, {memory_mib(process.pid):.0f} behind; left: {left}")
        end = asyncio.run(terminate(url, process, wanted))
        status = process.wait(HANGS)
    print(f"SIGTERM in the middle of {TERMINATED} streams: {end}; exit status {status}")
    good = tally.good and end.good and end.right == TERMINATED and status == 0
    return int(not good or not left or any(left.values()))


if __name__ == "__main__":
    sys.exit(main())
