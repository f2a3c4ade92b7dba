"""A child process that is asked, and answers, one line of JSON at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Child:
    """A script of this folder, run with `arguments`; its first line is `hello`.

    Args:
        quiet: Its standard error is thrown away.
        sources: Folders whose packages it imports instead of the installed ones.
    """

    def __init__(
        self, script: str, *arguments: object, quiet: bool = False, sources: tuple[Path, ...] = ()
    ) -> None:
        # Modules are compiled once: else a side whose files changed since would do so each time.
        given = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        if sources:
            given["PYTHONPATH"] = os.pathsep.join(map(str, sources))
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env=given,
        )
        self.hello = self._read()

    def ask(self, question: Mapping[str, object]) -> dict[str, Any]:
        """The answer to a question."""
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End the child."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a child died with status {self._process.wait()}")
        return dict(json.loads(line))
