"""Does this GPU's library take the plans of an engine? Needs the library and torch, not vlmforge.

python bench/gpu_probe.py ENGINE
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins_cuda"))

from vlmforge_plugins.cached_attention.plugin import register


def probe(engine: Path) -> bool:
    """Deserialise every part; returns whether all could be."""
    manifest = json.loads((engine / "engine.json").read_text("utf-8"))
    library = importlib.import_module(manifest["backend"])
    torch.zeros(1, device="cuda")  # the context that the library will use
    print(f"{manifest['backend']} {library.__version__} on {torch.cuda.get_device_name()}")
    runtime = library.Runtime(library.Logger(library.Logger.WARNING))
    kept, taken = register(library, {}), []
    for part in manifest["parts"]:
        plan = (engine / part["file"]).read_bytes()
        if hasattr(runtime, "get_engine_validity"):
            print(f"{part['name']}: {runtime.get_engine_validity(plan)}")
        taken.append(runtime.deserialize_cuda_engine(plan) is not None)
        print(f"{part['name']}: {'deserialised' if taken[-1] else 'refused'}", flush=True)
    del kept
    return all(taken)


if __name__ == "__main__":
    sys.exit(not probe(Path(sys.argv[1])))
