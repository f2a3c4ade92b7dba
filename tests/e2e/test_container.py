"""A container with 2 GB on a machine with 24: what fits runs, what does not is refused beforehand.

The kernel's files are simulated; the engines are real ones that claim larger weights and windows.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import IMAGES
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Response, limits, pipeline
from vlmforge.engine.manifest import MANIFEST_FILE, load_manifest, manifest_digest
from vlmforge.errors import BackendUnavailableError, ImageError
from vlmforge.runner import load

GIB = 1 << 30
PHOTO = str(IMAGES / "photo_640x480.png")
SHORT = GenerationConfig(max_new_tokens=8)
Container = Callable[..., None]


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Container:
    """Makes this process one of a container with so much memory, of which so much is in use."""

    def make(limit: int | None = 2 * GIB, used: int = GIB // 4) -> None:
        files = {
            "proc/meminfo": f"MemTotal: {24 * GIB // 1024} kB\nMemAvailable: {23 * GIB // 1024} kB",
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": "max" if limit is None else str(limit),
            "sys/fs/cgroup/memory.current": str(used),
        }
        for name, content in files.items():
            path = tmp_path / "machine" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n", "ascii")
        root = (tmp_path / "machine",)
        monkeypatch.setattr(limits.available_memory, "__defaults__", root)

    return make


@pytest.fixture
def claiming(hf_engine: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes the engine with other weights in memory (bytes), and another window (tokens)."""

    def make(*, weights: int | None = None, window: int | None = None) -> Path:
        folder = tmp_path / f"claims-{weights}-{window}"
        folder.mkdir()
        for path in hf_engine.iterdir():
            (folder / path.name).symlink_to(path)
        data: dict[str, Any] = json.loads((hf_engine / MANIFEST_FILE).read_text("utf-8"))
        if weights is not None:
            data["parts"][1]["loaded_bytes"] = weights
        if window is not None:
            data["decode"]["session_len"] = window
        data["digest"] = manifest_digest(data)
        (folder / MANIFEST_FILE).unlink()
        (folder / MANIFEST_FILE).write_text(json.dumps(data), "utf-8")
        return folder

    return make


def tokens_in(engine: Path, size: float) -> int:
    return int(size / load_manifest(engine).kv.bytes_per_token)


def planned(pipe: Pipeline) -> int:
    """Bytes of weights and of the whole cache, as the manifest has them."""
    manifest, options = pipe._engine.manifest, pipe._engine.options
    cache = options.blocks * options.block_size * manifest.kv.bytes_per_token
    return cache + sum(part.loaded_bytes for part in manifest.parts) * options.pack


@pytest.mark.parametrize(
    ("weights", "cache"), [(GIB // 100, 1.2 * GIB), (GIB, 0.5 * GIB), (20 * GIB, 0.1 * GIB)]
)
def test_what_fits_runs_within_the_limit(
    hf_engine: Path,
    container: Container,
    claiming: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    weights: int,
    cache: float,
) -> None:
    """Weights that do not fit are mapped: the system can take them back."""
    with pipeline(hf_engine) as pipe:
        expected = pipe(("What is it?", PHOTO), SHORT)
    container()
    engine = claiming(weights=weights, window=tokens_in(hf_engine, cache))
    with caplog.at_level(logging.WARNING, "vlmforge"), pipeline(engine) as pipe:
        assert planned(pipe) <= 2 * GIB - GIB // 4
        assert pipe._engine.options.pack == (weights < 2 * GIB)
        found = pipe(("What is it?", PHOTO), SHORT)
    assert isinstance(found, Response)
    assert isinstance(expected, Response)
    assert found.token_ids == expected.token_ids
    assert ("mapped from the file" in caplog.text) == (weights > 2 * GIB)
    assert "others wait" in caplog.text  # not all sequences have room for their windows


@pytest.mark.parametrize(("weights", "cache"), [(GIB // 100, 1.8 * GIB), (GIB, 0.75 * GIB)])
def test_what_does_not_fit_is_refused_before_it_is_loaded(
    hf_engine: Path,
    container: Container,
    claiming: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    weights: int,
    cache: float,
) -> None:
    engine = claiming(weights=weights, window=tokens_in(hf_engine, cache))
    container(None)  # the machine's memory alone would do
    with pipeline(engine, EngineConfig(max_batch_size=1)) as pipe:
        assert planned(pipe) > cache
    container()
    with monkeypatch.context() as patched, pytest.raises(BackendUnavailableError) as caught:
        patched.setattr(load, "load_backend", lambda name: pytest.fail("it was loaded"))
        pipeline(engine)
    assert caught.value.found.endswith("by the limit of 2.15 GB of /sys/fs/cgroup")
    assert caught.value.expected.startswith(f"{cache / 1e9:.2f} GB for ")
    assert "session_len" in caught.value.fix
    with pipeline(engine, EngineConfig(session_len=512)) as smaller_pipe:  # what the error says
        assert smaller_pipe


def test_a_picture_that_does_not_fit_is_refused_and_others_go_on(
    hf_engine: Path, container: Container
) -> None:
    buffer = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(buffer, "PNG")
    with pipeline(hf_engine) as pipe:
        container(used=2 * GIB - GIB // 2)
        with pytest.raises(ImageError, match="does not fit the memory") as caught:
            pipe(("What is it?", buffer.getvalue()), SHORT)
        assert caught.value.found == "9000 x 9000 pixels, 0.81 GB while they are decoded"
        assert "the limit of 2.15 GB" in caught.value.expected
        refused, answered = pipe([("a", buffer.getvalue()), ("a", PHOTO)], SHORT)
        assert refused.error_code == "invalid_image"
        assert answered.finish_reason in ("stop", "length")
