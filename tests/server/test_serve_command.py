"""`vlmforge serve` as a process: how it begins, and how a signal ends it."""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import vlmforge.server
from conftest import HANGS
from vlmforge.cli import main

# As `vlmforge`, but after some steps the engine stands still until there is a file, named first.
HELD = """
import pathlib, sys, time
from vlmforge.backends.onnxruntime import _Decoder
from vlmforge.cli import main
released, run, steps = pathlib.Path(sys.argv.pop(1)), _Decoder._run, []
def held(*given):
    steps.append(None)
    while len(steps) > 20 and not released.exists():
        time.sleep(0.01)
    return run(*given)
_Decoder._run = held
sys.exit(main())
"""


@contextmanager
def served(
    *arguments: object, program: tuple[object, ...] = ("-m", "vlmforge.cli")
) -> Iterator[tuple[str, subprocess.Popen[str], list[str]]]:
    """The server's address, its process, and its log, which grows."""
    command = [sys.executable, *map(str, (*program, "serve", *arguments, "--port", "0"))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log: list[str] = []
        try:
            while not any("OpenAI clients" in line for line in log):
                line = process.stderr.readline()
                assert line, log
                log.append(line)
            address = re.search(r"http://\S+", log[-3])  # before more is written
            assert address is not None
            reader = threading.Thread(target=lambda: log.extend(process.stderr or ()))
            reader.start()
            yield address[0], process, log
            reader.join(HANGS)
        finally:
            process.kill()


def test_a_signal_lets_what_runs_finish_and_refuses_the_rest(
    hf_engine: Path, tmp_path: Path
) -> None:
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 150,
        "temperature": 0,  # tokens by chance may have no text
        "ignore_eos": True,
        "stream": True,
    }
    program, released = ("-c", HELD, tmp_path / "released"), tmp_path / "released"
    arguments = (hf_engine, "--served-model-name", "tiny", "--log-json")
    arguments = (*arguments, "--shutdown-seconds", HANGS)
    with served(*arguments, program=program) as (url, process, log):
        chat = f"{url}/v1/chat/completions"
        with httpx.Client(timeout=HANGS) as other, httpx.stream("POST", chat, json=body) as stream:
            assert stream.status_code == 200, stream.read()
            lines = stream.iter_lines()
            first = next(lines)
            assert other.get(f"{url}/health").json()["running"] == 1
            process.send_signal(signal.SIGTERM)
            while other.get(f"{url}/health/ready").status_code != 503:
                pass
            refused = other.post(chat, json=body)
            assert refused.status_code == 503 and "shutting down" in refused.text
            released.touch()
            rest = list(lines)
        assert "[DONE]" in rest[-2] + rest[-1] and len([first, *rest]) > 100
        assert process.wait(HANGS) == 0
    written = [json.loads(line.partition(" INFO ")[2]) for line in log if '{"method"' in line]
    whole = next(line for line in written if line["status"] == 200 and "chat" in line["path"])
    assert whole["completion_tokens"] == 150 and whole["finish_reason"] == "length"


def test_two_engines_and_a_key_from_the_environment(
    hf_engine: Path, original_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMFORGE_API_KEYS", "one, two")
    with served(hf_engine, original_engine, "--session-len", "256") as (url, process, _):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer two"}
        cards = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert [card["id"] for card in cards] == [hf_engine.name, original_engine.name]
        assert {card["max_model_len"] for card in cards} == {256}
        unnamed = {"messages": [{"role": "user", "content": "hi"}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=unnamed, headers=headers)
        assert answer.status_code == 404 and hf_engine.name in answer.text
        process.send_signal(signal.SIGINT)
        assert process.wait(HANGS) in (0, 130)


@pytest.fixture
def _loggers_as_before() -> Iterator[None]:
    """The command takes those of its process for its own, and as many files as there may be."""
    loggers = [logging.getLogger(name) for name in ("vlmforge", "uvicorn")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, files)
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.usefixtures("_loggers_as_before")
def test_what_cannot_begin(hf_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(hf_engine), "--port", port]) == 1
    assert "choose another --port" in capsys.readouterr().err
    assert main(["serve", str(hf_engine), "--port", "99999"]) == 1
    assert "ports are 0 to 65535" in capsys.readouterr().err
    assert main(["serve", str(hf_engine), str(hf_engine)]) == 1
    assert "--served-model-name" in capsys.readouterr().err
    assert main(["serve", str(hf_engine), "--served-model-name", "a", "--model-name", "b"]) == 1
    assert "2 names for 1 engines" in capsys.readouterr().err
    assert main(["serve", str(hf_engine), "--api-keys", "ключ"]) == 1
    assert "openssl rand" in capsys.readouterr().err
    for host in ("http://example.org/", "example.org:80", "*.example.org"):
        assert main(["serve", str(hf_engine), "--allowed-media-domains", host]) == 1
        assert "leave out scheme, port" in capsys.readouterr().err
    assert main(["serve", "/nowhere/at/all"]) == 1
    assert "found:" in capsys.readouterr().err


def test_without_the_extra(
    hf_engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlmforge, "server", vlmforge.server)  # put back with its modules
    for name in [name for name in sys.modules if name.startswith("vlmforge.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert main(["serve", str(hf_engine)]) == 1
    assert "pip install 'vlmforge[server]'" in capsys.readouterr().err
