"""How sessions on a GPU are asked for, without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vlmforge.backends.cuda import gpu
from vlmforge.backends.cuda.machine import PROVIDER


class Session:
    def get_providers(self) -> list[str]:
        return [PROVIDER]


@pytest.mark.parametrize("settings", [{}, {"user_compute_stream": "7"}], ids=["own", "given"])
def test_a_session_takes_nothing_of_the_host_that_another_does_not_need(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    """A chain has dozens: a loader of weights, or a pool of threads, in each would be as many."""
    asked: list[tuple[str, dict[str, str]]] = []
    threads: list[int] = []

    def opened(file: Path, providers: Sequence[Any], options: Any) -> Session:
        asked.extend(providers)
        threads.append(options.intra_op_num_threads)
        return Session()

    monkeypatch.setattr(gpu, "open_session", opened)
    gpu._session(Path("a.onnx"), 1, settings)
    ((provider, found),) = asked
    assert provider == PROVIDER
    assert found["external_data_loader_reading_threads"] == "0"
    assert found["device_id"] == "1"
    assert settings.items() <= found.items()
    assert threads == [1]
