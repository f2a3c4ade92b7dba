"""`build-engine` as a child process: its words are passed on as they come, its error is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO

from msgspec import Struct

_KEPT_LINES = 20
_GRACE_S = 30.0


class Outcome(Struct, frozen=True):
    """How a build ended.

    Attributes:
        status: 0, another exit status, or the negative number of the signal that killed it.
        error: The error that it reported: its `error` (the class), `summary`, `found`, `expected`
            and `fix`. None if it reported none.
        words: The last lines that it wrote to standard error.
    """

    status: int
    error: Mapping[str, str] | None
    words: tuple[str, ...]


def run_build(command: Sequence[str]) -> Outcome:
    """Run `command`, a `build-engine` without options of its own for events and for its end.

    What it writes to standard error appears on `sys.stderr`, in a notebook too. It ends when this
    process does, and is ended when this function is left early.
    """
    process = subprocess.Popen(
        [*command, "--until-eof", "--json-events", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    words: deque[str] = deque(maxlen=_KEPT_LINES)
    errors: deque[Mapping[str, str]] = deque(maxlen=1)
    readers = [
        threading.Thread(target=_pass_on, args=(process.stderr, words), daemon=True),
        threading.Thread(target=_keep_errors, args=(process.stdout, errors), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        process.wait()
    finally:
        _end(process)
        for reader in readers:
            reader.join()
    return Outcome(process.returncode, errors[0] if errors else None, tuple(words))


def _end(process: subprocess.Popen[str]) -> None:
    """Politely, so that it clears up; it has ended already unless we leave early."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _pass_on(stream: IO[str], words: deque[str]) -> None:
    with stream:
        for line in stream:
            words.append(line.rstrip())
            _say(line)


def _say(line: str) -> None:
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(line)
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # nobody listens here; the build goes on, and its error will be raised


def _keep_errors(stream: IO[str], errors: deque[Mapping[str, str]]) -> None:
    with stream:
        for line in stream:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # a library prints to standard output too
            if isinstance(event, dict) and event.get("event") == "error":
                errors.append({str(key): str(value) for key, value in event.items()})
