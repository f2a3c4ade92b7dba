"""`vlmforge plan`: does a model fit a GPU, or this machine, before anything is built?"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from vlmforge import env
from vlmforge.api.config import EngineConfig
from vlmforge.api.plan import Plan, plan
from vlmforge.backends import load_backend
from vlmforge.engine.build_cache import describe_checkpoint
from vlmforge.engine.manifest import MANIFEST_FILE, Manifest, load_manifest
from vlmforge.errors import BackendUnavailableError, ConfigError
from vlmforge.limits import available_memory

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", re.IGNORECASE)


class Asked(msgspec.Struct, frozen=True):
    """The command line of `vlmforge plan`. None: the default.

    Attributes:
        model: An engine, a checkpoint's folder, or a hub id.
        gpu_memory, memory: Of a GPU, or of a machine, as text with a unit.
        build: Long options of `build-engine` that shape the engine, and their values.
        session_len, max_batch_size: Of `EngineConfig`, and of the engine that would be built.
        tp: GPUs that share the model.
        as_json: Whether to print JSON.
    """

    model: str
    gpu_memory: str | None
    memory: str | None
    build: Mapping[str, str]
    session_len: int | None
    max_batch_size: int | None
    tp: int
    as_json: bool


def run_plan(asked: Asked) -> int:
    """Print the plan; 1 when the model does not fit (VlmforgeError: there is no plan)."""
    manifest = _manifest(asked)
    config = EngineConfig(session_len=asked.session_len, max_batch_size=asked.max_batch_size)
    found = plan(manifest, config, _memory(asked, manifest))
    if asked.as_json:
        data = {**msgspec.to_builtins(found), "fits": found.fits}
        print(json.dumps(data, indent=1))
    else:
        print(table(found))
    return 0 if found.fits else 1


def _manifest(asked: Asked) -> Manifest:
    folder = env.expanded(asked.model)
    if (folder / MANIFEST_FILE).exists():
        return _of_engine(load_manifest(folder), asked)
    target = asked.build.get("target", "onnxruntime" if asked.gpu_memory is None else "cuda")
    build = {**_defaults(target), **asked.build, "target": target}
    if asked.session_len is not None:
        build["session-len"] = str(asked.session_len)
    if asked.max_batch_size is not None:
        build["max-batch-size"] = str(asked.max_batch_size)
    if asked.tp > 1:
        build["tp"] = str(asked.tp)
    with tempfile.TemporaryDirectory() as scratch:
        return load_manifest(describe_checkpoint(asked.model, build, Path(scratch) / "described"))


def _defaults(target: str) -> dict[str, str]:
    return {} if target == "onnxruntime" else {"dtype": "float16"}


def _of_engine(manifest: Manifest, asked: Asked) -> Manifest:
    """An engine is as it was built (ConfigError: it was asked for otherwise)."""
    kv = "fp8" if manifest.kv.dtype == "float8_e4m3fn" else manifest.kv.dtype
    built = {
        "target": manifest.backend,
        "dtype": manifest.dtype,
        "weights": manifest.quantisation or "none",
        "kv-dtype": kv,
    }
    for name, value in asked.build.items():
        if value != built[name]:
            raise ConfigError(
                f"A finished engine has its {name}.",
                found=f"--{name} {value}, and an engine of {built[name]}",
                expected="a checkpoint, for what is not built yet",
                fix=f"vlmforge plan {manifest.provenance.source} --{name} {value}",
            )
    if asked.tp != manifest.parallel.tp:
        raise ConfigError(
            "The engine was not built for this many ranks.",
            found=f"--tp {asked.tp}",
            expected=f"--tp {manifest.parallel.tp}, what it was sharded for",
            fix="plan its checkpoint",
        )
    return manifest


def _memory(asked: Asked, manifest: Manifest) -> int:
    """Bytes that the engine would have."""
    on_gpu = manifest.kv.page_size is not None
    given, other = asked.gpu_memory, asked.memory
    if not on_gpu:
        given, other = other, given
    if other is not None:
        name = "gpu-memory" if on_gpu else "memory"
        raise ConfigError(
            "The memory is not of the kind that the engine lies in.",
            found=f"an engine of {manifest.backend}",
            expected=f"--{name}",
            fix=f"--{name} {other}, or another --target",
        )
    if given is not None:
        return parse_size(given)
    own = None
    try:
        own = load_backend(manifest.backend).memory()
    except BackendUnavailableError as error:
        raise ConfigError(
            "There is no GPU here whose memory could be asked.",
            found=error.found,
            expected="the memory of the GPU that is meant",
            fix="--gpu-memory 80GiB",
        ) from error
    return int((own or available_memory()).bytes)


def parse_size(text: str) -> int:
    """Bytes from "80GiB", "24 GB" or a plain number (ConfigError: something else)."""
    found = _SIZE.fullmatch(text.strip())
    size = float(found[1]) * _UNITS[(found[2] or "").lower()] if found else 0
    if not 0 < size < 1 << 60:
        raise ConfigError(
            "This is no size of a memory.",
            found=repr(text),
            expected="a positive number and a unit: MB, GB, MiB or GiB",
            fix="--gpu-memory 80GiB",
        )
    return int(size)


def table(found: Plan) -> str:
    """The plan as text, in GB of 10**9 bytes."""
    of = f"{found.quantisation} and {found.dtype}" if found.quantisation else found.dtype
    title = f"{found.model} for {found.backend}, weights in {of}"
    rows = [("memory", found.memory, "")]
    if found.context:
        rows.append(("driver and libraries", found.context, ""))
    for part in found.parts:
        rows.append((f"{part.name}: weights", part.weights, ""))
        if part.activations or part.library:
            rows.append((f"{part.name}: activations", part.activations, ""))
            rows.append((f"{part.name}: ONNX Runtime's own", part.library, ""))
    if found.cache is not None:
        cache = found.cache
        words = f"{cache.blocks:,} blocks of {cache.block_tokens} tokens in {cache.dtype}"
        rows.append(("key/value cache", cache.bytes, words))
    width = max(len(name) for name, _, _ in rows)
    lines = [
        f"{name:<{width}} {size / 1e9:9.3f} GB  {words}".rstrip() for name, size, words in rows
    ]
    return "\n".join([title, *lines, *_verdict(found)])


def _verdict(found: Plan) -> list[str]:
    if found.cache is not None:
        cache = found.cache
        return [
            f"It fits: {cache.tokens:,} tokens at {cache.bytes_per_token:,} bytes; "
            f"{cache.sequences} sequences at once of up to {cache.window:,} tokens each, "
            f"{cache.full_windows} of them if all are as long."
        ]
    assert found.refusal is not None
    refusal = found.refusal
    return [
        f"It does not fit: {refusal.summary}",
        f"  found:    {refusal.found}",
        f"  expected: {refusal.expected}",
        "  what would fit:",
        *(f"    {change}" for change in refusal.changes),
    ]
