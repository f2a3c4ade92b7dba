"""Clients that mean no good, many at once: is each refused in words, and does memory stay flat?

    python bench/serve_hostile.py ENGINE

1,000 open streams (with places for all, and with places for few), 1,000 clients that never end
their headers, headers of 10 MB, bodies of 1 GB, JSON nested a million deep, connections that are
half closed. Each is done three times; memory behind the third must be what it was behind the first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from http_load import END_OF_BODY, server
from serve_check import memory_mib, still_there

CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
FLAT_MIB = 16.0  # a body of the largest size that is taken, parsed: what an allocator may keep
ROUNDS = 3


def request(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    return CHAT + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


SHORT = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
STREAM = request(SHORT | {"stream": True, "max_tokens": 12})


@dataclass(frozen=True)
class Attack:
    """What `count` clients do at once.

    Attributes:
        name: For the table.
        count: Clients.
        one: What one of them does; gives a word for what came back.
        allowed: The words that are right.
    """

    name: str
    count: int
    one: Callable[[int], Awaitable[str]]
    allowed: frozenset[str]


async def _end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """The status of a whole response, "closed" without one, "no words" for one without an error."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        body = b"" if length is None else await reader.readexactly(int(length[1]))
    except (asyncio.IncompleteReadError, ConnectionError):
        return "closed"
    finally:
        writer.close()
    status = head[9:12].decode()
    words = status == "200" or (b"found:" in body and b"fix:" in body)
    return status if words else f"{status} without words"


async def stream(port: int) -> str:
    """A stream that is read slowly, to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(STREAM)
    head = await reader.readuntil(b"\r\n\r\n")
    if b"content-length" in head.lower():
        writer.close()
        return head[9:12].decode()
    body = b""
    while not body.endswith(END_OF_BODY):
        more = await reader.read(1 << 16)
        if not more:
            return "cut"
        body += more
    writer.close()
    return "200" if b"[DONE]" in body else "cut"


async def headers(port: int) -> str:
    """10 MB of headers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(CHAT)
        for _ in range(160):
            writer.write(b"X-Large: " + b"y" * 65_000 + b"\r\n")
            await writer.drain()
    except ConnectionError:
        pass
    return await _end(reader, writer)


async def loris(port: int) -> str:
    """A byte of a header now and then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for byte in CHAT * 3:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(1)
            if reader.at_eof():
                break
    except ConnectionError:
        pass
    return await _end(reader, writer)


async def announced(port: int) -> str:
    """A body of 1 GB that its header tells of."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(CHAT + b"Content-Length: 1073741824\r\n\r\n" + b"x" * 65536)
    return await _end(reader, writer)


async def chunked(port: int) -> str:
    """A body of 1 GB that no header tells of."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(CHAT + b"Transfer-Encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    try:
        for _ in range(1 << 14):
            writer.write(chunk)
            await writer.drain()
            if reader._buffer:  # type: ignore[attr-defined] # an answer is there
                break
    except ConnectionError:
        pass
    return await _end(reader, writer)


async def deep(port: int) -> str:
    """JSON that is nested a million deep."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = b'{"messages": ' + b"[" * 1_000_000
    writer.write(CHAT + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return await _end(reader, writer)


async def half(port: int) -> str:
    """A request, behind which the client closes its half: it counts as gone."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(SHORT | {"max_tokens": 3}))
    await writer.drain()
    writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
    return await _end(reader, writer)


ATTACKS = (
    Attack("open streams", 1000, stream, frozenset({"200", "429"})),
    Attack("clients that never end their headers", 1000, loris, frozenset({"closed"})),
    Attack("headers of 10 MB", 20, headers, frozenset({"431", "closed"})),
    Attack("bodies of 1 GB, announced", 20, announced, frozenset({"413", "closed"})),
    Attack("bodies of 1 GB, in chunks", 4, chunked, frozenset({"413", "closed"})),
    Attack("JSON nested 1,000,000 deep", 20, deep, frozenset({"400"})),
    Attack("half closed", 50, half, frozenset({"closed"})),
)


async def together(attack: Attack, port: int) -> Counter[str]:
    return Counter(await asyncio.gather(*(attack.one(port) for _ in range(attack.count))))


def run(engine: str, places: int, attacks: tuple[Attack, ...]) -> bool:
    """Print what came back, and the server's memory; whether all was right."""
    good = True
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))  # as a system gives it to a server
    with server(engine, "--max-concurrent-requests", str(places)) as (url, process):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
        port = int(url.rpartition(":")[2])
        asyncio.run(stream(port))
        print(f"{places} places, {memory_mib(process.pid):.0f} MiB at first")
        for attack in attacks:
            memory, came = list[float](), Counter[str]()
            for _ in range(ROUNDS):
                came += asyncio.run(together(attack, port))
                left = still_there(url)
                memory.append(memory_mib(process.pid))
                good &= bool(left) and not any(left.values())
            flat = memory[-1] - memory[0] < FLAT_MIB
            good &= flat and set(came) <= attack.allowed
            shown = " ".join(f"{value:.0f}" for value in memory)
            print(
                f"  {attack.count} {attack.name}: {dict(came)}; MiB behind each: {shown}",
                flush=True,
            )
        good &= asyncio.run(stream(port)) == "200"
    return good


def main() -> int:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine")
    values = parser.parse_args()
    good = run(values.engine, 2000, ATTACKS)
    good &= run(values.engine, 64, ATTACKS[:1])
    print("as it must be" if good else "NOT as it must be")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
