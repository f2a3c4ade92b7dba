"""What tracing leaves behind."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from vlmforge_builder.export import trace


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_off_while_tracing_and_then_as_it_was(enabled: bool) -> None:
    seen = []

    def module() -> Any:
        seen.append(gc.isenabled())
        raise ValueError("no module")

    part: Any = SimpleNamespace(module=module)
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ValueError, match="no module"):
            trace(part)
        assert (seen, gc.isenabled()) == ([False], enabled)
    finally:
        gc.enable()
