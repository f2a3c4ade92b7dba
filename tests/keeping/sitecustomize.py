"""What a child process of the tests runs first: its builds share the traces of the other tests.

Or they stand still. Only where a fixture (`traces_for_children`, `builds_that_stand_still`) puts
this folder on the path. Nothing is imported before the builder itself is.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

BUILD = "vlmforge_builder.build"


def stand_still(module: Any) -> None:
    """Whoever traces a part never comes back, but by an exception."""
    trace = module.trace

    def for_ever(part: object) -> None:
        trace(part)
        threading.Event().wait()

    module.trace = for_ever


class Watch:
    """Among the finders of modules: has `BUILD` remember its traces as soon as it is there."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == BUILD else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if "KEPT_TRACES" in os.environ:
                sys.path.append(str(Path(__file__).parents[1]))
                from traces import remember_traces

                remember_traces(Path(os.environ["KEPT_TRACES"]))
            if "HELD_TRACES" in os.environ:
                stand_still(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Watch)
