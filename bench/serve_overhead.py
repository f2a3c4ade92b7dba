"""What HTTP costs: the same questions through a server and through `pipe()`, in turns.

    python bench/serve_overhead.py ENGINE --rounds 7

Each round has pictures that neither side has seen. Server and pipeline are processes of their own;
64 connections, each with one request after the other, against `pipe(list)`. Of each, the processor
time of the process is printed as well: unlike seconds, it does not depend on the neighbours, nor on
what the clients of this process take from the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from child import Child
from http_load import MOST_TOKENS, at_once, body_of, encoded, new_questions, server

Round = tuple[float, float]  # seconds, and seconds of processor time


def as_child(engine: str) -> None:
    """Answer rounds through `pipe()`."""
    from vlmforge import GenerationConfig, pipeline

    config = GenerationConfig(max_new_tokens=MOST_TOKENS, do_sample=False)
    with pipeline(engine) as pipe:
        print(json.dumps({"pid": os.getpid()}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            prompts = [q.messages() for q in new_questions(asked["count"], asked["seed"])]
            begin = time.perf_counter()
            if asked["stream"]:
                texts = [""] * len(prompts)
                for piece in pipe.stream_infer(prompts, config):
                    texts[piece.index] += piece.text
            else:
                texts = [answer.text for answer in pipe(prompts, config)]
            print(json.dumps({"seconds": time.perf_counter() - begin, "texts": texts}), flush=True)


def processor_seconds(pid: int) -> float:
    """What a process has used so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(pid: int, work: Callable[[], float]) -> Round:
    before = processor_seconds(pid)
    seconds = work()
    return seconds, processor_seconds(pid) - before


def texts_of(responses: list[bytes], *, stream: bool) -> list[str]:
    """What was answered."""
    found = []
    for response in responses:
        body = response.partition(b"\r\n\r\n")[2]
        if not stream:
            found.append(json.loads(body)["choices"][0]["message"]["content"])
            continue
        lines = [line[6:] for line in body.splitlines() if line.startswith(b"data: {")]
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
        found.append("".join(delta.get("content", "") for delta in deltas))
    return found


def compare(engine: str, count: int, rounds: int, clients: int, *, stream: bool) -> None:
    """Print both sides."""
    of_pipe, of_http = list[Round](), list[Round]()
    pipe = Child("serve_overhead.py", engine, "--child")
    with server(engine) as (url, process):
        port = int(url.rpartition(":")[2])
        for seed in range(rounds + 1):
            questions = new_questions(count, seed)
            requests = [encoded(body_of(question, stream=stream)) for question in questions]
            answers: dict[str, list[str]] = {}

            def ask_pipe(seed: int = seed, answers: dict[str, list[str]] = answers) -> float:
                found = pipe.ask({"count": count, "seed": seed, "stream": stream})
                answers["pipe"] = found["texts"]
                return float(found["seconds"])

            def ask_server(
                requests: list[bytes] = requests, answers: dict[str, list[str]] = answers
            ) -> float:
                begin = time.perf_counter()
                found = asyncio.run(at_once(port, requests, clients))
                seconds = time.perf_counter() - begin
                answers["http"] = texts_of(found, stream=stream)
                return seconds

            sides = [(pipe.hello["pid"], ask_pipe, of_pipe), (process.pid, ask_server, of_http)]
            for pid, work, notes in sides if seed % 2 else reversed(sides):
                notes.append(timed(int(pid), work))
            if answers["pipe"] != answers["http"]:
                raise SystemExit("the answers of the server are not those of the pipeline")
    print_table(of_pipe[1:], of_http[1:], count, stream=stream)


def print_table(of_pipe: list[Round], of_http: list[Round], count: int, *, stream: bool) -> None:
    name = "stream_infer" if stream else "pipe()"
    print(f"| {'streams' if stream else 'whole answers'} | requests/s | processor ms a request |")
    print("|---|---|---|")
    for title, notes in ((name, of_pipe), ("HTTP", of_http)):
        seconds, used = (statistics.median(column) for column in zip(*notes, strict=True))
        print(f"| {title} | {count / seconds:.1f} | {1000 * used / count:.2f} |")
    pairs = list(zip(of_pipe, of_http, strict=True))
    of_seconds = statistics.median(http[0] / pipe[0] for pipe, http in pairs)
    of_processor = statistics.median(http[1] / pipe[1] for pipe, http in pairs)
    print(
        f"HTTP: {of_seconds - 1:+.1%} of the time, {of_processor - 1:+.1%} of the processor time "
        f"(medians of the ratios of {len(pairs)} rounds of {count} requests)\n",
        flush=True,
    )


def main() -> None:
    """Compare whole answers, and streams."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine")
    parser.add_argument("--requests", type=int, default=256, help="of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--only", choices=("whole", "streams"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.child:
        as_child(values.engine)
        return
    for stream in (False, True):
        if values.only in (None, "streams" if stream else "whole"):
            compare(values.engine, values.requests, values.rounds, values.clients, stream=stream)


if __name__ == "__main__":
    main()
