"""`vlmforge doctor`: what this machine has, what is missing, and the command to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence

from msgspec import Struct

from vlmforge.backends import BACKENDS, load_backend
from vlmforge.backends.cuda.machine import MEND, installed_onnxruntime
from vlmforge.errors import BackendUnavailableError
from vlmforge.limits import available_cpus, available_memory
from vlmforge.version import __version__

RUNTIME = (
    "numpy",
    "pillow",
    "blake3",
    "tokenizers",
    "jinja2",
    "msgspec",
    "onnxruntime",
    "filelock",
    "prompt-toolkit",
    "typing-extensions",
    "tqdm",
)
BUILD = (
    "torch",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "safetensors",
    "sentencepiece",
    "huggingface_hub",
    "protobuf",
    "polygraphy",
)


class _Row(Struct, frozen=True):
    name: str
    state: str
    fix: str = ""


def run_doctor() -> int:
    """Print the report; 1 when something that serving needs is missing."""
    print(f"vlmforge {__version__}, Python {platform.python_version()}, {platform.platform()}")
    memory = available_memory()
    print(
        f"{available_cpus()} of {os.cpu_count()} logical processors, "
        f"{memory.bytes / 1e9:.1f} GB of memory, by {memory.limit}"
    )
    rows = {
        "runtime": [_library(name, "pip install vlmforge") for name in RUNTIME],
        "backends": [_backend(name) for name in BACKENDS],
        "build-engine": [_library(name, "pip install 'vlmforge[build]'") for name in BUILD],
    }
    for title, group in rows.items():
        print(f"\n{title}")
        for row in group:
            print(f"  {row.name:18}{row.state}" + (f"  ->  {row.fix}" if row.fix else ""))
    # One backend is enough to serve with.
    return int(any(row.fix for row in (*rows["runtime"], rows["backends"][0])))


def _library(name: str, fix: str) -> _Row:
    if name == "onnxruntime":
        return _onnxruntime()
    try:
        return _Row(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return _Row(name, "missing", fix)


def _onnxruntime() -> _Row:
    """It comes in two distributions that install one Python package: which is there?"""
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in _providers())
    found = installed_onnxruntime()
    fix = f"two install one Python package, the last one wins; for a GPU: {MEND}"
    hidden = "onnxruntime-gpu" in found and "CUDA" not in providers
    return _Row("onnxruntime", f"{found}: providers {providers}", fix if hidden else "")


def _providers() -> Sequence[str]:
    from vlmforge.ort import ort

    return list(ort.get_available_providers())


def _backend(name: str) -> _Row:
    try:
        backend = load_backend(name)
        versions = ", ".join(f"{library} {version}" for library, version in backend.versions())
    except BackendUnavailableError as error:
        return _Row(name, error.found, error.fix)
    try:
        backend.check()
    except BackendUnavailableError as error:
        return _Row(name, f"cannot run here ({versions}): {error.found}", error.fix)
    return _Row(name, f"ready: {versions}")
